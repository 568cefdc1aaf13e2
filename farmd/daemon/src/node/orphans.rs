//! Asking the others whether they have a connection that this node does not know, after a node has died: its clients are to be reset also where live nodes have
//! connections in the same bucket. See [`farm_core::balance::orphans`].
//!
//! Owns when that begins, and whom the data plane's questions go to. An answer counts only if all have given it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use farm_core::balance::flow::FlowKey;
use farm_core::balance::plan::Plan;
use farm_core::id::{NodeId, NodeSet};
use tracing::{debug, info, warn};

use super::Node;
use crate::effect::Effect;

/// How long after a node has died its clients are told: Linux gives a connection up that nobody answers after 924 s (tcp_retries2, tcp(7)).
const WINDOW: Duration = Duration::from_secs(924);

/// See the module doc.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    /// Nodes that are known to have died.
    dead: NodeSet,
    /// The run before this one ended without order: its connections may be nobody's.
    pub(super) are_own: bool,
    /// The last question has failed.
    is_failing: bool,
}

impl Node {
    /// Has the data plane ask from the death of a node on, and forgets ended connections in its buckets; `before` is the plan of before this turn.
    pub(super) fn watch_orphans(&mut self, now: Duration, before: Arc<Plan>) {
        let membership = self.farm.membership();
        let view = membership.view();
        // A member that only others hear is alive.
        let dead: NodeSet = membership
            .gone(now)
            .into_keys()
            .filter(|n| !view.contains(*n))
            .collect();
        let died: NodeSet = dead.iter().filter(|node| !self.orphans.dead.contains(*node)).collect();
        self.orphans.dead = dead;
        if !died.is_empty() && !before.vips.is_empty() {
            self.queue(Effect::ForgetEnded {
                plan: before,
                dead: died,
            });
        }
        if !died.is_empty() || std::mem::take(&mut self.orphans.are_own) {
            info!(
                seconds = WINDOW.as_secs(),
                "a node has died: where peers have connections in the same bucket, they are asked before its clients are reset"
            );
            self.orphans.is_failing = false;
            self.plane.watch_orphans(self.start + now + WINDOW);
        }
    }

    /// All who may have connections: whoever is heard here or by one that is heard, as after a cut not all hear each other at the same moment, and whoever has left to be
    /// back at once.
    fn all_alive(&self) -> NodeSet {
        let (plan, _) = self.published.newest();
        let sets = plan.groups.iter().flat_map(|group| group.holders.values());
        let holders = sets.fold(0, |all, set| all | set.bits());
        let (now, membership) = (self.now(), self.farm.membership());
        let mut nodes = NodeSet::from_bits(membership.heard(now).bits() | holders);
        let others = (0..self.cluster.nodes.len()).filter_map(NodeId::new);
        for node in others.filter(|node| !nodes.contains(*node)).collect::<Vec<_>>() {
            if !membership.testimony(now, node).talk_with_it.is_empty() {
                nodes.insert(node);
            }
        }
        nodes.remove(self.this);
        nodes
    }

    /// The data plane does not know these connections.
    pub(super) fn handle_unknown(&mut self, flows: Vec<FlowKey>) {
        let nodes = self.all_alive();
        if nodes.is_empty() {
            self.plane.learn_flows(flows, Some(BTreeSet::new()));
        } else {
            self.queue(Effect::AskPeers { flows, nodes });
        }
    }

    /// What they have of these connections.
    pub(super) fn handle_peers_told(
        &mut self,
        asked: Vec<FlowKey>,
        nodes: NodeSet,
        theirs: Result<BTreeSet<FlowKey>, String>,
    ) {
        let unasked = self.all_alive().iter().find(|node| !nodes.contains(*node));
        let theirs = match unasked {
            Some(node) => Err(format!("node {} has come back meanwhile", self.cluster.name(node))),
            None => theirs,
        };
        let is_failing = theirs.is_err();
        match &theirs {
            Err(why) if !self.orphans.is_failing => {
                warn!(
                    why,
                    "not all nodes can be asked for their connections: where peers have some in the same bucket, clients of a dead node are not reset"
                );
            }
            Ok(_) if self.orphans.is_failing => info!("all nodes can be asked for their connections again"),
            Err(why) => debug!(why, "not all nodes can be asked"),
            Ok(theirs) => debug!(asked = asked.len(), theirs = theirs.len(), "asked for connections"),
        }
        self.orphans.is_failing = is_failing;
        self.plane.learn_flows(asked, theirs.ok());
    }
}
