//! The facilities together, as the raw data plane uses them: ring, TAP, ingress drop.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;

use farm_sys::event_fd::EventFd;
use farm_sys::netlink::Netlink;
use farm_sys::nft;
use farm_sys::poll::wait_readable;
use farm_sys::sysctl;
use farm_sys::tap::Tap;

use crate::lab::{self, ADDR_A, LIMIT, Lab, MAC_A};

const VIP: Ipv4Addr = Ipv4Addr::new(198, 18, 1, 99);

#[test]
fn a_bulk_upload_to_a_vip_passes_ring_and_tap_while_ingress_drops_it() {
    if !lab::privileged() {
        return;
    }
    const TOTAL: usize = 16 << 20;
    let lab = Lab::new();
    let mut ring = lab.ring_a(&lab::ethernet_type(0x0800));
    let (tap, listener) = lab.a.run(|| {
        let tap = Tap::create("farm0").unwrap();
        for (name, key, value) in [
            ("all", "rp_filter", "0"),
            ("farm0", "rp_filter", "0"),
            ("farm0", "accept_local", "0"),
        ] {
            sysctl::write(&sysctl::interface("ipv4", name, key), value).unwrap();
        }
        lab::block_on(async {
            let netlink = Netlink::open().await.unwrap();
            let index = tap.ifindex();
            // Frames reach the ring with the host's own MAC; the TAP has it too, so that the stack takes them for its own.
            netlink.set_mac(index, MAC_A).await.unwrap();
            netlink.set_arp(index, false).await.unwrap();
            netlink.set_multicast(index, false).await.unwrap();
            netlink.addr_add(index, IpAddr::V4(VIP), 32).await.unwrap();
            netlink.link_up(index).await.unwrap();
        });
        nft::install("farm_a0", "a0", &[VIP.into()], true).unwrap();
        (tap, TcpListener::bind((VIP, 8080)).unwrap())
    });
    lab.b.run(|| {
        lab::block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().unwrap();
            tokio::spawn(connection);
            let route = rtnetlink::RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(VIP, 32)
                .gateway(ADDR_A);
            handle.route().add(route.build()).execute().await.unwrap();
        });
    });

    let data: Vec<u8> = (0..TOTAL).map(|index| (index / 253) as u8).collect();
    let stop = EventFd::new().unwrap();
    let received = std::thread::scope(|scope| {
        scope.spawn(|| {
            // The data plane in small.
            while wait_readable(&[stop.as_fd(), ring.as_fd()], Some(LIMIT)).unwrap() & 1 == 0 {
                ring.recv(64, |frame| {
                    if frame[40..44] == VIP.octets() {
                        tap.write(frame).unwrap();
                    }
                })
                .unwrap();
            }
        });
        scope.spawn(|| {
            let mut stream = lab
                .b
                .run(|| TcpStream::connect_timeout(&(VIP, 8080).into(), LIMIT).unwrap());
            stream.write_all(&data).unwrap();
        });
        let mut received = Vec::new();
        let mut stream = listener.accept().unwrap().0;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.read_to_end(&mut received).unwrap();
        stop.notify();
        received
    });
    assert!(
        received == data,
        "{} of {TOTAL} bytes, or others than sent",
        received.len()
    );
    assert_eq!(ring.truncated(), 0);
    assert!(
        lab.a.run(|| nft::dropped("farm_a0").unwrap()) > 0,
        "the stack never took a frame for the VIP off the wire"
    );
}
