use std::net::IpAddr;
use std::os::fd::AsFd;

use farm_sys::interface;
use farm_sys::netlink::Netlink;
use farm_sys::nft;
use farm_sys::packet_socket::ArpSocket;
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

fn open(lab: &Lab) -> (ArpSocket, ArpSocket) {
    let socket = |name: &str| ArpSocket::open(interface::index(name).unwrap()).unwrap();
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
fn what_is_not_arp_does_not_wake_it() {
    if !lab::privileged() {
        return;
    }
    let lab = Lab::new();
    let (a, _) = open(&lab);
    lab.sender_b()
        .send(&lab::frame(MAC_A, MAC_B, EXPERIMENT, &[0; 46]))
        .unwrap();
    assert_eq!(wait_readable(&[a.as_fd()], Some(SILENCE)).unwrap(), 0);
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
    let error = ArpSocket::open(987_654).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::NotFound);
    assert!(error.to_string().contains("987654"), "{error}");
}
