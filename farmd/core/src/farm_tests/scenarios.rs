//! One story each: what an operator would see.

use std::time::Duration;

use super::action::Action;
use super::node::Input;
use super::sim::{Sim, id, ms, us};
use crate::balance::assign::BucketMap;
use crate::farm::Event;
use crate::handover;
use crate::id::BUCKETS;

fn map(sim: &Sim, node: usize) -> BucketMap {
    sim.farm(node).map(&sim.module, 0).unwrap().clone()
}

#[test]
fn three_nodes_share_exactly_and_then_rest() {
    let mut sim = Sim::started(3, 1);
    assert_eq!(sim.counts(), [1366, 1365, 1365]);
    let since = sim.now;
    let versions: Vec<u64> = (0..3).map(|n| sim.farm(n).plan_version()).collect();
    sim.run(ms(2000)).unwrap();
    assert_eq!(sim.proposals(since), 0);
    assert_eq!(
        (0..3).map(|n| sim.farm(n).plan_version()).collect::<Vec<_>>(),
        versions,
        "no plan without a cause"
    );
}

/// Each of the eight gets seven heartbeats a pulse, and draws conclusions with its own one.
#[test]
fn heartbeats_without_news_cause_no_turn() {
    const PULSES: u32 = 40;
    let mut sim = Sim::started(8, 1);
    let turns = |sim: &Sim| -> Vec<u64> { (0..8).map(|node| sim.farm(node).turns()).collect() };
    let before = turns(&sim);
    sim.run(ms(50) * PULSES).unwrap();
    for (before, after) in before.into_iter().zip(turns(&sim)) {
        let turns = after - before;
        assert!(
            (u64::from(PULSES) - 2..=u64::from(PULSES) * 3 / 2).contains(&turns),
            "{turns} in {PULSES} pulses"
        );
    }
}

#[test]
fn a_crash_moves_only_the_buckets_of_the_dead_and_opens_them_unguarded() {
    for dead in 0..4 {
        let mut sim = Sim::started(4, 2);
        let before = map(&sim, dead);
        sim.act(Action::Crash(dead));
        let took = sim.now;
        while sim.check_covered().is_err() {
            sim.run(ms(1)).unwrap();
            assert!(
                sim.now < took + sim.detection() + ms(50),
                "a crash takes detection and two round trips: {:?}",
                sim.counts()
            );
        }
        let after = map(&sim, (dead + 1) % 4);
        assert_eq!(
            before.moves_to(&after),
            before.counts()[&id(dead)] as usize,
            "only the buckets of s{dead} move"
        );
        let (open, own): (usize, usize) = sim
            .nodes
            .iter()
            .map(|n| (n.plane.open_count(), n.plane.own_count()))
            .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1));
        assert_eq!((open, own), (BUCKETS, BUCKETS), "nobody alive holds anything: no guard");
    }
}

#[test]
fn a_planned_stop_takes_two_round_trips_and_the_winners_guard_until_the_loser_holds_nothing() {
    let mut sim = Sim::started(3, 3);
    sim.flows = 1000;
    sim.flow_time = ms(2000);
    let before = map(&sim, 1);
    sim.act(Action::Ready(1, false));
    let asked = sim.now;
    while sim.counts()[1] > 0 || sim.counts().iter().sum::<usize>() < BUCKETS {
        sim.run(ms(1)).unwrap();
        assert!(
            sim.now < asked + ms(25),
            "two round trips of 2 ms and a few plans of 5 ms: {:?}",
            sim.counts()
        );
    }
    assert_eq!(before.moves_to(&map(&sim, 0)), 1365);
    let guarded = |sim: &Sim| {
        sim.nodes
            .iter()
            .map(|n| n.plane.open_count() - n.plane.own_count())
            .sum::<usize>()
    };
    let mut last = guarded(&sim);
    // A few connections of random length may have ended already.
    assert!(
        (1355..=1365).contains(&last),
        "the buckets that moved are guarded: {last}"
    );
    let mut steps = 0;
    while last > 0 {
        sim.run(ms(20)).unwrap();
        let held = sim.nodes[1].plane.held(sim.now);
        let still = guarded(&sim);
        assert!(still >= held.len(), "{still} guarded while {} are held", held.len());
        steps += usize::from(still < last);
        last = still;
        assert!(
            sim.now < asked + sim.flow_time + ms(200),
            "{still} guarded although {} are held",
            held.len()
        );
    }
    assert!(steps > 10, "buckets become Own one by one, as their connections end");
    sim.check_covered().unwrap();
}

#[test]
fn a_bucket_that_is_held_is_drained_by_the_loser() {
    let mut sim = Sim::started(2, 4);
    sim.flows = 1000;
    sim.flow_time = ms(5000);
    sim.act(Action::Ready(0, false));
    sim.run(ms(100)).unwrap();
    let plan = sim.farm(0).group_plan(&sim.module, 0).unwrap();
    let draining = plan
        .states
        .iter()
        .filter(|s| **s == crate::balance::plan::BucketState::Draining)
        .count();
    assert!(draining > 1900, "{draining}");
    let winner = sim.farm(1).group_plan(&sim.module, 0).unwrap();
    assert_eq!(winner.holders.len(), draining, "the winner knows who holds what");
}

#[test]
fn a_node_knows_whether_its_share_is_what_the_weights_say() {
    let mut sim = Sim::started(3, 7);
    let settled = |sim: &Sim| -> Vec<bool> { (0..3).map(|n| sim.farm(n).is_settled(&sim.module, 0)).collect() };
    assert_eq!(settled(&sim), [true; 3]);
    for (weight, share) in [(3, 2458), (0, 0), (1, 1365)] {
        sim.act(Action::Weight(1, weight));
        sim.run(us(1)).unwrap();
        assert!(
            !sim.farm(1).is_settled(&sim.module, 0),
            "weight {weight} is told and nothing has moved"
        );
        sim.run(ms(300)).unwrap();
        assert_eq!(settled(&sim), [true; 3], "weight {weight}: {:?}", sim.counts());
        assert!(sim.counts()[1].abs_diff(share) <= 1, "{:?}", sim.counts());
        assert_eq!(sim.farm(1).is_group_handed_over(&sim.module, 0), weight == 0);
    }
    // Without the third the others have what the weights of the two say.
    sim.act(Action::Stop(1));
    sim.run(ms(5000)).unwrap();
    assert!(sim.farm(0).is_settled(&sim.module, 0) && sim.farm(2).is_settled(&sim.module, 0));
}

#[test]
fn a_newcomer_with_the_lowest_id_takes_only_its_share() {
    let mut sim = Sim::new(4, 1, 5);
    for node in 1..4 {
        sim.act(Action::Restart(node));
        sim.act(Action::Start(node));
    }
    sim.run(ms(1000)).unwrap();
    sim.check_covered().unwrap();
    let before = map(&sim, 1);
    sim.act(Action::Restart(0));
    sim.act(Action::Start(0));
    sim.run(ms(1000)).unwrap();
    sim.check_covered().unwrap();
    let after = map(&sim, 0);
    assert_eq!(after.counts()[&id(0)], 1024);
    assert_eq!(before.moves_to(&after), 1024, "what it gets, and nothing else");
}

#[test]
fn a_newcomer_finds_its_place_at_once() {
    let mut sim = Sim::started(3, 6);
    sim.act(Action::Crash(2));
    sim.run(ms(1000)).unwrap();
    sim.act(Action::Restart(2));
    sim.act(Action::Start(2));
    let started = sim.now;
    while sim.check_covered().is_err() {
        sim.run(ms(1)).unwrap();
        assert!(sim.now < started + sim.detection() + ms(150), "{:?}", sim.counts());
    }
}

#[test]
fn a_node_that_others_cannot_hear_steps_out_and_comes_back() {
    for mute in 0..3 {
        let mut sim = Sim::started(3, 7);
        for other in (0..3).filter(|n| *n != mute) {
            sim.act(Action::Cut(mute, other));
        }
        sim.run(ms(400)).unwrap();
        let mut counts = sim.counts();
        assert_eq!(counts.remove(mute), 0, "s{mute} is not heard and accepts nothing");
        assert_eq!(counts, [2048, 2048]);
        assert!(sim.farm(mute).membership().fenced().is_some());
        sim.act(Action::MendAll);
        sim.run(ms(400)).unwrap();
        sim.check_covered().unwrap();
    }
}

/// The data plane of the one that comes back still works with the plan by which everything was its own, and the others have taken over.
#[test]
fn a_node_that_comes_back_before_its_data_plane_has_closed_accepts_nothing_until_then() {
    for seed in 0..5 {
        let mut sim = Sim::started(3, seed);
        sim.nodes[2].slower = ms(300);
        sim.act(Action::Cut(2, 0));
        sim.act(Action::Cut(2, 1));
        while sim.farm(2).membership().fenced().is_none() {
            sim.run(ms(1)).unwrap();
        }
        let out = sim.now;
        while sim.counts() != [2048, 2048, 0] {
            sim.run(ms(1)).unwrap();
            assert!(sim.now < out + ms(100), "{:?}", sim.counts());
        }
        assert!(sim.nodes[2].plane.open_count() > 0, "it is not closed");
        sim.longest_overlap = Some(Duration::ZERO);
        sim.act(Action::MendAll);
        sim.run(ms(2000)).unwrap();
        sim.check_covered().unwrap();
    }
}

#[test]
fn no_broken_way_gives_two_owners() {
    for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
        let mut sim = Sim::started(3, 8);
        sim.act(Action::Cut(from, to));
        let cut = sim.now;
        while sim.now < cut + ms(1500) {
            sim.run(ms(5)).unwrap();
            let settled = sim.now > cut + sim.detection() + ms(50);
            for (a, b) in [(0, 1), (0, 2), (1, 2)] {
                let both = sim.nodes[a].plane.open.both(&sim.nodes[b].plane.open).len();
                assert!(
                    !settled || both == 0,
                    "{from}->{to}: s{a} and s{b} share {both} at {:?}",
                    sim.now
                );
            }
        }
        assert_eq!(
            sim.counts().iter().sum::<usize>(),
            BUCKETS,
            "{from}->{to}: {:?}",
            sim.counts()
        );
    }
}

#[test]
fn a_node_with_another_configuration_is_kept_out_and_the_others_go_on() {
    for other in 0..3 {
        let mut sim = Sim::new(3, 1, 9);
        sim.act(Action::Digest(other, 8));
        for node in (0..3).filter(|n| *n != other) {
            sim.act(Action::Restart(node));
            sim.act(Action::Start(node));
        }
        sim.run(ms(800)).unwrap();
        sim.act(Action::Restart(other));
        sim.act(Action::Start(other));
        sim.run(ms(1000)).unwrap();
        let mut counts = sim.counts();
        assert_eq!(counts.remove(other), 0);
        assert_eq!(counts, [2048, 2048], "s{other} differs");
        let why = sim.farm(other).kept_out(&sim.module).unwrap();
        assert!(why.contains("differs from that of s"), "{why}");
        // With the right configuration it takes part.
        sim.act(Action::Digest(other, 7));
        sim.run(ms(300)).unwrap();
        sim.check_covered().unwrap();
    }
}

#[test]
fn of_two_lans_one_may_fail() {
    for lan in 0..2 {
        let mut sim = Sim::new(3, 2, 10);
        for node in 0..3 {
            sim.act(Action::Restart(node));
            sim.act(Action::Start(node));
        }
        sim.run(ms(1000)).unwrap();
        let since = sim.now;
        sim.act(Action::LanDown(lan));
        sim.run(ms(1000)).unwrap();
        sim.act(Action::LanUp(lan));
        sim.run(ms(1000)).unwrap();
        sim.check_covered().unwrap();
        assert_eq!(sim.proposals(since), 0, "nothing moves");
    }
}

#[test]
fn both_halves_of_a_partition_serve_and_the_merge_moves_no_more_than_one_half() {
    let mut sim = Sim::started(4, 11);
    let pairs = || (0..2).flat_map(|a| (2..4).map(move |b| (a, b)));
    for (a, b) in pairs() {
        sim.act(Action::Cut(a, b));
        sim.act(Action::Cut(b, a));
    }
    sim.run(sim.detection() + ms(100)).unwrap();
    assert_eq!(sim.counts(), [2048; 4], "each half serves all");
    let halves = [map(&sim, 0), map(&sim, 2)];
    sim.act(Action::MendAll);
    let healed = sim.now;
    while sim.check_covered().is_err() {
        sim.run(ms(1)).unwrap();
        assert!(
            sim.now < healed + ms(150),
            "a merge takes a pulse and two round trips: {:?}",
            sim.counts()
        );
    }
    let merged = map(&sim, 0);
    let moves = halves.map(|half| half.moves_to(&merged));
    assert_eq!(
        moves.into_iter().min(),
        Some(2048),
        "one half's map is the base: {moves:?}"
    );
}

#[test]
fn a_paused_node_has_closed_when_the_others_take_over() {
    for (time, plane_works_on) in [(260, true), (260, false), (1000, true), (1000, false)] {
        let mut sim = Sim::started(3, 12);
        sim.longest_overlap = Some(Duration::ZERO);
        sim.act(Action::Pause(0, ms(time), plane_works_on));
        sim.run(ms(time + 500)).unwrap();
        sim.check_covered().unwrap();
    }
}

#[test]
fn a_node_without_a_data_plane_answer_gives_nothing_away() {
    let mut sim = Sim::started(2, 13);
    sim.apply_time = ms(600);
    sim.longest_overlap = Some(Duration::ZERO);
    sim.act(Action::Ready(0, false));
    let since = sim.now;
    sim.run(ms(3000)).unwrap();
    sim.check_covered().unwrap();
    let committed = |e: &Event| {
        matches!(
            e,
            Event::Handover {
                event: handover::Event::Committed { .. },
                ..
            }
        )
    };
    let first = sim
        .log
        .iter()
        .find(|(at, _, e)| *at > since && committed(e))
        .map(|(at, ..)| *at - since);
    assert!(first.is_some(), "{:?}", sim.log);
}

#[test]
fn a_goodbye_needs_no_detection() {
    let mut sim = Sim::started(3, 14);
    sim.act(Action::Stop(2));
    sim.run(ms(100)).unwrap();
    assert_eq!(
        sim.nodes[2].local.state,
        crate::api::ModuleState::Stop,
        "it has handed over"
    );
    sim.act(Action::Leave(2));
    sim.run(ms(20)).unwrap();
    assert!(!sim.farm(0).membership().view().contains(id(2)));
    assert_eq!(sim.counts(), [2048, 2048, 0]);
}

#[test]
fn weights_are_followed() {
    let mut sim = Sim::started(3, 15);
    sim.act(Action::Weight(0, 2));
    sim.run(ms(100)).unwrap();
    assert_eq!(sim.counts(), [2048, 1024, 1024]);
    sim.act(Action::Weight(1, 0));
    sim.run(ms(100)).unwrap();
    sim.check_covered().unwrap();
    assert_eq!(sim.counts()[1], 0);
}

#[test]
fn modules_that_start_at_the_same_moment_agree_before_anything_is_accepted() {
    for seed in 0..20 {
        let mut sim = Sim::new(3, 1, seed);
        sim.longest_overlap = Some(Duration::ZERO);
        for node in 0..3 {
            sim.act(Action::Restart(node));
        }
        sim.run(ms(1000)).unwrap();
        for node in 0..3 {
            sim.act(Action::Start(node));
            sim.act(Action::Ready(node, true));
        }
        sim.run(sim.detection() + ms(150)).unwrap();
        sim.check_covered().unwrap();
    }
}

#[test]
fn a_module_that_starts_beside_others_waits_for_nothing() {
    let mut sim = Sim::started(3, 16);
    sim.act(Action::Stop(0));
    sim.run(ms(100)).unwrap();
    assert_eq!(sim.nodes[0].local.state, crate::api::ModuleState::Stop);
    sim.act(Action::Start(0));
    sim.act(Action::Ready(0, true));
    sim.run(ms(50)).unwrap();
    sim.check_covered().unwrap();
}

/// The others guard what it has until it has counted anew, or is not back in time.
#[test]
fn connections_outlast_a_farmd_that_is_restarted_in_place() {
    for (away, comes_back) in [(ms(80), true), (ms(2000), true), (ms(11_000), false)] {
        let mut sim = Sim::started(3, 12);
        let node = 1;
        let end = sim.now + ms(60_000);
        let buckets: Vec<usize> = sim.nodes[node].plane.open.iter().step_by(100).collect();
        buckets.iter().for_each(|bucket| sim.connect(node, *bucket, end));
        sim.act(Action::Ready(node, false));
        let module = sim.module.clone();
        while !sim.farm(node).is_handed_over(&module) {
            sim.run(ms(1)).unwrap();
        }
        sim.leave_to_return(node).unwrap();
        sim.nodes[node].local.ready = true;
        let gone = sim.now;
        // A change of the map meanwhile: what one guarded another guards.
        sim.run(ms(60)).unwrap();
        sim.act(Action::Weight(0, 3));
        while sim.now < gone + away {
            sim.run(ms(5)).unwrap();
            sim.check_connections().unwrap();
        }
        let not_back = |e: &Event| *e == Event::NotBack(id(node));
        assert_eq!(sim.log.iter().any(|(_, _, e)| not_back(e)), !comes_back);
        for other in [0, 2] {
            let mut known = sim.farm(other).macs(&module).map(|(peer, _)| peer);
            assert_eq!(
                known.any(|peer| peer == id(node)),
                comes_back,
                "where its frames are sent on to"
            );
        }
        if !comes_back {
            let guarded = |n: usize| sim.nodes[n].plane.open_count() - sim.nodes[n].plane.own_count();
            assert_eq!((guarded(0), guarded(2)), (0, 0), "they are given up");
            continue;
        }
        sim.restart(node).unwrap();
        for _ in 0..200 {
            sim.run(ms(5)).unwrap();
            sim.check_connections().unwrap();
        }
        sim.check_served().unwrap();
        sim.check_covered().unwrap();
        assert_eq!((sim.reset_apart, sim.connections.len()), (0, buckets.len()));
    }
}

/// Such a machine cannot know that time has passed; the first heartbeat of the others tells it.
#[test]
fn a_machine_that_stood_still_with_its_clock_accepts_for_a_pulse_at_most() {
    let mut longest = Duration::ZERO;
    for phase in 0..25 {
        let mut sim = Sim::started(3, 13);
        sim.run(ms(2 * phase)).unwrap();
        sim.stand_still(2, ms(1000));
        sim.run(ms(999)).unwrap();
        // Nothing waits for it: its network card stood still too.
        sim.nodes[2].inbox.clear();
        sim.run(ms(1)).unwrap();
        let woken = sim.now;
        let shared = |sim: &Sim| {
            let late = &sim.nodes[2].plane;
            let accepts = sim.now < late.lease_until;
            accepts && (0..2).any(|n| sim.nodes[n].plane.open.meets(&late.open))
        };
        while shared(&sim) {
            sim.run(us(100)).unwrap();
        }
        longest = longest.max(sim.now - woken);
        sim.run(ms(800)).unwrap();
        sim.check_covered().unwrap();
    }
    assert!(longest <= ms(55), "two owners for {longest:?}");
    assert!(longest > ms(1), "the test sees it: {longest:?}");
}

#[test]
fn who_is_missing_is_sought_by_a_heartbeat_that_is_news_to_the_others_too() {
    let mut sim = Sim::started(3, 17);
    sim.act(Action::Crash(2));
    sim.run(sim.detection() + ms(100)).unwrap();
    let (mut seeker, mut other) = (sim.farm(0).clone(), sim.farm(1).clone());
    let mut sought = 0;
    let second = sim.now + ms(1000);
    loop {
        let now = seeker.poll_timeout();
        if now > second {
            break;
        }
        seeker.handle_timeout(now);
        while let Some(transmit) = seeker.poll_transmit() {
            if transmit.broadcast {
                assert_eq!(transmit.to, [id(2)].into_iter().collect());
                sought += 1;
            }
            other.handle_datagram(now, transmit.lan, &transmit.payload).unwrap();
        }
        other.handle_timeout(now);
        while let Some(transmit) = other.poll_transmit() {
            seeker.handle_datagram(now, transmit.lan, &transmit.payload).unwrap();
        }
    }
    assert_eq!(sought, 5);
}

/// It was not run for a while, and heard nobody before: what it does first must not go by a view of before the stop.
#[test]
fn what_the_data_plane_says_after_a_stop_is_seen_together_with_who_is_heard() {
    let mut sim = Sim::started(3, 1);
    for phase in 0..50 {
        sim.act(Action::Burst(1, false, ms(190)));
        sim.run(ms(90)).unwrap();
        sim.act(Action::Pause(1, ms(165), false));
        let plane = &sim.nodes[1].plane;
        let said = Input::Applied(plane.version, plane.told.clone());
        sim.input(1, said).unwrap();
        sim.run(ms(1000 + phase)).unwrap();
        sim.check_covered().unwrap();
    }
}
