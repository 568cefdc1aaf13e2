//! Does the steps of the table.

use std::collections::BTreeMap;

use crate::id::{BUCKETS, Epoch, NodeId, NodeSet};
use crate::wire::heartbeat::{BucketSet, MapReport};

use super::step::{Cue, Step};
use super::{Closed, Event, Handover, Outcome, Pending, Surroundings, moved};

impl Handover {
    /// Does `step`, which [`super::step::next`] has found for `cue`.
    pub(super) fn take(&mut self, step: Step, cue: Cue, around: &Surroundings<'_>, outcome: &mut Outcome) {
        match (step, cue) {
            (Step::Shut, _) => self.shut_all(around.closed, outcome),
            (Step::Learn, Cue::Newer(map)) => self.learn(map, outcome),
            (Step::Forget, _) => {
                self.committed = Epoch::default();
                outcome.send = true;
            }
            (Step::Reopen, _) => {
                self.closed = Closed::No;
                self.committed = Epoch::default();
                outcome.send = true;
                outcome.plan_changed |= !self.held.is_empty();
            }
            (Step::Adopt, _) => {
                self.committed = self.known;
                self.promised = self.promised.max(self.known);
                outcome.send = true;
            }
            (Step::Commit, _) => self.commit(outcome),
            (Step::Follow, Cue::Proposal(by, proposal)) => {
                let MapReport { epoch, view, .. } = proposal;
                outcome.events.push(Event::Accepted { epoch, by, view });
                self.accept(proposal, None, outcome);
            }
            (Step::Propose, Cue::Unbalanced(weights)) => self.propose(weights, around.view, outcome),
            // The data plane's word comes by `handle_applied`, and these steps by no other cue.
            (Step::Confirm | Step::Learn | Step::Follow | Step::Propose | Step::Rest, _) => {}
        }
    }

    /// The data plane works as this node has waited for: what is closed here is closed, and a proposal is promised.
    pub(super) fn confirm(&mut self) {
        self.closing = None;
        if let Some(pending) = &self.pending {
            self.promised = self.promised.max(pending.epoch);
        }
    }

    fn shut_all(&mut self, closed: Closed, outcome: &mut Outcome) {
        if !self.open.is_empty() {
            self.hold_open_ones();
            self.open = BucketSet::default();
            self.guarded = BucketSet::default();
            self.closing = Some(None);
            outcome.events.push(Event::Shut);
        }
        if self.closed == Closed::No {
            self.withdraw_promise();
        }
        self.closed = closed;
        self.pending = None;
        self.behind = Some(None);
        self.leaving = BucketSet::default();
        outcome.plan_changed = true;
        outcome.send = true;
    }

    /// What was promised last is not kept to: the number that is told instead is nobody's proposal, and every
    /// later proposal is above it.
    pub(super) fn withdraw_promise(&mut self) {
        if self.promised > Epoch::default() {
            self.promised = self.highest.max(self.promised).next(self.this);
            self.highest = self.promised;
        }
    }

    /// What was open may carry connections; nobody has looked yet.
    fn hold_open_ones(&mut self) {
        let held = self.held.iter().chain(self.open.iter()).collect();
        self.held = held;
    }

    fn learn(&mut self, newest: MapReport, outcome: &mut Outcome) {
        let lost: BucketSet = self.open.iter().filter(|&i| !newest.map.owns(self.this, i)).collect();
        if !lost.is_empty() {
            outcome.events.push(Event::Released {
                epoch: newest.epoch,
                lost: lost.len(),
                to: moved::heirs(&newest.map, lost.iter()),
            });
            self.close(&lost);
        }
        let moved = moved::between(&self.map, &newest.map);
        self.map = newest.map;
        self.known = newest.epoch;
        self.behind = Some(None);
        outcome.events.push(Event::Adopted {
            epoch: self.known,
            counts: self.map.counts(),
            moved,
        });
        // An older proposal must not come back by a commit seen late.
        self.pending = self.pending.take().filter(|p| p.epoch > self.known);
        outcome.plan_changed = true;
        outcome.send = true;
    }

    fn propose(&mut self, weights: BTreeMap<NodeId, u16>, view: NodeSet, outcome: &mut Outcome) {
        let map = self.find_wanted(&weights).clone();
        let epoch = self.highest.next(self.this);
        outcome.events.push(Event::Proposed {
            epoch,
            view,
            moves: self.map.moves_to(&map),
        });
        self.accept(MapReport { epoch, view, map }, Some(weights), outcome);
    }

    fn accept(&mut self, proposal: MapReport, weights: Option<BTreeMap<NodeId, u16>>, outcome: &mut Outcome) {
        let lost: BucketSet = self.open.iter().filter(|&i| !proposal.map.owns(self.this, i)).collect();
        let MapReport { epoch, view, map } = proposal;
        if !lost.is_empty() {
            outcome.events.push(Event::Released {
                epoch,
                lost: lost.len(),
                to: moved::heirs(&map, lost.iter()),
            });
            self.close(&lost);
            outcome.plan_changed = true;
        }
        // Who gives up a bucket hands on what comes for it. A data plane that does not work with this node's last map may not even know the module.
        let gains = || (0..BUCKETS).any(|i| map.owns(self.this, i) && !self.open.contains(i));
        if self.behind.is_some() && gains() {
            self.closing = Some(None);
            outcome.plan_changed = true;
        }
        // An earlier release that the data plane has not confirmed yet has to be waited for too.
        if self.closing.is_none() {
            self.promised = epoch;
        }
        self.pending = Some(Pending {
            base: self.known,
            epoch,
            view,
            map,
            weights,
        });
        self.highest = self.highest.max(epoch);
        outcome.send = true;
    }

    fn close(&mut self, lost: &BucketSet) {
        let keep = |set: &BucketSet| set.iter().filter(|i| !lost.contains(*i)).collect();
        self.open = keep(&self.open);
        self.guarded = keep(&self.guarded);
        self.held = self.held.iter().chain(lost.iter()).collect();
        self.leaving = self.leaving.iter().chain(lost.iter()).collect();
        self.closing = Some(None);
    }

    fn commit(&mut self, outcome: &mut Outcome) {
        let Some(pending) = self.pending.take() else { return };
        let mut gained = 0;
        let mut from = NodeSet::EMPTY;
        for index in (0..BUCKETS).filter(|&i| pending.map.owns(self.this, i)) {
            if !self.open.contains(index) {
                self.open.insert(index);
                self.guarded.insert(index);
                gained += 1;
                if let Some(owner) = self.map.owner_at(index).filter(|n| *n != self.this) {
                    from.insert(owner);
                }
            }
        }
        if gained > 0 {
            self.guarded_at = pending.epoch;
        }
        self.behind = Some(None);
        self.committed = pending.epoch;
        self.known = pending.epoch;
        let moved = moved::between(&self.map, &pending.map);
        self.map = pending.map;
        outcome.plan_changed = true;
        outcome.send = true;
        outcome.events.push(Event::Committed {
            epoch: pending.epoch,
            counts: self.map.counts(),
            gained,
            from,
            moved,
        });
    }
}
