//! What a node says of a module, passed on to one that does not hear it.
//!
//! All that run a module need each other's word: who proposes maps, to have their promises, and all the others, to know who has connections where.
//! Of two that do not talk, the lowest that talks with both passes on what they say. Called by [`super::Farm`] only.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::id::{Incarnation, ModuleName, NodeId, NodeSet};
use crate::wire::heartbeat::Relayed;

use super::Farm;

/// The heartbeat in which a node has said what it was, and when that came in here.
#[derive(Clone, Copy, Debug)]
struct Taken {
    incarnation: Incarnation,
    seq: u64,
    at: Duration,
}

/// What was passed on to this node, and not yet said by the node itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Relays(BTreeMap<NodeId, BTreeMap<ModuleName, Taken>>);

impl Relays {
    /// True if the reports of `node` were passed on.
    pub(super) fn has(&self, node: NodeId) -> bool {
        self.0.contains_key(&node)
    }

    /// It is heard again.
    pub(super) fn remove(&mut self, node: NodeId) {
        self.0.remove(&node);
    }
}

impl Farm {
    /// Whose word on which module this node passes on.
    pub(super) fn passes_on(&self) -> Vec<(NodeId, ModuleName)> {
        let links = self.membership.links();
        if !links.is_broken(self.membership.view()) {
            return Vec::new();
        }
        let modules = self.modules.keys().flat_map(|name| {
            let members = self.electorate(name).members;
            let is_lowest = |a: NodeId, b: NodeId| {
                let mut between = members.iter().filter(|n| ![a, b].contains(n));
                between.find(|n| links.talk(*n, a) && links.talk(*n, b)) == Some(self.this)
            };
            let has_way_by_this = |a: &NodeId| {
                let mut parted = members.iter().filter(|b| b != a && !links.talk(*a, *b));
                parted.any(|b| is_lowest(*a, b))
            };
            let words = members.iter().filter(has_way_by_this);
            words.map(|node| (node, name.clone())).collect::<Vec<_>>()
        });
        modules.collect()
    }

    /// The same with what they say. What has been said by a node that is joining or has stepped out is nothing to agree with.
    pub(super) fn relayed(&self) -> Vec<Relayed> {
        let words = self.passes_on().into_iter().filter_map(|(node, name)| {
            let peer = self.membership.peer(node)?;
            let report = self.report(node, &name)?;
            let (incarnation, seq) = peer.newest();
            (!peer.joining() && !peer.fenced() && !self.relays.has(node)).then(|| Relayed {
                node,
                incarnation,
                seq,
                module: report.clone(),
            })
        });
        words.collect()
    }

    /// Takes what another passes on, unless something newer is known.
    pub(super) fn take_relayed(&mut self, now: Duration, word: Relayed) {
        let Relayed {
            node,
            incarnation,
            seq,
            module,
        } = word;
        let number = (incarnation, seq);
        let is_heard = self.membership.heard(now).contains(node);
        let Some(peer) = self.membership.peer(node).filter(|_| !is_heard) else {
            return;
        };
        let taken = self.relays.0.get(&node).and_then(|modules| modules.get(&module.name));
        if number <= peer.newest() || taken.is_some_and(|taken| number <= (taken.incarnation, taken.seq)) {
            return;
        }
        let at = now;
        let taken = Taken { incarnation, seq, at };
        self.relays
            .0
            .entry(node)
            .or_default()
            .insert(module.name.clone(), taken);
        let macs = self.macs.entry(node).or_default();
        macs.retain(|(name, _)| *name != module.name);
        macs.push((module.name.clone(), module.macs.clone()));
        let reports = self.reports.entry(node).or_default();
        reports.retain(|report| report.name != module.name);
        reports.push(module);
    }

    /// Forgets what nobody has passed on for the detection time, or concerns a node that is heard or no member.
    pub(super) fn forget_relayed(&mut self, now: Duration, heard: NodeSet) {
        let view = self.membership.view();
        let oldest = now.saturating_sub(self.membership.detection_time());
        let reports = &mut self.reports;
        self.relays.0.retain(|node, modules| {
            if heard.contains(*node) {
                return false;
            }
            modules.retain(|_, taken| view.contains(*node) && taken.at > oldest);
            if let Some(reports) = reports.get_mut(node) {
                reports.retain(|report| modules.contains_key(&report.name));
            }
            !modules.is_empty()
        });
    }
}
