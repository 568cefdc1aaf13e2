//! False evictions: a farm on a machine that is too busy, with a network that loses heartbeats, and nobody dies.
//!
//! Every "is down" of any node's log counts, and so does every change of a view.

use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use farm_core::api::ClusterStatus;

use super::{Outcome, PROFILES, Progress, Rig, RigConfig, Table, ms, pause};
use crate::pinger::{Pinger, doubles, longest_silence};
use crate::process::{spawn_kept, with_parent_death};

/// Processes that do nothing but compute.
const HOGS: usize = 8;

/// Heartbeats of a hundred that are lost on their way into each node.
const LOSS: usize = 5;

/// Soaks a farm of each of `sizes` nodes for `time`.
///
/// # Errors
/// A farm does not start, the loss cannot be set up, or `say` ends the run.
pub fn run(seed: u64, time: Duration, sizes: &[usize], say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("soak", seed);
    let mut table = Table::new(
        "Nodes declared dead although none was, default pulse",
        &[
            "nodes",
            "seconds",
            "hogs",
            "loss %",
            "evictions",
            "step-outs",
            "longest silence of a flow, ms",
        ],
    );
    for nodes in sizes.iter().copied() {
        say(&format!("{nodes} nodes, {} s", time.as_secs()))?;
        let rig = Rig::serve(&RigConfig {
            clients: 2,
            ..RigConfig::new(nodes, PROFILES[0])
        })?;
        let soaked = soak(&rig, time, say)?;
        rig.note_plane(&mut outcome);
        table.row([
            nodes.to_string(),
            time.as_secs().to_string(),
            HOGS.to_string(),
            LOSS.to_string(),
            soaked.evictions.to_string(),
            soaked.step_outs.to_string(),
            format!("{:.0}", ms(soaked.silence)),
        ]);
        if soaked.evictions + soaked.step_outs > 0 {
            outcome.missed.push(format!(
                "soak, {nodes} nodes: {} evictions and {} step-outs in {} s, goal 0",
                soaked.evictions,
                soaked.step_outs,
                time.as_secs()
            ));
        }
        if soaked.doubles > 0 {
            outcome.violations.push(format!(
                "soak, {nodes} nodes: {} probes had two answers",
                soaked.doubles
            ));
        }
    }
    outcome.tables.push(table);
    outcome
        .notes
        .push("The silence includes the time the responders wait for a processor behind the hogs.".into());
    Ok(outcome)
}

struct Soaked {
    evictions: usize,
    step_outs: usize,
    doubles: usize,
    silence: Duration,
}

fn soak(rig: &Rig, time: Duration, say: Progress<'_>) -> Result<Soaked> {
    let count = |text: &str| -> usize {
        let logs = rig.lab.nodes.iter().map(crate::Node::log_text);
        logs.map(|log| log.matches(text).count()).sum()
    };
    let before = (count(" is down: "), count("has stepped out"));
    for node in &rig.lab.nodes {
        node.space().nft(&format!(
            "table inet loss {{ chain in {{ type filter hook input priority -300; udp dport 4800 numgen random mod 100 < {LOSS} drop; }}; }}\n"
        ))?;
    }
    let pinger = Pinger::start(&rig.clients(), &Rig::udp(), 4, 200)?;
    let hogs = Hogs::start(HOGS)?;
    let end = Instant::now() + time;
    let (mut doubled, mut silence) = (0, Duration::ZERO);
    while let Some(left) = end
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
    {
        // In slices, so that ten minutes of probes need no more memory than ten seconds.
        pinger.forget();
        pause(left.min(Duration::from_secs(10)), say)?;
        let now = Instant::now();
        doubled += pinger.look(|probes| doubles(probes).len());
        silence = silence.max(pinger.look(|probes| longest_silence(probes, now)));
    }
    drop(hogs);
    pinger.stop()?;
    for node in &rig.lab.nodes {
        node.space().nft("delete table inet loss\n")?;
    }
    rig.wait_all()?;
    let cluster: ClusterStatus = rig.lab.nodes[0].ask("/v1/cluster")?;
    anyhow::ensure!(
        cluster.view.len() == rig.lab.nodes.len(),
        "after the soak the view is {:?}",
        cluster.view
    );
    Ok(Soaked {
        evictions: count(" is down: ") - before.0,
        step_outs: count("has stepped out") - before.1,
        doubles: doubled,
        silence,
    })
}

/// Processes that only compute; ended when dropped.
#[derive(Debug)]
pub struct Hogs(Vec<Child>);

impl Hogs {
    /// Starts `count` of them at ordinary priority.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn start(count: usize) -> Result<Self> {
        let mut hogs = Self(Vec::new());
        for _ in 0..count {
            let mut command = with_parent_death("sh");
            command
                .args(["-c", "while :; do :; done"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            hogs.0.push(spawn_kept(command).context("cannot start a hog")?);
        }
        Ok(hogs)
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            let _ = hog.kill();
            let _ = hog.wait();
        }
    }
}
