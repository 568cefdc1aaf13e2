//! From two nodes to thirty-two: how long a start and a crash take, and that steady loss costs nobody its place.

use std::io::Write;
use std::time::Duration;

use super::action::Action;
use super::runs::{Tally, run_all};
use super::sim::{Sim, id, ms, us};
use crate::farm::Event;
use crate::id::{BUCKETS, NodeSet};
use crate::membership;

/// Lets time pass until the farm is whole; how long that took, `most` at most.
fn time_until_covered(sim: &mut Sim, most: Duration) -> Duration {
    let began = sim.now;
    loop {
        let whole = sim.counts().iter().sum::<usize>() == BUCKETS && sim.check_covered().is_ok();
        if whole {
            return sim.now - began;
        }
        assert!(
            sim.now < began + most,
            "not whole after {most:?}: {:?}",
            sim.check_covered()
        );
        sim.run(us(500)).unwrap();
    }
}

#[test]
fn thirty_two_nodes_that_start_together_are_one_farm_within_two_seconds() {
    let mut sim = Sim::new(32, 1, 1);
    for node in 0..32 {
        let at = sim.now + us(sim.rng.range(0..=100_000));
        sim.at(at, Action::Restart(node));
        sim.at(at, Action::Start(node));
    }
    let took = time_until_covered(&mut sim, ms(2000));
    sim.run(ms(300)).unwrap();
    sim.check_covered().unwrap();
    let all: NodeSet = (0..32).map(id).collect();
    for node in 0..32 {
        assert_eq!(sim.farm(node).membership().view(), all, "s{node}");
    }
    drop(std::io::stderr().write_all(format!("cold start of 32 nodes: whole after {took:?}\n").as_bytes()));
}

/// Of ten crashes at different moments of a pulse, each of another node: the longest time until all buckets are open again.
fn slowest_takeover(nodes: usize) -> Duration {
    let crash = |k: usize| {
        let mut sim = Sim::started(nodes, k as u64);
        let phase = us(sim.rng.range(0..=50_000));
        sim.run(phase).unwrap();
        sim.act(Action::Crash(k * 7 % nodes));
        let most = sim.detection() + ms(60);
        time_until_covered(&mut sim, most)
    };
    (0..if nodes < 16 { 10 } else { 3 }).map(crash).max().unwrap()
}

#[test]
fn a_crash_takes_detection_and_sixty_milliseconds_however_many_nodes_there_are() {
    for nodes in [2, 3, 8, 16, 32] {
        let slowest = slowest_takeover(nodes);
        drop(
            std::io::stderr().write_all(format!("crash of one of {nodes}: taken over within {slowest:?}\n").as_bytes()),
        );
    }
}

/// Ten minutes of eight nodes at 5 % loss: everybody stays in the view of everybody, and nothing moves.
#[test]
fn steady_loss_evicts_nobody_in_ten_minutes() {
    let run = |seed: u64| {
        let mut sim = Sim::started(8, seed);
        sim.net.loss = 50;
        let began = sim.now;
        sim.log.clear();
        sim.run(Duration::from_secs(600))?;
        let evictions: Vec<_> = sim
            .log
            .iter()
            .filter(|(.., e)| {
                matches!(
                    e,
                    Event::Membership(membership::Event::ViewChanged { .. } | membership::Event::Fenced(_))
                )
            })
            .collect();
        let silences = |e: &Event| matches!(e, Event::Membership(membership::Event::PeerDown { .. }));
        let silent = sim.log.iter().filter(|(.., e)| silences(e)).count();
        let line = format!(
            "5 % loss, 8 nodes, 10 minutes: {silent} times a peer was not heard, {} changes of a view\n",
            evictions.len()
        );
        drop(std::io::stderr().write_all(line.as_bytes()));
        if !evictions.is_empty() || sim.proposals(began) > 0 {
            let some = &evictions[..evictions.len().min(5)];
            return Err(sim.breach(format!("{} changes of a view, {some:?}", evictions.len())));
        }
        sim.check_covered()?;
        Ok(Tally::of(&sim))
    };
    run_all(
        "farm::tests::scale::steady_loss_evicts_nobody_in_ten_minutes",
        2,
        false,
        run,
    );
}
