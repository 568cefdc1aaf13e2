//! What is shown: the whole farm as this node knows it, with the age of each fact.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use farm_core::api::{
    API_VERSION, ClusterStatus, FarmStatus, HeartbeatStatus, LinkStatus, ModuleState, ModuleStatus, NodeModuleStatus,
    PeerStatus, Quality, Share, ShareSetting,
};
use farm_core::config::{GroupConfig, Lan, PlaneChoice};
use farm_core::id::{BUCKETS, Incarnation, ModuleName, NodeId};
use farm_core::membership::PeerState;

use super::Node;
use crate::logwriter;

/// How long an address that sent what could not be used is mentioned.
const STRANGER_MEMORY: Duration = Duration::from_secs(10);

/// Since a node with this start number has started, by its clock and this host's.
fn uptime_ms(incarnation: Incarnation) -> Option<u64> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    let since = now.checked_sub(Duration::from_micros(incarnation.0));
    since.filter(|_| incarnation.0 > 0).map(millis)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

impl Node {
    pub(super) fn status(&self) -> FarmStatus {
        let mut names: BTreeSet<ModuleName> = self.modules.keys().cloned().collect();
        names.extend(self.farm.reports().values().flatten().map(|r| r.name.clone()));
        FarmStatus {
            version: API_VERSION,
            node: self.cluster.name(self.this).to_owned(),
            modules: names.iter().map(|name| self.module_status(name)).collect(),
            cluster: self.cluster_status(),
            warnings: self.warnings.clone(),
        }
    }

    fn module_status(&self, name: &ModuleName) -> ModuleStatus {
        let local = self.modules.get(name);
        let vip = local.and_then(|m| m.config.vip.as_ref());
        let groups: &[GroupConfig] = vip.map_or(&[], |v| &v.groups);
        let nodes = (0..self.cluster.nodes.len()).filter_map(NodeId::new);
        let addrs: Vec<IpAddr> = vip.iter().flat_map(|v| v.addrs()).collect();
        let choice = vip.map_or(PlaneChoice::Auto, |v| v.plane);
        let (dataplane, dataplane_why) = if local.is_some_and(|m| !m.vips.is_empty()) {
            self.plane.standing().tell(choice, &addrs)
        } else {
            Default::default()
        };
        ModuleStatus {
            name: name.to_string(),
            vips: addrs.iter().map(ToString::to_string).collect(),
            dataplane,
            dataplane_why,
            nodes: nodes.map(|node| self.node_status(name, node, groups)).collect(),
            resources: local.map(|m| m.machine.resources()).unwrap_or_default(),
            configured: local.is_some(),
        }
    }

    pub(super) fn node_status(&self, name: &ModuleName, node: NodeId, groups: &[GroupConfig]) -> NodeModuleStatus {
        // Buckets open and connections in closed ones, by group: what each node says of itself.
        let shares = |of: &dyn Fn(usize) -> Option<(u32, u32)>| -> Vec<Share> {
            let share = |(i, group): (usize, &GroupConfig)| {
                let (buckets, draining) = of(i).unwrap_or_default();
                Share {
                    group: group.name.clone(),
                    buckets,
                    of: BUCKETS as u32,
                    draining,
                    setting: ShareSetting::default(),
                    clients: Vec::new(),
                }
            };
            groups.iter().enumerate().map(share).collect()
        };
        let absent = |why: String| NodeModuleStatus {
            node: self.cluster.name(node).to_owned(),
            state: None,
            quality: None,
            shares: Vec::new(),
            why,
            age_ms: 0,
        };
        if node == self.this {
            let Some(module) = self.modules.get(name) else {
                return absent("not configured on this node".to_owned());
            };
            let (state, quality) = (module.machine.state(), module.machine.quality());
            let mut open = shares(&|i| {
                self.farm
                    .group(name, i)
                    .map(|g| (g.open_count() as u32, g.held_connections()))
            });
            for (i, share) in open.iter_mut().enumerate() {
                share.setting = self.desk.setting(name, &share.group);
                share.clients = self.desk.clients(name, i);
            }
            let why = self.why_here(name, state, quality, self.why_of(name, module), &open);
            return NodeModuleStatus {
                state: Some(state),
                quality: Some(quality),
                shares: open,
                why,
                ..absent(String::new())
            };
        }
        let now = self.now();
        let peer = self.farm.membership().peer(node);
        let Some(report) = self.farm.report(node, name) else {
            let heard = self.farm.membership().heard(now).contains(node);
            let why = if heard {
                "not configured there".to_owned()
            } else {
                self.why_down(node)
            };
            return absent(why);
        };
        let mut shares = shares(&|i| report.groups.get(i).map(|g| (g.open.into(), g.held_connections)));
        for ((share, group), told) in shares.iter_mut().zip(groups).zip(&report.groups) {
            // A node that is drained, or on its way, tells the weight 0 too.
            let set = told.weight > 0 || report.why.starts_with("weight 0");
            let other = told.weight != group.weight(self.cluster.name(node));
            share.setting.weight = (set && other).then_some(told.weight);
        }
        let told_at = self.farm.told_at(node);
        let spoken_at = told_at.or_else(|| peer?.heard_at());
        let age = spoken_at.map_or(Duration::ZERO, |at| now.saturating_sub(at));
        let mut why = report.why.clone();
        if let Some(by) = self.farm.told_by(node).filter(|_| why.is_empty()) {
            why = format!("not heard here; {} passes on what it says", self.cluster.name(by));
        } else if why.is_empty() && !peer.is_some_and(|p| p.hears_us()) {
            why = peer
                .map(|p| p.why(now, self.cluster.detection_time()))
                .unwrap_or_default();
        }
        if why.is_empty() && peer.is_some_and(|p| p.fenced()) {
            "it has stepped out".clone_into(&mut why);
        }
        NodeModuleStatus {
            state: Some(report.state),
            quality: Some(report.quality),
            shares,
            why,
            age_ms: millis(age),
            ..absent(String::new())
        }
    }

    /// Why this node does not serve its share of `name`, as its status says; empty if it does.
    pub(super) fn why_no_share(&self, name: &ModuleName) -> String {
        let vip = self.modules.get(name).and_then(|m| m.config.vip.as_ref());
        self.node_status(name, self.this, vip.map_or(&[], |v| &v.groups)).why
    }

    /// Why this node does not serve its share, if so.
    fn why_here(
        &self,
        name: &ModuleName,
        state: ModuleState,
        quality: Quality,
        why: String,
        shares: &[Share],
    ) -> String {
        if let Some(kept_out) = self.farm.kept_out(name) {
            return format!("kept out: {kept_out}");
        }
        if let Some(fenced) = self.farm.membership().fenced() {
            return format!("stepped out: {fenced}");
        }
        if let Some(withheld) = self.farm.withheld(name) {
            return format!("does not serve: {withheld}");
        }
        if !why.is_empty() || (state, quality) != (ModuleState::Up, Quality::Ready) {
            return why;
        }
        if self.farm.membership().waits() {
            return "joining: listening for the others".to_owned();
        }
        let module = self.modules.get(name);
        let groups = module
            .iter()
            .flat_map(|m| m.config.vip.iter().flat_map(|v| v.groups.iter().map(|g| (*m, g))));
        let wanted = groups.into_iter().any(|(m, g)| self.share_weight(name, m, g) > 0);
        if wanted && !shares.is_empty() && shares.iter().all(|s| s.buckets == 0) {
            return "no share yet: the hand-over is under way".to_owned();
        }
        String::new()
    }

    fn why_down(&self, node: NodeId) -> String {
        let now = self.now();
        let why = self
            .farm
            .membership()
            .peer(node)
            .map(|p| p.why(now, self.cluster.detection_time()))
            .unwrap_or_default();
        let addrs = self
            .cluster
            .lans
            .iter()
            .flat_map(|l| &l.nodes)
            .filter(|(n, _)| *n == node)
            .map(|(_, a)| a);
        let strange = addrs
            .filter_map(|a| self.strangers.get(a))
            .find(|s| now < s.last + STRANGER_MEMORY)
            .map(|s| format!("heartbeats from its address {}", s.what));
        strange.unwrap_or(why)
    }

    pub(super) fn cluster_status(&self) -> ClusterStatus {
        let now = self.now();
        let membership = self.farm.membership();
        let name = |n: NodeId| self.cluster.name(n).to_owned();
        let coordinator = self
            .modules
            .keys()
            .find_map(|m| self.farm.coordinator(m))
            .or_else(|| membership.view().first());
        let nodes = (0..self.cluster.nodes.len()).filter_map(NodeId::new).map(|node| {
            let addrs = self.cluster.lans.iter().flat_map(|lan| {
                lan.nodes
                    .iter()
                    .filter(|(n, _)| *n == node)
                    .map(|(_, addr)| format!("{}={addr}", lan.name))
            });
            let peer = membership.peer(node);
            let state = match membership.peer_state(now, node) {
                None => "this",
                Some(PeerState::Alive) => "alive",
                Some(PeerState::Suspect) => "suspect",
                Some(PeerState::Down) => "down",
            };
            let why = match peer {
                None => membership.fenced().unwrap_or("").to_owned(),
                Some(_) if state == "down" => self.why_down(node),
                Some(peer) => peer.why(now, self.cluster.detection_time()),
            };
            PeerStatus {
                name: name(node),
                addrs: addrs.collect(),
                state: state.to_owned(),
                since_ms: millis(peer.map_or(now, |p| now.saturating_sub(p.since()))),
                heard_ms: peer.and_then(|p| p.heard_at()).map(|at| millis(now.saturating_sub(at))),
                why,
                incarnation: peer.map_or(self.incarnation.0, |p| p.incarnation().0),
                uptime_ms: match peer {
                    None => Some(millis(now)),
                    Some(p) => uptime_ms(p.incarnation()).filter(|_| state != "down"),
                },
                links: self.links(now, node),
            }
        });
        ClusterStatus {
            node: name(self.this),
            digest: format!("{:016x}", self.cluster.digest),
            view: membership.view().iter().map(name).collect(),
            coordinator: coordinator.map(name),
            nodes: nodes.collect(),
            plan_version: self.published.version(),
            incarnation: self.incarnation.0,
            heartbeat: HeartbeatStatus {
                interval_us: micros(self.cluster.heartbeat_interval),
                detection_ms: millis(self.cluster.detection_time()),
                bytes: self.heartbeat_bytes,
                bytes_per_s: self.sent_rate.per_second(now, self.sent_bytes),
                realtime: self.realtime,
                late: self.pace.late(),
                late_most_us: micros(self.pace.latest()),
                turn_longest_us: micros(self.pace.longest_turn()),
            },
        }
    }

    /// How a peer is heard on each lan that it shares with this node; none for this node.
    fn links(&self, now: Duration, node: NodeId) -> Vec<LinkStatus> {
        let addr_on = |lan: &Lan, n: NodeId| lan.nodes.iter().find(|(node, _)| *node == n).map(|(_, addr)| *addr);
        let Some(peer) = self.farm.membership().peer(node) else {
            return Vec::new();
        };
        let shared = peer.links().filter_map(|(position, link)| {
            let lan = self.cluster.lans.get(position)?;
            addr_on(lan, self.this)?;
            Some((lan, addr_on(lan, node)?, link))
        });
        shared
            .map(|(lan, addr, link)| {
                let (received, lost) = peer.recent(now, link);
                let rtt = link.rtt();
                LinkStatus {
                    lan: lan.name.clone(),
                    addr: addr.to_string(),
                    received: link.received(),
                    lost: link.lost(),
                    loss_permille: (lost * 1000).checked_div(received + lost),
                    rtt_us: rtt.map(|rtt| micros(rtt.last)),
                    rtt_min_us: rtt.map(|rtt| micros(rtt.least)),
                    rtt_avg_us: rtt.map(|rtt| micros(rtt.smoothed)),
                    heard_ms: link.heard_at().map(|at| millis(now.saturating_sub(at))),
                }
            })
            .collect()
    }

    pub(super) fn metrics(&self) -> BTreeMap<String, u64> {
        let mut metrics = self.counters.read();
        metrics.extend(self.command_counters.read());
        for (what, count) in &self.refused {
            metrics.insert(format!("heartbeats_refused_{what}"), *count);
        }
        metrics.extend([
            ("heartbeats_sent".to_owned(), self.sent),
            ("heartbeats_sent_bytes".to_owned(), self.sent_bytes),
            ("heartbeats_send_failed".to_owned(), self.send_failed),
            ("heartbeats_received".to_owned(), self.received),
            ("heartbeats_late".to_owned(), self.pace.late()),
            ("heartbeats_late_most_us".to_owned(), micros(self.pace.latest())),
            ("turn_longest_us".to_owned(), micros(self.pace.longest_turn())),
            ("pauses".to_owned(), self.pauses),
            ("plan_version".to_owned(), self.published.version()),
            ("requesters".to_owned(), self.farm.requesters().len() as u64),
            ("journal_lines_dropped".to_owned(), self.journal.dropped()),
            ("log_lines_dropped".to_owned(), logwriter::dropped()),
        ]);
        metrics
    }
}
