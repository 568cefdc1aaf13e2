//! More nodes: in `vmac_invisible` each of them gets every frame, and all of them send heartbeats. Here all nodes and the client share the processors of
//! one machine, so what each further node costs is taken from the same rate; servers of their own pay their own share only.

use std::net::Ipv4Addr;

use anyhow::Result;

use super::NAME;
use crate::bench::load::{Keep, wrk};
use crate::bench::{Effort, Figure, line, ratios};
use crate::config::{Group, LabConfig, Mode, VIP, VIP2, Vip};
use crate::outcome::{Outcome, Plot, Progress, Table};
use crate::{Client, Lab};

/// Rates of one way, one value for each round.
#[derive(Default)]
struct Rates {
    requests: Vec<f64>,
    connections: Vec<f64>,
}

impl Rates {
    fn measure(&mut self, client: &Client, to: Ipv4Addr, seconds: u64) -> Result<()> {
        self.requests.push(wrk(client, to, seconds, Keep::Alive)?);
        self.connections.push(wrk(client, to, seconds, Keep::Never)?);
        Ok(())
    }
}

/// Measures farms of each size.
///
/// # Errors
/// A farm does not start, wrk is missing, or `say` ends the run.
pub fn measure(effort: Effort, outcome: &mut Outcome, say: Progress<'_>) -> Result<()> {
    let (rounds, seconds) = (effort.rounds(3, 1), effort.seconds(2, 1));
    let mut table = Table::new(
        &format!(
            "Farms of many nodes, all on this machine: ratios to one nginx straight, of the same round (rounds: {rounds}, {seconds} s each)"
        ),
        &[
            "nodes",
            "requests/s straight",
            "directed",
            "invisible",
            "connections/s straight",
            "directed",
            "invisible",
        ],
    );
    let mut points: [Vec<(f64, Vec<f64>)>; 4] = Default::default();
    for nodes in effort.pick(&[2, 4, 8, 16][..], &[2, 8][..]) {
        say(&format!("a farm of {nodes} nodes"))?;
        let lab = Lab::serve(LabConfig {
            nodes: *nodes,
            vips: vec![Vip::new(VIP, Mode::Directed), Vip::new(VIP2, Mode::Invisible)],
            groups: vec![Group::tcp("web", 80, "on_port")],
            ..LabConfig::default()
        })?;
        let [mut straight, mut directed, mut invisible]: [Rates; 3] = Default::default();
        for round in 1..=rounds {
            say(&format!("{nodes} nodes, round {round}/{rounds}"))?;
            straight.measure(&lab.client, lab.nodes[0].addr(), seconds)?;
            directed.measure(&lab.client, VIP, seconds)?;
            invisible.measure(&lab.client, VIP2, seconds)?;
        }
        let found = [
            ratios(&directed.requests, &straight.requests),
            ratios(&invisible.requests, &straight.requests),
            ratios(&directed.connections, &straight.connections),
            ratios(&invisible.connections, &straight.connections),
        ];
        let text = |index: usize| Figure::of(&found[index]).text(2);
        table.row([
            nodes.to_string(),
            format!("{:.0}", Figure::of(&straight.requests).median),
            text(0),
            text(1),
            format!("{:.0}", Figure::of(&straight.connections).median),
            text(2),
            text(3),
        ]);
        for (points, values) in points.iter_mut().zip(found) {
            points.push((*nodes as f64, values));
        }
    }
    outcome.tables.push(table);
    let names = [
        "requests/s, directed",
        "requests/s, invisible",
        "connections/s, directed",
        "connections/s, invisible",
    ];
    outcome.plots.push(Plot {
        name: format!("{NAME}-nodes"),
        title: "Rates of farms of many nodes that share one machine".to_owned(),
        unit: "ratio to one nginx straight".to_owned(),
        over: Some("nodes".to_owned()),
        by_factors: true,
        lines: names
            .iter()
            .zip(points)
            .map(|(name, points)| line(name, points))
            .collect(),
        goal: None,
    });
    Ok(())
}
