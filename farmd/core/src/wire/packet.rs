//! Frames as the decision needs them: who talks to which VIP about what.
//!
//! [`Packet::parse`] goes through etherparse's checked slices in lax mode: a frame whose inner lengths lie is read as far as it is
//! true and marked [`L4::Malformed`] where it matters.

use std::net::IpAddr;

use etherparse::{
    EtherType, Ethernet2Header, Ipv6Header, LaxNetSlice, LaxSlicedPacket, SingleVlanHeader, TransportSlice,
};

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
    /// Reads an Ethernet frame; `None` if it carries no IPv4 or IPv6 packet.
    pub fn parse(frame: &[u8]) -> Option<Self> {
        let sliced = LaxSlicedPacket::from_ethernet(frame).ok()?;
        let Some(etherparse::LinkSlice::Ethernet2(ethernet)) = &sliced.link else {
            return None;
        };
        // The parser goes by the version in the IP header; the kernel goes by the EtherType and refuses a packet of the other version.
        let family = match sliced.link_exts.last() {
            Some(etherparse::LaxLinkExtSlice::Vlan(vlan)) => vlan.ether_type(),
            Some(_) => return None,
            None => ethernet.ether_type(),
        };
        let (source, destination, protocol, fragment) = match sliced.net.as_ref()? {
            LaxNetSlice::Ipv4(_) if family != EtherType::IPV4 => return None,
            LaxNetSlice::Ipv6(_) if family != EtherType::IPV6 => return None,
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
                let fragment = fragment_header(h.next_header().0, ip.extensions().slice()).unwrap_or(Fragment {
                    later: false,
                    more: false,
                    identification: 0,
                });
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
        } else if lies_about_length(&sliced, frame) {
            L4::Malformed
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
                sequence: tcp.sequence_number(),
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
        (6, [a, b, c, d, s0, s1, s2, s3, _, _, _, _, _, flags, ..]) => {
            const FIN_SYN_RST_ACK: u8 = 0x17;
            let (source, destination) = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
            L4::Tcp {
                source,
                destination,
                syn: flags & FIN_SYN_RST_ACK == 0x02,
                sequence: u32::from_be_bytes([*s0, *s1, *s2, *s3]),
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

/// True if an IP packet says that it is shorter than its header, or longer than what came. A packet merged by the kernel to more than 64 kB says 0.
fn lies_about_length(sliced: &LaxSlicedPacket<'_>, frame: &[u8]) -> bool {
    let link = Ethernet2Header::LEN + sliced.link_exts.len() * SingleVlanHeader::LEN;
    let came = frame.len().saturating_sub(link);
    let (header, says) = match &sliced.net {
        Some(LaxNetSlice::Ipv4(ip)) => {
            let header = ip.header();
            (header.slice().len(), usize::from(header.total_len()))
        }
        Some(LaxNetSlice::Ipv6(ip)) => match ip.header().payload_length() {
            0 => (Ipv6Header::LEN, 0),
            payload => (Ipv6Header::LEN, Ipv6Header::LEN + usize::from(payload)),
        },
        Some(LaxNetSlice::Arp(_)) | None => return false,
    };
    says != 0 && (says < header || says > came)
}

/// The last fragment header (RFC 8200 section 4.5) among IPv6 extension headers of which the first has number `next`.
///
/// Written here because etherparse 0.21 reads past the end when a chain that its lax parser has cut short is iterated.
fn fragment_header(mut next: u8, mut chain: &[u8]) -> Option<Fragment> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION_OPTIONS: u8 = 60;
    let mut found = None;
    while let [following, length, ..] = *chain {
        let length = match next {
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => (usize::from(length) + 1) * 8,
            AUTHENTICATION => (usize::from(length) + 2) * 4,
            FRAGMENT => {
                let [_, _, a, b, c, d, e, f] = *chain.first_chunk()?;
                let field = u16::from_be_bytes([a, b]);
                found = Some(Fragment {
                    later: field >> 3 != 0,
                    more: field & 1 != 0,
                    identification: u32::from_be_bytes([c, d, e, f]),
                });
                8
            }
            _ => break,
        };
        next = following;
        chain = chain.get(length..).unwrap_or_default();
    }
    found
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::balance::flow::{TCP, UDP};
    use crate::balance::test_frames::*;

    fn way() -> Way {
        Way::new(client(1), vip(), VIRTUAL_MAC)
    }

    fn way6() -> Way {
        Way::new(client6(1), vip6(), VIRTUAL_MAC)
    }

    fn l4(frame: &[u8]) -> L4 {
        Packet::parse(frame).unwrap().l4
    }

    /// Of every segment that [`Way`] makes.
    const SEQUENCE: u32 = 1000;
    const SYN: L4 = L4::Tcp {
        source: 4000,
        destination: 80,
        syn: true,
        sequence: SEQUENCE,
    };
    const NOT_SYN: L4 = L4::Tcp {
        source: 4000,
        destination: 80,
        syn: false,
        sequence: SEQUENCE,
    };
    const ASKED: L4 = L4::Udp {
        source: 4000,
        destination: 53,
    };

    #[test]
    fn whole_packets_of_both_families_are_read() {
        for way in [way(), way6()] {
            let packet = Packet::parse(&way.tcp(4000, 80, Flags::Syn)).unwrap();
            let expected = Packet {
                source_mac: CLIENT_MAC,
                destination_mac: VIRTUAL_MAC,
                source: way.client,
                destination: way.vip,
                protocol: TCP,
                identification: 0,
                more_fragments: false,
                l4: SYN,
            };
            assert_eq!(packet, expected);
            for flags in [Flags::SynAck, Flags::Ack, Flags::Rst] {
                assert_eq!(l4(&way.tcp(4000, 80, flags)), NOT_SYN, "{flags:?}");
            }
            assert_eq!(l4(&way.udp(4000, 53, b"?")), ASKED);
            assert_eq!(l4(&way.echo()), L4::Echo);
        }
    }

    #[test]
    fn an_error_is_named_from_the_clients_side() {
        for way in [way(), way6()] {
            let flow = |protocol, vip_port| {
                L4::Error(FlowKey {
                    protocol,
                    vip: way.vip,
                    vip_port,
                    client: way.client,
                    client_port: 4000,
                })
            };
            let tcp = way.back().tcp(80, 4000, Flags::Ack);
            assert_eq!(l4(&way.too_big(&tcp)), flow(TCP, 80));
            assert_eq!(l4(&way.too_big(&way.back().udp(53, 4000, b"!"))), flow(UDP, 53));
            let header = if way.client.is_ipv4() { 20 } else { 40 };
            assert_eq!(
                l4(&way.too_big(&tcp[..14 + header + 8])),
                flow(TCP, 80),
                "eight bytes are enough"
            );
            assert_eq!(l4(&way.too_big(&tcp[..14 + header + 3])), L4::Malformed);
            assert_eq!(l4(&way.too_big(&tcp[..14 + header - 1])), L4::Malformed);
            assert_eq!(l4(&way.too_big(&tcp[..14])), L4::Malformed);
        }
        // A quoted later fragment has no ports.
        let later = fragment(&way().back().udp(53, 4000, &[7; 3000]), 1, 185, false, 1480);
        assert_eq!(l4(&way().too_big(&later)), L4::Malformed);
    }

    #[test]
    fn ip_options_move_the_transport_header() {
        let frame = way().tcp(4000, 80, Flags::Syn);
        let mut longer = frame[..34].to_vec();
        longer.extend_from_slice(&[1, 1, 1, 0]);
        longer.extend_from_slice(&frame[34..]);
        longer[14] = 0x46;
        let total = (longer.len() - 14) as u16;
        longer[16..18].copy_from_slice(&total.to_be_bytes());
        assert_eq!(l4(&longer), SYN);
    }

    #[test]
    fn fragments_are_told_apart() {
        let udp = way().udp(4000, 53, &[7; 3000]);
        for (offset, more, expected) in [
            (0, true, ASKED),
            (185, true, L4::LaterFragment),
            (370, false, L4::LaterFragment),
        ] {
            let packet = Packet::parse(&fragment(&udp, 0x1234, offset, more, 1480)).unwrap();
            assert_eq!((packet.l4, packet.more_fragments), (expected, more), "at {offset}");
            assert_eq!((packet.identification, packet.protocol), (0x1234, UDP));
        }
        let tcp = way().tcp(4000, 80, Flags::Syn);
        assert_eq!(l4(&fragment(&tcp, 1, 0, true, 24)), SYN);
        assert_eq!(l4(&fragment(&way().echo(), 1, 0, true, 8)), L4::Echo);
    }

    #[test]
    fn a_first_fragment_may_be_short() {
        let tcp = way().tcp(4000, 80, Flags::Syn);
        // RFC 1858: eight bytes are the least a fragment has; TCP's flags are not among them.
        assert_eq!(l4(&fragment(&tcp, 1, 0, true, 8)), L4::Malformed);
        assert_eq!(l4(&fragment(&tcp, 1, 0, true, 16)), SYN);
        let udp = way().udp(4000, 53, &[7; 64]);
        assert_eq!(l4(&fragment(&udp, 1, 0, true, 8)), ASKED);
        assert_eq!(l4(&fragment(&udp, 1, 0, true, 3)), L4::Malformed);
    }

    #[test]
    fn what_is_cut_short_is_malformed_or_nothing() {
        for frame in [way().tcp(4000, 80, Flags::Syn), way().udp(4000, 53, b""), way().echo()] {
            assert_eq!(Packet::parse(&frame[..33]).map(|p| p.l4), None);
            for length in 34..42 {
                assert_eq!(l4(&frame[..length]), L4::Malformed, "{length} bytes");
            }
        }
        assert_eq!(Packet::parse(&[]), None);
        let mut arp = way().udp(1, 2, b"");
        arp[12..14].copy_from_slice(&[8, 6]);
        assert_eq!(Packet::parse(&arp), None);
    }

    #[test]
    fn ipv6_extension_headers_are_walked() {
        let tcp = way6().tcp(4000, 80, Flags::Syn);
        for extensions in [&[0][..], &[60], &[0, 43, 60], &[0, 60, 44]] {
            let packet = Packet::parse(&with_extensions(&tcp, extensions, 0, false)).unwrap();
            assert_eq!((packet.l4, packet.protocol), (SYN, TCP), "{extensions:?}");
        }
        let first = Packet::parse(&with_extensions(&tcp, &[44], 0, true)).unwrap();
        assert_eq!(
            (first.l4, first.more_fragments, first.identification),
            (SYN, true, 0xdead_beef)
        );
        let later = Packet::parse(&with_extensions(&tcp, &[0, 44], 185, true)).unwrap();
        assert_eq!(
            (later.l4, later.identification, later.protocol),
            (L4::LaterFragment, 0xdead_beef, TCP)
        );
    }

    fn real_frames() -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for way in [way(), way6()] {
            let reply = way.back().tcp(80, 4000, Flags::Ack);
            frames.extend([
                way.tcp(4000, 80, Flags::Syn),
                way.udp(4000, 53, b"?"),
                way.echo(),
                way.too_big(&reply),
            ]);
        }
        frames.push(fragment(&way().udp(4000, 53, &[7; 600]), 1, 0, true, 64));
        frames
            .extend([&[0, 43, 60][..], &[44]].map(|e| with_extensions(&way6().tcp(4000, 80, Flags::Syn), e, 0, true)));
        frames
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), family in 0u8..3) {
            let mut bytes = bytes;
            let ethertype = [[8, 0], [0x86, 0xdd], [0x81, 0]][usize::from(family)];
            if let Some(field) = bytes.get_mut(12..14) {
                field.copy_from_slice(&ethertype);
            }
            Packet::parse(&bytes);
        }

        #[test]
        fn damaged_frames_never_panic_and_the_addresses_are_those_in_the_frame(
            which in proptest::sample::select(real_frames()), damage in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..6), length in 0usize..700,
        ) {
            let mut frame = which;
            for (at, byte) in damage {
                let at = usize::from(at) % frame.len();
                frame[at] = byte;
            }
            frame.truncate(length);
            let untagged = frame.get(12..14) == Some(&[8, 0]);
            if let Some(packet) = Packet::parse(&frame) && untagged {
                prop_assert_eq!(packet.destination, IpAddr::from([frame[30], frame[31], frame[32], frame[33]]));
                prop_assert_eq!(packet.protocol, frame[23]);
            }
        }
    }
}
