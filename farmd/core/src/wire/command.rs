//! Commands from node to node: the frames of a TCP connection, authenticated with the cluster key.
//!
//! Owns the layout, the tags and the counters under them. Never touches a socket and draws no nonce: farmd's `remote`
//! does, on both ends. Nothing is encrypted; who listens reads the commands, who changes, adds, repeats or reorders a
//! byte is found out.
//!
//! Each side sends one opening, the server first; then the client one request, and the server the answer.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +---------------+---------------+---------------+---------------+
//! |      'F'      |      'C'      |      'M'      |      'D'      |  opening
//! +---------------+---------------+---------------+---------------+
//! |  version = 1  |     node      |               0               |
//! +---------------+---------------+-------------------------------+
//! |                          nonce (16)                           |
//! +---------------------------------------------------------------+
//!
//! +---------------------------------------------------------------+
//! |                    length of the payload                      |  frame
//! +---------------+-----------------------------------------------+
//! |     kind      |                 payload ...                   |
//! +---------------+-----------------------------------------------+
//! |                           tag (16)                            |
//! +---------------------------------------------------------------+
//!
//! kind 1 request   client   { length (1), method } { length (2), path } { length (1), who asks } body
//! kind 2 head      server   HTTP status (2)
//! kind 3 body      server   a piece of the answer's body
//! kind 4 alive     server   nothing: the command goes on
//! kind 5 end       server   nothing: the answer is whole
//! ```
//!
//! Session key = HMAC-SHA-256(cluster key, "farm command session 1", server's opening, client's opening).
//! Tag = the first 16 bytes of HMAC-SHA-256(session key, direction (1), number of the frame in this direction from 0 (8),
//! length, kind, payload); direction is 0 from the client and 1 from the server. Both nonces are new for each connection, so
//! that a recording of either side fits no other connection. Numbers are big endian.

use std::fmt;

use crate::id::NodeId;
use crate::wire::auth::{ClusterKey, TAG_LEN};

/// Bytes of an opening.
pub const OPENING_LEN: usize = 24;
/// Bytes of a nonce.
pub const NONCE_LEN: usize = 16;
/// Bytes before a frame's payload.
pub const HEADER_LEN: usize = 5;
/// Most bytes of a payload: a request with the largest body and its path, or a piece of an answer.
pub const MAX_PAYLOAD: usize = 80 * 1024;
/// Most bytes of a body that one frame carries.
pub const MAX_PIECE: usize = 64 * 1024;

const MAGIC: &[u8; 4] = b"FCMD";
const VERSION: u8 = 1;

/// Why bytes are no frame of this connection. None of them lets the connection go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameError {
    /// The opening is none: not a farm's port.
    Magic,
    /// The other side speaks this version.
    Version(u8),
    /// A payload of this many bytes, above [`MAX_PAYLOAD`].
    TooLong(usize),
    /// The tag is wrong: another key, or the bytes are not the next ones that the other side has sent.
    Authentication,
    /// Authentic, but not in the format; a bug on the other side.
    Malformed(&'static str),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic => f.write_str("no farmd speaks there"),
            Self::Version(v) => write!(f, "command version {v}, this node speaks version {VERSION}"),
            Self::TooLong(n) => write!(f, "a frame of {n} bytes, at most {MAX_PAYLOAD} are expected"),
            Self::Authentication => f.write_str("not authentic: the cluster.key differs, or somebody forges"),
            Self::Malformed(what) => write!(f, "malformed {what}"),
        }
    }
}

impl std::error::Error for FrameError {}

/// What each side says first, in the clear; the session key covers both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Opening {
    /// Who speaks.
    pub node: NodeId,
    /// Random, for this connection only.
    pub nonce: [u8; NONCE_LEN],
}

impl Opening {
    /// The bytes to send.
    pub fn emit(&self) -> [u8; OPENING_LEN] {
        let mut bytes = [0; OPENING_LEN];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4] = VERSION;
        bytes[5] = self.node.as_u8();
        bytes[8..].copy_from_slice(&self.nonce);
        bytes
    }

    /// Reads the other side's.
    ///
    /// # Errors
    /// [`FrameError::Magic`], [`FrameError::Version`] or [`FrameError::Malformed`].
    pub fn parse(bytes: &[u8; OPENING_LEN]) -> Result<Self, FrameError> {
        let [a, b, c, d, version, node, 0, 0, nonce @ ..] = bytes else {
            return Err(if bytes.starts_with(MAGIC) {
                FrameError::Malformed("opening")
            } else {
                FrameError::Magic
            });
        };
        if [*a, *b, *c, *d] != *MAGIC {
            return Err(FrameError::Magic);
        }
        if *version != VERSION {
            return Err(FrameError::Version(*version));
        }
        let node = NodeId::new((*node).into()).ok_or(FrameError::Malformed("node"))?;
        Ok(Self { node, nonce: *nonce })
    }
}

/// A request as the control socket takes it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// `GET` or `POST`.
    pub method: String,
    /// Path of the control socket's route table.
    pub path: String,
    /// The user who asks on the client's node.
    pub by: String,
    /// JSON, or empty.
    pub body: Vec<u8>,
}

/// One frame.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Frame {
    /// From the client, once.
    Request(Request),
    /// From the server, first: an HTTP status.
    Head(u16),
    /// From the server: the next piece of the body, at most [`MAX_PIECE`] bytes.
    Body(Vec<u8>),
    /// From the server, while nothing else is to be said.
    Alive,
    /// From the server, last.
    End,
}

/// Which end of the connection this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// It connected and asks.
    Client,
    /// It answers.
    Server,
}

impl Side {
    /// The direction byte of what this side sends.
    const fn direction(self) -> u8 {
        match self {
            Self::Client => 0,
            Self::Server => 1,
        }
    }

    const fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }
}

/// One end of a connection after both openings.
#[derive(Clone, Debug)]
pub struct Session {
    key: ClusterKey,
    side: Side,
    sent: u64,
    received: u64,
}

impl Session {
    /// The session that these openings begin.
    pub fn new(key: &ClusterKey, side: Side, server: &Opening, client: &Opening) -> Self {
        Self {
            key: key.derive(&[b"farm command session 1", &server.emit(), &client.emit()]),
            side,
            sent: 0,
            received: 0,
        }
    }

    /// The bytes of the next frame to send.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] or, for a text that its length byte cannot count, [`FrameError::Malformed`]; then nothing
    /// is counted as sent.
    pub fn seal(&mut self, frame: &Frame) -> Result<Vec<u8>, FrameError> {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[4] = match frame {
            Frame::Request(request) => {
                write_request(&mut bytes, request)?;
                1
            }
            Frame::Head(status) => {
                bytes.extend_from_slice(&status.to_be_bytes());
                2
            }
            Frame::Body(piece) => {
                bytes.extend_from_slice(piece);
                3
            }
            Frame::Alive => 4,
            Frame::End => 5,
        };
        let length = bytes.len() - HEADER_LEN;
        let counted = u32::try_from(length).ok().filter(|_| length <= MAX_PAYLOAD);
        let counted = counted.ok_or(FrameError::TooLong(length))?;
        bytes[..4].copy_from_slice(&counted.to_be_bytes());
        let tag = self.tag(self.side, self.sent, &bytes);
        bytes.extend_from_slice(&tag);
        self.sent += 1;
        Ok(bytes)
    }

    /// How many bytes follow this header: payload and tag.
    ///
    /// # Errors
    /// [`FrameError::TooLong`].
    pub fn rest_len(header: &[u8; HEADER_LEN]) -> Result<usize, FrameError> {
        let [a, b, c, d, _] = *header;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_PAYLOAD {
            return Err(FrameError::TooLong(length));
        }
        Ok(length + TAG_LEN)
    }

    /// Checks and reads the next frame received: its header, and the bytes that [`Self::rest_len`] asked for.
    ///
    /// # Errors
    /// [`FrameError::Authentication`] or [`FrameError::Malformed`].
    pub fn open(&mut self, header: &[u8; HEADER_LEN], rest: &[u8]) -> Result<Frame, FrameError> {
        let at = rest.len().checked_sub(TAG_LEN).ok_or(FrameError::Authentication)?;
        let (payload, tag) = rest.split_at(at);
        let right = self.tag(self.side.other(), self.received, &[header, payload].concat());
        let differing = right.iter().zip(tag).fold(0, |acc, (a, b)| acc | (a ^ b));
        if differing != 0 {
            return Err(FrameError::Authentication);
        }
        self.received += 1;
        match (header[4], payload) {
            (1, payload) => read_request(payload).map(Frame::Request),
            (2, [a, b]) => Ok(Frame::Head(u16::from_be_bytes([*a, *b]))),
            (3, piece) => Ok(Frame::Body(piece.to_vec())),
            (4, []) => Ok(Frame::Alive),
            (5, []) => Ok(Frame::End),
            _ => Err(FrameError::Malformed("frame")),
        }
    }

    fn tag(&self, from: Side, number: u64, bytes: &[u8]) -> [u8; TAG_LEN] {
        self.key.tag(&[&[from.direction()], &number.to_be_bytes(), bytes])
    }
}

fn write_request(out: &mut Vec<u8>, request: &Request) -> Result<(), FrameError> {
    let byte = |text: &str| u8::try_from(text.len()).map_err(|_| FrameError::Malformed("request"));
    out.push(byte(&request.method)?);
    out.extend_from_slice(request.method.as_bytes());
    let path = u16::try_from(request.path.len()).map_err(|_| FrameError::Malformed("request"))?;
    out.extend_from_slice(&path.to_be_bytes());
    out.extend_from_slice(request.path.as_bytes());
    out.push(byte(&request.by)?);
    out.extend_from_slice(request.by.as_bytes());
    out.extend_from_slice(&request.body);
    Ok(())
}

fn read_request(payload: &[u8]) -> Result<Request, FrameError> {
    const WRONG: FrameError = FrameError::Malformed("request");
    fn text(bytes: &[u8], length: usize) -> Result<(String, &[u8]), FrameError> {
        let (text, rest) = bytes.split_at_checked(length).ok_or(WRONG)?;
        let text = std::str::from_utf8(text).map_err(|_| WRONG)?;
        Ok((text.to_owned(), rest))
    }
    let (length, rest) = payload.split_first().ok_or(WRONG)?;
    let (method, rest) = text(rest, (*length).into())?;
    let (length, rest) = rest.split_first_chunk::<2>().ok_or(WRONG)?;
    let (path, rest) = text(rest, u16::from_be_bytes(*length).into())?;
    let (length, rest) = rest.split_first().ok_or(WRONG)?;
    let (by, body) = text(rest, (*length).into())?;
    Ok(Request {
        method,
        path,
        by,
        body: body.to_vec(),
    })
}

#[cfg(test)]
#[path = "command_tests.rs"]
mod tests;
