use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::SystemTime;

use farm_sys::interface;
use farm_sys::netlink::Netlink;
use farm_sys::packet_socket::{BpfInsn, PacketRing, VNET_HEADER};
use farm_sys::poll::wait_readable;

use crate::lab::{self, ADDR_A, EXPERIMENT, LIMIT, Lab, MAC_A, MAC_B};

#[test]
fn a_frame_from_the_other_side_arrives_as_it_was_sent() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let mut ring = lab.ring_a(&lab::ethernet_type(EXPERIMENT));
    let sent = lab::frame(MAC_A, MAC_B, EXPERIMENT, &[7; 1500]);
    lab.sender_b().send(&sent).unwrap();
    assert_eq!(lab::collect(&mut ring, 1), [sent]);
    assert_eq!(ring.stats().unwrap(), (1, 0));
    assert_eq!(ring.truncated(), 0);
}

#[test]
fn what_this_host_sends_is_not_captured() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let mut ring = lab.ring_a(&lab::ethernet_type(EXPERIMENT));
    ring.send(&lab::frame(MAC_B, MAC_A, EXPERIMENT, &[1; 64])).unwrap();
    assert!(lab::stays_silent(&mut ring));
}

#[test]
fn a_full_ring_counts_what_it_loses_and_goes_on_in_order() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let mut ring = lab
        .a
        .run(|| PacketRing::open(interface::index("a0").unwrap(), 1, &lab::ethernet_type(EXPERIMENT)).unwrap());
    let sender = lab.sender_b();
    let numbered = |number: u8| lab::frame(MAC_A, MAC_B, EXPERIMENT, &[number; 46]);
    // One slot asked for is 32 slots made.
    for number in 0..40 {
        sender.send(&numbered(number)).unwrap();
    }
    assert_eq!(lab::collect(&mut ring, 32), (0..32).map(numbered).collect::<Vec<_>>());
    assert_eq!(ring.stats().unwrap(), (40, 8));
    // Twice around.
    for round in 0..2 {
        for number in 0..32 {
            sender.send(&numbered(round * 32 + number)).unwrap();
        }
        let expected: Vec<_> = (0..32).map(|number| numbered(round * 32 + number)).collect();
        assert_eq!(lab::collect(&mut ring, 32), expected);
    }
}

#[test]
fn a_ring_of_small_slots_tells_when_short_frames_came_and_counts_long_ones() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let mut ring = lab
        .a
        .run(|| PacketRing::open_small(interface::index("a0").unwrap(), 1, &lab::ethernet_type(EXPERIMENT)).unwrap());
    let sender = lab.sender_b();
    let numbered = |number: u8, length: usize| lab::frame(MAC_A, MAC_B, EXPERIMENT, &vec![number; length]);
    let before = SystemTime::now();
    // 180 bytes with the header, and one more.
    for (number, length) in [(0, 46), (1, 166), (2, 167), (3, 1500), (4, 46)] {
        sender.send(&numbered(number, length)).unwrap();
    }
    let after = SystemTime::now();
    let mut seen = Vec::new();
    let given = ring.recv_timed(100, |arrived, frame| {
        assert!((before..=after).contains(&arrived), "{before:?} {arrived:?} {after:?}");
        seen.push(frame.to_vec());
    });
    assert_eq!(given.unwrap(), 3);
    assert_eq!(seen, [numbered(0, 46), numbered(1, 166), numbered(4, 46)]);
    assert_eq!(ring.truncated(), 2);
    // One slot asked for is 256 slots made.
    for _ in 0..260 {
        sender.send(&numbered(5, 46)).unwrap();
    }
    assert_eq!(ring.recv(1000, |_| {}).unwrap(), 256);
    assert_eq!(ring.stats().unwrap(), (265, 4));
}

#[test]
fn the_budget_bounds_one_turn_and_the_rest_stays_readable() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let mut ring = lab.ring_a(&lab::ethernet_type(EXPERIMENT));
    let sender = lab.sender_b();
    for _ in 0..3 {
        sender.send(&lab::frame(MAC_A, MAC_B, EXPERIMENT, &[0; 46])).unwrap();
    }
    assert_eq!(ring.recv(2, |_| {}).unwrap(), 2);
    assert_eq!(wait_readable(&[ring.as_fd()], Some(LIMIT)).unwrap(), 1);
    assert_eq!(ring.recv(2, |_| {}).unwrap(), 1);
    assert_eq!(ring.recv(2, |_| {}).unwrap(), 0);
}

#[test]
fn a_replaced_filter_takes_effect_at_once() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let mut ring = lab.ring_a(&lab::ethernet_type(EXPERIMENT));
    let sender = lab.sender_b();
    let (old, new) = (EXPERIMENT, EXPERIMENT + 1);
    ring.set_filter(&lab::ethernet_type(new)).unwrap();
    sender.send(&lab::frame(MAC_A, MAC_B, old, &[0; 46])).unwrap();
    let wanted = lab::frame(MAC_A, MAC_B, new, &[0; 46]);
    sender.send(&wanted).unwrap();
    assert_eq!(lab::collect(&mut ring, 1), [wanted]);
    let refused = ring.set_filter(&[]).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{refused}");
    // A program without an end is the kernel's to refuse; the old one stays.
    ring.set_filter(&[BpfInsn {
        code: 0x28,
        jt: 0,
        jf: 0,
        k: 12,
    }])
    .unwrap_err();
    sender.send(&lab::frame(MAC_A, MAC_B, old, &[0; 46])).unwrap();
    assert!(lab::stays_silent(&mut ring));
}

#[test]
fn merged_segments_arrive_whole_with_their_vnet_header() {
    if !lab::privileged() {
        return;
    }
    const TOTAL: usize = 4 << 20;
    let lab = Lab::new();
    let listener = lab.a.run(|| TcpListener::bind((ADDR_A, 8080)).unwrap());
    // IPv4, TCP, to port 8080, no options in front of it.
    let filter = [
        BpfInsn {
            code: 0x28,
            jt: 0,
            jf: 0,
            k: 12,
        },
        BpfInsn {
            code: 0x15,
            jt: 0,
            jf: 5,
            k: 0x0800,
        },
        BpfInsn {
            code: 0x30,
            jt: 0,
            jf: 0,
            k: 23,
        },
        BpfInsn {
            code: 0x15,
            jt: 0,
            jf: 3,
            k: 6,
        },
        BpfInsn {
            code: 0x28,
            jt: 0,
            jf: 0,
            k: 36,
        },
        BpfInsn {
            code: 0x15,
            jt: 0,
            jf: 1,
            k: 8080,
        },
        lab::ret(u32::MAX),
        lab::ret(0),
    ];
    let mut ring = lab.ring_a(&filter);
    let data: Vec<u8> = (0..TOTAL).map(|index| (index / 251) as u8).collect();

    let mut captured = vec![None; TOTAL];
    let mut longest = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut stream = lab.b.run(|| TcpStream::connect((ADDR_A, 8080)).unwrap());
            stream.write_all(&data).unwrap();
        });
        let reader = scope.spawn(|| listener.accept().unwrap().0.read_to_end(&mut Vec::new()).unwrap());
        let mut first = None;
        let mut missing = TOTAL;
        while missing > 0 {
            assert_ne!(
                wait_readable(&[ring.as_fd()], Some(LIMIT)).unwrap(),
                0,
                "{missing} bytes never arrived"
            );
            ring.recv(64, |bytes| {
                let (vnet, frame) = bytes.split_at(VNET_HEADER);
                let word = |offset: usize| usize::from(u16::from_be_bytes([frame[offset], frame[offset + 1]]));
                assert_eq!(word(16), frame.len() - 14, "the packet's own length is the frame's");
                let offset = 34 + usize::from(frame[46] >> 4) * 4;
                let sequence = u32::from_be_bytes(frame[38..42].try_into().unwrap());
                // The SYN takes one number.
                let first = *first.get_or_insert(sequence.wrapping_add(1));
                let payload = &frame[offset..];
                if payload.len() > 1460 {
                    assert_eq!(
                        (vnet[0] & 1, vnet[1]),
                        (1, 1),
                        "checksum to be finished, merged TCP in IPv4"
                    );
                    assert!(u16::from_le_bytes([vnet[4], vnet[5]]) > 0, "the segment size is told");
                }
                longest = longest.max(frame.len());
                for (index, byte) in payload.iter().enumerate() {
                    let target = &mut captured[sequence.wrapping_sub(first) as usize + index];
                    missing -= usize::from(target.is_none());
                    *target = Some(*byte);
                }
            })
            .unwrap();
        }
        assert_eq!(reader.join().unwrap(), TOTAL);
    });
    assert!(
        captured.iter().zip(&data).all(|(seen, sent)| *seen == Some(*sent)),
        "the stream as the client sent it"
    );
    assert!(
        longest > 32_768,
        "the longest frame had {longest} bytes: nothing was merged"
    );
    assert_eq!(ring.truncated(), 0);
    assert_eq!(ring.stats().unwrap().1, 0);
}

#[test]
fn an_interface_that_goes_away_is_told_once() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let mut ring = lab.ring_a(&lab::ethernet_type(EXPERIMENT));
    lab.b
        .run(|| lab::block_on(async { Netlink::open().await.unwrap().link_del("b0").await.unwrap() }));
    assert_eq!(wait_readable(&[ring.as_fd()], Some(LIMIT)).unwrap(), 1);
    assert_eq!(ring.recv(64, |_| {}).unwrap_err().kind(), io::ErrorKind::NetworkDown);
    assert!(lab::stays_silent(&mut ring));
    let error = ring.send(&lab::frame(MAC_B, MAC_A, EXPERIMENT, &[0; 46])).unwrap_err();
    assert!(
        matches!(error.raw_os_error(), Some(libc::ENXIO | libc::ENODEV | libc::ENETDOWN)),
        "{error}"
    );
}

#[test]
fn frames_for_another_mac_are_heard_with_a_membership_or_in_promiscuous_mode() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let mut ring = lab.ring_a(&lab::ethernet_type(EXPERIMENT));
    let promiscuity = |expected: &str| {
        let line = lab.a.run(|| lab::link_line("a0"));
        assert!(line.contains(&format!("promiscuity {expected} ")), "{line}");
    };
    promiscuity("0");
    // veth has no list of addresses to hear: one address more makes it hear everything.
    ring.add_unicast_mac([2, 0, 0, 0, 0, 0x99]).unwrap();
    promiscuity("1");
    ring.set_promiscuous(true).unwrap();
    ring.set_promiscuous(true).unwrap();
    promiscuity("2");
    let wanted = lab::frame([2, 0, 0, 0, 0, 0x99], MAC_B, EXPERIMENT, &[3; 46]);
    lab.sender_b().send(&wanted).unwrap();
    assert_eq!(lab::collect(&mut ring, 1), [wanted]);
    ring.set_promiscuous(false).unwrap();
    ring.set_promiscuous(false).unwrap();
    promiscuity("1");
    drop(ring);
    promiscuity("0");
}

#[test]
fn a_ring_on_no_interface_says_which() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let error = lab.a.run(|| PacketRing::open(4242, 32, &[lab::ret(0)]).unwrap_err());
    assert!(error.to_string().contains("4242"), "{error}");
}
