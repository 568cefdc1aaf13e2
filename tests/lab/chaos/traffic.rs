//! Size and number of heartbeats at rest, as each daemon counts them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{CROWD, MODULE, Outcome, PROFILES, Progress, Rig, RigConfig, Table, pause};
use crate::Node;

/// How long the counters are watched.
const WINDOW: Duration = Duration::from_secs(3);

/// How heartbeats reach the nodes of a lan.
struct Cast {
    name: &'static str,
    /// Attributes of `<lan>`.
    lan: &'static str,
    ipv6: bool,
}

const CASTS: [Cast; 4] = [
    Cast::new("auto", ""),
    Cast::new("unicast", "cast=\"unicast\""),
    Cast::new("broadcast", "cast=\"broadcast\""),
    Cast {
        ipv6: true,
        ..Cast::new("auto, IPv6", "")
    },
];

impl Cast {
    const fn new(name: &'static str, lan: &'static str) -> Self {
        Self { name, lan, ipv6: false }
    }

    /// More nodes than [`CROWD`] do not speak to each one by one; over IPv6 only they are looked at, up to [`MOST_IPV6`].
    fn is_measured(&self, nodes: usize) -> bool {
        let is_crowd = nodes > CROWD;
        match self.ipv6 {
            true => is_crowd && nodes <= MOST_IPV6,
            false => !is_crowd || self.name != "unicast",
        }
    }

    /// Bytes of Ethernet, IP and UDP headers in front of each heartbeat.
    const fn headers(&self) -> f64 {
        if self.ipv6 { 62.0 } else { 42.0 }
    }
}

/// Each node knows each other one's Ethernet address, and all namespaces share a neighbour table of 1024.
const MOST_IPV6: usize = 24;

/// Goal: bytes of heartbeats a node sends in a second with 32 nodes at the default pulse, headers included.
const GOAL: f64 = 5000.0;

/// Measures farms of each of `sizes` nodes by each cast, at the default pulse.
///
/// # Errors
/// A farm does not start, or `say` ends the run.
pub fn run(sizes: &[usize], say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("traffic", 0);
    let mut table = Table::new(
        "Heartbeats that one node sends at rest (mean over the nodes)",
        &[
            "nodes",
            "cast",
            "datagrams/s",
            "bytes each",
            "bytes/s",
            "with headers",
            "goal",
        ],
    );
    let all = sizes.iter().flat_map(|nodes| CASTS.iter().map(|cast| (*nodes, cast)));
    for (nodes, cast) in all.filter(|(nodes, cast)| cast.is_measured(*nodes)) {
        say(&format!("{nodes} nodes, {}", cast.name))?;
        let rig = Rig::serve(&RigConfig {
            clients: 1,
            lan: cast.lan,
            lan_ipv6: cast.ipv6,
            ..RigConfig::new(nodes, PROFILES[0])
        })?;
        // What the start has changed has been told by then.
        pause(Duration::from_secs(2), say)?;
        let before = sent(&rig)?;
        let begun = Instant::now();
        pause(WINDOW, say)?;
        let after = sent(&rig)?;
        let seconds = begun.elapsed().as_secs_f64() * nodes as f64;
        rig.note_plane(&mut outcome);
        let (datagrams, each) = (
            (after.0 - before.0) / seconds,
            (after.1 - before.1) / (after.0 - before.0),
        );
        let bytes = datagrams * each;
        let with_headers = datagrams * (each + cast.headers());
        let judged = nodes == 32 && cast.name == "auto";
        table.row([
            nodes.to_string(),
            cast.name.to_owned(),
            format!("{datagrams:.0}"),
            format!("{each:.0}"),
            format!("{bytes:.0}"),
            format!("{with_headers:.0}"),
            if judged { format!("{GOAL:.0}") } else { "–".into() },
        ]);
        if judged && with_headers > GOAL {
            outcome.missed.push(format!(
                "{with_headers:.0} bytes/s of heartbeats sent per node at 32 nodes by {}, goal {GOAL:.0}",
                cast.name
            ));
        }
        say(&table.rows.last().map(|row| row.join("  ")).unwrap_or_default())?;
    }
    outcome.tables.push(table);
    outcome
        .notes
        .push(format!("One module (`{MODULE}`) with one group is served."));
    if sizes.iter().any(|nodes| *nodes > CROWD) {
        outcome.notes.push(format!(
            "More than {CROWD} nodes are not measured by unicast: all of them run on the processors of one machine, which cannot read a datagram of each to each \
             at every pulse. `auto` goes by broadcast there."
        ));
    }
    Ok(outcome)
}

/// Heartbeats and their bytes sent by all nodes so far.
fn sent(rig: &Rig) -> Result<(f64, f64)> {
    let mut sum = (0.0, 0.0);
    for node in &rig.lab.nodes {
        sum.0 += counter(node, "heartbeats_sent")? as f64;
        sum.1 += counter(node, "heartbeats_sent_bytes")? as f64;
    }
    Ok(sum)
}

fn counter(node: &Node, name: &str) -> Result<u64> {
    let counters: BTreeMap<String, u64> = node.ask("/v1/metrics")?;
    let value = counters.get(name).copied();
    value.with_context(|| format!("{} does not count {name}", node.name()))
}
