//! Reads what is known: what does it call for? Changes nothing but the caches of what was agreed last.

use std::time::Duration;

use crate::id::{NodeId, NodeSet};

use super::step::Cue;
use super::{Agreed, Membership, view};

impl Membership {
    /// See [`Cue`]; the first two come otherwise.
    pub(super) fn cue(&mut self, now: Duration) -> Cue {
        if self.heard(now).is_empty() {
            if self.told_deaf.is_some() {
                return Cue::Deaf;
            }
            if now < self.cut_off_until {
                return Cue::CutOff;
            }
        }
        if let Some(theirs) = self.other_file(now) {
            return Cue::OtherFile(theirs.len());
        }
        let ears = self.ears(now);
        let known = self.agreed.as_ref().filter(|agreed| agreed.ears == ears);
        let (view, left_out) = match known {
            // Most heartbeats bring nothing new.
            Some(agreed) => (agreed.view, agreed.left_out),
            None => {
                let agreement = view::agree(&ears);
                self.links = agreement.links;
                self.divided = agreement.divided;
                (agreement.view, agreement.excluded)
            }
        };
        let cue = match view {
            Some(view) => Cue::Agreed(self.with_respite(now, view, left_out, ears.cut_off)),
            None => {
                self.excluded = left_out;
                self.respite.clear();
                self.settled = false;
                Cue::LeftOut(ears.heard.values().filter(|row| !row.hears_this).count())
            }
        };
        self.agreed = Some(Agreed { ears, view, left_out });
        cue
    }

    /// `view`, with those members that it leaves out although somebody hears them. Such a one has to go, and finds that out by itself, but perhaps not yet; and two that do not
    /// talk may each find that the other has to, as long as one of them knows more. So it stays until it is known to have gone, or until all know the same.
    fn with_respite(&mut self, now: Duration, view: NodeSet, left_out: NodeSet, cut_off: NodeSet) -> NodeSet {
        // Who has just come has to take over what it knows of.
        let members = if self.settled { self.view } else { left_out };
        self.settled = !self.joining;
        let stay = NodeSet::from_bits(members.bits() & left_out.bits());
        self.respite.retain(|node, _| left_out.contains(*node));
        if left_out.is_empty() {
            self.excluded = cut_off;
            return view;
        }
        for node in stay.iter() {
            let until = now + self.told_time();
            self.respite.entry(node).or_insert(until);
        }
        // Who has stepped out says so; whoever hears that leaves it out, and says so in turn.
        let heard = self
            .peers
            .iter()
            .filter(|(_, p)| p.is_heard(now, self.timing.detection_time));
        let out = heard.fold(NodeSet::EMPTY, |mut out, (node, peer)| {
            if peer.fenced() {
                out.insert(*node);
            }
            NodeSet::from_bits(out.bits() | peer.excludes().bits())
        });
        let stays = |node: &NodeId| !out.contains(*node) && self.respite.get(node).is_some_and(|until| now < *until);
        let stay: NodeSet = stay.iter().filter(stays).collect();
        self.excluded = NodeSet::from_bits(left_out.bits() & !stay.bits() | cut_off.bits());
        NodeSet::from_bits(view.bits() | stay.bits())
    }

    /// Notes which peers are heard by others and not here, of those that nobody had heard; and which nobody hears now.
    fn note_starting(&mut self, now: Duration, ears: &mut view::Ears) {
        let unheard = ears.unheard();
        let until = now + self.timing.detection_time;
        self.starting
            .retain(|node, until| unheard.contains(*node) && now < *until);
        for node in unheard.iter().filter(|node| self.absent.contains(*node)) {
            self.starting.entry(node).or_insert(until);
        }
        ears.starting = self.starting.keys().copied().collect();
        let absent = |n: &NodeId| !unheard.contains(*n) && !ears.heard.contains_key(n) && !ears.told.contains_key(n);
        self.absent = self.peers.keys().copied().filter(absent).collect();
    }

    /// The settled nodes with another `cluster.xml`, if that counts: of two files that of the more nodes does, then that of the lowest node. Who is
    /// still joining does not count.
    fn other_file(&self, now: Duration) -> Option<NodeSet> {
        let detection_time = self.timing.detection_time;
        let settled = self.peers.iter().filter(|(_, p)| !p.joining());
        let theirs = settled
            .clone()
            .filter(|(_, p)| p.is_of_other_cluster(now, detection_time));
        let theirs: NodeSet = theirs.map(|(n, _)| *n).collect();
        let heard = settled.filter(|(_, p)| p.is_heard(now, detection_time));
        let ours = heard.map(|(n, _)| *n).chain((!self.joining).then_some(self.this));
        let ours: NodeSet = ours.collect();
        let rank = |set: NodeSet| (set.len(), std::cmp::Reverse(set.first()));
        (!theirs.is_empty() && (ours.is_empty() || rank(theirs) > rank(ours))).then_some(theirs)
    }

    fn ears(&mut self, now: Duration) -> view::Ears {
        let heard = self.peers.iter().filter(|(n, p)| {
            let left = || self.told.has_left(now, **n, p.newest(), self.timing);
            p.is_heard(now, self.timing.detection_time) && !p.is_cut_off() && !left()
        });
        let rows = heard.map(|(n, p)| {
            let row = view::Row {
                hears: p.hears(),
                joining: p.joining(),
                new_here: p.is_new_here(),
                hears_this: p.hears_us(),
            };
            (*n, row)
        });
        let mut ears = view::Ears {
            this: self.this,
            joining: self.joining,
            heard: rows.collect(),
            told: self.told.fresh(now, &self.peers, self.timing),
            gone: self.gone_for_good(now),
            cut_off: self.cut_off(now),
            silent: self.told.silent(now, &self.peers, self.timing),
            starting: NodeSet::EMPTY,
        };
        self.note_starting(now, &mut ears);
        ears
    }

    /// Peers that are heard, have stepped out and hear nobody.
    fn cut_off(&self, now: Duration) -> NodeSet {
        let detection_time = self.timing.detection_time;
        let cut_off = self.peers.iter();
        let cut_off = cut_off.filter(|(_, p)| p.is_heard(now, detection_time) && p.is_cut_off());
        cut_off.map(|(n, _)| *n).collect()
    }

    /// Who has said lately that it is no member, to this node or, as others tell, to them.
    fn gone_for_good(&self, now: Duration) -> NodeSet {
        let gone = self.peers.iter().filter(|(n, p)| {
            p.is_gone(now, self.timing.detection_time) || self.told.has_left(now, **n, p.newest(), self.timing)
        });
        gone.map(|(n, _)| *n).collect()
    }
}
