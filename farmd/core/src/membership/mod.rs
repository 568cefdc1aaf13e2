//! Who is alive, as far as this node can tell, and who forms the view.
//!
//! Owns one [`Peer`] per configured node. It is told of every authentic heartbeat and of the passing of time,
//! and answers with the [`Membership::view`], whether this node must step out ([`Membership::fenced`]), and
//! [`Event`]s for the log. It knows nothing of buckets. Called by [`crate::farm::Farm`] only.
//!
//! A peer is **down** when nothing of it was heard on any lan for the detection time. The **view** is computed by every node from the rows
//! ("whom I hear") in the heartbeats: a node that fails to talk both ways with two others is left out ([`view::Links::settle`]). A node
//! that finds itself left out steps out. Each heartbeat acknowledges the newest one heard of every peer, so that a node knows that it is
//! not heard *before* the others may take over ([`peer`]). While heartbeats go missing, more of them are sent to those concerned
//! ([`Membership::endangered`]). A node that has just started is *joining* for the detection time and one pulse: it serves nothing, and its
//! missing ears count against nobody.
//!
//! What follows from what is two tables in `step.rs`: [`step::judge`] for each peer, by the [`step::Sign`] that it gives, and [`step::next`] for
//! this node, by its [`step::Phase`] and the [`step::Cue`] that its surroundings give, which `cue.rs` reads.

mod cue;
mod hearsay;
pub mod link;
pub mod peer;
pub mod step;
pub mod view;
pub mod why;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use hearsay::Told;
use peer::Timing;
use step::{Cue, Phase, Step};

use crate::config::ClusterConfig;
use crate::id::{NodeId, NodeSet};
use crate::wire::heartbeat::{Ack, Echo, Hearsay, Heartbeat};

pub use peer::{Peer, PeerState};
pub use why::{Cause, Testimony};

/// How long a node that was told that it is deaf believes it. It is told again every second.
const DEAF_TIME: Duration = Duration::from_secs(3);

/// For so many pulses after its joining, or after it was cut off, a node that lacks some takes nothing: one that hears it and is not heard by it serves until it
/// is told that the missing ears count from now on. For as long a node stays out after it was told last that nothing comes in.
pub const OPEN_PULSES: u32 = 2;

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

/// What was known last, and what follows from it.
#[derive(Clone, Debug)]
struct Agreed {
    ears: view::Ears,
    view: Option<NodeSet>,
    left_out: NodeSet,
}

/// See the module doc.
#[derive(Clone, Debug)]
pub struct Membership {
    this: NodeId,
    digest: u64,
    timing: Timing,
    /// Sequence numbers of this node's heartbeats and when they were sent, for twice the detection time.
    sent: VecDeque<(u64, Duration)>,
    join_time: Duration,
    join_until: Duration,
    joining: bool,
    /// It has joined or was cut off, and takes nothing before `open_at` unless all nodes are in the view; see [`OPEN_PULSES`].
    waiting: bool,
    open_at: Duration,
    peers: BTreeMap<NodeId, Peer>,
    view: NodeSet,
    excluded: NodeSet,
    /// What is known of nodes that are not heard here.
    told: Told,
    /// Somebody of whom this node knows does not talk with another.
    divided: bool,
    links: view::Links,
    /// When this node was told, by another way than heartbeats, that it does not hear one that hears it: if it hears nobody, it is the one that is cut off.
    /// `None` if that is too long ago, or something was heard since.
    told_deaf: Option<Duration>,
    /// Until when it counts that nothing at all comes in.
    cut_off_until: Duration,
    /// It has stepped out because it hears nobody although others may hear it.
    was_cut_off: bool,
    /// When a heartbeat of any peer came in last.
    company_at: Option<Duration>,
    /// When this node last spoke before it was not run for a while.
    excused: Duration,
    agreed: Option<Agreed>,
    /// Who is to go, and until when it stays all the same.
    respite: BTreeMap<NodeId, Duration>,
    /// Peers that nobody heard when it was looked last, as far as is known here.
    absent: NodeSet,
    /// Those of them that others hear now, and until when that is no sign that this node is deaf for them.
    starting: BTreeMap<NodeId, Duration>,
    fenced: Option<String>,
    events: VecDeque<Event>,
}

impl Membership {
    /// A node that starts at `now`.
    pub fn new(config: &ClusterConfig, this: NodeId, now: Duration) -> Self {
        let timing = Timing {
            interval: config.heartbeat_interval,
            detection_time: config.detection_time(),
        };
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
            digest: config.digest,
            timing,
            sent: VecDeque::new(),
            join_time: config.detection_time() + config.heartbeat_interval,
            join_until: now + config.detection_time() + config.heartbeat_interval,
            joining: true,
            waiting: false,
            open_at: now,
            peers,
            view: [this].into_iter().collect(),
            excluded: NodeSet::EMPTY,
            told: Told::default(),
            divided: false,
            links: view::Links::default(),
            told_deaf: None,
            cut_off_until: Duration::ZERO,
            was_cut_off: false,
            company_at: None,
            excused: Duration::ZERO,
            agreed: None,
            respite: BTreeMap::new(),
            absent: NodeSet::EMPTY,
            starting: BTreeMap::new(),
            fenced: None,
            events: VecDeque::new(),
        }
    }

    /// Takes an authentic heartbeat that came in on `lan`; true if it is the newest of its sender on any: what an older one says is out of date.
    pub fn handle_heartbeat(&mut self, now: Duration, lan: usize, heartbeat: &Heartbeat) -> Result<bool, Refusal> {
        if heartbeat.sender == self.this {
            return Err(Refusal::OwnName);
        }
        let acked = heartbeat.acks(self.this);
        let memory = &self.sent;
        let sent = |ack: Ack| memory.iter().rev().find(|(seq, _)| Ack::of(*seq) == ack);
        let acked_at = acked.and_then(sent).map(|(_, at)| *at);
        let same_cluster = heartbeat.cluster_digest == self.digest;
        let peer = self.peers.get_mut(&heartbeat.sender).ok_or(Refusal::UnknownSender)?;
        let newest = peer.handle_heartbeat(now, lan, heartbeat, acked_at, same_cluster)?;
        self.company_at = Some(now);
        self.told_deaf = None;
        let echo = heartbeat.echo.filter(|echo| echo.node == self.this);
        if let Some((echo, at)) = echo.and_then(|echo| Some((echo, sent(echo.ack)?.1))) {
            let kept = Duration::from_micros(echo.kept_us.into());
            peer.handle_rtt(lan, now.saturating_sub(at).saturating_sub(kept));
        }
        if same_cluster {
            for word in heartbeat.hearsay.iter().filter(|word| word.node != self.this) {
                self.told.learn(now, word);
            }
        }
        self.update(now);
        Ok(newest)
    }

    /// Notes that this node sends heartbeat `seq`.
    pub fn note_sent(&mut self, now: Duration, seq: u64) {
        let memory = 2 * self.timing.detection_time;
        while self.sent.front().is_some_and(|(_, at)| *at + memory < now) {
            self.sent.pop_front();
        }
        self.sent.push_back((seq, now));
    }

    /// Lets time pass: peers go down, joining ends.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.update(now);
    }

    /// This node did not run for so long that others may have gone on without it: it joins anew, and what it
    /// remembers of whom it heard is void.
    pub fn handle_pause(&mut self, now: Duration) {
        self.take(now, Cue::Paused);
        // Nobody could be heard meanwhile.
        self.company_at = self.company_at.map(|_| now);
        self.update(now);
    }

    /// A node that hears this one and is not heard by it says so, by another way than heartbeats. Once this node hears nobody it steps out, for three seconds or
    /// until it hears somebody; else this changes nothing.
    pub fn handle_told_deaf(&mut self, now: Duration) {
        self.told_deaf = Some(now);
        self.update(now);
    }

    /// Nothing at all comes in by the interfaces that clients use; see [`Self::silent_since`]. Once this node hears nobody it steps out, until this is
    /// [`OPEN_PULSES`] pulses ago.
    pub fn handle_nothing_in(&mut self, now: Duration) {
        self.cut_off_until = now + self.timing.interval * OPEN_PULSES;
        self.update(now);
    }

    /// Something came in, though no heartbeat: what [`Self::handle_nothing_in`] was told is void, unless this node is out for it already.
    pub fn handle_something_in(&mut self, now: Duration) {
        if !self.was_cut_off {
            self.cut_off_until = Duration::ZERO;
            self.update(now);
        }
    }

    /// Since when no heartbeat of any node has come in, or this node was not run, if some node was heard and has not said goodbye: it may be gone, or nothing
    /// comes in here.
    pub fn silent_since(&self) -> Option<Duration> {
        let missed = self.peers.values().any(Peer::was_there);
        self.company_at.filter(|_| missed)
    }

    /// Nodes that this one should tell that they may be deaf: their heartbeats come in here, and they do not hear this node. Of the other members, if there are
    /// several, the lowest that hears them tells them. It does so a pulse before such a node can take over.
    pub fn deaf(&self, now: Duration) -> NodeSet {
        if self.joining || !self.view.contains(self.this) {
            return NodeSet::EMPTY;
        }
        let detection_time = self.timing.detection_time;
        let tells_before = |member: NodeId, node: NodeId| {
            member < self.this && self.peers.get(&member).is_some_and(|peer| peer.hears().contains(node))
        };
        let deaf = self.peers.iter().filter(|(node, peer)| {
            let others: NodeSet = self.view.iter().filter(|m| m != *node && *m != self.this).collect();
            peer.is_heard(now, detection_time)
                && !peer.joining()
                && !peer.hears_us()
                && !others.is_empty()
                && !others.iter().any(|member| tells_before(member, **node))
        });
        deaf.map(|(node, _)| *node).collect()
    }

    /// When [`Self::handle_timeout`] has something to do without a heartbeat. May change after every
    /// `handle_*`.
    pub fn poll_timeout(&self) -> Option<Duration> {
        let peers = self.peers.values().filter_map(|p| p.judged_at(self.timing));
        // What has passed is no reason to come back.
        let told = self.told_deaf.map(|at| at + DEAF_TIME);
        let cut_off = Some(self.cut_off_until).filter(|until| *until > Duration::ZERO);
        peers
            .chain(self.joining.then_some(self.join_until))
            .chain(self.waiting.then_some(self.open_at))
            .chain(told.filter(|_| self.was_cut_off))
            .chain(cut_off.filter(|_| self.was_cut_off))
            .chain(
                self.respite
                    .iter()
                    .filter(|(node, _)| self.view.contains(**node))
                    .map(|(_, until)| *until),
            )
            .chain(self.starting.values().copied())
            .min()
    }

    /// The next event, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Before this moment no peer takes over, whatever becomes of this node after `now`.
    pub fn lease_until(&self, now: Duration) -> Duration {
        let peers = self.peers.values().filter_map(|p| p.lease_until(now, self.timing));
        peers.fold(now + self.timing.lease(), Duration::min)
    }

    /// Peers to or from which heartbeats have gone missing.
    pub fn endangered(&self, now: Duration) -> NodeSet {
        let peers = self.peers.iter().filter(|(_, p)| p.is_endangered(now, self.timing));
        peers.map(|(n, _)| *n).collect()
    }

    /// When [`Self::endangered`] may have one more member if nothing is heard.
    pub fn endangered_at(&self, now: Duration) -> Option<Duration> {
        let peers = self.peers.values();
        peers.filter_map(|p| p.endangered_at(now, self.timing)).min()
    }

    /// Who hears whom, as far as this node knows.
    pub fn links(&self) -> &view::Links {
        &self.links
    }

    /// True if all nodes that are known talk with each other, and there is nothing to tell.
    pub fn is_at_rest(&self) -> bool {
        self.events.is_empty() && !self.divided && !self.waiting && self.phase() == Phase::Member
    }

    /// The members of the view, this node among them unless it is fenced.
    pub fn view(&self) -> NodeSet {
        self.view
    }

    /// Nodes left out of the view because not all of it can hear them, once their respite is over, and those that are heard and cut off.
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

    /// True if this node takes no share yet: it is joining, or has told the others too lately that it no longer is.
    pub fn waits(&self) -> bool {
        self.joining || self.waiting
    }

    /// Silence after which a peer is down.
    pub fn detection_time(&self) -> Duration {
        self.timing.detection_time
    }

    /// How long after a node has said something all members know it, by whichever way, or do not count on that node any more.
    pub fn told_time(&self) -> Duration {
        self.timing.detection_time * 2 + self.timing.interval
    }

    /// How long a node that starts is joining.
    pub fn join_time(&self) -> Duration {
        self.join_time
    }

    /// A configured peer.
    pub fn peer(&self, node: NodeId) -> Option<&Peer> {
        self.peers.get(&node)
    }

    /// True if `node` is not known to have given this node up; see [`Peer::may_count_on_us`].
    pub fn may_count_on_us(&self, now: Duration, node: NodeId) -> bool {
        self.peers
            .get(&node)
            .is_some_and(|p| p.may_count_on_us(now, self.timing))
    }

    /// Judgement on a peer now.
    pub fn peer_state(&self, now: Duration, node: NodeId) -> Option<PeerState> {
        self.peers.get(&node).map(|p| p.state(now, self.timing.detection_time))
    }

    /// What to tell one peer on `lan`, another one at each `turn`, so that it can take its round trip.
    pub fn echo(&self, now: Duration, lan: usize, turn: u64) -> Option<Echo> {
        let heard = self.peers.iter().filter_map(|(node, peer)| {
            let link = peer.link(lan)?;
            let kept = now.saturating_sub(link.heard_at()?);
            (kept < self.timing.detection_time).then_some((*node, link, kept))
        });
        let heard: Vec<_> = heard.collect();
        let index = turn.checked_rem(heard.len() as u64)?;
        let (node, link, kept) = heard.get(index as usize)?;
        Some(Echo {
            node: *node,
            ack: Ack::of(link.seq()),
            kept_us: u32::try_from(kept.as_micros()).unwrap_or(u32::MAX),
        })
    }

    /// Whom this node hears, as it goes into heartbeats: with the newest that was heard.
    pub fn hears(&self, now: Duration) -> Vec<(NodeId, Ack)> {
        let heard = self
            .peers
            .iter()
            .filter(|(_, p)| p.is_heard(now, self.timing.detection_time));
        heard.map(|(n, p)| (*n, Ack::of(p.last_seq()))).collect()
    }

    /// What to pass on of the others: nothing while all that are known hear each other.
    pub fn hearsay(&self, now: Duration) -> Vec<Hearsay> {
        if !self.divided {
            return Vec::new();
        }
        let detection_time = self.timing.detection_time;
        let told = self.told.words(now, self.timing);
        let mut words: BTreeMap<NodeId, Hearsay> = told.map(|word| (word.node, word)).collect();
        for word in self.peers.iter().filter_map(|(n, p)| p.word(*n, now, detection_time)) {
            let number = |word: &Hearsay| (word.incarnation, word.seq);
            if words.get(&word.node).is_none_or(|told| number(told) <= number(&word)) {
                words.insert(word.node, word);
            }
        }
        words.into_values().collect()
    }

    /// Peers of which something was heard within the detection time, whether or not they hear this node.
    pub fn heard(&self, now: Duration) -> NodeSet {
        self.peers
            .iter()
            .filter(|(_, p)| p.is_heard(now, self.timing.detection_time))
            .map(|(n, _)| *n)
            .collect()
    }

    /// Peers that have fallen silent without a goodbye, and when each was last heard.
    pub fn gone(&self, now: Duration) -> BTreeMap<NodeId, Duration> {
        self.peers
            .iter()
            .filter_map(|(n, p)| Some((*n, p.silent_since(now, self.timing.detection_time)?)))
            .collect()
    }

    /// What this node and the peers it hears say of `node` now.
    pub fn testimony(&self, now: Duration, node: NodeId) -> Testimony {
        why::testimony(self.this, &self.peers, node, now, self.timing.detection_time)
    }

    /// This node was not run for a while, though not for as long as its lease, and has said nothing meanwhile: a peer that does not know yet
    /// that it is not heard here takes this node for dead and serves on. It has to be told first.
    fn put_off(&mut self, now: Duration) {
        let timing = self.timing;
        let silent = |(_, at): &(u64, Duration)| *at > self.excused && *at + timing.late() <= now;
        let Some((_, before)) = self.sent.back().copied().filter(silent) else {
            return;
        };
        self.excused = before;
        let heard = self.peers.values_mut();
        let heard = heard.filter(|p| p.is_heard(before, timing.detection_time));
        heard.for_each(|p| p.put_off(now + timing.interval));
    }

    fn update(&mut self, now: Duration) {
        self.put_off(now);
        if now >= self.join_until {
            self.take(now, Cue::TimeUp);
        }
        self.judge_peers(now);
        self.told.forget(now, self.timing);
        self.told_deaf = self.told_deaf.filter(|at| now < *at + DEAF_TIME);
        self.starting.retain(|_, until| now < *until);
        if now >= self.cut_off_until {
            self.cut_off_until = Duration::ZERO;
        }
        let cue = self.cue(now);
        self.take(now, cue);
        self.waiting &= now < self.open_at && self.view.len() <= self.peers.len();
    }

    fn judge_peers(&mut self, now: Duration) {
        let judged = self.peers.iter_mut().map(|(n, p)| (*n, p.judge(now, self.timing)));
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
    }

    /// Where this node stands, as far as the next step depends on it.
    fn phase(&self) -> Phase {
        match (self.joining, self.fenced.is_some()) {
            (true, false) => Phase::Joining,
            (true, true) => Phase::JoiningOut,
            (false, false) => Phase::Member,
            (false, true) => Phase::Out,
        }
    }

    /// Does the step that follows from `cue`.
    fn take(&mut self, now: Duration, cue: Cue) {
        match (step::next(self.phase(), cue), cue) {
            (Step::JoinAnew, _) => {
                self.joining = true;
                self.waiting = false;
                self.join_until = now + self.join_time;
                self.peers.values_mut().for_each(Peer::forget);
                self.told = Told::default();
            }
            (Step::Finish, _) => {
                self.joining = false;
                // A joining node has to leave out whom it does not hear yet.
                self.respite.clear();
                self.wait(now);
                self.events.push_back(Event::Joined);
            }
            (Step::StepOut, cue) => {
                self.set_view(now, NodeSet::EMPTY, cue.cause());
                self.fenced = cue.why_out();
                self.was_cut_off = cue.is_cut_off();
                self.excluded = NodeSet::EMPTY;
                self.respite.clear();
                self.events.push_back(Event::Fenced(self.fenced.clone()));
            }
            (Step::StayOut, cue) => {
                self.fenced = cue.why_out();
                self.was_cut_off |= cue.is_cut_off();
            }
            (Step::GoOn, Cue::Agreed(view)) => self.set_view(now, view, None),
            (Step::Return, Cue::Agreed(view)) => {
                self.set_view(now, view, None);
                self.fenced = None;
                // Who was cut off too may come back in the same moment, and who hears this node serves until it is told that this one is back.
                if std::mem::take(&mut self.was_cut_off) && !self.joining {
                    self.wait(now);
                }
                self.events.push_back(Event::Fenced(None));
            }
            // A view comes by no other cue.
            (Step::GoOn | Step::Return | Step::Rest, _) => {}
        }
    }

    /// It takes nothing for a while, or until the view is whole: who has talked with all once need not wait.
    fn wait(&mut self, now: Duration) {
        self.waiting = true;
        self.open_at = now + self.timing.interval * OPEN_PULSES;
    }

    /// `own` is what is wrong with this node, if it steps out.
    fn set_view(&mut self, now: Duration, view: NodeSet, own: Option<Cause>) {
        if view == self.view {
            return;
        }
        let gone = |n: &NodeId| !view.contains(*n) && (*n == self.this || !view.is_empty());
        let testimony = |n: NodeId| {
            let word = self.testimony(now, n);
            match own.filter(|_| n == self.this) {
                Some(cause) => Testimony { cause, ..word },
                None => word,
            }
        };
        let out = self.view.iter().filter(gone).map(testimony).collect();
        self.events.push_back(Event::ViewChanged {
            old: self.view,
            new: view,
            out,
        });
        self.view = view;
    }
}

#[cfg(test)]
mod tests;
