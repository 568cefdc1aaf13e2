//! When resets of the stack wait, and when they are withdrawn: clients of a node that was cut off are heard before it is. See [`farm_core::balance::resets`].

use std::time::Duration;

use farm_core::id::{NodeId, NodeSet};
use tracing::info;

use super::Node;
use crate::effect::Effect;

/// A reset waits for so many pulses: of the first two heartbeats of a node that comes back one may be lost, and the owner loop has to be told.
const PULSES: u32 = 3;

/// See the module doc.
#[derive(Debug, Default)]
pub(super) struct Resets {
    /// Who was heard at the last turn, and this node.
    heard: NodeSet,
    /// They wait.
    wait: bool,
    /// And the log says so.
    told: bool,
    /// At least until then.
    until: Duration,
}

impl Node {
    /// Has resets wait while a node is not heard, and withdraws them when one has come back.
    pub(super) fn watch_resets(&mut self, now: Duration) {
        let membership = self.farm.membership();
        let mut heard = membership.heard(now);
        heard.insert(self.this);
        // Nothing may be known here of what a member has that only others hear.
        let is_unheard = membership.view().iter().any(|node| !heard.contains(node)) && self.farm.lacks_word();
        let is_back = heard.iter().any(|node| !self.resets.heard.contains(node));
        let missing: NodeSet = {
            let all = (0..self.cluster.nodes.len()).filter_map(NodeId::new);
            all.filter(|node| !heard.contains(*node)).collect()
        };
        self.resets.heard = heard;
        let wait = self.cluster.heartbeat_interval * PULSES;
        if is_unheard || is_back {
            self.plane.withdraw_resets(wait);
            // What comes in before the plan for it is at work is answered by that of before.
            self.resets.until = now + wait * 2;
        }
        let waits = !missing.is_empty() || now < self.resets.until;
        // Who has just started, or was not run, has not heard the others yet, which is no news.
        if !self.resets.told && !missing.is_empty() && !membership.joining() {
            self.resets.told = true;
            info!(
                ms = wait.as_millis(),
                missing = self.names(missing),
                "resets wait before they leave: who is missing may only be out of touch"
            );
        }
        if waits == self.resets.wait {
            return;
        }
        self.resets.wait = waits;
        self.plane.set_reset_wait(waits.then_some(wait));
        self.queue(Effect::DivertResets(waits));
        if !waits && std::mem::take(&mut self.resets.told) {
            info!("all nodes are heard: resets leave at once");
        }
    }
}
