use std::io;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};

use farm_sys::netlink::Netlink;
use farm_sys::netns::NetNs;
use farm_sys::packet_socket::VNET_HEADER;
use farm_sys::sysctl;
use farm_sys::tap::Tap;
use farm_sys::{caps, interface};

use crate::lab::{self, MAC_B, SILENCE};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const VIP: Ipv4Addr = Ipv4Addr::new(198, 18, 7, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 7, 2);

/// A TAP device with the VIP, up, and a socket on the VIP.
fn tap_and_socket(ns: &NetNs) -> (Tap, UdpSocket) {
    ns.run(|| {
        let tap = Tap::create("farm0").unwrap();
        sysctl::write(&sysctl::interface("ipv6", "farm0", "disable_ipv6"), "1").unwrap();
        lab::block_on(async {
            let netlink = Netlink::open().await.unwrap();
            netlink.set_mac(tap.ifindex(), MAC).await.unwrap();
            netlink.addr_add(tap.ifindex(), IpAddr::V4(VIP), 24).await.unwrap();
            netlink.link_up(tap.ifindex()).await.unwrap();
        });
        let socket = UdpSocket::bind((VIP, 5000)).unwrap();
        socket.set_read_timeout(Some(lab::LIMIT)).unwrap();
        (tap, socket)
    })
}

#[test]
fn a_frame_written_to_it_reaches_a_socket_of_the_host() {
    if !lab::privileged() {
        return;
    }
    let ns = NetNs::create().unwrap();
    let (tap, socket) = tap_and_socket(&ns);
    assert_eq!(tap.name(), "farm0");
    let packet = lab::udp_packet((CLIENT, 4000), (VIP, 5000), b"hello", true);
    tap.write(&lab::frame(MAC, MAC_B, 0x0800, &packet)).unwrap();
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from), (&b"hello"[..], (CLIENT, 4000).into()));
}

#[test]
fn an_unfinished_checksum_is_taken_with_its_vnet_header_and_only_with_it() {
    if !lab::privileged() {
        return;
    }
    let ns = NetNs::create().unwrap();
    let (tap, socket) = tap_and_socket(&ns);
    let packet = lab::udp_packet((CLIENT, 4000), (VIP, 5000), b"partial", false);
    let mut frame = lab::frame(MAC, MAC_B, 0x0800, &packet);
    tap.write(&frame).unwrap();
    socket.set_read_timeout(Some(SILENCE)).unwrap();
    let mut buffer = [0; 64];
    assert_eq!(
        socket.recv(&mut buffer).unwrap_err().kind(),
        io::ErrorKind::WouldBlock,
        "a wrong checksum"
    );
    // VIRTIO_NET_HDR_F_NEEDS_CSUM from the UDP header on, at its offset 6.
    frame[..VNET_HEADER].copy_from_slice(&[1, 0, 0, 0, 0, 0, 34, 0, 6, 0]);
    tap.write(&frame).unwrap();
    socket.set_read_timeout(Some(lab::LIMIT)).unwrap();
    assert_eq!(socket.recv(&mut buffer).unwrap(), 7);
}

#[test]
fn what_the_host_sends_on_it_is_thrown_away() {
    if !lab::privileged() {
        return;
    }
    let ns = NetNs::create().unwrap();
    let (tap, socket) = tap_and_socket(&ns);
    assert_eq!(tap.drain().unwrap(), 0);
    // No neighbour answers there, so the host asks for it first.
    socket.send_to(b"x", (CLIENT, 4000)).unwrap();
    assert_eq!(tap.drain().unwrap(), 1);
    assert_eq!(tap.drain().unwrap(), 0);
}

#[test]
fn it_vanishes_with_its_handle_and_a_name_is_taken_once() {
    if !lab::privileged() {
        return;
    }
    NetNs::create().unwrap().run(|| {
        let tap = Tap::create("farm0").unwrap();
        let error = Tap::create("farm0").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{error}");
        assert!(error.to_string().contains("farm0"), "{error}");
        drop(tap);
        drop(Tap::create("farm0").unwrap());
        assert_eq!(
            Tap::create("a-name-far-too-long").unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
        let error = farm_sys::interface::index("farm0").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    });
}

#[test]
fn without_privilege_it_is_denied_and_the_missing_capabilities_are_named() {
    if !lab::privileged() {
        return;
    }
    // The system call itself, unlike the C library's function, changes the calling thread alone.
    std::thread::spawn(|| {
        assert!(caps::missing().is_empty());
        // SAFETY: setresuid takes three integers.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) }, 0);
        assert_eq!(caps::missing(), ["CAP_NET_ADMIN", "CAP_NET_RAW"]);
        let error = Tap::create("farm0").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}");
    })
    .join()
    .unwrap();
}

#[test]
fn where_the_device_file_is_absent_it_is_not_found() {
    if !lab::privileged() {
        return;
    }
    std::thread::spawn(|| {
        // SAFETY: unshare takes an integer; the mounts below are seen by this thread alone.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0);
        let mount = |target: &std::ffi::CStr, kind: &std::ffi::CStr, flags| {
            // SAFETY: all pointers lead to terminated texts or are null where that is allowed.
            unsafe {
                libc::mount(
                    c"none".as_ptr(),
                    target.as_ptr(),
                    kind.as_ptr(),
                    flags,
                    std::ptr::null(),
                )
            }
        };
        assert_eq!(mount(c"/", c"", libc::MS_REC | libc::MS_PRIVATE), 0);
        assert_eq!(mount(c"/dev/net", c"tmpfs", 0), 0);
        let error = Tap::create("farm0").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}");
        assert!(error.to_string().contains("/dev/net/tun"), "{error}");
    })
    .join()
    .unwrap();
}

#[test]
fn what_waits_to_be_read_is_as_much_as_was_set_and_the_rest_is_counted() {
    if !lab::privileged() {
        return;
    }
    let ns = NetNs::create().unwrap();
    let (tap, socket) = tap_and_socket(&ns);
    ns.run(|| {
        lab::block_on(async {
            let netlink = Netlink::open().await.unwrap();
            // So that nothing is asked for before a datagram leaves.
            netlink.set_arp(tap.ifindex(), false).await.unwrap();
            netlink.set_queue_length(tap.ifindex(), 700).await.unwrap();
        });
        tap.drain().unwrap();
        let before = interface::dropped_on_send("farm0").unwrap();
        for _ in 0..600 {
            socket.send_to(b"waits", (CLIENT, 4000)).unwrap();
        }
        assert_eq!(interface::dropped_on_send("farm0").unwrap(), before);
        for _ in 0..200 {
            socket.send_to(b"waits", (CLIENT, 4000)).unwrap();
        }
        assert_eq!(interface::dropped_on_send("farm0").unwrap(), before + 100);
        assert_eq!(tap.drain().unwrap(), 700);
        let absent = interface::dropped_on_send("farm9").unwrap_err();
        assert_eq!(absent.kind(), io::ErrorKind::NotFound);
    });
}
