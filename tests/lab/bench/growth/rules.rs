//! More port rules: the kernel program finds a port's rule in a table, the core's decision, which the raw data plane uses, in a list.

use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use farm_core::balance::decide::decide;
use farm_core::balance::fragment::FragmentTable;
use farm_core::balance::plan::{BucketState, Plan, RulePlan};
use farm_core::config::Protocol;
use farm_core::wire::packet::Packet;

use super::NAME;
use crate::bench::frames::{self, Segment, Way};
use crate::bench::judge::{Judge, LOOPBACK};
use crate::bench::{Effort, Figure, line};
use crate::config::VIP;
use crate::outcome::{Outcome, Plot, Progress, Table};

/// Numbers of rules, one port each.
const RULES: [u16; 4] = [1, 100, 1000, 10_000];

/// Measures each number of rules.
///
/// # Errors
/// The kernel does not take the program, or its tables have no room.
pub fn measure(effort: Effort, outcome: &mut Outcome, say: Progress<'_>) -> Result<()> {
    let (rounds, repeat) = (effort.rounds(9, 3), effort.pick(1_000_000, 200_000));
    let mut judge = Judge::new(&plan(1)?)?;
    let mut values: [Vec<(f64, Vec<f64>)>; 2] =
        [0, 1].map(|_| RULES.map(|rules| (f64::from(rules), Vec::new())).to_vec());
    for round in 1..=rounds {
        say(&format!("round {round}/{rounds}: one frame with 1 to 10 000 rules"))?;
        for (index, rules) in RULES.into_iter().enumerate() {
            let plan = plan(rules)?;
            judge.install(&plan, false)?;
            // The last rule: the list is read to its end.
            let way = Way {
                from: (Ipv4Addr::new(198, 18, 1, 1).into(), 4000),
                to: (VIP.into(), rules),
            };
            let frame = way.tcp(Segment::Ack)?;
            values[0][index].1.push(judge.net_nanos(&frame, repeat)?);
            values[1][index].1.push(by_the_core(&plan, &frame, repeat / 20)?);
        }
    }
    let mut table = Table::new(
        &format!(
            "Nanoseconds for one frame by the last of many port rules, medians with the least and the most (rounds: {rounds})"
        ),
        &[
            "rules",
            "kernel program",
            "core (raw data plane), reading the frame included",
        ],
    );
    for (index, rules) in RULES.iter().enumerate() {
        let cell = |of: usize| Figure::of(&values[of][index].1).text(0);
        table.row([rules.to_string(), cell(0), cell(1)]);
    }
    outcome.tables.push(table);
    let names = ["kernel program", "core (raw plane)"];
    outcome.plots.push(Plot {
        name: format!("{NAME}-rules"),
        title: "One frame, by the number of port rules".to_owned(),
        unit: "ns for one frame".to_owned(),
        over: Some("rules".to_owned()),
        by_factors: true,
        lines: names
            .iter()
            .zip(values)
            .map(|(name, points)| line(name, points))
            .collect(),
        goal: None,
    });
    Ok(())
}

/// Ports 1 to `rules`, in turn for two groups, so that no two neighbours are one range.
fn plan(rules: u16) -> Result<Plan> {
    let rules: Vec<RulePlan> = (1..=rules)
        .map(|port| frames::rule(Protocol::Tcp, port, usize::from(port % 2)))
        .collect();
    let groups = vec![frames::group(BucketState::Own)?, frames::group(BucketState::Own)?];
    Ok(frames::plan(LOOPBACK, &[VIP.into()], &rules, groups))
}

/// Nanoseconds of the decision in user space.
fn by_the_core(plan: &Plan, frame: &[u8], repeat: u32) -> Result<f64> {
    let mut fragments = FragmentTable::default();
    let begun = Instant::now();
    for _ in 0..repeat {
        let packet = Packet::parse(black_box(frame)).context("the frame carries a packet")?;
        black_box(decide(plan, &packet, &mut fragments, Duration::ZERO, &mut |_| false));
    }
    Ok(begun.elapsed().as_nanos() as f64 / f64::from(repeat))
}
