//! What a heartbeat costs its receiver: numbers for people, from a settled farm in which every node hears every other at every pulse.

use std::io::Write;
use std::time::Duration;

use super::action::Action;
use super::sim::{Sim, ms};

/// Mean time of one received heartbeat, and of all that one node receives in a second.
fn cost(nodes: usize, modules: usize) -> (Duration, Duration) {
    let mut sim = Sim::new(nodes, 1, 1);
    sim.others = (1..modules).map(|i| format!("m{i}").parse().unwrap()).collect();
    for node in 0..nodes {
        sim.act(Action::Restart(node));
        sim.act(Action::Start(node));
    }
    sim.run(ms(2000)).unwrap();
    sim.check_covered().unwrap();
    sim.spent = (Duration::ZERO, 0);
    sim.run(ms(2000)).unwrap();
    let each = sim.spent.0 / sim.spent.1;
    (each, sim.spent.0 / 2 / nodes as u32)
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
