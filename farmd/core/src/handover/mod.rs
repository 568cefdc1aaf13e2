//! Moves the buckets of one group between live nodes: propose, release, commit.
//!
//! Owns this node's part in one group: the committed map, the buckets it has *open* (accepts new flows of),
//! what it has *promised*, the buckets in which it still *holds* connections, and those it is *leaving*. It never talks:
//! [`Handover::advance`] reads the latest reports of the peers and says what changed; the reports travel in
//! heartbeats, at once when something changed. Called by [`crate::farm::Farm`] only.
//!
//! ```text
//!   coordinator                         every member (the coordinator too)
//!   shares are not what they should be
//!   propose (epoch, view, map) ───────► close what the map takes away and keep what comes for it,
//!                                       wait until the data plane works so, then
//!                                       promised = epoch
//!   all active members of the view  ◄── (report)
//!   have promised: committed = epoch ─► committed = epoch: open what the map gives; send on what
//!                                       was kept, and what comes until all data planes work so
//! ```
//!
//! What is done when is one table, [`step::next`]: the [`step::Phase`] this node is in, the [`step::Cue`] its surroundings give, and the
//! [`step::Step`] that follows. `cue.rs` reads the surroundings, `act.rs` does the steps, `guard.rs` watches who has connections where.
//!
//! Why two nodes that hear each other never have one bucket open: a bucket is opened only with a commit; a
//! commit needs the promise of every active member of the view that is not withheld (and has closed everything); a promise is made only after all that the map
//! takes away is closed, and after it nothing of an older epoch is ever opened. A node outside the view that
//! talks both ways with somebody in it blocks that one's promise until it says that it has nothing open
//! (`committed` 0) or falls silent for the detection time, by which time its own lease has closed it.
//! "Closed" always means that the data plane has confirmed it: neither a promise nor "nothing committed" nor
//! "fenced" is told before. That a map is at work is told when the data plane has confirmed that.

mod act;
mod cue;
mod guard;
pub mod moved;
pub mod step;

use std::collections::BTreeMap;

use crate::balance::assign::BucketMap;
use crate::balance::plan::{BucketState, GroupPlan};
use crate::id::{Epoch, NodeId, NodeSet};
use crate::wire::heartbeat::{BucketSet, GroupReport, MapReport};

pub use moved::Moves;
use step::{Cue, Phase, Step};

/// Most steps of one turn: shut, learn, reopen, adopt, commit, accept, commit again, and one to see that nothing is left.
const MAX_STEPS: usize = 8;

/// A peer as one group sees it.
#[derive(Clone, Copy, Debug)]
pub struct PeerGroup<'a> {
    /// It has the same configuration and may take part: its promise is asked for. Of one that may not, that it has closed everything.
    pub eligible: bool,
    /// It has stepped out.
    pub fenced: bool,
    /// It may still count on hearing this node, or is told what this one says; one that cannot has closed by then.
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
    /// This node is alone and its server is not ready. As [`Closed::Draining`], and buckets have no owner. That is no map, which would be newer than
    /// that of nodes that serve out of sight. Where there are others a map says it: what they last told of themselves may be out of date.
    Unserved,
    /// Everything: it is fenced, kept out, or stopped.
    Shut,
}

/// What is around at one moment.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Nodes that can agree with each other.
    pub view: NodeSet,
    /// The member of the view that proposes, if one may: [`crate::farm`] chooses it.
    pub coordinator: Option<NodeId>,
    /// This node's weight, 0 while it is not ready.
    pub weight: u16,
    /// This node must keep everything closed.
    pub closed: Closed,
    /// A member that runs the module, or may run it, is not heard here, and nobody passes on what it says: what it holds is not known.
    pub unheard: bool,
    /// Every peer that is heard, in the view or not, or of which others pass on what it says, and that has the module active.
    pub peers: &'a BTreeMap<NodeId, PeerGroup<'a>>,
    /// Buckets in which peers have connections that have left to be back at once, until they have said anew what they have.
    pub away: &'a BTreeMap<NodeId, &'a BucketSet>,
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
        /// Buckets that change owner against the map that this node knew.
        moved: Moves,
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

/// What waits for the data plane: `None` until the plan that does it has its number.
type Awaited = Option<u64>;

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
    /// `held` as the newest plan has it.
    held_planned: BucketSet,
    /// Closed here, and not yet open where they go: what comes for them is kept, and sent on after the commit.
    leaving: BucketSet,
    pending: Option<Pending>,
    /// The data plane may still have open what is closed here, or not know what it is to be handed, until it works with this plan.
    closing: Option<Awaited>,
    /// The data plane works with the committed map once it works with this plan.
    behind: Option<Awaited>,
    /// How everything is closed, and whether it is.
    closed: Closed,
    /// What each peer holds, and from it who holds each bucket.
    held_by: Vec<(NodeId, BucketSet)>,
    holders: BTreeMap<usize, NodeSet>,
    /// The buckets of `holders`.
    held_elsewhere: BucketSet,
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
            held_planned: BucketSet::default(),
            leaving: BucketSet::default(),
            pending: None,
            closing: None,
            behind: Some(None),
            closed: Closed::No,
            held_by: Vec::new(),
            holders: BTreeMap::new(),
            held_elsewhere: BucketSet::default(),
            wanted: None,
        }
    }

    /// Draws all conclusions from what is around. Idempotent: a second call with the same surroundings
    /// changes nothing.
    pub fn advance(&mut self, around: &Surroundings<'_>) -> Outcome {
        let mut outcome = Outcome::default();
        self.note_epochs(around);
        for _ in 0..MAX_STEPS {
            let cue = self.cue(around);
            let step = step::next(self.phase(), &cue);
            if step == Step::Rest {
                break;
            }
            self.take(step, cue, around, &mut outcome);
        }
        if self.closed == Closed::No {
            self.watch_leaving(around, &mut outcome);
        }
        // Also where nothing new is taken connections go on, and their packets have to get where they are.
        if self.closed != Closed::Shut {
            self.watch_holders(around, &mut outcome);
            // Connections that were found where none were known, by a farmd that has been restarted under them.
            outcome.plan_changed |= !self.held.is_within(&self.held_planned, &self.open);
        }
        outcome
    }

    /// Where this node stands, as far as the next step depends on it.
    pub fn phase(&self) -> Phase {
        match (
            self.closed != Closed::No,
            self.closing.is_some(),
            self.pending.is_some(),
        ) {
            (false, false, false) => Phase::Steady,
            (false, true, false) => Phase::Yielding,
            (false, true, true) => Phase::Releasing,
            (false, false, true) => Phase::Promised,
            (true, true, _) => Phase::Shutting,
            (true, false, _) => Phase::Shut,
        }
    }

    /// True if nothing is under way: the same surroundings at a later time call for nothing.
    pub fn is_at_rest(&self) -> bool {
        self.phase() == Phase::Steady
            && self.behind.is_none()
            && self.leaving.is_empty()
            && self.guarded.is_empty()
            && self.holders.is_empty()
    }

    /// The plan after the last `advance` with `plan_changed` has number `version`.
    pub fn planned(&mut self, version: u64) {
        for awaited in [&mut self.closing, &mut self.behind].into_iter().flatten() {
            awaited.get_or_insert(version);
        }
        self.held_planned.clone_from(&self.held);
    }

    /// The data plane works with plan `version`, and this host has connections in `held`, of which some are
    /// in buckets that are not open. Returns true if `advance` should run.
    pub fn handle_applied(&mut self, version: u64, held: BucketSet, connections: u32) -> bool {
        let later = |awaited: Awaited| awaited.is_none_or(|plan| plan > version);
        let mut changed = self.behind.is_some_and(|awaited| !later(awaited));
        if changed {
            self.behind = None;
        }
        if self.closing.is_some_and(later) {
            // This plan still had open what has been closed since; what it found is out of date.
            return changed;
        }
        changed |= held != self.held;
        self.held = held;
        self.held_connections = connections;
        if step::next(self.phase(), &Cue::Applied) == Step::Confirm {
            self.confirm();
            changed = true;
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

    /// True while a proposal of this node waits for promises or has not been committed: nobody else would finish it.
    pub fn is_proposing(&self) -> bool {
        let pending = self.pending.as_ref();
        pending.is_some_and(|p| p.weights.is_some() && p.epoch > self.committed)
    }

    /// True if what this node has given up is open where it went, in the data plane there, and nobody gives it to this node any more.
    pub fn has_left(&self) -> bool {
        self.leaving.is_empty()
    }

    /// True if the data plane works with the map known here, and has counted connections by it.
    pub fn is_at_work(&self) -> bool {
        self.behind.is_none()
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

    /// The newest proposal that this node has promised, or a number above it that is nobody's proposal.
    pub fn promised(&self) -> Epoch {
        self.promised
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
            behind: self.behind.is_some(),
            open: self.open.len() as u16,
            held: self.held.clone(),
            held_connections: self.held_connections,
            map,
        }
    }

    /// Bucket states for the data plane.
    pub fn plan(&self, name: String) -> GroupPlan {
        let mut plan = GroupPlan::closed(name);
        if self.closed != Closed::Unserved {
            plan.owners = self.map.clone();
        }
        plan.holders.clone_from(&self.holders);
        if self.closed == Closed::Shut {
            plan.shut = true;
            return plan;
        }
        plan.leaving.clone_from(&self.leaving);
        let (open, held) = (self.open.as_bytes(), self.held.as_bytes());
        let foreign_flows = self.guarded.as_bytes().iter().zip(self.held_elsewhere.as_bytes());
        let bits = open.iter().zip(held).zip(foreign_flows);
        for (states, ((open, held), (guarded, elsewhere))) in plan.states.chunks_exact_mut(8).zip(bits) {
            for (bit, state) in states.iter_mut().enumerate() {
                let is_in = |bits: u8| bits & (1 << bit) != 0;
                *state = match (is_in(*open), is_in(guarded | elsewhere), is_in(*held)) {
                    (true, true, _) => BucketState::Guarded,
                    (true, false, _) => BucketState::Own,
                    (false, _, true) => BucketState::Draining,
                    (false, _, false) => BucketState::Foreign,
                };
            }
        }
        plan
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
}

#[cfg(test)]
mod tests;
