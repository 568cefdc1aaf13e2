//! What a node says of its modules, passed on to one that does not hear it.
//!
//! The members of a view need each other's word: who proposes maps, to have their promises, and all the others, to know who has connections where.
//! Of two that do not talk, the lowest that talks with both passes on what they say. Called by [`super::Farm`] only.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::id::{Incarnation, NodeId, NodeSet};
use crate::wire::heartbeat::{ModuleReport, Relayed};

use super::Farm;

/// The heartbeat in which a node has said what was passed on, when that came in here, and from whom.
#[derive(Clone, Copy, Debug)]
struct Taken {
    incarnation: Incarnation,
    seq: u64,
    at: Duration,
    by: NodeId,
}

/// Whose reports were passed on to this node, and not yet said by the node itself.
#[derive(Clone, Debug, Default)]
pub(super) struct Relays {
    taken: BTreeMap<NodeId, Taken>,
    /// Position, among the nodes whose word this one passes on, of the one that comes first next time.
    pub(super) turn: usize,
}

impl Relays {
    /// True if the reports of `node` were passed on.
    pub(super) fn has(&self, node: NodeId) -> bool {
        self.taken.contains_key(&node)
    }

    /// When they came in.
    pub(super) fn taken_at(&self, node: NodeId) -> Option<Duration> {
        self.taken.get(&node).map(|taken| taken.at)
    }

    /// Who passed them on.
    pub(super) fn taken_from(&self, node: NodeId) -> Option<NodeId> {
        self.taken.get(&node).map(|taken| taken.by)
    }

    /// The node itself has spoken.
    pub(super) fn remove(&mut self, node: NodeId) {
        self.taken.remove(&node);
    }

    /// Nothing counts that was passed on before.
    pub(super) fn clear(&mut self) {
        self.taken.clear();
    }
}

impl Farm {
    /// Whose word this node passes on.
    pub fn passes_on(&self) -> NodeSet {
        let (view, links) = (self.membership.view(), self.membership.links());
        if !links.is_broken(view) {
            return NodeSet::EMPTY;
        }
        let is_lowest = |a: NodeId, b: NodeId| {
            let mut between = view.iter().filter(|n| ![a, b].contains(n));
            between.find(|n| links.talk(*n, a) && links.talk(*n, b)) == Some(self.this)
        };
        let is_missed = |a: &NodeId| view.iter().any(|b| b != *a && !links.talk(*a, b) && is_lowest(*a, b));
        view.iter().filter(is_missed).collect()
    }

    /// The same with what they say. A node that is joining or has stepped out says nothing to agree with.
    pub(super) fn relayed(&self) -> Vec<Relayed> {
        let words = self.passes_on().iter().filter_map(|node| {
            let peer = self.membership.peer(node)?;
            let modules = self.reports.get(&node).filter(|_| !self.relays.has(node))?;
            let (incarnation, seq) = peer.newest();
            (!peer.joining() && !peer.fenced()).then(|| Relayed {
                node,
                incarnation,
                seq,
                modules: modules.clone(),
            })
        });
        words.collect()
    }

    /// Takes what `by` passes on, unless something newer is known.
    pub(super) fn take_relayed(&mut self, now: Duration, by: NodeId, word: Relayed) {
        let Relayed {
            node,
            incarnation,
            seq,
            modules,
        } = word;
        let is_heard = self.membership.heard(now).contains(node);
        let Some(peer) = self.membership.peer(node).filter(|_| !is_heard) else {
            return;
        };
        let taken = self.relays.taken.get(&node);
        let taken = taken.map(|taken| (taken.incarnation, taken.seq));
        if (incarnation, seq) <= peer.newest().max(taken.unwrap_or_default()) {
            return;
        }
        let taken = Taken {
            incarnation,
            seq,
            at: now,
            by,
        };
        self.relays.taken.insert(node, taken);
        self.learn_reports(node, modules);
    }

    /// How much later than usual all is known that others say: while two members do not talk, what is passed on may be from the detection time before.
    pub(super) fn late_words(&self) -> Duration {
        if self.membership.links().is_broken(self.membership.view()) {
            self.membership.detection_time()
        } else {
            Duration::ZERO
        }
    }

    /// What `node` says of its modules now.
    pub(super) fn learn_reports(&mut self, node: NodeId, modules: Vec<ModuleReport>) {
        let macs = modules.iter().filter(|m| m.active());
        let macs = macs.map(|m| (m.name.clone(), m.macs.clone())).collect();
        self.macs.insert(node, macs);
        self.reports.insert(node, modules);
    }

    /// Forgets what is of no member any more, and what nobody has passed on anew for the detection time.
    pub(super) fn forget_relayed(&mut self, now: Duration) {
        let view = self.membership.view();
        let detection_time = self.membership.detection_time();
        let reports = &mut self.reports;
        self.relays.taken.retain(|node, taken| {
            let counts = view.contains(*node) && now < taken.at + detection_time;
            if !counts {
                reports.remove(node);
            }
            counts
        });
    }
}
