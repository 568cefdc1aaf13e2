//! farmd(8): reads the command line and starts the daemon.

use std::path::PathBuf;
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};
use farm_sys::process::Signal;
use farm_sys::signal_fd::SignalFd;
use farmd::effect::End;
use farmd::host::{self, DeviceOwner};
use farmd::logwriter::{self, FLUSH_LIMIT};
use farmd::script::Folders;
use farmd::start::{self, Exit, Options};
use tracing::level_filters::LevelFilter;
use tracing::warn;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// The daemon of a farm: servers that share one virtual address.
///
/// Exit codes: 0 ended as asked, 64 usage, 65 cluster.xml or cluster.key wrong, 69 port in use or already running, 74 file error, 77 not allowed, 1 other.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Configuration: cluster.xml, cluster.key, modules.
    #[arg(long, env = "FARM_ETC", default_value = "/etc/farm")]
    etc: PathBuf,
    /// State: active modules, logs.
    #[arg(long, env = "FARM_VAR", default_value = "/var/lib/farm")]
    var: PathBuf,
    /// Control socket and lock.
    #[arg(long, env = "FARM_RUN", default_value = "/run/farm")]
    run: PathBuf,
    /// Name of this node in cluster.xml; without it the node with one of this host's addresses.
    #[arg(long, env = "FARM_NODE")]
    node: Option<String>,
    #[command(subcommand)]
    command: Option<Verb>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Undo what a killed farmd has left on the host, and end.
    Cleanup,
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let usage = error.use_stderr();
            // Nothing can be said if even the message cannot be written.
            let _ = error.print();
            return ExitCode::from(if usage { Exit::Usage as u8 } else { 0 });
        }
    };
    // Before there is a second thread, which would be ended by what this one blocks. A clean-up may be.
    let signals = match &arguments.command {
        Some(Verb::Cleanup) => None,
        None => match SignalFd::block(&[Signal::Term, Signal::Int]) {
            Ok(signals) => Some(signals),
            Err(error) => {
                eprintln!("farmd: signals cannot be read: {error}");
                return ExitCode::from(Exit::Failed as u8);
            }
        },
    };
    let (filter, problem) = filter(std::env::var("FARM_LOG").ok().as_deref());
    // Nothing on the way of a heartbeat or a packet may wait for whoever reads this output.
    match logwriter::start(std::io::stderr()) {
        Ok(writer) => tracing_subscriber::fmt()
            .with_max_level(LevelFilter::TRACE)
            .with_writer(writer)
            .with_ansi(false)
            .finish()
            .with(filter)
            .init(),
        Err(error) => {
            eprintln!("farmd: no thread for the log can be started: {error}");
            return ExitCode::from(Exit::Failed as u8);
        }
    }
    if let Some(problem) = problem {
        warn!("{problem}");
    }
    logwriter::end_at_panics();
    let Arguments {
        etc,
        var,
        run,
        node,
        command: _,
    } = arguments;
    let folders = Folders {
        etc,
        var,
        run,
        node: String::new(),
    };
    match signals {
        None => clean_up(&folders),
        Some(signals) => {
            // Before it may be replaced by a newer one of the same name.
            let program = std::env::current_exe();
            let result = start::run(&Options { folders, node }, signals);
            logwriter::flush(FLUSH_LIMIT);
            match result {
                Ok(End::Exit) => ExitCode::SUCCESS,
                Ok(End::Reload) => restart(program),
                Err(error) => {
                    eprintln!("farmd: {error}");
                    ExitCode::from(error.exit as u8)
                }
            }
        }
    }
}

/// Puts another farmd, with the same words, in the place of this one; returns only if that fails.
///
/// A SIGTERM that has come since the owner loop ended waits in the process, and that farmd reads it.
fn restart(program: std::io::Result<PathBuf>) -> ExitCode {
    use std::os::unix::process::CommandExt as _;
    let error = match program {
        Ok(program) => {
            let error = Command::new(&program).args(std::env::args_os().skip(1)).exec();
            format!("{}: {error}", program.display())
        }
        Err(error) => format!("own path: {error}"),
    };
    eprintln!("farmd: cannot restart in place: {error}; start it again: its modules start as at a boot");
    ExitCode::from(Exit::Failed as u8)
}

fn clean_up(folders: &Folders) -> ExitCode {
    // Held to the end: a farmd that starts meanwhile would lose what it sets up.
    let _lock = match start::lock(&folders.run) {
        Ok(lock) => lock,
        Err(error) => {
            eprintln!("farmd: {error}");
            return ExitCode::from(error.exit as u8);
        }
    };
    let owner = host::device_owner();
    if owner == DeviceOwner::InUse {
        eprintln!(
            "farmd: {} is there: a farmd is running in this network namespace; stop it first",
            host::DEVICE
        );
        return ExitCode::from(Exit::Unavailable as u8);
    }
    let (mut done, mut problems) = host::clean_up(&folders.var);
    if owner == DeviceOwner::Left {
        match host::remove_left_device() {
            Ok(()) => done.push(format!("{} removed", host::DEVICE)),
            Err(error) => problems.push(format!("{}: {error}", host::DEVICE)),
        }
    }
    if done.is_empty() && problems.is_empty() {
        println!("nothing to undo");
    }
    done.iter().for_each(|step| println!("{step}"));
    problems.iter().for_each(|problem| eprintln!("farmd: {problem}"));
    ExitCode::from(if problems.is_empty() {
        Exit::Ok as u8
    } else {
        Exit::Failed as u8
    })
}

/// What goes to standard error by `FARM_LOG`, and what is wrong with that.
fn filter(wanted: Option<&str>) -> (Targets, Option<String>) {
    let usual = || Targets::new().with_default(LevelFilter::INFO);
    match wanted.map(str::parse) {
        None => (usual(), None),
        Some(Ok(filter)) => (filter, None),
        Some(Err(error)) => (
            usual(),
            Some(format!("FARM_LOG is not understood, info counts: {error}")),
        ),
    }
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn the_filter_is_a_level_or_levels_by_module_and_info_if_it_is_neither() {
        let (by_module, none) = filter(Some("info,farmd::dataplane=debug"));
        assert!(by_module.would_enable("farmd::dataplane::raw", &Level::DEBUG) && none.is_none());
        assert!(!by_module.would_enable("farmd::node", &Level::DEBUG));
        assert!(filter(Some("debug")).0.would_enable("farmd", &Level::DEBUG));
        let (usual, problem) = filter(Some("farmd=loud"));
        assert!(usual.would_enable("farmd", &Level::INFO) && !usual.would_enable("farmd", &Level::DEBUG));
        assert!(problem.is_some_and(|text| text.contains("FARM_LOG")));
        assert!(filter(None).1.is_none());
    }
}
