//! What `farm-lab chaos` and `farm-lab bench` leave behind: the record of a run as text and JSON, its tables in a Markdown file, its pictures.
//!
//! Owns the options that say where that goes, and the order of a run. What is measured is given to it.

pub mod histogram;
pub mod markdown;
pub mod plot;
pub mod record;
mod svg;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use farm_lab::outcome::Outcome;

use record::{Kind, Record};

/// Where the results go, or come from.
#[derive(Args)]
pub struct Output {
    /// Write every value to this file as JSON; what of an earlier run did not run again stays in it
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write pictures into this folder as SVG
    #[arg(long, value_name = "FOLDER")]
    svg: Option<PathBuf>,
    /// Write the tables between the markers of this Markdown file
    #[arg(long, value_name = "FILE")]
    markdown: Option<PathBuf>,
    /// Run nothing: take the results from this JSON file, for --svg and --markdown
    #[arg(long, value_name = "FILE", conflicts_with = "json")]
    from: Option<PathBuf>,
}

/// Has each of `names` measured in turn, or only writes what an earlier run has measured; the record of this run.
///
/// # Errors
/// A measurement ends with one, or a file cannot be read or written.
pub fn run(
    output: &Output,
    kind: Kind,
    names: &[&str],
    measure: impl FnMut(&str) -> Result<Outcome>,
) -> Result<Record> {
    let record = match &output.from {
        Some(file) => Record::read(file)?,
        None => measure_all(output, kind, names, measure)?,
    };
    // With what the file has of earlier runs, so that one part can be repeated without losing the others.
    let all = match &output.json {
        Some(file) => &Record::read(file)?,
        None => &record,
    };
    if let Some(folder) = &output.svg {
        let files = match kind {
            Kind::Chaos => histogram::write_all(all, folder)?,
            Kind::Bench => plot::write_all(all, folder, kind)?,
        };
        for file in files {
            println!("wrote {}", file.display());
        }
    }
    if let Some(file) = &output.markdown {
        markdown::fill(all, file, kind)?;
        println!("wrote {}", file.display());
    }
    Ok(record)
}

fn measure_all(
    output: &Output,
    kind: Kind,
    names: &[&str],
    mut measure: impl FnMut(&str) -> Result<Outcome>,
) -> Result<Record> {
    let mut record = Record::here();
    println!("{}", record.machine);
    for (index, name) in names.iter().enumerate() {
        println!("\n{}/{}  {name}", index + 1, names.len());
        let begun = Instant::now();
        let mut outcome = measure(name)?;
        outcome.seconds = begun.elapsed().as_secs_f64();
        record::print(&outcome);
        record.outcomes.push(outcome);
        // After each part, so that a run that is ended early leaves what it has measured.
        if let Some(file) = &output.json {
            record.write(file)?;
        }
    }
    record::print_summary(&record, kind);
    Ok(record)
}
