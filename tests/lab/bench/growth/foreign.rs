//! More foreign frames among those that come in: each receiver accepts its own datagrams, to a socket that nobody reads, and drops the others.

use anyhow::Result;

use super::NAME;
use crate::bench::lanes::{Filtering, Lanes};
use crate::bench::{Effort, Figure, line};
use crate::outcome::{Outcome, Plot, Progress, Table};

/// The filters that are compared.
const KINDS: [Filtering; 4] = [
    Filtering::None,
    Filtering::Farm,
    Filtering::FarmEarly,
    Filtering::Cluster,
];

/// Frames of the pattern that is repeated: a share is told by tenths.
const PATTERN: usize = 10;

/// Measures every share with every filter that this machine has.
///
/// # Errors
/// The lanes cannot be built, or frames are lost on them.
pub fn measure(effort: Effort, outcome: &mut Outcome, say: Progress<'_>) -> Result<()> {
    let (rounds, count) = (effort.rounds(9, 3), effort.pick(100_000, 30_000));
    let tenths: Vec<usize> = effort.pick((0..10).collect(), vec![0, 5, 9]);
    let (lanes, missing) = Lanes::new(&KINDS, true)?;
    for (filtering, why) in missing {
        let why = why.lines().next().unwrap_or_default().to_owned();
        outcome.notes.push(format!(
            "Left out of foreign frames: {}, because {why}.",
            filtering.name()
        ));
    }
    let frames = lanes
        .lanes
        .iter()
        .map(|lane| lane.datagrams())
        .collect::<Result<Vec<_>>>()?;
    let mut values = vec![vec![Vec::new(); tenths.len()]; lanes.lanes.len()];
    for round in 1..=rounds {
        say(&format!(
            "round {round}/{rounds}: {count} datagrams for each share of foreign ones"
        ))?;
        for (share, tenth) in tenths.iter().enumerate() {
            for ((lane, (owned, foreign)), values) in lanes.lanes.iter().zip(&frames).zip(&mut values) {
                let pattern: Vec<&[u8]> = spread(*tenth)
                    .map(|is_foreign| if is_foreign { &foreign[..] } else { &owned[..] })
                    .collect();
                values[share].push(lane.throw(&pattern, count)?);
            }
        }
    }
    let names: Vec<&str> = lanes.lanes.iter().map(|lane| lane.filtering.name()).collect();
    let columns: Vec<&str> = std::iter::once("foreign").chain(names.iter().copied()).collect();
    let mut table = Table::new(
        &format!(
            "Nanoseconds for one 54-byte datagram, sending included, by the share that is other servers' (rounds: {rounds}, of {count}; without a filter all are \
             accepted)"
        ),
        &columns,
    );
    for (share, tenth) in tenths.iter().enumerate() {
        let cells = values.iter().map(|of| Figure::of(&of[share]).text(0));
        table.row(std::iter::once(format!("{} %", tenth * 10)).chain(cells));
    }
    outcome.tables.push(table);
    let lines = names.iter().zip(values).map(|(name, of)| {
        let places = tenths.iter().map(|tenth| *tenth as f64 * 10.0);
        line(name, places.zip(of).collect())
    });
    outcome.plots.push(Plot {
        name: format!("{NAME}-foreign"),
        title: "One frame, by the share of foreign ones".to_owned(),
        unit: "ns for one frame, sending included".to_owned(),
        over: Some("% of the frames are foreign".to_owned()),
        lines: lines.collect(),
        ..Plot::default()
    });
    Ok(())
}

/// Which frames of the pattern are foreign, `tenth` of ten, as evenly as it goes.
fn spread(tenth: usize) -> impl Iterator<Item = bool> {
    (0..PATTERN).map(move |i| (i + 1) * tenth / PATTERN > i * tenth / PATTERN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_what_it_says_and_evenly_spread() {
        for tenth in 0..PATTERN {
            assert_eq!(spread(tenth).filter(|foreign| *foreign).count(), tenth);
        }
        assert_eq!(spread(5).take(4).collect::<Vec<_>>(), [false, true, false, true]);
    }
}
