//! The record of a run: the machine, every outcome, as text and as JSON.
//!
//! Owns the JSON file: matrices that were not run again keep their earlier results. Never measures anything.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use farm_lab::outcome::{Outcome, Table};
use serde::{Deserialize, Serialize};

/// What was run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Farms were broken on purpose: there are promises, and a seed.
    Chaos,
    /// Speed and cost: there are goals only.
    Bench,
}

impl Kind {
    /// Its name on the command line, in markers and in the names of files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Chaos => "chaos",
            Self::Bench => "bench",
        }
    }
}

/// What a run leaves behind.
#[derive(Serialize, Deserialize)]
pub struct Record {
    /// Processors, memory and kernel.
    pub machine: String,
    /// One for each matrix.
    pub outcomes: Vec<Outcome>,
}

impl Record {
    /// An empty record of this machine.
    pub fn here() -> Self {
        let read = |file: &str| fs::read_to_string(file).unwrap_or_default();
        let processors = std::thread::available_parallelism().map_or(0, usize::from);
        let model = read("/proc/cpuinfo");
        let model = model.lines().find_map(|line| line.strip_prefix("model name"));
        let model = model.map_or("unknown processor", |text| text.trim_start_matches([' ', '\t', ':']));
        let memory = read("/proc/meminfo");
        let memory = memory.lines().find_map(|line| line.strip_prefix("MemTotal:"));
        let gib = memory
            .and_then(|text| text.trim().trim_end_matches(" kB").parse::<f64>().ok())
            .unwrap_or(f64::NAN)
            / 1024.0
            / 1024.0;
        Self {
            machine: format!(
                "{processors} processors ({model}), {gib:.0} GiB, Linux {}",
                read("/proc/sys/kernel/osrelease").trim()
            ),
            outcomes: Vec::new(),
        }
    }

    /// Reads an earlier record.
    pub fn read(file: &Path) -> Result<Self> {
        let text = fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a record of a run", file.display()))
    }

    /// Writes it to `file`, with what the file has of other matrices on the same machine.
    pub fn write(&self, file: &Path) -> Result<()> {
        let mut outcomes = match Self::read(file) {
            Ok(earlier) if earlier.machine == self.machine => earlier.outcomes,
            _ => Vec::new(),
        };
        outcomes.retain(|old| self.outcomes.iter().all(|new| new.matrix != old.matrix));
        outcomes.extend(self.outcomes.iter().cloned());
        let all = Self {
            machine: self.machine.clone(),
            outcomes,
        };
        fs::write(file, serde_json::to_string_pretty(&all)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))
    }
}

/// Prints one outcome.
pub fn print(outcome: &Outcome) {
    for table in &outcome.tables {
        print_table(table);
    }
    for note in &outcome.notes {
        println!("     {note}");
    }
    println!("     ({})", outcome.circumstances());
}

/// The end of a run: every promise and goal in one look.
pub fn print_summary(record: &Record, kind: Kind) {
    println!("\nSummary");
    for outcome in &record.outcomes {
        let verdict = match (kind, outcome.violations.is_empty(), outcome.missed.is_empty()) {
            (Kind::Bench, _, true) => "goals met",
            (Kind::Bench, _, false) => "goals missed",
            (Kind::Chaos, true, true) => "promises kept, goals met",
            (Kind::Chaos, true, false) => "promises kept, goals missed",
            (Kind::Chaos, false, _) => "PROMISES BROKEN",
        };
        println!("  {:<12} {verdict}", outcome.matrix);
        for missed in &outcome.missed {
            println!("  {:<12}   missed: {missed}", "");
        }
        for violation in &outcome.violations {
            println!("  {:<12}   broken: {violation}", "");
        }
    }
}

fn print_table(table: &Table) {
    let width = |column: usize| {
        let cells = table.rows.iter().filter_map(|row| row.get(column));
        cells
            .chain(table.columns.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..table.columns.len()).map(width).collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        println!("     {}", padded.join("  ").trim_end());
    };
    println!("\n     {}", table.title);
    line(&table.columns);
    table.rows.iter().for_each(|row| line(row));
}
