//! Farms in which ways break and heal at random, and one node talks with all others all the time: by it they can always agree, so that nobody ever accepts what
//! another node accepts, whoever hears whom. Each seed is one farm.

use std::time::Duration;

use super::action::Action;
use super::promises::Breach;
use super::rng::Rng;
use super::runs::{Tally, run_all};
use super::sim::{Sim, ms, us};

/// How long things happen.
const SPAN: Duration = ms(4000);

/// Lets `time` pass, and looks at any two nodes every half millisecond.
fn pass(sim: &mut Sim, time: Duration) -> Result<(), Breach> {
    let end = sim.now + time;
    while sim.now < end {
        sim.run(us(500).min(end - sim.now))?;
        for b in 0..sim.nodes.len() {
            for a in 0..b {
                let (one, other) = (&sim.nodes[a].plane, &sim.nodes[b].plane);
                let leased = sim.now < one.lease_until && sim.now < other.lease_until;
                let both = one.open.both(&other.open).len();
                if leased && both > 0 {
                    return Err(sim.breach(format!("s{a} and s{b} both accept {both}")));
                }
            }
        }
    }
    Ok(())
}

/// Something that leaves the hub and its ways alone.
fn happening(rng: &mut Rng, nodes: usize, hub: usize) -> Vec<Action> {
    let others: Vec<usize> = (0..nodes).filter(|n| *n != hub).collect();
    let i = rng.pick(&others);
    let rest: Vec<usize> = others.into_iter().filter(|n| *n != i).collect();
    let j = rng.pick(&rest);
    match rng.range(0..=19) {
        0..=4 => vec![Action::Cut(i, j)],
        5..=8 => vec![Action::Cut(i, j), Action::Cut(j, i)],
        9..=11 => vec![Action::Mend(i, j)],
        12..=14 => vec![Action::Mend(i, j), Action::Mend(j, i)],
        15 => vec![Action::Crash(i)],
        16..=17 => vec![Action::Restart(i), Action::Start(i)],
        18 => vec![Action::Stop(i)],
        _ => vec![Action::Pause(i, ms(rng.range(20..=400)), rng.chance(500))],
    }
}

fn run(seed: u64) -> Result<Tally, Breach> {
    let mut rng = Rng::new(seed);
    let nodes = rng.pick(&[3, 4, 4, 5]);
    let hub = rng.index(nodes);
    let mut sim = Sim::started(nodes, seed);
    sim.apply_time = rng.pick(&[us(200), ms(5), ms(20)]);
    // Where few run the module there is nobody else to object.
    for node in 0..nodes {
        if rng.chance(400) {
            sim.act(Action::Stop(node));
        }
    }
    pass(&mut sim, ms(900))?;
    let end = sim.now + SPAN;
    while sim.now < end {
        for action in happening(&mut rng, nodes, hub) {
            sim.act(action);
        }
        let pause = match rng.range(0..=3) {
            0 => rng.range(0..=5),
            1 => rng.range(0..=60),
            _ => rng.range(0..=400),
        };
        pass(&mut sim, ms(pause))?;
    }
    sim.act(Action::MendAll);
    for node in 0..nodes {
        sim.act(Action::Restart(node));
        sim.act(Action::Start(node));
    }
    pass(&mut sim, ms(2500))?;
    sim.check_covered()?;
    Ok(Tally::of(&sim))
}

#[test]
fn nobody_accepts_what_another_accepts() {
    run_all(
        "farm::tests::bridged::nobody_accepts_what_another_accepts",
        400,
        true,
        run,
    );
}
