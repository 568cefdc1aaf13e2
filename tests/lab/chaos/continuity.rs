//! Established connections through everything that can be done to a farm in order, several things at a time, and through a crash.
//!
//! A crowd of connections is held from four clients while every node is stopped and started, its daemon restarted in place and anew, drained and given other weights, two nodes
//! at a time. A change that ends the application or its address on a node ends that node's own connections; every other end is a broken
//! promise, and so is a wrong byte anywhere.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::{MODULE, Outcome, PROFILES, Progress, Rig, RigConfig, Series, Table, cell_ms, ms, quantile};
use crate::crowd::{Crowd, CrowdConfig, Kind, Life};
use crate::http::Failure;
use crate::pinger::NodeNumber;
use crate::process::wait_until;
use crate::random::Random;

/// Clients that hold connections, each with two addresses.
const CLIENTS: usize = 4;

/// Exchanges and pieces of uploads a second over all connections.
const EXCHANGES: f64 = 1000.0;

/// How long a node stays dead after every client of its connections that sends has sent.
const AFTERMATH: Duration = Duration::from_secs(2);

/// Something done to one node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Act {
    StopStart,
    Restart,
    KillDaemon,
    Reload,
    Drain,
    Weight,
    Crash,
}

impl Act {
    const fn name(self) -> &'static str {
        match self {
            Self::StopStart => "module stopped and started",
            Self::Restart => "farmd stopped in order and started",
            Self::KillDaemon => "farmd killed (-9) and started",
            Self::Reload => "farmd restarted in place",
            Self::Drain => "drained and undrained",
            Self::Weight => "weight 3, then as before",
            Self::Crash => "power cut",
        }
    }

    /// True if it ends the connections of the node it is done to.
    const fn ends_own(self) -> bool {
        match self {
            Self::StopStart | Self::Restart | Self::KillDaemon | Self::Crash => true,
            Self::Reload | Self::Drain | Self::Weight => false,
        }
    }

    /// What `farm` must know for it.
    const fn verb(self) -> &'static str {
        match self {
            Self::StopStart | Self::Restart | Self::KillDaemon | Self::Crash => "start",
            Self::Reload => "reload",
            Self::Drain => "drain",
            Self::Weight => "weight",
        }
    }

    fn perform(self, rig: &Rig, number: NodeNumber, aftermath: Duration) -> Result<()> {
        let node = rig.node(number)?;
        let breath = Duration::from_millis(500);
        match self {
            Self::StopStart => {
                node.farm_ok(&["stop", MODULE])?;
                std::thread::sleep(breath);
                node.farm_ok(&["start", MODULE])?;
            }
            Self::Restart => {
                node.stop_farmd()?;
                std::thread::sleep(breath);
                rig.start_again(node)?;
            }
            Self::KillDaemon => {
                node.signal_farmd("KILL")?;
                node.wait_farmd_end(Duration::from_secs(10))?;
                std::thread::sleep(breath);
                rig.start_again(node)?;
            }
            // Two nodes never do it at the same time: the second is refused until the first is back.
            Self::Reload => {
                wait_until(Duration::from_secs(20), "the reload", || node.farm_ok(&["reload"]).ok()).map(drop)?
            }
            Self::Drain => {
                node.farm_ok(&["drain", node.name(), "-m", MODULE, "--no-wait"])?;
                std::thread::sleep(breath);
                node.farm_ok(&["undrain", node.name(), "-m", MODULE])?;
            }
            Self::Weight => {
                node.farm_ok(&["weight", node.name(), "3", "-m", MODULE])?;
                std::thread::sleep(breath);
                node.farm_ok(&["weight", node.name(), "default", "-m", MODULE])?;
            }
            Self::Crash => {
                node.crash()?;
                std::thread::sleep(aftermath);
                rig.bring_back(&[node])?;
            }
        }
        Ok(())
    }
}

/// What was done to whom, from when to when.
#[derive(Clone, Copy, Debug)]
struct Deed {
    act: Act,
    node: NodeNumber,
    begun: Instant,
    done: Instant,
}

impl Deed {
    /// True if `life` may have ended because of it.
    fn may_end(&self, life: &Life) -> bool {
        self.act.ends_own() && self.node == life.node && life.opened <= self.done && life.ended >= self.begun
    }
}

/// Holds `connections` connections through every act on each of the first `on` nodes of a farm of three, and through a power cut.
///
/// # Errors
/// The farm does not start or does not come back, the limit of open files is too low, or `say` ends the run.
pub fn run(seed: u64, connections: usize, on: usize, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("continuity", seed);
    need_files(connections)?;
    let rig = Rig::serve(&RigConfig {
        clients: CLIENTS,
        ..RigConfig::new(3, PROFILES[0])
    })?;
    let known = |acts: &[Act]| -> Vec<Act> { acts.iter().copied().filter(|act| rig.knows(act.verb())).collect() };
    let gentle = known(&[Act::Reload, Act::Drain, Act::Weight]);
    let numbers: Vec<NodeNumber> = (1..=rig.lab.nodes.len().min(on) as NodeNumber).collect();
    let mut random = Random::new(seed);
    let phases = [
        (
            "restarts in place, drains, weights",
            plan(&mut random, &gentle, &numbers),
        ),
        (
            "stops and restarts",
            plan(&mut random, &[Act::StopStart, Act::Restart, Act::KillDaemon], &numbers),
        ),
        ("power cut", crashes(&mut random, &numbers, 1)),
    ];
    let mut kinds = Table::new(
        "Connections by kind: held in all (those that replaced others included), ended with their own node, broken without a reason",
        &[
            "phase",
            "kind",
            "held",
            "whole to the end",
            "ended with their node",
            "broken",
        ],
    );
    let (mut lives, mut deeds) = (Vec::new(), Vec::new());
    for (phase, steps) in phases.into_iter().filter(|(_, steps)| !steps.is_empty()) {
        say(phase)?;
        // A new crowd each, spread over all nodes: clients that were sent away once gather where they were sent.
        let (held, done) = go_through(&rig, connections, &steps, say)?;
        judge(&mut outcome, &mut kinds, phase, &held, &done);
        lives.extend(held);
        deeds.extend(done);
    }
    outcome.tables.push(kinds);
    acts_table(&mut outcome, &lives, &deeds);
    resets(&mut outcome, &lives, &deeds);
    let left_out: Vec<&str> = [Act::Reload, Act::Drain, Act::Weight]
        .into_iter()
        .filter(|act| !gentle.contains(act))
        .map(Act::name)
        .collect();
    if !left_out.is_empty() {
        outcome
            .notes
            .push(format!("This `farm` does not know: {}.", left_out.join("; ")));
    }
    Ok(outcome)
}

/// Between two exchanges, or pieces of an upload, of one connection.
fn pause(connections: usize) -> Duration {
    Duration::from_secs_f64((connections as f64 / 2.0 / EXCHANGES).max(0.2))
}

/// Acts that are done together, each with its delay.
type Step = Vec<(Act, NodeNumber, Duration)>;

/// Holds a crowd through `steps`; every connection there was, and everything that was done.
fn go_through(rig: &Rig, connections: usize, steps: &[Step], say: Progress<'_>) -> Result<(Vec<Life>, Vec<Deed>)> {
    let crowds = rig
        .clients()
        .into_iter()
        .map(|client| {
            let config = CrowdConfig {
                to: Rig::tcp().to_vec(),
                count: connections.div_ceil(CLIENTS),
                pause: pause(connections),
                replace: true,
            };
            Crowd::start(client, config)
        })
        .collect::<Result<Vec<_>>>()?;
    let full = || {
        crowds
            .iter()
            .try_for_each(|crowd| crowd.wait_full(Duration::from_secs(60)))
    };
    full()?;
    say(&format!(
        "{} connections established",
        crowds.iter().map(Crowd::open).sum::<usize>()
    ))?;
    let mut deeds = Vec::new();
    for step in steps {
        let names: Vec<String> = step
            .iter()
            .map(|(act, node, _)| format!("node{node} {}", act.name()))
            .collect();
        say(&names.join(", "))?;
        deeds.extend(perform(rig, step, pause(connections) + AFTERMATH)?);
        rig.wait_all()?;
        full()?;
    }
    let mut lives = Vec::new();
    for crowd in crowds {
        lives.extend(crowd.stop()?);
    }
    Ok((lives, deeds))
}

/// Every act on every node, alone or beside another one.
fn plan(random: &mut Random, acts: &[Act], numbers: &[NodeNumber]) -> Vec<Step> {
    let mut all: Vec<(Act, NodeNumber)> = acts
        .iter()
        .flat_map(|act| numbers.iter().map(move |node| (*act, *node)))
        .collect();
    let mut steps = Vec::new();
    while !all.is_empty() {
        let first = all.swap_remove(random.below(all.len()));
        let mut step = vec![(first.0, first.1, Duration::ZERO)];
        // Of two steps one has a second act on another node, which begins while the first is under way.
        let beside = all.iter().position(|(_, node)| *node != first.1);
        if let Some(place) = beside.filter(|_| random.below(2) == 0) {
            let (act, node) = all.swap_remove(place);
            step.push((act, node, random.up_to(Duration::from_millis(800))));
        }
        steps.push(step);
    }
    steps
}

/// Power cuts of nodes of the seed's choice.
fn crashes(random: &mut Random, numbers: &[NodeNumber], count: usize) -> Vec<Step> {
    let mut steps = Vec::new();
    for _ in 0..count {
        let moment = random.up_to(Duration::from_millis(100));
        steps.extend(random.pick(numbers).map(|node| vec![(Act::Crash, *node, moment)]));
    }
    steps
}

fn perform(rig: &Rig, step: &[(Act, NodeNumber, Duration)], aftermath: Duration) -> Result<Vec<Deed>> {
    let deeds = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        let running: Vec<_> = step
            .iter()
            .map(|(act, node, delay)| {
                let deeds = &deeds;
                scope.spawn(move || {
                    std::thread::sleep(*delay);
                    let begun = Instant::now();
                    act.perform(rig, *node, aftermath)?;
                    deeds.lock().unwrap_or_else(PoisonError::into_inner).push(Deed {
                        act: *act,
                        node: *node,
                        begun,
                        done: Instant::now(),
                    });
                    Ok::<_, anyhow::Error>(())
                })
            })
            .collect();
        running.into_iter().try_for_each(|one| match one.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;
    Ok(deeds.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn judge(outcome: &mut Outcome, table: &mut Table, phase: &str, lives: &[Life], deeds: &[Deed]) {
    let unexplained = |life: &Life| {
        matches!(life.broken, Some(Failure::BadAnswer(_))) || !deeds.iter().any(|deed| deed.may_end(life))
    };
    let kinds = [Kind::Idle, Kind::Talk, Kind::Upload, Kind::Half];
    for kind in kinds {
        let own = || lives.iter().filter(|life| life.kind == kind);
        let broken = own().filter(|life| life.broken.is_some() && unexplained(life)).count();
        let ends = own().filter(|life| life.broken.is_some()).count();
        table.row([
            phase.to_owned(),
            format!("{kind:?}").to_lowercase(),
            own().count().to_string(),
            (own().count() - ends).to_string(),
            (ends - broken).to_string(),
            broken.to_string(),
        ]);
    }
    let broken: Vec<&Life> = lives
        .iter()
        .filter(|life| life.broken.is_some() && unexplained(life))
        .collect();
    if let Some(life) = broken.first() {
        let mut how: BTreeMap<String, usize> = BTreeMap::new();
        for life in &broken {
            let failure = life.broken.as_ref().map(ToString::to_string).unwrap_or_default();
            *how.entry(format!("node{} {:?}: {failure}", life.node, life.kind))
                .or_default() += 1;
        }
        let near: Vec<String> = deeds
            .iter()
            .filter(|deed| deed.begun <= life.ended && life.ended <= deed.done + Duration::from_secs(2))
            .map(|deed| format!("node{} {}", deed.node, deed.act.name()))
            .collect();
        let age = life.ended.saturating_duration_since(life.opened);
        outcome.violations.push(format!(
            "continuity, {phase}: {} connections broke that nothing may break: {how:?}; the first from {} at the age of {} ms while {near:?}",
            broken.len(),
            life.source,
            age.as_millis()
        ));
    }
}

/// What became of the connections of the nodes that something was done to.
fn acts_table(outcome: &mut Outcome, lives: &[Life], deeds: &[Deed]) {
    let mut table = Table::new(
        "Connections of the nodes themselves that something was done to",
        &["what", "times", "had", "went on", "ended", "how"],
    );
    let mut acts: Vec<Act> = deeds.iter().map(|deed| deed.act).collect();
    acts.sort_unstable();
    acts.dedup();
    for act in acts {
        let (mut had, mut ended) = (0, 0);
        let mut how: BTreeMap<String, usize> = BTreeMap::new();
        let mut times = 0;
        for deed in deeds.iter().filter(|deed| deed.act == act) {
            times += 1;
            let there = lives
                .iter()
                .filter(|life| life.node == deed.node && life.opened < deed.begun && life.ended > deed.begun);
            for life in there {
                had += 1;
                if let Some(failure) = life
                    .broken
                    .as_ref()
                    .filter(|_| life.ended <= deed.done + Duration::from_secs(5))
                {
                    ended += 1;
                    *how.entry(failure.to_string()).or_default() += 1;
                }
            }
        }
        let how: Vec<String> = how.iter().map(|(how, count)| format!("{how} {count}")).collect();
        table.row([
            act.name().to_owned(),
            times.to_string(),
            had.to_string(),
            (had - ended).to_string(),
            ended.to_string(),
            how.join(", "),
        ]);
    }
    outcome.tables.push(table);
}

/// How soon the clients of a dead node learn it, of those that have something to send.
fn resets(outcome: &mut Outcome, lives: &[Life], deeds: &[Deed]) {
    let mut table = Table::new(
        "After a power cut: from the crash until talking and uploading clients saw the end, and from their first segment after detection, in ms",
        &["what", "connections", "by reset", "p50", "p99", "max"],
    );
    let detection = PROFILES[0].detection();
    let (mut since_crash, mut since_segment, mut by_reset) = (Vec::new(), Vec::new(), 0);
    for deed in deeds.iter().filter(|deed| deed.act == Act::Crash) {
        let lost = lives
            .iter()
            .filter(|life| life.broken.is_some())
            .filter(|life| deed.may_end(life) && life.opened < deed.begun && life.ended <= deed.done);
        for life in lost.filter(|life| matches!(life.kind, Kind::Talk | Kind::Upload)) {
            by_reset += usize::from(life.broken == Some(Failure::Reset));
            since_crash.push(ms(life.ended.saturating_duration_since(deed.begun)));
            if life.sent > deed.begun + detection + Duration::from_millis(100) {
                since_segment.push(ms(life.ended.saturating_duration_since(life.sent)));
            }
        }
    }
    for (what, values, resets) in [
        ("from the crash", &since_crash, by_reset.to_string()),
        ("from the segment", &since_segment, "–".to_owned()),
    ] {
        table.row([
            what.to_owned(),
            values.len().to_string(),
            resets,
            cell_ms(quantile(values, 0.5)),
            cell_ms(quantile(values, 0.99)),
            cell_ms(quantile(values, 1.0)),
        ]);
    }
    if by_reset < since_crash.len() {
        outcome.missed.push(format!(
            "continuity: {} of {} sending clients of a dead node saw no reset",
            since_crash.len() - by_reset,
            since_crash.len()
        ));
    }
    outcome.tables.push(table);
    outcome.series.push(Series {
        group: "reset".into(),
        name: "crash to reset".into(),
        values: since_crash,
        goal: None,
    });
}

/// An error if this process may not open that many connections at once.
fn need_files(connections: usize) -> Result<()> {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let soft: usize = line
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(usize::MAX);
    let need = connections + 1000;
    if soft < need {
        bail!(
            "{connections} connections need {need} open files, and this process may have {soft}: ulimit -n {need}, or fewer --connections"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_does_every_act_to_every_node_once() {
        let acts = [Act::StopStart, Act::KillDaemon];
        let steps = plan(&mut Random::new(3), &acts, &[1, 2, 3]);
        let mut done: Vec<(Act, NodeNumber)> = steps.iter().flatten().map(|(act, node, _)| (*act, *node)).collect();
        done.sort_unstable();
        let all: Vec<(Act, NodeNumber)> = acts
            .iter()
            .flat_map(|act| (1..=3).map(move |node| (*act, node)))
            .collect();
        assert_eq!(done, all);
        assert!(steps.iter().any(|step| step.len() == 2), "several overlap");
    }
}
