//! `farm`, the farm's command line; under the name `safekit` the same for the scripts of modules.
//!
//! Owns reading the words, choosing the verb, and saying once how it ended. Decides nothing about a farm: what needs a decision is
//! asked of farmd over the control socket. Verbs that must work when farmd is dead (`confcheck`, `history`, `log`, `module`,
//! `snapshot`, `cleanup`, `cluster genkey`) read the files themselves.

mod args;
mod cleanup;
mod client;
mod cluster;
mod command;
mod confcheck;
mod demo_server;
mod failure;
mod flows;
mod folders;
mod history;
mod log;
mod map;
mod module;
mod reload;
mod rolling;
mod safekit;
mod share;
mod snapshot;
mod status;
mod terminal;
mod trace;
mod why;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches};
use farm_core::api::exit;

use crate::args::{Cli, Verb};
use crate::failure::Failure;
use crate::folders::Context;

fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let program = program_name(&words);
    let json = words.iter().any(|word| word == "--json");
    let code = match parse(program, &words) {
        Ok(None) => exit::OK,
        Ok(Some(cli)) => run(cli).unwrap_or_else(|failure| report(program, json, &failure)),
        Err(failure) => report(program, json, &failure),
    };
    ExitCode::from(code)
}

/// `safekit` if the program was called so, else `farm`.
fn program_name(words: &[OsString]) -> &'static str {
    let name = words.first().and_then(|word| Path::new(word).file_name());
    if name.is_some_and(|name| name == "safekit") {
        "safekit"
    } else {
        "farm"
    }
}

/// The words as a command; `None` if help or the version was asked for and shown.
fn parse(program: &'static str, words: &[OsString]) -> Result<Option<Cli>, Failure> {
    let parsed = Cli::command()
        .name(program)
        .bin_name(program)
        .try_get_matches_from(words)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let error = match parsed {
        Ok(cli) => return Ok(Some(cli)),
        Err(error) => error,
    };
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            terminal::show(&error.to_string())?;
            Ok(None)
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = writeln!(std::io::stderr(), "{error}");
            Err(Failure::usage("a command is expected"))
        }
        _ => {
            let text = error.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
            Err(Failure::usage(
                safekit::explain(words).unwrap_or_else(|| text.to_owned()),
            ))
        }
    }
}

/// Runs one verb.
fn run(cli: Cli) -> Result<u8, Failure> {
    let environment = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let context = Context {
        etc: folder(cli.etc, "FARM_ETC", "/etc/farm"),
        var: folder(cli.var, "FARM_VAR", "/var/lib/farm"),
        run: folder(cli.run, "FARM_RUN", "/run/farm"),
        json: cli.json,
        module: cli.chosen_module,
        module_of_environment: environment("FARM_MODULE").or_else(|| environment("SAFEMODULE")),
        node: None,
        in_script: environment("SAFEUSERBIN").is_some(),
    };
    if cli.on.is_empty() {
        return perform(&context, &cli.verb);
    }
    share::on_nodes(&context, &cli.on, &cli.verb, perform)
}

/// The folder that was named, else that of the environment, else the usual one.
fn folder(named: Option<PathBuf>, variable: &str, usual: &str) -> PathBuf {
    let of_environment = || std::env::var_os(variable).filter(|value| !value.is_empty());
    named
        .or_else(|| of_environment().map(PathBuf::from))
        .unwrap_or_else(|| usual.into())
}

/// Does what one verb says, on the node that `context` names.
fn perform(context: &Context, verb: &Verb) -> Result<u8, Failure> {
    match verb {
        Verb::Start(args) => command::run(context, "start", args),
        Verb::Stop(args) => command::run(context, "stop", args),
        Verb::Restart(args) => command::run(context, "restart", args),
        Verb::Stopstart(args) => command::run(context, "stopstart", args),
        Verb::Forcestop(args) => command::run(context, "forcestop", args),
        Verb::Drain(args) => share::drain(context, args),
        Verb::Undrain(args) => share::undrain(context, args),
        Verb::Weight(args) => share::weight(context, args),
        Verb::RollingRestart(args) => rolling::run(context, args),
        Verb::Status(args) => status::run(context, args),
        Verb::Waitstart(args) => status::wait_start(context, args),
        Verb::Waitstop(args) => status::wait_stop(context, args),
        Verb::Waitstate(args) => status::wait_state(context, args),
        Verb::Config(args) => command::configure(context, "config", args),
        Verb::Deconfig(args) => command::configure(context, "deconfig", args),
        Verb::Confcheck(args) => confcheck::run(context, args),
        Verb::History(args) => history::run(context, args),
        Verb::Why(args) => why::run(context, args),
        Verb::Map(args) => map::run(context, args),
        Verb::Flows(args) => flows::run(context, args),
        Verb::Trace(args) => trace::run(context, args),
        Verb::Log(args) => log::run(context, args),
        Verb::Module(verb) => module::run(context, verb),
        Verb::Cluster(verb) => cluster::run(context, verb),
        Verb::Snapshot(args) => snapshot::run(context, args),
        Verb::Cleanup => cleanup::run(context),
        Verb::Reload => reload::run(context),
        Verb::Shutdown => command::shutdown(context),
        Verb::Printi(args) => safekit::print(context, 'I', args),
        Verb::Printe(args) => safekit::print(context, 'E', args),
        Verb::Set(args) => safekit::set(context, args),
        Verb::Get(args) => status::get(context, &args.resource),
        Verb::DemoServer(args) => demo_server::run(args),
    }
}

/// Says once why the command failed, and returns the exit code.
fn report(program: &str, json: bool, failure: &Failure) -> u8 {
    if failure.silent {
        return failure.code;
    }
    if json {
        // Nobody is left to tell if this fails.
        let _ = terminal::show_json(&failure.to_json());
    }
    if !failure.text.is_empty() {
        let _ = writeln!(std::io::stderr(), "{program}: {}", failure.text.trim_end());
    }
    failure.code
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    fn parsed(line: &str) -> Cli {
        let words = words(line);
        parse(program_name(&words), &words).unwrap().unwrap()
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_module_may_stand_before_or_after_the_verb() {
        assert_eq!(parsed("farm -m web start").chosen_module.as_deref(), Some("web"));
        assert_eq!(
            parsed("/opt/safekit/safekit stop -i tcp -m web")
                .chosen_module
                .as_deref(),
            Some("web")
        );
        let Verb::Start(args) = parsed("farm start web --no-wait").verb else {
            panic!()
        };
        assert_eq!(args.module.as_deref(), Some("web"));
    }

    #[test]
    fn the_words_of_module_scripts_are_understood() {
        let Verb::Printi(args) = parsed("safekit printi -m web -x is no option").verb else {
            panic!()
        };
        assert_eq!(args.text.join(" "), "-x is no option");
        let Verb::Set(args) = parsed("safekit set -m web -r custom.a -v up -i me").verb else {
            panic!()
        };
        assert_eq!(
            (args.resource.as_str(), args.value.as_str(), args.identity.as_deref()),
            ("custom.a", "up", Some("me"))
        );
        assert!(matches!(parsed("safekit state -m web -v").verb, Verb::Status(_)));
        assert!(matches!(
            parsed("safekit waitstate -m web STOP").verb,
            Verb::Waitstate(_)
        ));
        let Verb::Waitstate(args) = parsed("farm waitstate UP web").verb else {
            panic!()
        };
        assert_eq!(args.words, ["UP", "web"]);
    }

    #[test]
    fn wrong_words_are_one_usage_error() {
        for line in [
            "farm",
            "farm strat web",
            "farm start --wait --no-wait",
            "farm status --interval 2",
            "farm weight s2 -1",
            "farm drain --timeout -5",
            "safekit swap -m a",
        ] {
            let words = words(line);
            let failure = parse(program_name(&words), &words).unwrap_err();
            assert_eq!(failure.code, exit::USAGE, "{line}");
        }
        let text = |line: &str| parse("farm", &words(line)).unwrap_err().text;
        assert!(text("farm weight s2 -1").contains("0 to 65535"));
        assert!(text("farm drain --timeout -5").contains("at most a day"));
    }
}
