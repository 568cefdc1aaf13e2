//! Reads what is known: what does it call for? Changes nothing but the caches of what was agreed last.

use std::time::Duration;

use crate::id::NodeSet;

use super::step::Cue;
use super::{Membership, view};

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
        let known = self.agreed.as_ref().filter(|(known, _)| *known == ears);
        let agreed = match known {
            // Most heartbeats bring nothing new.
            Some((_, view)) => *view,
            None => {
                let agreement = view::agree(&ears);
                self.links = agreement.links;
                self.excluded = agreement.excluded;
                self.divided = agreement.divided;
                agreement.view
            }
        };
        let cue = match agreed {
            Some(view) => Cue::Agreed(view),
            None => Cue::LeftOut(ears.heard.values().filter(|row| !row.hears_this).count()),
        };
        self.agreed = Some((ears, agreed));
        cue
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

    fn ears(&self, now: Duration) -> view::Ears {
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
        view::Ears {
            this: self.this,
            joining: self.joining,
            heard: rows.collect(),
            told: self.told.fresh(now, &self.peers, self.timing),
            gone: self.gone_for_good(now),
            cut_off: self.cut_off(now),
            silent: self.told.silent(now, &self.peers, self.timing),
        }
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
