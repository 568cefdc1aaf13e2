//! Size and number of heartbeats at rest, as each daemon counts them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{CROWD, MODULE, Outcome, PROFILES, Progress, Rig, RigConfig, Table, pause};
use crate::Node;

/// How long the counters are watched.
const WINDOW: Duration = Duration::from_secs(3);

/// How heartbeats reach the nodes of a lan, and the attributes of `<lan>`.
const CASTS: [(&str, &str); 3] = [
    ("auto", ""),
    ("unicast", "cast=\"unicast\""),
    ("broadcast", "cast=\"broadcast\""),
];

/// Ethernet, IPv4 and UDP headers in front of each heartbeat.
const HEADERS: f64 = 42.0;

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
    let all = sizes.iter().flat_map(|nodes| CASTS.map(|cast| (*nodes, cast)));
    for (nodes, (cast, lan)) in all.filter(|(nodes, (cast, _))| *nodes <= CROWD || *cast != "unicast") {
        say(&format!("{nodes} nodes, {cast}"))?;
        let rig = Rig::serve(&RigConfig {
            clients: 1,
            lan,
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
        let with_headers = datagrams * (each + HEADERS);
        let judged = nodes == 32 && cast == "auto";
        table.row([
            nodes.to_string(),
            cast.to_owned(),
            format!("{datagrams:.0}"),
            format!("{each:.0}"),
            format!("{bytes:.0}"),
            format!("{with_headers:.0}"),
            if judged { format!("{GOAL:.0}") } else { "–".into() },
        ]);
        if judged && with_headers > GOAL {
            outcome.missed.push(format!(
                "{with_headers:.0} bytes/s of heartbeats sent per node at 32 nodes by {cast}, goal {GOAL:.0}"
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
