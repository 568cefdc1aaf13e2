//! Measurements of speed and cost: in rounds that go over all rivals in turn, as ratios, each with its median and spread.
//!
//! Owns what the parts share: how long they are, their goals, how figures become cells, lines and bars. Each part is a function that gives
//! an [`Outcome`]; `farm-lab bench` runs them, prints, and writes JSON, Markdown and pictures. A part never fails because a goal was
//! missed: it says so. What cannot be measured on a machine is left out, with the reason among the notes.

pub mod bulk;
pub mod cost;
pub mod drop;
pub mod figure;
pub mod frames;
pub mod growth;
pub mod judge;
pub mod lanes;
pub mod load;
pub mod rest;
pub mod rivals;
pub mod ways;

pub use figure::Figure;

use crate::outcome::{Line, Outcome, Point, Table};

/// How long a run is to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Effort {
    /// All parts together in two minutes or so, instead of 25.
    pub short: bool,
    /// Rounds over all rivals, if somebody has said how many.
    pub rounds: Option<usize>,
    /// Seconds of each measurement of traffic, likewise.
    pub seconds: Option<u64>,
}

impl Effort {
    /// `long` or `short` rounds, or as many as were asked for.
    pub fn rounds(self, long: usize, short: usize) -> usize {
        self.rounds.unwrap_or(self.pick(long, short)).max(1)
    }

    /// The same for seconds.
    pub fn seconds(self, long: u64, short: u64) -> u64 {
        self.seconds.unwrap_or(self.pick(long, short)).max(1)
    }

    /// What a long or a short run uses.
    pub fn pick<T>(self, long: T, short: T) -> T {
        if self.short { short } else { long }
    }
}

/// Goals, each beside what was found.
#[derive(Debug)]
pub struct Goals {
    table: Table,
    missed: Vec<String>,
}

impl Goals {
    /// None yet.
    pub fn new() -> Self {
        Self {
            table: Table::new("Goals", &["what", "goal", "found", ""]),
            missed: Vec::new(),
        }
    }

    /// `found` is to be `wanted` or more; both are shown with as many digits.
    pub fn at_least(&mut self, what: &str, wanted: f64, found: f64, digits: usize) {
        self.judge(what, "≥", wanted, found, digits, found >= wanted);
    }

    /// `found` is to be `wanted` or less.
    pub fn at_most(&mut self, what: &str, wanted: f64, found: f64, digits: usize) {
        self.judge(what, "≤", wanted, found, digits, found <= wanted);
    }

    fn judge(&mut self, what: &str, sign: &str, wanted: f64, found: f64, digits: usize, met: bool) {
        let shown = if found.is_nan() {
            "not measured".to_owned()
        } else {
            format!("{found:.digits$}")
        };
        if !met {
            self.missed
                .push(format!("{what}: {shown}, goal {sign} {wanted:.digits$}"));
        }
        self.table.row([
            what.to_owned(),
            format!("{sign} {wanted:.digits$}"),
            shown,
            if met { "met" } else { "**missed**" }.to_owned(),
        ]);
    }

    /// Puts them at the end of the outcome.
    pub fn conclude(self, outcome: &mut Outcome) {
        outcome.tables.push(self.table);
        outcome.missed.extend(self.missed);
    }
}

impl Default for Goals {
    fn default() -> Self {
        Self::new()
    }
}

/// A bar.
pub fn bar(name: &str, values: &[f64]) -> Line {
    Line {
        name: name.to_owned(),
        points: vec![Point {
            at: 0.0,
            values: values.to_vec(),
        }],
    }
}

/// A line through these places and the values at each.
pub fn line(name: &str, points: Vec<(f64, Vec<f64>)>) -> Line {
    Line {
        name: name.to_owned(),
        points: points.into_iter().map(|(at, values)| Point { at, values }).collect(),
    }
}

/// Each of `values` divided by the one of the same round.
pub fn ratios(values: &[f64], base: &[f64]) -> Vec<f64> {
    values.iter().zip(base).map(|(value, base)| value / base).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_missed_on_its_own_side_and_by_nothing_measured() {
        let mut goals = Goals::new();
        goals.at_least("rate", 0.75, 0.8, 2);
        goals.at_most("cost", 35.0, 36.0, 0);
        goals.at_most("unknown", 1.0, f64::NAN, 0);
        let mut outcome = Outcome::new("x", 0);
        goals.conclude(&mut outcome);
        assert_eq!(
            outcome.missed,
            ["cost: 36, goal ≤ 35", "unknown: not measured, goal ≤ 1"]
        );
        assert_eq!(outcome.tables[0].rows.len(), 3);
    }

    #[test]
    fn what_was_asked_for_counts_more_than_the_form() {
        let asked = Effort {
            short: true,
            rounds: Some(9),
            seconds: None,
        };
        assert_eq!((asked.rounds(7, 1), asked.seconds(3, 1)), (9, 1));
        assert_eq!(Effort::default().rounds(7, 1), 7);
    }
}
