//! Nodes that stand still or are cut off one way, and then go on: two nodes must not answer one probe.
//!
//! The clients see every answer to every probe, and a watcher at the switch sees every SYN-ACK. Times are chosen around the detection time, where a node
//! that wakes up meets those that have just taken over.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Outcome, PROFILES, Progress, Rig, RigConfig, Table, cell_ms, ms, quantile};
use crate::Node;
use crate::pinger::{Pinger, Probe, doubles};
use crate::process::children_of;
use crate::random::Random;
use crate::requester::Requester;
use crate::wire::Watcher;

/// How a node is stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Signal,
    Cgroup,
    CutOut,
    CutIn,
    HeartbeatsOut,
    HeartbeatsIn,
}

const WAYS: [Way; 6] = [
    Way::Signal,
    Way::Cgroup,
    Way::CutOut,
    Way::CutIn,
    Way::HeartbeatsOut,
    Way::HeartbeatsIn,
];

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Signal => "farmd stopped (SIGSTOP)",
            Self::Cgroup => "whole node frozen (cgroup)",
            Self::CutOut => "nothing out",
            Self::CutIn => "nothing in",
            Self::HeartbeatsOut => "no heartbeat out",
            Self::HeartbeatsIn => "no heartbeat in",
        }
    }

    /// True if the node only fails to hear, which it cannot know.
    const fn is_deaf(self) -> bool {
        match self {
            Self::CutIn | Self::HeartbeatsIn => true,
            Self::Signal | Self::Cgroup | Self::CutOut | Self::HeartbeatsOut => false,
        }
    }

    fn begin(self, rig: &Rig, node: &Node) -> Result<()> {
        match self {
            Self::Signal => node.signal_farmd("STOP"),
            Self::Cgroup => freeze(node),
            Self::CutOut => node.cut(true),
            Self::CutIn => node.cut(false),
            Self::HeartbeatsOut => mute(rig, node, "prerouting", "iifname"),
            Self::HeartbeatsIn => mute(rig, node, "postrouting", "oifname"),
        }
    }

    fn end(self, rig: &Rig, node: &Node) -> Result<()> {
        match self {
            Self::Signal => node.signal_farmd("CONT"),
            Self::Cgroup => thaw(node),
            Self::CutOut | Self::CutIn => node.heal(),
            Self::HeartbeatsOut | Self::HeartbeatsIn => rig.lab.switch.nft("delete table bridge mute\n"),
        }
    }
}

/// Stops nodes of a farm of three in each way `times` times, for times from a tenth of the detection time to twelve times it.
///
/// # Errors
/// The farm does not start or does not come back, or `say` ends the run.
pub fn run(seed: u64, times: usize, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("freeze", seed);
    let mut table = Table::new(
        "Nodes that stood still for a while: probes, those that two nodes answered, TCP connections that two nodes answered, and the time from the end until all served again, in ms",
        &[
            "what",
            "times",
            "probes",
            "two answers",
            "connections",
            "two owners",
            "back p50",
            "back max",
        ],
    );
    let profile = PROFILES[0];
    let rig = Rig::serve(&RigConfig::new(3, profile))?;
    let mut random = Random::new(seed);
    for way in WAYS {
        if way == Way::Cgroup && cgroup_root().is_none() {
            outcome
                .notes
                .push("There is no cgroup v2 with a freezer here: whole nodes were not frozen.".into());
            continue;
        }
        let watcher = Watcher::start(&rig.lab)?;
        let pinger = Pinger::start(&rig.clients(), &Rig::udp(), 2, 1000)?;
        let clients = rig.clients();
        let streams: Vec<Requester> = clients
            .iter()
            .map(|client| Requester::start(client, &Rig::tcp(), 25, Duration::from_secs(5)))
            .collect::<Result<_>>()?;
        let (mut probes, mut doubled, mut back) = (0, 0, Vec::new());
        for round in 0..times {
            pinger.learn(Duration::from_secs(10))?;
            let node = &rig.lab.nodes[random.below(rig.lab.nodes.len())];
            // Half of the times lie within one pulse of the detection time, where a race would be.
            let pulse = Duration::from_millis(profile.pulse_ms);
            let length = if round % 2 == 0 {
                profile.detection() - pulse + random.up_to(pulse * 2)
            } else {
                profile.detection() / 10 + random.up_to(profile.detection() * 12)
            };
            way.begin(&rig, node)?;
            std::thread::sleep(length);
            way.end(&rig, node)?;
            let ended = Instant::now();
            // A node may be thought alive for the detection time: what is asked before that is about the past.
            std::thread::sleep(pulse);
            rig.wait_all()?;
            back.push(ms(ended.elapsed()));
            std::thread::sleep(profile.detection());
            let (count, two) = pinger.look(|all| (all.len(), doubles(all).len()));
            probes += count;
            doubled += two;
            if two > 0 {
                let first = pinger.look(|all| doubles(all).first().map(|probe| describe(probe)));
                let what = format!(
                    "freeze, {} of {} for {} ms: {two} probes had two answers, the first one {}",
                    way.name(),
                    node.name(),
                    length.as_millis(),
                    first.unwrap_or_default()
                );
                if way.is_deaf() {
                    outcome.missed.push(what);
                } else {
                    outcome.violations.push(what);
                }
            }
            say("")?;
        }
        pinger.stop()?;
        for stream in streams {
            stream.stop()?;
        }
        let evidence = watcher.stop()?;
        let two = evidence.two_owners().len();
        // Not each is a broken promise: what a node says while nothing gets out of it reaches no client, as the watcher sits before the cut, and a
        // request that a successor kept may have been answered by a node that stood still right after it.
        if let Some((attempt, ports)) = evidence.two_owners().first() {
            outcome.missed.push(format!(
                "freeze, {}: {two} connections had SYN-ACKs of two nodes, e.g. {attempt:?} by {ports:?}",
                way.name()
            ));
        }
        if evidence.missed > 0 {
            outcome
                .notes
                .push(format!("{}: the watcher missed {} frames", way.name(), evidence.missed));
        }
        table.row([
            way.name().to_owned(),
            times.to_string(),
            probes.to_string(),
            doubled.to_string(),
            evidence.syn_acks.len().to_string(),
            two.to_string(),
            cell_ms(quantile(&back, 0.5)),
            cell_ms(quantile(&back, 1.0)),
        ]);
        say(&table.rows.last().map(|row| row.join("  ")).unwrap_or_default())?;
    }
    outcome.tables.push(table);
    outcome.notes.push(
        "A node that only fails to hear cannot know it and goes on serving under `partition=\"serve\"` (PROTOCOL.md): its two answers are counted, and are no broken promise.".into(),
    );
    Ok(outcome)
}

/// A probe's answers: who, and how many milliseconds after it was sent.
fn describe(probe: &Probe) -> String {
    let answers = probe.answers.iter().map(|(at, node)| {
        let after = ms(at.saturating_duration_since(probe.sent));
        format!("by node{node} after {} ms", cell_ms(after))
    });
    answers.collect::<Vec<_>>().join(" and ")
}

/// The switch drops this node's heartbeats one way; everything else passes.
fn mute(rig: &Rig, node: &Node, hook: &str, key: &str) -> Result<()> {
    rig.lab.switch.nft(&format!(
        "table bridge mute {{ chain c {{ type filter hook {hook} priority -300; {key} \"{}\" ether type ip udp dport 4800 drop; }}; }}\n",
        node.port()
    ))
}

/// Where cgroup v2 is mounted, if groups made there can be frozen.
fn cgroup_root() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let mut roots = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let folder = words.next()?;
        (words.next()? == "cgroup2").then(|| PathBuf::from(folder))
    });
    roots.find(|root| {
        let trial = root.join(format!("farm-lab.{}.trial", std::process::id()));
        let works = fs::create_dir(&trial).is_ok() && trial.join("cgroup.freeze").is_file();
        let _ = fs::remove_dir(&trial);
        works
    })
}

fn cgroup_of(node: &Node) -> Result<PathBuf> {
    let root = cgroup_root().context("there is no cgroup v2 here")?;
    Ok(root.join(format!("farm-lab.{}.{}", std::process::id(), node.name())))
}

/// Freezes every process of the node.
fn freeze(node: &Node) -> Result<()> {
    let group = cgroup_of(node)?;
    fs::create_dir_all(&group).with_context(|| format!("cannot make {}", group.display()))?;
    let mut waiting: Vec<u32> = node.init_pid().into_iter().chain(node.farmd_pid()).collect();
    let mut moved = Vec::new();
    while let Some(pid) = waiting.pop() {
        waiting.extend(children_of(pid));
        moved.push(pid);
    }
    for pid in moved {
        // A process that has just ended needs no freezing.
        let _ = fs::write(group.join("cgroup.procs"), pid.to_string());
    }
    fs::write(group.join("cgroup.freeze"), "1").with_context(|| format!("cannot freeze {}", group.display()))
}

/// Lets the node go on, and gives its processes back to the group they came from.
fn thaw(node: &Node) -> Result<()> {
    let group = cgroup_of(node)?;
    fs::write(group.join("cgroup.freeze"), "0").with_context(|| format!("cannot thaw {}", group.display()))?;
    let root = group.parent().context("a group has a parent")?;
    for pid in fs::read_to_string(group.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
    {
        let _ = fs::write(root.join("cgroup.procs"), pid);
    }
    // A group that a dying process still holds goes with the next one's removal; it is empty and frozen no more.
    let _ = fs::remove_dir(&group);
    Ok(())
}
