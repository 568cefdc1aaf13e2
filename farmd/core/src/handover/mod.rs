//! Moves the buckets of one group between live nodes: propose, release, commit.
//!
//! Owns this node's part in one group: the committed map, the buckets it has *open* (accepts new flows of),
//! what it has *promised*, and the buckets in which it still *holds* connections. It never talks:
//! [`Handover::advance`] reads the latest reports of the peers and says what changed; the reports travel in
//! heartbeats, at once when something changed. Called by [`crate::farm::Farm`] only.
//!
//! ```text
//!   coordinator                         every member (the coordinator too)
//!   shares are not what they should be
//!   propose (epoch, view, map) ───────► close what the map takes away, keep connection requests for
//!                                       what it gives, wait until the data plane works so, then
//!                                       promised = epoch
//!   all active members of the view  ◄── (report)
//!   have promised: committed = epoch ─► committed = epoch: open what the map gives
//! ```
//!
//! Why two nodes that hear each other never have one bucket open: a bucket is opened only with a commit; a
//! commit needs the promise of every active member of the view; a promise is made only after all that the map
//! takes away is closed, and after it nothing of an older epoch is ever opened. A node outside the view that
//! talks both ways with somebody in it blocks that one's promise until it says that it has nothing open
//! (`committed` 0) or falls silent for the detection time, by which time its own lease has closed it.
//! "Closed" always means that the data plane has confirmed it: neither a promise nor "nothing committed" nor
//! "fenced" is told before.

pub mod moved;

use std::collections::BTreeMap;

use crate::balance::assign::{BucketMap, assign};
use crate::balance::plan::{BucketState, GroupPlan};
use crate::id::{BUCKETS, Epoch, NodeId, NodeSet};
use crate::wire::heartbeat::{BucketSet, GroupReport, MapReport};

pub use moved::Moves;

/// A peer as one group sees it.
#[derive(Clone, Copy, Debug)]
pub struct PeerGroup<'a> {
    /// It has the same configuration and may take part.
    pub eligible: bool,
    /// It has stepped out.
    pub fenced: bool,
    /// It hears this node. With one that does not nothing can be agreed.
    pub hears_us: bool,
    /// Its latest report.
    pub report: &'a GroupReport,
}

/// Whether a node keeps its buckets closed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Closed {
    /// No.
    No,
    /// It takes nothing new; its connections go on.
    Draining,
    /// Everything: it is fenced, kept out, or stopped.
    Shut,
}

/// What is around at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Nodes that all hear each other.
    pub view: NodeSet,
    /// The member of the view that proposes: the lowest that is active, eligible and not joining.
    pub coordinator: Option<NodeId>,
    /// This node's weight, 0 while it is not ready.
    pub weight: u16,
    /// This node must keep everything closed.
    pub closed: Closed,
    /// A member that runs the module is not heard here: what it holds is not known.
    pub unheard: bool,
    /// Every peer that is heard and has the module active, in the view or not.
    pub peers: &'a BTreeMap<NodeId, PeerGroup<'a>>,
}

/// A proposal this node follows, or its own.
#[derive(Clone, Debug)]
struct Pending {
    epoch: Epoch,
    view: NodeSet,
    map: BucketMap,
    /// Epoch of the map known here when it came.
    base: Epoch,
    /// Weights it was made for; only at its proposer.
    weights: Option<BTreeMap<NodeId, u16>>,
}

/// A change worth a line in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// This node proposes a map.
    Proposed {
        /// Its version.
        epoch: Epoch,
        /// For whom.
        view: NodeSet,
        /// Buckets that change owner.
        moves: usize,
    },
    /// This node follows a coordinator's proposal.
    Accepted {
        /// Its version.
        epoch: Epoch,
        /// Who proposes it.
        by: NodeId,
        /// For whom.
        view: NodeSet,
    },
    /// This node takes over a map that was agreed without it.
    Adopted {
        /// Its version.
        epoch: Epoch,
        /// Buckets of each owner.
        counts: BTreeMap<NodeId, u32>,
    },
    /// This node works with a new map.
    Committed {
        /// Its version.
        epoch: Epoch,
        /// Buckets of each owner.
        counts: BTreeMap<NodeId, u32>,
        /// Buckets opened here.
        gained: usize,
        /// Who had them before.
        from: NodeSet,
        /// Buckets that change owner against the map before.
        moved: Moves,
    },
    /// This node has closed buckets for a proposal.
    Released {
        /// The proposal.
        epoch: Epoch,
        /// How many.
        lost: usize,
        /// Who gets how many of them; those that nobody gets are missing here.
        to: BTreeMap<NodeId, u32>,
    },
    /// Everything is closed.
    Shut,
}

/// What [`Handover::advance`] did.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Bucket states differ: the data plane needs a new plan.
    pub plan_changed: bool,
    /// Peers should know at once.
    pub send: bool,
    /// For the log.
    pub events: Vec<Event>,
}

/// See the module doc.
#[derive(Clone, Debug)]
pub struct Handover {
    this: NodeId,
    committed: Epoch,
    map: BucketMap,
    /// Epoch of `map`; above `committed` after everything was shut.
    known: Epoch,
    promised: Epoch,
    highest: Epoch,
    open: BucketSet,
    guarded: BucketSet,
    /// The commit that opened the newest of `guarded`.
    guarded_at: Epoch,
    held: BucketSet,
    held_connections: u32,
    pending: Option<Pending>,
    /// The data plane may still have open what is closed here, or not yet keep requests for what is to be opened, until it works
    /// with this plan; `Some(None)` until the plan has its number.
    closing: Option<Option<u64>>,
    shut: bool,
    /// While shut, connections go on.
    draining: bool,
    /// What each peer holds, and from it who holds each bucket.
    held_by: BTreeMap<NodeId, BucketSet>,
    holders: BTreeMap<usize, NodeSet>,
    wanted: Option<(BTreeMap<NodeId, u16>, Epoch, BucketMap)>,
}

impl Handover {
    /// A group of which nothing is known yet.
    pub fn new(this: NodeId) -> Self {
        Self {
            this,
            committed: Epoch::default(),
            map: BucketMap::default(),
            known: Epoch::default(),
            promised: Epoch::default(),
            highest: Epoch::default(),
            open: BucketSet::default(),
            guarded: BucketSet::default(),
            guarded_at: Epoch::default(),
            held: BucketSet::default(),
            held_connections: 0,
            pending: None,
            closing: None,
            shut: false,
            draining: false,
            held_by: BTreeMap::new(),
            holders: BTreeMap::new(),
            wanted: None,
        }
    }

    /// Draws all conclusions from what is around. Idempotent: a second call with the same surroundings
    /// changes nothing.
    pub fn advance(&mut self, around: &Surroundings<'_>) -> Outcome {
        let mut outcome = Outcome::default();
        let reports = around.peers.values().map(|p| p.report);
        let seen = reports.flat_map(|r| {
            [
                r.promised,
                r.committed,
                r.map.as_ref().map_or(Epoch::default(), |m| m.epoch),
            ]
        });
        self.highest = seen.fold(self.highest, Epoch::max);
        if around.closed != Closed::No || (self.shut && self.closing.is_some()) {
            if around.closed != Closed::No {
                let draining = around.closed == Closed::Draining;
                outcome.plan_changed |= draining != self.draining;
                self.draining = draining;
            }
            self.shut_all(&mut outcome);
            self.learn(around, &mut outcome);
            return outcome;
        }
        if self.shut {
            self.shut = false;
            self.draining = false;
            outcome.send = true;
            self.committed = Epoch::default();
            outcome.plan_changed |= !self.held.is_empty();
        }
        self.learn(around, &mut outcome);
        self.adopt_known(&mut outcome);
        // A commit and the next proposal may come in one report; what was promised is opened before it is closed again, or nobody would keep its requests.
        self.commit_with_others(around, &mut outcome);
        self.follow(around, &mut outcome);
        self.coordinate(around, &mut outcome);
        self.commit_with_others(around, &mut outcome);
        self.watch_holders(around, &mut outcome);
        outcome
    }

    /// The plan with the released buckets has number `version`; called after an `advance` with
    /// `plan_changed`.
    pub fn planned(&mut self, version: u64) {
        if let Some(awaited @ None) = &mut self.closing {
            *awaited = Some(version);
        }
    }

    /// The data plane works with plan `version`, and this host has connections in `held`, of which some are
    /// in buckets that are not open. Returns true if `advance` should run.
    pub fn handle_applied(&mut self, version: u64, held: BucketSet, connections: u32) -> bool {
        if self.closing.is_some_and(|plan| plan.is_none_or(|plan| plan > version)) {
            // This plan still had open what has been closed since; what it found is out of date.
            return false;
        }
        let mut changed = held != self.held;
        self.held = held;
        self.held_connections = connections;
        if self.closing.take().is_some() {
            changed = true;
            if let Some(pending) = &self.pending {
                self.promised = self.promised.max(pending.epoch);
            }
        }
        changed
    }

    /// True if nothing is open here, in the data plane either, so that the module may stop.
    pub fn is_released(&self) -> bool {
        self.open.is_empty() && self.closing.is_none()
    }

    /// True if a proposal that is under way gives this node buckets: their losers have closed them, or are about to.
    pub fn is_to_gain(&self) -> bool {
        let pending = self.pending.as_ref().filter(|p| p.epoch > self.committed);
        pending.is_some_and(|p| !self.has_open_all_of(&p.map))
    }

    /// Connections in buckets that this node does not own.
    pub fn held_connections(&self) -> u32 {
        self.held_connections
    }

    /// Buckets in which they are.
    pub fn held(&self) -> &BucketSet {
        &self.held
    }

    /// Buckets open here.
    pub fn open_count(&self) -> usize {
        self.open.len()
    }

    /// The map this node works with.
    pub fn map(&self) -> &BucketMap {
        &self.map
    }

    /// Epoch of the committed map.
    pub fn committed(&self) -> Epoch {
        self.committed
    }

    /// What to tell the others. `with_map`: a peer lacks the committed map and this node is the one to send
    /// it.
    pub fn report(&self, weight: u16, with_map: bool) -> GroupReport {
        let proposal = self
            .pending
            .as_ref()
            .filter(|p| p.weights.is_some() && p.epoch > self.committed);
        let map = match proposal {
            Some(p) => Some(MapReport {
                epoch: p.epoch,
                view: p.view,
                map: p.map.clone(),
            }),
            None if with_map && self.committed > Epoch::default() => Some(MapReport {
                epoch: self.committed,
                view: NodeSet::EMPTY,
                map: self.map.clone(),
            }),
            None => None,
        };
        GroupReport {
            weight,
            promised: self.promised,
            committed: self.committed,
            open: self.open.len() as u16,
            held: self.held.clone(),
            held_connections: self.held_connections,
            map,
        }
    }

    /// Bucket states for the data plane.
    pub fn plan(&self, name: String) -> GroupPlan {
        let mut plan = GroupPlan::closed(name);
        plan.owners = self.map.clone();
        plan.holders.clone_from(&self.holders);
        if self.shut && !self.draining {
            return plan;
        }
        plan.next = self
            .pending
            .as_ref()
            .filter(|p| p.epoch > self.committed)
            .map(|p| p.map.clone());
        for (index, state) in plan.states.iter_mut().enumerate() {
            *state = if self.open.contains(index) {
                let foreign_flows = self.guarded.contains(index) || self.holders.contains_key(&index);
                if foreign_flows {
                    BucketState::Guarded
                } else {
                    BucketState::Own
                }
            } else if self.held.contains(index) {
                BucketState::Draining
            } else {
                BucketState::Foreign
            };
        }
        plan
    }

    /// True if every bucket that `map` gives this node is open here.
    fn has_open_all_of(&self, map: &BucketMap) -> bool {
        let owners = map.as_bytes().chunks_exact(8).zip(self.open.as_bytes());
        let this = self.this.as_u8();
        owners.into_iter().all(|(owners, open)| {
            let mine = owners
                .iter()
                .rev()
                .fold(0, |bits, owner| bits << 1 | u8::from(*owner == this));
            mine & !open == 0
        })
    }

    fn shut_all(&mut self, outcome: &mut Outcome) {
        let opened = !self.open.is_empty();
        if opened {
            self.hold_open_ones();
            self.open = BucketSet::default();
            self.guarded = BucketSet::default();
            self.closing = Some(None);
            outcome.events.push(Event::Shut);
        }
        if !self.shut {
            outcome.plan_changed = true;
            self.withdraw_promise();
        }
        self.shut = true;
        self.pending = None;
        // Who reads "nothing committed" takes it that nothing is open; so that waits for the data plane.
        let forget = self.closing.is_none() && self.committed != Epoch::default();
        if forget {
            self.committed = Epoch::default();
        }
        outcome.send |= outcome.plan_changed || forget;
    }

    /// What was promised last is not kept to: the number that is told instead is nobody's proposal, and every
    /// later proposal is above it.
    fn withdraw_promise(&mut self) {
        if self.promised > Epoch::default() {
            self.promised = self.highest.max(self.promised).next(self.this);
            self.highest = self.promised;
        }
    }

    /// The module has stopped: nothing is open or known any more, but no number is used twice.
    pub fn stop(&mut self) {
        self.withdraw_promise();
        *self = Self {
            highest: self.highest,
            promised: self.promised,
            ..Self::new(self.this)
        };
    }

    /// What was open may carry connections; nobody has looked yet.
    fn hold_open_ones(&mut self) {
        let held = self.held.iter().chain(self.open.iter()).collect();
        self.held = held;
    }

    /// Takes over a committed map that this node has not taken part in.
    fn learn(&mut self, around: &Surroundings<'_>, outcome: &mut Outcome) {
        let newest = around
            .peers
            .values()
            .filter(|p| p.eligible)
            .filter_map(|p| p.report.map.as_ref().filter(|m| m.epoch == p.report.committed))
            .max_by_key(|m| m.epoch)
            .filter(|m| m.epoch > self.known);
        let Some(newest) = newest else { return };
        // This one comes by commit, and is opened then.
        if self.pending.as_ref().is_some_and(|p| p.epoch == newest.epoch) {
            return;
        }
        let lost: Vec<usize> = self.open.iter().filter(|&i| !newest.map.owns(self.this, i)).collect();
        if !lost.is_empty() {
            outcome.events.push(Event::Released {
                epoch: newest.epoch,
                lost: lost.len(),
                to: moved::heirs(&newest.map, lost.iter().copied()),
            });
            self.close(lost.into_iter().collect());
            self.closing = Some(None);
        }
        self.map = newest.map.clone();
        self.known = newest.epoch;
        outcome.events.push(Event::Adopted {
            epoch: self.known,
            counts: self.map.counts(),
        });
        // An older proposal must not come back by a commit seen late.
        self.pending = self.pending.take().filter(|p| p.epoch > self.known);
        outcome.plan_changed = true;
        outcome.send = true;
    }

    /// A map that gives this node nothing beyond what it has open needs no hand-over.
    fn adopt_known(&mut self, outcome: &mut Outcome) {
        if self.committed < self.known && self.has_open_all_of(&self.map) {
            self.committed = self.known;
            self.promised = self.promised.max(self.known);
            outcome.send = true;
        }
    }

    /// True if every node with which this one talks both ways and that may have buckets open is in `view`.
    fn covers_all_that_serve(around: &Surroundings<'_>, view: NodeSet) -> bool {
        around
            .peers
            .iter()
            .all(|(n, p)| view.contains(*n) || p.fenced || !p.hears_us || p.report.committed == Epoch::default())
    }

    fn follow(&mut self, around: &Surroundings<'_>, outcome: &mut Outcome) {
        let Some(coordinator) = around.coordinator.filter(|c| *c != self.this) else {
            return;
        };
        let Some(peer) = around.peers.get(&coordinator) else {
            return;
        };
        let Some(proposal) = &peer.report.map else { return };
        let is_new = proposal.epoch > self.promised
            && proposal.epoch > peer.report.committed
            && self.pending.as_ref().is_none_or(|p| p.epoch < proposal.epoch);
        if is_new && proposal.view.contains(self.this) && Self::covers_all_that_serve(around, proposal.view) {
            outcome.events.push(Event::Accepted {
                epoch: proposal.epoch,
                by: coordinator,
                view: proposal.view,
            });
            self.accept(proposal.clone(), None, outcome);
        }
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
            self.close(lost);
            self.closing = Some(None);
        }
        // Who gives up a bucket sends on what it has kept when the map is committed, and drops what comes later: by then the data plane
        // here must be keeping requests for it. What a node outside the view had needs no wait: nobody is there to give it up.
        let taken = |i: usize| map.owns(self.this, i) && !self.open.contains(i);
        let given_up = |i: usize| self.map.owner_at(i).is_none_or(|n| n == self.this || view.contains(n));
        if (0..BUCKETS).any(|i| taken(i) && given_up(i)) {
            self.closing = Some(None);
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
        // The data plane keeps connection requests for what may be opened soon.
        outcome.plan_changed = true;
        outcome.send = true;
    }

    fn close(&mut self, lost: BucketSet) {
        let keep = |set: &BucketSet| set.iter().filter(|i| !lost.contains(*i)).collect();
        self.open = keep(&self.open);
        self.guarded = keep(&self.guarded);
        self.held = self.held.iter().chain(lost.iter()).collect();
    }

    fn coordinate(&mut self, around: &Surroundings<'_>, outcome: &mut Outcome) {
        if around.coordinator != Some(self.this) {
            if let Some(pending) = &mut self.pending {
                pending.weights = None;
            }
            return;
        }
        let members: BTreeMap<NodeId, PeerGroup<'_>> = around
            .peers
            .iter()
            .filter(|(n, p)| around.view.contains(**n) && p.eligible)
            .map(|(n, p)| (*n, *p))
            .collect();
        // Whoever knows a newer map sends it; deciding on an older one would move buckets for nothing.
        if members.values().any(|p| p.report.committed > self.known) {
            return;
        }
        let mut weights: BTreeMap<NodeId, u16> = members.iter().map(|(n, p)| (*n, p.report.weight)).collect();
        weights.insert(self.this, around.weight);
        weights.retain(|_, w| *w > 0);

        let outstanding = self
            .pending
            .as_ref()
            .filter(|p| p.weights.is_some() && p.epoch > self.committed);
        let propose = match outstanding {
            Some(p) => {
                p.weights.as_ref() != Some(&weights)
                    || p.view != around.view
                    || p.epoch < self.highest
                    || p.base < self.known
            }
            None => {
                self.find_wanted(&weights);
                let fits = self.wanted.as_ref().is_some_and(|(.., wanted)| *wanted == self.map);
                let behind =
                    |p: &PeerGroup<'_>| p.report.committed != self.committed && p.report.promised != self.committed;
                // It has closed buckets for a proposal that came to nothing, because its coordinator no longer is one.
                let promised_more = |p: &PeerGroup<'_>| p.report.promised > self.committed;
                let lagging = members.values().any(|p| behind(p) || promised_more(p)) && {
                    let shares = self.map.counts();
                    members.iter().any(|(n, p)| {
                        let share = shares.get(n).copied().unwrap_or(0);
                        (behind(p) && share > 0) || (promised_more(p) && u32::from(p.report.open) < share)
                    })
                };
                let self_lagging = !self.has_open_all_of(&self.map);
                !fits || lagging || self_lagging || (self.committed == Epoch::default() && !weights.is_empty())
            }
        };
        if propose && Self::covers_all_that_serve(around, around.view) {
            let map = self.find_wanted(&weights).clone();
            let epoch = self.highest.next(self.this);
            outcome.events.push(Event::Proposed {
                epoch,
                view: around.view,
                moves: self.map.moves_to(&map),
            });
            self.accept(
                MapReport {
                    epoch,
                    view: around.view,
                    map,
                },
                Some(weights),
                outcome,
            );
        }
        let Some(pending) = self
            .pending
            .as_ref()
            .filter(|p| p.weights.is_some() && p.epoch > self.committed)
        else {
            return;
        };
        let all_promised = self.closing.is_none()
            && self.promised == pending.epoch
            && members.values().all(|p| p.report.promised == pending.epoch);
        if all_promised && pending.view == around.view && Self::covers_all_that_serve(around, pending.view) {
            self.commit(outcome);
        }
    }

    /// The best map for `weights`, computed once per change.
    fn find_wanted(&mut self, weights: &BTreeMap<NodeId, u16>) -> &BucketMap {
        let fresh = self.wanted.take().filter(|(w, e, _)| w == weights && *e == self.known);
        let known = self.known;
        let map = &self.map;
        let entry = fresh.unwrap_or_else(|| (weights.clone(), known, assign(map, weights)));
        &self.wanted.insert(entry).2
    }

    fn commit_with_others(&mut self, around: &Surroundings<'_>, outcome: &mut Outcome) {
        let Some(pending) = &self.pending else { return };
        let done = pending.epoch > self.committed.max(self.known)
            && self.closing.is_none()
            && self.promised == pending.epoch
            && around.peers.values().any(|p| p.report.committed == pending.epoch);
        if done {
            self.commit(outcome);
        }
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

    /// Notes which peers have connections where, and ends the guard of buckets in which nobody has any.
    fn watch_holders(&mut self, around: &Surroundings<'_>, outcome: &mut Outcome) {
        let held = || {
            around
                .peers
                .iter()
                .filter(|(_, p)| !p.report.held.is_empty())
                .map(|(n, p)| (n, &p.report.held))
        };
        if !held().eq(self.held_by.iter()) {
            self.held_by = held().map(|(node, set)| (*node, set.clone())).collect();
            self.holders = BTreeMap::new();
            for (node, index) in self
                .held_by
                .iter()
                .flat_map(|(node, set)| set.iter().map(|index| (*node, index)))
            {
                self.holders.entry(index).or_default().insert(node);
            }
            outcome.plan_changed = true;
        }
        // One that has served by another map, on the other side of a cut, may have connections in whatever is open here.
        let strange = around.peers.values().filter(|p| p.eligible && !p.fenced).any(|p| {
            let (committed, promised) = (p.report.committed, p.report.promised);
            committed > Epoch::default()
                && ![self.committed, self.promised].contains(&committed)
                && promised != self.committed
        });
        if strange && self.guarded != self.open {
            self.guarded = self.open.clone();
            outcome.plan_changed = true;
        }
        // A peer's word on what it holds counts only if it was given after it released what was opened here.
        let all_released = !strange
            && !around.unheard
            && around
                .peers
                .values()
                .filter(|p| p.eligible && !p.fenced)
                .all(|p| p.report.promised >= self.guarded_at);
        if all_released && !self.guarded.is_empty() {
            let left: BucketSet = self.guarded.iter().filter(|i| self.holders.contains_key(i)).collect();
            if left != self.guarded {
                self.guarded = left;
                outcome.plan_changed = true;
            }
        }
    }
}

#[cfg(test)]
mod tests;
