//! Nodes at which heartbeats do not come in, though theirs go out, and how they learn of it.
//!
//! A *deaf* node has a filter that drops heartbeats only: others tell it by a command, at once and every second. Nothing at all comes in at a
//! *dead* ear: no command either, and its daemon sees that. As `farmd/daemon/src/node/deaf.rs` and `inlet.rs` do it. Called by
//! [`crate::world`] and [`crate::node`].

use std::time::Duration;

use farm_core::id::{NodeId, NodeSet};

use crate::broken::Broken;
use crate::node::{Fixed, Node};
use crate::world::{LATENCY, Work, World};

/// Time between two commands to the same deaf node.
pub const TELL_INTERVAL: Duration = Duration::from_secs(1);
/// How long it believes one.
pub const BELIEVED: Duration = Duration::from_secs(3);
/// A connection and the greetings of both sides take two round trips before the command goes out.
const TELL_TIME: Duration = LATENCY.saturating_mul(5);
/// Pulses without a heartbeat of anybody after which a node looks whether anything comes in.
const SILENT_PULSES: u32 = 2;

impl World {
    /// At whom no heartbeat of `from` comes in.
    pub fn unreached_by(&self, from: NodeId) -> NodeSet {
        NodeSet::from_bits(self.cut[from.index()].bits() | self.deaf.bits() | self.dead.bits())
    }

    /// No heartbeat of `from` comes in at `to`.
    pub fn is_cut(&self, from: NodeId, to: NodeId) -> bool {
        self.unreached_by(from).contains(to)
    }

    /// Somewhere heartbeats of some node do not come in.
    pub fn has_broken_way(&self) -> bool {
        !self.deaf.is_empty() || !self.dead.is_empty() || self.cut.iter().any(|to| !to.is_empty())
    }

    /// Neither heartbeats nor anything else comes in at `id` from here on.
    pub fn close_ear(&mut self, id: NodeId) {
        self.dead.insert(id);
        self.node_mut(id).dead = true;
    }

    /// Heartbeats come in everywhere.
    pub fn open_ears(&mut self) {
        for id in self.dead.iter() {
            self.node_mut(id).dead = false;
        }
        self.deaf = NodeSet::EMPTY;
        self.dead = NodeSet::EMPTY;
        self.told.fill(None);
    }

    /// Has the deaf told, if that is for `from` to do.
    pub fn tell_the_deaf(&mut self, from: NodeId) {
        let now = self.now;
        let node = self.node(from);
        if self.deaf.is_empty() || node.paused {
            return;
        }
        let named = node.farm.as_ref().map_or(NodeSet::EMPTY, |farm| farm.deaf(now));
        let row = from.index() * self.nodes.len();
        for to in self.deaf.iter() {
            let told = &mut self.told[row + to.index()];
            if !named.contains(to) {
                *told = None;
            } else if told.is_none_or(|at| now >= at + TELL_INTERVAL) {
                *told = Some(now);
                if self.connects(from, to) {
                    self.push(now + TELL_TIME, Work::Told(to));
                }
            }
        }
    }

    /// What is no heartbeat gets from one to the other and back.
    fn connects(&self, a: NodeId, b: NodeId) -> bool {
        let closed = |from: NodeId, to: NodeId| self.cut[from.index()].contains(to) || self.dead.contains(to);
        let lan = self.lan_down.is_none() || self.node(a).seen.len() > 1;
        lan && !closed(a, b) && !closed(b, a)
    }
}

impl Node {
    /// Looks whether anything comes in, if it is time to, and has the core told if nothing does.
    pub fn look_for_frames(&mut self, now: Duration, fixed: &Fixed) {
        let looks = self.dead && fixed.breaks(self.id) != Some(Broken::NeverLooks);
        let farm = self.farm.as_mut().filter(|_| looks);
        let silent = farm.and_then(|farm| Some((farm.membership().silent_since()?, farm)));
        let Some((since, farm)) = silent else {
            self.look_at = None;
            return;
        };
        let silent_at = since + fixed.pulse() * SILENT_PULSES;
        let due = self.look_at.map_or(silent_at, |at| at.max(silent_at));
        if now < due {
            self.look_at = Some(due);
            return;
        }
        self.look_at = Some(now + fixed.pulse());
        farm.handle_nothing_in(now);
    }
}
