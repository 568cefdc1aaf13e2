//! From the farm's state to the data plane's plan, and from the farm's events to the log.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use farm_core::api::ModuleState;
use farm_core::api::history::Happening;
use farm_core::balance::hash::Seed;
use farm_core::balance::plan::{GroupPlan, Plan, VipPlan};
use farm_core::config::PartitionPolicy;
use farm_core::farm::Event;
use farm_core::handover;
use farm_core::id::{MacAddr, ModuleName, NodeId, NodeSet};
use farm_core::membership::{self, peer};
use tracing::{info, warn};

use super::Node;
use super::rules::Rules;

/// Module and group of each position in a plan.
type Groups = Vec<(ModuleName, usize)>;
/// Ethernet addresses the peers have told, by module.
type PeerMacs = BTreeMap<(ModuleName, NodeId), Vec<MacAddr>>;

/// What the data plane has been given.
#[derive(Debug)]
pub(super) struct Published {
    this: NodeId,
    seed: Seed,
    version: u64,
    /// The farm's number for the newest plan; `None` if something else has changed since.
    farm_version: Option<u64>,
    macs: PeerMacs,
    rules: Rules,
    under_way: VecDeque<(u64, u64, Groups)>,
    plan: Arc<Plan>,
}

impl Published {
    pub(super) fn new(this: NodeId, seed: Seed) -> Self {
        let plan = Arc::new(Plan {
            version: 0,
            this,
            seed,
            vips: Vec::new(),
            groups: Vec::new(),
            gone: BTreeMap::new(),
        });
        Self {
            this,
            seed,
            version: 0,
            farm_version: None,
            macs: PeerMacs::new(),
            rules: Rules::default(),
            under_way: VecDeque::new(),
            plan,
        }
    }

    /// Something beside the farm's state has changed: the next turn publishes.
    pub(super) fn touch(&mut self) {
        self.farm_version = None;
    }

    /// Number of the newest plan.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// A plan without any VIP.
    pub(super) fn empty_plan(&self) -> Plan {
        Plan {
            version: self.version + 1,
            this: self.this,
            seed: self.seed,
            vips: Vec::new(),
            groups: Vec::new(),
            gone: BTreeMap::new(),
        }
    }

    /// The data plane works with plan `version`: the farm's number for it, and what its groups are.
    pub(super) fn applied(&mut self, version: u64) -> Option<(u64, Groups)> {
        while self.under_way.front().is_some_and(|(v, ..)| *v < version) {
            self.under_way.pop_front();
        }
        let (_, farm_version, groups) = self.under_way.front().filter(|(v, ..)| *v == version)?;
        Some((*farm_version, groups.clone()))
    }

    /// The newest plan, and what its groups are.
    pub(super) fn newest(&self) -> (Arc<Plan>, Groups) {
        let groups = self.under_way.back().map(|(_, _, groups)| groups.clone());
        (Arc::clone(&self.plan), groups.unwrap_or_default())
    }

    /// The plan for a person.
    pub(super) fn describe(&self) -> serde_json::Value {
        let vips = self.plan.vips.iter().map(|v| {
            serde_json::json!({
                "addr": v.addr, "interface": v.interface, "own_mac": v.own_mac, "mode": format!("{:?}", v.mode),
                "entry_group": v.entry_group, "rules": v.rules.iter().map(|r| format!("{r:?}")).collect::<Vec<_>>(),
                "peers": v.peers.iter().map(|(n, m)| (n.index().to_string(), m.to_string())).collect::<BTreeMap<_, _>>(),
            })
        });
        let groups = self.plan.groups.iter().map(|g| {
            let mut states: BTreeMap<String, usize> = BTreeMap::new();
            for state in g.states.iter() {
                *states.entry(format!("{state:?}")).or_default() += 1;
            }
            serde_json::json!({ "name": g.name, "states": states, "owners": format!("{:?}", g.owners), "holders": g.holders.len() })
        });
        serde_json::json!({ "version": self.plan.version, "vips": vips.collect::<Vec<_>>(), "groups": groups.collect::<Vec<_>>() })
    }
}

impl Node {
    /// Gives the data plane a new plan if anything in it has changed; true if so.
    pub(super) fn publish(&mut self) -> bool {
        let farm_version = self.farm.plan_version();
        let macs = self.peer_macs();
        let gone = self.farm.membership().gone(self.now());
        let published = &self.published;
        if published.farm_version == Some(farm_version) && published.macs == macs && published.plan.gone == gone {
            return false;
        }
        self.published.version += 1;
        let mut rules = std::mem::take(&mut self.published.rules);
        let (mut plan, groups) = self.build_plan(self.published.version, &macs, &mut rules);
        self.published.rules = rules;
        plan.gone = gone;
        let plan = Arc::new(plan);
        self.published.farm_version = Some(farm_version);
        self.published.macs = macs;
        self.published
            .under_way
            .push_back((self.published.version, farm_version, groups));
        self.published.plan = Arc::clone(&plan);
        let now = self.now();
        self.unconfirmed_since.get_or_insert(now);
        self.plane.apply(plan);
        true
    }

    fn peer_macs(&self) -> PeerMacs {
        let of = |name: &ModuleName| -> Vec<((ModuleName, NodeId), Vec<MacAddr>)> {
            let macs = self.farm.macs(name);
            macs.map(|(peer, macs)| ((name.clone(), peer), macs.to_vec())).collect()
        };
        self.modules.keys().flat_map(of).collect()
    }

    fn build_plan(&self, version: u64, macs: &PeerMacs, rules: &mut Rules) -> (Plan, Groups) {
        let mut plan = Plan {
            version,
            ..self.published.empty_plan()
        };
        let mut keys = Groups::new();
        for (name, module) in self.modules.iter().filter(|(_, m)| !m.vips.is_empty()) {
            let Some(config) = &module.config.vip else { continue };
            let base = plan.groups.len();
            for (i, group) in config.groups.iter().enumerate() {
                let label = format!("{name}/{}", group.name);
                let states = self
                    .farm
                    .group_plan(name, i)
                    .unwrap_or_else(|| GroupPlan::closed(label.clone()));
                plan.groups.push(GroupPlan { name: label, ..states });
                keys.push((name.clone(), i));
            }
            for (position, interface) in config.interfaces.iter().enumerate() {
                for virtual_interface in &interface.virtual_interfaces {
                    for addr in &virtual_interface.addrs {
                        let Some(host) = module.vips.iter().find(|v| v.addr == addr.addr) else {
                            continue;
                        };
                        let peers = macs
                            .iter()
                            .filter(|((m, _), _)| m == name)
                            .filter_map(|((_, peer), macs)| {
                                macs.get(position)
                                    .filter(|m| **m != MacAddr::default())
                                    .map(|m| (*peer, *m))
                            });
                        plan.vips.push(VipPlan {
                            addr: addr.addr,
                            interface: host.interface,
                            own_mac: host.own_mac,
                            mode: virtual_interface.mode,
                            entry_group: base + VipPlan::entry_group_of(config, addr.addr),
                            rules: rules.of(name, &module.config, base, addr.addr),
                            peers: peers.collect(),
                            choice: config.plane,
                            xdp: config.xdp,
                            arp_reroute: interface.arp_reroute,
                        });
                    }
                }
            }
        }
        rules.forget_others(&plan);
        (plan, keys)
    }

    /// Writes a line into the log of every module that is not in STOP.
    pub(super) fn log_to_active(&self, level: char, origin: &str, text: &str) {
        for (name, _) in self
            .modules
            .iter()
            .filter(|(_, m)| m.machine.state() != ModuleState::Stop)
        {
            self.journal.write(name, origin, level, text);
        }
    }

    pub(super) fn names(&self, set: NodeSet) -> String {
        peer::names(&self.cluster.nodes, set)
    }

    /// Every change of the farm becomes one line, with its cause.
    pub(super) fn log_farm_events(&mut self) {
        while let Some(event) = self.farm.poll_event() {
            match event {
                Event::Membership(event) => {
                    self.log_membership(&event);
                    self.record_membership(&event);
                }
                Event::Handover { module, group, event } => {
                    self.log_handover(&module, group, &event);
                    self.record_handover(&module, group, &event);
                }
                Event::KeptOut { module, why: Some(why) } => {
                    self.journal
                        .write(&module, "farm", 'E', &format!("Kept out of the farm: {why}"));
                    self.record(Some(&module), Happening::KeptOut { why });
                }
                Event::KeptOut { module, why: None } => {
                    self.journal
                        .write(&module, "farm", 'I', "No longer kept out of the farm");
                    self.record(Some(&module), Happening::Readmitted);
                }
                Event::Withheld { module, why } => {
                    let policy = self.modules.get(&module).map(|m| m.config.partition);
                    let policy = match policy.unwrap_or_default() {
                        PartitionPolicy::Serve => "serve",
                        PartitionPolicy::Majority => "majority",
                        PartitionPolicy::Witness => "witness",
                    };
                    self.record(
                        Some(&module),
                        Happening::Policy {
                            policy: policy.to_owned(),
                            serves: why.is_none(),
                            why: why.clone().unwrap_or_default(),
                        },
                    );
                    let text = why.map_or_else(
                        || "The farm is whole again: this node may serve".to_owned(),
                        |why| format!("Stops serving: {why}"),
                    );
                    self.journal.write(&module, "farm", 'E', &text);
                }
                Event::Learned(requester) => self.plane.learn(requester),
                Event::NotBack(node) => {
                    let text = format!(
                        "{} had left to restart its farmd and is not back; the connections it had are given up",
                        self.cluster.name(node)
                    );
                    warn!("{text}");
                    self.log_to_active('E', "membership", &text);
                }
            }
        }
    }

    fn log_membership(&self, event: &membership::Event) {
        let (level, text) = match event {
            membership::Event::PeerAlive { peer, restarted } => {
                let how = if *restarted {
                    "has restarted and is alive"
                } else {
                    "is alive"
                };
                ('I', format!("Node {} {how}", self.cluster.name(*peer)))
            }
            membership::Event::PeerDown { peer, why, .. } => {
                ('E', format!("Node {} is down: {why}", self.cluster.name(*peer)))
            }
            membership::Event::ViewChanged { new, .. } => ('E', format!("farm membership: {}", self.names(*new))),
            membership::Event::Fenced(Some(why)) => ('C', format!("This node has stepped out: {why}")),
            membership::Event::Fenced(None) => ('E', "This node is heard again and joins".to_owned()),
            membership::Event::Joined => ('I', "Joining is over: all that can be heard has been heard".to_owned()),
        };
        match level {
            'I' => info!("{text}"),
            _ => warn!("{text}"),
        }
        self.log_to_active(level, "membership", &text);
    }

    fn log_handover(&self, module: &ModuleName, group: usize, event: &handover::Event) {
        let group = self.group_name(module, group);
        let (level, text) = match event {
            handover::Event::Proposed { epoch, view, moves } => (
                'I',
                format!(
                    "map {}: {moves} buckets to move, proposed to {} (group {group})",
                    epoch.counter(),
                    self.names(*view)
                ),
            ),
            handover::Event::Accepted { .. } => return,
            handover::Event::Adopted { epoch, counts, .. } => (
                'I',
                format!(
                    "map {} was agreed without this node; {}/4096 are this node's (group {group})",
                    epoch.counter(),
                    counts.get(&self.this).copied().unwrap_or(0)
                ),
            ),
            handover::Event::Released { epoch, lost, .. } => (
                'I',
                format!("map {}: {lost} buckets released (group {group})", epoch.counter()),
            ),
            handover::Event::Committed {
                epoch,
                counts,
                gained,
                from,
                ..
            } => {
                let mine = counts.get(&self.this).copied().unwrap_or(0);
                let from = if *gained == 0 {
                    String::new()
                } else if from.is_empty() {
                    format!(", {gained} taken up")
                } else {
                    format!(", {gained} taken over from {}", self.names(*from))
                };
                (
                    'E',
                    format!("farm load: {mine}/4096 (group {group}, map {}{from})", epoch.counter()),
                )
            }
            handover::Event::Shut => ('E', format!("farm load: 0/4096 (group {group}): everything closed")),
        };
        self.journal.write(module, "farm", level, &text);
    }
}
