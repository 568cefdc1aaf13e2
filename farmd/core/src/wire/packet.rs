//! Frames as the decision needs them: who talks to which VIP about what.
//!
//! [`Packet::parse`] goes through etherparse's checked slices in lax mode: a frame whose inner lengths lie is read as far as it is
//! true and marked [`L4::Malformed`] where it matters.

use std::net::IpAddr;

use etherparse::{LaxNetSlice, LaxSlicedPacket, TransportSlice};

use crate::balance::flow::FlowKey;
use crate::id::MacAddr;

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
    /// Protocol number of the packet.
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
    /// Reads an Ethernet frame; `None` if it carries no IPv4 or IPv6 packet.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
        let Some(etherparse::LinkSlice::Ethernet2(ethernet)) = &sliced.link else {
            return None;
        };
        let (source, destination, protocol, fragment) = match sliced.net.as_ref()? {
            LaxNetSlice::Ipv4(ip) => {
                let h = ip.header();
                let fragment = Fragment {
                    later: h.fragments_offset().value() != 0,
                    more: h.more_fragments(),
                    identification: h.identification().into(),
                };
                (
                    IpAddr::V4(h.source_addr()),
                    IpAddr::V4(h.destination_addr()),
                    h.protocol().0,
                    fragment,
                )
            }
            LaxNetSlice::Ipv6(ip) => {
                let h = ip.header();
                let mut fragment = Fragment {
                    later: false,
                    more: false,
                    identification: 0,
                };
                for extension in ip.extensions().clone().into_iter() {
                    if let etherparse::Ipv6ExtensionSlice::Fragment(f) = extension {
                        fragment = Fragment {
                            later: f.fragment_offset().value() != 0,
                            more: f.more_fragments(),
                            identification: f.identification(),
                        };
                    }
                }
                (
                    IpAddr::V6(h.source_addr()),
                    IpAddr::V6(h.destination_addr()),
                    ip.payload().ip_number.0,
                    fragment,
                )
            }
            LaxNetSlice::Arp(_) => return None,
        };
        let l4 = if fragment.later {
            L4::LaterFragment
        } else {
            Self::l4(&sliced, protocol, fragment.more)
        };
        Some(Self {
            source_mac: MacAddr(ethernet.source()),
            destination_mac: MacAddr(ethernet.destination()),
            source,
            destination,
            protocol,
            identification: fragment.identification,
            more_fragments: fragment.more,
            l4,
        })
    }

    fn l4(sliced: &LaxSlicedPacket<'_>, protocol: u8, more: bool) -> L4 {
        match (&sliced.transport, protocol) {
            (Some(TransportSlice::Tcp(tcp)), _) => L4::Tcp {
                source: tcp.source_port(),
                destination: tcp.destination_port(),
                syn: tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin(),
            },
            (Some(TransportSlice::Udp(udp)), _) => L4::Udp {
                source: udp.source_port(),
                destination: udp.destination_port(),
            },
            (Some(TransportSlice::Icmpv4(icmp)), _) => match icmp.type_u8() {
                8 => L4::Echo,
                3 | 5 | 11 | 12 => inner_flow(icmp.payload()).map_or(L4::Malformed, L4::Error),
                _ => L4::Other,
            },
            (Some(TransportSlice::Icmpv6(icmp)), _) => match icmp.type_u8() {
                128 => L4::Echo,
                1..=4 => inner_flow(icmp.payload()).map_or(L4::Malformed, L4::Error),
                _ => L4::Other,
            },
            (None, 1 | 6 | 17 | 58) if more => {
                transport_bytes(sliced).map_or(L4::Malformed, |bytes| first_fragment(protocol, bytes))
            }
            (None, 1 | 6 | 17 | 58) => L4::Malformed,
            _ => L4::Other,
        }
    }
}

/// The transport header of a first fragment, which may be cut short; ports are the first four bytes of both UDP and TCP.
fn first_fragment(protocol: u8, bytes: &[u8]) -> L4 {
    match (protocol, bytes) {
        (17, [a, b, c, d, ..]) => L4::Udp {
            source: u16::from_be_bytes([*a, *b]),
            destination: u16::from_be_bytes([*c, *d]),
        },
        (6, [a, b, c, d, _, _, _, _, _, _, _, _, _, flags, ..]) => {
            const FIN_SYN_RST_ACK: u8 = 0x17;
            let (source, destination) = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
            L4::Tcp {
                source,
                destination,
                syn: flags & FIN_SYN_RST_ACK == 0x02,
            }
        }
        (1, [8, ..]) | (58, [128, ..]) => L4::Echo,
        (1 | 58, [_, ..]) => L4::Other,
        _ => L4::Malformed,
    }
}

struct Fragment {
    later: bool,
    more: bool,
    identification: u32,
}

fn transport_bytes<'a>(sliced: &'a LaxSlicedPacket<'a>) -> Option<&'a [u8]> {
    sliced.net.as_ref()?.ip_payload_ref().map(|p| p.payload)
}

/// The flow a quoted packet of ours belongs to, seen from the client: the quoted destination is the client. Eight bytes of the transport
/// header are enough (RFC 792).
fn inner_flow(quoted: &[u8]) -> Option<FlowKey> {
    let ports = |rest: &[u8]| -> Option<(u16, u16)> {
        let b = rest.first_chunk::<4>()?;
        Some((u16::from_be_bytes([b[0], b[1]]), u16::from_be_bytes([b[2], b[3]])))
    };
    let (protocol, ours, theirs, rest) = match quoted.first()? >> 4 {
        4 => {
            let header = usize::from(quoted[0] & 0xf) * 4;
            let fixed = quoted.first_chunk::<20>()?;
            let ours = IpAddr::from([fixed[12], fixed[13], fixed[14], fixed[15]]);
            let theirs = IpAddr::from([fixed[16], fixed[17], fixed[18], fixed[19]]);
            if header < 20 || u16::from_be_bytes([fixed[6], fixed[7]]) & 0x1fff != 0 {
                return None;
            }
            (fixed[9], ours, theirs, quoted.get(header..)?)
        }
        6 => {
            let fixed = quoted.first_chunk::<40>()?;
            let ours: [u8; 16] = fixed[8..24].try_into().ok()?;
            let theirs: [u8; 16] = fixed[24..40].try_into().ok()?;
            (fixed[6], IpAddr::from(ours), IpAddr::from(theirs), &quoted[40..])
        }
        _ => return None,
    };
    let (vip_port, client_port) = match protocol {
        6 | 17 => ports(rest)?,
        1 | 58 => (0, 0),
        _ => return None,
    };
    Some(FlowKey {
        protocol,
        vip: ours,
        vip_port,
        client: theirs,
        client_port,
    })
}
