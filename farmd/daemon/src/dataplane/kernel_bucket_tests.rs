//! The program where no two buckets are alike, with clients of every kind: whether it finds the bucket that the core finds.

use farm_core::balance::assign::BucketMap;

use super::*;

/// Bytes of each frame that the program tells of; enough to be one.
const SNAP: u32 = 64;

/// The next of a sequence of numbers that look random (SplitMix64).
fn random(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z >> 33) as usize
}

/// A client of the family of `addr`, with nothing left out.
fn random_client(addr: IpAddr, state: &mut u64) -> IpAddr {
    let bits = (0..8).fold(0_u128, |bits, _| bits << 16 | (random(state) & 0xffff) as u128);
    match addr {
        IpAddr::V4(_) => IpAddr::V4((bits as u32).into()),
        IpAddr::V6(_) => IpAddr::V6(bits.into()),
    }
}

/// A group whose buckets each have a state and an owner of their own; some of them change hands.
fn mixed(state: &mut u64) -> GroupPlan {
    // This node, two whose Ethernet addresses are known, one whose is not, nobody.
    const OWNERS: [u8; 5] = [0, 1, 2, 9, 0xff];
    let mut mixed = group(BucketState::Own, None);
    let mut owners = Box::new([0; BUCKETS]);
    for (bucket, owner) in mixed.states.iter_mut().zip(owners.iter_mut()) {
        *bucket = STATES[random(state) % STATES.len()];
        *owner = OWNERS[random(state) % OWNERS.len()];
    }
    mixed.owners = BucketMap::from_bytes(owners).unwrap();
    mixed.leaving = (0..BUCKETS).filter(|_| random(state).is_multiple_of(8)).collect();
    mixed
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
    let mut events = bench.kernel.events().unwrap();
    let (mut state, mut seen) = (7, BTreeSet::new());
    for (addr, affinity) in [vip(), vip6()]
        .into_iter()
        .flat_map(|addr| AFFINITIES.map(|affinity| (addr, affinity)))
    {
        let plan = foreign(addr, affinity);
        bench.kernel.install(&plan, &[]);
        let mut all = clients(addr).to_vec();
        all.extend((0..50).map(|_| random_client(addr, &mut state)));
        for client in all {
            let way = Way::new(client, addr, VIRTUAL_MAC);
            let (port, identification) = (random(&mut state) as u16, random(&mut state) as u32);
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
                assert_eq!(told, [place], "{affinity:?} {packet:?}");
                seen.extend(place);
            }
        }
    }
    assert!(seen.len() > 500, "{} buckets", seen.len());
}

#[test]
fn each_bucket_has_the_verdict_that_it_has_in_the_core() {
    let Some(mut bench) = Bench::new(&foreign(vip(), Affinity::ClientIp)) else {
        return;
    };
    let mut state = 11;
    for (addr, affinity) in [vip(), vip6()]
        .into_iter()
        .flat_map(|addr| AFFINITIES.map(|affinity| (addr, affinity)))
    {
        for (mode, service) in [(INVISIBLE, VIRTUAL_MAC), (L2Mode::Directed, OWN_MAC)] {
            let groups = vec![mixed(&mut state), mixed(&mut state)];
            let plan = plan_of(addr, mode, affinity, groups);
            bench.kernel.install(&plan, &[]);
            for client in clients(addr) {
                bench.identification += 20;
                for frame in frames_from(client, addr, service, CLIENT_MAC, bench.identification) {
                    bench.compare(&plan, &frame, false);
                }
            }
        }
    }
}

/// Frames with random bytes in them, from another client for each few of them, and other buckets for each hundred.
#[test]
fn frames_with_flaws_are_judged_alike() {
    let Some(mut bench) = Bench::new(&foreign(vip(), Affinity::ClientIp)) else {
        return;
    };
    let mut state = 20;
    for _ in 0..200 {
        let (mode, service) = [(INVISIBLE, VIRTUAL_MAC), (L2Mode::Directed, OWN_MAC)][random(&mut state) % 2];
        let addr = [vip(), vip6()][random(&mut state) % 2];
        let affinity = AFFINITIES[random(&mut state) % AFFINITIES.len()];
        let groups = vec![mixed(&mut state), mixed(&mut state)];
        let plan = plan_of(addr, mode, affinity, groups);
        bench.kernel.install(&plan, &[]);
        let from = [CLIENT_MAC, mac(1)][random(&mut state) % 2];
        for _ in 0..4 {
            bench.identification += 20;
            let client = random_client(addr, &mut state);
            let frames = frames_from(client, addr, service, from, bench.identification);
            for _ in 0..25 {
                let mut frame = frames[random(&mut state) % frames.len()].clone();
                for _ in 0..=random(&mut state) % 3 {
                    let at = random(&mut state) % frame.len();
                    frame[at] = random(&mut state) as u8;
                }
                // One tag more than the core passes over, the kernel takes off before the program sees the frame.
                if frame.get(12..14) != Some(&[0x91, 0]) {
                    bench.compare(&plan, &frame, false);
                }
            }
        }
    }
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
