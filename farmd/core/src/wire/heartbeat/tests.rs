use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::balance::assign::assign;
use crate::wire::codec::MAX_TEXT;

fn key() -> ClusterKey {
    ClusterKey::from_bytes([1; 32])
}

fn sample(nodes: usize, with_map: bool) -> Heartbeat {
    let ids: Vec<NodeId> = (0..nodes).filter_map(NodeId::new).collect();
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
        modules: vec![ModuleReport {
            name: "web".parse().unwrap(),
            digest: 3,
            state: ModuleState::Up,
            quality: Quality::Ready,
            joining: true,
            withheld: !with_map,
            runs: NodeSet::from_bits(3),
            leaves_out: NodeSet::from_bits(if with_map { 2 } else { 0 }),
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
        let sent = sample(nodes, with_map);
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
    let owners: Vec<u8> = (0..BUCKETS).map(|i| (i % 64) as u8).collect();
    let map = BucketMap::from_bytes(owners.into_boxed_slice().try_into().unwrap()).unwrap();
    let map = MapReport {
        epoch: Epoch(9),
        view: NodeSet::from_bits(u64::MAX),
        map,
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
    assert!(datagram.len() <= 65_507, "{} bytes", datagram.len());
    assert_eq!(Heartbeat::parse(&key(), &datagram).unwrap().modules.len(), MAX_MODULES);
}

#[test]
fn the_usual_heartbeat_of_32_nodes_costs_less_than_5_kb_a_second() {
    let mut heartbeat = sample(32, false);
    heartbeat.hears.pop();
    heartbeat.requesters.clear();
    let module = &mut heartbeat.modules[0];
    module.why.clear();
    (module.runs, module.leaves_out) = (NodeSet::EMPTY, NodeSet::EMPTY);
    module.groups[0].held = BucketSet::default();
    // With the headers of UDP and IPv4, 20 times a second; four requesters come with every eighth.
    let length = heartbeat.emit(&key()).len() + 28;
    let requester = Requester {
        addr: "198.18.0.100".parse().unwrap(),
        ..sample(1, false).requesters[0]
    };
    heartbeat.requesters = vec![requester; MAX_REQUESTERS / 2];
    let full = heartbeat.emit(&key()).len() + 28;
    let per_second = (length * 7 + full) * 20 / 8;
    assert!(per_second <= 5_000, "{length} and {full} bytes, {per_second} B/s");
    println!("{length} bytes with headers, {full} with requesters, {per_second} B/s");
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
