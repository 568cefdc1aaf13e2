//! `farm-lab bench`: what the farm is like in speed and cost, beside others, in rounds over all of them.
//!
//! Owns the options, the order of the parts, and what is printed and written; the measurements are `farm_lab::bench`. A missed goal is told and is no
//! failure.

mod plan;

use anyhow::{Result, bail};
use clap::Args;
use farm_lab::bench::{Effort, cost, drop, growth, rest, ways};
use farm_lab::outcome::Outcome;

use crate::report::record::Kind;
use crate::report::{self, Output};
use crate::stop;

/// Names of the parts, in the order in which they run.
const PARTS: [&str; 6] = [ways::NAME, cost::NAME, drop::NAME, plan::NAME, rest::NAME, growth::NAME];

/// Options of `farm-lab bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// Only these parts: ways, cost, drop, plan, rest, growth
    #[arg(long, value_delimiter = ',', value_name = "NAMES", value_parser = PARTS)]
    only: Vec<String>,
    /// A short form of everything: two minutes or so in all; options that are given count all the same
    #[arg(long)]
    short: bool,
    /// Rounds over all rivals; the median counts [default: 3 to 15, by part; short: 1 to 5]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=50))]
    rounds: Option<u8>,
    /// Seconds of each measurement of traffic, or of nothing to do [default: 2 to 20, by part; short: 1 to 3]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=60))]
    seconds: Option<u8>,
    #[command(flatten)]
    output: Output,
}

impl BenchArgs {
    fn effort(&self) -> Effort {
        Effort {
            short: self.short,
            rounds: self.rounds.map(usize::from),
            seconds: self.seconds.map(u64::from),
        }
    }

    fn run(&self, part: &str) -> Result<Outcome> {
        let say = &mut |text: &str| {
            if !text.is_empty() {
                println!("     {text}");
            }
            stop::check()
        };
        let effort = self.effort();
        match part {
            ways::NAME => ways::run(effort, say),
            cost::NAME => cost::run(effort, say),
            drop::NAME => drop::run(effort, say),
            plan::NAME => plan::run(),
            rest::NAME => rest::run(effort, say),
            growth::NAME => growth::run(effort, say),
            _ => bail!("there is no part `{part}`"),
        }
    }
}

/// Runs what was asked for, or only writes what an earlier run has measured; always true when it could.
pub fn run(args: &BenchArgs) -> Result<bool> {
    let chosen: Vec<&str> = PARTS
        .into_iter()
        .filter(|name| args.only.is_empty() || args.only.iter().any(|only| only == name))
        .collect();
    report::run(&args.output, Kind::Bench, &chosen, |name| args.run(name))?;
    Ok(true)
}
