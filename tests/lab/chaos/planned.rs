//! Planned changes: a module stops, starts, is drained or gets another weight, while clients ask all the time.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::{MODES, MODULE, Outcome, PROFILES, Progress, Rig, RigConfig, Series, Table, cell_ms, ms, quantile};
use crate::Node;
use crate::pinger::{Pinger, doubles, longest_silence};
use crate::random::Random;
use crate::requester::Requester;

/// Longest gap a planned change may make, in milliseconds.
const GOAL: f64 = 20.0;

/// Datagrams a second, over 16 flows: each flow is probed every 8 ms, which a measured silence includes.
const RATE: u32 = 2000;

/// New connections a second.
const REQUESTS: u32 = 200;

/// A change and the words for it; `{}` stands for the node.
struct Change {
    name: &'static str,
    verb: &'static str,
    words: &'static [&'static str],
}

const CHANGES: [Change; 7] = [
    // What the machine alone does to the measurement.
    Change {
        name: "nothing",
        verb: "status",
        words: &["status", MODULE],
    },
    Change {
        name: "stop",
        verb: "stop",
        words: &["stop", MODULE],
    },
    Change {
        name: "start",
        verb: "start",
        words: &["start", MODULE],
    },
    Change {
        name: "drain",
        verb: "drain",
        words: &["drain", "{}", "--no-wait", "-m", MODULE],
    },
    Change {
        name: "undrain",
        verb: "undrain",
        words: &["undrain", "{}", "-m", MODULE],
    },
    Change {
        name: "weight 3",
        verb: "weight",
        words: &["weight", "{}", "3", "-m", MODULE],
    },
    Change {
        name: "weight back",
        verb: "weight",
        words: &["weight", "{}", "default", "-m", MODULE],
    },
];

impl Change {
    fn make(&self, node: &Node) -> Result<()> {
        let words: Vec<&str> = self
            .words
            .iter()
            .map(|word| if *word == "{}" { node.name() } else { word })
            .collect();
        node.farm_ok(&words).map(drop)
    }
}

/// Makes every change `rounds` times, each time on a node of the seed's choice, in a farm of three.
///
/// # Errors
/// The farm does not start or does not come back, a command fails, or `say` ends the run.
pub fn run(seed: u64, rounds: usize, plane: Option<&'static str>, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("planned", seed);
    let mut table = Table::new(
        "Planned changes: longest silence of a UDP flow (p50, max) and slowest TCP request (p50, max) of each change, in ms, and what was lost of all TCP requests",
        &[
            "change", "mode", "times", "UDP p50", "UDP max", "TCP p50", "TCP max", "requests", "lost", "goal",
        ],
    );
    let rig = Rig::serve(&RigConfig {
        plane,
        ..RigConfig::new(3, PROFILES[0])
    })?;
    let mut random = Random::new(seed);
    let (known, unknown): (Vec<&Change>, Vec<&Change>) = CHANGES.iter().partition(|change| rig.knows(change.verb));
    let mut seen: Vec<[Seen; 2]> = known.iter().map(|_| Default::default()).collect();
    for round in 0..rounds {
        let node = &rig.lab.nodes[random.below(rig.lab.nodes.len())];
        for (change, seen) in known.iter().zip(&mut seen) {
            let two = measure(&rig, &random.up_to(Duration::from_millis(100)), || change.make(node))?;
            for (mode, (one, all)) in two.into_iter().zip(seen.iter_mut()).enumerate() {
                if one.doubles > 0 {
                    outcome.violations.push(format!(
                        "planned, {} in round {round}, {}: {} probes had two answers",
                        change.name, MODES[mode].0, one.doubles
                    ));
                }
                all.add(&one);
            }
            say("")?;
        }
    }
    rig.note_plane(&mut outcome);
    for (change, seen) in known.iter().zip(&seen) {
        for ((mode, _), seen) in MODES.iter().zip(seen) {
            table.row([
                change.name.to_owned(),
                (*mode).to_owned(),
                seen.udp.len().to_string(),
                cell_ms(quantile(&seen.udp, 0.5)),
                cell_ms(quantile(&seen.udp, 1.0)),
                cell_ms(quantile(&seen.tcp, 0.5)),
                cell_ms(quantile(&seen.tcp, 1.0)),
                seen.requests.to_string(),
                seen.lost.to_string(),
                cell_ms(GOAL),
            ]);
            say(&table.rows.last().map(|row| row.join("  ")).unwrap_or_default())?;
            let what = format!("planned, {}, {mode}", change.name);
            for (kind, values) in [("UDP", &seen.udp), ("TCP", &seen.tcp)] {
                if change.name == "nothing" {
                    continue;
                }
                let most = quantile(values, 1.0);
                if most > GOAL {
                    outcome
                        .missed
                        .push(format!("{what}: {kind} gap {} ms, goal {GOAL:.0} ms", cell_ms(most)));
                }
            }
            if seen.lost > 0 {
                outcome.missed.push(format!(
                    "{what}: {} of {} requests lost, goal 0",
                    seen.lost, seen.requests
                ));
            }
            outcome.series.push(Series {
                group: "planned".into(),
                name: format!("{}, {mode}", change.name),
                values: seen.udp.clone(),
                goal: Some(GOAL),
            });
        }
    }
    outcome.notes.push(
        "The rows `nothing` are the same measurement around a `farm status`: what the machine alone adds.".into(),
    );
    if !unknown.is_empty() {
        let names: Vec<&str> = unknown.iter().map(|change| change.name).collect();
        outcome
            .notes
            .push(format!("This `farm` does not know: {}.", names.join(", ")));
    }
    outcome.tables.push(table);
    Ok(outcome)
}

#[derive(Default)]
struct Seen {
    udp: Vec<f64>,
    tcp: Vec<f64>,
    requests: usize,
    lost: usize,
    doubles: usize,
}

impl Seen {
    fn add(&mut self, one: &Self) {
        self.udp.extend(&one.udp);
        self.tcp.extend(&one.tcp);
        self.requests += one.requests;
        self.lost += one.lost;
    }
}

/// What each mode sees from shortly before `change` until shortly after it.
fn measure(rig: &Rig, phase: &Duration, change: impl FnOnce() -> Result<()>) -> Result<[Seen; 2]> {
    let pinger = Pinger::start(&rig.clients(), &Rig::udp(), 1, RATE)?;
    pinger.learn(Duration::from_secs(10))?;
    let streams: Vec<Requester> = rig
        .clients()
        .iter()
        .map(|client| {
            let share = REQUESTS / rig.clients().len() as u32;
            Requester::start(client, &Rig::tcp(), share, Duration::from_secs(5))
        })
        .collect::<Result<_>>()?;
    std::thread::sleep(Duration::from_millis(200) + *phase);
    change()?;
    std::thread::sleep(Duration::from_millis(300));
    let flows = pinger.flows().to_vec();
    let probes = pinger.stop()?;
    let end = probes.last().map_or_else(Instant::now, |probe| probe.sent);
    let mut requests = Vec::new();
    for stream in streams {
        requests.extend(stream.stop()?);
    }
    Ok(MODES.map(|(_, vip)| {
        let own: Vec<_> = probes
            .iter()
            .filter(|probe| *flows[probe.flow].to.ip() == vip)
            .cloned()
            .collect();
        let asked: Vec<_> = requests.iter().filter(|request| *request.to.ip() == vip).collect();
        let slowest = asked.iter().filter_map(|request| request.outcome.as_ref().ok()).max();
        Seen {
            udp: vec![ms(longest_silence(&own, end))],
            tcp: slowest.map(|time| ms(*time)).into_iter().collect(),
            requests: asked.len(),
            lost: asked.iter().filter(|request| request.outcome.is_err()).count(),
            doubles: doubles(&own).len(),
        }
    }))
}
