//! What several of these tests need: a farm whose module is configured and not started, looks into a node, and plain words.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddrV4};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farm_core::api::history::HistoryEntry;
use farm_core::api::{ModuleState, ModuleStatus, NodeModuleStatus};
use farm_lab::config::Vip;
use farm_lab::probe::{ProbeConfig, Prober};
use farm_lab::process::{Finished, run_limited};
use farm_lab::{Group, Lab, LabConfig, MODULE, Mode, ModuleText, Node, VIP, wait_until};

/// A farm whose daemons run and whose module, changed by `change`, is installed and configured, not started.
pub fn configured(config: LabConfig, change: impl Fn(&Node, ModuleText) -> ModuleText) -> Lab {
    let lab = Lab::new(config).expect("a lab can be built");
    lab.start_daemons().expect("the daemons start");
    for node in &lab.nodes {
        install(&lab, node, &change);
    }
    lab
}

/// Installs the generated module, changed by `change`, on a node and configures it.
pub fn install(lab: &Lab, node: &Node, change: &impl Fn(&Node, ModuleText) -> ModuleText) {
    let module = change(node, lab.module_text(node, Some("1s")));
    node.install_text(MODULE, &module, &lab.config().listen())
        .expect("the module can be installed");
    node.farm_ok(&["config", MODULE]).expect("its configuration is right");
}

/// A farm of `nodes` nodes and otherwise as usual, with few client addresses.
pub fn farm_of(nodes: usize) -> LabConfig {
    LabConfig {
        nodes,
        client_addrs: 40,
        ..LabConfig::default()
    }
}

/// Starts `module` on all nodes at once and waits until they serve.
pub fn start(lab: &Lab, module: &str) {
    on_all(lab, &["start", module]);
    let all: Vec<&Node> = lab.nodes.iter().collect();
    lab.wait_ready(module, &all, Duration::from_secs(20))
        .expect("all nodes serve");
}

/// What a module's log and the newest output of its `start_both` say, for a failure report.
fn story(node: &Node, module: &str) -> String {
    let tell = |args: &[&str]| node.farm(args).map(|told| told.stdout).unwrap_or_default();
    tell(&["log", module, "-n", "40"]) + &tell(&["log", module, "--script", "start_both"])
}

/// Runs one command of the command line on all nodes at once and insists on success.
pub fn on_all(lab: &Lab, args: &[&str]) {
    std::thread::scope(|scope| {
        for node in &lab.nodes {
            scope.spawn(move || {
                node.farm_ok(args).unwrap_or_else(|e| {
                    let module = args.last().copied().unwrap_or_default();
                    panic!("{}: {e:#}\n{}", node.name(), story(node, module))
                })
            });
        }
    });
}

/// `text` with `from` replaced by `to`, which must be there.
pub fn changed(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "{from} is not in {text}");
    text.replace(from, to)
}

/// Fails unless one of `words` is in `text`, in capitals or not.
pub fn mentions(text: &str, words: &[&str]) {
    let lower = text.to_lowercase();
    assert!(
        words.iter().any(|word| lower.contains(&word.to_lowercase())),
        "none of {words:?} in: {text}"
    );
}

/// Runs a line of shell on a node for at most 10 s.
pub fn shell(node: &Node, line: &str) -> Finished {
    let mut command = node.command(Path::new("sh")).expect("the node has power");
    command.args(["-c", line]);
    run_limited(command, Duration::from_secs(10)).expect("sh runs")
}

/// The standard output of a line of shell that must succeed.
pub fn shell_ok(node: &Node, line: &str) -> String {
    let finished = shell(node, line);
    assert!(finished.ok(), "{line} on {}: {finished:?}", node.name());
    finished.stdout
}

/// A module as `node` sees it.
pub fn module_of(node: &Node, module: &str) -> ModuleStatus {
    let status = node.status().expect("the node answers");
    let found = status.modules.into_iter().find(|m| m.name == module);
    found.unwrap_or_else(|| panic!("{} does not know {module}", node.name()))
}

/// A node's own row of a module.
pub fn own_row(node: &Node, module: &str) -> NodeModuleStatus {
    let rows = module_of(node, module).nodes;
    let own = rows.into_iter().find(|row| row.node == node.name());
    own.unwrap_or_else(|| panic!("{} has no row for itself", node.name()))
}

/// Waits until a module is in `state` on a node, as that node says.
pub fn wait_state(node: &Node, module: &str, state: ModuleState, limit: Duration) {
    let what = format!("{module} to be {state} on {}", node.name());
    wait_until(limit, &what, || {
        (own_row(node, module).state == Some(state)).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}\n{}", own_row(node, module), log_of(node, module)));
}

/// The last lines of a module's log.
pub fn log_of(node: &Node, module: &str) -> String {
    node.farm_ok(&["log", module, "-n", "500"]).expect("a log")
}

/// Every process of a node as `NUMBER COMMAND LINE`, without this look itself and the pause of its first process.
pub fn processes(node: &Node) -> BTreeSet<String> {
    let look = "for p in /proc/[0-9]*; do n=${p#/proc/}; [ $n = $$ ] && continue; \
                c=$(tr '\\0' ' ' <$p/cmdline 2>/dev/null) || continue; [ -n \"$c\" ] && echo \"$n $c\"; done; :";
    let shown = shell_ok(node, look);
    let all = shown.lines().map(|line| line.trim_end().to_owned());
    all.filter(|line| !line.ends_with(" sleep 3600") && !line.contains("for p in /proc/"))
        .collect()
}

/// Where the programs under test are.
pub fn program(name: &str) -> PathBuf {
    farm_lab::binaries().expect("they are built").join(name)
}

/// All counters of a node's daemon.
pub fn metrics(node: &Node) -> BTreeMap<String, u64> {
    let mut socket = UnixStream::connect(node.dirs().run.join("farmd.sock")).expect("farmd answers");
    socket
        .write_all(b"GET /v1/metrics HTTP/1.1\r\nHost: farmd\r\nConnection: close\r\n\r\n")
        .expect("a request");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("an answer");
    let (from, to) = (answer.find('{').expect("JSON"), answer.rfind('}').expect("JSON"));
    serde_json::from_str(&answer[from..=to]).expect("JSON")
}

/// A counter of a node's daemon.
pub fn counter(node: &Node, name: &str) -> u64 {
    let counters = metrics(node);
    let counter = counters.get(name);
    *counter.unwrap_or_else(|| panic!("no {name} in {counters:?}"))
}

/// All that `node` remembers.
pub fn history(node: &Node) -> Vec<HistoryEntry> {
    let json = node
        .farm_ok(&["history", "--json", "-n", "10000"])
        .expect("the node has a history");
    serde_json::from_str(&json).unwrap_or_else(|e| panic!("{e}: {json}"))
}

/// What a node's data plane has counted.
pub fn frames_of(node: &Node) -> String {
    let counts = metrics(node).into_iter();
    let told =
        counts.filter(|(name, count)| (name.starts_with("frames_") || name.starts_with("dataplane_")) && *count > 0);
    let told: Vec<String> = told.map(|(name, count)| format!("{name} {count}")).collect();
    format!("{}: {}", node.name(), told.join(", "))
}

/// The Ethernet address that the client uses for the VIP now, and whose it is.
pub fn entry_of(lab: &Lab, vip: impl Into<IpAddr>) -> (String, Option<&str>) {
    let shown = lab
        .client
        .space()
        .command("ip")
        .args(["neigh", "show", &vip.into().to_string()])
        .output();
    let shown = String::from_utf8_lossy(&shown.expect("ip runs").stdout).into_owned();
    let owner = lab
        .nodes
        .iter()
        .find(|node| shown.contains(&node.mac().expect("an address")));
    (shown.trim().to_owned(), owner.map(Node::name))
}

/// A farm in which each client's frame reaches every node by itself: a cut between nodes is no cut to the clients, and who answers is who serves.
pub fn flooded_farm(config: LabConfig) -> Lab {
    let lab = Lab::serve(LabConfig {
        client_addrs: 40,
        vips: vec![Vip::new(VIP, Mode::Invisible)],
        groups: vec![Group::tcp("web", 80, "on_port")],
        ..config
    });
    lab.expect("the farm comes up")
}

/// Clients that ask all the time, each with time for retransmissions.
pub fn patient_clients(lab: &Lab, to: SocketAddrV4) -> Prober {
    let config = ProbeConfig {
        limit: Duration::from_secs(5),
        ..ProbeConfig::new(to)
    };
    Prober::start(&lab.client, config).expect("probing")
}
