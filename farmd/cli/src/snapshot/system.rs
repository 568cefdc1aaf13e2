//! The part of a snapshot that is about the host: kernel, release, network state, the settings a farm depends on.
//!
//! Read from `/proc`, `/sys` and `/etc` only; no program is run. IPv6 neighbours and tc filters are not in `/proc`, so they are not here.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use crate::snapshot::bundle::Bundle;

/// Files taken as they are.
const FILES: [&str; 5] = [
    "/etc/os-release",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/modules",
    "/proc/version",
];

/// Files of `/proc/net`: interfaces, addresses, routes, neighbours, sockets, counters.
const NET: [&str; 24] = [
    "arp",
    "dev",
    "dev_mcast",
    "dev_snmp6",
    "fib_trie",
    "icmp",
    "if_inet6",
    "igmp",
    "igmp6",
    "ipv6_route",
    "netlink",
    "netstat",
    "packet",
    "ptype",
    "raw",
    "route",
    "snmp",
    "snmp6",
    "sockstat",
    "softnet_stat",
    "tcp",
    "tcp6",
    "udp",
    "udp6",
];

/// Settings of `/proc/sys`.
const SYSCTLS: [&str; 14] = [
    "kernel/hostname",
    "kernel/osrelease",
    "kernel/sched_rt_runtime_us",
    "net/core/bpf_jit_enable",
    "net/core/netdev_max_backlog",
    "net/core/rmem_max",
    "net/core/somaxconn",
    "net/core/wmem_max",
    "net/ipv4/ip_forward",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_nonlocal_bind",
    "net/ipv4/tcp_max_syn_backlog",
    "net/ipv4/tcp_syncookies",
    "net/ipv4/tcp_tw_reuse",
];

/// Settings per interface, under `net/ipv4/conf` and `net/ipv6/conf`.
const IPV4: [&str; 9] = [
    "accept_local",
    "arp_accept",
    "arp_announce",
    "arp_filter",
    "arp_ignore",
    "forwarding",
    "log_martians",
    "route_localnet",
    "rp_filter",
];
const IPV6: [&str; 4] = ["accept_dad", "accept_ra", "disable_ipv6", "forwarding"];

/// Files of `/sys/class/net/<interface>`.
const INTERFACE: [&str; 8] = [
    "address",
    "carrier",
    "flags",
    "ifindex",
    "mtu",
    "operstate",
    "speed",
    "type",
];

/// Adds the host's part.
pub fn collect(bundle: &mut Bundle) {
    for file in FILES {
        let name = file.rsplit('/').next().unwrap_or(file);
        bundle.add_file(
            &format!("system/{name}"),
            target(Path::new(file)).as_deref().unwrap_or(Path::new(file)),
        );
    }
    for name in NET
        .iter()
        .filter(|name| Path::new("/proc/self/net").join(name).is_file())
    {
        bundle.add_file(&format!("system/net/{name}"), &Path::new("/proc/self/net").join(name));
    }
    bundle.add_text("system/sysctl.txt", &sysctls(Path::new("/proc/sys")));
    bundle.add_text("system/interfaces.txt", &interfaces(Path::new("/sys/class/net")));
}

/// What the link `path` leads to; the release file is one on most systems.
fn target(path: &Path) -> Option<std::path::PathBuf> {
    path.canonicalize().ok()
}

/// `name = value` lines.
fn sysctls(root: &Path) -> String {
    let mut names: Vec<String> = SYSCTLS.iter().map(|name| (*name).to_owned()).collect();
    for (family, settings) in [("ipv4", &IPV4[..]), ("ipv6", &IPV6[..])] {
        for interface in folders(&root.join(format!("net/{family}/conf"))) {
            names.extend(
                settings
                    .iter()
                    .map(|setting| format!("net/{family}/conf/{interface}/{setting}")),
            );
        }
    }
    names.sort();
    let mut text = String::new();
    for name in names {
        if let Ok(value) = fs::read_to_string(root.join(&name)) {
            let _ = writeln!(text, "{name} = {}", value.trim_end());
        }
    }
    text
}

/// One line per interface.
fn interfaces(root: &Path) -> String {
    let mut text = String::new();
    for interface in folders(root) {
        let _ = write!(text, "{interface}");
        for name in INTERFACE {
            // An interface that is down refuses to tell some of these.
            if let Ok(value) = fs::read_to_string(root.join(&interface).join(name)) {
                let _ = write!(text, " {name}={}", value.trim_end());
            }
        }
        text.push('\n');
    }
    text
}

/// Names in `folder` that are folders or lead to one, sorted.
fn folders(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}
