//! Every shape a broken network can have: all ways to split three and five nodes into sides, all patterns of broken ways between three, a sample of those
//! between five. Each: break, wait, see that every side keeps its promise; mend, and see that all of them hold again.

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

/// Breaks the ways whose bits are set, in the order of (from, to), and says what may then be.
fn broken(nodes: usize, pattern: u64, ears: Ears, seed: u64) -> Result<Tally, Breach> {
    let ways: Vec<(usize, usize)> = (0..nodes)
        .flat_map(|a| (0..nodes).map(move |b| (a, b)))
        .filter(|(a, b)| a != b)
        .collect();
    let mut sim = farm(nodes, seed)?;
    sim.ears = ears;
    for (i, (a, b)) in ways.iter().enumerate() {
        if pattern & (1 << i) != 0 {
            sim.act(Action::Cut(*a, *b));
        }
    }
    sim.run(sim.detection() * 2 + ms(100))?;
    for _ in 0..50 {
        sim.run(ms(10))?;
        check_owners(&sim, nodes, pattern)?;
    }
    heal(&mut sim, nodes == 3)?;
    Ok(Tally::of(&sim))
}

/// Of five nodes, so many broken ways leave sides that are whole in themselves; that some way between two sides still works in one direction makes
/// them no less a partition.
const A_PARTITION: u32 = 8;

/// No bucket has two owners that talk both ways, or with the same third node; nor, short of a partition, of which one hears the other, unless one is
/// deaf to everybody and cannot know it: frames come in, and no command of two that talk. While somebody talks with all others every bucket is served; and so it
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
    let cut_off = |a: usize| sim.ears == Ears::Nothing && unhearing(a);
    for a in 0..nodes {
        for b in a + 1..nodes {
            let both = sim.nodes[a].plane.open.both(&sim.nodes[b].plane.open).len();
            let linked = hears(a, b) || hears(b, a);
            let go_between = (0..nodes).any(|c| talk(a, c) && talk(b, c));
            let apart = !linked || deaf(a) || deaf(b) || (nodes > 3 && pattern.count_ones() >= A_PARTITION);
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
    let served: usize = sim.counts().iter().sum();
    if all_talk_with && served < crate::id::BUCKETS {
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
fn some_patterns_of_broken_ways_between_five() {
    let run = |seed: u64| {
        let mut rng = Rng::new(seed);
        // Few broken ways as often as many.
        let share = rng.range(30..=900);
        let pattern = (0..20).fold(0, |pattern, way| pattern | u64::from(rng.chance(share)) << way);
        let ears = rng.pick(&[Ears::Frames, Ears::Commands, Ears::Nothing]);
        broken(5, pattern, ears, seed)
    };
    run_all(
        "farm::tests::partitions::some_patterns_of_broken_ways_between_five",
        1000,
        true,
        run,
    );
}
