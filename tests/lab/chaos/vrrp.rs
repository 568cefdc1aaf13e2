//! The same power cut with keepalived: one address that moves between two servers, beside a farm of two, interleaved in one run.

use std::fs;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::failover::Killer;
use super::{Outcome, PROFILES, Progress, Rig, RigConfig, Series, Table, cell_ms, lab_program, ms, quantile};
use crate::config::VIP;
use crate::node::NODE_LINK;
use crate::pinger::{NodeNumber, Pinger};
use crate::process::wait_until;
use crate::random::Random;
use crate::{Lab, LabConfig};

/// Flows that are probed; all of them are on the one active server.
const FLOWS: usize = 8;

/// Advertisement intervals in seconds, as keepalived's configuration has them, with the time after which nobody is waited for.
const INTERVALS: [&str; 2] = ["1", "0.1"];

const LIMIT: Duration = Duration::from_secs(15);

/// Cuts the power of the farm and of both keepalived pairs `kills` times in turn.
///
/// # Errors
/// keepalived is missing, something does not start or come back, or `say` ends the run.
pub fn run(seed: u64, kills: usize, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("keepalived", seed);
    let mut random = Random::new(seed);
    let rig = Rig::serve(&RigConfig {
        clients: 1,
        ..RigConfig::new(2, PROFILES[0])
    })?;
    let mut killer = Killer::new(&rig, PROFILES[0])?;
    let mut pairs = INTERVALS
        .iter()
        .map(|interval| Pair::start(interval))
        .collect::<Result<Vec<_>>>()?;
    let mut farm = Vec::new();
    let mut vrrp: Vec<Vec<f64>> = vec![Vec::new(); pairs.len()];
    for kill in 0..kills {
        match killer.kill(&mut random)?[0] {
            Some(gap) => farm.push(gap.first),
            None => outcome
                .violations
                .push(format!("keepalived, kill {kill}: nobody took over in the farm")),
        }
        killer.bring_back()?;
        for (pair, gaps) in pairs.iter_mut().zip(&mut vrrp) {
            match pair.kill(&mut random)? {
                Some(gap) => gaps.push(gap),
                None => outcome.notes.push(format!(
                    "keepalived, {} s, kill {kill}: nobody took over within {LIMIT:?}",
                    pair.interval
                )),
            }
            say("")?;
        }
    }
    rig.note_plane(&mut outcome);
    let mut table = Table::new(
        "From a power cut to an answer by the other of two servers, in ms, interleaved; ratio of the medians",
        &["what", "kills", "p50", "p99", "max", "ratio"],
    );
    let base = quantile(&farm, 0.5);
    let mut rows = vec![("farm, default profile, vmac_directed".to_owned(), farm)];
    rows.extend(
        INTERVALS
            .iter()
            .zip(vrrp)
            .map(|(interval, gaps)| (format!("keepalived, advertisements every {interval} s"), gaps)),
    );
    for (name, values) in rows {
        table.row([
            name.clone(),
            values.len().to_string(),
            cell_ms(quantile(&values, 0.5)),
            cell_ms(quantile(&values, 0.99)),
            cell_ms(quantile(&values, 1.0)),
            format!("{:.1}", quantile(&values, 0.5) / base),
        ]);
        say(&table.rows.last().map(|row| row.join("  ")).unwrap_or_default())?;
        outcome.series.push(Series {
            group: "keepalived".into(),
            name: name
                .split(", vmac")
                .next()
                .unwrap_or(&name)
                .replace("advertisements every ", ""),
            values,
            goal: None,
        });
    }
    outcome.tables.push(table);
    outcome.notes.push(
        "keepalived runs with real-time priority, both servers with the same priority and `nopreempt`, so that the return of a server moves nothing; VRRP by multicast.".into(),
    );
    Ok(outcome)
}

/// Two servers with keepalived.
struct Pair {
    // Ended before the namespaces they are in.
    children: Vec<Child>,
    pinger: Pinger,
    lab: Lab,
    interval: &'static str,
}

impl Pair {
    fn start(interval: &'static str) -> Result<Self> {
        let lab = Lab::bare(LabConfig {
            nodes: 2,
            client_addrs: 2,
            ..LabConfig::default()
        })?;
        let pinger = Pinger::start(&[&lab.client], &[Rig::udp()[0]], FLOWS / 2, 1000)?;
        let mut pair = Self {
            children: Vec::new(),
            pinger,
            lab,
            interval,
        };
        for index in 0..2 {
            // The responder answers from an address that is its server's only at times.
            pair.lab.nodes[index].space().sysctl("net.ipv4.ip_nonlocal_bind", "1")?;
            pair.launch(index)?;
        }
        pair.settle()?;
        Ok(pair)
    }

    /// Starts the responder and keepalived on a server that has power.
    fn launch(&mut self, index: usize) -> Result<()> {
        let node = &self.lab.nodes[index];
        let folder = &node.dirs().base;
        let vip = VIP.to_string();
        let responder = lab_program()?;
        self.children
            .push(node.spawn(&responder, &["responder", "--name", node.name(), "--vip", &vip])?);
        let file = folder.join("keepalived.conf");
        fs::write(&file, self.configuration(node.name()))
            .with_context(|| format!("cannot write {}", file.display()))?;
        let path = |name: &str| folder.join(name).display().to_string();
        // What a dead machine leaves names a process number that the next life may give to another.
        for stale in ["keepalived.pid", "vrrp.pid"] {
            let _ = fs::remove_file(folder.join(stale));
        }
        self.children.push(node.spawn(
            Path::new("keepalived"),
            &[
                "--dont-fork",
                "--vrrp",
                "--log-console",
                "--dont-respawn",
                "--use-file",
                &file.display().to_string(),
                "--pid",
                &path("keepalived.pid"),
                "--vrrp_pid",
                &path("vrrp.pid"),
            ],
        )?);
        Ok(())
    }

    fn configuration(&self, name: &str) -> String {
        format!(
            "global_defs {{\n  router_id {name}\n  vrrp_version 3\n  vrrp_rt_priority 50\n}}\n\
             vrrp_instance V {{\n  state BACKUP\n  nopreempt\n  interface {NODE_LINK}\n  virtual_router_id 20\n  priority 100\n  advert_int {}\n\
             \x20 virtual_ipaddress {{\n    {VIP}/16\n  }}\n}}\n",
            self.interval
        )
    }

    /// Waits until one server answers everything; its number.
    fn settle(&self) -> Result<NodeNumber> {
        wait_until(Duration::from_secs(30), "one keepalived to have the address", || {
            let owners = self.pinger.learn(LIMIT).ok()?;
            let first = *owners.first()?;
            owners.iter().all(|owner| *owner == first).then_some(first)
        })
        .with_context(|| {
            let logs = self
                .lab
                .nodes
                .iter()
                .map(|node| fs::read_to_string(node.dirs().base.join("log")));
            logs.map(Result::unwrap_or_default).collect::<String>()
        })
    }

    /// Cuts the power of the active server and brings it back; milliseconds until the other one answered.
    fn kill(&mut self, random: &mut Random) -> Result<Option<f64>> {
        let active = self.settle()?;
        let seconds: f64 = self.interval.parse().context("an interval is a number")?;
        std::thread::sleep(random.up_to(Duration::from_secs_f64(seconds)));
        self.pinger.forget();
        let index = usize::from(active) - 1;
        let at = self.lab.nodes[index].crash()?;
        let first = |pinger: &Pinger| {
            pinger.look(|probes| {
                let answers = probes.iter().flat_map(|probe| &probe.answers);
                answers.filter(|(_, node)| *node != active).map(|(at, _)| *at).min()
            })
        };
        let taken: Option<Instant> = wait_until(LIMIT, "the other keepalived", || first(&self.pinger)).ok();
        let node = &self.lab.nodes[index];
        // A dead machine forgets its addresses; its namespace, which lives on, is made to.
        let _ = node.space().ip(&[format!("address del {VIP}/16 dev {NODE_LINK}")]);
        node.power_on()?;
        for mut child in std::mem::take(&mut self.children) {
            match child.try_wait()? {
                Some(_) => {}
                None => self.children.push(child),
            }
        }
        self.launch(index)?;
        // The new one must have heard the active one before that dies.
        std::thread::sleep(Duration::from_secs_f64(seconds * 2.0) + Duration::from_millis(500));
        Ok(taken.map(|taken| ms(taken.saturating_duration_since(at))))
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
