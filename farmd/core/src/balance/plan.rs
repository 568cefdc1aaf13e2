//! What a data plane works by: immutable, numbered, swapped whole.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::balance::assign::BucketMap;
use crate::balance::hash::{self, Seed};
use crate::config::{Affinity, L2Mode, PlaneChoice, PortRule, Protocol, VipConfig, XdpChoice};
use crate::id::{BUCKETS, Bucket, MacAddr, NodeId, NodeSet};
use crate::wire::heartbeat::BucketSet;
use crate::wire::packet::Packet;

/// What a bucket is to this node: `farmd/docs/ARCHITECTURE.md`, "Buckets and verdicts".
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum BucketState {
    /// Mine, nobody else has connections in it: everything is accepted, and an unknown connection gets the stack's reset.
    Own,
    /// Mine, but a live peer still has connections in it: what is neither new nor known here is dropped in silence, unless all peers have
    /// said that they do not have it ([`crate::balance::orphans`]).
    Guarded,
    /// No longer mine, but connections of mine go on in it.
    Draining,
    /// Somebody else's.
    #[default]
    Foreign,
}

/// One group's buckets.
#[derive(Clone, PartialEq, Debug)]
pub struct GroupPlan {
    /// `module/group`, for people.
    pub name: String,
    /// State of each bucket here.
    pub states: Box<[BucketState; BUCKETS]>,
    /// Owner of each bucket, for forwarding and for entry nodes.
    pub owners: BucketMap,
    /// Buckets that this node has closed and their new owner has not yet opened: what comes for them is kept while `owners` still names this node,
    /// and sent on to the owner from then on.
    pub leaving: BucketSet,
    /// This node has closed everything and takes part in no hand-over. Who hands something on to it has not heard of that; what it kept of it, it would answer when
    /// it is back, beside the node that has answered meanwhile.
    pub shut: bool,
    /// Peers that have connections in buckets they do not own.
    pub holders: BTreeMap<usize, NodeSet>,
}

impl GroupPlan {
    /// A group of which nothing is owned.
    pub fn closed(name: String) -> Self {
        Self {
            name,
            states: Box::new([BucketState::Foreign; BUCKETS]),
            owners: BucketMap::default(),
            leaving: BucketSet::default(),
            shut: false,
            holders: BTreeMap::new(),
        }
    }

    /// True if a bucket needs to know which connections this host has.
    pub fn needs_sockets(&self) -> bool {
        self.states
            .iter()
            .any(|s| matches!(s, BucketState::Guarded | BucketState::Draining))
    }
}

/// A port rule, and the group whose map it follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RulePlan {
    /// Transport protocol.
    pub protocol: Protocol,
    /// First port.
    pub first_port: u16,
    /// Last port.
    pub last_port: u16,
    /// What the key is made of.
    pub affinity: Affinity,
    /// Position in [`Plan::groups`].
    pub group: usize,
}

/// One virtual address.
#[derive(Clone, PartialEq, Debug)]
pub struct VipPlan {
    /// The address.
    pub addr: IpAddr,
    /// Kernel index of its service interface.
    pub interface: u32,
    /// This host's own Ethernet address there; the source of every answer.
    pub own_mac: MacAddr,
    /// How frames reach every server.
    pub mode: L2Mode,
    /// Group whose map says which node answers a requester, and an echo.
    pub entry_group: usize,
    /// Rules, the most specific first. They change with the configuration only, so that plans share them.
    pub rules: Arc<[RulePlan]>,
    /// Ethernet addresses of the other members on this interface.
    pub peers: BTreeMap<NodeId, MacAddr>,
    /// Where its frames are to be judged.
    pub choice: PlaneChoice,
    /// Whether XDP, as the module's configuration wants it.
    pub xdp: XdpChoice,
    /// Periodic announcements, if wanted.
    pub arp_reroute: Option<crate::config::ArpReroute>,
}

impl VipPlan {
    /// The Ethernet address under which the VIP is to be reached here.
    pub fn service_mac(&self) -> MacAddr {
        match self.mode {
            L2Mode::Directed => self.own_mac,
            L2Mode::Invisible(mac) => mac,
        }
    }

    /// True if its rules are `rules`; quick where both are shared, as between plans of one configuration.
    pub fn has_rules(&self, rules: &Arc<[RulePlan]>) -> bool {
        Arc::ptr_eq(&self.rules, rules) || self.rules == *rules
    }

    /// The most specific rule for `protocol` and `port`.
    pub fn rule(&self, protocol: Protocol, port: u16) -> Option<&RulePlan> {
        self.rules
            .iter()
            .find(|r| r.protocol == protocol && (r.first_port..=r.last_port).contains(&port))
    }

    /// The rule for what has no ports to tell: that of all ports of `protocol`, if its key has none and all rules have the same group and key.
    pub fn portless_rule(&self, protocol: Protocol) -> Option<&RulePlan> {
        let mut rules = self.rules.iter().filter(|r| r.protocol == protocol);
        let rule = rules.next().filter(|r| r.affinity != Affinity::ClientPort)?;
        rules
            .all(|r| r.group == rule.group && r.affinity == rule.affinity)
            .then_some(rule)
    }

    /// The rules of `vip` among `config`'s, the most specific first: a named VIP before `*`, a narrow port range before a wide one. `base` is
    /// the position of the module's first group in the plan.
    pub fn rules_of(config: &VipConfig, vip: IpAddr, base: usize) -> Arc<[RulePlan]> {
        let mut rules: Vec<(&PortRule, usize)> = config
            .groups
            .iter()
            .enumerate()
            .flat_map(|(i, group)| group.rules.iter().map(move |rule| (rule, base + i)))
            .filter(|(rule, _)| rule.vip.is_none_or(|addr| addr == vip))
            .collect();
        rules.sort_by_key(|(rule, _)| (rule.vip.is_none(), rule.last_port - rule.first_port));
        rules
            .into_iter()
            .map(|(rule, group)| RulePlan {
                protocol: rule.protocol,
                first_port: rule.first_port,
                last_port: rule.last_port,
                affinity: rule.affinity,
                group,
            })
            .collect()
    }

    /// The group that elects the entry node of `vip`: the one with an `arp` rule, else the first that has a rule for the VIP.
    pub fn entry_group_of(config: &VipConfig, vip: IpAddr) -> usize {
        let arp = config.groups.iter().position(|g| g.arp);
        let first = || {
            config
                .groups
                .iter()
                .position(|g| g.rules.iter().any(|r| r.vip.is_none_or(|addr| addr == vip)))
        };
        arp.or_else(first).unwrap_or(0)
    }
}

/// Everything a data plane needs.
#[derive(Clone, PartialEq, Debug)]
pub struct Plan {
    /// Rises with each plan of this daemon.
    pub version: u64,
    /// This node.
    pub this: NodeId,
    /// Seed of the flow hash.
    pub seed: Seed,
    /// Virtual addresses this host carries.
    pub vips: Vec<VipPlan>,
    /// Groups of all modules.
    pub groups: Vec<GroupPlan>,
    /// Peers that fell silent without a goodbye, and when each was last heard (the owner loop's time): what they were to answer since then
    /// may have reached nobody.
    pub gone: BTreeMap<NodeId, Duration>,
}

impl Plan {
    /// The VIP with address `addr`.
    pub fn vip(&self, addr: IpAddr) -> Option<&VipPlan> {
        self.vips.iter().find(|v| v.addr == addr)
    }

    /// Bucket of a packet under `affinity`; `port` is the client's.
    pub fn bucket(&self, affinity: Affinity, packet: &Packet, client: IpAddr, port: u16) -> Bucket {
        match affinity {
            Affinity::ClientIp => hash::bucket_of_addr(self.seed, client),
            Affinity::ClientPort => hash::bucket_of_port(self.seed, client, port),
            Affinity::ClientNet => hash::bucket_of_net(self.seed, client),
            Affinity::IpId => hash::bucket_of_ipid(self.seed, packet.identification as u16),
        }
    }

    /// The node that answers `requester` for `vip`: the owner of the requester's bucket, so that with `on_addr` a client on the link needs no
    /// forwarding at all.
    pub fn entry_node(&self, vip: &VipPlan, requester: IpAddr) -> Option<NodeId> {
        self.groups
            .get(vip.entry_group)?
            .owners
            .owner(hash::bucket_of_addr(self.seed, requester))
    }

    /// True if this node is that one, and has the bucket open: a node that did not run for a while has closed it, and may only not know yet whose it is by now.
    pub fn is_entry(&self, vip: &VipPlan, requester: IpAddr) -> bool {
        let bucket = hash::bucket_of_addr(self.seed, requester).index();
        let state = self.groups.get(vip.entry_group).map(|group| group.states[bucket]);
        let is_open = matches!(state, Some(BucketState::Own | BucketState::Guarded));
        is_open && self.entry_node(vip, requester) == Some(self.this)
    }
}
