//! Frames as a pcapng file (draft-ietf-opsawg-pcapng), which Wireshark and tcpdump read: one section, an interface each time a new one is named, and each frame with what
//! became of it as a comment.
//!
//! Owns the format and nothing else. Blocks are written in this machine's byte order, as the format wants it: the byte-order magic says which.

use std::io::{self, Write};

use farm_core::api::trace::TraceFrame;

/// Block types.
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;

const BYTE_ORDER_MAGIC: u32 = 0x1a2b_3c4d;
/// Of a section whose length is not known beforehand.
const UNKNOWN_LENGTH: u64 = u64::MAX;
/// LINKTYPE_ETHERNET.
const ETHERNET: u16 = 1;

/// Options: `opt_endofopt`, `opt_comment`, `shb_userappl`, `if_name`, `epb_flags`.
const END: u16 = 0;
const COMMENT: u16 = 1;
const USER_APPLICATION: u16 = 4;
const INTERFACE_NAME: u16 = 2;
const FLAGS: u16 = 2;
/// `epb_flags`: the frame came in.
const INBOUND: u32 = 1;

/// Writes one section.
pub struct Writer<W> {
    out: W,
    snap: u32,
    interfaces: Vec<String>,
}

impl<W: Write> Writer<W> {
    /// Begins the section; frames have at most `snap` bytes.
    ///
    /// # Errors
    /// What `out` says.
    pub fn new(out: W, snap: u32) -> io::Result<Self> {
        let mut writer = Self {
            out,
            snap,
            interfaces: Vec::new(),
        };
        let mut body = Body::default();
        body.word(BYTE_ORDER_MAGIC);
        body.half(1);
        body.half(0);
        body.bytes.extend(UNKNOWN_LENGTH.to_ne_bytes());
        let application = concat!("farm ", env!("CARGO_PKG_VERSION"), " trace");
        body.options(&[(USER_APPLICATION, application.as_bytes())]);
        writer.block(SECTION_HEADER, &body)?;
        Ok(writer)
    }

    /// Writes `frame`, of which `bytes` are there.
    ///
    /// # Errors
    /// What `out` says.
    pub fn frame(&mut self, frame: &TraceFrame, bytes: &[u8]) -> io::Result<()> {
        let interface = match self.interfaces.iter().position(|name| *name == frame.interface) {
            Some(number) => number,
            None => {
                let mut body = Body::default();
                body.half(ETHERNET);
                body.half(0);
                body.word(self.snap);
                body.options(&[(INTERFACE_NAME, frame.interface.as_bytes())]);
                self.block(INTERFACE_DESCRIPTION, &body)?;
                self.interfaces.push(frame.interface.clone());
                self.interfaces.len() - 1
            }
        };
        let mut body = Body::default();
        body.length(interface)?;
        // Microseconds, which is what an interface has that does not say otherwise; the upper half first.
        body.word((frame.unix_us >> 32) as u32);
        body.word((frame.unix_us & u64::from(u32::MAX)) as u32);
        body.length(bytes.len())?;
        body.word(frame.length);
        body.padded(bytes);
        let comment = comment(frame);
        body.options(&[(COMMENT, comment.as_bytes()), (FLAGS, &INBOUND.to_ne_bytes())]);
        self.block(ENHANCED_PACKET, &body)
    }

    /// Hands on what is buffered.
    ///
    /// # Errors
    /// What `out` says.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    fn block(&mut self, kind: u32, body: &Body) -> io::Result<()> {
        let length = u32::try_from(body.bytes.len() + 12).map_err(io::Error::other)?;
        self.out.write_all(&kind.to_ne_bytes())?;
        self.out.write_all(&length.to_ne_bytes())?;
        self.out.write_all(&body.bytes)?;
        self.out.write_all(&length.to_ne_bytes())
    }
}

/// What became of the frame, in words for people and for Wireshark's `frame.comment`.
fn comment(frame: &TraceFrame) -> String {
    let mut text = format!("{} {}", frame.verdict, frame.reason);
    if let Some(bucket) = frame.bucket {
        let owner = frame.owner.as_deref().unwrap_or("nobody");
        let group = frame.group.as_deref().unwrap_or("?");
        text.push_str(&format!(" {group} {bucket} of {owner}"));
    }
    if !frame.sent_on.is_empty() {
        text.push_str(&format!(", sent on to {}", frame.sent_on.join(" and ")));
    }
    text.push_str(&format!(" (by {})", frame.by));
    text
}

/// A block between its two lengths.
#[derive(Default)]
struct Body {
    bytes: Vec<u8>,
}

impl Body {
    fn half(&mut self, value: u16) {
        self.bytes.extend(value.to_ne_bytes());
    }

    fn word(&mut self, value: u32) {
        self.bytes.extend(value.to_ne_bytes());
    }

    fn length(&mut self, value: usize) -> io::Result<()> {
        self.word(u32::try_from(value).map_err(io::Error::other)?);
        Ok(())
    }

    /// Up to a multiple of four bytes.
    fn padded(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A value that is too long for an option is cut.
    fn options(&mut self, options: &[(u16, &[u8])]) {
        for (code, value) in options {
            let length = u16::try_from(value.len()).unwrap_or(u16::MAX);
            self.half(*code);
            self.half(length);
            self.padded(&value[..usize::from(length)]);
        }
        self.half(END);
        self.half(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::line::tests::frame;

    /// Block types with their bodies.
    fn blocks(file: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let word = |at: usize| u32::from_ne_bytes(file[at..at + 4].try_into().unwrap());
        let mut blocks = Vec::new();
        let mut at = 0;
        while at < file.len() {
            let (kind, length) = (word(at), word(at + 4) as usize);
            assert!(length.is_multiple_of(4) && length >= 12, "{length} at {at}");
            assert_eq!(word(at + length - 4) as usize, length, "both lengths agree");
            blocks.push((kind, file[at + 8..at + length - 4].to_vec()));
            at += length;
        }
        blocks
    }

    /// Codes with their values, up to the end that must be there.
    fn options(mut bytes: &[u8]) -> Vec<(u16, Vec<u8>)> {
        let mut options = Vec::new();
        loop {
            let (code, length) = (
                u16::from_ne_bytes([bytes[0], bytes[1]]),
                u16::from_ne_bytes([bytes[2], bytes[3]]),
            );
            if code == END {
                assert_eq!((length, bytes.len()), (0, 4), "the end is the end");
                return options;
            }
            let length = usize::from(length);
            options.push((code, bytes[4..4 + length].to_vec()));
            bytes = &bytes[4 + length.next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_is_written_reads_back_block_by_block() {
        let mut file = Vec::new();
        let mut writer = Writer::new(&mut file, 128).unwrap();
        let other = TraceFrame {
            interface: "lan1".to_owned(),
            verdict: "forwarded".to_owned(),
            sent_on: vec!["s2".to_owned()],
            ..frame()
        };
        let bytes = [1, 2, 3, 4, 5];
        for frame in [&frame(), &other, &frame()] {
            writer.frame(frame, &bytes).unwrap();
        }
        let blocks = blocks(&file);
        let kinds: Vec<u32> = blocks.iter().map(|(kind, _)| *kind).collect();
        let (header, interface, packet) = (SECTION_HEADER, INTERFACE_DESCRIPTION, ENHANCED_PACKET);
        assert_eq!(kinds, [header, interface, packet, interface, packet, packet]);
        assert_eq!(&blocks[0].1[..4], BYTE_ORDER_MAGIC.to_ne_bytes());
        assert_eq!(&blocks[0].1[8..16], [0xff; 8]);
        let named = |block: usize| options(&blocks[block].1[8..]);
        assert_eq!(named(1), [(INTERFACE_NAME, b"lan0".to_vec())]);
        assert_eq!(named(3), [(INTERFACE_NAME, b"lan1".to_vec())]);
        for (block, interface, expected) in [
            (2, 0, "accepted own web/http 1234 of s1 (by kernel)"),
            (4, 1, "forwarded own web/http 1234 of s1, sent on to s2 (by kernel)"),
            (5, 0, "accepted own web/http 1234 of s1 (by kernel)"),
        ] {
            let body = &blocks[block].1;
            let word = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
            assert_eq!(word(0), interface);
            assert_eq!(u64::from(word(4)) << 32 | u64::from(word(8)), frame().unix_us);
            assert_eq!((word(12), word(16)), (5, 74), "captured, and of the whole");
            assert_eq!(&body[20..28], [1, 2, 3, 4, 5, 0, 0, 0]);
            let expected = [
                (COMMENT, expected.as_bytes().to_vec()),
                (FLAGS, INBOUND.to_ne_bytes().to_vec()),
            ];
            assert_eq!(options(&body[28..]), expected);
        }
    }
}
