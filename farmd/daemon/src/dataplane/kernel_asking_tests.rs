//! The program while peers may be asked for connections: what it leaves to the daemon, and how much of it.

use super::*;

/// What may be nobody's is put to the daemon, after all who may have it have got it.
#[test]
fn a_segment_that_may_be_nobodys_is_the_daemons_to_ask_for() {
    let mut held = group(BucketState::Guarded, Some(0));
    held.holders = (0..BUCKETS)
        .map(|i| (i, [id(1), id(2)].into_iter().collect()))
        .collect();
    for mode in [L2Mode::Directed, INVISIBLE] {
        let other = group(BucketState::Foreign, Some(2));
        let plan = plan_of(vip(), mode, Affinity::ClientIp, vec![held.clone(), other]);
        let Some(mut bench) = Bench::new(&plan) else { return };
        let to = plan.vips[0].service_mac();
        let way = Way::new(client(1), vip(), to);
        let (segment, request) = (way.tcp(4000, 80, Flags::Ack), way.tcp(4000, 80, Flags::Syn));
        for asks in [true, false] {
            bench.kernel.set_asks(asks);
            bench.kernel.install(&plan, &[]);
            let (run, counts) = bench.run_counting(&segment);
            let count = |of: Count| counts[of as usize];
            let sent = if mode == L2Mode::Directed { 2 } else { 0 };
            assert_eq!(
                (count(Count::Punted), count(Count::Forwarded)),
                (u64::from(asks), sent),
                "{mode:?}"
            );
            if asks {
                assert_eq!(run.code, REDIRECT);
                // By its source the daemon sees that it has been sent on.
                let source = if sent > 0 { OWN_MAC } else { CLIENT_MAC };
                assert_eq!(
                    (&run.frame[..6], &run.frame[6..12]),
                    (&to.0[..], &source.0[..]),
                    "{mode:?}"
                );
                assert_eq!(run.frame[12..], segment[12..]);
            } else {
                assert_eq!(run.code, SHOT);
            }
            let (run, counted) = bench.run(&request);
            assert_eq!(run.code, bench.accepted());
            assert!(
                !counted.contains(&(Count::Punted as usize)),
                "what starts something is this node's"
            );
        }
        // Not more of them at once than the daemon can read.
        bench.kernel.set_asks(true);
        bench.kernel.install(&plan, &[]);
        let before = bench.counts();
        bench.kernel.filter().dry_run(&segment, 2000).unwrap();
        let punted = bench.counts()[Count::Punted as usize] - before[Count::Punted as usize];
        assert!((1..2000).contains(&punted), "{punted}");
    }
}

/// Where connections may end in containers the kernel's sockets do not tell whose a segment is: the daemon decides, and sends it on to who else may have it.
#[test]
fn a_segment_that_may_be_a_containers_is_left_to_the_daemon_whole() {
    for state in [BucketState::Guarded, BucketState::Draining] {
        let mut held = group(state, Some(if state == BucketState::Guarded { 0 } else { 2 }));
        held.holders = (0..BUCKETS)
            .map(|i| (i, [id(1), id(2)].into_iter().collect()))
            .collect();
        for (addr, client) in [(vip(), client(1)), (vip6(), client6(1))] {
            let other = group(BucketState::Foreign, Some(2));
            let plan = plan_of(addr, L2Mode::Directed, Affinity::ClientIp, vec![held.clone(), other]);
            let Some(mut bench) = Bench::new(&plan) else { return };
            let way = Way::new(client, addr, plan.vips[0].service_mac());
            let segment = way.tcp(4000, 80, Flags::Ack);
            // What the daemon does with it, by the same plan and what it knows of the container.
            let packet = Packet::parse(&segment).unwrap();
            for (has_socket, verdict) in [(true, Verdict::Accept), (false, Verdict::Drop)] {
                let fragments = &mut FragmentTable::default();
                let decision = decide(&plan, &packet, fragments, Duration::ZERO, &mut |_| has_socket);
                assert_eq!(decision.verdict, verdict, "{state:?}");
                assert_eq!(decision.forward, [id(1), id(2)].into_iter().collect(), "{state:?}");
            }
            bench.kernel.set_tracked(true);
            bench.kernel.install(&plan, &[]);
            let (run, counts) = bench.run_counting(&segment);
            let count = |of: Count| counts[of as usize];
            // As it came, and to nobody else: the daemon sends it on.
            assert_eq!((run.code, &run.frame), (REDIRECT, &segment), "{state:?}, {addr}");
            assert_eq!(
                (count(Count::Punted), count(Count::Forwarded)),
                (1, 0),
                "{state:?}, {addr}"
            );
            bench.kernel.set_tracked(false);
            bench.kernel.install(&plan, &[]);
            assert!(
                !bench.compare(&plan, &segment, false),
                "{state:?}, {addr}: decided in the kernel"
            );
        }
    }
}
