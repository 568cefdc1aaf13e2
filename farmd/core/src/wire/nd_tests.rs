use proptest::prelude::*;

use super::*;

const OWN: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const CLIENT: MacAddr = MacAddr([2, 0, 0, 0, 0, 9]);
const VIRTUAL: MacAddr = MacAddr([0x5a, 0xfe, 0, 0, 0, 0x20]);

fn addr(text: &str) -> Ipv6Addr {
    text.parse().unwrap()
}

/// As a host asks that knows nothing of the target.
fn question() -> Nd {
    let target = addr("2001:db8::12:3420");
    Nd {
        destination_mac: multicast_mac(solicited_node(target)),
        source_mac: CLIENT,
        source: addr("2001:db8::100"),
        destination: solicited_node(target),
        message: Message::Solicitation,
        target,
        link_layer: Some(CLIENT),
    }
}

fn probe() -> Nd {
    Nd {
        source: Ipv6Addr::UNSPECIFIED,
        link_layer: None,
        ..question()
    }
}

/// The frame with `change` made to it and a checksum that fits.
fn damaged(message: Nd, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut frame = message.emit();
    change(&mut frame);
    let length = (frame.len() - 54) as u16;
    frame[18..20].copy_from_slice(&length.to_be_bytes());
    let (source, destination) = (frame[22..38].try_into().unwrap(), frame[38..54].try_into().unwrap());
    let (mut header, payload) = etherparse::Icmpv6Header::from_slice(&frame[54..]).unwrap();
    header.update_checksum(source, destination, payload).unwrap();
    frame[56..58].copy_from_slice(&header.checksum.to_be_bytes());
    frame
}

#[test]
fn groups_and_their_ethernet_addresses_are_those_of_the_standards() {
    assert_eq!(solicited_node(addr("2001:db8::12:3420")), addr("ff02::1:ff12:3420"));
    let group = solicited_node(addr("2001:db8::12:3420"));
    assert_eq!(multicast_mac(group), MacAddr([0x33, 0x33, 0xff, 0x12, 0x34, 0x20]));
    assert_eq!(multicast_mac(ALL_NODES), MacAddr([0x33, 0x33, 0, 0, 0, 1]));
}

#[test]
fn a_question_is_read_and_answered_without_the_virtual_mac_as_source() {
    let question = question();
    assert_eq!(Nd::parse(&question.emit()), Some(question));
    let frame = question.answer(OWN, VIRTUAL).emit();
    // RFC 4861, 4.4: type 136, code 0, flags S and O, target, option 2 of 8 bytes.
    assert_eq!(
        (frame[12..14].to_vec(), frame[20], frame[21]),
        (vec![0x86, 0xdd], 58, 255)
    );
    assert_eq!((frame[54], frame[55], frame[58]), (136, 0, 0x60));
    assert_eq!(frame[62..78], question.target.octets());
    assert_eq!(frame[78..], [2, 1, 0x5a, 0xfe, 0, 0, 0, 0x20]);
    let answer = Nd::parse(&frame).unwrap();
    assert_eq!((answer.source_mac, answer.destination_mac), (OWN, CLIENT));
    assert_eq!((answer.source, answer.destination), (question.target, question.source));
}

#[test]
fn who_gives_no_ethernet_address_is_answered_where_the_frame_came_from() {
    let question = Nd {
        link_layer: None,
        destination_mac: OWN,
        destination: question().target,
        ..question()
    };
    assert_eq!(Nd::parse(&question.emit()), Some(question));
    assert_eq!(question.answer(OWN, OWN).destination_mac, CLIENT);
}

#[test]
fn a_probe_is_answered_to_all_and_moves_nobodys_entry() {
    let probe = probe();
    assert_eq!(Nd::parse(&probe.emit()), Some(probe));
    assert!(probe.is_probe() && !question().is_probe());
    let answer = Nd::parse(&probe.answer(OWN, OWN).emit()).unwrap();
    let expected = Message::Advertisement {
        solicited: false,
        overrides: false,
    };
    assert_eq!((answer.message, answer.destination), (expected, ALL_NODES));
    assert_eq!(answer.destination_mac, multicast_mac(ALL_NODES));
}

#[test]
fn news_override_and_are_not_solicited() {
    let vip = question().target;
    for to in [None, Some((addr("2001:db8::100"), CLIENT))] {
        let news = Nd::parse(&Nd::announce(vip, OWN, OWN, to).emit()).unwrap();
        let expected = Message::Advertisement {
            solicited: false,
            overrides: true,
        };
        assert_eq!((news.message, news.target, news.link_layer), (expected, vip, Some(OWN)));
        assert_eq!(
            news.destination_mac,
            to.map_or(multicast_mac(ALL_NODES), |(_, mac)| mac)
        );
    }
}

#[test]
fn what_a_host_must_not_heed_is_not_read() {
    let at = |place: usize, byte: u8| move |frame: &mut Vec<u8>| frame[place] = byte;
    let cases: [(&str, Vec<u8>); 10] = [
        ("from beyond a router", damaged(question(), at(21, 254))),
        ("another code", damaged(question(), at(55, 1))),
        ("another type", damaged(question(), at(54, 133))),
        ("no IPv6", damaged(question(), at(13, 0))),
        ("a group as target", damaged(question(), at(62, 0xff))),
        ("an option without length", damaged(question(), at(79, 0))),
        ("an option past the end", damaged(question(), at(79, 2))),
        ("no whole target", damaged(question(), |frame| frame.truncate(76))),
        (
            "a probe to a host",
            damaged(probe(), |frame| {
                frame[38..54].copy_from_slice(&question().target.octets())
            }),
        ),
        (
            "a probe with an Ethernet address",
            damaged(probe(), |frame| frame.extend([1, 1, 2, 0, 0, 0, 0, 9])),
        ),
    ];
    for (what, frame) in cases {
        assert_eq!(Nd::parse(&frame), None, "{what}");
    }
    let mut wrong = question().emit();
    wrong[56] ^= 1;
    assert_eq!(Nd::parse(&wrong), None, "a wrong checksum");
    let solicited = Message::Advertisement {
        solicited: true,
        overrides: true,
    };
    let to_all = Nd {
        message: solicited,
        ..Nd::announce(question().target, OWN, OWN, None)
    };
    assert_eq!(Nd::parse(&to_all.emit()), None, "solicited by a group");
}

#[test]
fn an_unknown_option_is_passed_over() {
    // A nonce (RFC 7527), as Linux sends with its probes.
    let frame = damaged(probe(), |frame| frame.extend([14, 1, 1, 2, 3, 4, 5, 6]));
    assert_eq!(Nd::parse(&frame), Some(probe()));
}

proptest! {
    #[test]
    fn damage_never_panics_and_never_passes_the_checksum_unseen(
        at in 54usize..86, bits in 1u8..=255, length in 0usize..90, cut in any::<bool>(),
    ) {
        let mut frame = question().emit();
        frame[at] ^= bits;
        if cut {
            frame.truncate(length);
        }
        prop_assert_eq!(Nd::parse(&frame), None);
    }
}
