//! Netlink messages as bytes: building requests and taking answers apart.
//!
//! Private to the crate. Knows headers, attributes and acknowledgements and nothing of any protocol; [`crate::sock_diag`] and
//! [`crate::nft`] use it. Answers come from the kernel only, yet no length in them is trusted.

use std::io;
use std::os::fd::AsFd;

use netlink_sys::{Socket, SocketAddr};

use crate::sockopt;

pub(crate) const HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;

/// `linux/netlink.h`
pub(crate) const NLM_F_REQUEST: u16 = 0x01;
pub(crate) const NLM_F_ACK: u16 = 0x04;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
pub(crate) const NLM_F_CREATE: u16 = 0x400;
pub(crate) const NLM_F_APPEND: u16 = 0x800;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;

/// The kernel fills at most 32 KiB of a dump into one datagram; room for more costs nothing.
const DATAGRAM: usize = 1 << 16;

/// Messages being put together, one after the other, as they go into one datagram.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    bytes: Vec<u8>,
}

impl Batch {
    /// Adds a message whose body is what `fill` appends.
    pub(crate) fn message(&mut self, kind: u16, flags: u16, sequence: u32, fill: impl FnOnce(&mut Self)) {
        let begin = self.bytes.len();
        self.put(&[0; 4]).put(&kind.to_ne_bytes()).put(&flags.to_ne_bytes());
        // Port 0 is the kernel's way to say "whoever sends this".
        self.put(&sequence.to_ne_bytes()).put(&[0; 4]);
        fill(self);
        let length = (self.bytes.len() - begin) as u32;
        self.bytes[begin..begin + 4].copy_from_slice(&length.to_ne_bytes());
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.nest(
            kind,
            |batch| {
                batch.put(value);
            },
            0,
        )
    }

    pub(crate) fn attribute_be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_be_bytes())
    }

    /// A text attribute, terminated as the kernel wants it.
    pub(crate) fn attribute_text(&mut self, kind: u16, value: &str) -> &mut Self {
        self.nest(
            kind,
            |batch| {
                batch.put(value.as_bytes()).put(&[0]);
            },
            0,
        )
    }

    /// An attribute whose value is the attributes that `fill` appends.
    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        self.nest(kind, fill, NLA_F_NESTED)
    }

    fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self), flag: u16) -> &mut Self {
        let begin = self.bytes.len();
        self.put(&[0; 2]).put(&(kind | flag).to_ne_bytes());
        fill(self);
        // Attributes here are texts, addresses and short expressions, far below 64 KiB each.
        let length = (self.bytes.len() - begin) as u16;
        self.bytes[begin..begin + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }
}

/// One message of an answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    pub(crate) body: &'a [u8],
}

/// Messages of one datagram; stops at the first that is not whole.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(array(datagram, 0)?) as usize;
        let message = Message {
            kind: u16::from_ne_bytes(array(datagram, 4)?),
            flags: u16::from_ne_bytes(array(datagram, 6)?),
            sequence: u32::from_ne_bytes(array(datagram, 8)?),
            body: datagram.get(HEADER..length)?,
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Attributes as (type, value); stops at the first that is not whole.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(array(bytes, 0)?));
        let kind = u16::from_ne_bytes(array(bytes, 2)?) & NLA_TYPE_MASK;
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a type.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|&(found, _)| found == kind)
        .map(|(_, value)| value)
}

/// `N` bytes from `offset`, if they are there.
pub(crate) fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}

/// How a dump ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dump {
    Complete,
    /// The kernel's table changed in between: entries may be missing or there twice.
    Interrupted,
}

/// A netlink socket that speaks to the kernel, with the buffer for its answers.
pub(crate) struct Channel {
    socket: Socket,
    buffer: Vec<u8>,
    sequence: u32,
}

impl Channel {
    pub(crate) fn open(protocol: isize) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            buffer: Vec::with_capacity(DATAGRAM),
            sequence: 0,
        })
    }

    /// Lets the kernel queue as many bytes of requests and of answers as a large batch needs.
    pub(crate) fn set_buffers(&self, bytes: libc::c_int) -> io::Result<()> {
        sockopt::set_receive_buffer(self.socket.as_fd(), bytes)?;
        let set = |option| sockopt::set(self.socket.as_fd(), libc::SOL_SOCKET, option, &bytes);
        set(libc::SO_SNDBUFFORCE).or_else(|_| set(libc::SO_SNDBUF))
    }

    pub(crate) fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }

    /// Sends a dump request with sequence number `sequence` and hands every entry to `f`.
    pub(crate) fn dump(&mut self, batch: &Batch, sequence: u32, mut f: impl FnMut(&[u8])) -> io::Result<Dump> {
        self.socket.send(&batch.bytes, 0)?;
        let mut end = Dump::Complete;
        loop {
            self.receive(0)?;
            for message in messages(&self.buffer).filter(|message| message.sequence == sequence) {
                if message.flags & NLM_F_DUMP_INTR != 0 {
                    end = Dump::Interrupted;
                }
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => return answer_code(message.body).map(|()| end),
                    _ => f(message.body),
                }
            }
        }
    }

    /// Sends requests of which the one numbered `last` asks for an acknowledgement, and waits for that or for the first error.
    pub(crate) fn acknowledged(&mut self, batch: &Batch, last: u32) -> io::Result<()> {
        self.socket.send(&batch.bytes, 0)?;
        let mut failure = None;
        let mut done = false;
        // The kernel works a request off inside `send`, so all answers wait here already. They are all taken, so that none is
        // left for the next request.
        loop {
            match self.receive(libc::MSG_DONTWAIT) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
            for message in messages(&self.buffer).filter(|message| message.kind == NLMSG_ERROR) {
                match answer_code(message.body) {
                    Ok(()) => done |= message.sequence == last,
                    // The first failure is the cause of those after it.
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
        }
        match failure {
            Some(error) => Err(error),
            None if done => Ok(()),
            None => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the kernel did not acknowledge",
            )),
        }
    }

    fn receive(&mut self, flags: libc::c_int) -> io::Result<()> {
        loop {
            self.buffer.clear();
            match self.socket.recv(&mut self.buffer, flags | libc::MSG_TRUNC) {
                Ok(length) if length > self.buffer.len() => {
                    let text = format!("a netlink answer of {length} bytes, expected at most {DATAGRAM}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

/// The code at the head of an error or done message: 0, or an error number made negative.
fn answer_code(body: &[u8]) -> io::Result<()> {
    match array(body, 0).map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.saturating_neg())),
        None => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a netlink answer without its code",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read_back() {
        let mut batch = Batch::default();
        batch.message(20, NLM_F_REQUEST, 7, |body| {
            body.attribute_text(1, "farm").nested(2, |inner| {
                inner.attribute_be32(3, 0xc612_0001);
            });
        });
        batch.message(21, 0, 8, |_| {});
        let found: Vec<_> = messages(&batch.bytes).collect();
        assert_eq!(
            found
                .iter()
                .map(|message| (message.kind, message.sequence))
                .collect::<Vec<_>>(),
            [(20, 7), (21, 8)]
        );
        assert_eq!(attribute(found[0].body, 1).unwrap(), b"farm\0");
        assert_eq!(
            attribute(attribute(found[0].body, 2).unwrap(), 3).unwrap(),
            [0xc6, 0x12, 0, 1]
        );
    }

    #[test]
    fn lengths_that_lie_end_the_walk() {
        for length in [0u32, 3, 15, 17, u32::MAX] {
            let mut datagram = vec![0; HEADER];
            datagram[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(messages(&datagram).count(), 0, "message length {length}");
        }
        for length in [0u16, 3, 9, u16::MAX] {
            let mut bytes = vec![0; 8];
            bytes[..2].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(attributes(&bytes).count(), 0, "attribute length {length}");
        }
    }
}
