//! Entries about maps: those that were agreed without this node, what each moved, and which entries about the view they follow from.
//!
//! A part of the chronicle, and like it changes nothing of the farm.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use farm_core::api::history::{Happening, MapCause, Move};
use farm_core::handover::Moves;
use farm_core::id::{Epoch, NodeId, NodeSet};
use farm_core::membership::Cause;

use super::{GroupKey, Proposal, millis};
use crate::node::Node;

impl Node {
    /// This node has taken over a map that others have agreed on. For whom it was made is not told with it: that is taken from what is known here, and is
    /// what the next map is compared with, unless everything is closed here.
    pub(super) fn map_learned(
        &mut self,
        now: Duration,
        key: &GroupKey,
        epoch: Epoch,
        counts: &BTreeMap<NodeId, u32>,
        moved: &Moves,
    ) -> Happening {
        let released = self.chronicle.released.remove(key).filter(|(of, _)| *of == epoch);
        // The lowest byte of a map's number is its proposer.
        let proposer = NodeId::new((epoch.0 & 0xff) as usize);
        let before = self.chronicle.agreed.get(key);
        let after_ms = before.map(|before| millis(now.saturating_sub(before.since)));
        let was_away = before.is_none_or(|before| before.closed);
        let view: NodeSet = self
            .farm
            .membership()
            .view()
            .iter()
            .chain(counts.keys().copied())
            .collect();
        let mut weights = self.weights(key, view);
        // A member that is not heard has told no other weight.
        for (node, weight) in before.into_iter().flat_map(|before| &before.weights) {
            if counts.contains_key(node) {
                weights.entry(*node).or_insert((*weight, String::new()));
            }
        }
        let proposal = Proposal {
            epoch,
            by: proposer.unwrap_or(self.this),
            view,
            at: now,
            weights,
        };
        let causes = match before {
            None => vec![MapCause::First],
            Some(before) if before.closed => vec![MapCause::Returned],
            Some(before) => {
                let mut causes = self.causes(now, Some(before), &proposal, counts);
                let owners: NodeSet = counts.keys().copied().collect();
                let owners = self.name_list(owners);
                let this = self.cluster.name(self.this);
                causes.retain(|cause| match cause {
                    // That they agreed without this node is what the entry says anyway.
                    MapCause::NodeOut { node, .. } => node != this,
                    MapCause::NodeIn { node } => owners.contains(node),
                    _ => true,
                });
                if causes.is_empty() {
                    causes.push(MapCause::Evened);
                }
                causes
            }
        };
        let what = Happening::MapLearned {
            group: self.group_name(&key.0, key.1),
            map: epoch.counter(),
            proposer: proposer.map(|node| self.cluster.name(node).to_owned()),
            follows: self.views_behind(&causes),
            causes,
            moved: if was_away { Vec::new() } else { self.move_list(moved) },
            counts: self.by_name(counts),
            gave_up: released.map_or(0, |(_, lost)| lost),
            after_ms,
            unserved_ms: self.unserved(now, moved).filter(|_| !was_away),
        };
        if let Some(agreed) = self.chronicle.agreed.get_mut(key).filter(|agreed| !agreed.closed) {
            agreed.view = view;
            agreed.weights = proposal.weights.iter().map(|(n, (w, _))| (*n, *w)).collect();
            agreed.since = now;
        }
        what
    }

    /// For how long at most buckets were unserved: silent givers handed nothing over, so theirs waited since they were last heard.
    pub(super) fn unserved(&self, now: Duration, moved: &Moves) -> Option<u64> {
        let givers: NodeSet = moved.keys().filter_map(|(from, _)| *from).collect();
        let silent = givers.iter().filter_map(|n| {
            let word = self.farm.membership().testimony(now, n);
            word.silent.filter(|_| n != self.this && word.cause == Cause::Silent)
        });
        silent.max().map(millis)
    }

    pub(super) fn move_list(&self, moved: &Moves) -> Vec<Move> {
        let name = |n: NodeId| self.cluster.name(n).to_owned();
        let moves = moved.iter().map(|((from, to), buckets)| Move {
            from: from.map(name),
            to: to.map(name),
            buckets: *buckets,
        });
        moves.collect()
    }

    /// Entry `seq` tells that the view has gone from `old` to `new`.
    pub(super) fn note_view(&mut self, seq: u64, old: NodeSet, new: NodeSet) {
        let turned = NodeSet::from_bits(old.bits() ^ new.bits());
        let turned = self.name_list(turned).into_iter().map(|name| (name, seq));
        self.chronicle.turned.extend(turned);
    }

    /// Numbers of the entries that tell how the nodes that `causes` names came into the view or went out of it.
    pub(super) fn views_behind(&self, causes: &[MapCause]) -> Vec<u64> {
        let entries = causes.iter().filter_map(|cause| match cause {
            MapCause::NodeOut { node, .. } | MapCause::NodeIn { node } => self.chronicle.turned.get(node),
            _ => None,
        });
        let entries: BTreeSet<u64> = entries.copied().collect();
        entries.into_iter().collect()
    }
}
