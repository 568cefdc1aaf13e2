//! What a measurement found: tables for people, every value for machines, and what of it breaks a promise or misses a goal.
//!
//! Owns the shapes only; `farm-lab chaos` and `farm-lab bench` print them, write them as JSON and turn them into Markdown and pictures.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::Result;
use serde::{Deserialize, Serialize};

/// Tells how far a measurement is; an error ends it, for instance after Ctrl-C.
pub type Progress<'a> = &'a mut (dyn FnMut(&str) -> Result<()> + 'a);

/// Result of one matrix of `chaos`, or of one part of `bench`.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// Name of the matrix or part, as `--only` has it.
    pub matrix: String,
    /// The seed it ran with, where one decides anything.
    pub seed: u64,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// Data planes of the farms that were measured; none where there was no farm.
    #[serde(default)]
    pub planes: Vec<Plane>,
    /// Tables, in order.
    pub tables: Vec<Table>,
    /// Values to draw a histogram of.
    pub series: Vec<Series>,
    /// Pictures of bars and lines.
    #[serde(default)]
    pub plots: Vec<Plot>,
    /// Broken promises: each makes the run fail.
    pub violations: Vec<String>,
    /// Goals that were missed; reported, no failure.
    pub missed: Vec<String>,
    /// What a reader must know: what was left out and why.
    pub notes: Vec<String>,
}

impl Outcome {
    /// Nothing found yet.
    pub fn new(matrix: &str, seed: u64) -> Self {
        Self {
            matrix: matrix.to_owned(),
            seed,
            ..Self::default()
        }
    }

    /// Notes a data plane that served, once.
    pub fn served_by(&mut self, plane: Plane) {
        if !self.planes.contains(&plane) {
            self.planes.push(plane);
        }
    }

    /// How it was measured: `34 s, data plane bpf`.
    pub fn circumstances(&self) -> String {
        let planes: BTreeSet<String> = self.planes.iter().map(ToString::to_string).collect();
        let planes: Vec<String> = planes.into_iter().collect();
        if planes.is_empty() {
            format!("{:.0} s", self.seconds)
        } else {
            format!("{:.0} s, data plane {}", self.seconds, planes.join(" and "))
        }
    }

    /// Notes `what` as missed if the 99th percentile of `values` (or the largest, below 100 values) is above `goal`.
    pub fn judge_p99(&mut self, what: &str, values: &[f64], goal: f64) {
        let p99 = quantile(values, 0.99);
        if values.is_empty() {
            self.missed.push(format!("{what}: nothing was measured"));
        } else if p99 > goal {
            self.missed
                .push(format!("{what}: p99 {} ms, goal {goal:.0} ms", cell_ms(p99)));
        }
    }
}

/// A data plane that served while something was measured.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Plane {
    /// What was asked for: by the variable `FARM_PLANE`, or `auto`.
    pub asked: String,
    /// What `farm status` says is in use.
    pub used: String,
    /// And why.
    pub why: String,
}

impl fmt::Display for Plane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { asked, used, why } = self;
        match asked.as_str() {
            same if same == used => f.write_str(used),
            // Whether XDP is ahead of the kernel's decision only the reason says.
            "xdp" => write!(f, "{used} (asked for: xdp; {why})"),
            _ => write!(f, "{used} (asked for: {asked})"),
        }
    }
}

/// One table.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Table {
    /// What it shows, with the unit.
    pub title: String,
    /// Heads of the columns.
    pub columns: Vec<String>,
    /// Cells by row.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new(title: &str, columns: &[&str]) -> Self {
        Self {
            title: title.to_owned(),
            columns: columns.iter().map(|column| (*column).to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().collect());
    }
}

/// A picture: bars of things side by side, or lines over a scale.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Plot {
    /// Its file is called so.
    pub name: String,
    /// What it shows.
    pub title: String,
    /// What the values are, with the unit.
    pub unit: String,
    /// What the points lie over, with the unit; without it each line is a bar.
    pub over: Option<String>,
    /// The scale they lie over grows by factors.
    pub by_factors: bool,
    /// Lines or bars, in order.
    pub lines: Vec<Line>,
    /// A value that is to be reached, or not to be passed.
    pub goal: Option<f64>,
}

/// A line or a bar of a picture.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Line {
    /// What was measured.
    pub name: String,
    /// Where it goes through; a bar has one.
    pub points: Vec<Point>,
}

/// Values that were measured at one place of a scale.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Point {
    /// The place; nothing in a bar.
    pub at: f64,
    /// Every value, in the order of measurement.
    pub values: Vec<f64>,
}

/// Values of one thing.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Series {
    /// Pictures hold all series of one group.
    pub group: String,
    /// What was measured.
    pub name: String,
    /// Milliseconds, in the order of measurement.
    pub values: Vec<f64>,
    /// The goal in milliseconds, if there is one.
    pub goal: Option<f64>,
}

/// The value that `share` (0 to 1) of `values` do not exceed (nearest rank); not a number if there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted
        .get(rank.clamp(1, sorted.len().max(1)) - 1)
        .copied()
        .unwrap_or(f64::NAN)
}

/// Milliseconds for a table: whole ones, below ten with one decimal.
pub fn cell_ms(value: f64) -> String {
    if value.is_nan() {
        "–".to_owned()
    } else if value < 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            (
                quantile(&values, 0.5),
                quantile(&values, 0.99),
                quantile(&values, 1.0),
                quantile(&values, 0.0)
            ),
            (50.0, 99.0, 100.0, 1.0)
        );
        assert!(quantile(&[], 0.5).is_nan());
        assert_eq!(quantile(&[7.0], 0.99), 7.0);
    }

    #[test]
    fn each_data_plane_is_named_once_with_what_was_asked_for() {
        let plane = |asked: &str, why: &str| Plane {
            asked: asked.to_owned(),
            used: "bpf".to_owned(),
            why: why.to_owned(),
        };
        let mut outcome = Outcome::new("x", 1);
        assert_eq!(outcome.circumstances(), "0 s");
        for why in ["a", "b", "a"] {
            outcome.served_by(plane("bpf", why));
        }
        assert_eq!(outcome.planes.len(), 2);
        assert_eq!(outcome.circumstances(), "0 s, data plane bpf");
        outcome.served_by(plane("auto", "a"));
        assert_eq!(outcome.circumstances(), "0 s, data plane bpf and bpf (asked for: auto)");
        assert_eq!(plane("xdp", "XDP").to_string(), "bpf (asked for: xdp; XDP)");
    }

    #[test]
    fn a_result_of_before_data_planes_were_named_can_be_read() {
        let mut old = serde_json::to_value(Outcome::new("x", 1)).unwrap();
        assert!(old.as_object_mut().unwrap().remove("planes").is_some());
        let read: Outcome = serde_json::from_value(old).unwrap();
        assert_eq!(read, Outcome::new("x", 1));
    }

    #[test]
    fn a_goal_is_missed_by_its_99th_percentile_and_by_nothing_measured() {
        let mut outcome = Outcome::new("x", 1);
        outcome.judge_p99("good", &[1.0, 2.0], 2.0);
        outcome.judge_p99("bad", &[1.0, 3.0], 2.0);
        outcome.judge_p99("none", &[], 2.0);
        assert_eq!(outcome.missed.len(), 2, "{:?}", outcome.missed);
    }
}
