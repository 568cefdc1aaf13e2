//! `farm-lab`: the farm in a box for people. Shows it (`demo`), measures it (`bench`), breaks it on purpose (`chaos`), or leaves it running (`up`).
//!
//! Owns the command line and the way out: Ctrl-C and SIGTERM end it in an orderly way, and nothing is left behind whatever ends it.
//! All work is done by the `farm_lab` library.

mod bench;
mod chaos;
mod demo;
mod report;
mod screen;
mod stop;
mod up;

use std::net::Ipv4Addr;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use farm_lab::Mode;

#[derive(Parser)]
#[command(
    name = "farm-lab",
    about = "A farm of servers in network namespaces of this machine",
    version
)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a farm at work: spread, the loss of a node, its return
    Demo {
        /// End after the show with one line of JSON; exit 0 only if the farm did its job
        #[arg(long)]
        once: bool,
        /// Number of servers
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=16))]
        nodes: u8,
        /// How frames for the virtual IP reach the servers
        #[arg(long, value_enum, default_value_t = ModeArg::Directed)]
        mode: ModeArg,
    },
    /// Measure speed and cost: the farm beside others, its kernel program, its daemon, and how all that grows
    Bench(Box<bench::BenchArgs>),
    /// Break farms on purpose and measure what clients see: crashes, freezes, partitions, planned changes
    Chaos(Box<chaos::ChaosArgs>),
    /// Serve as the application of a node under `chaos`
    #[command(hide = true)]
    Responder {
        /// The node's name
        #[arg(long)]
        name: String,
        /// A virtual address that answers datagrams
        #[arg(long)]
        vip: Vec<Ipv4Addr>,
    },
    /// Hold many connections for `bench`
    #[command(hide = true)]
    Connections {
        /// Number of the first
        #[arg(long)]
        from: usize,
        /// And of the one after the last
        #[arg(long)]
        to: usize,
    },
    /// Run a farm with nginx to play with, until Ctrl-C
    Up {
        /// Number of servers
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=32))]
        nodes: u8,
        /// How frames for the virtual IP reach the servers
        #[arg(long, value_enum, default_value_t = ModeArg::Directed)]
        mode: ModeArg,
        /// Add a router with a client behind it
        #[arg(long)]
        routed: bool,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum ModeArg {
    /// Each client enters by one server, which forwards what is not its own
    Directed,
    /// One virtual MAC that the switch floods to all servers
    Invisible,
}

impl From<ModeArg> for Mode {
    fn from(mode: ModeArg) -> Self {
        match mode {
            ModeArg::Directed => Self::Directed,
            ModeArg::Invisible => Self::Invisible,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if let Command::Responder { name, vip } = &args.command {
        return serve(name, vip);
    }
    if let Command::Connections { from, to } = &args.command {
        return hold(*from, *to);
    }
    stop::watch();
    let result = match args.command {
        Command::Demo { once, nodes, mode } => demo::run(once, nodes.into(), mode.into()),
        Command::Bench(args) => bench::run(&args),
        Command::Up { nodes, mode, routed } => up::run(nodes.into(), mode.into(), routed),
        Command::Chaos(args) => chaos::run(&args),
        // Served above: programs of their own, which any signal ends at once.
        Command::Responder { .. } | Command::Connections { .. } => Ok(true),
    };
    farm_lab::clean_up();
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if stop::asked() => ExitCode::from(130),
        Err(error) => {
            eprintln!("farm-lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Connections, until it is ended.
fn hold(from: usize, to: usize) -> ExitCode {
    match farm_lab::bench::growth::connections::hold(from, to) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The application of a node, until it is ended.
fn serve(name: &str, vips: &[Ipv4Addr]) -> ExitCode {
    match farm_lab::responder::run(name, vips) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("farm-lab responder: {error}");
            ExitCode::FAILURE
        }
    }
}
