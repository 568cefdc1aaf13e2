//! Frames of every kind, whole and damaged, as the decision gets to see them.

use proptest::prelude::*;

use super::*;
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
fn a_reset_without_ack_is_told_from_everything_else() {
    for way in [way(), way6()] {
        let reset = way.tcp(4000, 80, Flags::Rst);
        assert_eq!(bare_reset_source(&reset), Some(way.client));
        for flags in [Flags::Syn, Flags::SynAck, Flags::Ack] {
            assert_eq!(bare_reset_source(&way.tcp(4000, 80, flags)), None, "{flags:?}");
        }
        let mut answer = reset.clone();
        let flags = reset.len() - b"hello".len() - 20 + 13;
        answer[flags] |= 0x10;
        assert_eq!(bare_reset_source(&answer), None, "an application's");
        for others in [way.udp(4000, 53, &[4; 20]), way.echo()] {
            assert_eq!(bare_reset_source(&others), None);
        }
        for cut in 0..reset.len() {
            assert_eq!(bare_reset_source(&reset[..cut]), None, "{cut} bytes");
        }
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

#[test]
fn extension_headers_that_lead_nowhere_are_malformed() {
    let tcp = way6().tcp(4000, 80, Flags::Syn);
    let most = [60; MAX_EXTENSIONS];
    assert_eq!(l4(&with_extensions(&tcp, &most, 0, false)), SYN);
    for extensions in [&[60; MAX_EXTENSIONS + 1][..], &[60, 0], &[44, 44]] {
        assert_eq!(
            l4(&with_extensions(&tcp, extensions, 0, false)),
            L4::Malformed,
            "{extensions:?}"
        );
    }
    let mut past = with_extensions(&tcp, &[0, 60], 0, false);
    past[55] = 20;
    assert_eq!(l4(&past), L4::Malformed, "longer than the packet");
    let mut cut = with_extensions(&tcp, &[60], 0, false);
    cut[18..20].copy_from_slice(&4u16.to_be_bytes());
    assert_eq!(l4(&cut), L4::Malformed);
    let mut none = tcp.clone();
    none[20] = 59;
    assert_eq!(l4(&none), L4::Other, "no next header");
}

#[test]
fn a_later_fragment_says_nothing_but_whose_it_is() {
    // The data of a later fragment may look like an extension header.
    let whole = way6().udp(4000, 53, &[0; 64]);
    let later = Packet::parse(&with_extensions(&whole, &[44, 60], 10, false)).unwrap();
    assert_eq!((later.l4, later.protocol), (L4::LaterFragment, 60));
    let mut lies = fragment(&way().udp(4000, 53, &[7; 3000]), 9, 185, true, 1480);
    lies[16] = 0xff;
    assert_eq!(l4(&lies), L4::Malformed);
}

#[test]
fn the_other_family_s_control_messages_are_none() {
    let mut ping = way().echo();
    ping[23] = ICMPV6;
    ping[34] = 128;
    assert_eq!(l4(&ping), L4::Other);
    let mut ping = way6().echo();
    ping[20] = ICMP;
    ping[54] = 8;
    assert_eq!(l4(&ping), L4::Other);
}

#[test]
fn a_priority_is_no_vlan() {
    let frame = way().tcp(4000, 80, Flags::Syn);
    for (tags, expected) in [
        (&[0x8100_6000u32][..], Some(SYN)),
        (&[0x88a8_0000, 0x8100_e000], Some(SYN)),
        (&[0x8100_0005], None),
        (&[0x8100_0000, 0x8100_0005], None),
        (&[0x8100_0000; 3], None),
    ] {
        let parsed = Packet::parse(&tagged(&frame, tags)).map(|packet| packet.l4);
        assert_eq!(parsed, expected, "{tags:x?}");
    }
}

#[test]
fn a_quoted_packet_may_have_extension_headers() {
    let back = way6().back();
    let flow = |quoted: &[u8]| match l4(&way6().too_big(quoted)) {
        L4::Error(flow) => Some((flow.protocol, flow.vip_port, flow.client_port)),
        other => {
            assert_eq!(other, L4::Malformed);
            None
        }
    };
    let udp = back.udp(53, 4000, &[7; 64]);
    assert_eq!(flow(&with_extensions(&udp, &[44], 0, true)), Some((UDP, 53, 4000)));
    assert_eq!(flow(&with_extensions(&udp, &[0, 60], 0, true)), Some((UDP, 53, 4000)));
    assert_eq!(flow(&with_extensions(&udp, &[44], 8, true)), None);
    assert_eq!(flow(&with_extensions(&udp, &[44], 0, true)[..14 + 40 + 8 + 3]), None);
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
    frames.extend([&[0, 43, 60][..], &[44]].map(|e| with_extensions(&way6().tcp(4000, 80, Flags::Syn), e, 0, true)));
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
