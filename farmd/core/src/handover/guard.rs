//! Who has connections where, and what is on its way to its new owner.

use std::collections::BTreeMap;

use crate::id::{Epoch, NodeId};
use crate::wire::heartbeat::BucketSet;

use super::{Handover, Outcome, Surroundings};

impl Handover {
    /// Ends the keeping and sending on of what comes for buckets that nobody takes for this node's any more, or that are open here again.
    pub(super) fn watch_leaving(&mut self, around: &Surroundings<'_>, outcome: &mut Outcome) {
        if self.leaving.is_empty() {
            return;
        }
        let owns = |node: NodeId| self.map.owners().contains(node);
        // Any of them may be an entry node that gives to this node what is no longer its.
        let behind = self.behind.is_some()
            || around.peers.iter().any(|(node, p)| {
                let counts = p.eligible && !p.fenced && (p.report.committed > Epoch::default() || owns(*node));
                counts && (p.report.committed < self.known || p.report.behind)
            });
        let on_its_way = |i: &usize| match self.map.owner_at(*i) {
            None => false,
            Some(owner) if owner == self.this => !self.open.contains(*i),
            Some(_) => behind,
        };
        let left: BucketSet = self.leaving.iter().filter(on_its_way).collect();
        if left != self.leaving {
            self.leaving = left;
            outcome.plan_changed = true;
        }
    }

    /// Notes which peers have connections where, and ends the guard of buckets in which nobody has any.
    pub(super) fn watch_holders(&mut self, around: &Surroundings<'_>, outcome: &mut Outcome) {
        let held = || {
            around
                .peers
                .iter()
                .filter(|(_, p)| !p.report.held.is_empty())
                .map(|(n, p)| (*n, &p.report.held))
                .chain(around.away.iter().map(|(n, held)| (*n, *held)))
        };
        if !held().eq(self.held_by.iter().map(|(node, set)| (*node, set))) {
            self.held_by = held().map(|(node, set)| (node, set.clone())).collect();
            self.holders = BTreeMap::new();
            for (node, index) in self
                .held_by
                .iter()
                .flat_map(|(node, set)| set.iter().map(|index| (*node, index)))
            {
                self.holders.entry(index).or_default().insert(node);
            }
            self.held_elsewhere = self.holders.keys().copied().collect();
            outcome.plan_changed = true;
        }
        // One that has served by another map, on the other side of a cut, may have connections in whatever is open here.
        let strange = around.peers.values().filter(|p| p.eligible && !p.fenced).any(|p| {
            let (committed, promised) = (p.report.committed, p.report.promised);
            committed > Epoch::default()
                && ![self.committed, self.promised].contains(&committed)
                && promised != self.committed
        });
        if strange && self.guarded != self.open {
            self.guarded = self.open.clone();
            outcome.plan_changed = true;
        }
        // A peer's word on what it holds counts only if it was given after it released what was opened here.
        let all_released = !strange
            && !around.unheard
            && around
                .peers
                .values()
                .filter(|p| p.eligible && !p.fenced)
                .all(|p| p.report.promised >= self.guarded_at);
        if all_released && !self.guarded.is_empty() {
            let left = self.guarded.and(&self.held_elsewhere);
            if left != self.guarded {
                self.guarded = left;
                outcome.plan_changed = true;
            }
        }
    }
}
