//! Random runs: each seed is one farm, one set of faults, and all promises.

use std::time::Duration;

use super::action::Action;
use super::ears::Ears;
use super::node::Clock;
use super::promises::Breach;
use super::rng::Rng;
use super::runs::{Tally, run_all};
use super::sim::{Sim, ms, us};

/// Which faults a run has.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    /// Nothing fails: modules start, stop and change their weights, nodes come and go in order.
    Planned,
    /// Loss up to 5 %, bursts of it, copies, disorder, crashes, restarts, pauses, modules that come and go.
    Mild,
    /// And loss up to 20 %, cuts in one direction, partitions.
    Hard,
}

impl Kind {
    fn of(seed: u64) -> Self {
        match seed % 5 {
            0 | 1 => Self::Mild,
            2 | 3 => Self::Hard,
            _ => Self::Planned,
        }
    }
}

/// How many nodes the farm of a seed has: mostly few, of every kind of run some with many.
fn size(seed: u64, rng: &mut Rng) -> usize {
    match seed / 5 % 400 {
        399 => 32,
        99 | 299 => 16,
        49 | 149 | 199 | 249 | 349 => 8,
        _ => rng.pick(&[2, 3, 3, 4, 5]),
    }
}

/// Heartbeats of the busiest node in any second without faults, as multiples of those of a node at rest.
const MOST_BEATS: usize = 10;

/// How long faults come in.
const SPAN: u64 = 1500;

fn fault(rng: &mut Rng, nodes: usize, kind: Kind) -> Action {
    let i = rng.index(nodes);
    let j = (i + 1 + rng.index(nodes - 1)) % nodes;
    match rng.range(0..=if kind == Kind::Mild { 14 } else { 18 }) {
        0 => Action::Crash(i),
        1..=2 => Action::Restart(i),
        3..=4 => Action::Pause(i, ms(rng.range(20..=600)), rng.chance(500)),
        5..=6 => Action::Start(i),
        7 => Action::Stop(i),
        8 => Action::ForceStop(i),
        9 => Action::Ready(i, rng.chance(700)),
        10 => Action::Weight(i, rng.range(0..=3) as u16),
        11 => Action::Leave(i),
        12..=13 => Action::Burst(i, rng.chance(500), ms(rng.range(20..=190))),
        14 => Action::Slow(i, ms(rng.range(0..=60))),
        15..=16 => Action::Cut(i, j),
        17 => Action::Mend(i, j),
        _ => Action::MendAll,
    }
}

fn farm(seed: u64, kind: Kind, rng: &mut Rng) -> Sim {
    let nodes = size(seed, rng);
    let lans = if rng.chance(250) { 2 } else { 1 };
    let mut sim = Sim::new(nodes, lans, seed);
    sim.net.loss = match kind {
        Kind::Planned => rng.range(0..=10),
        Kind::Mild => rng.range(0..=50),
        Kind::Hard => rng.range(0..=200),
    };
    sim.net.duplication = rng.range(0..=100);
    sim.net.late = if rng.chance(300) { rng.range(1..=50) } else { 0 };
    sim.flows = if rng.chance(400) { 30 } else { 0 };
    sim.ears = rng.pick(&[Ears::Frames, Ears::Commands, Ears::Nothing]);
    sim.apply_time = rng.pick(&[us(200), ms(5), ms(5), ms(20)]);
    if rng.chance(500) {
        sim.let_clients_connect();
    }
    for node in &mut sim.nodes {
        node.clock = Clock {
            offset: us(rng.range(0..=3_600_000_000)),
            fast: rng.range(0..=4000) as i32 - 2000,
            ..Clock::default()
        };
    }
    if rng.chance(200) {
        let i = rng.index(nodes);
        sim.nodes[i].slower = ms(rng.range(0..=60));
    }
    sim
}

/// Starts all nodes, each at its own moment.
fn start(sim: &mut Sim, rng: &mut Rng, within: u64) {
    for node in 0..sim.nodes.len() {
        let at = sim.now + ms(rng.range(0..=within));
        sim.at(at, Action::Restart(node));
        sim.at(at + ms(1), Action::Start(node));
    }
}

fn add_faults(sim: &mut Sim, rng: &mut Rng, lans: usize, kind: Kind) {
    let (start, nodes) = (sim.now, sim.nodes.len());
    for _ in 0..rng.range(3..=14) {
        let at = start + ms(rng.range(300..=SPAN));
        let action = fault(rng, nodes, kind);
        sim.at(at, action);
        if let Action::Restart(i) = action {
            sim.at(at + ms(5), Action::Start(i));
        }
    }
    if kind == Kind::Hard && rng.chance(500) {
        let side = rng.range(1..=(1 << nodes) - 2);
        let from = rng.range(300..=1000);
        let inside = |n: usize| side & (1 << n) != 0;
        let pairs = (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b)));
        for (a, b) in pairs.filter(|(a, b)| inside(*a) != inside(*b)) {
            sim.at(start + ms(from), Action::Cut(a, b));
        }
        sim.at(start + ms(from + rng.range(100..=800)), Action::MendAll);
    }
    if lans == 2 {
        sim.at(start + ms(rng.range(300..=SPAN)), Action::LanDown(rng.index(2)));
    }
}

/// How long the farm may need after the last fault.
fn settling(sim: &Sim) -> Duration {
    sim.detection() + ms(500) + 4 * sim.slowest_plane()
}

fn run(seed: u64) -> Result<Tally, Breach> {
    run_of(seed, |_| ()).map(|sim| Tally::of(&sim))
}

/// The run of a seed, of a farm that `prepare` sees before anything happens.
pub(super) fn run_of(seed: u64, prepare: impl FnOnce(&mut Sim)) -> Result<Sim, Breach> {
    let kind = Kind::of(seed);
    let mut rng = Rng::new(seed ^ 0xfa11_7000);
    let mut sim = farm(seed, kind, &mut rng);
    prepare(&mut sim);
    let lans = sim.cluster.lans.len();
    let began = sim.now;
    if kind == Kind::Planned {
        plan(&mut sim, &mut rng)?;
    } else {
        if kind == Kind::Mild {
            sim.longest_overlap = Some(2 * sim.detection());
        }
        start(&mut sim, &mut rng, 400);
        add_faults(&mut sim, &mut rng, lans, kind);
        sim.run(ms(SPAN))?;
    }
    // No more faults.
    sim.act(Action::Loss(0));
    sim.act(Action::MendAll);
    sim.net.late = 0;
    sim.run(sim.longest_pause())?;
    sim.limit_rate(MOST_BEATS);
    sim.run(settling(&sim))?;
    sim.check_covered()?;
    sim.check_served()?;
    check_rest(&mut sim, began)?;
    Ok(sim)
}

/// A change is told at once, but nobody talks without end, and nobody moves anything without a cause.
fn check_rest(sim: &mut Sim, began: Duration) -> Result<(), Breach> {
    let most = sim.sent.iter().max().copied().unwrap_or(0) / sim.cluster.lans.len() as u64;
    // Ten times those of a node at rest: four nudges and four answers in a pulse, and news.
    let limit = (200.0 * (sim.now - began).as_secs_f64()) as u64;
    if most > limit {
        return Err(sim.breach(format!(
            "a node sent {most} heartbeats on a lan, {limit} are the most: {:?}; {} maps were proposed",
            sim.sent,
            sim.proposals(began)
        )));
    }
    let (settled, sent) = (sim.now, sim.sent.clone());
    sim.run(ms(300))?;
    sim.check_covered()?;
    sim.check_served()?;
    let restless = sim.proposals(settled);
    if restless > 0 {
        return Err(sim.breach(format!("{restless} maps were proposed although nothing happened")));
    }
    // Six pulses, one more for the beginning, and as many for news that is still under way: slow data planes tell late that they work.
    let busy = sim
        .sent
        .iter()
        .zip(&sent)
        .map(|(now, before)| (now - before) / sim.cluster.lans.len() as u64);
    let busiest = busy.max().unwrap_or(0);
    if sim.connections.is_empty() && sim.flows == 0 && busiest > 14 {
        return Err(sim.breach(format!(
            "a node at rest sent {busiest} heartbeats in 300 ms, 7 are due and 14 allowed"
        )));
    }
    Ok(())
}

/// One change after another, each before or after the one before has settled; some node is always ready.
fn plan(sim: &mut Sim, rng: &mut Rng) -> Result<(), Breach> {
    let nodes = sim.nodes.len();
    start(sim, rng, 100);
    sim.run(settling(sim))?;
    sim.check_covered()?;
    sim.planned = true;
    for _ in 0..rng.range(3..=10) {
        let i = rng.index(nodes);
        // One that serves, and goes on while the others may go.
        let keeps = (i + 1 + rng.index(nodes - 1)) % nodes;
        let serves = sim.nodes[keeps].ready() && sim.nodes[keeps].local.weights[0] > 0 && sim.counts()[keeps] > 0;
        let n = &sim.nodes[i];
        if n.farm.is_none() {
            sim.act(Action::Restart(i));
            sim.act(Action::Start(i));
        } else if !n.ready() {
            sim.act(Action::Start(i));
        } else if serves {
            let action = match rng.range(0..=4) {
                0..=1 => Action::Weight(i, rng.range(0..=3) as u16),
                2 => Action::Ready(i, false),
                _ => Action::Stop(i),
            };
            sim.act(action);
            if action == Action::Stop(i) && rng.chance(500) {
                sim.run(settling(sim))?;
                if sim.nodes[i].local.state == crate::api::ModuleState::Stop {
                    sim.act(Action::Leave(i));
                }
            }
        }
        sim.run(ms(rng.pick(&[1, 5, 20, 100, 400])))?;
        if let Some(i) = (0..nodes).find(|i| sim.nodes[*i].stopping) {
            // A module that stops has handed over what it had.
            sim.run(settling(sim))?;
            if sim.nodes[i].stopping {
                return Err(sim.breach(format!("s{i} does not come to an end")));
            }
        }
    }
    Ok(())
}

#[test]
fn promises_hold() {
    run_all(
        "farm::tests::faults::promises_hold",
        if cfg!(debug_assertions) { 200 } else { 2000 },
        true,
        run,
    );
}
