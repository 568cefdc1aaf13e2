//! What a node learns of its own ears by other ways than heartbeats: a command by which others say that they hear it, and that nothing at all comes in. The daemon
//! has files of its own for both.

use std::time::Duration;

use super::node::Input;
use super::promises::Breach;
use super::sim::{Ev, Sim, us};

/// Time between two commands to the same deaf node.
const TELL_INTERVAL: Duration = Duration::from_secs(1);
/// Pulses without a heartbeat after which frames are counted.
const SILENT_PULSES: u32 = 2;

/// What comes in at nodes that hear nobody because all ways to them are cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ears {
    /// Frames of clients, and no command.
    Frames,
    /// Those, and commands: only heartbeats are dropped.
    Commands,
    /// Nothing.
    Nothing,
}

impl Sim {
    /// Has the nodes told that do not hear node `i`, if that is its to do.
    pub(super) fn tell_the_deaf(&mut self, i: usize) {
        if self.ears != Ears::Commands {
            return;
        }
        let n = &self.nodes[i];
        let Some(farm) = &n.farm else { return };
        let deaf = farm.deaf(n.clock.local(self.now));
        for to in 0..self.nodes.len() {
            let told = self.nodes[i].told[to];
            if !deaf.iter().any(|node| node.index() == to) {
                self.nodes[i].told[to] = None;
            } else if told.is_none_or(|at| self.now >= at + TELL_INTERVAL) {
                self.nodes[i].told[to] = Some(self.now);
                let at = self.now + us(self.rng.range(200..=3000));
                self.push(at, Ev::Told { node: to });
            }
        }
    }

    pub(super) fn told_deaf(&mut self, node: usize) -> Result<(), Breach> {
        self.input(node, Input::Told)
    }

    /// When node `i` looks next whether anything comes in, by its own clock; `None` if something does.
    pub(super) fn looks_at(&self, i: usize) -> Option<Duration> {
        let n = &self.nodes[i];
        let others = || (0..self.nodes.len()).filter(|from| *from != i);
        if self.ears != Ears::Nothing || others().any(|from| !self.net.is_cut(from, i)) {
            return None;
        }
        let since = n.farm.as_ref()?.membership().silent_since()?;
        Some((since + self.cluster.heartbeat_interval * SILENT_PULSES).max(n.look_at))
    }

    /// Tells node `i` that nothing comes in, if it is time to look and so it is.
    pub(super) fn look_for_frames(&mut self, i: usize) {
        let now = self.nodes[i].clock.local(self.now);
        if self.looks_at(i).is_none_or(|at| now < at) {
            return;
        }
        let n = &mut self.nodes[i];
        n.look_at = now + self.cluster.heartbeat_interval;
        if let Some(farm) = &mut n.farm {
            farm.handle_nothing_in(now);
        }
    }
}
