//! Frames that lie about themselves, and frames with more tags than are usual: nothing that is wrong is answered, and nothing breaks.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use etherparse::PacketBuilder;

use farm_core::id::MacAddr;
use farm_core::wire::packet::{L4, Packet};
use farm_lab::client::Batch;
use farm_lab::config::Vip;
use farm_lab::random::Random;
use farm_lab::{Group, Lab, LabConfig, MODULE, Mode, VIP, VIP6};
use farm_sys::interface;
use farm_sys::packet_socket::{BpfInsn, PacketRing, VNET_HEADER};

use crate::common::counter;

/// Where frames are judged: always in user space, or where the machine lets farmd, or already at XDP.
const PLANES: [&str; 3] = ["raw", "auto", "xdp"];
const ETHERNET: usize = 14;
/// A socket filter that lets everything through.
const ALL: [BpfInsn; 1] = [BpfInsn {
    code: 0x06,
    jt: 0,
    jf: 0,
    k: 0x4_0000,
}];
/// Client ports of this test begin here, below those that the kernel chooses.
const FIRST_PORT: u16 = 20_000;
const LAST_PORT: u16 = FIRST_PORT + 9;

fn farm(mode: Mode, plane: &'static str) -> Lab {
    let web = Group {
        rules: vec![("tcp", "80".to_owned(), "on_addr"), ("udp", "80".to_owned(), "on_addr")],
        ..Group::tcp("web", 0, "on_addr")
    };
    Lab::serve(LabConfig {
        client_addrs: 40,
        vips: vec![Vip::new(VIP, mode), Vip::new(VIP6, mode)],
        groups: vec![web],
        plane,
        ..LabConfig::default()
    })
    .expect("the farm comes up")
}

/// The client's card, past its stack.
struct Card {
    ring: PacketRing,
    mac: MacAddr,
}

impl Card {
    fn open(lab: &Lab) -> Self {
        let space = lab.client.space();
        let ring = space.run(|| PacketRing::open(interface::index("eth0")?, 4096, &ALL));
        let mac = space.mac("eth0").expect("the client has a card");
        Self {
            ring: ring.expect("the client may open a packet socket"),
            mac: mac.parse().expect("an Ethernet address"),
        }
    }

    fn send(&self, frame: &[u8]) {
        let sent = self.ring.send(&[&[0; VNET_HEADER][..], frame].concat());
        sent.expect("the frame goes out");
    }

    /// Tells `of_segment` of each TCP segment from `vip` that has come in to a port of this test.
    fn hear(&mut self, vip: IpAddr, mut of_segment: impl FnMut(MacAddr, IpAddr, u16)) {
        let read = self.ring.recv(4096, |bytes| {
            let Some(packet) = Packet::parse(&bytes[VNET_HEADER..]) else {
                return;
            };
            if let L4::Tcp { destination, .. } = packet.l4
                && packet.source == vip
                && (FIRST_PORT..=LAST_PORT).contains(&destination)
            {
                of_segment(packet.source_mac, packet.destination, destination);
            }
        });
        read.expect("the card is up");
    }
}

/// A connection request; the client's port is its own.
fn request(from: MacAddr, to: MacAddr, client: IpAddr, vip: IpAddr, port: u16) -> Vec<u8> {
    let link = PacketBuilder::ethernet2(from.0, to.0);
    let ip = match (client, vip) {
        (IpAddr::V4(client), IpAddr::V4(vip)) => link.ipv4(client.octets(), vip.octets(), 64),
        (IpAddr::V6(client), IpAddr::V6(vip)) => link.ipv6(client.octets(), vip.octets(), 64),
        _ => unreachable!("addresses of one family"),
    };
    let mut frame = Vec::new();
    let written = ip.tcp(port, 80, 1000, 2000).syn().write(&mut frame, &[]);
    written.expect("into memory");
    frame
}

/// Where the client's frames for `vip` go: the entry node, or the virtual MAC.
fn service_mac(lab: &Lab, vip: IpAddr) -> MacAddr {
    let mut shown = lab.client.space().command("ip");
    let shown = shown.args(["neigh", "show", &vip.to_string()]).output();
    let shown = String::from_utf8_lossy(&shown.expect("ip runs").stdout).into_owned();
    let mut words = shown.split_whitespace().skip_while(|word| *word != "lladdr");
    let mac = words.nth(1).and_then(|word| word.parse().ok());
    mac.unwrap_or_else(|| panic!("no address of {vip}: {shown}"))
}

/// The checksum of an IPv4 header is right again, so that it is the lie that is judged.
fn mend_checksum(frame: &mut [u8]) {
    let length = (usize::from(frame[ETHERNET] & 0xf) * 4).min(frame.len() - ETHERNET);
    frame[ETHERNET + 10..ETHERNET + 12].fill(0);
    let words = frame[ETHERNET..ETHERNET + length].chunks(2);
    let mut sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | word.get(1).map_or(0, |low| u32::from(*low)))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[ETHERNET + 10..ETHERNET + 12].copy_from_slice(&(!sum as u16).to_be_bytes());
}

/// What is wrong with a request, and the request.
fn lies(request: &dyn Fn() -> Vec<u8>, is_v6: bool) -> Vec<(String, Vec<u8>)> {
    let transport = ETHERNET + if is_v6 { 40 } else { 20 };
    let mut lies = Vec::new();
    for length in ETHERNET..request().len() {
        let mut frame = request();
        frame.truncate(length);
        lies.push((format!("cut at {length}"), frame));
    }
    let mut change = |what: String, at: usize, bytes: &[u8]| {
        let mut frame = request();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        if !is_v6 {
            mend_checksum(&mut frame);
        }
        lies.push((what, frame));
    };
    for offset in (0..=4).chain([6, 15]) {
        change(format!("data offset {offset}"), transport + 12, &[offset << 4]);
    }
    if is_v6 {
        for length in [0_u16, 1, 19, 21, 1000, u16::MAX] {
            change(format!("payload length {length}"), ETHERNET + 4, &length.to_be_bytes());
        }
        for next in [0, 43, 44, 51, 60] {
            // What follows is read as an extension header, which is longer than the packet or leads nowhere.
            change(format!("next header {next}"), ETHERNET + 6, &[next]);
        }
    } else {
        for words in (0..=4).chain([15]) {
            change(format!("header of {words} words"), ETHERNET, &[0x40 | words]);
        }
        for length in [1_u16, 19, 20, 39, 41, 1000, u16::MAX] {
            change(format!("total length {length}"), ETHERNET + 2, &length.to_be_bytes());
        }
        // The rest of the header never comes (RFC 1858 has a later fragment write over the flags).
        change("more fragments".to_owned(), ETHERNET + 6, &[0x20, 0]);
        change("fragment offset 8".to_owned(), ETHERNET + 6, &[0, 1]);
        change("last fragment".to_owned(), ETHERNET + 6, &[0x1f, 0xff]);
    }
    for version in [0, 5, if is_v6 { 4 } else { 6 }, 15] {
        change(format!("version {version}"), ETHERNET, &[version << 4 | 5]);
    }
    lies
}

/// What the farm has to have kept through anything.
fn works(lab: &Lab, pids: &[Option<u32>], context: &str) {
    for vip in [IpAddr::from(VIP), IpAddr::from(VIP6)] {
        let report = lab
            .client
            .batch(Batch::new(SocketAddr::new(vip, 80), 60))
            .expect("a batch");
        assert_eq!(report.lost(), 0, "{context}, {vip}: {:?}", report.failures());
        assert_eq!(report.per_node().len(), lab.nodes.len(), "{context}, {vip}");
    }
    for (node, pid) in lab.nodes.iter().zip(pids) {
        assert_eq!(node.farmd_pid(), *pid, "{context}: {} goes on", node.name());
        let log = node.log_text();
        let complaint = log
            .lines()
            .find(|line| line.contains("ERROR") || line.contains("panic"));
        assert_eq!(complaint, None, "{context}: {}", node.name());
    }
}

/// Every lie about a connection request, and some thousand frames with random damage.
#[test]
fn what_is_wrong_is_not_answered_and_breaks_nothing() {
    for plane in PLANES {
        let lab = farm(Mode::Directed, plane);
        let pids: Vec<_> = lab.nodes.iter().map(farm_lab::Node::farmd_pid).collect();
        works(&lab, &pids, plane);
        let mut card = Card::open(&lab);
        let from = card.mac;
        let malformed = || -> u64 { lab.nodes.iter().map(|node| counter(node, "frames_malformed")).sum() };
        for vip in [IpAddr::from(VIP), IpAddr::from(VIP6)] {
            let before = malformed();
            let to = service_mac(&lab, vip);
            let client = lab.client.sources(SocketAddr::new(vip, 80))[0];
            let right = || request(from, to, client, vip, FIRST_PORT);
            let lies = lies(&right, vip.is_ipv6());
            for (_, frame) in &lies {
                card.send(frame);
            }
            // What is right is answered, after all that came before it.
            card.send(&request(from, to, client, vip, FIRST_PORT + 1));
            let mut answered = BTreeSet::new();
            let begun = Instant::now();
            while !answered.contains(&(FIRST_PORT + 1)) && begun.elapsed() < Duration::from_secs(5) {
                card.hear(vip, |_, _, port| _ = answered.insert(port));
                std::thread::sleep(Duration::from_millis(10));
            }
            std::thread::sleep(Duration::from_millis(200));
            card.hear(vip, |_, _, port| _ = answered.insert(port));
            if answered != BTreeSet::from([FIRST_PORT + 1]) {
                // Which of them it was.
                for (what, frame) in &lies {
                    card.send(frame);
                    std::thread::sleep(Duration::from_millis(50));
                    card.hear(vip, |_, _, _| println!("{plane}, {vip}: answered is what has {what}"));
                }
            }
            assert_eq!(answered, BTreeSet::from([FIRST_PORT + 1]), "{plane}, {vip}");
            assert!(malformed() > before, "{plane}, {vip}: nothing was counted");

            let mut random = Random::new(14);
            for _ in 0..1500 {
                let mut frame = request(from, to, client, vip, FIRST_PORT + 2);
                frame.extend([0x5a; 40]);
                // Not the client's address: an answer would leave the lab.
                let spared = if vip.is_ipv6() { 22..38 } else { 26..30 };
                for _ in 0..=random.below(6) {
                    let at = ETHERNET + random.below(frame.len() - ETHERNET);
                    if !spared.contains(&at) {
                        frame[at] = random.next() as u8;
                    }
                }
                frame.truncate(ETHERNET + random.below(frame.len()));
                if !vip.is_ipv6() && frame.len() >= ETHERNET + 20 {
                    mend_checksum(&mut frame);
                }
                card.send(&frame);
            }
        }
        works(&lab, &pids, plane);
    }
}

/// Up to three tags that name a priority only (IEEE 802.1Q) count for nothing: such a frame is its owner's and nobody else's, in user space as in the kernel.
/// What has more is nobody's.
#[test]
fn behind_priority_tags_a_request_is_its_owners_or_nobodys() {
    for (mode, plane) in [Mode::Directed, Mode::Invisible]
        .into_iter()
        .flat_map(|mode| PLANES.map(|plane| (mode, plane)))
    {
        let context = format!("{mode:?}, {plane}");
        let lab = farm(mode, plane);
        let mut card = Card::open(&lab);
        let (from, vip) = (card.mac, IpAddr::from(VIP));
        let batch = lab
            .client
            .batch(Batch::new(SocketAddr::new(vip, 80), 160))
            .expect("a batch");
        let owners = batch.nodes_by_source();
        let to = match mode {
            Mode::Directed => service_mac(&lab, vip),
            Mode::Invisible => lab.config().vips[0].vmac(),
        };
        let macs: BTreeMap<MacAddr, &str> = lab
            .nodes
            .iter()
            .map(|node| {
                (
                    node.mac().expect("a card").parse().expect("an Ethernet address"),
                    node.name(),
                )
            })
            .collect();
        const TAGS: [[u8; 4]; 2] = [[0x81, 0, 0xe0, 0], [0x88, 0xa8, 0, 0]];
        let numbers = [2, 3, 4, 6];
        for client in owners.keys() {
            for (port, number) in (FIRST_PORT..).zip(numbers) {
                let frame = request(from, to, *client, vip, port);
                let tags: Vec<[u8; 4]> = TAGS.into_iter().cycle().take(number).collect();
                card.send(&[&frame[..12], tags.as_flattened(), &frame[12..]].concat());
            }
        }
        let mut answers: BTreeMap<u16, BTreeMap<IpAddr, Vec<String>>> = BTreeMap::new();
        let mut note = |card: &mut Card| {
            card.hear(vip, |mac, client, port| {
                let node = macs
                    .get(&mac)
                    .map_or_else(|| mac.to_string(), |name| (*name).to_owned());
                let nodes = answers.entry(port).or_default().entry(client).or_default();
                if !nodes.contains(&node) {
                    nodes.push(node);
                }
            });
            answers.values().map(BTreeMap::len).sum::<usize>()
        };
        let begun = Instant::now();
        while note(&mut card) < 2 * owners.len() && begun.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        // Whoever else thinks that it is its own has answered by now.
        std::thread::sleep(Duration::from_millis(200));
        note(&mut card);
        let expected = [(FIRST_PORT, owners.clone()), (FIRST_PORT + 1, owners)];
        assert_eq!(answers, BTreeMap::from(expected), "{context}");
        lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(10))
            .expect("all nodes go on");
    }
}
