//! Two namespaces joined by a cable, and frames to send over it.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use farm_sys::interface;
use farm_sys::netlink::Netlink;
use farm_sys::netns::NetNs;
use farm_sys::packet_socket::{BpfInsn, PacketRing, VNET_HEADER};
use farm_sys::poll::wait_readable;
use farm_sys::process::effective_uid;
use rtnetlink::{LinkUnspec, LinkVeth};

/// How long anything in these tests may take before it counts as not happening.
pub const LIMIT: Duration = Duration::from_secs(10);

/// How long a frame that must not arrive is waited for.
pub const SILENCE: Duration = Duration::from_millis(100);

/// An Ethernet type for experiments (IEEE 802): nobody else's frames carry it.
pub const EXPERIMENT: u16 = 0x88b5;

/// Host `a` (with `a0`, 198.18.0.1) and host `b` (with `b0`, 198.18.0.2) on one cable.
pub struct Lab {
    pub a: NetNs,
    pub b: NetNs,
}

pub const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 2];
pub const ADDR_A: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);
pub const ADDR_B: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 2);

/// Whether the test may go on. Without root it cannot; in CI that is a failure.
pub fn privileged() -> bool {
    let root = effective_uid() == 0;
    assert!(
        root || std::env::var_os("CI").is_none(),
        "this test needs root to make network namespaces"
    );
    if !root {
        eprintln!("skipped: needs root to make network namespaces");
    }
    root
}

/// Runs a future in a runtime of its own, in the namespace of the calling thread.
pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

impl Lab {
    pub fn new() -> Self {
        let (a, b) = (NetNs::create().unwrap(), NetNs::create().unwrap());
        let target = b.as_fd().as_raw_fd();
        a.run(|| {
            block_on(async {
                let (connection, handle, _) = rtnetlink::new_connection().unwrap();
                let task = tokio::spawn(connection);
                handle
                    .link()
                    .add(LinkVeth::new("a0", "b0").build())
                    .execute()
                    .await
                    .unwrap();
                let message = LinkUnspec::new_with_name("b0").setns_by_fd(target).build();
                handle.link().set(message).execute().await.unwrap();
                task.abort();
            });
            configure("a0", MAC_A, ADDR_A);
        });
        b.run(|| configure("b0", MAC_B, ADDR_B));
        a.run(|| wait_for_carrier("a0"));
        b.run(|| wait_for_carrier("b0"));
        Self { a, b }
    }

    /// A ring on `a0` with this filter.
    pub fn ring_a(&self, filter: &[BpfInsn]) -> PacketRing {
        self.a
            .run(|| PacketRing::open(interface::index("a0").unwrap(), 256, filter).unwrap())
    }

    /// A ring on `b0` that hears nothing and serves to send.
    pub fn sender_b(&self) -> PacketRing {
        self.b
            .run(|| PacketRing::open(interface::index("b0").unwrap(), 1, &[ret(0)]).unwrap())
    }
}

fn configure(name: &str, mac: [u8; 6], addr: Ipv4Addr) {
    // Autoconfiguration would put frames of its own on the cable.
    farm_sys::sysctl::write(&farm_sys::sysctl::interface("ipv6", name, "disable_ipv6"), "1").unwrap();
    block_on(async {
        let netlink = Netlink::open().await.unwrap();
        let index = netlink.link_index(name).await.unwrap();
        netlink.set_mac(index, mac).await.unwrap();
        netlink.addr_add(index, IpAddr::V4(addr), 24).await.unwrap();
        netlink.link_up(index).await.unwrap();
    });
}

/// The kernel tells a moment later that both ends of a cable are up.
fn wait_for_carrier(name: &str) {
    let begin = Instant::now();
    while !interface::link(name).unwrap().up {
        assert!(begin.elapsed() < LIMIT, "{name} has no carrier");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What iproute2 tells about a link in the calling thread's namespace, as a second opinion.
pub fn link_line(name: &str) -> String {
    let mut command = std::process::Command::new("ip");
    NetNs::current()
        .unwrap()
        .command(command.args(["-o", "-d", "link", "show", name]));
    String::from_utf8(command.output().unwrap().stdout).unwrap()
}

pub const fn ret(k: u32) -> BpfInsn {
    BpfInsn {
        code: 0x06,
        jt: 0,
        jf: 0,
        k,
    }
}

/// Accepts frames of one Ethernet type.
pub fn ethernet_type(value: u16) -> Vec<BpfInsn> {
    vec![
        BpfInsn {
            code: 0x28,
            jt: 0,
            jf: 0,
            k: 12,
        },
        BpfInsn {
            code: 0x15,
            jt: 0,
            jf: 1,
            k: u32::from(value),
        },
        ret(u32::MAX),
        ret(0),
    ]
}

/// An Ethernet frame with an empty vnet header in front.
pub fn frame(to: [u8; 6], from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; VNET_HEADER];
    bytes.extend(to);
    bytes.extend(from);
    bytes.extend(kind.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Frames (with their vnet headers) that arrive until there are `count`, or until nothing came for a while.
pub fn collect(ring: &mut PacketRing, count: usize) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let begin = Instant::now();
    while frames.len() < count && begin.elapsed() < LIMIT {
        if wait_readable(&[ring.as_fd()], Some(LIMIT)).unwrap() != 0 {
            ring.recv(64, |frame| frames.push(frame.to_vec())).unwrap();
        }
    }
    frames
}

/// Whether the ring stays empty.
pub fn stays_silent(ring: &mut PacketRing) -> bool {
    let ready = wait_readable(&[ring.as_fd()], Some(SILENCE)).unwrap();
    ready == 0 && ring.recv(64, |_| {}).unwrap() == 0
}

/// A UDP datagram in IPv4 with the right header checksum and, as told, with or without its UDP checksum finished.
///
/// The unfinished one is what veth and virtio hand over: only the pseudo header is in.
pub fn udp_packet(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), data: &[u8], finished: bool) -> Vec<u8> {
    let length = (8 + data.len()) as u16;
    let mut udp = Vec::new();
    for word in [from.1, to.1, length, 0] {
        udp.extend(word.to_be_bytes());
    }
    udp.extend(data);
    let mut pseudo = [from.0.octets(), to.0.octets()].concat();
    pseudo.extend([0, 17]);
    pseudo.extend(length.to_be_bytes());
    let checksum = if finished {
        !sum(&[&pseudo, &udp])
    } else {
        sum(&[&pseudo])
    };
    udp[6..8].copy_from_slice(&checksum.to_be_bytes());

    let mut ip = vec![0x45, 0];
    ip.extend((20 + length).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(from.0.octets());
    ip.extend(to.0.octets());
    let checksum = !sum(&[&ip]);
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    ip.extend(udp);
    ip
}

/// The Internet sum (RFC 1071) of even-length parts, the last of which may be odd.
fn sum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut total: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)))
        .sum();
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    total as u16
}
