//! Peers that have left to be back at once, because farmd is restarted in place there: the connections of such a host go on.
//!
//! Owns what each of them has said last of the connections it has. Until it has counted them anew nobody may reset them, so that is kept
//! as if it were still said. Called by [`super::Farm`] only.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::id::{ModuleName, NodeId};
use crate::wire::heartbeat::{BucketSet, ModuleReport};

/// Who is not back by then has failed. A restart takes a fraction of a second, and clients give up later.
pub const LIMIT: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
struct Entry {
    until: Duration,
    /// Of each module that had connections, per group.
    held: BTreeMap<ModuleName, Vec<BucketSet>>,
}

/// See the module doc.
#[derive(Clone, Debug, Default)]
pub(super) struct Away {
    peers: BTreeMap<NodeId, Entry>,
}

impl Away {
    /// `node` leaves to be back at once; these are its last reports.
    pub(super) fn insert(&mut self, now: Duration, node: NodeId, reports: &[ModuleReport]) {
        let held = reports.iter().filter(|r| r.active()).map(|r| {
            let groups = r.groups.iter().map(|g| g.held.clone());
            (r.name.clone(), groups.collect())
        });
        let until = now + LIMIT;
        let held = held.collect();
        self.peers.insert(node, Entry { until, held });
    }

    /// Forgets of each node the modules it has said anew what it has of; returns those that are not back in time.
    pub(super) fn update(&mut self, now: Duration, reports: &BTreeMap<NodeId, Vec<ModuleReport>>) -> Vec<NodeId> {
        let mut late = Vec::new();
        self.peers.retain(|node, entry| {
            let told = reports.get(node).map_or(&[][..], Vec::as_slice);
            entry.held.retain(|name, _| {
                let told = told.iter().find(|r| r.name == *name && r.active());
                !told.is_some_and(|r| r.groups.iter().all(|g| !g.behind))
            });
            let is_late = now >= entry.until;
            if is_late && !entry.held.is_empty() {
                late.push(*node);
            }
            !is_late && !entry.held.is_empty()
        });
        late
    }

    /// When [`Self::update`] may have something to say without a heartbeat.
    pub(super) fn next_timeout(&self) -> Option<Duration> {
        self.peers.values().map(|entry| entry.until).min()
    }

    /// Who is away.
    pub(super) fn nodes(&self) -> impl Iterator<Item = NodeId> {
        self.peers.keys().copied()
    }

    /// Buckets of a group in which the absent have connections.
    pub(super) fn held(&self, module: &ModuleName, group: usize) -> BTreeMap<NodeId, &BucketSet> {
        let held = self.peers.iter();
        let held = held.filter_map(|(node, entry)| Some((*node, entry.held.get(module)?.get(group)?)));
        held.filter(|(_, held)| !held.is_empty()).collect()
    }
}
