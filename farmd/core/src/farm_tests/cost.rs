//! What a heartbeat costs its receiver: numbers for people, from a settled farm in which every node hears every other at every pulse.

use std::io::Write;
use std::time::Duration;

use super::action::Action;
use super::sim::{Sim, ms};

/// Median time of one received heartbeat, which a busy machine spoils less than the mean, and what that is for all that one node receives in a second.
fn cost(nodes: usize, modules: usize) -> (Duration, Duration) {
    let mut sim = Sim::new(nodes, 1, 1);
    sim.others = (1..modules).map(|i| format!("m{i}").parse().unwrap()).collect();
    for node in 0..nodes {
        sim.act(Action::Restart(node));
        sim.act(Action::Start(node));
    }
    sim.run(ms(2000)).unwrap();
    sim.check_covered().unwrap();
    sim.spent = Some(Vec::new());
    sim.run(ms(2000)).unwrap();
    let mut spent = sim.spent.unwrap();
    spent.sort();
    let each = spent[spent.len() / 2];
    (each, each * (spent.len() / 2 / nodes) as u32)
}

#[test]
#[ignore = "prints numbers; cargo test --release -p farm-core --lib farm::tests::cost -- --ignored"]
fn of_one_heartbeat() {
    for modules in [1, 8] {
        for nodes in [3, 8, 32] {
            let (each, second) = cost(nodes, modules);
            let line =
                format!("{nodes:2} nodes, {modules} modules: {each:?} for a heartbeat, {second:?} in a second\n");
            drop(std::io::stderr().write_all(line.as_bytes()));
        }
    }
}
