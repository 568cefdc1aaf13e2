use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd;
use std::time::Instant;

use farm_sys::interface;
use farm_sys::neighbour_socket::NeighbourSocket;
use farm_sys::netlink::Netlink;
use farm_sys::nft;
use farm_sys::packet_socket::VNET_HEADER;
use farm_sys::poll::wait_readable;

use crate::lab::{self, EXPERIMENT, LIMIT, Lab, MAC_A, MAC_B, SILENCE};

/// Who has 198.18.0.99?, broadcast by `b`.
fn request() -> Vec<u8> {
    let mut frame = [[0xff; 6], MAC_B].concat();
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(MAC_B);
    frame.extend([198, 18, 0, 2]);
    frame.extend([0; 6]);
    frame.extend([198, 18, 0, 99]);
    frame.resize(60, 0);
    frame
}

fn open(lab: &Lab) -> (NeighbourSocket, NeighbourSocket) {
    let socket = |name: &str| NeighbourSocket::open(interface::index(name).unwrap()).unwrap();
    (lab.a.run(|| socket("a0")), lab.b.run(|| socket("b0")))
}

#[test]
fn arp_is_heard_by_the_other_side_and_not_by_the_sender() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let (mut a, mut b) = open(&lab);
    assert_eq!(a.recv().unwrap(), None, "nothing waits, and nothing blocks");
    b.send(&request()).unwrap();
    assert_eq!(wait_readable(&[a.as_fd()], Some(LIMIT)).unwrap(), 1);
    assert_eq!(a.recv().unwrap().unwrap(), request());
    assert_eq!(b.recv().unwrap(), None);
}

#[test]
fn what_is_neither_arp_nor_neighbour_discovery_does_not_wake_it() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let (a, _) = open(&lab);
    lab.sender_b()
        .send(&lab::frame(MAC_A, MAC_B, EXPERIMENT, &[0; 46]))
        .unwrap();
    // ICMPv6, but an echo request.
    let mut echo = solicitation(&[MAC_A, MAC_B].concat());
    echo[54] = 128;
    lab.sender_b().send(&with_vnet_header(&echo)).unwrap();
    assert_eq!(wait_readable(&[a.as_fd()], Some(SILENCE)).unwrap(), 0);
}

/// Who has 2001:db8::99?, between these Ethernet addresses (receiver, sender); nobody here looks at its checksum.
fn solicitation(ends: &[u8]) -> Vec<u8> {
    let mut frame = ends.to_vec();
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 24, 58, 255]);
    frame.extend("2001:db8::2".parse::<Ipv6Addr>().unwrap().octets());
    frame.extend(GROUP.octets());
    frame.extend([135, 0, 0, 0, 0, 0, 0, 0]);
    frame.extend("2001:db8::99".parse::<Ipv6Addr>().unwrap().octets());
    frame
}

/// Of 2001:db8::99.
const GROUP: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00, 0x99);
const GROUP_MAC: [u8; 6] = [0x33, 0x33, 0xff, 0, 0, 0x99];

fn with_vnet_header(frame: &[u8]) -> Vec<u8> {
    [&[0; VNET_HEADER], frame].concat()
}

#[test]
fn solicitations_to_a_group_are_heard_and_the_interface_takes_its_frames() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let (mut a, mut b) = open(&lab);
    assert!(lab.a.run(|| a.hear_group(GROUP).unwrap()));
    let taken = lab
        .a
        .run(|| std::fs::read_to_string("/proc/thread-self/net/dev_mcast").unwrap());
    assert!(taken.contains("3333ff000099"), "{taken}");
    let question = solicitation(&[GROUP_MAC, MAC_B].concat());
    b.send(&question).unwrap();
    let begin = Instant::now();
    while a.recv().unwrap() != Some(&question) {
        assert!(begin.elapsed() < LIMIT, "the solicitation is not heard");
        wait_readable(&[a.as_fd()], Some(SILENCE)).unwrap();
    }
}

#[test]
fn arp_for_a_vip_is_heard_although_the_firewall_drops_it() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let (mut a, mut b) = open(&lab);
    let vip: IpAddr = "198.18.0.99".parse().unwrap();
    lab.a.run(|| nft::install("farm_a0", "a0", &[vip], true).unwrap());
    b.send(&request()).unwrap();
    assert_eq!(wait_readable(&[a.as_fd()], Some(LIMIT)).unwrap(), 1);
    assert_eq!(a.recv().unwrap().unwrap(), request());
    assert_eq!(lab.a.run(|| nft::dropped("farm_a0").unwrap()), 1);
}

#[test]
fn an_interface_that_goes_away_is_told_once() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let (mut a, _) = open(&lab);
    lab.b
        .run(|| lab::block_on(async { Netlink::open().await.unwrap().link_del("b0").await.unwrap() }));
    assert_eq!(wait_readable(&[a.as_fd()], Some(LIMIT)).unwrap(), 1);
    assert_eq!(a.recv().unwrap_err().kind(), std::io::ErrorKind::NetworkDown);
    assert_eq!(a.recv().unwrap(), None);
    assert_eq!(wait_readable(&[a.as_fd()], Some(SILENCE)).unwrap(), 0);
}

#[test]
fn an_interface_that_is_not_there_is_not_found() {
    let error = NeighbourSocket::open(987_654).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    assert!(error.to_string().contains("987654"), "{error}");
}
