//! Crashes: from the moment of a power cut to the first answer that a client of the dead node gets from another one.
//!
//! Each kill picks a node and a moment by the seed, looks for flows that the node has, cuts its power, and probes those flows a thousand
//! times a second until another node answers. Then the node comes back; of 8 and more nodes up to a quarter die one after the other before they
//! come back together, because the kernel needs a second or two to take down what a dead node leaves.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{MODES, Outcome, Profile, Progress, Rig, RigConfig, Series, Table, cell_ms, ms, quantile};
use crate::pinger::{NodeNumber, Pinger};
use crate::process::wait_until;
use crate::random::Random;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// Seed of victims and moments.
    pub seed: u64,
    /// Crashes for each number of nodes and profile.
    pub kills: usize,
    /// Numbers of nodes.
    pub nodes: Vec<usize>,
    /// Heartbeat profiles.
    pub profiles: Vec<Profile>,
}

/// Flows of the victim that are probed, for each mode.
const ORPHANS: usize = 8;

/// Nobody took over within this time: that is a violation, not a measurement.
const LIMIT: Duration = Duration::from_secs(10);

/// One crash as one mode saw it, in milliseconds from the crash.
#[derive(Clone, Copy, Debug)]
pub struct Gap {
    /// Until the first probed flow of the dead node was answered.
    pub first: f64,
    /// Until each of them had been.
    pub last: f64,
}

/// Runs all sizes and profiles.
///
/// # Errors
/// The farm does not start or does not come back, or `say` ends the run.
pub fn run(options: &Options, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("failover", options.seed);
    let mut table = Table::new(
        "From a power cut to an answer by another node, in ms: first probed flow of the dead node (p50, p99, max), and all of them (p99)",
        &[
            "nodes", "profile", "mode", "kills", "p50", "p99", "max", "all p99", "goal p99",
        ],
    );
    let mut cycles = Vec::new();
    for profile in &options.profiles {
        for nodes in &options.nodes {
            say(&format!("{nodes} nodes, profile {}", profile.name))?;
            let rig = Rig::serve(&RigConfig::new(*nodes, *profile))?;
            let mut random = Random::new(options.seed ^ (*nodes as u64) << 32 ^ profile.pulse_ms);
            let mut killer = Killer::new(&rig, *profile)?;
            let mut seen: [Vec<Gap>; 2] = Default::default();
            for kill in 0..options.kills {
                let begun = Instant::now();
                let gaps = killer.kill(&mut random)?;
                if killer.dead.len() >= (nodes / 4).max(1) {
                    killer.bring_back()?;
                }
                cycles.push(begun.elapsed().as_secs_f64());
                for ((mode, _), (gap, all)) in MODES.iter().zip(gaps.into_iter().zip(&mut seen)) {
                    match gap {
                        Some(gap) => all.push(gap),
                        None => outcome.violations.push(format!(
                            "{nodes} nodes, {}, {mode}, kill {kill}: nobody took over within {LIMIT:?}",
                            profile.name
                        )),
                    }
                }
                say("")?;
            }
            rig.note_plane(&mut outcome);
            for ((mode, _), gaps) in MODES.iter().zip(seen) {
                add(&mut outcome, &mut table, *nodes, *profile, mode, &gaps);
                say(&table.rows.last().map(|row| row.join("  ")).unwrap_or_default())?;
            }
        }
    }
    outcome.notes.push(format!(
        "One kill with its part of the nodes' return took {:.1} s on average.",
        cycles.iter().sum::<f64>() / cycles.len() as f64
    ));
    outcome.tables.push(table);
    Ok(outcome)
}

fn add(outcome: &mut Outcome, table: &mut Table, nodes: usize, profile: Profile, mode: &str, gaps: &[Gap]) {
    let first: Vec<f64> = gaps.iter().map(|gap| gap.first).collect();
    let last: Vec<f64> = gaps.iter().map(|gap| gap.last).collect();
    table.row([
        nodes.to_string(),
        profile.name.to_owned(),
        mode.to_owned(),
        gaps.len().to_string(),
        cell_ms(quantile(&first, 0.5)),
        cell_ms(quantile(&first, 0.99)),
        cell_ms(quantile(&first, 1.0)),
        cell_ms(quantile(&last, 0.99)),
        cell_ms(profile.goal_ms),
    ]);
    outcome.judge_p99(
        &format!("failover, {nodes} nodes, {}, {mode}", profile.name),
        &first,
        profile.goal_ms,
    );
    outcome.series.push(Series {
        group: format!("failover-{}", profile.name),
        name: format!("{nodes} nodes, {mode}"),
        values: first,
        goal: Some(profile.goal_ms),
    });
}

/// Kills the nodes of a rig, one at a time, and brings them back.
pub struct Killer<'r> {
    rig: &'r Rig,
    pinger: Pinger,
    profile: Profile,
    dead: Vec<NodeNumber>,
}

impl<'r> Killer<'r> {
    /// Begins to probe.
    ///
    /// # Errors
    /// The probes' sockets cannot be opened.
    pub fn new(rig: &'r Rig, profile: Profile) -> Result<Self> {
        // Enough flows that each of 16 nodes has some: 8 addresses, 16 ports each, in each mode.
        let pinger = Pinger::start(&rig.clients(), &Rig::udp(), 16, 1000)?;
        Ok(Self {
            rig,
            pinger,
            profile,
            dead: Vec::new(),
        })
    }

    /// One crash; the gap that each of [`MODES`] saw, `None` where nobody took over.
    ///
    /// # Errors
    /// The farm did not serve before it, or the node could not be killed.
    pub fn kill(&mut self, random: &mut Random) -> Result<[Option<Gap>; 2]> {
        let owners = self.pinger.learn(Duration::from_secs(10))?;
        let mut candidates = owners.clone();
        candidates.retain(|node| self.orphans(&owners, *node).iter().all(|flows| !flows.is_empty()));
        let victim = *random
            .pick(&candidates)
            .context("no node has flows of both addresses")?;
        let orphans = self.orphans(&owners, victim);
        self.pinger.focus(&orphans.concat());
        // Any phase of the pulse, after what was sent at the old rate has been answered.
        std::thread::sleep(Duration::from_millis(20) + random.up_to(Duration::from_millis(2 * self.profile.pulse_ms)));
        self.pinger.forget();
        let at = self.rig.node(victim)?.crash()?;
        self.dead.push(victim);
        let all = |pinger: &Pinger| {
            let each = orphans.each_ref().map(|flows| first_answers(pinger, flows, victim, at));
            let whole = each.iter().flatten().all(Option::is_some);
            (each, whole)
        };
        let _ = wait_until(LIMIT, "another node", || all(&self.pinger).1.then_some(()));
        let (each, _) = all(&self.pinger);
        let gaps = each.map(|times| {
            let times: Vec<f64> = times.into_iter().collect::<Option<_>>()?;
            let first = times.iter().copied().reduce(f64::min)?;
            let last = times.iter().copied().reduce(f64::max)?;
            Some(Gap { first, last })
        });
        Ok(gaps)
    }

    /// Brings all dead nodes back at once; returns when the whole farm serves.
    ///
    /// # Errors
    /// One does not come back.
    pub fn bring_back(&mut self) -> Result<()> {
        let nodes: Vec<_> = self
            .dead
            .drain(..)
            .map(|number| self.rig.node(number))
            .collect::<Result<_>>()?;
        self.rig.bring_back(&nodes)
    }

    /// Some flows of `victim` for each mode.
    fn orphans(&self, owners: &[NodeNumber], victim: NodeNumber) -> [Vec<usize>; 2] {
        Rig::udp().map(|to| {
            let own = self.pinger.flows().iter().zip(owners).enumerate();
            own.filter(|(_, (flow, owner))| **owner == victim && flow.to == to)
                .map(|(index, _)| index)
                .take(ORPHANS)
                .collect()
        })
    }
}

/// Milliseconds from `at` to the first answer to each of `flows` by another node than `victim`.
fn first_answers(pinger: &Pinger, flows: &[usize], victim: NodeNumber, at: Instant) -> Vec<Option<f64>> {
    pinger.look(|probes| {
        let mut first = vec![None; flows.len()];
        for probe in probes {
            let Some(place) = flows.iter().position(|flow| *flow == probe.flow) else {
                continue;
            };
            for (answered, _) in probe.answers.iter().filter(|(_, node)| *node != victim) {
                let gap = ms(answered.saturating_duration_since(at));
                let known: &mut Option<f64> = &mut first[place];
                *known = Some(known.map_or(gap, |least| least.min(gap)));
            }
        }
        first
    })
}
