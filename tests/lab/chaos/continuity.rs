//! Established connections through everything that can be done to a farm in order, several things at a time, and through a crash.
//!
//! A crowd of connections is held from four clients while every node is stopped and started, its daemon restarted in place and anew, drained and given other weights, two nodes
//! at a time. A change that ends the application or its address on a node ends that node's own connections; every other end is a broken
//! promise, and so is a wrong byte anywhere. That acts were under way at the same time is measured, not taken from the plan.

mod act;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};

use self::act::{Act, BREATH, Deed};
use super::{Outcome, PROFILES, Progress, Rig, RigConfig, Series, Table, cell_ms, ms, quantile};
use crate::crowd::{Crowd, CrowdConfig, Kind, Life};
use crate::http::Failure;
use crate::pinger::NodeNumber;
use crate::random::Random;

/// Clients that hold connections, each with two addresses.
const CLIENTS: usize = 4;

/// Exchanges and pieces of uploads a second over all connections.
const EXCHANGES: f64 = 1000.0;

/// How long a node stays dead after every client of its connections that sends has sent.
const AFTERMATH: Duration = Duration::from_secs(2);

/// Holds `connections` connections through every act on each of the first `on` nodes of a farm of three, and through a power cut.
///
/// # Errors
/// The farm does not start or does not come back, the limit of open files is too low, or `say` ends the run.
pub fn run(
    seed: u64,
    connections: usize,
    on: usize,
    plane: Option<&'static str>,
    say: Progress<'_>,
) -> Result<Outcome> {
    let mut outcome = Outcome::new("continuity", seed);
    need_files(connections)?;
    let rig = Rig::serve(&RigConfig {
        clients: CLIENTS,
        plane,
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
        ("power cut", crash(&mut random, &numbers)),
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
    let mut together = Table::new(
        "Acts, pairs of them that were begun together, and pairs that were measured to be under way at the same time",
        &["phase", "acts", "pairs", "overlapped", "shortest, ms", "longest, ms"],
    );
    let (mut lives, mut deeds, mut overlapped) = (Vec::new(), Vec::new(), 0);
    for (phase, steps) in phases.into_iter().filter(|(_, steps)| !steps.is_empty()) {
        say(phase)?;
        if !deeds.is_empty() {
            rig.forget_clients()?;
        }
        // A new crowd each, spread over all nodes: clients that were sent away once gather where they were sent.
        let (held, done) = go_through(&rig, connections, &steps, say)?;
        judge(&mut outcome, &mut kinds, phase, &held, &done);
        overlapped += together_row(&mut together, phase, &steps, &done);
        lives.extend(held);
        deeds.extend(done);
    }
    outcome.tables.push(kinds);
    outcome.tables.push(together);
    if numbers.len() > 1 && overlapped == 0 {
        outcome.missed.push("continuity: no two acts overlapped".into());
    }
    acts_table(&mut outcome, &lives, &deeds);
    resets(&mut outcome, &lives, &deeds);
    rig.note_plane(&mut outcome);
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
    Ok((Crowd::stop_all(crowds)?, deeds))
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
        // The first step and one of two others have a second act on another node, which begins while the first is under way.
        let beside = all.iter().position(|(_, node)| *node != first.1);
        if let Some(place) = beside.filter(|_| steps.is_empty() || random.below(2) == 0) {
            let (act, node) = all.swap_remove(place);
            step.push((act, node, random.up_to(BREATH)));
        }
        steps.push(step);
    }
    steps
}

/// A power cut of a node of the seed's choice.
fn crash(random: &mut Random, numbers: &[NodeNumber]) -> Vec<Step> {
    let moment = random.up_to(Duration::from_millis(100));
    let node = random.pick(numbers);
    node.map(|node| vec![(Act::Crash, *node, moment)]).into_iter().collect()
}

fn perform(rig: &Rig, step: &[(Act, NodeNumber, Duration)], aftermath: Duration) -> Result<Vec<Deed>> {
    std::thread::scope(|scope| {
        let running: Vec<_> = step
            .iter()
            .map(|(act, node, delay)| {
                scope.spawn(move || {
                    std::thread::sleep(*delay);
                    act.perform(rig, *node, aftermath)
                })
            })
            .collect();
        running
            .into_iter()
            .map(|one| one.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// How long each pair of `deeds` was under way at the same time, of those pairs that were.
fn overlaps(deeds: &[Deed]) -> Vec<f64> {
    let mut times = Vec::new();
    for (index, one) in deeds.iter().enumerate() {
        times.extend(deeds[index + 1..].iter().filter_map(|other| one.beside(other)).map(ms));
    }
    times
}

/// Adds what was meant to overlap in a phase and what did; the number of pairs that did.
fn together_row(table: &mut Table, phase: &str, steps: &[Step], deeds: &[Deed]) -> usize {
    let meant: usize = steps.iter().map(|step| step.len() * (step.len() - 1) / 2).sum();
    let times = overlaps(deeds);
    table.row([
        phase.to_owned(),
        deeds.len().to_string(),
        meant.to_string(),
        times.len().to_string(),
        cell_ms(quantile(&times, 0.0)),
        cell_ms(quantile(&times, 1.0)),
    ]);
    times.len()
}

fn judge(outcome: &mut Outcome, table: &mut Table, phase: &str, lives: &[Life], deeds: &[Deed]) {
    let unexplained = |life: &Life| {
        matches!(life.broken, Some(Failure::BadAnswer(_))) || !deeds.iter().any(|deed| deed.may_end(life))
    };
    for kind in [Kind::Idle, Kind::Talk, Kind::Upload, Kind::Half] {
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
        let (mut times, mut had, mut ended, mut whole) = (0, 0, 0, 0);
        let mut how: BTreeMap<String, usize> = BTreeMap::new();
        for deed in deeds.iter().filter(|deed| deed.act == act) {
            times += 1;
            for life in lives.iter().filter(|life| deed.met(life)) {
                had += 1;
                whole += usize::from(life.broken.is_none());
                if let Some(failure) = deed.end_of(life, deeds) {
                    ended += 1;
                    *how.entry(failure.to_string()).or_default() += 1;
                }
            }
        }
        // Then a client took silence for a server, and nothing that was counted is worth anything.
        if act.ends_own() && whole > 0 {
            let text = format!(
                "continuity, {}: {whole} count as whole whose server had ended",
                act.name()
            );
            outcome.violations.push(text);
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

/// How soon the clients of a dead node learn it, of those that have something to send; some do only at the end of the crowd.
fn resets(outcome: &mut Outcome, lives: &[Life], deeds: &[Deed]) {
    let mut table = Table::new(
        "After a power cut: from the crash until talking and uploading clients saw the end, and from their first segment after detection, in ms",
        &["what", "connections", "by reset", "p50", "p99", "max"],
    );
    let detection = PROFILES[0].detection();
    let (mut since_crash, mut since_segment, mut by_reset) = (Vec::new(), Vec::new(), 0);
    for deed in deeds.iter().filter(|deed| deed.act == Act::Crash) {
        let sending = lives
            .iter()
            .filter(|life| matches!(life.kind, Kind::Talk | Kind::Upload));
        for life in sending.filter(|life| deed.met(life) && deed.end_of(life, deeds).is_some()) {
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
    use std::time::Instant;

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
        assert_eq!(steps[0].len(), 2, "several overlap");
        assert!(steps.iter().flatten().all(|(_, _, delay)| *delay <= BREATH));
    }

    /// A deed, in seconds after `start`; its server was started again in the middle.
    fn deed(start: Instant, act: Act, node: NodeNumber, begun: f64, done: f64) -> Deed {
        let at = |seconds| start + Duration::from_secs_f64(seconds);
        Deed {
            act,
            node,
            begun: at(begun),
            back: at(f64::midpoint(begun, done)),
            done: at(done),
        }
    }

    /// A connection to node `node` from `opened` to 9 s after `start`.
    fn life(start: Instant, kind: Kind, node: NodeNumber, opened: f64, broken: Option<Failure>) -> Life {
        let at = |seconds| start + Duration::from_secs_f64(seconds);
        Life {
            source: std::net::SocketAddr::from(([198, 18, 0, 100], 4000)),
            kind,
            node,
            opened: at(opened),
            ended: at(9.0),
            sent: at(opened),
            broken,
        }
    }

    #[test]
    fn ends_on_a_dead_node_are_expected_and_all_others_are_broken_promises() {
        let start = Instant::now();
        let deeds = [deed(start, Act::Crash, 1, 1.0, 5.0)];
        let mut lives = vec![
            life(start, Kind::Half, 1, 0.0, Some(Failure::AnswerTimeout)),
            life(start, Kind::Idle, 1, 0.0, Some(Failure::Reset)),
            life(start, Kind::Half, 2, 0.0, None),
            life(start, Kind::Idle, 2, 0.0, None),
        ];
        let judged = |lives: &[Life]| {
            let (mut outcome, mut table) = (Outcome::new("continuity", 1), Table::new("", &[]));
            judge(&mut outcome, &mut table, "power cut", lives, &deeds);
            let row = |index: usize| table.rows[index][2..].join(" ");
            ([row(0), row(3)], outcome.violations.len())
        };
        assert_eq!(judged(&lives), (["2 1 1 0".to_owned(), "2 1 1 0".to_owned()], 0));
        // One of a live server, and one of the server that was started again.
        lives.push(life(start, Kind::Half, 2, 0.0, Some(Failure::AnswerTimeout)));
        lives.push(life(start, Kind::Idle, 1, 4.0, Some(Failure::Closed)));
        assert_eq!(judged(&lives), (["3 1 1 1".to_owned(), "3 1 1 1".to_owned()], 1));
    }

    #[test]
    fn ends_after_the_deed_count_and_none_outlives_its_server() {
        let start = Instant::now();
        let deeds = [deed(start, Act::Crash, 1, 1.0, 5.0)];
        let mut lives = vec![
            life(start, Kind::Talk, 1, 0.0, Some(Failure::Closed)),
            life(start, Kind::Half, 1, 0.0, Some(Failure::AnswerTimeout)),
        ];
        let mut outcome = Outcome::new("continuity", 1);
        acts_table(&mut outcome, &lives, &deeds);
        assert_eq!(outcome.tables[0].rows[0][1..5].join(" "), "1 2 0 2");
        assert_eq!(outcome.violations, Vec::<String>::new());
        resets(&mut outcome, &lives, &deeds);
        assert_eq!(outcome.series[0].values, [8000.0]);
        assert_eq!(outcome.missed.len(), 1);
        lives.push(life(start, Kind::Idle, 1, 0.0, None));
        acts_table(&mut outcome, &lives, &deeds);
        assert_eq!(outcome.violations.len(), 1);
    }

    #[test]
    fn only_acts_under_way_at_the_same_time_overlap() {
        let start = Instant::now();
        let deeds = [
            deed(start, Act::Drain, 1, 0.0, 2.0),
            deed(start, Act::Weight, 2, 1.5, 3.0),
            deed(start, Act::Drain, 3, 3.0, 4.0),
        ];
        assert_eq!(overlaps(&deeds), [500.0]);
    }
}
