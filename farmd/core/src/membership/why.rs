//! Why a node is out: who says so, and for how long it has been silent.
//!
//! Owns nothing and decides nothing: a [`Testimony`] is gathered when a node goes down or leaves the view, from what is known at that moment,
//! for the log and the history. Called by [`super::Membership`] when it makes an event, and by the daemon while later heartbeats still
//! tell who else does not hear the node.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::id::{NodeId, NodeSet};
use crate::membership::Peer;
use crate::membership::step::Sign;

/// What is wrong with a node, as this node sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// Nothing of it was heard for the detection time.
    Silent,
    /// It has said goodbye.
    Left,
    /// Its `cluster.xml` is another one.
    OtherCluster,
    /// It is heard, and does not hear this node; of this node: others hear it, and it hears nobody.
    Deaf,
    /// It hears nobody, and nothing at all comes in there; said of this node only.
    CutOff,
    /// This node talks with it both ways; others do not.
    LeftOut,
}

/// All that is known of a node that is out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Testimony {
    /// The node.
    pub node: NodeId,
    /// What is wrong with it.
    pub cause: Cause,
    /// Nodes that do not talk with it both ways: this one, and settled peers by their latest heartbeats.
    pub observers: NodeSet,
    /// Settled nodes that do, this one included.
    pub talk_with_it: NodeSet,
    /// Since it was last heard here, on any lan; `None` if never.
    pub silent: Option<Duration>,
    /// The same on each lan it is on, by position in `cluster.xml`.
    pub lans: Vec<(usize, Option<Duration>)>,
}

/// What `this` node and its `peers` say of `node` at `now`.
pub fn testimony(
    this: NodeId,
    peers: &BTreeMap<NodeId, Peer>,
    node: NodeId,
    now: Duration,
    detection_time: Duration,
) -> Testimony {
    let about = peers.get(&node);
    let heard = about.is_some_and(|p| p.is_heard(now, detection_time));
    let mut observers = NodeSet::EMPTY;
    let mut talk_with_it = NodeSet::EMPTY;
    let mut note = |who: NodeId, talks: bool| {
        if talks {
            talk_with_it.insert(who);
        } else {
            observers.insert(who);
        }
    };
    // Of itself a node knows what the others tell.
    if node != this {
        note(this, heard && about.is_some_and(Peer::hears_us));
    }
    let settled = |p: &&Peer| p.is_heard(now, detection_time) && !p.joining();
    for (who, peer) in peers.iter().filter(|(n, p)| **n != node && settled(p)) {
        let talks = if node == this {
            peer.hears_us() && !peer.excludes().contains(this)
        } else {
            // The row of a node that is not heard is as old as its last heartbeat.
            peer.hears().contains(node) && (!heard || about.is_some_and(|p| p.hears().contains(*who)))
        };
        note(*who, talks);
    }
    let cause = match about.map(|p| p.sign(now, detection_time)) {
        Some(Sign::OtherFile) => Cause::OtherCluster,
        Some(Sign::Left) => Cause::Left,
        Some(Sign::Silent) => Cause::Silent,
        Some(Sign::Unheard) => Cause::Deaf,
        Some(Sign::Restarted | Sign::Late | Sign::Talks) | None => Cause::LeftOut,
    };
    let since = |at: Duration| now.saturating_sub(at);
    let lans = about.into_iter().flat_map(Peer::links);
    let lans = lans.map(|(lan, link)| (lan, link.heard_at().map(since)));
    Testimony {
        node,
        cause,
        observers,
        talk_with_it,
        silent: about.and_then(Peer::heard_at).map(since),
        lans: lans.collect(),
    }
}
