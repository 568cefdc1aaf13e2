//! `farm-lab chaos`: breaks farms on purpose and measures what clients see of it.
//!
//! Owns the options, the order of the matrices, and what is printed and written; the measurements are `farm_lab::chaos`. Ends with
//! failure only if a promise was broken, not because a time was missed.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::Args;
use farm_lab::chaos::freeze::Way;
use farm_lab::chaos::{
    Outcome, Profile, connect, continuity, failover, freeze, partition, planned, soak, traffic, vrrp,
};

use crate::report::record::Kind;
use crate::report::{self, Output};
use crate::stop;

/// Names of the matrices, in the order in which they run.
const MATRICES: [&str; 13] = [
    "failover",
    "planned",
    "planned-raw",
    "connect",
    "connect-raw",
    "continuity",
    "continuity-raw",
    "freeze",
    "freeze-raw",
    "partition",
    "soak",
    "keepalived",
    "traffic",
];

/// Options of `farm-lab chaos`.
#[derive(Args)]
pub struct ChaosArgs {
    /// Only these matrices: failover, planned, connect, continuity, freeze, the last four also with `-raw` for the data plane in user space, partition, soak, keepalived, traffic
    #[arg(long, value_delimiter = ',', value_name = "NAMES", value_parser = MATRICES)]
    only: Vec<String>,
    /// A short form of everything: a few minutes in all; options that are given count all the same
    #[arg(long)]
    short: bool,
    /// Decides victims, moments and shapes; the same seed gives the same plan
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// failover: crashes for each number of nodes and profile [default: 200; short: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    kills: Option<u32>,
    /// failover, traffic: numbers of nodes [default: 2,3,8,16 and 2,8,16,20,32; short: 2,3 and 2,8]
    #[arg(long, value_delimiter = ',', value_parser = clap::value_parser!(u8).range(2..=32))]
    nodes: Vec<u8>,
    /// failover: heartbeat profiles, default (50 ms x 5) and fast (20 ms x 5) [default: both; short: default]
    #[arg(long, value_delimiter = ',', value_parser = ["default", "fast"])]
    profiles: Vec<String>,
    /// connect: crashes under a stream of new connections with each profile [default: 30; short: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    crashes: Option<u32>,
    /// planned: rounds of every planned change [default: 20; short: 2]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: Option<u32>,
    /// continuity: established connections that are held [default: 10000; short: 1000]
    #[arg(long, value_parser = clap::value_parser!(u32).range(10..=50_000))]
    connections: Option<u32>,
    /// freeze: freezes and one-way cuts of each kind [default: 20; short: 2]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    freezes: Option<u32>,
    /// freeze: these ways only: stop (of farmd), freeze (of the node), out and in (nothing gets out or in), heartbeats-out, heartbeats-in [default: all]
    #[arg(long, value_delimiter = ',', value_name = "WAYS", value_parser = Way::named)]
    ways: Vec<Way>,
    /// partition: shapes of 5 nodes; all 64 of 3 nodes run, in short form 8 [default: 20; short: 2]
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    shapes: Option<u32>,
    /// soak: seconds with 8 processor hogs and 5 % loss of heartbeats, for 3 and for 8 nodes [default: 600; short: 10]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    soak: Option<u32>,
    /// keepalived: crashes of each of the three, interleaved [default: 20; short: 2]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    vrrp_kills: Option<u32>,
    #[command(flatten)]
    output: Output,
}

impl ChaosArgs {
    fn number(&self, given: Option<u32>, long: u32, short: u32) -> usize {
        given.unwrap_or(if self.short { short } else { long }) as usize
    }

    fn sizes(&self, long: &[usize], short: &[usize]) -> Vec<usize> {
        match (self.nodes.as_slice(), self.short) {
            ([], true) => short.to_vec(),
            ([], false) => long.to_vec(),
            (given, _) => given.iter().map(|nodes| usize::from(*nodes)).collect(),
        }
    }

    fn profiles(&self) -> Result<Vec<Profile>> {
        let names: Vec<&str> = match (self.profiles.as_slice(), self.short) {
            ([], true) => vec!["default"],
            ([], false) => vec!["default", "fast"],
            (given, _) => given.iter().map(String::as_str).collect(),
        };
        names.into_iter().map(Profile::named).collect()
    }

    fn run(&self, matrix: &str) -> Result<Outcome> {
        let seed = self.seed;
        let say = &mut |text: &str| {
            if !text.is_empty() {
                println!("     {text}");
            }
            stop::check()
        };
        match matrix {
            "failover" => {
                let (nodes, profiles) = (self.sizes(&[2, 3, 8, 16], &[2, 3]), self.profiles()?);
                let kills = self.number(self.kills, 200, 3);
                let options = failover::Options {
                    seed,
                    kills,
                    nodes,
                    profiles,
                };
                failover::run(&options, say)
            }
            "planned" | "planned-raw" => {
                let rounds = self.number(self.rounds, 20, 2);
                Ok(named(matrix, planned::run(seed, rounds, plane_of(matrix), say)?))
            }
            "connect" | "connect-raw" => {
                let crashes = self.number(self.crashes, 30, 3);
                Ok(named(matrix, connect::run(seed, crashes, plane_of(matrix), say)?))
            }
            "continuity" | "continuity-raw" => {
                let held = self.number(self.connections, 10_000, 1000);
                Ok(named(matrix, continuity::run(seed, held, 3, plane_of(matrix), say)?))
            }
            "freeze" | "freeze-raw" => {
                let times = self.number(self.freezes, 20, 2);
                let all = self.ways.is_empty();
                let ways = if all { &freeze::WAYS } else { self.ways.as_slice() };
                Ok(named(matrix, freeze::run(seed, times, ways, plane_of(matrix), say)?))
            }
            "partition" => {
                let of_three = if self.short { 8 } else { 64 };
                partition::run(seed, of_three, self.number(self.shapes, 20, 2), 3, say)
            }
            "soak" => {
                let seconds = self.number(self.soak, 600, 10) as u64;
                soak::run(seed, Duration::from_secs(seconds), &[3, 8], say)
            }
            "keepalived" => vrrp::run(seed, self.number(self.vrrp_kills, 20, 2), say),
            "traffic" => traffic::run(&self.sizes(&[2, 8, 16, 20, 32], &[2, 8]), say),
            _ => bail!("there is no matrix `{matrix}`"),
        }
    }
}

/// Runs what was asked for, or only writes what an earlier run has measured; false if a promise was broken.
pub fn run(args: &ChaosArgs) -> Result<bool> {
    let chosen: Vec<&str> = MATRICES
        .into_iter()
        .filter(|name| args.only.is_empty() || args.only.iter().any(|only| only == name))
        .collect();
    let record = report::run(&args.output, Kind::Chaos, &chosen, |name| args.run(name))?;
    Ok(record.outcomes.iter().all(|outcome| outcome.violations.is_empty()))
}

/// The data plane that a matrix has in its name.
fn plane_of(matrix: &str) -> Option<&'static str> {
    matrix.ends_with("-raw").then_some("raw")
}

/// Under the name of the matrix; the picture of a kind is of the matrix that has the short one.
fn named(matrix: &str, mut outcome: Outcome) -> Outcome {
    if outcome.matrix != matrix {
        outcome.matrix = matrix.to_owned();
        outcome.series.clear();
    }
    outcome
}
