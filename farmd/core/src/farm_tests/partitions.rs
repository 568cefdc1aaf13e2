//! Every shape a broken network can have: all ways to split three and five nodes into sides, all patterns of broken ways between two, three and five, of those
//! between five one of each class that is the same up to the names of the nodes: 9608 of them, 3600 by default, all with `FARM_RUNS=1201` or `--release`. Each: break,
//! wait, see that every side keeps its promise; mend, and see that all of them hold again.

use std::time::Duration;

use super::action::Action;
use super::ears::Ears;
use super::node::least_moves;
use super::promises::Breach;
use super::rng::Rng;
use super::runs::{Tally, run_all};
use super::sim::{Sim, ms, us};
use crate::balance::assign::BucketMap;

/// Buckets in which some connections are left when they move.
const FLOWS: u64 = 20;

/// All ways to split `n` nodes: for each node the number of its side.
fn splits(n: usize) -> Vec<Vec<usize>> {
    let mut all = vec![vec![0]];
    for _ in 1..n {
        all = all
            .into_iter()
            .flat_map(|split: Vec<usize>| {
                let sides = split.iter().max().unwrap() + 2;
                (0..sides).map(move |side| split.iter().copied().chain([side]).collect())
            })
            .collect();
    }
    all
}

fn sides(split: &[usize]) -> Vec<Vec<usize>> {
    let of = |side: usize| (0..split.len()).filter(|n| split[*n] == side).collect();
    (0..=split.iter().copied().max().unwrap()).map(of).collect()
}

/// A farm at work; each seed breaks it at another moment.
fn farm(nodes: usize, seed: u64) -> Result<Sim, Breach> {
    let mut sim = Sim::started(nodes, seed);
    sim.flows = FLOWS;
    sim.flow_time = ms(2000);
    sim.let_clients_connect();
    let phase = us(sim.rng.range(0..=100_000));
    sim.run(ms(200) + phase)?;
    Ok(sim)
}

fn map(sim: &Sim, node: usize) -> BucketMap {
    sim.farm(node).map(&sim.module, 0).unwrap().clone()
}

/// All ways work again: one farm, exact shares, all connections are served. If the sides meet `at_once` the new map is one side's with the fewest moves.
fn heal(sim: &mut Sim, at_once: bool) -> Result<(), Breach> {
    let before: Vec<BucketMap> = (0..sim.nodes.len()).map(|n| map(sim, n)).collect();
    sim.act(Action::MendAll);
    sim.run(sim.detection() + ms(250))?;
    sim.check_covered()?;
    sim.check_served()?;
    let after = map(sim, 0);
    let fewest = before
        .iter()
        .any(|before| before.moves_to(&after) == least_moves(before, &after));
    if fewest || !at_once {
        return Ok(());
    }
    Err(sim.breach("the merged map is no side's with the fewest moves".to_owned()))
}

/// Cut between the sides; each side is a farm of its own.
fn split(split: &[usize], seed: u64) -> Result<Tally, Breach> {
    let nodes = split.len();
    let mut sim = farm(nodes, seed)?;
    let began = sim.now;
    let pairs = (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b)));
    for (a, b) in pairs.filter(|(a, b)| split[*a] != split[*b]) {
        sim.act(Action::Cut(a, b));
    }
    sim.run(sim.detection() + ms(150))?;
    let sides = sides(split);
    for side in &sides {
        sim.check_covered_by(side)?;
    }
    let settled = sim.now;
    sim.run(ms(500))?;
    for side in &sides {
        sim.check_covered_by(side)?;
    }
    let restless = sim.proposals(if sides.len() == 1 { began } else { settled });
    if restless > 0 {
        return Err(sim.breach(format!("{restless} maps were proposed although nothing happened")));
    }
    heal(&mut sim, true)?;
    Ok(Tally::of(&sim))
}

/// All ways between `nodes` nodes, in the order of (from, to): bit `i` of a pattern is set if way `i` is broken.
fn ways(nodes: usize) -> Vec<(usize, usize)> {
    (0..nodes)
        .flat_map(|a| (0..nodes).map(move |b| (a, b)))
        .filter(|(a, b)| a != b)
        .collect()
}

/// All orders of `n` nodes.
fn orders(n: usize) -> Vec<Vec<usize>> {
    (0..n).fold(vec![Vec::new()], |orders, last| {
        let with = |order: &Vec<usize>, at: usize| {
            let mut order = order.clone();
            order.insert(at, last);
            order
        };
        orders
            .iter()
            .flat_map(|order| (0..=last).map(move |at| with(order, at)))
            .collect()
    })
}

/// The same pattern, of nodes that are called otherwise: what was node `i` is node `order[i]`.
fn renamed(pattern: u64, order: &[usize]) -> u64 {
    let ways = ways(order.len());
    let place = |(a, b): (usize, usize)| order[a] * (order.len() - 1) + order[b] - usize::from(order[b] > order[a]);
    let broken = ways.iter().enumerate().filter(|(i, _)| pattern & (1 << i) != 0);
    broken.fold(0, |renamed, (_, way)| renamed | 1 << place(*way))
}

/// Of the patterns that are the same up to the names of the nodes the lowest number each.
fn classes(nodes: usize) -> Vec<u64> {
    let orders = orders(nodes);
    let mut seen = vec![false; 1 << ways(nodes).len()];
    let mut classes = Vec::new();
    for pattern in 0..seen.len() {
        if !seen[pattern] {
            classes.push(pattern as u64);
            orders
                .iter()
                .for_each(|order| seen[renamed(pattern as u64, order) as usize] = true);
        }
    }
    classes
}

/// Breaks the ways whose bits are set, says what may then be, for so long, and mends them.
fn break_and_mend(sim: &mut Sim, pattern: u64, ears: Ears, watch: Duration) -> Result<(), Breach> {
    let nodes = sim.nodes.len();
    sim.ears = ears;
    for (i, (a, b)) in ways(nodes).into_iter().enumerate() {
        if pattern & (1 << i) != 0 {
            sim.act(Action::Cut(a, b));
        }
    }
    sim.run(sim.detection() * 2 + ms(100))?;
    let end = sim.now + watch;
    while sim.now < end {
        sim.run(ms(10))?;
        check_owners(sim, nodes, pattern)?;
    }
    heal(sim, nodes == 3)
}

/// One pattern between a few nodes.
fn broken(nodes: usize, pattern: u64, ears: Ears, seed: u64) -> Result<Tally, Breach> {
    let mut sim = farm(nodes, seed)?;
    break_and_mend(&mut sim, pattern, ears, ms(500))?;
    Ok(Tally::of(&sim))
}

/// Patterns that one farm of five goes through, one after the other.
const ROW: usize = 8;

/// One row of `classes`, each with names that follow from the seed, as does what comes in at nodes that hear nobody; the seeds from 0 on have all of them, and then
/// all of them again with other names.
fn row(classes: &[u64], orders: &[Vec<usize>], seed: u64) -> Result<Tally, Breach> {
    let rows = classes.len() / ROW;
    let mut rng = Rng::new(seed);
    let mut sim = farm(5, seed)?;
    // Each pattern leaves some to the next ones.
    sim.flows = FLOWS / 4;
    sim.flow_time = ms(1000);
    for i in 0..ROW {
        let order = &orders[rng.index(orders.len())];
        let pattern = renamed(classes[seed as usize % rows + i * rows], order);
        let ears = rng.pick(&[Ears::Frames, Ears::Commands, Ears::Nothing]);
        let phase = us(rng.range(0..=100_000));
        sim.run(phase)?;
        break_and_mend(&mut sim, pattern, ears, ms(250))
            .map_err(|Breach(text)| Breach(format!("{text}\n  pattern {pattern:#b}, {ears:?} come in")))?;
    }
    Ok(Tally::of(&sim))
}

/// Of four nodes or five, so many broken ways leave sides that are whole in themselves; that some way between two sides still works in one direction makes
/// them no less a partition.
const fn a_partition(nodes: usize) -> u32 {
    2 * (nodes as u32 - 1)
}

/// No bucket has two owners that talk both ways, or with the same third node; nor, short of a partition, of which one hears the other, unless one is
/// deaf to everybody and cannot know it: frames come in, and no command of two that talk; nor, of four or five, if it hears somebody, but nothing that the other one says gets
/// to it by anybody: that one is as good as dead to it. While somebody talks with all others, or of three or more each with all but one, every bucket is served; and so it
/// is by the others where all but one talk, and nothing comes in at that one.
fn check_owners(sim: &Sim, nodes: usize, pattern: u64) -> Result<(), Breach> {
    let hears = |a: usize, b: usize| !sim.net.is_cut(b, a);
    let talk = |a: usize, b: usize| a != b && hears(a, b) && hears(b, a);
    let unhearing = |a: usize| (0..nodes).all(|b| a == b || !hears(a, b));
    let told = |a: usize| (0..nodes).any(|c| c != a && hears(c, a) && (0..nodes).any(|d| d != a && talk(c, d)));
    let deaf = |a: usize| match sim.ears {
        Ears::Frames => unhearing(a),
        Ears::Commands => unhearing(a) && !told(a),
        Ears::Nothing => false,
    };
    let reaches = |from: usize, to: usize| {
        let mut know = vec![from];
        while let Some(next) = (0..nodes).find(|n| !know.contains(n) && know.iter().any(|by| hears(*n, *by))) {
            know.push(next);
        }
        know.contains(&to)
    };
    let unknowing = |a: usize, b: usize| nodes > 3 && !unhearing(a) && !reaches(b, a);
    let cut_off = |a: usize| sim.ears == Ears::Nothing && unhearing(a);
    for a in 0..nodes {
        for b in a + 1..nodes {
            let both = sim.nodes[a].plane.open.both(&sim.nodes[b].plane.open).len();
            let linked = hears(a, b) || hears(b, a);
            let go_between = (0..nodes).any(|c| talk(a, c) && talk(b, c));
            let unknown = unknowing(a, b) || unknowing(b, a);
            let apart =
                !linked || unknown || deaf(a) || deaf(b) || (nodes > 3 && pattern.count_ones() >= a_partition(nodes));
            let excused = !talk(a, b) && !go_between && apart;
            if both > 0 && sim.counts()[a] > 0 && sim.counts()[b] > 0 && !excused {
                return Err(sim.breach(format!(
                    "{} broken ways, {pattern:#b}: s{a} and s{b} both accept {both} buckets (talk {}, go-between {go_between}, linked {linked}): {:?}",
                    pattern.count_ones(),
                    talk(a, b),
                    sim.counts()
                )));
            }
        }
    }
    let all_talk_with = (0..nodes).any(|c| !cut_off(c) && (0..nodes).all(|n| n == c || talk(c, n) || cut_off(n)));
    let missed = |n: usize| (0..nodes).filter(|m| *m != n && !talk(n, *m)).count();
    let all_but_one = nodes > 2 && (0..nodes).all(|n| missed(n) <= 1);
    let served: usize = sim.counts().iter().sum();
    if (all_talk_with || all_but_one) && served < crate::id::BUCKETS {
        return Err(sim.breach(format!(
            "{} broken ways, {pattern:#b}: {served} buckets are accepted: {:?}",
            pattern.count_ones(),
            sim.counts()
        )));
    }
    Ok(())
}

#[test]
fn there_are_as_many_splits_as_bell_counted() {
    assert_eq!([1, 2, 3, 4, 5].map(|n| splits(n).len()), [1, 2, 5, 15, 52]);
    assert_eq!(sides(&[0, 1, 0]), [vec![0, 2], vec![1]]);
}

#[test]
fn every_split_of_three_and_five() {
    let all: Vec<Vec<usize>> = [3, 5].into_iter().flat_map(splits).collect();
    let run = |seed: u64| split(&all[seed as usize], seed);
    run_all(
        "farm::tests::partitions::every_split_of_three_and_five",
        all.len() as u64,
        false,
        run,
    );
}

#[test]
fn every_pattern_of_broken_ways_between_three() {
    let ears = [Ears::Frames, Ears::Commands, Ears::Nothing];
    let run = |seed: u64| broken(3, seed % 64, ears[seed as usize / 64], seed);
    run_all(
        "farm::tests::partitions::every_pattern_of_broken_ways_between_three",
        64 * 3,
        false,
        run,
    );
}

#[test]
fn every_pattern_of_broken_ways_between_four() {
    let (classes, orders) = (classes(4), orders(4));
    let ears = [Ears::Frames, Ears::Commands, Ears::Nothing];
    let all = classes.len() as u64;
    let run = |seed: u64| {
        let order = &orders[Rng::new(seed).index(orders.len())];
        let pattern = renamed(classes[(seed % all) as usize], order);
        broken(4, pattern, ears[(seed / all % 3) as usize], seed)
    };
    run_all(
        "farm::tests::partitions::every_pattern_of_broken_ways_between_four",
        all * 3,
        true,
        run,
    );
}

#[test]
fn every_pattern_of_broken_ways_between_two() {
    let ears = [Ears::Frames, Ears::Commands, Ears::Nothing];
    let run = |seed: u64| broken(2, seed % 4, ears[seed as usize / 4 % 3], seed);
    run_all(
        "farm::tests::partitions::every_pattern_of_broken_ways_between_two",
        4 * 3 * 10,
        false,
        run,
    );
}

#[test]
fn there_are_as_many_patterns_as_have_been_counted() {
    // Directed graphs up to the names of their nodes: https://oeis.org/A000273.
    assert_eq!([1, 2, 3, 4, 5].map(|n| classes(n).len()), [1, 3, 16, 218, 9608]);
    // One way from the first node to the second; the third becomes the second, the first the third.
    assert_eq!(
        renamed(0b1, &[2, 0, 1]),
        1 << ways(3).iter().position(|way| *way == (2, 0)).unwrap()
    );
    // As the lowest of all names, not by what has been seen.
    let (all, orders) = (classes(4), orders(4));
    for pattern in 0..1 << 12 {
        let lowest = orders.iter().map(|order| renamed(pattern, order)).min();
        assert!(
            lowest.is_some_and(|lowest| all.binary_search(&lowest).is_ok()),
            "{pattern:#b}"
        );
    }
}

#[test]
fn patterns_of_broken_ways_between_five() {
    let (classes, orders) = (classes(5), orders(5));
    assert_eq!(classes.len() % ROW, 0);
    let all = (classes.len() / ROW) as u64;
    run_all(
        "farm::tests::partitions::patterns_of_broken_ways_between_five",
        if cfg!(debug_assertions) { 450 } else { all },
        true,
        |seed| row(&classes, &orders, seed),
    );
}

/// In these a node proposed that knew by others of a member, and did not know whether it runs the module: of those that hear it none had come to say so yet.
#[test]
fn a_member_that_nobody_speaks_for_may_run_the_module() {
    let (classes, orders) = (classes(5), orders(5));
    for seed in [1223, 1445, 1494, 1659, 2766] {
        if let Err(Breach(text)) = row(&classes, &orders, seed) {
            panic!("row {seed}: {text}");
        }
    }
}
