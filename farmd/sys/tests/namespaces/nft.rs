use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use farm_sys::netlink::Netlink;
use farm_sys::netns::NetNs;
use farm_sys::nft;

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
    let mut buffer = [0; 64];

    sender.send(&datagram(VIP)).unwrap();
    socket.set_read_timeout(Some(LIMIT)).unwrap();
    assert_eq!(socket.recv(&mut buffer).unwrap(), 4, "before");

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
