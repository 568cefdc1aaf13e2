//! The program where no two buckets are alike, with clients of every kind: whether it finds the bucket that the core finds.

use std::cell::RefCell;
use std::fmt;

use farm_core::balance::assign::BucketMap;
use proptest::collection::vec;
use proptest::option::weighted;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::TestRunner;

use super::*;

/// Bytes of each frame that the program tells of; enough to be one.
const SNAP: u32 = 64;

/// A group whose buckets each have a state and an owner of their own; some of them change hands.
#[derive(Clone)]
struct Mixed(GroupPlan);

impl fmt::Debug for Mixed {
    /// What is told of the frame says what its bucket was.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("mixed")
    }
}

fn mixed() -> impl Strategy<Value = Mixed> {
    // This node, two whose Ethernet addresses are known, one whose is not, nobody.
    const OWNERS: [u8; 5] = [0, 1, 2, 9, 0xff];
    // With as many buckets it is not made smaller.
    Just(()).prop_perturb(|(), mut rng| {
        let mut mixed = group(BucketState::Own, None);
        let mut owners = Box::new([0; BUCKETS]);
        for (bucket, owner) in mixed.states.iter_mut().zip(owners.iter_mut()) {
            *bucket = STATES[rng.random_range(0..STATES.len())];
            *owner = OWNERS[rng.random_range(0..OWNERS.len())];
        }
        mixed.owners = BucketMap::from_bytes(owners).unwrap();
        mixed.leaving = (0..BUCKETS).filter(|_| rng.random_range(0..8) == 0).collect();
        Mixed(mixed)
    })
}

/// Judges `cases` cases. One that fails is told as small as it can be, and tried first from then on (`proptest-regressions`).
fn try_random<S: Strategy>(cases: u32, strategy: S, judge: impl Fn(S::Value)) {
    let mut config = ProptestConfig::with_cases(cases);
    config.source_file = Some(file!());
    let tried = TestRunner::new(config).run(&strategy, |case| {
        judge(case);
        Ok(())
    });
    if let Err(error) = tried {
        panic!("{error}");
    }
}

/// The client of the family of `addr` with these bits, or the last of them.
fn client_of(addr: IpAddr, bits: u128) -> IpAddr {
    match addr {
        IpAddr::V4(_) => IpAddr::V4((bits as u32).into()),
        IpAddr::V6(_) => IpAddr::V6(bits.into()),
    }
}

/// Each address with each affinity.
fn kinds() -> impl Iterator<Item = (IpAddr, Affinity)> {
    [vip(), vip6()]
        .into_iter()
        .flat_map(|addr| AFFINITIES.map(|affinity| (addr, affinity)))
}

/// Both groups are foreign, so that nothing leaves and the program tells of each frame once.
fn foreign(addr: IpAddr, affinity: Affinity) -> Plan {
    let groups = [1, 2].map(|owner| group(BucketState::Foreign, Some(owner)));
    plan_of(addr, INVISIBLE, affinity, groups.into())
}

/// Frames from `port` of a client, of each kind that leads to a bucket. Those that are whole have this identification, where they can have one.
fn placed(way: &Way, port: u16, identification: u32) -> Vec<Vec<u8>> {
    let back = way.back();
    let mut all = vec![
        way.tcp(port, 80, Flags::Syn),
        way.tcp(port, 80, Flags::Ack),
        way.udp(port, 53, b"?"),
        way.tcp(port, 443, Flags::Ack),
        way.tcp(port, 300, Flags::Ack),
        way.tcp(port, 8080, Flags::Ack),
        way.echo(),
        way.too_big(&back.tcp(80, port, Flags::Ack)),
        way.too_big(&back.udp(53, port, b"x")),
        way.too_big(&back.echo()),
    ];
    if way.vip.is_ipv4() {
        for frame in &mut all {
            frame[18..20].copy_from_slice(&(identification as u16).to_be_bytes());
        }
    } else {
        let mut frame = with_extensions(&way.tcp(port, 8080, Flags::Ack), &[44], 0, false);
        frame[58..62].copy_from_slice(&identification.to_be_bytes());
        all.push(frame);
    }
    all
}

/// The bucket itself, of which the program tells, and not only what becomes of the frame.
#[test]
fn the_bucket_of_each_client_is_the_cores() {
    let Some(mut bench) = Bench::new(&foreign(vip(), Affinity::ClientIp)) else {
        return;
    };
    bench.kernel.tell(Some(SNAP)).unwrap();
    let (events, seen) = (bench.kernel.events().unwrap(), BTreeSet::new());
    let all = RefCell::new((bench, events, seen));
    for (addr, affinity) in kinds() {
        let plan = foreign(addr, affinity);
        all.borrow_mut().0.kernel.install(&plan, &[]);
        let judge = |client: IpAddr, port: u16, identification: u32| {
            let (bench, events, seen) = &mut *all.borrow_mut();
            let way = Way::new(client, addr, VIRTUAL_MAC);
            for frame in placed(&way, port, identification) {
                let packet = Packet::parse(&frame).unwrap();
                let fragments = &mut FragmentTable::default();
                let decision = decide(&plan, &packet, fragments, Duration::ZERO, &mut |_| false);
                let place = decision
                    .place
                    .map(|(group, bucket)| (group as u16, bucket.index() as u16));
                assert!(place.is_some(), "{decision:?} {packet:?}");
                bench.kernel.filter().dry_run(&frame, 1).unwrap();
                let mut told = Vec::new();
                events.read(8, |event| told.push(event.place));
                assert_eq!(told, [place], "{affinity:?} {packet:?} {}", hex(&frame));
                seen.extend(place);
            }
        };
        for client in clients(addr) {
            judge(client, 4000, 1);
        }
        let strategy = (any::<u128>(), any::<u16>(), any::<u32>());
        try_random(50, strategy, |(bits, port, identification)| {
            judge(client_of(addr, bits), port, identification);
        });
    }
    let seen = all.into_inner().2.len();
    assert!(seen > 500, "{seen} buckets");
}

#[test]
fn each_bucket_has_the_verdict_that_it_has_in_the_core() {
    let Some(bench) = Bench::new(&foreign(vip(), Affinity::ClientIp)) else {
        return;
    };
    let bench = RefCell::new(bench);
    for (addr, affinity) in kinds() {
        for (mode, service) in [(INVISIBLE, VIRTUAL_MAC), (L2Mode::Directed, OWN_MAC)] {
            try_random(1, [mixed(), mixed()], |groups| {
                let bench = &mut *bench.borrow_mut();
                let plan = plan_of(addr, mode, affinity, groups.map(|group| group.0).into());
                bench.kernel.install(&plan, &[]);
                for client in clients(addr) {
                    bench.identification += 20;
                    for frame in frames_from(client, addr, service, CLIENT_MAC, bench.identification) {
                        bench.compare(&plan, &frame, false);
                    }
                }
            });
        }
    }
}

/// One of the frames of the battery, bytes in it that are others, and where it ends too early.
type Flawed = (Index, Vec<(Index, u8)>, Option<Index>);

fn flawed() -> impl Strategy<Value = Flawed> {
    // Protocols, types of ICMP, lengths and flags among them.
    let telling = select(vec![
        0, 1, 2, 3, 4, 5, 6, 8, 11, 17, 20, 40, 43, 44, 51, 58, 60, 128, 135, 255,
    ]);
    let byte = (any::<Index>(), prop_oneof![any::<u8>(), telling]);
    (any::<Index>(), vec(byte, 1..=3), weighted(0.2, any::<Index>()))
}

/// From another client for each few of them, and other buckets for each hundred.
#[test]
fn frames_with_flaws_are_judged_alike() {
    let Some(bench) = Bench::new(&foreign(vip(), Affinity::ClientIp)) else {
        return;
    };
    let bench = RefCell::new(bench);
    let ways = (any::<bool>(), any::<bool>(), any::<bool>(), select(AFFINITIES.to_vec()));
    // Fragments are of datagrams from this number on.
    let one_client = (any::<u128>(), 0_u16..60_000, vec(flawed(), 1..50));
    let strategy = (ways, [mixed(), mixed()], vec(one_client, 1..8));
    try_random(160, strategy, |((v6, directed, member, affinity), groups, clients)| {
        let bench = &mut *bench.borrow_mut();
        let addr = if v6 { vip6() } else { vip() };
        let (mode, service) = if directed {
            (L2Mode::Directed, OWN_MAC)
        } else {
            (INVISIBLE, VIRTUAL_MAC)
        };
        let from = if member { mac(1) } else { CLIENT_MAC };
        let plan = plan_of(addr, mode, affinity, groups.map(|group| group.0).into());
        bench.kernel.install(&plan, &[]);
        for (bits, identification, flawed) in clients {
            let frames = frames_from(client_of(addr, bits), addr, service, from, identification);
            for (which, bytes, end) in flawed {
                let mut frame = which.get(&frames).clone();
                for (at, byte) in bytes {
                    *at.get_mut(&mut frame) = byte;
                }
                // A dry run at tc takes no frame without its IP header.
                let least = if v6 || frame[12..14] == [0x86, 0xdd] { 54 } else { 34 };
                if let Some(end) = end {
                    frame.truncate(least + end.index(frame.len()));
                }
                // One tag more than the core passes over, the kernel takes off before the program sees the frame.
                if frame.len() >= least && frame[12..14] != [0x91, 0] {
                    bench.compare(&plan, &frame, false);
                }
            }
        }
    });
}

/// A few addresses are compared one by one, more are looked for by hash; they come and go, and what is no longer one is let by.
#[test]
fn each_of_many_addresses_is_found_and_none_that_is_gone() {
    let groups = vec![group(BucketState::Own, Some(0)), group(BucketState::Foreign, Some(2))];
    let base = plan_of(vip(), INVISIBLE, Affinity::ClientIp, groups);
    let Some(mut bench) = Bench::new(&base) else { return };
    let other = |i: u8| IpAddr::from([198, 18, 0, 100 + i]);
    let all: Vec<IpAddr> = (1..=6).map(other).chain([vip(), vip6()]).collect();
    assert!(all.len() > farm_sys::bpf::NEAR + 2);
    // Most of them, in and out in turn; a place that is free is given to who comes.
    let sets = [&all[..], &all[1..7], &all[5..], &all[..6], &all[2..3], &all[..]];
    for addrs in sets {
        let vips = addrs.iter().map(|addr| VipPlan {
            addr: *addr,
            ..base.vips[0].clone()
        });
        let plan = Plan {
            vips: vips.collect(),
            ..base.clone()
        };
        // A second time, when all have their places.
        for _ in 0..2 {
            bench.kernel.install(&plan, &[]);
            for addr in &all {
                assert_eq!(bench.kernel.takes(*addr), addrs.contains(addr), "{addr}");
                bench.identification += 20;
                for frame in frames_for(*addr, VIRTUAL_MAC, CLIENT_MAC, bench.identification) {
                    bench.compare(&plan, &frame, false);
                }
            }
        }
    }
}
