//! The words of the command line, as clap reads them. Nothing here acts.

pub mod look;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use look::{FlowsArgs, MapArgs, TraceArgs, WhyArgs};

/// Shown under every help text of the program.
const EXIT_CODES: &str = "\
Exit codes:
   0  done; status: every node is UP Ready
   1  asked for and not reached: a script failed, a time ran out
   2  status: not every node is UP Ready
   3  status: the module is stopped on every node
   4  the daemon is not running or does not answer
   5  no such module, group, node, virtual IP or file
   6  refused in the present state
  64  wrong words on the command line
  65  a configuration or module file is wrong
  74  a file could not be read or written
  77  not allowed

The module may be named as an argument, with -m, in FARM_MODULE, or in
SAFEMODULE. Under the name `safekit` the program takes the same words.
A command given with -i or by a module's script returns at once, because
the module may be waiting for that script; --wait waits all the same.";

/// Controls the farm: servers that share one virtual IP without a load balancer in front.
#[derive(Debug, Parser)]
#[command(name = "farm", version, after_help = EXIT_CODES, subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// Show JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// The module that is meant
    #[arg(short = 'm', long = "module", global = true, value_name = "AM")]
    pub chosen_module: Option<String>,
    /// Have these nodes do it, one after the other; `*` means all
    #[arg(short = 'H', long = "on", global = true, value_name = "NODE", value_delimiter = ',')]
    pub on: Vec<String>,
    // Read from the environment by `folder`, not by clap, which would show them in each usage line once they are set there.
    /// Folder of cluster.xml, the key and the modules [FARM_ETC, else /etc/farm]
    #[arg(long, global = true, value_name = "DIR")]
    pub etc: Option<PathBuf>,
    /// Folder of active copies, logs and state [FARM_VAR, else /var/lib/farm]
    #[arg(long, global = true, value_name = "DIR")]
    pub var: Option<PathBuf>,
    /// Folder of the control socket [FARM_RUN, else /run/farm]
    #[arg(long, global = true, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Start a module on this node
    Start(CommandArgs),
    /// Stop a module on this node; its connections end in peace, its share goes to the others
    Stop(CommandArgs),
    /// Stop and start the application; the module stays, the others have its share meanwhile
    Restart(CommandArgs),
    /// Stop and start the module
    Stopstart(CommandArgs),
    /// Stop a module without its graceful pass
    Forcestop(CommandArgs),
    /// Give a node's share away, and wait until its connections have ended
    Drain(DrainArgs),
    /// Take a drained node's share back
    Undrain(UndrainArgs),
    /// Change a node's weight at run time
    Weight(WeightArgs),
    /// Drain and restart all nodes, one at a time, under load
    RollingRestart(RollingArgs),
    /// Show the whole farm: state, share and reason of every node
    #[command(visible_alias = "state")]
    Status(StatusArgs),
    /// Wait until a module is UP Ready on this node
    Waitstart(WaitArgs),
    /// Wait until a module is stopped on this node
    Waitstop(WaitArgs),
    /// Wait until a module is in a stable state on this node
    Waitstate(WaitStateArgs),
    /// Check a module's files and make them the active copy
    Config(ModuleArgs),
    /// Remove a module's active copy
    Deconfig(ModuleArgs),
    /// Check configuration files without a daemon
    Confcheck(ConfcheckArgs),
    /// Show a module's log or its scripts' output
    Log(LogArgs),
    /// Show what happened to the farm: who went, who said so, what moved, how long it took
    History(HistoryArgs),
    /// Show who answers a client, and why: rule, bucket, owner, since when, and what a frame gets
    Why(WhyArgs),
    /// Show whose each of the 4096 buckets is
    Map(MapArgs),
    /// Show which connections this node has, and whose buckets they are in
    Flows(FlowsArgs),
    /// Show frames of virtual IPs as they come in on this node, with what becomes of each, and why
    Trace(TraceArgs),
    /// List, install, uninstall and package modules
    #[command(subcommand)]
    Module(ModuleVerb),
    /// Key, state and configuration of the cluster
    #[command(subcommand)]
    Cluster(ClusterVerb),
    /// Put everything that support needs, without secrets, into a zip file
    Snapshot(SnapshotArgs),
    /// Undo what a killed daemon left on this host
    Cleanup,
    /// Restart the daemon of this node in place: applications go on, no connection ends
    Reload,
    /// Stop all modules, then the daemon
    Shutdown,
    /// Write an information line into the module log
    Printi(PrintArgs),
    /// Write an event line into the module log
    Printe(PrintArgs),
    /// Set a resource
    Set(SetArgs),
    /// Show a resource's value
    Get(GetArgs),
    /// Serve a small web page that tells which node answered
    DemoServer(DemoServerArgs),
}

/// Words of `start` and its like.
#[derive(Args, Debug)]
pub struct CommandArgs {
    /// The module
    #[arg(value_name = "AM")]
    pub module: Option<String>,
    /// Name of the checker or script that asks; counts towards maxloop
    #[arg(short, long, value_name = "NAME")]
    pub identity: Option<String>,
    /// Return as soon as the daemon has taken the command
    #[arg(long, conflicts_with = "wait")]
    pub no_wait: bool,
    /// Return when the module has reached its new state, although a script asks
    #[arg(long)]
    pub wait: bool,
}

/// Words of `drain`.
#[derive(Args, Debug)]
pub struct DrainArgs {
    /// The node (this one if not given)
    pub node: Option<String>,
    /// Reset the connections that are left after this time
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time, allow_negative_numbers = true)]
    pub timeout: Duration,
    /// Only this group
    #[arg(long)]
    pub group: Option<String>,
    /// Drain although no other node would serve
    #[arg(long)]
    pub force: bool,
    /// Return at once; the connections have their time all the same
    #[arg(long)]
    pub no_wait: bool,
}

/// Words of `undrain`.
#[derive(Args, Debug)]
pub struct UndrainArgs {
    /// The node (this one if not given)
    pub node: Option<String>,
    /// Only this group
    #[arg(long)]
    pub group: Option<String>,
}

/// Words of `weight`.
#[derive(Args, Debug)]
pub struct WeightArgs {
    /// The node
    pub node: String,
    /// 0 to 65535, or `default` for what the configuration says
    #[arg(value_name = "N", value_parser = weight, allow_negative_numbers = true)]
    pub weight: Weight,
    /// Only this group
    #[arg(long)]
    pub group: Option<String>,
    /// Set it to 0 although no other node would serve
    #[arg(long)]
    pub force: bool,
}

/// `N` or `default`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Weight(pub Option<u16>);

/// Words of `rolling-restart`.
#[derive(Args, Debug)]
pub struct RollingArgs {
    /// The module (all of them if not given)
    #[arg(value_name = "AM")]
    pub module: Option<String>,
    /// On each node, reset the connections that are left after this time
    #[arg(long, value_name = "TIME", default_value = "10m", value_parser = time)]
    pub timeout: Duration,
    /// Restart farmd in place on each node, and no application: no connection ends
    #[arg(long, conflicts_with_all = ["module", "timeout"])]
    pub daemon: bool,
}

/// A time such as `90s`, `10m` or `500ms`; a number alone counts seconds. At most a day.
fn time(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, u64); 5] = [
        ("ms", 1),
        ("s", 1000),
        ("m", 60_000),
        ("h", 3_600_000),
        ("d", 86_400_000),
    ];
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = if unit.is_empty() { "s" } else { unit };
    let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
    let millis = number
        .parse::<u64>()
        .ok()
        .zip(factor)
        .and_then(|(n, factor)| n.checked_mul(factor));
    millis
        .filter(|millis| *millis <= 86_400_000)
        .map(Duration::from_millis)
        .ok_or_else(|| "a time of at most a day is expected, for example 90s, 10m or 1h".to_owned())
}

fn weight(text: &str) -> Result<Weight, String> {
    if text == "default" {
        return Ok(Weight(None));
    }
    text.parse()
        .map(|weight| Weight(Some(weight)))
        .map_err(|_| "a number from 0 to 65535, or `default`, is expected".to_owned())
}

/// Words of verbs that need only a module.
#[derive(Args, Debug)]
pub struct ModuleArgs {
    /// The module
    #[arg(value_name = "AM")]
    pub module: Option<String>,
}

/// Words of `status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Only this module
    #[arg(value_name = "AM")]
    pub module: Option<String>,
    /// Resources, the view, and how each node is heard on each lan
    #[arg(short, long)]
    pub verbose: bool,
    /// Show it again and again
    #[arg(short, long)]
    pub watch: bool,
    /// Time between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, requires = "watch")]
    pub interval: f64,
}

/// Words of `waitstart` and `waitstop`.
#[derive(Args, Debug)]
pub struct WaitArgs {
    /// The module
    #[arg(value_name = "AM")]
    pub module: Option<String>,
    /// Give up after this time
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
}

/// Words of `waitstate`.
#[derive(Args, Debug)]
pub struct WaitStateArgs {
    /// STOP, WAIT or UP, and the module, in any order
    #[arg(required = true, num_args = 1..=2, value_names = ["STATE", "AM"])]
    pub words: Vec<String>,
    /// Give up after this time
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
}

/// Words of `confcheck`.
#[derive(Args, Debug)]
pub struct ConfcheckArgs {
    /// cluster.xml or userconfig.xml files
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Check the names of nodes and lans against this cluster.xml
    #[arg(long, value_name = "FILE")]
    pub cluster: Option<PathBuf>,
}

/// Words of `log`.
#[derive(Args, Debug)]
pub struct LogArgs {
    /// The module
    #[arg(value_name = "AM")]
    pub module: Option<String>,
    /// Go on showing new lines
    #[arg(short, long)]
    pub follow: bool,
    /// Show this many of the last lines
    #[arg(short = 'n', long, value_name = "N", default_value_t = 100)]
    pub lines: usize,
    /// Show debug lines too
    #[arg(short, long)]
    pub verbose: bool,
    /// Show the newest output of a script (of any, or of the one named)
    #[arg(long, value_name = "SCRIPT", num_args = 0..=1, default_missing_value = "")]
    pub script: Option<String>,
    /// List the files of script output (of all, or with --script of one)
    #[arg(long, conflicts_with = "follow")]
    pub list: bool,
}

/// Words of `history`.
#[derive(Args, Debug)]
pub struct HistoryArgs {
    /// Only what is about this module, and what is about nodes
    #[arg(value_name = "AM")]
    pub module: Option<String>,
    /// Only from then on: 90s, 10m, 2h, 3d ago; 03:10; 2026-11-21; "2026-11-21 03:10"
    #[arg(long, value_name = "T")]
    pub since: Option<String>,
    /// Show this many of the newest entries (100; all with --since)
    #[arg(short = 'n', long, value_name = "N")]
    pub lines: Option<usize>,
    /// Show all that is known of each entry
    #[arg(short, long)]
    pub verbose: bool,
    /// Go on showing new entries
    #[arg(short, long)]
    pub follow: bool,
}

/// Words of `module`.
#[derive(Debug, Subcommand)]
pub enum ModuleVerb {
    /// List the installed modules
    List,
    /// Install a module from a .safe file or a folder
    Install(InstallArgs),
    /// Remove a stopped module; a copy is kept under VAR/backup
    Uninstall(ModuleArgs),
    /// Make a .safe file of an installed module
    Package(PackageArgs),
}

/// Words of `module install`.
#[derive(Args, Debug)]
pub struct InstallArgs {
    /// A .safe or .zip file, or a folder with conf/userconfig.xml
    pub path: PathBuf,
    /// Name to install it under (the file's name if not given)
    #[arg(long, value_name = "AM")]
    pub name: Option<String>,
    /// Replace an installed module of that name
    #[arg(long)]
    pub replace: bool,
}

/// Words of `module package`.
#[derive(Args, Debug)]
pub struct PackageArgs {
    /// The module
    #[arg(value_name = "AM")]
    pub module: String,
    /// The file to make
    #[arg(value_name = "OUT.safe")]
    pub out: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    pub replace: bool,
}

/// Words of `cluster`.
#[derive(Debug, Subcommand)]
pub enum ClusterVerb {
    /// Make the key that the nodes prove themselves with
    Genkey {
        /// Replace an existing key; the other nodes need the new one too
        #[arg(long)]
        force: bool,
    },
    /// Show who hears whom
    State,
    /// Check cluster.xml without a daemon
    Confcheck {
        /// The file (ETC/cluster.xml if not given)
        file: Option<PathBuf>,
    },
}

/// Words of `snapshot`.
#[derive(Args, Debug)]
pub struct SnapshotArgs {
    /// The file to make
    #[arg(value_name = "FILE.zip")]
    pub out: PathBuf,
    /// Replace an existing file
    #[arg(long)]
    pub replace: bool,
}

/// Words of `printi` and `printe`.
#[derive(Args, Debug)]
pub struct PrintArgs {
    /// The line
    #[arg(required = true, allow_hyphen_values = true)]
    pub text: Vec<String>,
    /// Origin shown in the log
    #[arg(short, long, value_name = "NAME")]
    pub identity: Option<String>,
}

/// Words of `set`.
#[derive(Args, Debug)]
pub struct SetArgs {
    /// The resource, class.ident
    #[arg(short, long, value_name = "RES")]
    pub resource: String,
    /// up, down, init, or any text
    #[arg(short, long)]
    pub value: String,
    /// Who sets it
    #[arg(short, long, value_name = "NAME")]
    pub identity: Option<String>,
}

/// Words of `get`.
#[derive(Args, Debug)]
pub struct GetArgs {
    /// The resource, class.ident
    #[arg(short, long, value_name = "RES")]
    pub resource: String,
}

/// Words of `demo-server`.
#[derive(Args, Debug)]
pub struct DemoServerArgs {
    /// Where to listen
    #[arg(long, value_name = "IP:PORT")]
    pub addr: SocketAddr,
    /// Name of this node (the host name if not given)
    #[arg(long)]
    pub name: Option<String>,
    /// File that holds the process id while the server runs
    #[arg(long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_and_weights_are_read_with_their_bounds() {
        for (text, millis) in [
            ("90", 90_000),
            ("90s", 90_000),
            ("10m", 600_000),
            ("500ms", 500),
            ("1d", 86_400_000),
        ] {
            assert_eq!(time(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "m", "2d", "10 m", "-1", "1w", "99999999999999999999"] {
            assert!(time(text).unwrap_err().contains("10m"), "{text}");
        }
        assert_eq!(weight("default"), Ok(Weight(None)));
        assert_eq!(weight("0"), Ok(Weight(Some(0))));
        assert!(weight("65536").is_err() && weight("-1").is_err());
    }
}
