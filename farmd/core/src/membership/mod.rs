//! Who is alive, as far as this node can tell, and who forms the view.
//!
//! Owns one [`Peer`] per configured node. It is told of every authentic heartbeat and of the passing of time,
//! and answers with the [`Membership::view`], whether this node must step out ([`Membership::fenced`]), and
//! [`Event`]s for the log. It knows nothing of buckets. Called by [`crate::farm::Farm`] only.
//!
//! A peer is **down** when nothing of it was heard on any lan for the detection time. The **view** is a set
//! of nodes that all hear each other, computed by every node from the rows ("whom I hear") in the heartbeats:
//! as long as two candidates do not hear each other, the one that fewest others hear is left out (ties: the
//! higher id). A node that finds itself left out has been told that others cannot hear it: it steps out. A
//! node that has just started is *joining* for the detection time and one pulse: it serves nothing, and its
//! missing ears count against nobody.

pub mod peer;
pub mod view;
pub mod why;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::config::ClusterConfig;
use crate::id::{Incarnation, NodeId, NodeSet};
use crate::wire::heartbeat::Heartbeat;

pub use peer::{Peer, PeerState};
pub use why::{Cause, Testimony};

/// Why a heartbeat was not used; one counter each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Refusal {
    /// It says it is from this node.
    OwnName,
    /// Its sender is not in `cluster.xml`, or not on this lan.
    UnknownSender,
    /// It was sent on another lan than the one it came in by.
    OtherLan,
    /// Already seen, or older than what was seen: late, doubled, or a recording.
    Replay,
}

impl Refusal {
    /// Name of its counter.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OwnName => "own_name",
            Self::UnknownSender => "unknown_sender",
            Self::OtherLan => "other_lan",
            Self::Replay => "replay",
        }
    }
}

/// A change worth a line in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A peer is heard and hears us.
    PeerAlive {
        /// Which.
        peer: NodeId,
        /// It has restarted since it was last alive.
        restarted: bool,
    },
    /// A peer is no longer alive.
    PeerDown {
        /// Which.
        peer: NodeId,
        /// Why.
        why: String,
        /// Who else says so, and since when.
        testimony: Testimony,
    },
    /// The view has other members.
    ViewChanged {
        /// Before.
        old: NodeSet,
        /// After.
        new: NodeSet,
        /// What is known of each node that is no longer in it; of this node alone if it steps out.
        out: Vec<Testimony>,
    },
    /// This node has stepped out, or is back.
    Fenced(Option<String>),
    /// The node has finished joining.
    Joined,
}

/// See the module doc.
#[derive(Clone, Debug)]
pub struct Membership {
    this: NodeId,
    incarnation: Incarnation,
    digest: u64,
    detection_time: Duration,
    join_time: Duration,
    join_until: Duration,
    joining: bool,
    peers: BTreeMap<NodeId, Peer>,
    view: NodeSet,
    excluded: NodeSet,
    fenced: Option<String>,
    events: VecDeque<Event>,
}

impl Membership {
    /// A node that starts at `now`.
    pub fn new(config: &ClusterConfig, this: NodeId, incarnation: Incarnation, now: Duration) -> Self {
        let peers = (0..config.nodes.len())
            .filter_map(NodeId::new)
            .filter(|n| *n != this)
            .map(|n| {
                let lans = config
                    .lans
                    .iter()
                    .map(|lan| lan.nodes.iter().any(|(node, _)| *node == n));
                (n, Peer::new(lans.collect(), now))
            })
            .collect();
        Self {
            this,
            incarnation,
            digest: config.digest,
            detection_time: config.detection_time(),
            join_time: config.detection_time() + config.heartbeat_interval,
            join_until: now + config.detection_time() + config.heartbeat_interval,
            joining: true,
            peers,
            view: [this].into_iter().collect(),
            excluded: NodeSet::EMPTY,
            fenced: None,
            events: VecDeque::new(),
        }
    }

    /// Takes an authentic heartbeat that came in on `lan`.
    pub fn handle_heartbeat(&mut self, now: Duration, lan: usize, heartbeat: &Heartbeat) -> Result<(), Refusal> {
        if heartbeat.sender == self.this {
            return Err(Refusal::OwnName);
        }
        let hears_us = heartbeat.hears_incarnation(self.this) == Some(self.incarnation.0 as u32);
        let same_cluster = heartbeat.cluster_digest == self.digest;
        let peer = self.peers.get_mut(&heartbeat.sender).ok_or(Refusal::UnknownSender)?;
        peer.handle_heartbeat(now, lan, heartbeat, hears_us, same_cluster)?;
        self.update(now);
        Ok(())
    }

    /// Lets time pass: peers go down, joining ends.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.update(now);
    }

    /// This node did not run for so long that others may have gone on without it: it joins anew, and what it
    /// remembers of whom it heard is void.
    pub fn handle_pause(&mut self, now: Duration) {
        self.joining = true;
        self.join_until = now + self.join_time;
        self.peers.values_mut().for_each(Peer::forget);
        self.update(now);
    }

    /// When [`Self::handle_timeout`] has something to do without a heartbeat. May change after every
    /// `handle_*`.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let peers = self.peers.values().filter_map(|p| p.silent_at(self.detection_time));
        peers.chain(self.joining.then_some(self.join_until)).min()
    }

    /// The next event, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The nodes that all hear each other, this one among them unless it is fenced.
    pub fn view(&self) -> NodeSet {
        self.view
    }

    /// Nodes left out of the view because not all of it can hear them.
    pub fn excluded(&self) -> NodeSet {
        self.excluded
    }

    /// Why this node has stepped out, if it has.
    pub fn fenced(&self) -> Option<&str> {
        self.fenced.as_deref()
    }

    /// True until a little more than one detection time after the start, or after a pause.
    pub fn joining(&self) -> bool {
        self.joining
    }

    /// How long a node that starts is joining.
    pub fn join_time(&self) -> Duration {
        self.join_time
    }

    /// A configured peer.
    pub fn peer(&self, node: NodeId) -> Option<&Peer> {
        self.peers.get(&node)
    }

    /// Judgement on a peer now.
    pub fn peer_state(&self, now: Duration, node: NodeId) -> Option<PeerState> {
        self.peers.get(&node).map(|p| p.state(now, self.detection_time))
    }

    /// Whom this node hears, as it goes into heartbeats.
    pub fn hears(&self, now: Duration) -> Vec<(NodeId, u32)> {
        let heard = self.peers.iter().filter(|(_, p)| p.is_heard(now, self.detection_time));
        heard.map(|(n, p)| (*n, p.incarnation().0 as u32)).collect()
    }

    /// Peers of which something was heard within the detection time, whether or not they hear this node.
    pub fn heard(&self, now: Duration) -> NodeSet {
        self.peers
            .iter()
            .filter(|(_, p)| p.is_heard(now, self.detection_time))
            .map(|(n, _)| *n)
            .collect()
    }

    /// What this node and the peers it hears say of `node` now.
    pub fn testimony(&self, now: Duration, node: NodeId) -> Testimony {
        why::testimony(self.this, &self.peers, node, now, self.detection_time)
    }

    fn update(&mut self, now: Duration) {
        if self.joining && now >= self.join_until {
            self.joining = false;
            self.events.push_back(Event::Joined);
        }
        let judged = self
            .peers
            .iter_mut()
            .map(|(n, p)| (*n, p.judge(now, self.detection_time)));
        let changes: Vec<(NodeId, peer::Change)> = judged.filter_map(|(n, change)| Some((n, change?))).collect();
        for (node, change) in changes {
            let event = match change {
                peer::Change::Alive { restarted } => Event::PeerAlive { peer: node, restarted },
                peer::Change::Down { why } => Event::PeerDown {
                    peer: node,
                    why,
                    testimony: self.testimony(now, node),
                },
            };
            self.events.push_back(event);
        }
        let ears = view::Ears {
            this: self.this,
            joining: self.joining,
            heard: self
                .peers
                .iter()
                .filter(|(_, p)| p.is_heard(now, self.detection_time))
                .map(|(n, p)| {
                    (
                        *n,
                        view::Row {
                            hears: p.hears(),
                            joining: p.joining(),
                            hears_this: p.hears_us(),
                            excludes_this: p.excludes().contains(self.this),
                        },
                    )
                })
                .collect(),
        };
        let agreement = match self.other_cluster(now) {
            Some(why) => return self.settle(now, NodeSet::EMPTY, Some(why)),
            None => view::agree(&ears),
        };
        self.excluded = agreement.excluded;
        let (view, fenced) = match agreement.view {
            Some(view) => (view, None),
            None => {
                let unheard = ears.heard.values().filter(|row| !row.hears_this).count();
                let why = if unheard > 0 {
                    format!("{unheard} of the nodes it hears do not hear it")
                } else {
                    "another node that hears it says that others do not".to_owned()
                };
                (NodeSet::EMPTY, Some(why))
            }
        };
        self.settle(now, view, fenced);
    }

    /// Why this node must step out because of nodes with another `cluster.xml`, if so: of two files that of the more nodes counts, then that of the
    /// lowest node. Who is still joining does not count.
    fn other_cluster(&self, now: Duration) -> Option<String> {
        let others: Vec<(NodeId, bool)> = self
            .peers
            .iter()
            .filter(|(_, p)| p.is_of_other_cluster(now, self.detection_time))
            .map(|(n, p)| (*n, !p.joining()))
            .collect();
        let theirs = others.iter().filter(|(_, settled)| *settled).map(|(n, _)| *n);
        let theirs: NodeSet = theirs.collect();
        let heard = self
            .peers
            .iter()
            .filter(|(_, p)| p.is_heard(now, self.detection_time) && !p.joining());
        let ours = heard.map(|(n, _)| *n).chain((!self.joining).then_some(self.this));
        let ours: NodeSet = ours.collect();
        let rank = |set: NodeSet| (set.len(), std::cmp::Reverse(set.first()));
        (!theirs.is_empty() && (ours.is_empty() || rank(theirs) > rank(ours))).then(|| {
            format!(
                "cluster.xml differs from that of {} other nodes; make the files equal and restart farmd",
                theirs.len()
            )
        })
    }

    fn settle(&mut self, now: Duration, view: NodeSet, fenced: Option<String>) {
        if view != self.view {
            let gone = |n: &NodeId| !view.contains(*n) && (*n == self.this || !view.is_empty());
            let out = self.view.iter().filter(gone).map(|n| self.testimony(now, n)).collect();
            self.events.push_back(Event::ViewChanged {
                old: self.view,
                new: view,
                out,
            });
            self.view = view;
        }
        if fenced.is_some() != self.fenced.is_some() {
            self.events.push_back(Event::Fenced(fenced.clone()));
        }
        self.fenced = fenced;
    }
}

#[cfg(test)]
mod tests;
