//! The configuration model: only valid values exist.
//!
//! `cluster` and `module` build these values from XML and report every mistake at once as
//! [`diag::Diagnostic`]s. Nothing here touches the host. The digests are over the meaning, not the text,
//! so a changed comment does not keep a node out of the farm.

mod attribute;
mod check;
pub mod cluster;
mod decode;
pub mod diag;
mod digest;
mod inert;
mod macros;
pub mod module;
mod report;
mod rule;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_random;
mod value;
mod vip;
mod xml;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use crate::id::{MacAddr, NodeId};

/// Most modules that one node carries; so many fit into a heartbeat.
pub const MAX_MODULES: usize = 32;
/// Most groups of one module, and of all modules of a node together twice as many; so many fit into a heartbeat.
pub const MAX_GROUPS: usize = 32;
/// Most `<interface>`s of one module.
pub const MAX_INTERFACES: usize = 32;

/// `cluster.xml`: who the nodes are and how they talk.
#[derive(Clone, PartialEq, Debug)]
pub struct ClusterConfig {
    /// UDP port of the heartbeats. `port`, default 4800.
    pub port: u16,
    /// Time between two heartbeats. `pulse`, default 50 ms, 5 ms to 5 s. Lower finds a dead node sooner and costs more datagrams.
    pub heartbeat_interval: Duration,
    /// Heartbeats in a row that must be missing before a peer is down. `slost_count`, default 5, 4 to 100: with three, an acknowledgement that is two pulses old in the ordinary course is as old as a node may believe to be heard.
    pub detect_multiplier: u32,
    /// The networks heartbeats travel on, at least one, each with at least one node. The first one is the lan of the commands and has
    /// all nodes; the others follow in file order.
    pub lans: Vec<Lan>,
    /// Node names; the position is the [`NodeId`].
    pub nodes: Vec<String>,
    /// First 8 bytes of the SHA-256 of the meaning of this file.
    pub digest: u64,
}

impl ClusterConfig {
    /// Time after the last heartbeat of a peer at which it is down.
    pub fn detection_time(&self) -> Duration {
        self.heartbeat_interval * self.detect_multiplier
    }

    /// The node called `name`.
    pub fn node_by_name(&self, name: &str) -> Option<NodeId> {
        self.nodes.iter().position(|n| n == name).and_then(NodeId::new)
    }

    /// The node that has one of `addrs` on any lan.
    pub fn node_by_addr(&self, addrs: &[IpAddr]) -> Option<NodeId> {
        self.lans
            .iter()
            .flat_map(|lan| &lan.nodes)
            .find(|(_, addr)| addrs.contains(addr))
            .map(|(node, _)| *node)
    }

    /// The name of `node`.
    pub fn name(&self, node: NodeId) -> &str {
        self.nodes.get(node.index()).map_or("?", String::as_str)
    }
}

/// One network that carries heartbeats.
#[derive(Clone, PartialEq, Debug)]
pub struct Lan {
    /// Its name, to which a module's `<lan name=…/>` refers.
    pub name: String,
    /// How a heartbeat reaches all of them.
    pub cast: Cast,
    /// The nodes on it, with their addresses.
    pub nodes: Vec<(NodeId, IpAddr)>,
}

/// `userconfig.xml`: one module.
#[derive(Clone, PartialEq, Debug)]
pub struct ModuleConfig {
    /// Macros as written, after their own expansion.
    pub macros: BTreeMap<String, String>,
    /// `<service>`.
    pub service: ServiceConfig,
    /// Names of the lans in `<farm>`; they exist in `cluster.xml` if that was given.
    pub lans: Vec<String>,
    /// `<farm partition=…>`.
    pub partition: PartitionPolicy,
    /// `<witness addr=…/>` of `<farm>`: asked by ping while a node is missing.
    pub witness: Option<IpAddr>,
    /// `<vip>`, if any.
    pub vip: Option<VipConfig>,
    /// `<user>`, without which no script runs.
    pub user: Option<UserConfig>,
    /// TCP checkers.
    pub tcp_checkers: Vec<TcpCheckerConfig>,
    /// First 8 bytes of the SHA-256 of the meaning of what all nodes must share: service mode, lans, vip.
    pub digest: u64,
}

/// `<lan cast=…>`: how a heartbeat reaches all nodes of a lan.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Cast {
    /// [`Cast::Unicast`]; on a lan of more than 16 nodes [`Cast::Broadcast`], and one datagram more to each node of which no broadcast comes in.
    #[default]
    Auto,
    /// One datagram to each node: works on any network.
    Unicast,
    /// One datagram to the broadcast address of the lan's subnet (RFC 919), over IPv6 to all nodes of the link (RFC 4291, section 2.7.1): costs the sender the same however many nodes there are.
    Broadcast,
}

/// `<farm partition=…>`: which part of a divided farm serves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum PartitionPolicy {
    /// Each part.
    #[default]
    Serve,
    /// The part with more than half of the nodes of `cluster.xml`; of two halves the one with its first node.
    Majority,
    /// A part that lacks a node serves only while a given address answers it.
    Witness,
}

/// What starts a module when the daemon starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Boot {
    /// `on`: always.
    On,
    /// `off` and `ignore`: never.
    Off,
    /// `auto`: if it was started when the daemon last ended.
    Auto,
}

/// `<service>` attributes.
#[derive(Clone, PartialEq, Debug)]
pub struct ServiceConfig {
    /// `boot`, default `off`.
    pub boot: Boot,
    /// `boot_delay`, default 0 s.
    pub boot_delay: Duration,
    /// `maxloop`, default 3: error reactions within `loop_interval` before the module stops for good.
    pub maxloop: u32,
    /// `loop_interval`, default 24 h; zero switches the limit off.
    pub loop_interval: Duration,
}

/// `<vip>`.
#[derive(Clone, PartialEq, Debug)]
pub struct VipConfig {
    /// `tcpreset`, default on: end the VIP's connections with a reset when the VIP leaves this node.
    pub tcp_reset: bool,
    /// `drain`, default 0 s: how long `stop` waits for the connections to end, after new ones go elsewhere. Up to a day.
    pub drain: Duration,
    /// `dataplane`, default `auto`: where frames are judged on this node.
    pub plane: PlaneChoice,
    /// `xdp`, default `auto`: whether frames that need nothing of this node are already judged in the driver of the interface.
    pub xdp: XdpChoice,
    /// Interfaces and what they carry.
    pub interfaces: Vec<InterfaceConfig>,
    /// Load-balancing groups; each has its own bucket map. At least one.
    pub groups: Vec<GroupConfig>,
}

/// Where frames for a virtual address are judged.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum PlaneChoice {
    /// In the kernel where it lets farmd, else in user space.
    #[default]
    Auto,
    /// Captured by a raw socket and judged in user space.
    Raw,
    /// By an eBPF program in the kernel; the module does not start where that cannot be.
    Bpf,
}

/// Whether the kernel's decision begins in the driver of the interface, by native XDP. Of several on one interface the last of these counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Debug)]
pub enum XdpChoice {
    /// On cards where it proves itself.
    #[default]
    Auto,
    /// Wherever the driver takes it.
    On,
    /// Never.
    Off,
}

impl VipConfig {
    /// All virtual addresses in file order.
    pub fn addrs(&self) -> impl Iterator<Item = IpAddr> {
        self.interfaces
            .iter()
            .flat_map(|i| &i.virtual_interfaces)
            .flat_map(|v| &v.addrs)
            .map(|a| a.addr)
    }
}

/// `<interface>`.
#[derive(Clone, PartialEq, Debug)]
pub struct InterfaceConfig {
    /// `name`; without it the interface whose subnet holds the VIP.
    pub name: Option<String>,
    /// `check`, default on.
    pub check: bool,
    /// `arpreroute="on"`: periodic gratuitous ARP.
    pub arp_reroute: Option<ArpReroute>,
    /// `<virtual_interface>` children, at least one.
    pub virtual_interfaces: Vec<VirtualInterfaceConfig>,
}

/// Periodic broadcast announcements after a change of the map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ArpReroute {
    /// `arpinterval`, default 60 s.
    pub interval: Duration,
    /// `arpelapse`, default 1200 s: how long after a change they go on.
    pub elapse: Duration,
}

/// How frames for the VIP reach every server.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum L2Mode {
    /// Each requester is answered by one entry node, which forwards what it does not own.
    Directed,
    /// One virtual MAC that is never a source, so that switches flood.
    Invisible(MacAddr),
}

/// `<virtual_interface>`.
#[derive(Clone, PartialEq, Debug)]
pub struct VirtualInterfaceConfig {
    /// `type` and, for `vmac_invisible`, `addr` (default 5a:fe and the first IPv4 VIP or, without one, the last four bytes of
    /// the first IPv6 VIP).
    pub mode: L2Mode,
    /// `<virtual_addr>` children, at least one.
    pub addrs: Vec<VirtualAddr>,
}

/// `<virtual_addr>`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VirtualAddr {
    /// `addr`.
    pub addr: IpAddr,
    /// `check`, default on.
    pub check: bool,
}

/// `<group>`.
#[derive(Clone, PartialEq, Debug)]
pub struct GroupConfig {
    /// `name`, unique in the module.
    pub name: String,
    /// `<cluster><host name power/>`: weight per node name. Empty means all nodes, equal. A node that is not listed takes nothing then.
    pub weights: BTreeMap<String, u16>,
    /// `<rule>` children, at least one.
    pub rules: Vec<PortRule>,
    /// `<rule proto="arp" …/>` stood here: this group's map elects the entry node of its VIPs.
    pub arp: bool,
}

impl GroupConfig {
    /// The configured weight of the node called `name`.
    pub fn weight(&self, name: &str) -> u16 {
        if self.weights.is_empty() {
            1
        } else {
            self.weights.get(name).copied().unwrap_or(0)
        }
    }
}

/// Transport protocol of a rule.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Protocol {
    /// TCP, 6.
    Tcp,
    /// UDP, 17.
    Udp,
}

/// What of a frame the key is made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Affinity {
    /// `on_addr`: client address.
    ClientIp,
    /// `on_port`: client address and port.
    ClientPort,
    /// `on_net`: client network, /24 or /64.
    ClientNet,
    /// `on_ipid`: IPv4 identification.
    IpId,
}

/// `<rule>`: which traffic a group takes.
#[derive(Clone, PartialEq, Debug)]
pub struct PortRule {
    /// `virtual_addr`; `None` is `*`.
    pub vip: Option<IpAddr>,
    /// `proto`.
    pub protocol: Protocol,
    /// `port`: first port. `*` is 0 to 65535.
    pub first_port: u16,
    /// Last port, not below the first.
    pub last_port: u16,
    /// `filter`.
    pub affinity: Affinity,
}

/// `<user>`.
#[derive(Clone, PartialEq, Debug)]
pub struct UserConfig {
    /// `starttimeout`, default 300 s, for `prestart`, `start_both` and `poststop` (ours).
    pub start_timeout: Duration,
    /// `nicestoptimeout`, default 300 s.
    pub nice_stop_timeout: Duration,
    /// `forcestoptimeout`, default 300 s.
    pub force_stop_timeout: Duration,
    /// `logging`, default on.
    pub logging: bool,
    /// `userlogsize` in KB, default 2048.
    pub log_size_kb: u32,
    /// `<var>`, exported to scripts.
    pub vars: BTreeMap<String, String>,
}

/// What a failing checker does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CheckerAction {
    /// `restart`: stop and start the application; the module stays.
    Restart,
    /// `stopstart`: stop and start the module.
    StopStart,
    /// `stop`: stop the module.
    Stop,
    /// `noaction`: only show it.
    NoAction,
}

/// `<tcp>` with its `<to>`.
#[derive(Clone, PartialEq, Debug)]
pub struct TcpCheckerConfig {
    /// `ident`; the resource is `tcp.<ident>`.
    pub ident: String,
    /// `action`, default restart.
    pub action: CheckerAction,
    /// `addr`, default 127.0.0.1.
    pub addr: IpAddr,
    /// `port`.
    pub port: u16,
    /// `interval`, default 10 s.
    pub interval: Duration,
    /// `timeout`, default 5 s.
    pub timeout: Duration,
    /// `rise`, default 1: successes in a row before the resource is up (ours).
    pub rise: u32,
    /// `fall`, default 2: failures in a row before the resource is down; after the first one the next probe comes within a second (ours).
    pub fall: u32,
}
