use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use farm_sys::netlink::Netlink;
use farm_sys::netns::NetNs;
use farm_sys::nft;
use farm_sys::packet_socket::{PacketRing, VNET_HEADER};
use farm_sys::tap::Tap;

use crate::lab::{self, ADDR_A, ADDR_B, LIMIT, Lab, MAC_A, MAC_B, SILENCE};

const VIP: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 99);
const VIP6: &str = "fd00:198:18::99";

#[test]
fn the_stack_no_longer_sees_the_vip_while_the_ring_does() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let mut ring = lab.ring_a(&lab::ethernet_type(0x0800));
    let socket = lab.a.run(|| {
        lab::block_on(async {
            let netlink = Netlink::open().await.unwrap();
            let index = netlink.link_index("a0").await.unwrap();
            netlink.addr_add(index, VIP.into(), 32).await.unwrap();
        });
        UdpSocket::bind(("0.0.0.0", 5000)).unwrap()
    });
    let sender = lab.sender_b();
    let datagram = |to: Ipv4Addr| {
        lab::frame(
            MAC_A,
            MAC_B,
            0x0800,
            &lab::udp_packet((ADDR_B, 4000), (to, 5000), &to.octets(), true),
        )
    };
    // The kernel takes one tag off ahead of the chain and the others behind it, as long as they name a priority only.
    let behind = |tags: &[[u8; 4]]| {
        let frame = datagram(VIP);
        [
            &frame[..VNET_HEADER + 12],
            tags.as_flattened(),
            &frame[VNET_HEADER + 12..],
        ]
        .concat()
    };
    let (priority, service) = ([0x81, 0, 0xe0, 0], [0x88, 0xa8, 0, 0]);
    let tagged: Vec<Vec<[u8; 4]>> = vec![
        vec![priority; 2],
        vec![priority, service],
        vec![priority, service, priority],
        vec![service; 4],
        vec![priority; 6],
    ];
    let mut buffer = [0; 64];

    sender.send(&datagram(VIP)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(socket.recv(&mut buffer).unwrap(), 4, "before");
    for tags in &tagged {
        sender.send(&behind(tags)).unwrap();
        assert_eq!(socket.recv(&mut buffer).unwrap(), 4, "before, behind {tags:x?}");
    }

    lab.a
        .run(|| nft::install("farm_a0", "a0", &[VIP.into()], false).unwrap());
    sender.send(&datagram(VIP)).unwrap();
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    assert_eq!(
        socket.recv(&mut buffer).unwrap_err().kind(),
        io::ErrorKind::WouldBlock,
        "the VIP"
    );
    sender.send(&datagram(ADDR_A)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(socket.recv(&mut buffer).unwrap(), 4, "the host's own address");
    assert_eq!(buffer[..4], ADDR_A.octets());
    assert_eq!(lab.a.run(|| nft::dropped("farm_a0").unwrap()), 1);
    for tags in &tagged {
        sender.send(&behind(tags)).unwrap();
    }
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    assert_eq!(
        socket.recv(&mut buffer).unwrap_err().kind(),
        io::ErrorKind::WouldBlock,
        "the VIP, behind tags"
    );
    let dropped = 1 + tagged.len() as u64;
    assert_eq!(lab.a.run(|| nft::dropped("farm_a0").unwrap()), dropped);
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(
        lab::collect(&mut ring, 3),
        [datagram(VIP), datagram(VIP), datagram(ADDR_A)]
    );

    assert!(lab.a.run(|| nft::remove("farm_a0").unwrap()));
    sender.send(&datagram(VIP)).unwrap();
    assert_eq!(socket.recv(&mut buffer).unwrap(), 4, "after");
}

#[test]
fn tables_are_replaced_listed_and_removed() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    lab.a.run(|| {
        let vips: Vec<IpAddr> = vec![VIP.into(), VIP6.parse().unwrap()];
        assert!(!nft::remove("farm_a0").unwrap(), "not there");
        assert_eq!(nft::tables("farm_").unwrap(), Vec::<String>::new());
        assert_eq!(nft::dropped("farm_a0").unwrap(), 0);
        nft::install("farm_lo", "lo", &vips, true).unwrap();
        nft::install("farm_a0", "a0", &vips, true).unwrap();
        nft::install("farm_a0", "a0", &[], false).unwrap();
        nft::install("other", "a0", &vips, false).unwrap();
        assert_eq!(nft::tables("farm_").unwrap(), ["farm_a0", "farm_lo"]);
        assert!(nft::remove("farm_a0").unwrap());
        assert_eq!(nft::tables("").unwrap(), ["farm_lo", "other"]);
    });
}

#[test]
fn a_refused_change_leaves_the_old_rules_standing() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    lab.a.run(|| {
        nft::install("farm_a0", "a0", &[VIP.into()], false).unwrap();
        let error = nft::install("farm_a0", "no-such-iface", &[VIP.into()], false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
        assert_eq!(nft::tables("farm_").unwrap(), ["farm_a0"]);
        assert_eq!(
            nft::install("", "a0", &[], false).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        // Many VIPs make one large transaction.
        let many: Vec<IpAddr> = (0..=255).map(|last| Ipv4Addr::new(198, 19, 0, last).into()).collect();
        nft::install("farm_a0", "a0", &many, true).unwrap();
    });
}

#[test]
fn ipv6_packets_and_solicitations_for_a_vip_are_dropped() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let vip: std::net::Ipv6Addr = VIP6.parse().unwrap();
    let other: std::net::Ipv6Addr = "fd00:198:18::98".parse().unwrap();
    let packet = |to: std::net::Ipv6Addr, payload: &[u8]| {
        let mut bytes = vec![0x60, 0, 0, 0, 0, payload.len() as u8, 58, 255];
        bytes.extend([0xfd; 16]);
        bytes.extend(to.octets());
        bytes.extend(payload);
        lab::frame(MAC_A, MAC_B, 0x86dd, &bytes)
    };
    let solicitation = |target: std::net::Ipv6Addr| {
        let group: std::net::Ipv6Addr = "ff02::1:ff00:99".parse().unwrap();
        packet(group, &[&[135, 0, 0, 0, 0, 0, 0, 0], &target.octets()[..]].concat())
    };
    let sender = lab.sender_b();
    let count = |frame: &[u8]| {
        let before = lab.a.run(|| nft::dropped("farm_a0").unwrap());
        sender.send(frame).unwrap();
        lab.a.run(|| nft::dropped("farm_a0").unwrap()) - before
    };
    lab.a
        .run(|| nft::install("farm_a0", "a0", &[vip.into()], true).unwrap());
    assert_eq!(count(&packet(vip, &[128, 0, 0, 0, 0, 0, 0, 0])), 1);
    assert_eq!(count(&packet(other, &[128, 0, 0, 0, 0, 0, 0, 0])), 0);
    assert_eq!(count(&solicitation(vip)), 1);
    assert_eq!(count(&solicitation(other)), 0);
    lab.a
        .run(|| nft::install("farm_a0", "a0", &[vip.into()], false).unwrap());
    assert_eq!(count(&solicitation(vip)), 0);
}

#[test]
fn without_privilege_it_says_so() {
    if !lab::privileged() {
        return;
    }
    let ns = NetNs::create().unwrap();
    ns.run(|| {
        // SAFETY: setresuid takes three integers, and as a bare system call changes this thread alone.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) }, 0);
        let error = nft::install("farm_lo", "lo", &[VIP.into()], false).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains("farm_lo"), "{error}");
    });
}

/// A segment without data from `b` to a port of `a` on which nobody listens.
fn segment(flags: u8) -> Vec<u8> {
    let mut tcp = [4000u16.to_be_bytes(), 5000u16.to_be_bytes()].concat();
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    // Of the IPv4 header only the protocol differs, and with it the sum.
    let mut ip = lab::udp_packet((ADDR_B, 4000), (ADDR_A, 5000), &[0; 12], true);
    ip.truncate(20);
    let sum = u16::from_be_bytes([ip[10], ip[11]]);
    ip[9] = 6;
    ip[10..12].copy_from_slice(&(sum + 11).to_be_bytes());
    let mut bytes = lab::frame(MAC_A, MAC_B, 0x0800, &[ip, tcp].concat());
    // VIRTIO_NET_HDR_F_NEEDS_CSUM: from the TCP header on, into its place there.
    bytes[..10].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 16, 0]);
    bytes
}

#[test]
fn resets_for_unknown_connections_are_diverted_and_others_are_not() {
    const RST: u8 = 0x04;
    const ACK: u8 = 0x10;
    const SYN: u8 = 0x02;
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let sender = lab.sender_b();
    let ring_a = lab.ring_a(&[lab::ret(0)]);
    let filter = lab::ethernet_type(0x0800);
    let mut heard = lab
        .b
        .run(|| PacketRing::open(farm_sys::interface::index("b0").unwrap(), 32, &filter).unwrap());
    let flags = |frame: &[u8]| frame[VNET_HEADER + 14 + 20 + 13];
    let tap = lab.a.run(|| {
        let tap = Tap::create("farm0").unwrap();
        lab::block_on(async { Netlink::open().await.unwrap().link_up(tap.ifindex()).await.unwrap() });
        tap
    });
    let vips = [ADDR_A.into(), VIP6.parse().unwrap()];
    let divert = |vips: &[IpAddr]| lab.a.run(|| nft::divert_resets("farm_a0", "a0", vips, tap.ifindex()));
    let diverts = || lab.a.run(|| nft::diverts_resets("farm_a0", "a0", &vips).unwrap());

    sender.send(&segment(ACK)).unwrap();
    assert_eq!(flags(&lab::collect(&mut heard, 1)[0]), RST, "before");
    assert_eq!(divert(&vips).unwrap_err().kind(), io::ErrorKind::NotFound, "no table");

    lab.a.run(|| nft::install("farm_a0", "a0", &[], false).unwrap());
    assert!(!diverts());
    divert(&vips).unwrap();
    // Again, and a change of the other chain, leave it as it is.
    divert(&vips).unwrap();
    lab.a
        .run(|| nft::install("farm_a0", "a0", &[VIP.into()], false).unwrap());
    assert!(diverts());
    assert!(
        lab.a
            .run(|| nft::is_installed("farm_a0", "a0", &[VIP.into()], false).unwrap())
    );
    sender.send(&segment(ACK)).unwrap();
    assert!(lab::stays_silent(&mut heard), "it is diverted");
    let mut diverted = Vec::new();
    tap.recv(8, &mut [0; 2048], |frame| diverted.push(frame.to_vec()))
        .unwrap();
    let resets: Vec<&Vec<u8>> = diverted.iter().filter(|frame| frame[VNET_HEADER + 12] == 8).collect();
    assert_eq!(resets.len(), 1, "{diverted:?}");
    assert_eq!(flags(resets[0]), RST);
    // A packet socket sends it on.
    ring_a.send(resets[0]).unwrap();
    assert_eq!(flags(&lab::collect(&mut heard, 1)[0]), RST);
    // To a closed port: it has ACK.
    sender.send(&segment(SYN)).unwrap();
    assert_eq!(flags(&lab::collect(&mut heard, 1)[0]), RST | ACK);

    assert_eq!(lab.a.run(|| nft::dropped_resets("farm_a0").unwrap()), 0);
    // A flood does not fill the device: what is too much is dropped, and counted.
    let flood = 4000;
    for _ in 0..flood {
        while sender.send(&segment(ACK)).is_err() {}
    }
    let dropped = lab.a.run(|| nft::dropped_resets("farm_a0").unwrap());
    assert!((1..flood).contains(&dropped), "{dropped}");

    let go = || lab.a.run(|| nft::leave_resets("farm_a0").unwrap());
    assert!(go());
    assert!(!diverts());
    assert!(!go(), "there is nothing to undo");
    sender.send(&segment(ACK)).unwrap();
    assert_eq!(flags(&lab::collect(&mut heard, 1)[0]), RST, "after");
}
