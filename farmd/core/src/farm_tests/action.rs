//! What is done to a simulated farm from outside: faults, and what an operator does.

use std::time::Duration;

use super::node::Input;
use super::promises::Breach;
use super::sim::{Ev, Sim, ms};
use crate::api::{ModuleState, Quality};

/// One fault or command; a node is named by its position.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Action {
    Crash(usize),
    Restart(usize),
    /// The node is not run; with `true` its data plane works on.
    Pause(usize, Duration, bool),
    /// Nothing gets from the first to the second.
    Cut(usize, usize),
    Mend(usize, usize),
    MendAll,
    LanDown(usize),
    LanUp(usize),
    /// Per mille of datagrams.
    Loss(u64),
    /// Everything that the node sends (`true`) or should receive is lost for a while.
    Burst(usize, bool, Duration),
    /// The node's data plane takes so much longer from here on.
    Slow(usize, Duration),
    /// `start` and, some time later, ready.
    Start(usize),
    Ready(usize, bool),
    /// Graceful: hands over, then STOP.
    Stop(usize),
    /// STOP at once.
    ForceStop(usize),
    Weight(usize, u16),
    Digest(usize, u64),
    Leave(usize),
}

impl Sim {
    pub(super) fn handle_action(&mut self, action: Action) -> Result<(), Breach> {
        self.note(|| format!("{action:?}"));
        self.actions += 1;
        let of_running = match action {
            Action::Start(i) | Action::Ready(i, _) | Action::Stop(i) | Action::ForceStop(i) => Some(i),
            _ => None,
        };
        if of_running.is_some_and(|i| self.nodes[i].farm.is_none()) {
            return Ok(());
        }
        match action {
            Action::Crash(i) => self.crash(i),
            Action::Restart(i) => return self.restart(i),
            Action::Pause(i, time, plane_works_on) => {
                let n = &mut self.nodes[i];
                n.paused_until = n.paused_until.max(self.now + time);
                n.frozen_plane = !plane_works_on;
                n.wake_at = Some(n.paused_until);
                let until = n.paused_until;
                self.push(until, Ev::Wake { node: i });
            }
            Action::Cut(a, b) => self.net.cut(a, b),
            Action::Mend(a, b) => self.net.mend(a, b),
            Action::MendAll => self.net.mend_all(),
            Action::LanDown(lan) => self.net.set_lan(lan, false),
            Action::LanUp(lan) => self.net.set_lan(lan, true),
            Action::Loss(permille) => self.net.loss = permille,
            Action::Burst(i, out, time) => self.net.burst(i, out, self.now + time),
            Action::Slow(i, time) => self.nodes[i].slower = time,
            Action::Start(i) => {
                let delay = ms(self.rng.range(0..=30));
                let local = &mut self.nodes[i].local;
                if local.state == ModuleState::Stop {
                    local.state = ModuleState::Wait;
                    local.quality = Quality::Transient;
                }
                self.nodes[i].stopping = false;
                self.at(self.now + delay, Action::Ready(i, true));
                return self.input(i, Input::Module);
            }
            Action::Ready(i, ready) => {
                let n = &mut self.nodes[i];
                if n.local.state == ModuleState::Stop || n.stopping {
                    return Ok(());
                }
                n.local.state = ModuleState::Up;
                n.local.quality = if ready { Quality::Ready } else { Quality::NotReady };
                n.local.ready = ready;
                return self.input(i, Input::Module);
            }
            Action::Stop(i) => {
                self.nodes[i].stopping = self.nodes[i].local.state != ModuleState::Stop;
                self.nodes[i].local.ready = false;
                return self.input(i, Input::Module);
            }
            Action::ForceStop(i) => return self.stop_now(i),
            Action::Weight(i, weight) => {
                self.nodes[i].local.weights = vec![weight];
                return self.input(i, Input::Module);
            }
            Action::Digest(i, digest) => {
                self.nodes[i].local.digest = digest;
                return self.input(i, Input::Module);
            }
            Action::Leave(i) => {
                let n = &mut self.nodes[i];
                let now = n.clock.local(self.now);
                if let Some(farm) = &mut n.farm {
                    farm.leave(now, false);
                    self.finish_turn(i)?;
                }
                self.crash(i);
            }
        }
        Ok(())
    }
}
