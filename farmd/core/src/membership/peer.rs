//! The failure detector for one peer, and the guard against recordings.
//!
//! A peer *hears this node* while what it acknowledges was sent so lately that it cannot take over yet: by its own clock it judges this
//! node no sooner than the detection time after that heartbeat was sent. One pulse before, this node takes itself for unheard, so that it
//! has closed everything when the peer may open. Of a peer that says nothing at all that cannot be said; it counts by its silence.
//! What follows from how a peer sounds is a table, [`step::judge`].

use std::time::Duration;

use crate::id::{Incarnation, NodeId, NodeSet};
use crate::membership::Refusal;
use crate::membership::link::Link;
use crate::membership::step::{self, Judgement, Sign, Standing};
use crate::wire::heartbeat::{Hearsay, Heartbeat};

/// The times by which peers are judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// Time between two heartbeats.
    pub interval: Duration,
    /// Silence after which a peer is down; at least three intervals.
    pub detection_time: Duration,
}

impl Timing {
    /// How long after a heartbeat was sent nobody who has heard it takes over, less one pulse to close everything.
    pub fn lease(self) -> Duration {
        self.detection_time - self.interval
    }

    /// Age at which a heartbeat or its acknowledgement is missed: a pulse, and half of one for jitter.
    pub fn late(self) -> Duration {
        self.interval * 3 / 2
    }
}

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
    /// `None` where the peer has no address.
    lans: Vec<Option<Link>>,
    incarnation: Incarnation,
    heard_at: Option<Duration>,
    /// Whatever its silence, it is not judged by it before.
    reprieve: Option<Duration>,
    since: Duration,
    standing: Standing,
    was_alive_as: Option<Incarnation>,
    hears: NodeSet,
    /// When this node sent the newest of its heartbeats that the peer acknowledges.
    acked_at: Option<Duration>,
    hears_us: bool,
    /// It has acknowledged something of this node since it began to join.
    has_heard_us: bool,
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
            lans: lans.into_iter().map(|on| on.then(Link::default)).collect(),
            incarnation: Incarnation(0),
            heard_at: None,
            reprieve: None,
            since: now,
            standing: Standing::Down,
            was_alive_as: None,
            hears: NodeSet::EMPTY,
            acked_at: None,
            hears_us: false,
            has_heard_us: false,
            excludes: NodeSet::EMPTY,
            joining: false,
            fenced: false,
            leaving: false,
            same_cluster: true,
        }
    }

    /// Takes a heartbeat unless it is not newer than what was seen on that lan; true if it is newer than what was seen on any. `acked_at` is when this node
    /// sent what the heartbeat acknowledges.
    pub fn handle_heartbeat(
        &mut self,
        now: Duration,
        lan: usize,
        heartbeat: &Heartbeat,
        acked_at: Option<Duration>,
        same_cluster: bool,
    ) -> Result<bool, Refusal> {
        let link = self.lans.get(lan).and_then(Option::as_ref);
        let last = link.map(Link::seq).ok_or(Refusal::UnknownSender)?;
        if heartbeat.incarnation < self.incarnation
            || (heartbeat.incarnation == self.incarnation && heartbeat.seq <= last)
        {
            return Err(Refusal::Replay);
        }
        if heartbeat.incarnation > self.incarnation {
            self.incarnation = heartbeat.incarnation;
            self.lans.iter_mut().flatten().for_each(Link::restart);
            if step::judge(self.standing, Sign::Restarted) == Judgement::Forget {
                self.standing = Standing::Down;
            }
            self.has_heard_us = false;
        }
        let newest = self.last_seq() < heartbeat.seq;
        if let Some(Some(link)) = self.lans.get_mut(lan) {
            link.handle_heartbeat(now, heartbeat.seq, heartbeat.beat);
        }
        self.heard_at = Some(now);
        self.reprieve = None;
        // The same heartbeat comes in on every lan; an older one on a slower lan must not undo a newer one.
        if newest {
            self.hears = heartbeat.hears_set();
            self.acked_at = acked_at;
            let anew = heartbeat.joining && !self.joining;
            self.has_heard_us = acked_at.is_some() || (self.has_heard_us && !anew);
            self.excludes = heartbeat.excludes;
            self.joining = heartbeat.joining;
            self.fenced = heartbeat.fenced;
            self.leaving = heartbeat.leaving;
            self.same_cluster = same_cluster;
        }
        Ok(newest)
    }

    /// When this node sent the newest that the peer had heard of it when it spoke last; `None` if that is not known.
    pub fn acked_at(&self) -> Option<Duration> {
        self.acked_at
    }

    /// Forgets when the peer was heard; its sequence numbers still count.
    pub fn forget(&mut self) {
        self.heard_at = None;
        self.reprieve = None;
        self.acked_at = None;
        self.hears_us = false;
        self.has_heard_us = false;
    }

    /// The peer was heard when this node last looked, and is not judged by its silence before `until`.
    pub fn put_off(&mut self, until: Duration) {
        self.reprieve = Some(until);
    }

    /// When it is down if nothing more is heard; `None` if nothing ever was.
    fn silent_at(&self, detection_time: Duration) -> Option<Duration> {
        let at = self.heard_at? + detection_time;
        Some(self.reprieve.map_or(at, |until| until.max(at)))
    }

    /// True if something of this cluster was heard within the detection time and the peer has not said goodbye.
    pub fn is_heard(&self, now: Duration, detection_time: Duration) -> bool {
        self.state(now, detection_time) != PeerState::Down
    }

    /// True if the peer may still count on this node: the newest that it acknowledges was sent so lately that it has not judged it silent yet,
    /// or has not closed since. One that is not heard by this node, but says otherwise, counts too.
    pub fn may_count_on_us(&self, now: Duration, timing: Timing) -> bool {
        let until = |at: Duration| at + timing.detection_time + timing.interval;
        self.hears_us || self.acked_at.is_some_and(|at| now < until(at))
    }

    /// When the judgement changes if nothing more is heard.
    pub fn judged_at(&self, timing: Timing) -> Option<Duration> {
        let silent = self.silent_at(timing.detection_time);
        let silent = silent.filter(|_| self.standing == Standing::Alive);
        let unheard = self.acked_at.zip(self.heard_at).filter(|_| self.hears_us);
        let unheard = unheard
            .map(|(acked, heard)| (acked + timing.lease(), heard + timing.interval))
            .filter(|(unheard, spoken)| unheard <= spoken)
            .map(|(unheard, _)| unheard);
        silent.into_iter().chain(unheard).min()
    }

    /// A pulse before the soonest moment at which the peer can take over if it has heard nothing of this node since what it acknowledges.
    /// `None` of one that is down, or of which heartbeats are missing: that one is judged by its silence, as long as this node runs.
    pub fn lease_until(&self, now: Duration, timing: Timing) -> Option<Duration> {
        let speaks = self.standing == Standing::Alive && self.heard_at.is_some_and(|at| now < at + timing.late());
        self.acked_at.filter(|_| speaks).map(|at| at + timing.lease())
    }

    /// True if heartbeats between the peer and this node have gone missing, so that more of them are worth their cost: the peer has been
    /// silent, or has not acknowledged anything, for longer than a pulse and a half.
    pub fn is_endangered(&self, now: Duration, timing: Timing) -> bool {
        let Some(heard_at) = self.heard_at.filter(|_| self.is_heard(now, timing.detection_time)) else {
            return false;
        };
        let late = timing.late();
        now >= heard_at + late || self.acked_at.is_some_and(|at| heard_at >= at + late)
    }

    /// When it may become so if nothing more is heard.
    pub fn endangered_at(&self, now: Duration, timing: Timing) -> Option<Duration> {
        let at = self.heard_at.filter(|_| self.is_heard(now, timing.detection_time))? + timing.late();
        (at > now).then_some(at)
    }

    /// How it sounds now. That it has restarted is seen when it speaks, in [`Self::handle_heartbeat`].
    pub(super) fn sign(&self, now: Duration, detection_time: Duration) -> Sign {
        if !self.same_cluster {
            Sign::OtherFile
        } else if self.leaving {
            Sign::Left
        } else if self.silent_at(detection_time).is_none_or(|at| now >= at) {
            Sign::Silent
        } else if !self.hears_us {
            Sign::Unheard
        } else if self.heard_at.is_none_or(|at| now >= at + detection_time / 2) {
            Sign::Late
        } else {
            Sign::Talks
        }
    }

    /// Judgement now.
    pub fn state(&self, now: Duration, detection_time: Duration) -> PeerState {
        self.sign(now, detection_time).state()
    }

    /// When the peer was last heard, if it has fallen silent without a goodbye.
    pub fn silent_since(&self, now: Duration, detection_time: Duration) -> Option<Duration> {
        let silent = |at: &Duration| self.same_cluster && !self.leaving && now >= *at + detection_time;
        self.heard_at.filter(silent)
    }

    /// Updates the judgement and says what changed.
    pub fn judge(&mut self, now: Duration, timing: Timing) -> Option<Change> {
        let detection_time = timing.detection_time;
        // Of the time after its last word nothing can be said but that it is silent.
        let spoken = self.heard_at.map(|at| now.min(at + timing.interval));
        self.hears_us = match (self.acked_at, spoken) {
            (Some(acked), Some(spoken)) => spoken < acked + timing.lease(),
            _ => false,
        };
        match step::judge(self.standing, self.sign(now, detection_time)) {
            Judgement::TellAlive => {
                self.standing = Standing::Alive;
                self.since = now;
                let restarted = self
                    .was_alive_as
                    .replace(self.incarnation)
                    .is_some_and(|i| i != self.incarnation);
                Some(Change::Alive { restarted })
            }
            Judgement::TellDown => {
                self.standing = Standing::Down;
                self.since = now;
                Some(Change::Down {
                    why: self.why(now, detection_time),
                })
            }
            // Who has restarted is forgotten in `handle_heartbeat`.
            Judgement::Forget | Judgement::Rest => None,
        }
    }

    /// True if authentic heartbeats come in that are of another `cluster.xml`.
    pub fn is_of_other_cluster(&self, now: Duration, detection_time: Duration) -> bool {
        !self.same_cluster && !self.leaving && self.heard_at.is_some_and(|at| now < at + detection_time)
    }

    /// Names the newest thing heard of it.
    pub fn newest(&self) -> (Incarnation, u64) {
        (self.incarnation, self.last_seq())
    }

    /// What it has said of itself, to be passed on; `None` if it has not been heard for the detection time.
    pub fn word(&self, node: NodeId, now: Duration, detection_time: Duration) -> Option<Hearsay> {
        let age = now.saturating_sub(self.heard_at?);
        (self.same_cluster && age < detection_time).then(|| Hearsay {
            node,
            incarnation: self.incarnation,
            seq: self.last_seq(),
            age_us: u32::try_from(age.as_micros()).unwrap_or(u32::MAX),
            joining: self.joining,
            leaving: self.leaving,
            hears: self.hears,
        })
    }

    /// True if it has said itself that it is no member: it has left, is of another `cluster.xml`, or is cut off.
    pub fn is_gone(&self, now: Duration, detection_time: Duration) -> bool {
        let says_so = self.leaving || !self.same_cluster || self.is_cut_off();
        says_so && self.heard_at.is_some_and(|at| now < at + detection_time)
    }

    /// True if it has stepped out and hears nobody: it comes back when it hears somebody, and not before.
    pub fn is_cut_off(&self) -> bool {
        self.fenced && self.hears.is_empty()
    }

    /// True if it was ever heard, in this life of this node, and has not said goodbye.
    pub fn was_there(&self) -> bool {
        self.last_seq() > 0 && !self.leaving && self.same_cluster
    }

    /// Why the peer is not alive; empty if it is.
    pub fn why(&self, now: Duration, detection_time: Duration) -> String {
        let Some(at) = self.heard_at else {
            return "never heard".to_owned();
        };
        // One that is put off may have been silent for as long without the sign of it.
        let silent = now >= at + detection_time;
        match self.sign(now, detection_time) {
            Sign::OtherFile => "its cluster.xml differs".to_owned(),
            Sign::Left => "it has left".to_owned(),
            Sign::Silent | Sign::Unheard | Sign::Late if silent => {
                format!("no heartbeat for {} ms", (now - at).as_millis())
            }
            Sign::Unheard => "it does not hear this node; is the heartbeats' UDP port blocked there?".to_owned(),
            Sign::Restarted | Sign::Silent | Sign::Late | Sign::Talks => String::new(),
        }
    }

    /// Since when the judgement stands.
    pub fn since(&self) -> Duration {
        self.since
    }

    /// What it says of itself and its ears: its start number, whom it hears, whom it leaves out, and whether it is joining, has stepped out, has left, and
    /// is of the same cluster.
    pub fn flags(&self) -> (Incarnation, NodeSet, NodeSet, [bool; 4]) {
        let words = [self.joining, self.fenced, self.leaving, self.same_cluster];
        (self.incarnation, self.hears, self.excludes, words)
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

    /// What the lan at position `lan` does with its heartbeats; `None` if it is not on it.
    pub fn link(&self, lan: usize) -> Option<&Link> {
        self.lans.get(lan)?.as_ref()
    }

    /// Heartbeats of the ten seconds before `now` that came in on `link`, one of this peer's, and those that did not. On a lan that has
    /// fallen silent what the others bring tells what is lost.
    pub fn recent(&self, now: Duration, link: &Link) -> (u32, u32) {
        let (received, lost) = link.recent(now);
        let newest = self.lans.iter().flatten().max_by_key(|link| link.seq());
        (received, lost + newest.map_or(0, |newest| link.behind(newest, now)))
    }

    /// What each lan does with its heartbeats, by position in `cluster.xml`.
    pub fn links(&self) -> impl Iterator<Item = (usize, &Link)> {
        let lans = self.lans.iter().enumerate();
        lans.filter_map(|(lan, link)| Some((lan, link.as_ref()?)))
    }

    /// A round trip to it was taken on `lan`.
    pub(super) fn handle_rtt(&mut self, lan: usize, rtt: Duration) {
        if let Some(Some(link)) = self.lans.get_mut(lan) {
            link.handle_rtt(rtt);
        }
    }

    /// Highest sequence number heard on any lan.
    pub fn last_seq(&self) -> u64 {
        self.lans.iter().flatten().map(Link::seq).max().unwrap_or(0)
    }

    /// True if it hears this incarnation of this node.
    pub fn hears_us(&self) -> bool {
        self.hears_us
    }

    /// Whom it leaves out of its view although it hears them, or hears of them; see [`super::Membership::excluded`].
    pub fn excludes(&self) -> NodeSet {
        self.excludes
    }

    /// It has just started.
    pub fn joining(&self) -> bool {
        self.joining
    }

    /// It has just started and cannot have heard this node; once it has, its ears count as everybody's do.
    pub fn is_new_here(&self) -> bool {
        self.joining && !self.has_heard_us
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
