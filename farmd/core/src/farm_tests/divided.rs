//! Farms whose network is broken in one way or in half: who serves, who steps out, and when.

use std::time::Duration;

use super::action::Action;
use super::sim::{Sim, ms};
use crate::config::PartitionPolicy;
use crate::farm::Event;
use crate::id::{BUCKETS, ModuleName};

/// Lets `time` pass; nobody accepts what somebody else accepts for a single moment, cut or not.
fn run_without_two_owners(sim: &mut Sim, time: Duration) {
    let end = sim.now + time;
    while sim.now < end {
        sim.run(Duration::from_micros(500)).unwrap();
        for a in 0..sim.nodes.len() {
            for b in a + 1..sim.nodes.len() {
                let (one, other) = (&sim.nodes[a].plane, &sim.nodes[b].plane);
                let leased = sim.now < one.lease_until && sim.now < other.lease_until;
                let both = one.open.both(&other.open).len();
                assert!(
                    !leased || both == 0,
                    "s{a} and s{b} both accept {both} at {:?}",
                    sim.now
                );
            }
        }
    }
}

fn cut(sim: &mut Sim, one: &[usize], other: &[usize]) {
    for (a, b) in one.iter().flat_map(|a| other.iter().map(move |b| (*a, *b))) {
        sim.act(Action::Cut(a, b));
        sim.act(Action::Cut(b, a));
    }
}

fn started(nodes: usize, policy: PartitionPolicy, seed: u64) -> Sim {
    let mut sim = Sim::new(nodes, 1, seed);
    for node in 0..nodes {
        sim.nodes[node].local.partition = policy;
        sim.act(Action::Restart(node));
        sim.act(Action::Start(node));
    }
    sim.run(ms(1000)).unwrap();
    sim.check_covered().unwrap();
    sim
}

fn withheld(sim: &Sim, node: usize) -> bool {
    sim.farm(node).withheld(&sim.module).is_some()
}

#[test]
fn a_node_that_nobody_hears_has_closed_before_the_others_open() {
    for (nodes, seed) in (2..=5).flat_map(|n| (0..4).map(move |s| (n, s))) {
        for mute in 0..nodes {
            let mut sim = Sim::started(nodes, 100 + seed);
            sim.run(Duration::from_micros(seed * 12_500)).unwrap();
            for other in (0..nodes).filter(|n| *n != mute) {
                sim.act(Action::Cut(mute, other));
            }
            run_without_two_owners(&mut sim, ms(400));
            assert_eq!(sim.counts()[mute], 0, "s{mute} of {nodes}");
            assert_eq!(sim.counts().iter().sum::<usize>(), BUCKETS, "{:?}", sim.counts());
            sim.act(Action::MendAll);
            run_without_two_owners(&mut sim, ms(400));
            sim.check_covered().unwrap();
        }
    }
}

#[test]
fn one_pair_that_does_not_talk_evicts_nobody_and_hand_overs_go_by_the_third() {
    for (a, b, both) in [
        (0, 1, false),
        (1, 0, false),
        (0, 1, true),
        (0, 2, true),
        (1, 2, true),
        (2, 1, false),
    ] {
        let mut sim = Sim::started(3, 31);
        let before = sim.counts();
        let since = sim.now;
        sim.act(Action::Cut(a, b));
        if both {
            sim.act(Action::Cut(b, a));
        }
        run_without_two_owners(&mut sim, ms(1500));
        assert_eq!(
            (sim.counts(), sim.proposals(since)),
            (before, 0),
            "{a} {b}: nothing moves"
        );
        for node in 0..3 {
            assert_eq!(sim.farm(node).membership().view().len(), 3, "{a} {b} at s{node}");
        }
        // Everybody in turn gives its share away and takes it back.
        for node in 0..3 {
            sim.act(Action::Weight(node, 0));
            run_without_two_owners(&mut sim, ms(300));
            let mut counts = sim.counts();
            assert_eq!(counts.remove(node), 0, "{a} {b}: s{node} gives everything");
            assert_eq!(counts, [2048, 2048], "{a} {b}");
            sim.act(Action::Weight(node, 1));
            run_without_two_owners(&mut sim, ms(300));
            let counts = sim.counts();
            assert!(counts.iter().all(|c| (1365..=1366).contains(c)), "{a} {b}: {counts:?}");
        }
        // The one in between goes: of the two left one serves, or each its part if neither hears the other.
        let third = 3 - a - b;
        sim.act(Action::Crash(third));
        sim.run(sim.detection() + ms(300)).unwrap();
        let counts = sim.counts();
        if both {
            assert_eq!((counts[a], counts[b]), (BUCKETS, BUCKETS));
        } else {
            assert_eq!((counts[a], counts[b]), (0, BUCKETS), "{b} does not hear {a}");
        }
        sim.act(Action::MendAll);
        sim.run(ms(600)).unwrap();
        sim.check_covered().unwrap();
    }
}

#[test]
fn pairs_of_which_no_two_share_a_node_evict_nobody_and_the_rest_passes_on_what_is_said() {
    for (nodes, one_way) in [(4, None), (4, Some([true, true])), (4, Some([true, false])), (6, None)] {
        let mut sim = Sim::started(nodes, 34);
        let before = sim.counts();
        let since = sim.now;
        let pairs: Vec<(usize, usize)> = (0..nodes).step_by(2).map(|a| (a, a + 1)).collect();
        let cut_all = |sim: &mut Sim| {
            for (i, &(a, b)) in pairs.iter().enumerate() {
                if one_way.is_none_or(|ways| ways[i]) {
                    sim.act(Action::Cut(a, b));
                }
                if one_way.is_none_or(|ways| !ways[i]) {
                    sim.act(Action::Cut(b, a));
                }
            }
        };
        cut_all(&mut sim);
        run_without_two_owners(&mut sim, ms(1500));
        let of = format!("{nodes} nodes, {one_way:?}");
        assert_eq!((sim.counts(), sim.proposals(since)), (before, 0), "{of}: nothing moves");
        for node in 0..nodes {
            assert_eq!(sim.farm(node).membership().view().len(), nodes, "{of}, s{node}");
        }
        let share = BUCKETS / nodes;
        for node in 0..nodes {
            sim.act(Action::Weight(node, 0));
            run_without_two_owners(&mut sim, ms(300));
            assert_eq!(sim.counts()[node], 0, "{of}: s{node} gives everything");
            assert_eq!(sim.counts().iter().sum::<usize>(), BUCKETS, "{of}");
            sim.act(Action::Weight(node, 1));
            run_without_two_owners(&mut sim, ms(300));
            let counts = sim.counts();
            assert!(
                counts.iter().all(|c| (share..=share + 1).contains(c)),
                "{of}: {counts:?}"
            );
        }
        // Its partner talks with all that are left.
        for node in 0..nodes {
            sim.act(Action::Crash(node));
            let crash_and_move = sim.detection() + ms(300);
            run_without_two_owners(&mut sim, crash_and_move);
            assert_eq!(sim.counts().iter().sum::<usize>(), BUCKETS, "{of}: without s{node}");
            assert_eq!(sim.counts()[node], 0, "{of}");
            sim.act(Action::Restart(node));
            sim.act(Action::Start(node));
            run_without_two_owners(&mut sim, ms(1000));
            let counts = sim.counts();
            assert!(
                counts.iter().all(|c| (share..=share + 1).contains(c)),
                "{of}: {counts:?}"
            );
        }
        sim.act(Action::MendAll);
        run_without_two_owners(&mut sim, ms(600));
        sim.check_covered().unwrap();
        assert!((0..nodes).all(|node| sim.farm(node).passes_on().is_empty()), "{of}");
    }
}

/// A third that does not run the module passes on what the two say, whether or not it runs another one.
#[test]
fn a_pair_that_alone_runs_a_module_and_does_not_talk_serves_together_by_a_third() {
    for (seed, ways) in [&[(0, 1)][..], &[(1, 0)], &[(0, 1), (1, 0)]].iter().enumerate() {
        for has_other in [false, true] {
            let of = format!("{ways:?}, {has_other}");
            let mut sim = Sim::started(3, 40 + seed as u64);
            if has_other {
                let other: ModuleName = "other".parse().unwrap();
                for node in 0..3 {
                    let now = sim.nodes[node].clock.local(sim.now);
                    let local = sim.nodes[node].local.clone();
                    let farm = sim.nodes[node].farm.as_mut().unwrap();
                    farm.set_module(now, other.clone(), local);
                }
            }
            sim.act(Action::Stop(2));
            run_without_two_owners(&mut sim, ms(800));
            for (from, to) in *ways {
                sim.act(Action::Cut(*from, *to));
            }
            let shares = [BUCKETS / 2, BUCKETS / 2, 0];
            let end = sim.now + ms(1500);
            while sim.now < end {
                run_without_two_owners(&mut sim, ms(10));
                assert_eq!(sim.counts(), shares, "{of}");
            }
            assert!((0..2).all(|node| !withheld(&sim, node)), "{of}");
            // They agree on something new, and one takes over from the other.
            sim.act(Action::Weight(1, 3));
            run_without_two_owners(&mut sim, ms(600));
            assert_eq!(sim.counts(), [BUCKETS / 4, 3 * BUCKETS / 4, 0], "{of}");
            sim.act(Action::Crash(0));
            run_without_two_owners(&mut sim, ms(800));
            assert_eq!(sim.counts(), [0, BUCKETS, 0], "{of}");
            sim.act(Action::Restart(0));
            sim.act(Action::Start(0));
            run_without_two_owners(&mut sim, ms(1200));
            assert_eq!(sim.counts(), [BUCKETS / 4, 3 * BUCKETS / 4, 0], "{of}");
            sim.act(Action::MendAll);
            run_without_two_owners(&mut sim, ms(600));
            sim.check_covered().unwrap();
        }
    }
}

/// What others tell of a node goes out of date when it is heard again: after a way that was broken for a while breaks once more, an old word is no sign of its death.
#[test]
fn a_way_that_breaks_again_and_again_makes_no_two_owners() {
    for (seed, whole) in (60..).zip((10..400).step_by(15)) {
        for ways in [&[(1, 0)][..], &[(0, 1)], &[(0, 1), (1, 0)]] {
            let mut sim = Sim::started(3, seed);
            sim.act(Action::Stop(2));
            run_without_two_owners(&mut sim, ms(800));
            for _ in 0..3 {
                for (from, to) in ways {
                    sim.act(Action::Cut(*from, *to));
                }
                run_without_two_owners(&mut sim, ms(700));
                for (from, to) in ways {
                    sim.act(Action::Mend(*from, *to));
                }
                run_without_two_owners(&mut sim, ms(whole));
            }
            sim.act(Action::MendAll);
            run_without_two_owners(&mut sim, ms(800));
            sim.check_covered().unwrap();
        }
    }
}

#[test]
fn by_majority_the_larger_part_serves_and_of_two_halves_the_one_with_the_first_node() {
    for (nodes, one) in [
        (3, vec![0, 1]),
        (3, vec![1, 2]),
        (4, vec![0, 3]),
        (2, vec![0]),
        (5, vec![1, 2, 4]),
    ] {
        let other: Vec<usize> = (0..nodes).filter(|n| !one.contains(n)).collect();
        let mut sim = started(nodes, PartitionPolicy::Majority, 33);
        let since = sim.now;
        cut(&mut sim, &one, &other);
        sim.run(sim.detection() + ms(100)).unwrap();
        let sum = |part: &[usize]| part.iter().map(|n| sim.counts()[*n]).sum::<usize>();
        assert_eq!((sum(&one), sum(&other)), (BUCKETS, 0), "{one:?} of {nodes}");
        for node in 0..nodes {
            assert_eq!(withheld(&sim, node), other.contains(&node));
        }
        let events = sim.log.iter().filter(|(at, node, event)| {
            *at > since
                && other.contains(node)
                && matches!(event, Event::Withheld { why: Some(why), .. } if why.contains("majority"))
        });
        assert_eq!(events.count(), other.len(), "each says so once");
        sim.act(Action::MendAll);
        sim.run(ms(400)).unwrap();
        sim.check_covered().unwrap();
    }
}

#[test]
fn with_a_witness_only_a_part_that_reaches_it_serves() {
    let mut sim = started(3, PartitionPolicy::Witness, 34);
    cut(&mut sim, &[0], &[1, 2]);
    sim.nodes[1].local.witness_answers = true;
    sim.nodes[2].local.witness_answers = true;
    sim.act(Action::Weight(1, 1));
    sim.act(Action::Weight(2, 1));
    sim.run(sim.detection() + ms(200)).unwrap();
    assert_eq!(sim.counts(), [0, 2048, 2048]);
    sim.act(Action::MendAll);
    sim.run(ms(400)).unwrap();
    sim.check_covered().unwrap();
}

/// Sets which nodes the witness answers, and tells the cores.
fn witness_answers(sim: &mut Sim, answered: &[usize]) {
    for node in 0..sim.nodes.len() {
        sim.nodes[node].local.witness_answers = answered.contains(&node);
        sim.act(Action::Weight(node, 1));
    }
}

#[test]
fn where_the_witness_answers_some_nodes_of_a_part_these_serve_for_all_of_it() {
    for (nodes, dead, answered) in [
        (3, vec![2], vec![1]),
        (3, vec![2], vec![0]),
        (3, vec![0], vec![2]),
        (5, vec![4], vec![1, 3]),
        (5, vec![0, 1], vec![4]),
    ] {
        let mut sim = started(nodes, PartitionPolicy::Witness, 36);
        witness_answers(&mut sim, &answered);
        for node in &dead {
            sim.act(Action::Crash(*node));
        }
        sim.run(sim.detection() + ms(200)).unwrap();
        let serve = |sim: &Sim| answered.iter().map(|n| sim.counts()[*n]).sum::<usize>();
        assert_eq!(
            serve(&sim),
            BUCKETS,
            "{dead:?} dead, {answered:?} answered: {:?}",
            sim.counts()
        );
        assert_eq!(sim.counts().iter().sum::<usize>(), BUCKETS);
        for node in (0..nodes).filter(|n| !dead.contains(n)) {
            assert_eq!(withheld(&sim, node), !answered.contains(&node));
        }
        // Then it answers all of them.
        let all: Vec<usize> = (0..nodes).collect();
        witness_answers(&mut sim, &all);
        run_without_two_owners(&mut sim, ms(400));
        sim.check_covered().unwrap();
    }
}

#[test]
fn a_part_that_does_not_serve_keeps_its_connections_through_the_merge() {
    let mut sim = started(3, PartitionPolicy::Majority, 35);
    sim.flows = 1000;
    sim.flow_time = ms(60_000);
    cut(&mut sim, &[0], &[1, 2]);
    sim.run(sim.detection() + ms(200)).unwrap();
    assert_eq!(sim.counts()[0], 0);
    let plan = sim.farm(0).group_plan(&sim.module, 0).unwrap();
    let draining = |s: &&crate::balance::plan::BucketState| **s == crate::balance::plan::BucketState::Draining;
    let kept = plan.states.iter().filter(draining).count();
    assert!(kept > 1000, "connections in {kept} buckets go on");
    sim.act(Action::MendAll);
    // The promise that nobody resets what another one has is checked after every event.
    sim.run(ms(1000)).unwrap();
    let plan = sim.farm(0).group_plan(&sim.module, 0).unwrap();
    assert!(plan.states.iter().filter(draining).count() > 0, "and after the merge");
}

#[test]
fn a_node_that_is_heard_again_by_one_before_the_other_takes_nothing_twice() {
    for (mute, first, seed) in (0..3).flat_map(|m| {
        [1, 2]
            .into_iter()
            .flat_map(move |f| (0..6).map(move |s| (m, (m + f) % 3, s)))
    }) {
        let mut sim = Sim::started(3, 400 + seed);
        let others: Vec<usize> = (0..3).filter(|n| *n != mute).collect();
        for other in &others {
            sim.act(Action::Cut(mute, *other));
        }
        run_without_two_owners(&mut sim, ms(600 + 37 * seed));
        sim.act(Action::Mend(mute, first));
        run_without_two_owners(&mut sim, ms(900));
        sim.act(Action::MendAll);
        run_without_two_owners(&mut sim, ms(500));
        sim.check_covered().unwrap();
    }
}

#[test]
fn a_part_without_a_ready_server_displaces_nobody_when_it_comes_back() {
    for (lonely, seed) in (0..3).flat_map(|l| (0..4).map(move |s| (l, s))) {
        let mut sim = Sim::started(3, 500 + seed);
        let others: Vec<usize> = (0..3).filter(|n| *n != lonely).collect();
        cut(&mut sim, &[lonely], &others);
        sim.run(sim.detection() + ms(200 + 13 * seed)).unwrap();
        // It serves alone, and then no longer: the others know nothing of these maps.
        sim.act(Action::Ready(lonely, false));
        sim.run(ms(100)).unwrap();
        let served = |sim: &Sim| others.iter().map(|n| sim.counts()[*n]).sum::<usize>();
        assert_eq!((served(&sim), sim.counts()[lonely]), (BUCKETS, 0));
        sim.act(Action::MendAll);
        let end = sim.now + ms(1000);
        while sim.now < end {
            sim.run(Duration::from_micros(500)).unwrap();
            assert_eq!(served(&sim), BUCKETS, "s{lonely} back, at {:?}", sim.now);
        }
        let map = |node: usize| sim.farm(node).map(&sim.module, 0).cloned();
        assert_eq!(map(lonely), map(others[0]), "it sends on to those that serve");
        // Ready again, it gets its share.
        sim.act(Action::Ready(lonely, true));
        sim.run(ms(500)).unwrap();
        assert!(sim.counts()[lonely] > 0);
        sim.check_covered().unwrap();
    }
}

#[test]
fn nodes_that_may_serve_again_at_the_same_time_do_not_take_each_other_to_be_out() {
    for (nodes, dead) in [(3, 2), (3, 0), (4, 1)] {
        let mut sim = started(nodes, PartitionPolicy::Witness, 37);
        witness_answers(&mut sim, &[]);
        sim.act(Action::Crash(dead));
        sim.run(sim.detection() + ms(300)).unwrap();
        assert_eq!(sim.counts().iter().sum::<usize>(), 0, "{:?}", sim.counts());
        let all: Vec<usize> = (0..nodes).collect();
        witness_answers(&mut sim, &all);
        run_without_two_owners(&mut sim, ms(600));
        sim.check_covered().unwrap();
    }
}

#[test]
fn a_node_that_may_serve_and_is_not_ready_does_not_go_round_in_circles() {
    let mut sim = started(3, PartitionPolicy::Witness, 38);
    witness_answers(&mut sim, &[0]);
    sim.act(Action::Crash(2));
    sim.run(sim.detection() + ms(200)).unwrap();
    assert_eq!(sim.counts()[0], BUCKETS);
    sim.act(Action::Ready(0, false));
    sim.run(ms(200)).unwrap();
    let since = sim.now;
    sim.run(ms(2000)).unwrap();
    assert_eq!((sim.counts()[0], sim.proposals(since)), (0, 0));
    sim.act(Action::Ready(0, true));
    sim.run(ms(300)).unwrap();
    assert_eq!(sim.counts()[0], BUCKETS);
}

/// Four nodes of which the first two do not talk, and run the module alone if `pair_alone`.
fn with_a_pair(seed: u64, pair_alone: bool) -> Sim {
    let mut sim = Sim::started(4, seed);
    if pair_alone {
        sim.act(Action::Stop(2));
        sim.act(Action::Stop(3));
        run_without_two_owners(&mut sim, ms(800));
    }
    cut(&mut sim, &[0], &[1]);
    run_without_two_owners(&mut sim, ms(1000));
    sim
}

/// The same when the last one has died and is to start again.
fn with_a_pair_and_a_start(seed: u64, pair_alone: bool) -> Sim {
    let mut sim = with_a_pair(seed, pair_alone);
    sim.act(Action::Crash(3));
    run_without_two_owners(&mut sim, ms(600));
    sim
}

/// Its first heartbeats are late at one of the pair, or those of that one at it: nobody can know that they never come.
#[test]
fn a_node_that_starts_and_is_late_at_one_of_a_pair_puts_nobody_out() {
    for (late, to, phase) in (0..2).flat_map(|late| {
        [false, true]
            .into_iter()
            .flat_map(move |to| (0..10).map(move |p| (late, to, 5 * p)))
    }) {
        let mut sim = with_a_pair_and_a_start(70 + phase, false);
        run_without_two_owners(&mut sim, ms(phase));
        let (from, to) = if to { (late, 3) } else { (3, late) };
        sim.act(Action::Cut(from, to));
        let since = sim.now;
        sim.act(Action::Restart(3));
        sim.act(Action::Start(3));
        run_without_two_owners(&mut sim, ms(140));
        sim.act(Action::Mend(from, to));
        run_without_two_owners(&mut sim, ms(1200));
        let is_out = |e: &Event| matches!(e, Event::Membership(crate::membership::Event::Fenced(Some(_))));
        let out = sim.log.iter().find(|(at, _, e)| *at >= since && is_out(e));
        assert!(out.is_none(), "s{from} late at s{to}, {phase}: {out:?}");
        assert_eq!(sim.counts(), [BUCKETS / 4; 4], "s{from} late at s{to}, {phase}");
        sim.act(Action::MendAll);
        run_without_two_owners(&mut sim, ms(600));
        sim.check_covered().unwrap();
    }
}

/// Whether it is not heard or does not hear, and whether or not it and the one that talks with all run the module.
#[test]
fn who_never_talks_with_a_node_that_starts_is_out_before_others_take_its_buckets() {
    let cases = [false, true]
        .into_iter()
        .flat_map(|alone| [(0, 3), (3, 0), (1, 3), (3, 1)].map(|way| (alone, way)));
    for ((pair_alone, (from, to)), phase) in cases.flat_map(|case| (0..10).map(move |p| (case, 5 * p))) {
        let mut sim = with_a_pair_and_a_start(90 + phase, pair_alone);
        run_without_two_owners(&mut sim, ms(phase));
        sim.act(Action::Cut(from, to));
        sim.act(Action::Restart(3));
        if !pair_alone {
            sim.act(Action::Start(3));
        }
        run_without_two_owners(&mut sim, ms(2500));
        let out = if from == 3 { to } else { from };
        let counts = sim.counts();
        assert_eq!(
            (counts[out], counts.iter().sum::<usize>()),
            (0, BUCKETS),
            "s{from} to s{to}, pair alone: {pair_alone}, {phase}: {counts:?}"
        );
        sim.act(Action::MendAll);
        run_without_two_owners(&mut sim, ms(1000));
        sim.check_covered().unwrap();
    }
}

/// Three do not talk with each other, so one of them is out. When it talks with the second again, the first has to go, who cannot know it yet.
#[test]
fn who_has_to_go_when_a_way_heals_is_out_before_others_take_its_buckets() {
    let cases = [false, true]
        .into_iter()
        .flat_map(|alone| (0..10).map(move |p| (alone, 5 * p)));
    for (pair_alone, phase) in cases {
        let mut sim = with_a_pair(120 + phase, pair_alone);
        cut(&mut sim, &[3], &[0, 1]);
        run_without_two_owners(&mut sim, ms(1000 + phase));
        assert!(sim.farm(3).membership().fenced().is_some(), "the highest of three goes");
        sim.act(Action::Mend(1, 3));
        run_without_two_owners(&mut sim, ms(phase % 15));
        sim.act(Action::Mend(3, 1));
        run_without_two_owners(&mut sim, ms(2000));
        let counts = sim.counts();
        assert_eq!(
            (counts[0], counts.iter().sum::<usize>()),
            (0, BUCKETS),
            "pair alone: {pair_alone}, {phase}: {counts:?}"
        );
        sim.act(Action::MendAll);
        run_without_two_owners(&mut sim, ms(1000));
        sim.check_covered().unwrap();
    }
}
