//! `<loadbalancing_list>`: groups, their weights and their rules.
//!
//! Sees to it that no frame finds two rules of the same rank. Called by [`super::vip`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::decode::{Child, Node};
use super::module::known_name;
use super::report::{Report, Span, Wrong, one_of, quote};
use super::value;
use super::vip::Placed;
use super::{Affinity, ClusterConfig, GroupConfig, PortRule, Protocol};

/// `proto` of a rule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Proto {
    Tcp,
    Udp,
    Arp,
}

/// How narrow the ports of a rule are; of two rules for one frame the narrower kind holds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Rank {
    One,
    Range,
    All,
}

/// A rule with its place, to be compared with all others of the module.
struct Ranked {
    key: (Option<IpAddr>, Proto, Rank),
    first: u16,
    last: u16,
    span: Span,
    path: String,
}

/// What a `<rule>` says.
enum Rule {
    Port(PortRule),
    Arp,
}

/// The groups of the `<loadbalancing_list>` that `child` is.
pub(super) fn groups(
    report: &mut Report<'_>,
    child: &Child<'_>,
    placed: &Placed,
    cluster: Option<&ClusterConfig>,
) -> Vec<GroupConfig> {
    let list = child.open(report, &[]);
    let children = list.children(report, &["group"]);
    children.need(report, "group");
    let mut groups = Vec::new();
    let mut names: BTreeMap<&str, Span> = BTreeMap::new();
    let mut ranked = Vec::new();
    for child in children.all("group") {
        let node = child.open(report, &["name"]);
        let name = node.need(report, "name", value::name);
        if let Some(name) = name {
            if let Some(first) = names.get(name) {
                let wrong = Wrong::new(format!("a second group is called {}", quote(name)));
                let hint = format!("the first one is at line {}", report.line(*first));
                node.error(report, "name", wrong.hint(hint));
            } else {
                names.insert(name, node.span("name"));
            }
        }
        groups.push(group(report, &node, name.unwrap_or(""), placed, cluster, &mut ranked));
    }
    if groups.len() > super::MAX_GROUPS {
        let wrong = Wrong::new(format!(
            "{} groups, at most {} are possible",
            groups.len(),
            super::MAX_GROUPS
        ));
        list.element_error(report, wrong.hint("rules for several ports may share one group"));
    }
    overlaps(report, ranked);
    if !report.has_errors() && groups.iter().all(|group| group.rules.is_empty()) {
        let wrong = Wrong::new("no group has a rule for tcp or udp: all traffic to the virtual addresses is dropped");
        list.element_warning(report, wrong);
    }
    groups
}

fn group<'d>(
    report: &mut Report<'_>,
    node: &Node<'d>,
    name: &str,
    placed: &Placed,
    cluster: Option<&ClusterConfig>,
    ranked: &mut Vec<Ranked>,
) -> GroupConfig {
    let children = node.children(report, &["cluster", "rule"]);
    children.need(report, "rule");
    let weights = match children.one(report, "cluster") {
        Some(child) => {
            let node = child.open(report, &[]);
            weights(report, &node, cluster)
        }
        None => BTreeMap::new(),
    };
    let (mut rules, mut arp) = (Vec::new(), false);
    for child in children.all("rule") {
        let node = child.open(report, &["virtual_addr", "port", "proto", "filter"]);
        node.children(report, &[]);
        match rule(report, &node, placed, ranked) {
            Some(Rule::Port(rule)) => rules.push(rule),
            Some(Rule::Arp) => arp = true,
            None => {}
        }
    }
    GroupConfig {
        name: name.to_owned(),
        weights,
        rules,
        arp,
    }
}

fn weights(report: &mut Report<'_>, node: &Node<'_>, cluster: Option<&ClusterConfig>) -> BTreeMap<String, u16> {
    let children = node.children(report, &["host"]);
    children.need(report, "host");
    let mut weights = BTreeMap::new();
    let mut places: BTreeMap<&str, Span> = BTreeMap::new();
    let mut all_read = true;
    for child in children.all("host") {
        let host = child.open(report, &["name", "power"]);
        host.children(report, &[]);
        let name = host.need(report, "name", value::name);
        let power = host.need(report, "power", value::number(0..=u16::MAX));
        all_read &= name.is_some() && power.is_some();
        let Some(name) = name else { continue };
        if let Some(first) = places.get(name) {
            let wrong = Wrong::new(format!("the host {} is given twice", quote(name)));
            let hint = format!("the first one is at line {}", report.line(*first));
            host.error(report, "name", wrong.hint(hint));
            continue;
        }
        places.insert(name, host.span("name"));
        if let Some(cluster) = cluster {
            known_name(report, &host, name, "node", cluster.nodes.iter().map(String::as_str));
        }
        weights.extend(power.map(|power| (name.to_owned(), power)));
    }
    if all_read && !weights.is_empty() && weights.values().all(|&power| power == 0) {
        let wrong = Wrong::new("every host has power 0, so none takes traffic");
        node.element_error(report, wrong.hint("a power of 1 or more is expected for one of them"));
    }
    if let Some(cluster) = cluster.filter(|_| all_read && !places.is_empty()) {
        let absent = cluster.nodes.iter().filter(|name| !places.contains_key(name.as_str()));
        let absent: Vec<String> = absent.map(|name| quote(name)).collect();
        if !absent.is_empty() {
            let wrong = Wrong::new(format!("not listed, and so without traffic: {}", absent.join(", ")));
            node.element_warning(
                report,
                wrong.hint("list every node, with power=\"0\" where that is meant"),
            );
        }
    }
    weights
}

fn rule(report: &mut Report<'_>, node: &Node<'_>, placed: &Placed, ranked: &mut Vec<Ranked>) -> Option<Rule> {
    const PROTOS: [(&str, Proto); 3] = [("tcp", Proto::Tcp), ("udp", Proto::Udp), ("arp", Proto::Arp)];
    const FILTERS: [(&str, Affinity); 4] = [
        ("on_addr", Affinity::ClientIp),
        ("on_port", Affinity::ClientPort),
        ("on_net", Affinity::ClientNet),
        ("on_ipid", Affinity::IpId),
    ];
    let proto = node.need(report, "proto", value::word(&PROTOS));
    let filter = node.need(report, "filter", value::word(&FILTERS));
    let ports = if node.has("port") {
        node.read(report, "port", value::ports)
    } else {
        Some((0, u16::MAX))
    };
    let vip = if node.has("virtual_addr") {
        node.read(report, "virtual_addr", |text| match text {
            "*" => Ok(None),
            _ => value::addr(text).and_then(|addr| known_vip(addr, placed)).map(Some),
        })
    } else {
        Some(None)
    };
    if let Some((proto, filter)) = proto.zip(filter) {
        combination(report, node, proto, filter);
    }
    if filter == Some(Affinity::IpId) && proto == Some(Proto::Udp) {
        let meant = |addr| vip.is_some_and(|vip| vip.is_none_or(|vip| vip == addr));
        if let Some(v6) = placed.vips.iter().find(|vip| vip.addr.is_ipv6() && meant(vip.addr)) {
            let wrong = Wrong::new(format!(
                "the packets to {} have no identification: IPv6 has none",
                v6.addr
            ));
            let hint = "`on_addr`, `on_port` or `on_net`, or an IPv4 `virtual_addr`, is expected";
            node.error(report, "filter", wrong.hint(hint));
        }
    }
    if proto == Some(Proto::Arp) {
        if node.has("port") && ports.is_some_and(|ports| ports != (0, u16::MAX)) {
            let wrong = Wrong::new("an arp rule has no port");
            node.error(report, "port", wrong.hint("remove `port`"));
        }
        let meant = |addr| vip.is_some_and(|vip| vip.is_none_or(|vip| vip == addr));
        let mut concerned = placed.vips.iter().filter(|vip| meant(vip.addr)).peekable();
        if concerned.peek().is_some() && !concerned.any(|vip| vip.directed) {
            let wrong = Wrong::new("an arp rule has no meaning with vmac_invisible");
            node.error(report, "proto", wrong.hint("remove the rule, or use vmac_directed"));
        }
    }
    let (proto, filter, (first, last), vip) = (proto?, filter?, ports?, vip?);
    let (first, last) = match proto {
        Proto::Arp => (0, u16::MAX),
        Proto::Tcp | Proto::Udp => (first, last),
    };
    let rank = match (first, last) {
        (0, u16::MAX) => Rank::All,
        (first, last) if first == last => Rank::One,
        _ => Rank::Range,
    };
    ranked.push(Ranked {
        key: (vip, proto, rank),
        first,
        last,
        span: node.element.span,
        path: node.path.clone(),
    });
    let protocol = match proto {
        Proto::Arp => return Some(Rule::Arp),
        Proto::Tcp => Protocol::Tcp,
        Proto::Udp => Protocol::Udp,
    };
    Some(Rule::Port(PortRule {
        vip,
        protocol,
        first_port: first,
        last_port: last,
        affinity: filter,
    }))
}

fn known_vip(addr: IpAddr, placed: &Placed) -> Result<IpAddr, Wrong> {
    if !placed.complete || placed.vips.iter().any(|vip| vip.addr == addr) {
        return Ok(addr);
    }
    let wrong = Wrong::new(format!("{addr} is no virtual address of this module"));
    let vips: Vec<String> = placed.vips.iter().map(|vip| vip.addr.to_string()).collect();
    let words = vips.iter().map(String::as_str).chain(["*"]);
    Err(wrong.hint(format!("{} is expected", one_of(words))))
}

/// Filters that make no sense for a protocol.
fn combination(report: &mut Report<'_>, node: &Node<'_>, proto: Proto, filter: Affinity) {
    match (proto, filter) {
        (Proto::Arp, Affinity::ClientIp) | (Proto::Udp, _) => {}
        (Proto::Tcp, Affinity::ClientIp | Affinity::ClientPort | Affinity::ClientNet) => {}
        (Proto::Arp, Affinity::ClientPort | Affinity::ClientNet | Affinity::IpId) => {
            let wrong = Wrong::new("an arp rule can only be shared on_addr");
            node.error(report, "filter", wrong.hint("`on_addr` is expected"));
        }
        (Proto::Tcp, Affinity::IpId) => {
            let wrong = Wrong::new("on_ipid would spread the packets of one TCP connection over all servers");
            node.error(
                report,
                "filter",
                wrong.hint("`on_addr`, `on_port` or `on_net` is expected with tcp"),
            );
        }
    }
}

/// Reports each rule that claims what another of the same rank claims.
fn overlaps(report: &mut Report<'_>, mut ranked: Vec<Ranked>) {
    ranked.sort_by_key(|rule| (rule.key, rule.first, rule.span.start));
    // Of the rules with one key passed so far, the one that reaches farthest.
    let mut farthest: Option<&Ranked> = None;
    for rule in &ranked {
        let same = farthest.filter(|other| other.key == rule.key);
        if let Some(other) = same.filter(|other| rule.first <= other.last) {
            let (early, late) = if other.span.start < rule.span.start {
                (other, rule)
            } else {
                (rule, other)
            };
            let line = report.line(early.span);
            let what = if (rule.first, rule.last) == (other.first, other.last) {
                "repeats"
            } else {
                "overlaps"
            };
            let wrong = Wrong::new(format!("this rule {what} the one of line {line}"));
            let hint = "one rule is expected for each virtual address, protocol and port; a single port goes before a range, a range before `*`";
            report.error(late.span, &late.path, wrong.hint(hint));
        }
        if same.is_none_or(|other| rule.last > other.last) {
            farthest = Some(rule);
        }
    }
}
