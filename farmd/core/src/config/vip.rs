//! `<vip>`: virtual addresses, the interfaces that carry them and how frames reach every server.
//!
//! What traffic is shared, and how, is in [`super::rule`]. Called by [`super::module`].

use std::fmt::Write;
use std::net::IpAddr;
use std::time::Duration;

use super::decode::{Child, Node};
use super::report::{Report, Span, Wrong, quote};
use super::rule;
use super::value::{self, Unit};
use super::{
    Affinity, ArpReroute, ClusterConfig, InterfaceConfig, L2Mode, PlaneChoice, Protocol, VipConfig, VirtualAddr,
    VirtualInterfaceConfig, XdpChoice,
};
use crate::id::MacAddr;

/// First two bytes of a virtual MAC that is made of a VIP: locally administered, unicast.
const MAC_PREFIX: [u8; 2] = [0x5a, 0xfe];

/// What `dataplane` may say.
const PLANES: [(&str, PlaneChoice); 3] = [
    ("auto", PlaneChoice::Auto),
    ("raw", PlaneChoice::Raw),
    ("bpf", PlaneChoice::Bpf),
];

/// What `xdp` may say.
const XDP: [(&str, XdpChoice); 3] = [
    ("auto", XdpChoice::Auto),
    ("on", XdpChoice::On),
    ("off", XdpChoice::Off),
];

/// The virtual addresses of a module while it is read, for the rules to be checked against.
pub(super) struct Placed {
    pub vips: Vec<PlacedVip>,
    /// No address is missing from `vips` because it was wrong.
    pub complete: bool,
}

/// One virtual address.
pub(super) struct PlacedVip {
    pub addr: IpAddr,
    /// Its virtual interface is `vmac_directed`.
    pub directed: bool,
    span: Span,
}

/// The `<vip>` that `child` is.
pub(super) fn decode(report: &mut Report<'_>, child: &Child<'_>, cluster: Option<&ClusterConfig>) -> Option<VipConfig> {
    let node = child.open(report, &["tcpreset", "scriptcontrol", "drain", "dataplane", "xdp"]);
    let tcp_reset = node.read(report, "tcpreset", value::flag).unwrap_or(true);
    if node.read(report, "scriptcontrol", value::flag) == Some(true) {
        let wrong = Wrong::new("`scriptcontrol` has no effect: traffic opens when `start_both` has succeeded");
        node.warning(report, "scriptcontrol", wrong);
    }
    let drain = node
        .duration(report, "drain", Unit::Second, 0..=86_400)
        .unwrap_or_default();
    let plane = node.read(report, "dataplane", value::word(&PLANES)).unwrap_or_default();
    let xdp = node.read(report, "xdp", value::word(&XDP)).unwrap_or_default();
    if plane == PlaneChoice::Raw && xdp == XdpChoice::On {
        let wrong = Wrong::new("`xdp` has no effect: with `dataplane=\"raw\"` frames are judged in user space");
        node.warning(report, "xdp", wrong);
    }
    let parts = node.children(report, &["interface_list", "loadbalancing_list"]);
    parts.need(report, "interface_list");
    parts.need(report, "loadbalancing_list");

    let mut placed = Placed {
        vips: Vec::new(),
        complete: true,
    };
    let mut interfaces = Vec::new();
    let mut names: Vec<(String, Span)> = Vec::new();
    if let Some(list) = parts.one(report, "interface_list") {
        let list = list.open(report, &[]);
        let children = list.children(report, &["interface"]);
        children.need(report, "interface");
        for child in children.all("interface") {
            let node = child.open(report, &["name", "check", "arpreroute", "arpinterval", "arpelapse"]);
            interfaces.push(interface(report, &node, &mut names, &mut placed, cluster));
        }
        if interfaces.len() > super::MAX_INTERFACES {
            let wrong = Wrong::new(format!(
                "{} interfaces, at most {} are possible",
                interfaces.len(),
                super::MAX_INTERFACES
            ));
            list.element_error(
                report,
                wrong.hint("one `<interface>` may carry any number of virtual addresses"),
            );
        }
    }
    let groups = match parts.one(report, "loadbalancing_list") {
        Some(list) => rule::groups(report, list, &placed, cluster),
        None => Vec::new(),
    };
    Some(VipConfig {
        tcp_reset,
        drain,
        plane,
        xdp,
        interfaces,
        groups,
    })
}

fn interface(
    report: &mut Report<'_>,
    node: &Node<'_>,
    names: &mut Vec<(String, Span)>,
    placed: &mut Placed,
    cluster: Option<&ClusterConfig>,
) -> InterfaceConfig {
    let name = node.read(report, "name", value::interface).map(str::to_owned);
    if let Some(name) = &name {
        if let Some((_, first)) = names.iter().find(|(known, _)| known == name) {
            let wrong = Wrong::new(format!("a second `<interface>` is called {}", quote(name)));
            let line = report.line(*first);
            let hint = format!("put its `<virtual_interface>` into the one of line {line}");
            node.error(report, "name", wrong.hint(hint));
        } else {
            names.push((name.clone(), node.span("name")));
        }
    }
    let check = node.read(report, "check", value::flag).unwrap_or(true);
    let reroute = node.read(report, "arpreroute", value::flag).unwrap_or(false);
    let interval = node.duration(report, "arpinterval", Unit::Second, 1..=3600);
    let elapse = node.duration(report, "arpelapse", Unit::Second, 1..=86_400);
    let arp_reroute = reroute.then(|| ArpReroute {
        interval: interval.unwrap_or(Duration::from_secs(60)),
        elapse: elapse.unwrap_or(Duration::from_secs(1200)),
    });
    let children = node.children(report, &["virtual_interface"]);
    children.need(report, "virtual_interface");
    let mut virtual_interfaces = Vec::new();
    for child in children.all("virtual_interface") {
        let node = child.open(report, &["type", "addr"]);
        virtual_interfaces.extend(virtual_interface(report, &node, placed, cluster));
    }
    InterfaceConfig {
        name,
        check,
        arp_reroute,
        virtual_interfaces,
    }
}

fn virtual_interface(
    report: &mut Report<'_>,
    node: &Node<'_>,
    placed: &mut Placed,
    cluster: Option<&ClusterConfig>,
) -> Option<VirtualInterfaceConfig> {
    const TYPES: [(&str, bool); 2] = [("vmac_directed", true), ("vmac_invisible", false)];
    let directed = node.need(report, "type", value::word(&TYPES));
    let mac = node.read(report, "addr", virtual_mac);
    if directed == Some(true) && mac.is_some() {
        let wrong = Wrong::new("`addr` has no effect with vmac_directed, which has no virtual MAC");
        node.warning(report, "addr", wrong);
    }
    let children = node.children(report, &["virtual_addr"]);
    children.need(report, "virtual_addr");
    let mut addrs = Vec::new();
    for child in children.all("virtual_addr") {
        let node = child.open(report, &["addr", "where", "check", "connections", "netmask"]);
        // An unknown type is no reason to doubt a rule.
        addrs.extend(virtual_addr(report, &node, directed.unwrap_or(true), placed, cluster));
    }
    let mode = if directed? {
        L2Mode::Directed
    } else {
        L2Mode::Invisible(mac.or(made_of(&addrs))?)
    };
    Some(VirtualInterfaceConfig { mode, addrs })
}

/// The virtual MAC that the first IPv4 address makes or, without one, the last four bytes of the first IPv6 address.
fn made_of(addrs: &[VirtualAddr]) -> Option<MacAddr> {
    let first = addrs.iter().find(|vip| vip.addr.is_ipv4()).or(addrs.first())?;
    let bits = match first.addr {
        IpAddr::V4(v4) => v4.to_bits(),
        IpAddr::V6(v6) => v6.to_bits() as u32,
    };
    let [a, b, c, d] = bits.to_be_bytes();
    Some(MacAddr([MAC_PREFIX[0], MAC_PREFIX[1], a, b, c, d]))
}

/// A MAC that switches may learn nothing about: unicast and not zero.
fn virtual_mac(text: &str) -> Result<MacAddr, Wrong> {
    let hint = "a unicast address such as 5a:fe:c6:12:00:64 is expected";
    let Ok(mac) = text.parse::<MacAddr>() else {
        return Err(Wrong::new(format!("{} is no Ethernet address", quote(text))).hint(hint));
    };
    let fault = if mac.is_group() {
        "a group address"
    } else if mac.0 == [0; 6] {
        "the zero address"
    } else {
        return Ok(mac);
    };
    Err(Wrong::new(format!("{} is {fault}", quote(text))).hint(hint))
}

fn virtual_addr(
    report: &mut Report<'_>,
    node: &Node<'_>,
    directed: bool,
    placed: &mut Placed,
    cluster: Option<&ClusterConfig>,
) -> Option<VirtualAddr> {
    node.children(report, &[]);
    node.read(report, "where", |text| match text {
        "one_side_alias" | "one_side" => {
            let wrong = Wrong::new(format!("{} belongs to modules of mode `mirror`", quote(text)));
            Err(wrong.hint("`alias` is expected"))
        }
        _ => value::word(&[("alias", ())])(text),
    });
    if node.read(report, "connections", value::flag) == Some(true) {
        node.inert(report, "connections");
    }
    if node.read(report, "netmask", netmask).is_some() {
        node.inert(report, "netmask");
    }
    let check = node.read(report, "check", value::flag).unwrap_or(true);
    // Only where it is asked for in words: the default must not warn about every file.
    if check {
        node.inert(report, "check");
    }
    let Some(addr) = node.need(report, "addr", vip_addr) else {
        placed.complete = false;
        return None;
    };
    if let Some(first) = placed.vips.iter().find(|vip| vip.addr == addr) {
        let wrong = Wrong::new(format!("{addr} is a virtual address twice"));
        let hint = format!("the first one is at line {}", report.line(first.span));
        node.error(report, "addr", wrong.hint(hint));
        return None;
    }
    if let Some(owner) = cluster.and_then(|cluster| Some(cluster.name(cluster.node_by_addr(&[addr])?))) {
        let wrong = Wrong::new(format!("{addr} is the address of node {}", quote(owner)));
        node.error(
            report,
            "addr",
            wrong.hint("a free address of the same network is expected"),
        );
    }
    let span = node.span("addr");
    placed.vips.push(PlacedVip { addr, directed, span });
    Some(VirtualAddr { addr, check })
}

fn vip_addr(text: &str) -> Result<IpAddr, Wrong> {
    let addr = value::host_addr(text)?;
    let (fault, hint) = match addr {
        _ if addr.is_loopback() => (
            "a loopback address",
            "an address of the nodes' network is expected".to_owned(),
        ),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => (
                "an IPv4 address written as IPv6, which no frame carries",
                format!("`{v4}` is expected"),
            ),
            None => return Ok(addr),
        },
        IpAddr::V4(_) => return Ok(addr),
    };
    Err(Wrong::new(format!("{} is {fault}", quote(text))).hint(hint))
}

fn netmask(text: &str) -> Result<(), Wrong> {
    let mask = text.parse::<std::net::Ipv4Addr>().map(u32::from);
    match mask {
        Ok(mask) if mask != 0 && mask.leading_ones() + mask.trailing_zeros() == 32 => Ok(()),
        Ok(_) | Err(_) => {
            let wrong = Wrong::new(format!("{} is no netmask", quote(text)));
            Err(wrong.hint("a netmask such as 255.255.255.0 is expected"))
        }
    }
}

/// The meaning of `vip` that all nodes must share, one fact per line. Names of interfaces may differ between nodes,
/// and so may what only concerns one node: checks and announcements.
pub(super) fn canonical(vip: &VipConfig, out: &mut String) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "vip reset {}", vip.tcp_reset);
    for virtual_interface in vip
        .interfaces
        .iter()
        .flat_map(|interface| &interface.virtual_interfaces)
    {
        let _ = match virtual_interface.mode {
            L2Mode::Directed => writeln!(out, "directed"),
            L2Mode::Invisible(mac) => writeln!(out, "invisible {mac}"),
        };
        for vip in &virtual_interface.addrs {
            let _ = writeln!(out, "addr {}", vip.addr);
        }
    }
    for group in &vip.groups {
        let _ = writeln!(out, "group {:?} arp {}", group.name, group.arp);
        for (name, weight) in &group.weights {
            let _ = writeln!(out, "weight {name:?} {weight}");
        }
        // No two rules overlap, so their order means nothing.
        let mut rules: Vec<String> = group.rules.iter().map(canonical_rule).collect();
        rules.sort_unstable();
        for rule in rules {
            out.push_str(&rule);
        }
    }
}

fn canonical_rule(rule: &super::PortRule) -> String {
    let vip = rule.vip.map_or_else(|| "*".to_owned(), |vip| vip.to_string());
    let protocol = match rule.protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
    };
    let affinity = match rule.affinity {
        Affinity::ClientIp => "addr",
        Affinity::ClientPort => "port",
        Affinity::ClientNet => "net",
        Affinity::IpId => "ipid",
    };
    format!(
        "rule {vip} {protocol} {} {} {affinity}\n",
        rule.first_port, rule.last_port
    )
}
