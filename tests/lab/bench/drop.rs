//! The price of the farm's design: dropping frames that are other servers', on the whole way from the wire.
//!
//! Each filter has a lane of its own; the lanes take turns, and ratios are to the farm's program in the same round.

use anyhow::Result;

use super::lanes::{Filtering, Lane, Lanes, backlog_drops};
use super::{Effort, Figure, Goals, bar, ratios};
use crate::outcome::{Outcome, Plot, Progress, Table};

/// Name of the part.
pub const NAME: &str = "drop";

/// Goals: how many times dearer the others are.
const RAW: f64 = 1.0;
const CLUSTER: f64 = 1.4;

/// Measures every filter that this machine has.
///
/// # Errors
/// The lanes cannot be built, or frames are lost on them.
pub fn run(effort: Effort, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new(NAME, 0);
    let (lanes, missing) = Lanes::new(&Filtering::ALL, false)?;
    for (filtering, why) in missing {
        let why = why.lines().next().unwrap_or_default().to_owned();
        outcome
            .notes
            .push(format!("Left out: {}, because {why}.", filtering.name()));
    }
    let (rounds, count) = (effort.rounds(15, 5), effort.pick(200_000, 50_000));
    let frame = Lane::foreign_segment()?;
    let mut values: Vec<Vec<f64>> = vec![Vec::new(); lanes.lanes.len()];
    let before = backlog_drops()?;
    for lane in &lanes.lanes {
        // Neighbours, caches and counters are warm then.
        lane.throw(&[&frame], count / 10)?;
    }
    for round in 1..=rounds {
        say(&format!("round {round}/{rounds}: {count} frames by each lane"))?;
        for (lane, values) in lanes.lanes.iter().zip(&mut values) {
            values.push(lane.throw(&[&frame], count)?);
        }
    }
    let of = |wanted: Filtering| -> &[f64] {
        let found = lanes.lanes.iter().position(|lane| lane.filtering == wanted);
        found.map_or(&[], |index| &values[index])
    };
    let (farm, idle) = (of(Filtering::Farm), of(Filtering::Nothing));
    let mut table = Table::new(
        &format!(
            "Nanoseconds for one 54-byte TCP segment that is another server's, from the sender's call to its end (rounds: {rounds}, of {count} frames; medians \
             with the least and the most)"
        ),
        &["filter", "ns", "more than dropping at once", "times the farm's"],
    );
    for (lane, values) in lanes.lanes.iter().zip(&values) {
        let more: Vec<f64> = values.iter().zip(idle).map(|(value, idle)| value - idle).collect();
        table.row([
            lane.filtering.name().to_owned(),
            Figure::of(values).text(0),
            Figure::of(&more).text(0),
            Figure::of(&ratios(values, farm)).text(2),
        ]);
    }
    outcome.tables.push(table);
    outcome.plots.push(Plot {
        name: NAME.to_owned(),
        title: "Sending a frame that is another server's, and dropping it".to_owned(),
        unit: "ns for one frame, sending included".to_owned(),
        lines: lanes
            .lanes
            .iter()
            .zip(&values)
            .map(|(lane, values)| bar(lane.filtering.name(), values))
            .collect(),
        ..Plot::default()
    });
    let lost = backlog_drops()? - before;
    if lost > 0 {
        outcome.notes.push(format!(
            "{lost} frames found no room in a processor's queue while this was measured, of these lanes or of others."
        ));
    }
    let mut goals = Goals::new();
    for (filtering, wanted) in [(Filtering::IptablesRaw, RAW), (Filtering::Cluster, CLUSTER)] {
        let found = Figure::of(&ratios(of(filtering), farm)).median;
        let what = format!("ns by {}, times the farm's", filtering.name());
        goals.at_least(&what, wanted, found, 2);
    }
    goals.conclude(&mut outcome);
    Ok(outcome)
}
