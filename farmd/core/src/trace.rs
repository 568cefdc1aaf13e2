//! What `farm trace` says of a frame: who sent it to what, what became of it on this host, and why.
//!
//! Owns the words of verdicts and causes, the reading of frames that may be cut short, and [`filter`], the language that picks frames. Pure. It
//! never judges: the data plane hands over what it has decided ([`crate::balance::decide`]), the daemon and the command line call the rest.

pub mod filter;

use std::fmt::Write as _;
use std::net::IpAddr;

use etherparse::{EtherType, LaxNetSlice, LaxSlicedPacket, LinkSlice};

use crate::balance::decide::Reason;
use crate::balance::flow::{TCP, UDP};

/// ICMP's protocol number, and ICMPv6's.
const ICMP: [u8; 2] = [1, 58];

/// What became of a frame on this host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Outcome {
    /// To the local stack; others may have got a copy.
    Accepted,
    /// Nowhere.
    Dropped,
    /// Not here: sent on to other members.
    Forwarded,
    /// Kept until its bucket has opened, here or elsewhere.
    Held,
    /// Left to farmd by the program in the kernel. What farmd makes of it is an outcome of its own.
    Punted,
}

impl Outcome {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Accepted, Self::Dropped, Self::Forwarded, Self::Held, Self::Punted];

    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Accepted => "accepted",
            Self::Dropped => "dropped",
            Self::Forwarded => "forwarded",
            Self::Held => "held",
            Self::Punted => "punted",
        }
    }

    /// The outcome with that word.
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|outcome| outcome.name() == word)
    }
}

/// Why: a reason of the core's decision, or what a data plane knows beyond it. Each word is that of the counter that the frame is counted in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Cause {
    /// The decision's own.
    Judged(Reason),
    /// The lease had ended: the owner loop has not run.
    LeaseEnded,
    /// Plans changed too fast under it.
    PlanChanged,
    /// It was accepted, and could not be given to the stack.
    TapFailed,
    /// The Ethernet address of the one to send it on to is not known.
    ForwardUnknown,
    /// It could not be sent on.
    ForwardFailed,
    /// It needs memory or a wait, which the program in the kernel does not have.
    Punted,
    /// A copy of what has been accepted already.
    Repeated,
    /// Kept for longer than its client waits before it asks again.
    HoldExpired,
    /// Given up for newer ones that are kept.
    HoldFull,
    /// Recorded while another node was to answer it, which is gone.
    Replay,
}

impl Cause {
    const OTHERS: [Self; 10] = [
        Self::LeaseEnded,
        Self::PlanChanged,
        Self::TapFailed,
        Self::ForwardUnknown,
        Self::ForwardFailed,
        Self::Punted,
        Self::Repeated,
        Self::HoldExpired,
        Self::HoldFull,
        Self::Replay,
    ];

    /// All that a frame of a VIP can have.
    pub fn all() -> impl Iterator<Item = Self> {
        let judged = Reason::ALL.into_iter().filter(|reason| *reason != Reason::NotVip);
        judged.map(Self::Judged).chain(Self::OTHERS)
    }

    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Judged(reason) => reason.name(),
            Self::LeaseEnded => "lease_ended",
            Self::PlanChanged => "plan_changed",
            Self::TapFailed => "tap_failed",
            Self::ForwardUnknown => "forward_unknown",
            Self::ForwardFailed => "forward_failed",
            Self::Punted => "punted",
            Self::Repeated => "repeated",
            Self::HoldExpired => "hold_expired",
            Self::HoldFull => "hold_full",
            Self::Replay => "replay",
        }
    }

    /// The cause with that word.
    pub fn named(word: &str) -> Option<Self> {
        Self::all().find(|cause| cause.name() == word)
    }
}

/// Who speaks to whom about what, read from as much of a frame as there is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct View {
    /// The sender.
    pub client: IpAddr,
    /// The destination.
    pub vip: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// The sender's port and the destination's, where the frame has any.
    pub ports: Option<(u16, u16)>,
    what: What,
}

/// What a person wants to know of the transport header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum What {
    Plain,
    /// Byte 13 of the header.
    Tcp(u8),
    /// Type and code.
    Icmp(u8, u8),
    /// Bytes of the packet before this part of it.
    LaterFragment(u16),
    /// The header is not all there.
    Cut,
}

impl View {
    /// Reads an Ethernet frame; `None` if it carries no IPv4 or IPv6 header. Unlike [`crate::wire::packet::Packet::parse`] it believes what is there, so that a frame cut
    /// after its headers reads as the whole one.
    pub fn of(frame: &[u8]) -> Option<Self> {
        let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
        let Some(LinkSlice::Ethernet2(ethernet)) = &sliced.link else {
            return None;
        };
        let family = match sliced.link_exts.last() {
            Some(etherparse::LaxLinkExtSlice::Vlan(vlan)) => vlan.ether_type(),
            Some(_) => return None,
            None => ethernet.ether_type(),
        };
        let (client, vip, protocol, offset, payload) = match sliced.net.as_ref()? {
            LaxNetSlice::Ipv4(ip) if family == EtherType::IPV4 => {
                let header = ip.header();
                let offset = header.fragments_offset().byte_offset();
                (
                    IpAddr::V4(header.source_addr()),
                    IpAddr::V4(header.destination_addr()),
                    header.protocol().0,
                    offset,
                    ip.payload().payload,
                )
            }
            LaxNetSlice::Ipv6(ip) if family == EtherType::IPV6 => {
                let header = ip.header();
                let chain = ip.extensions().slice();
                (
                    IpAddr::V6(header.source_addr()),
                    IpAddr::V6(header.destination_addr()),
                    ip.payload().ip_number.0,
                    fragment_offset(header.next_header().0, chain),
                    ip.payload().payload,
                )
            }
            _ => return None,
        };
        let (ports, what) = match (offset, protocol, payload) {
            (1.., ..) => (None, What::LaterFragment(offset)),
            (0, TCP, [a, b, c, d, _, _, _, _, _, _, _, _, _, flags, ..]) => {
                (Some((pair(*a, *b), pair(*c, *d))), What::Tcp(*flags))
            }
            (0, TCP | UDP, [a, b, c, d, ..]) => {
                let what = if protocol == UDP { What::Plain } else { What::Cut };
                (Some((pair(*a, *b), pair(*c, *d))), what)
            }
            (0, _, [kind, code, ..]) if ICMP.contains(&protocol) => (None, What::Icmp(*kind, *code)),
            (0, TCP | UDP, _) => (None, What::Cut),
            (0, _, _) if ICMP.contains(&protocol) => (None, What::Cut),
            (0, _, _) => (None, What::Plain),
        };
        Some(Self {
            client,
            vip,
            protocol,
            ports,
            what,
        })
    }

    /// `tcp`, `udp`, `icmp`, `icmp6`, or `ip` and the protocol's number.
    pub fn protocol_name(&self) -> String {
        match self.protocol {
            TCP => "tcp".to_owned(),
            UDP => "udp".to_owned(),
            1 => "icmp".to_owned(),
            58 => "icmp6".to_owned(),
            other => format!("ip {other}"),
        }
    }

    /// TCP flags as tcpdump writes them (`S`, `S.`, `P.`, `.`), what an ICMP message is, or which fragment; empty for what has nothing of that.
    pub fn detail(&self) -> String {
        match self.what {
            What::Plain => String::new(),
            What::Cut => "cut".to_owned(),
            What::Tcp(flags) => tcp_flags(flags),
            What::Icmp(8, _) if self.protocol == 1 => "echo".to_owned(),
            What::Icmp(128, _) if self.protocol == 58 => "echo".to_owned(),
            What::Icmp(kind, code) => format!("type {kind}/{code}"),
            What::LaterFragment(offset) => format!("frag {offset}"),
        }
    }

    fn is_icmp(&self) -> bool {
        ICMP.contains(&self.protocol)
    }
}

/// Bytes before this part of an IPv6 packet, by the fragment header (RFC 8200 section 4.5) in the chain whose first has number `next`; 0 for what is no fragment.
fn fragment_offset(mut next: u8, mut chain: &[u8]) -> u16 {
    while let [following, length, a, b, ..] = *chain {
        let length = match next {
            44 => return pair(a, b) & !7,
            0 | 43 | 60 => (usize::from(length) + 1) * 8,
            51 => (usize::from(length) + 2) * 4,
            _ => return 0,
        };
        next = following;
        chain = chain.get(length..).unwrap_or_default();
    }
    0
}

fn pair(high: u8, low: u8) -> u16 {
    u16::from_be_bytes([high, low])
}

/// Flags of RFC 9293 section 3.1, in tcpdump's order and signs.
fn tcp_flags(byte: u8) -> String {
    const SIGNS: [(u8, char); 8] = [
        (0x01, 'F'),
        (0x02, 'S'),
        (0x04, 'R'),
        (0x08, 'P'),
        (0x10, '.'),
        (0x20, 'U'),
        (0x40, 'E'),
        (0x80, 'W'),
    ];
    let set = SIGNS.iter().filter(|(bit, _)| byte & bit != 0);
    let signs: String = set.map(|(_, sign)| sign).collect();
    if signs.is_empty() { "none".to_owned() } else { signs }
}

/// Bytes as hexadecimal digits.
pub fn to_hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The bytes that hexadecimal digits stand for; `None` if they are none.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text
        .chars()
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    let digits = digits?;
    let (pairs, rest) = digits.as_chunks::<2>();
    rest.is_empty()
        .then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::test_frames::*;
    use crate::wire::packet::Packet;

    fn ways() -> [Way; 2] {
        [
            Way::new(client(1), vip(), VIRTUAL_MAC),
            Way::new(client6(1), vip6(), VIRTUAL_MAC),
        ]
    }

    #[test]
    fn a_frame_cut_after_its_headers_reads_as_the_whole_one() {
        for way in ways() {
            for (frame, detail) in [
                (way.tcp(4000, 80, Flags::Syn), "S"),
                (way.tcp(4000, 80, Flags::SynAck), "S."),
                (way.udp(4000, 53, &[7; 900]), ""),
                (way.echo(), "echo"),
            ] {
                let whole = View::of(&frame).unwrap();
                let packet = Packet::parse(&frame).unwrap();
                assert_eq!(
                    (whole.client, whole.vip, whole.protocol),
                    (packet.source, packet.destination, packet.protocol)
                );
                assert_eq!(whole.detail(), detail);
                let headers = if way.client.is_ipv4() {
                    14 + 20 + 20
                } else {
                    14 + 40 + 20
                };
                assert_eq!(View::of(&frame[..frame.len().min(headers)]), Some(whole));
                assert_eq!(whole.ports.is_some(), !whole.is_icmp());
            }
        }
    }

    #[test]
    fn fragments_and_what_is_too_short_say_so() {
        let [way, way6] = ways();
        let udp = way.udp(4000, 53, &[7; 3000]);
        let first = View::of(&fragment(&udp, 1, 0, true, 1480)).unwrap();
        assert_eq!(first.ports, Some((4000, 53)));
        let later = View::of(&fragment(&udp, 1, 185, false, 1480)).unwrap();
        assert_eq!((later.ports, later.detail().as_str()), (None, "frag 1480"));
        let tcp6 = way6.tcp(4000, 80, Flags::Syn);
        let later = View::of(&with_extensions(&tcp6, &[0, 44], 185, true)).unwrap();
        assert_eq!((later.protocol, later.detail().as_str()), (TCP, "frag 1480"));
        let short = View::of(&way.tcp(4000, 80, Flags::Syn)[..14 + 20 + 8]).unwrap();
        assert_eq!((short.ports, short.detail().as_str()), (Some((4000, 80)), "cut"));
        assert_eq!(View::of(&udp[..20]), None);
        assert_eq!(View::of(&[]), None);
    }

    #[test]
    fn words_are_found_by_what_they_are_called() {
        for cause in Cause::all() {
            assert_eq!(Cause::named(cause.name()), Some(cause), "{cause:?}");
        }
        assert_eq!(Cause::named("not_vip"), None, "never traced");
        for outcome in Outcome::ALL {
            assert_eq!(Outcome::named(outcome.name()), Some(outcome));
        }
    }

    #[test]
    fn flags_are_written_as_tcpdump_does() {
        for (byte, signs) in [
            (0x02, "S"),
            (0x12, "S."),
            (0x18, "P."),
            (0x11, "F."),
            (0x04, "R"),
            (0, "none"),
        ] {
            assert_eq!(tcp_flags(byte), signs);
        }
    }

    #[test]
    fn bytes_survive_as_digits() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
        assert_eq!(from_hex("0"), None);
        assert_eq!(from_hex("zz"), None);
    }

    proptest::proptest! {
        #[test]
        fn random_bytes_never_panic(mut bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200), six in proptest::prelude::any::<bool>()) {
            if let Some(field) = bytes.get_mut(12..14) {
                field.copy_from_slice(if six { &[0x86, 0xdd] } else { &[8, 0] });
            }
            if let Some(view) = View::of(&bytes) {
                view.detail();
            }
        }
    }
}
