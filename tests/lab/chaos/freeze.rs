//! Nodes that stand still or are cut off one way, and then go on: two nodes must not answer one probe, nor own one request.
//!
//! The clients see every answer to every probe and to every request, and a watcher at the switch sees every SYN-ACK. Times are chosen around the detection time,
//! where a node that wakes up meets those that have just taken over.

mod owners;
mod requests;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use self::owners::{Fates, Round, TwoOwners};
use self::requests::{Asked, Stream};
use super::{Outcome, PROFILES, Profile, Progress, Rig, RigConfig, Table, cell_ms, ms, quantile};
use crate::Node;
use crate::pinger::{Pinger, Probe, doubles};
use crate::process::children_of;
use crate::random::Random;
use crate::wire::{Evidence, Watcher};

/// How often heartbeats go.
const PROFILE: Profile = PROFILES[0];

/// New connections a second of each client.
const REQUESTS: u32 = 25;

/// How a node is stopped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// Its farmd gets no processor.
    Signal,
    /// None of its processes does.
    Cgroup,
    /// Nothing that it sends arrives.
    CutOut,
    /// Nothing arrives at it.
    CutIn,
    /// As [`Self::CutOut`], of heartbeats only.
    HeartbeatsOut,
    /// As [`Self::CutIn`], of heartbeats only.
    HeartbeatsIn,
}

/// All ways.
pub const WAYS: [Way; 6] = [
    Way::Signal,
    Way::Cgroup,
    Way::CutOut,
    Way::CutIn,
    Way::HeartbeatsOut,
    Way::HeartbeatsIn,
];

impl Way {
    /// By the word that options have for it.
    ///
    /// # Errors
    /// There is none; the message names those there are.
    pub fn named(word: &str) -> Result<Self> {
        let words = WAYS.map(Self::word);
        let found = WAYS.into_iter().find(|way| way.word() == word);
        found.with_context(|| format!("there is no way `{word}`: one of {} is expected", words.join(", ")))
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Signal => "stop",
            Self::Cgroup => "freeze",
            Self::CutOut => "out",
            Self::CutIn => "in",
            Self::HeartbeatsOut => "heartbeats-out",
            Self::HeartbeatsIn => "heartbeats-in",
        }
    }

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

/// Stops nodes of a farm of three in each of `ways` `times` times, for times from a tenth of the detection time to twelve times it.
///
/// # Errors
/// The farm does not start or does not come back, or `say` ends the run.
pub fn run(seed: u64, times: usize, ways: &[Way], plane: Option<&'static str>, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("freeze", seed);
    let mut table = Table::new(
        "Nodes that stood still for a while: UDP probes and those that two nodes answered; TCP requests that were answered, that failed (in all, of those that other nodes had accepted, of those that nobody had) and that got wrong bytes; requests with SYN-ACKs of two nodes; and the time from the end until all served again, in ms",
        &[
            "what",
            "times",
            "probes",
            "two answers",
            "requests answered",
            "failed",
            "of other nodes",
            "of nobody",
            "wrong bytes",
            "two SYN-ACKs: behind the cut",
            "replayed",
            "asked again",
            "unexplained",
            "back p50",
            "back max",
        ],
    );
    let rig = Rig::serve(&RigConfig {
        plane,
        ..RigConfig::new(3, PROFILE)
    })?;
    let mut random = Random::new(seed);
    for way in ways.iter().copied() {
        if way == Way::Cgroup && cgroup_root().is_none() {
            outcome
                .notes
                .push("There is no cgroup v2 with a freezer here: whole nodes were not frozen.".into());
            continue;
        }
        let seen = stop(way, &rig, &mut random, times, say)?;
        table.row(judge(way, &seen, &mut outcome));
        say(&table.rows.last().map(|row| row.join("  ")).unwrap_or_default())?;
    }
    rig.note_plane(&mut outcome);
    outcome.tables.push(table);
    outcome.notes.push(
        "A node to which nothing at all comes in steps out; one to which only heartbeats do not come is told by TCP before it could take over. So in none of the six ways may two nodes answer one probe.".into(),
    );
    outcome.notes.push(
        "SYN-ACKs of two nodes for one request: *behind the cut* no client saw one of them, because nothing got out of its node, and the watcher sits before the cut; *replayed* means that a node answered before its lease ended, and its heir, who cannot know that, after it; *asked again* means that the client sent its request once more in between, so it had not got the first answer, and buckets had moved by then; *unexplained* is what is none of these, by the moments that are certain. Connections that use a port again are told apart by their first sequence number. Whether two nodes owned a bucket is told by the probes too, of which there are a thousand a second.".into(),
    );
    Ok(outcome)
}

/// What was seen of nodes that were stopped in one way.
struct Seen {
    rounds: Vec<Round>,
    probes: usize,
    doubled: Doubled,
    asked: Vec<Asked>,
    evidence: Evidence,
    /// Milliseconds from the end until all served again.
    back: Vec<f64>,
}

/// Probes that two answers came to.
#[derive(Debug, Default)]
struct Doubled {
    probes: usize,
    /// Rounds that had such.
    rounds: usize,
    /// From the detection time of a round to the last such answer in it; the longest.
    longest: Duration,
    /// The first one.
    example: String,
}

impl Doubled {
    /// Takes in the probes of a round of which the detection time ended at `detected`.
    fn add(&mut self, probes: &[Probe], detected: Instant, round: &str) {
        let two = doubles(probes);
        let Some(first) = two.first() else {
            return;
        };
        if self.probes == 0 {
            self.example = format!("{} ({round})", describe(first));
        }
        self.probes += two.len();
        self.rounds += 1;
        let seconds = two.iter().filter_map(|probe| probe.answers.get(1));
        let last = seconds.map(|(at, _)| at.saturating_duration_since(detected)).max();
        self.longest = self.longest.max(last.unwrap_or_default());
    }
}

fn stop(way: Way, rig: &Rig, random: &mut Random, times: usize, say: Progress<'_>) -> Result<Seen> {
    let (detection, pulse) = (PROFILE.detection(), Duration::from_millis(PROFILE.pulse_ms));
    let clients = rig.clients();
    let watcher = Watcher::start(&rig.lab)?;
    let pinger = Pinger::start(&clients, &Rig::udp(), 2, 1000)?;
    let streams: Vec<Stream> = clients
        .iter()
        .map(|client| Stream::start(client, &Rig::tcp(), REQUESTS))
        .collect::<Result<_>>()?;
    let (mut rounds, mut probes, mut doubled, mut back) = (Vec::new(), 0, Doubled::default(), Vec::new());
    for round in 0..times {
        pinger.learn(Duration::from_secs(10))?;
        let node = &rig.lab.nodes[random.below(rig.lab.nodes.len())];
        // Half of the times lie within one pulse of the detection time, where a race would be.
        let length = if round % 2 == 0 {
            detection - pulse + random.up_to(pulse * 2)
        } else {
            detection / 10 + random.up_to(detection * 12)
        };
        let before = Instant::now();
        way.begin(rig, node)?;
        let begun = Instant::now();
        std::thread::sleep(length);
        let ending = Instant::now();
        way.end(rig, node)?;
        let ended = Instant::now();
        // A node may be thought alive for the detection time: what is asked before that is about the past.
        std::thread::sleep(pulse);
        rig.wait_all()?;
        back.push(ms(ended.elapsed()));
        std::thread::sleep(detection);
        rounds.push(Round {
            port: node.port().to_owned(),
            mac: node.mac()?,
            before,
            begun,
            ending,
            over: Instant::now(),
            cut_off: way == Way::CutOut,
        });
        let what = format!("{} for {} ms", node.name(), length.as_millis());
        pinger.look(|all| {
            probes += all.len();
            doubled.add(all, begun + detection, &what);
        });
        say("")?;
    }
    pinger.stop()?;
    let mut asked = Vec::new();
    for stream in streams {
        asked.extend(stream.stop()?);
    }
    Ok(Seen {
        rounds,
        probes,
        doubled,
        asked,
        evidence: watcher.stop()?,
        back,
    })
}

/// Says what broke a promise and what missed a goal, one line of each kind; returns the row of the table.
fn judge(way: Way, seen: &Seen, outcome: &mut Outcome) -> [String; 15] {
    let (name, times) = (way.name(), seen.rounds.len());
    let fates = Fates::of(&seen.asked, &seen.evidence, &seen.rounds);
    let two = TwoOwners::of(&seen.evidence, &seen.rounds, PROFILE);
    // A first SYN-ACK that the watcher missed makes a repetition look like an acceptance.
    let complete = seen.evidence.missed == 0;
    if !complete {
        outcome.notes.push(format!(
            "{name}: the watcher missed {} frames, so whose the requests were is not judged",
            seen.evidence.missed
        ));
    }
    if two.unexplained > 0 {
        outcome.notes.push(format!(
            "{name}: the first request with SYN-ACKs of two nodes that nothing explains is of {}.",
            two.example
        ));
    }
    let mut found = |broken: bool, what: String| {
        let list = if broken {
            &mut outcome.violations
        } else {
            &mut outcome.missed
        };
        list.push(format!("freeze, {name}: {what}"));
    };
    let doubled = &seen.doubled;
    if doubled.probes > 0 {
        let what = format!(
            "{} probes in {} of {times} rounds had two answers, at most {} ms after the detection time; the first one {}",
            doubled.probes,
            doubled.rounds,
            cell_ms(ms(doubled.longest)),
            doubled.example
        );
        found(true, what);
    }
    if two.unexplained > 0 {
        let what = format!(
            "{} requests had SYN-ACKs of two nodes that nothing explains",
            two.unexplained
        );
        found(false, what);
    }
    if let Some(first) = fates.wrong.first() {
        let what = format!(
            "{} requests got wrong bytes, the first one {}; {}",
            fates.wrong.len(),
            first.describe(),
            owners::story(first, &seen.evidence, &seen.rounds, PROFILE)
        );
        found(true, what);
    }
    if let Some(first) = fates.elsewhere.first() {
        let what = format!(
            "{} requests failed that other nodes had, the first one {}; {}",
            fates.elsewhere.len(),
            first.describe(),
            owners::story(first, &seen.evidence, &seen.rounds, PROFILE)
        );
        found(complete, what);
    }
    if let Some(first) = fates.nobody.first() {
        let what = format!(
            "{} requests were accepted by no node, goal 0; the first one {}; {}",
            fates.nobody.len(),
            first.describe(),
            owners::story(first, &seen.evidence, &seen.rounds, PROFILE)
        );
        found(false, what);
    }
    [
        name.to_owned(),
        times.to_string(),
        seen.probes.to_string(),
        doubled.probes.to_string(),
        fates.answered.to_string(),
        fates.failed().to_string(),
        fates.elsewhere.len().to_string(),
        fates.nobody.len().to_string(),
        fates.wrong.len().to_string(),
        two.behind.to_string(),
        two.replayed.to_string(),
        two.asked_again.to_string(),
        two.unexplained.to_string(),
        cell_ms(quantile(&seen.back, 0.5)),
        cell_ms(quantile(&seen.back, 1.0)),
    ]
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
