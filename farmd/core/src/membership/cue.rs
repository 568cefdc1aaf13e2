//! Reads what is known: what does it call for? Changes nothing but what was agreed last, and who has a respite since when.

use std::time::Duration;

use crate::id::{NodeId, NodeSet};

use super::step::Cue;
use super::{Agreed, Membership, Peer, view};

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
            Some(view) => Cue::Agreed(self.with_respite(now, &ears, view, left_out)),
            None => {
                self.excluded = left_out;
                Cue::LeftOut(ears.heard.values().filter(|row| !row.hears_this).count())
            }
        };
        self.agreed = Some(Agreed { ears, view, left_out });
        cue
    }

    /// `view`, with those that it leaves out although somebody hears them. Such a one has to go, and finds that out by itself, but perhaps not yet; and two that do
    /// not talk may each find that the other has to, as long as one of them knows more. So it stays until it is known to have gone, or until all know the same.
    fn with_respite(&mut self, now: Duration, ears: &view::Ears, view: NodeSet, left_out: NodeSet) -> NodeSet {
        let (told_time, detection_time) = (self.told_time(), self.timing.detection_time);
        self.respite.retain(|node, _| left_out.contains(*node));
        let members = self.view.bits() | ears.heard_elsewhere().bits();
        for node in NodeSet::from_bits(members & left_out.bits()).iter() {
            self.respite.entry(node).or_insert(now + told_time);
        }
        // Who has stepped out says so; whoever hears that leaves it out, and says so in turn. What was said before may be of before it came back.
        let peers = &self.peers;
        let heard = || peers.iter().filter(|(_, p)| p.is_heard(now, detection_time));
        let is_out = |node: NodeId, until: Duration| {
            let lately = |p: &Peer| p.heard_at().is_some_and(|at| at + told_time >= until);
            heard().any(|(n, p)| (*n == node && p.fenced()) || (p.excludes().contains(node) && lately(p)))
        };
        for (node, until) in &mut self.respite {
            if is_out(*node, *until) {
                *until = now.min(*until);
            }
        }
        let stay = self.respite.iter().filter(|(_, until)| now < **until);
        let stay: NodeSet = stay.map(|(n, _)| *n).collect();
        self.excluded = NodeSet::from_bits(left_out.bits() & !stay.bits() | ears.cut_off.bits());
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
