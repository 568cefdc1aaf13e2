//! Telling nodes that do not hear this one that they are heard, and being told.
//!
//! A node to which no heartbeats come in (a filter that drops UDP, above all) cannot know it: for it all others are gone, and it would serve everybody beside
//! them. The others see it by its heartbeats before it can take over, and one of them says so by a command over TCP; see PROTOCOL.md.

use std::time::Duration;

use farm_core::id::NodeSet;
use tracing::{debug, info, warn};

use super::Node;
use crate::effect::Effect;

/// How often a deaf node is told. It believes it for three times as long.
const TELL_INTERVAL: Duration = Duration::from_secs(1);
/// How many times it is told at first, a pulse apart: it can take over a pulse after the first time, and what TCP loses comes again after a second only.
const TOLD_AT_ONCE: u32 = 5;

/// Nodes that do not hear this one.
#[derive(Debug, Default)]
pub(super) struct Deaf {
    nodes: NodeSet,
    tell_at: Duration,
    /// How often these were told.
    told: u32,
}

impl Node {
    /// Has deaf nodes told, if that is this node's to do.
    pub(super) fn tell_the_deaf(&mut self, now: Duration) {
        let nodes = self.farm.deaf(now);
        if nodes != self.deaf.nodes {
            for node in nodes.iter().filter(|node| !self.deaf.nodes.contains(*node)) {
                warn!(
                    node = self.cluster.name(node),
                    "its heartbeats come in, and it does not hear this node: does something drop UDP port {} on its way in? It is told by TCP, and steps out if it hears nobody",
                    self.cluster.port
                );
            }
            for node in self.deaf.nodes.iter().filter(|node| !nodes.contains(*node)) {
                info!(
                    node = self.cluster.name(node),
                    "it is not told any more that it does not hear this node"
                );
            }
            self.deaf = Deaf {
                nodes,
                tell_at: now,
                told: 0,
            };
        }
        if nodes.is_empty() || now < self.deaf.tell_at {
            return;
        }
        self.deaf.told = self.deaf.told.saturating_add(1);
        self.deaf.tell_at = now
            + match self.deaf.told < TOLD_AT_ONCE {
                true => self.cluster.heartbeat_interval,
                false => TELL_INTERVAL,
            };
        for node in nodes.iter() {
            self.queue(Effect::TellDeaf(node));
        }
    }

    /// Another node says that this one is heard. It steps out if it hears nobody.
    pub(super) fn handle_told_deaf(&mut self, by: &str) {
        debug!(by, "told that this node is heard");
        let now = self.now();
        self.farm.handle_told_deaf(now);
    }
}
