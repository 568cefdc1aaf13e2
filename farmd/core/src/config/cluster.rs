//! `cluster.xml`: nodes and the lans they hear each other on.
//!
//! Called by the daemon at start and by the command line. It reads no key, looks up no name and does not know
//! which node is the local one.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::IpAddr;
use std::time::Duration;

use super::decode::Node;
use super::diag::Diagnostic;
use super::digest::digest;
use super::report::{Report, Source, Span, Wrong, quote};
use super::value::{self, Unit};
use super::xml::{self, Element};
use super::{Cast, ClusterConfig, Lan};
use crate::id::{MAX_NODES, NodeId};

const PORT: u16 = 4800;
const PULSE: Duration = Duration::from_millis(50);
const DETECT_MULTIPLIER: u32 = 5;
const CASTS: [(&str, Cast); 3] = [
    ("auto", Cast::Auto),
    ("unicast", Cast::Unicast),
    ("broadcast", Cast::Broadcast),
];
/// `profile`: pulse and missed heartbeats, each of which may still be written beside it.
const PROFILES: [(&str, (Duration, u32)); 2] = [
    ("default", (PULSE, DETECT_MULTIPLIER)),
    ("fast", (Duration::from_millis(20), DETECT_MULTIPLIER)),
];

/// Reads the text of a `cluster.xml`; `file_name` is what findings call it.
///
/// # Errors
/// Everything that is wrong with it, warnings included, by place; at least one is an error. The warnings beside
/// a configuration are in the same order.
pub fn parse(file_name: &str, text: &str) -> Result<(ClusterConfig, Vec<Diagnostic>), Vec<Diagnostic>> {
    let source = Source::new(file_name, text);
    let mut report = Report::new(&source);
    let root = xml::parse(&mut report, "cluster");
    let config = root.and_then(|root| cluster(&mut report, &root));
    report.result(config)
}

/// A lan while it is read.
struct Reading<'d> {
    lan: Lan,
    command: bool,
    node: Node<'d>,
}

/// What the nodes of all lans have in common.
#[derive(Default)]
struct Known {
    names: Vec<String>,
    addrs: BTreeMap<IpAddr, (String, Span)>,
    lans: BTreeMap<String, Span>,
    /// Too many nodes was said.
    full: bool,
}

fn cluster(report: &mut Report<'_>, root: &Element) -> Option<ClusterConfig> {
    let root = Node::open(report, root, "cluster".to_owned(), &[]);
    let children = root.children(report, &["lans"]);
    children.need(report, "lans");
    let node = children.one(report, "lans")?;
    let node = node.open(report, &["port", "profile", "pulse", "mlost_count", "slost_count"]);
    let profile = node.read(report, "profile", value::word(&PROFILES));
    let (pulse, lost) = profile.unwrap_or((PULSE, DETECT_MULTIPLIER));
    let port = node.read(report, "port", value::port).unwrap_or(PORT);
    let heartbeat_interval = node.duration(report, "pulse", Unit::Milli, 5..=5000).unwrap_or(pulse);
    let detect_multiplier = node.read(report, "slost_count", value::number(4..=100)).unwrap_or(lost);
    if node
        .read(report, "mlost_count", value::number(1..=10_000_u32))
        .is_some()
    {
        let wrong = Wrong::new("`mlost_count` is not used: every peer is judged by `slost_count`");
        node.warning(report, "mlost_count", wrong);
    }

    let children = node.children(report, &["lan"]);
    children.need(report, "lan");
    let mut known = Known::default();
    let mut lans: Vec<Reading<'_>> = Vec::new();
    for child in children.all("lan") {
        let node = child.open(report, &["name", "command", "cast"]);
        lans.push(lan(report, node, &mut known));
    }
    whole_lan(report, &mut lans, &known.names);
    if known.names.len() == 1 && !report.has_errors() {
        let wrong = Wrong::new("the cluster has one node: nothing takes over when it fails");
        node.element_warning(report, wrong.hint("2 to 64 nodes are expected"));
    }
    let lans: Vec<Lan> = lans.into_iter().map(|reading| reading.lan).collect();
    let mut config = ClusterConfig {
        port,
        heartbeat_interval,
        detect_multiplier,
        lans,
        nodes: known.names,
        digest: 0,
    };
    config.digest = digest(&canonical(&config));
    Some(config)
}

fn lan<'d>(report: &mut Report<'_>, node: Node<'d>, known: &mut Known) -> Reading<'d> {
    let name = node.need(report, "name", value::name).unwrap_or("").to_owned();
    let command = node.read(report, "command", value::flag).unwrap_or(false);
    if command {
        node.inert(report, "command");
    }
    if !name.is_empty() {
        let span = node.span("name");
        if let Some(first) = known.lans.get(&name) {
            let wrong = Wrong::new(format!("a second lan is called {}", quote(&name)));
            let hint = format!("the first one is at line {}", report.line(*first));
            node.error(report, "name", wrong.hint(hint));
        } else {
            known.lans.insert(name.clone(), span);
        }
    }
    let cast = node.read(report, "cast", value::word(&CASTS)).unwrap_or_default();
    let children = node.children(report, &["node"]);
    children.need(report, "node");
    let mut nodes: Vec<(NodeId, IpAddr)> = Vec::new();
    let mut here: BTreeMap<NodeId, Span> = BTreeMap::new();
    for child in children.all("node") {
        let node = child.open(report, &["name", "addr", "laddr"]);
        let name = node.need(report, "name", value::name);
        let addr = node.need(report, "addr", node_addr);
        if node.read(report, "laddr", node_addr).is_some() {
            node.inert(report, "laddr");
        }
        let id = name.and_then(|name| node_id(report, &node, name, known));
        if let Some((id, name)) = id.zip(name) {
            if let Some(first) = here.get(&id) {
                let wrong = Wrong::new(format!("the node {} is on this lan twice", quote(name)));
                let hint = format!("the first one is at line {}", report.line(*first));
                node.error(report, "name", wrong.hint(hint));
                continue;
            }
            here.insert(id, node.span("name"));
        }
        if let Some(addr) = addr {
            let of_other_family = nodes.first().filter(|(_, first)| first.is_ipv4() != addr.is_ipv4());
            if let Some((_, first)) = of_other_family {
                let wrong = Wrong::new(format!("{addr} and {first} cannot be on one lan"));
                node.error(
                    report,
                    "addr",
                    wrong.hint("addresses of one family, IPv4 or IPv6, are expected on a lan"),
                );
            }
            unique_addr(report, &node, addr, name.unwrap_or("?"), known);
        }
        nodes.extend(id.zip(addr));
    }
    Reading {
        lan: Lan { name, cast, nodes },
        command,
        node,
    }
}

/// An address as `cluster.xml` has it: IPv6 in brackets.
fn node_addr(text: &str) -> Result<IpAddr, Wrong> {
    let addr = value::host_addr(text)?;
    if addr.is_ipv6() && !text.starts_with('[') {
        let wrong = Wrong::new(format!("{} has no brackets", quote(text)));
        return Err(wrong.hint(format!("`[{addr}]` is expected")));
    }
    Ok(addr)
}

fn node_id(report: &mut Report<'_>, node: &Node<'_>, name: &str, known: &mut Known) -> Option<NodeId> {
    let index = known
        .names
        .iter()
        .position(|known| known == name)
        .unwrap_or(known.names.len());
    let id = NodeId::new(index);
    if id.is_none() && !known.full {
        known.full = true;
        let wrong = Wrong::new(format!("{} is node number {}", quote(name), MAX_NODES + 1));
        node.error(
            report,
            "name",
            wrong.hint(format!("at most {MAX_NODES} nodes are expected")),
        );
    }
    if id.is_some() && index == known.names.len() {
        known.names.push(name.to_owned());
    }
    id
}

fn unique_addr(report: &mut Report<'_>, node: &Node<'_>, addr: IpAddr, name: &str, known: &mut Known) {
    if addr.is_loopback() {
        let wrong = Wrong::new(format!("{addr} is reached on its own machine only"));
        node.warning(
            report,
            "addr",
            wrong.hint("an address that all nodes can reach is expected"),
        );
    }
    if let Some((owner, first)) = known.addrs.get(&addr) {
        let wrong = Wrong::new(format!("{addr} is also the address of {}", quote(owner)));
        let hint = format!(
            "the first one is at line {}; each node has its own address on each lan",
            report.line(*first)
        );
        node.error(report, "addr", wrong.hint(hint));
    } else {
        known.addrs.insert(addr, (name.to_owned(), node.span("addr")));
    }
}

/// Sees to it that commands have a lan with all nodes, and puts that first.
fn whole_lan(report: &mut Report<'_>, lans: &mut [Reading<'_>], names: &[String]) {
    // A lan of which a node was refused is not judged again.
    if report.has_errors() || lans.is_empty() {
        return;
    }
    let missing = |lan: &Lan| -> Vec<String> {
        let on = |index| lan.nodes.iter().any(|(id, _)| id.index() == index);
        let absent = names.iter().enumerate().filter(|(index, _)| !on(*index));
        absent.map(|(_, name)| quote(name)).collect()
    };
    let mut chosen = None;
    for (index, reading) in lans.iter().enumerate().filter(|(_, reading)| reading.command) {
        if chosen.is_some() {
            let wrong = Wrong::new("a second lan has command=\"on\"");
            reading
                .node
                .error(report, "command", wrong.hint("commands travel on one lan"));
            continue;
        }
        chosen = Some(index);
        let absent = missing(&reading.lan);
        if !absent.is_empty() {
            let wrong = Wrong::new(format!("the lan of the commands lacks {}", absent.join(", ")));
            reading
                .node
                .error(report, "command", wrong.hint("all nodes are expected on it"));
        }
    }
    let chosen = chosen.or_else(|| lans.iter().position(|reading| missing(&reading.lan).is_empty()));
    match chosen {
        Some(index) => lans[..=index].rotate_right(1),
        None => {
            let fullest = lans.iter().max_by_key(|reading| reading.lan.nodes.len());
            if let Some(reading) = fullest {
                let absent = missing(&reading.lan).join(", ");
                let wrong = Wrong::new("no lan has all nodes");
                let hint = format!("at least one is expected; this one lacks {absent}");
                reading.node.element_error(report, wrong.hint(hint));
            }
        }
    }
}

/// The meaning, one fact per line. Node numbers follow from the order of the names.
fn canonical(config: &ClusterConfig) -> String {
    let mut out = String::from("cluster 1\n");
    let pulse = config.heartbeat_interval.as_micros();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "port {} pulse {pulse} lost {}",
        config.port, config.detect_multiplier
    );
    for name in &config.nodes {
        let _ = writeln!(out, "node {name:?}");
    }
    for lan in &config.lans {
        let _ = writeln!(out, "lan {:?}", lan.name);
        // The others need not know whom a node speaks to one by one.
        if lan.cast == Cast::Broadcast {
            let _ = writeln!(out, "cast {:?}", lan.cast);
        }
        let mut nodes = lan.nodes.clone();
        nodes.sort_unstable();
        for (id, addr) in nodes {
            let _ = writeln!(out, "on {} {addr}", id.index());
        }
    }
    out
}
