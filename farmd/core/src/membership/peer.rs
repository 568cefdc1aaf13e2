//! The failure detector for one peer, and the guard against recordings.

use std::time::Duration;

use crate::id::{Incarnation, NodeId, NodeSet};
use crate::membership::Refusal;
use crate::wire::heartbeat::Heartbeat;

/// Judgement on a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerState {
    /// Heard lately, and it hears us.
    Alive,
    /// Missing for more than half the detection time, or it does not hear us.
    Suspect,
    /// Not heard for the detection time, left, or not of this cluster.
    Down,
}

/// What [`Peer::judge`] found changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// It is heard and hears us.
    Alive {
        /// With a new incarnation.
        restarted: bool,
    },
    /// It is no longer alive.
    Down {
        /// Why.
        why: String,
    },
}

/// One configured peer.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Last sequence number per lan; `None` where the peer has no address.
    lans: Vec<Option<u64>>,
    incarnation: Incarnation,
    heard_at: Option<Duration>,
    since: Duration,
    alive: bool,
    was_alive_as: Option<Incarnation>,
    hears: NodeSet,
    hears_us: bool,
    excludes: NodeSet,
    joining: bool,
    fenced: bool,
    leaving: bool,
    same_cluster: bool,
}

impl Peer {
    /// A peer never heard; `lans` says on which lans it is.
    pub fn new(lans: Vec<bool>, now: Duration) -> Self {
        Self {
            lans: lans.into_iter().map(|on| on.then_some(0)).collect(),
            incarnation: Incarnation(0),
            heard_at: None,
            since: now,
            alive: false,
            was_alive_as: None,
            hears: NodeSet::EMPTY,
            hears_us: false,
            excludes: NodeSet::EMPTY,
            joining: false,
            fenced: false,
            leaving: false,
            same_cluster: true,
        }
    }

    /// Takes a heartbeat unless it is not newer than what was seen.
    pub fn handle_heartbeat(
        &mut self,
        now: Duration,
        lan: usize,
        heartbeat: &Heartbeat,
        hears_us: bool,
        same_cluster: bool,
    ) -> Result<(), Refusal> {
        let last = self.lans.get(lan).copied().flatten().ok_or(Refusal::UnknownSender)?;
        if heartbeat.incarnation < self.incarnation
            || (heartbeat.incarnation == self.incarnation && heartbeat.seq <= last)
        {
            return Err(Refusal::Replay);
        }
        if heartbeat.incarnation > self.incarnation {
            self.incarnation = heartbeat.incarnation;
            self.lans.iter_mut().flatten().for_each(|seq| *seq = 0);
            self.alive = false;
        }
        let newest = self.lans.iter().flatten().all(|seq| *seq < heartbeat.seq);
        self.lans[lan] = Some(heartbeat.seq);
        self.heard_at = Some(now);
        // The same heartbeat comes in on every lan; an older one on a slower lan must not undo a newer one.
        if newest {
            self.hears = heartbeat.hears_set();
            self.hears_us = hears_us;
            self.excludes = heartbeat.excludes;
            self.joining = heartbeat.joining;
            self.fenced = heartbeat.fenced;
            self.leaving = heartbeat.leaving;
            self.same_cluster = same_cluster;
        }
        Ok(())
    }

    /// Forgets when the peer was heard; its sequence numbers still count.
    pub fn forget(&mut self) {
        self.heard_at = None;
        self.hears_us = false;
    }

    /// True if something of this cluster was heard within the detection time and the peer has not said goodbye.
    pub fn is_heard(&self, now: Duration, detection_time: Duration) -> bool {
        self.same_cluster && !self.leaving && self.heard_at.is_some_and(|at| now < at + detection_time)
    }

    /// When the peer goes down if nothing more is heard.
    pub fn silent_at(&self, detection_time: Duration) -> Option<Duration> {
        self.heard_at.filter(|_| self.alive).map(|at| at + detection_time)
    }

    /// Judgement now.
    pub fn state(&self, now: Duration, detection_time: Duration) -> PeerState {
        match self.heard_at {
            Some(at) if self.is_heard(now, detection_time) => {
                if self.hears_us && now < at + detection_time / 2 {
                    PeerState::Alive
                } else {
                    PeerState::Suspect
                }
            }
            _ => PeerState::Down,
        }
    }

    /// Updates the judgement and says what changed.
    pub fn judge(&mut self, now: Duration, detection_time: Duration) -> Option<Change> {
        let alive = self.is_heard(now, detection_time) && self.hears_us;
        if alive == self.alive {
            return None;
        }
        self.alive = alive;
        self.since = now;
        if alive {
            let restarted = self
                .was_alive_as
                .replace(self.incarnation)
                .is_some_and(|i| i != self.incarnation);
            Some(Change::Alive { restarted })
        } else {
            Some(Change::Down {
                why: self.why(now, detection_time),
            })
        }
    }

    /// True if authentic heartbeats come in that are of another `cluster.xml`.
    pub fn is_of_other_cluster(&self, now: Duration, detection_time: Duration) -> bool {
        !self.same_cluster && !self.leaving && self.heard_at.is_some_and(|at| now < at + detection_time)
    }

    /// Why the peer is not alive; empty if it is.
    pub fn why(&self, now: Duration, detection_time: Duration) -> String {
        match self.heard_at {
            None => "never heard".to_owned(),
            Some(_) if !self.same_cluster => "its cluster.xml differs".to_owned(),
            Some(_) if self.leaving => "it has left".to_owned(),
            Some(at) if now >= at + detection_time => format!("no heartbeat for {} ms", (now - at).as_millis()),
            Some(_) if !self.hears_us => {
                "it does not hear this node; is the heartbeats' UDP port blocked there?".to_owned()
            }
            Some(_) => String::new(),
        }
    }

    /// Since when the judgement stands.
    pub fn since(&self) -> Duration {
        self.since
    }

    /// When it was last heard.
    pub fn heard_at(&self) -> Option<Duration> {
        self.heard_at
    }

    /// Its start number, the newest seen.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Whom it hears.
    pub fn hears(&self) -> NodeSet {
        self.hears
    }

    /// True if it hears this incarnation of this node.
    pub fn hears_us(&self) -> bool {
        self.hears_us
    }

    /// Whom it leaves out of its view although it hears them, or hears of them.
    pub fn excludes(&self) -> NodeSet {
        self.excludes
    }

    /// It has just started.
    pub fn joining(&self) -> bool {
        self.joining
    }

    /// It has stepped out.
    pub fn fenced(&self) -> bool {
        self.fenced
    }

    /// It has said goodbye.
    pub fn leaving(&self) -> bool {
        self.leaving
    }

    /// It has the same `cluster.xml`.
    pub fn same_cluster(&self) -> bool {
        self.same_cluster
    }
}

/// Names in `nodes` that are in `set`, for log lines.
pub fn names(nodes: &[String], set: NodeSet) -> String {
    let names: Vec<&str> = set
        .iter()
        .filter_map(|n: NodeId| nodes.get(n.index()))
        .map(String::as_str)
        .collect();
    names.join(" ")
}
