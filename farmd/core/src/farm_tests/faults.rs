//! Hundreds of runs with random faults.

use super::promises::Breach;
use super::sim::{Action, Rng, Sim, ms};

/// Which faults a run has.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Kind {
    /// Loss up to 5 %, copies, disorder, crashes, restarts, pauses, modules that come and go.
    Mild,
    /// And loss up to 20 %, cuts in one direction, partitions.
    Hard,
}

fn random_action(rng: &mut Rng, nodes: usize, kind: Kind) -> Action {
    let i = rng.range(0..=nodes as u64 - 1) as usize;
    let j = (i + rng.range(1..=nodes as u64 - 1) as usize) % nodes;
    let pause = Action::Pause(i, ms(rng.range(20..=600)), rng.chance(500));
    let weight = Action::Weight(i, rng.range(0..=3) as u16);
    match rng.range(0..=if kind == Kind::Mild { 11 } else { 15 }) {
        0 => Action::Crash(i),
        1..=2 => Action::Restart(i),
        3..=4 => pause,
        5..=6 => Action::Start(i),
        7 => Action::Stop(i),
        8 => Action::ForceStop(i),
        9 => Action::Ready(i, rng.chance(700)),
        10 => weight,
        11 => Action::Leave(i),
        12..=13 => Action::Cut(i, j),
        14 => Action::Mend(i, j),
        _ => Action::MendAll,
    }
}

fn run(seed: u64, kind: Kind) -> Result<(), Breach> {
    let mut rng = Rng::new(seed ^ 0xfa11_7000);
    let nodes = rng.range(2..=5) as usize;
    let lans = if rng.chance(250) { 2 } else { 1 };
    let mut sim = Sim::new(nodes, lans, seed);
    sim.loss = rng.range(0..=if kind == Kind::Mild { 50 } else { 200 });
    sim.duplication = rng.range(0..=100);
    sim.flows = if rng.chance(400) { 30 } else { 0 };
    if kind == Kind::Mild {
        sim.longest_overlap = Some(2 * sim.detection());
    }
    let start = sim.now;
    for node in 0..nodes {
        let at = start + ms(rng.range(0..=400));
        sim.at(at, Action::Restart(node));
        sim.at(at + ms(1), Action::Start(node));
    }
    let faults = rng.range(3..=14);
    let span = 1500;
    for _ in 0..faults {
        let at = start + ms(rng.range(300..=span));
        let action = random_action(&mut rng, nodes, kind);
        sim.at(at, action);
        if let Action::Restart(i) = action {
            sim.at(at + ms(5), Action::Start(i));
        }
    }
    if kind == Kind::Hard && rng.chance(500) {
        let side = rng.range(1..=(1 << nodes) - 2);
        let from = rng.range(300..=1000);
        let inside = |n: usize| side & (1 << n) != 0;
        for (a, b) in (0..nodes)
            .flat_map(|a| (0..nodes).map(move |b| (a, b)))
            .filter(|(a, b)| inside(*a) != inside(*b))
        {
            sim.at(start + ms(from), Action::Cut(a, b));
        }
        sim.at(start + ms(from + rng.range(100..=800)), Action::MendAll);
    }
    if lans == 2 {
        sim.at(start + ms(rng.range(300..=span)), Action::LanDown(1));
    }
    sim.run(ms(span))?;
    // No more faults.
    sim.act(Action::Loss(0));
    sim.act(Action::MendAll);
    sim.run(sim.longest_pause())?;
    let limit = sim.detection() + ms(500);
    sim.run(limit)?;
    sim.check_covered()?;
    // A change is told at once, but nobody talks without end.
    let most = sim.sent.iter().max().copied().unwrap_or(0) / lans as u64;
    let limit = 200 * (sim.now - start).as_secs_f64() as u64;
    if most > limit {
        return Err(Breach(format!(
            "a node sent {most} heartbeats on a lan, {limit} are the most: {:?}",
            sim.sent
        )));
    }
    let settled = sim.now;
    sim.run(ms(300))?;
    sim.check_covered()?;
    let restless = sim.proposals(settled);
    if restless > 0 {
        return Err(Breach(format!(
            "{restless} maps were proposed although nothing happened"
        )));
    }
    Ok(())
}

/// One seed if `FARM_SEED` names it, else `seeds`, or as many as `FARM_RUNS` says.
fn run_all(seeds: std::ops::Range<u64>, kind: Kind) {
    let one = std::env::var("FARM_SEED").ok().map(|seed| seed.parse::<u64>().unwrap());
    let more = std::env::var("FARM_RUNS").ok().map(|runs| runs.parse::<u64>().unwrap());
    let seeds = one.map_or(seeds.start..more.map_or(seeds.end, |runs| seeds.start + runs), |seed| {
        seed..seed + 1
    });
    let mut failed = Vec::new();
    for seed in seeds {
        if let Err(Breach(text)) = run(seed, kind) {
            let name = format!("{kind:?}").to_lowercase();
            failed.push(format!("FARM_SEED={seed} ({name} faults): {text}"));
        }
    }
    assert!(
        failed.is_empty(),
        "{} runs failed\n{}",
        failed.len(),
        failed[..failed.len().min(8)].join("\n")
    );
}

#[test]
fn promises_hold_under_mild_faults() {
    run_all(0..150, Kind::Mild);
}

#[test]
fn promises_hold_under_hard_faults() {
    run_all(1000..1150, Kind::Hard);
}
