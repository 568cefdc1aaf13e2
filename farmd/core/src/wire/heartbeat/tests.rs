use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::balance::assign::assign;
use crate::wire::codec::MAX_TEXT;

fn key() -> ClusterKey {
    ClusterKey::from_bytes([1; 32])
}

fn node(index: usize) -> NodeId {
    NodeId::new(index).unwrap()
}

fn map_of(owners: Vec<u8>) -> BucketMap {
    BucketMap::from_bytes(owners.into_boxed_slice().try_into().unwrap()).unwrap()
}

fn ids_of(nodes: usize) -> impl Iterator<Item = NodeId> {
    (0..nodes).filter_map(NodeId::new)
}

fn sample(nodes: usize, with_map: bool) -> Heartbeat {
    let ids: Vec<NodeId> = ids_of(nodes).collect();
    let weights: BTreeMap<_, _> = ids.iter().map(|n| (*n, 1)).collect();
    let map = assign(&BucketMap::default(), &weights);
    Heartbeat {
        sender: ids[0],
        lan: 0,
        fenced: false,
        leaving: false,
        returning: false,
        joining: true,
        incarnation: Incarnation(77),
        seq: 5,
        cluster_digest: 0xdead,
        excludes: NodeSet::from_bits(4),
        hears: ids.iter().map(|n| (*n, Ack::of(0x12_3456))).collect(),
        beat: 0xfffe,
        echo: ids.last().map(|node| Echo {
            node: *node,
            ack: Ack::of(7),
            kept_us: 49_000,
        }),
        hearsay: ids
            .iter()
            .filter(|_| with_map)
            .map(|node| Hearsay {
                node: *node,
                incarnation: Incarnation(u64::MAX),
                seq: 1 << 40,
                age_us: 249_000,
                joining: false,
                leaving: true,
                hears: NodeSet::from_bits(5),
            })
            .collect(),
        relayed: Vec::new(),
        modules: vec![ModuleReport {
            name: "web".parse().unwrap(),
            digest: 3,
            state: ModuleState::Up,
            quality: Quality::Ready,
            joining: true,
            withheld: !with_map,
            runs: NodeSet::from_bits(3),
            why: "é".repeat(200),
            macs: vec![MacAddr([2; 6])],
            groups: vec![GroupReport {
                weight: 1,
                promised: Epoch(0x100),
                committed: Epoch(0x100),
                behind: with_map,
                open: 77,
                held: [1, 4095].into_iter().collect(),
                held_connections: 2,
                map: with_map.then(|| MapReport {
                    epoch: Epoch(0x100),
                    view: ids.iter().copied().collect(),
                    map,
                }),
            }],
        }],
        requesters: vec![Requester {
            vip: "198.18.0.20".parse().unwrap(),
            addr: "2001:db8::1".parse().unwrap(),
            mac: MacAddr::BROADCAST,
        }],
    }
}

#[test]
fn what_is_emitted_is_read_back() {
    for (nodes, with_map) in [(1, false), (3, true), (64, true)] {
        let mut sent = sample(nodes, with_map);
        if with_map {
            let relayed = ids_of(nodes).map(|node| Relayed {
                node,
                incarnation: Incarnation(u64::MAX),
                seq: 1 << 40,
                modules: vec![ModuleReport {
                    why: "it is said".to_owned(),
                    ..sent.modules[0].clone()
                }],
            });
            sent.relayed = relayed.collect();
        }
        let mut read = Heartbeat::parse(&key(), &sent.emit(&key())).unwrap();
        assert_eq!(read.modules[0].why, "é".repeat(MAX_TEXT / 2));
        read.modules[0].why.clone_from(&sent.modules[0].why);
        assert_eq!(read, sent);
    }
}

#[test]
fn the_fullest_heartbeat_fits_into_a_udp_datagram() {
    // Every limit at once: all nodes, modules and groups, every group holding connections, four maps that do not shrink.
    let mut heartbeat = sample(64, false);
    let map = MapReport {
        epoch: Epoch(9),
        view: NodeSet::from_bits(u64::MAX),
        map: map_of((0..BUCKETS).map(|i| (i % 64) as u8).collect()),
    };
    let group = GroupReport {
        held: (0..BUCKETS).collect(),
        ..heartbeat.modules[0].groups[0].clone()
    };
    let module = ModuleReport {
        name: "a".repeat(32).parse().unwrap(),
        macs: vec![MacAddr::BROADCAST; crate::config::MAX_INTERFACES],
        groups: vec![group; 2],
        ..heartbeat.modules[0].clone()
    };
    heartbeat.modules = vec![module; MAX_MODULES];
    for group in heartbeat.modules.iter_mut().flat_map(|m| &mut m.groups).take(4) {
        group.map = Some(map.clone());
    }
    heartbeat.requesters = vec![heartbeat.requesters[0]; MAX_REQUESTERS];
    let datagram = heartbeat.emit(&key());
    assert!(datagram.len() <= MAX_DATAGRAM, "{} bytes", datagram.len());
    assert_eq!(Heartbeat::parse(&key(), &datagram).unwrap().modules.len(), MAX_MODULES);
}

#[test]
fn the_usual_heartbeat_of_32_nodes_costs_less_than_5_kb_a_second() {
    const HEADERS: usize = 14 + 20 + 8;
    let mut heartbeat = sample(32, false);
    heartbeat.hears.pop();
    heartbeat.excludes = NodeSet::EMPTY;
    heartbeat.requesters.clear();
    let module = &mut heartbeat.modules[0];
    module.why.clear();
    module.runs = NodeSet::EMPTY;
    module.groups[0].held = BucketSet::default();
    // With the headers of Ethernet, IPv4 and UDP, 20 times a second; four requesters come with every eighth.
    let length = heartbeat.emit(&key()).len() + HEADERS;
    let requester = Requester {
        addr: "198.18.0.100".parse().unwrap(),
        ..sample(1, false).requesters[0]
    };
    heartbeat.requesters = vec![requester; MAX_REQUESTERS / 2];
    let full = heartbeat.emit(&key()).len() + HEADERS;
    let per_second = (length * 7 + full) * 20 / 8;
    assert!(per_second <= 5_000, "{length} and {full} bytes, {per_second} B/s");
    println!("{length} bytes with headers, {full} with requesters, {per_second} B/s");
}

/// Every part that there is and each code, with flags together and alone.
fn full() -> Heartbeat {
    let mut runs = vec![0; 2048];
    runs.resize(4095, 1);
    runs.push(255);
    let mut groups = vec![GroupReport::default(); 5];
    groups[0] = GroupReport {
        weight: 3,
        promised: Epoch(0x501),
        committed: Epoch(0x400),
        behind: true,
        open: 2048,
        held: [0, 9, 4095].into_iter().collect(),
        held_connections: 0x1_0002,
        map: Some(MapReport {
            epoch: Epoch(0x501),
            view: NodeSet::from_bits(0b11),
            map: map_of(runs),
        }),
    };
    groups[1].weight = 1;
    groups[1].held = [2].into_iter().collect();
    groups[1].held_connections = 5;
    groups[2].promised = Epoch(0x600);
    groups[2].committed = Epoch(0x600);
    groups[2].map = Some(MapReport {
        epoch: Epoch(0x600),
        view: NodeSet::from_bits(1),
        map: map_of([0, 1].repeat(BUCKETS / 2)),
    });
    groups[3].behind = true;
    groups[4].promised = Epoch(0x701);
    let module = |name: &str, state, quality| ModuleReport {
        name: name.parse().unwrap(),
        digest: 0,
        state,
        quality,
        joining: false,
        withheld: false,
        runs: NodeSet::EMPTY,
        why: String::new(),
        macs: Vec::new(),
        groups: Vec::new(),
    };
    Heartbeat {
        sender: node(1),
        lan: 2,
        fenced: true,
        leaving: true,
        returning: true,
        joining: true,
        incarnation: Incarnation(0x1112_1314_1516_1718),
        seq: 0x2122_2324_2526_2728,
        beat: 0x0102,
        cluster_digest: 0x3132_3334_3536_3738,
        hears: vec![(node(0), Ack::of(0x41_4243)), (node(2), Ack::of(0x44_4546))],
        excludes: [node(3), node(63)].into_iter().collect(),
        echo: Some(Echo {
            node: node(2),
            ack: Ack::of(0x51_5253),
            kept_us: 50_000,
        }),
        hearsay: vec![
            Hearsay {
                node: node(4),
                incarnation: Incarnation(0x6162_6364_6566_6768),
                seq: 0x7172_7374_7576_7778,
                age_us: 249_000,
                joining: true,
                leaving: false,
                hears: [node(0), node(1)].into_iter().collect(),
            },
            Hearsay {
                node: node(5),
                incarnation: Incarnation(1),
                seq: 2,
                age_us: 3,
                joining: false,
                leaving: true,
                hears: NodeSet::EMPTY,
            },
        ],
        relayed: vec![Relayed {
            node: node(6),
            incarnation: Incarnation(0x9192_9394_9596_9798),
            seq: 0xa1a2_a3a4_a5a6_a7a8,
            modules: vec![module("w", ModuleState::Up, Quality::Ready)],
        }],
        modules: vec![
            ModuleReport {
                digest: 0x8182_8384_8586_8788,
                joining: true,
                withheld: true,
                runs: NodeSet::from_bits(0b111),
                why: "é".to_owned(),
                macs: vec![MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2])],
                groups,
                ..module("web", ModuleState::Up, Quality::Ready)
            },
            ModuleReport {
                withheld: true,
                ..module("db.2", ModuleState::Wait, Quality::Transient)
            },
            ModuleReport {
                joining: true,
                ..module("x", ModuleState::Stop, Quality::NotReady)
            },
        ],
        requesters: vec![
            Requester {
                vip: "198.18.0.20".parse().unwrap(),
                addr: "198.18.0.100".parse().unwrap(),
                mac: MacAddr([2, 0, 0, 0, 0, 3]),
            },
            Requester {
                vip: "2001:db8::14".parse().unwrap(),
                addr: "fe80::1".parse().unwrap(),
                mac: MacAddr([2, 0, 0, 0, 0, 4]),
            },
        ],
    }
}

/// The bytes of [`full`], written by hand from `farmd/docs/PROTOCOL.md`, "One datagram": in hexadecimal digits, `xN` for N times
/// these, and the name of the field.
const GOLDEN: &str = "
46 41 52 4d             | magic
06                      | version
01                      | sender
02                      | lan
ff                      | flags F L J E H R X P
01 02                   | beat
11 12 13 14 15 16 17 18 | incarnation
21 22 23 24 25 26 27 28 | sequence number
31 32 33 34 35 36 37 38 | digest of cluster.xml
00 00 00 00 00 00 00 05 | hears: 0 and 2
41 42 43                | ack of 0
44 45 46                | ack of 2
80 00 00 00 00 00 00 08 | excludes: 3 and 63
02                      | echo: node
51 52 53                | echo: ack
00 c3 50                | echo: kept, 50 000 us
02                      | hearsay: count
04                      | hearsay 1: node
01                      | hearsay 1: flags, joining
61 62 63 64 65 66 67 68 | hearsay 1: incarnation
71 72 73 74 75 76 77 78 | hearsay 1: sequence number
00 03 cc a8             | hearsay 1: age, 249 000 us
00 00 00 00 00 00 00 03 | hearsay 1: hears 0 and 1
05                      | hearsay 2: node
02                      | hearsay 2: flags, leaving
00 00 00 00 00 00 00 01 | hearsay 2: incarnation
00 00 00 00 00 00 00 02 | hearsay 2: sequence number
00 00 00 03             | hearsay 2: age, 3 us
00 x8                   | hearsay 2: hears nobody
01                      | relayed: count
06                      | relayed 1: node
91 92 93 94 95 96 97 98 | relayed 1: incarnation
a1 a2 a3 a4 a5 a6 a7 a8 | relayed 1: sequence number
01                      | relayed 1: modules: count
01 77                   | relayed 1: module: name, w
00 x8                   | relayed 1: module: digest
02                      | relayed 1: module: state, UP
02                      | relayed 1: module: quality, Ready
00                      | relayed 1: module: flags
00                      | relayed 1: module: why, nothing
00                      | relayed 1: module: Ethernet addresses: count
00                      | relayed 1: module: groups: count
03                      | modules: count
03 77 65 62             | module 1: name, web
81 82 83 84 85 86 87 88 | module 1: digest
02                      | module 1: state, UP
02                      | module 1: quality, Ready
07                      | module 1: flags, joining, sets, withheld
00 00 00 00 00 00 00 07 | module 1: runs 0 to 2
02 c3 a9                | module 1: why
02                      | module 1: Ethernet addresses: count
02 00 00 00 00 01       | module 1: Ethernet address 1
02 00 00 00 00 02       | module 1: Ethernet address 2
05                      | module 1: groups: count
00 03                   | group 1: weight
00 00 00 00 00 00 04 00 | group 1: committed, counter 4 of node 0
08 00                   | group 1: open, 2048
0f                      | group 1: flags, held, map, behind, promised
00 00 00 00 00 00 05 01 | group 1: promised, counter 5 of node 1
01 02                   | group 1: held buckets 0 and 9
00 x509                 | group 1: held buckets, none of 16 to 4087
80                      | group 1: held bucket 4095
00 01 00 02             | group 1: held connections
00 00 00 00 00 00 05 01 | group 1: map: epoch
00 00 00 00 00 00 00 03 | group 1: map: view, 0 and 1
00 03                   | group 1: map: count of runs
00 07 ff                | group 1: map: 2048 buckets of node 0
01 07 fe                | group 1: map: 2047 buckets of node 1
ff 00 00                | group 1: map: 1 bucket of nobody
00 01                   | group 2: weight
00 x8                   | group 2: committed, none, and promised
00 00                   | group 2: open
01                      | group 2: flags, held
04                      | group 2: held bucket 2
00 x511                 | group 2: held buckets, none from 8 on
00 00 00 05             | group 2: held connections
00 00                   | group 3: weight
00 00 00 00 00 00 06 00 | group 3: committed, counter 6 of node 0, and promised
00 00                   | group 3: open
02                      | group 3: flags, map
00 00 00 00 00 00 06 00 | group 3: map: epoch
00 00 00 00 00 00 00 01 | group 3: map: view, 0
00 00                   | group 3: map: no runs
00 01 x2048             | group 3: map: owners, 0 and 1 in turn
00 00                   | group 4: weight
00 x8                   | group 4: committed, none, and promised
00 00                   | group 4: open
04                      | group 4: flags, behind
00 00                   | group 5: weight
00 x8                   | group 5: committed, none
00 00                   | group 5: open
08                      | group 5: flags, promised
00 00 00 00 00 00 07 01 | group 5: promised, counter 7 of node 1
04 64 62 2e 32          | module 2: name, db.2
00 x8                   | module 2: digest
01                      | module 2: state, WAIT
01                      | module 2: quality, Transient
04                      | module 2: flags, withheld
00                      | module 2: why, nothing
00                      | module 2: Ethernet addresses: count
00                      | module 2: groups: count
01 78                   | module 3: name, x
00 x8                   | module 3: digest
00                      | module 3: state, STOP
00                      | module 3: quality, NotReady
01                      | module 3: flags, joining
00                      | module 3: why, nothing
00                      | module 3: Ethernet addresses: count
00                      | module 3: groups: count
02                      | requesters: count
04 c6 12 00 14          | requester 1: vip, 198.18.0.20
04 c6 12 00 64          | requester 1: address, 198.18.0.100
02 00 00 00 00 03       | requester 1: Ethernet address
06 20 01 0d b8 00 00 00 00 00 00 00 00 00 00 00 14 | requester 2: vip, 2001:db8::14
06 fe 80 00 00 00 00 00 00 00 00 00 00 00 00 00 01 | requester 2: address, fe80::1
02 00 00 00 00 04       | requester 2: Ethernet address
bd b0 cb be ed 9f a9 95 b2 3e bd 80 af a5 1e 6a | tag: HMAC-SHA-256 under a key of 32 times 01, computed by another implementation
";

/// The fields of [`GOLDEN`], each with its name.
fn golden() -> Vec<(&'static str, Vec<u8>)> {
    let field = |line: &'static str| {
        let (bytes, name) = line.split_once(" | ")?;
        let (bytes, times) = bytes.split_once('x').unwrap_or((bytes, "1"));
        let byte = |digits: &str| u8::from_str_radix(digits, 16).unwrap();
        let bytes: Vec<u8> = bytes.split_whitespace().map(byte).collect();
        Some((name, bytes.repeat(times.trim().parse().unwrap())))
    };
    GOLDEN.lines().filter_map(field).collect()
}

#[test]
fn every_field_has_the_bytes_of_the_document() {
    let sealed = full().emit(&key());
    let mut at = 0;
    for (field, bytes) in golden() {
        let end = sealed.len().min(at + bytes.len());
        assert_eq!(sealed[at..end], bytes, "{field}, at byte {at}");
        at = end;
    }
    assert_eq!(at, sealed.len(), "nothing follows");
    let golden: Vec<u8> = golden().into_iter().flat_map(|(_, bytes)| bytes).collect();
    assert_eq!(Heartbeat::parse(&key(), &golden), Ok(full()));
}

#[test]
fn each_flag_of_a_heartbeat_has_the_bit_of_the_document() {
    let mut plain = sample(1, false);
    (plain.joining, plain.echo, plain.excludes) = (false, None, NodeSet::EMPTY);
    let flags = |change: fn(&mut Heartbeat)| {
        let mut heartbeat = plain.clone();
        change(&mut heartbeat);
        heartbeat.emit(&key())[7]
    };
    assert_eq!(flags(|_| {}), 0);
    assert_eq!(flags(|h| h.fenced = true), 1);
    assert_eq!(flags(|h| h.leaving = true), 1 << 1);
    assert_eq!(flags(|h| h.joining = true), 1 << 2);
    assert_eq!(flags(|h| h.echo = full().echo), 1 << 3);
    assert_eq!(flags(|h| h.hearsay = full().hearsay), 1 << 4);
    assert_eq!(flags(|h| h.returning = true), 1 << 5);
    assert_eq!(flags(|h| h.excludes = full().excludes), 1 << 6);
}

#[test]
fn another_key_or_version_is_told_apart() {
    let datagram = sample(3, false).emit(&key());
    let other = ClusterKey::from_bytes([2; 32]);
    assert_eq!(Heartbeat::parse(&other, &datagram), Err(ParseError::Authentication));
    let mut body = key().open(&datagram).unwrap().to_vec();
    body[4] = 9;
    key().seal(&mut body);
    assert_eq!(Heartbeat::parse(&key(), &body), Err(ParseError::Version(9)));
}

proptest! {
    #[test]
    fn authentic_rubbish_never_panics(mut body in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..4000, at in 0usize..400, value: u8) {
        key().seal(&mut body);
        let _ = Heartbeat::parse(&key(), &body);
        let mut real = key().open(&sample(5, true).emit(&key())).unwrap().to_vec();
        let n = real.len();
        real[at % n] = value;
        real.truncate(cut.max(1));
        key().seal(&mut real);
        let _ = Heartbeat::parse(&key(), &real);
    }
}
