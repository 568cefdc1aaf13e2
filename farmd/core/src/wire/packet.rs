//! Frames as the decision needs them: who talks to which VIP about what.
//!
//! [`Packet::parse`] takes link and network headers through etherparse's checked slices. What follows is read here, step by step as the program in the
//! kernel reads it (`farmd/sys/bpf`), so that the two can be compared: a packet whose lengths lie, or that breaks off where it must go on, is
//! [`L4::Malformed`] and passes nowhere.

use std::net::IpAddr;

use etherparse::{EtherType, Ethernet2Slice, Ipv4HeaderSlice, Ipv6HeaderSlice, SingleVlanSlice};

use crate::balance::flow::{FlowKey, TCP, UDP};
use crate::id::MacAddr;

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

/// Most VLAN tags in a frame; the kernel has taken off one more.
const MAX_TAGS: usize = 2;
/// Most IPv6 extension headers of a packet: RFC 8200 section 4.1 names six, one of them twice.
pub const MAX_EXTENSIONS: usize = 8;

/// An IP packet in its frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packet {
    /// Ethernet source.
    pub source_mac: MacAddr,
    /// Ethernet destination.
    pub destination_mac: MacAddr,
    /// IP source: the client.
    pub source: IpAddr,
    /// IP destination: the VIP, if it is for us at all.
    pub destination: IpAddr,
    /// Protocol number: of IPv6 that behind the extension headers, as far as the packet has them.
    pub protocol: u8,
    /// IPv4 or fragment identification.
    pub identification: u32,
    /// More fragments follow: a first or middle fragment.
    pub more_fragments: bool,
    /// What the packet carries.
    pub l4: L4,
}

/// What a packet carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L4 {
    /// TCP, RFC 9293.
    Tcp {
        /// Client port.
        source: u16,
        /// Service port.
        destination: u16,
        /// SYN without ACK: the start of a connection.
        syn: bool,
        /// Sequence number: of the first byte, or of the SYN.
        sequence: u32,
    },
    /// UDP, RFC 768.
    Udp {
        /// Client port.
        source: u16,
        /// Service port.
        destination: u16,
    },
    /// A fragment that is not the first one: no ports in it.
    LaterFragment,
    /// ICMP or ICMPv6 echo request.
    Echo,
    /// ICMP error about something the VIP has sent; the flow as the client would name it.
    Error(FlowKey),
    /// Anything else: other protocols, other ICMP.
    Other,
    /// Too short for what it says it is.
    Malformed,
}

impl Packet {
    /// Reads an Ethernet frame; `None` if it carries no IPv4 or IPv6 packet, or is tagged as of another VLAN.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let ethernet = Ethernet2Slice::from_slice_without_fcs(frame).ok()?;
        let (family, bytes) = untag(ethernet.ether_type(), ethernet.payload_slice())?;
        let network = match family {
            EtherType::IPV4 => Network::ipv4(bytes)?,
            EtherType::IPV6 => Network::ipv6(bytes)?,
            _ => return None,
        };
        let Network { chain, .. } = network;
        let l4 = match chain {
            Some(chain) if chain.fragment.later => L4::LaterFragment,
            Some(chain) if chain.fragment.more => first_fragment(network.source.is_ipv6(), &chain),
            Some(chain) => transport(network.source.is_ipv6(), &chain),
            None => L4::Malformed,
        };
        let fragment = chain.map(|chain| chain.fragment).unwrap_or_default();
        Some(Self {
            source_mac: MacAddr(ethernet.source()),
            destination_mac: MacAddr(ethernet.destination()),
            source: network.source,
            destination: network.destination,
            protocol: chain.map_or(network.next, |chain| chain.protocol),
            identification: fragment.identification,
            more_fragments: fragment.more,
            l4,
        })
    }
}

/// Who sends a TCP reset without ACK, which is what a stack says to a segment of no connection (RFC 9293, section 3.10.7.1); `None` if the frame is something else.
pub fn bare_reset_source(frame: &[u8]) -> Option<IpAddr> {
    const RST_ACK: u8 = 0x14;
    const RST: u8 = 0x04;
    let ethernet = Ethernet2Slice::from_slice_without_fcs(frame).ok()?;
    let network = match ethernet.ether_type() {
        EtherType::IPV4 => Network::ipv4(ethernet.payload_slice())?,
        EtherType::IPV6 => Network::ipv6(ethernet.payload_slice())?,
        _ => return None,
    };
    let chain = network
        .chain
        .filter(|chain| chain.protocol == TCP && !chain.fragment.later)?;
    let flags = chain.bytes.get(13)?;
    (flags & RST_ACK == RST).then_some(network.source)
}

/// Passes over tags that name no VLAN but a priority (IEEE 802.1Q: VLAN identifier 0); `None` behind any other.
fn untag(mut family: EtherType, mut bytes: &[u8]) -> Option<(EtherType, &[u8])> {
    for _ in 0..MAX_TAGS {
        if !matches!(family, EtherType::VLAN_TAGGED_FRAME | EtherType::PROVIDER_BRIDGING) {
            break;
        }
        let tag = SingleVlanSlice::from_slice(bytes).ok()?;
        if tag.vlan_identifier().value() != 0 {
            return None;
        }
        (family, bytes) = (tag.ether_type(), tag.payload_slice());
    }
    Some((family, bytes))
}

/// The network header.
struct Network<'a> {
    source: IpAddr,
    destination: IpAddr,
    /// Protocol number in it.
    next: u8,
    /// What it carries; `None` if its lengths lie or its extension headers break off.
    chain: Option<Chain<'a>>,
}

/// What network and extension headers lead to.
#[derive(Clone, Copy)]
struct Chain<'a> {
    protocol: u8,
    bytes: &'a [u8],
    fragment: Fragment,
}

#[derive(Clone, Copy, Default)]
struct Fragment {
    later: bool,
    more: bool,
    identification: u32,
}

impl<'a> Network<'a> {
    fn ipv4(bytes: &'a [u8]) -> Option<Self> {
        let header = Ipv4HeaderSlice::from_slice(bytes).ok()?;
        let fragment = Fragment {
            later: header.fragments_offset().value() != 0,
            more: header.more_fragments(),
            identification: header.identification().into(),
        };
        let protocol = header.protocol().0;
        let carried = carried(bytes, header.slice().len(), header.total_len().into());
        Some(Self {
            source: IpAddr::V4(header.source_addr()),
            destination: IpAddr::V4(header.destination_addr()),
            next: protocol,
            chain: carried.map(|bytes| Chain {
                protocol,
                bytes,
                fragment,
            }),
        })
    }

    fn ipv6(bytes: &'a [u8]) -> Option<Self> {
        let header = Ipv6HeaderSlice::from_slice(bytes).ok()?;
        let length = match header.payload_length() {
            0 => 0,
            payload => header.slice().len() + usize::from(payload),
        };
        let next = header.next_header().0;
        let carried = carried(bytes, header.slice().len(), length);
        Some(Self {
            source: IpAddr::V6(header.source_addr()),
            destination: IpAddr::V6(header.destination_addr()),
            next,
            chain: carried.and_then(|bytes| walk(next, bytes)),
        })
    }
}

/// What follows the header of a packet that says it has `length` bytes; `None` if it has less, or says less than its header has. A packet merged by
/// the kernel to more than 64 kB says 0.
fn carried(bytes: &[u8], header: usize, length: usize) -> Option<&[u8]> {
    match length {
        0 => bytes.get(header..),
        length => bytes.get(header..length),
    }
}

/// Walks IPv6 extension headers (RFC 8200 section 4) of which the first has number `next`, to what is none, or to the end of what a later fragment has;
/// `None` if they break off, stand where they must not, or are more than [`MAX_EXTENSIONS`].
fn walk(mut next: u8, mut bytes: &[u8]) -> Option<Chain<'_>> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION_OPTIONS: u8 = 60;
    let mut fragment: Option<Fragment> = None;
    for place in 0..=MAX_EXTENSIONS {
        if !matches!(
            next,
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS
        ) {
            return Some(Chain {
                protocol: next,
                bytes,
                fragment: fragment.unwrap_or_default(),
            });
        }
        let [following, units, a, b, c, d, e, f] = *bytes.first_chunk()?;
        let length = match next {
            _ if place == MAX_EXTENSIONS => return None,
            HOP_BY_HOP if place > 0 => return None,
            FRAGMENT if fragment.is_some() => return None,
            FRAGMENT => {
                let field = u16::from_be_bytes([a, b]);
                let this = Fragment {
                    later: field >> 3 != 0,
                    more: field & 1 != 0,
                    identification: u32::from_be_bytes([c, d, e, f]),
                };
                if this.later {
                    return Some(Chain {
                        protocol: following,
                        bytes: &[],
                        fragment: this,
                    });
                }
                fragment = Some(this);
                8
            }
            AUTHENTICATION => (usize::from(units) + 2) * 4,
            _ => (usize::from(units) + 1) * 8,
        };
        next = following;
        bytes = bytes.get(length..)?;
    }
    None
}

/// The transport header of a whole packet.
fn transport(is_ipv6: bool, chain: &Chain<'_>) -> L4 {
    let whole = |header: usize| chain.bytes.len() >= header;
    match chain.protocol {
        TCP => match chain.bytes {
            [_, _, _, _, _, _, _, _, _, _, _, _, offset, ..]
                if whole(20) && *offset >> 4 >= 5 && whole(usize::from(offset >> 4) * 4) =>
            {
                ports(TCP, chain.bytes)
            }
            _ => L4::Malformed,
        },
        UDP if whole(8) => ports(UDP, chain.bytes),
        ICMP if !is_ipv6 && whole(8) => match chain.bytes[0] {
            8 => L4::Echo,
            3 | 5 | 11 | 12 => inner_flow(&chain.bytes[8..]).map_or(L4::Malformed, L4::Error),
            _ => L4::Other,
        },
        ICMPV6 if is_ipv6 && whole(8) => match chain.bytes[0] {
            128 => L4::Echo,
            1..=4 => inner_flow(&chain.bytes[8..]).map_or(L4::Malformed, L4::Error),
            _ => L4::Other,
        },
        UDP => L4::Malformed,
        ICMP if !is_ipv6 => L4::Malformed,
        ICMPV6 if is_ipv6 => L4::Malformed,
        _ => L4::Other,
    }
}

/// The transport header of a first fragment, which may be cut short.
fn first_fragment(is_ipv6: bool, chain: &Chain<'_>) -> L4 {
    match (chain.protocol, chain.bytes) {
        (TCP | UDP, bytes) => ports(chain.protocol, bytes),
        (ICMP, [8, ..]) if !is_ipv6 => L4::Echo,
        (ICMPV6, [128, ..]) if is_ipv6 => L4::Echo,
        (ICMP, []) if !is_ipv6 => L4::Malformed,
        (ICMPV6, []) if is_ipv6 => L4::Malformed,
        _ => L4::Other,
    }
}

/// Ports are the first four bytes of both UDP and TCP, whose flags are in the fourteenth.
fn ports(protocol: u8, bytes: &[u8]) -> L4 {
    const FIN_SYN_RST_ACK: u8 = 0x17;
    const SYN: u8 = 0x02;
    match (protocol, bytes) {
        (UDP, [a, b, c, d, ..]) => L4::Udp {
            source: u16::from_be_bytes([*a, *b]),
            destination: u16::from_be_bytes([*c, *d]),
        },
        (TCP, [a, b, c, d, s0, s1, s2, s3, _, _, _, _, _, flags, ..]) => L4::Tcp {
            source: u16::from_be_bytes([*a, *b]),
            destination: u16::from_be_bytes([*c, *d]),
            syn: flags & FIN_SYN_RST_ACK == SYN,
            sequence: u32::from_be_bytes([*s0, *s1, *s2, *s3]),
        },
        _ => L4::Malformed,
    }
}

/// The flow a quoted packet of ours belongs to, seen from the client: the quoted destination is the client. Eight bytes of the transport
/// header are enough (RFC 792), and a first fragment has them.
fn inner_flow(quoted: &[u8]) -> Option<FlowKey> {
    let (ours, theirs, chain) = match quoted.first()? >> 4 {
        4 => {
            let header = usize::from(quoted[0] & 0xf) * 4;
            let fixed = quoted.first_chunk::<20>()?;
            let ours = IpAddr::from([fixed[12], fixed[13], fixed[14], fixed[15]]);
            let theirs = IpAddr::from([fixed[16], fixed[17], fixed[18], fixed[19]]);
            let fragment = Fragment {
                later: u16::from_be_bytes([fixed[6], fixed[7]]) & 0x1fff != 0,
                ..Fragment::default()
            };
            let bytes = quoted.get(header..).filter(|_| header >= 20)?;
            let protocol = fixed[9];
            (
                ours,
                theirs,
                Chain {
                    protocol,
                    bytes,
                    fragment,
                },
            )
        }
        6 => {
            let fixed = quoted.first_chunk::<40>()?;
            let ours: [u8; 16] = fixed[8..24].try_into().ok()?;
            let theirs: [u8; 16] = fixed[24..40].try_into().ok()?;
            (
                IpAddr::from(ours),
                IpAddr::from(theirs),
                walk(fixed[6], quoted.get(40..)?)?,
            )
        }
        _ => return None,
    };
    let (vip_port, client_port) = match (chain.protocol, chain.bytes) {
        _ if chain.fragment.later => return None,
        (TCP | UDP, [a, b, c, d, ..]) => (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])),
        (ICMP, _) if ours.is_ipv4() => (0, 0),
        (ICMPV6, _) if ours.is_ipv6() => (0, 0),
        _ => return None,
    };
    Some(FlowKey {
        protocol: chain.protocol,
        vip: ours,
        vip_port,
        client: theirs,
        client_port,
    })
}

#[cfg(test)]
#[path = "packet_tests.rs"]
mod tests;
