//! What stands for the data plane of one simulated node: it works with the last plan it was given, some time later, and counts the
//! connections that are left in buckets it no longer owns.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::balance::assign::BucketMap;
use crate::balance::plan::{BucketState, GroupPlan};
use crate::id::{BUCKETS, NodeId};
use crate::wire::heartbeat::BucketSet;

const WORDS: usize = BUCKETS / 64;

/// One bit per bucket.
#[derive(Clone, PartialEq, Eq)]
pub struct Bits([u64; WORDS]);

impl Bits {
    pub const NONE: Self = Self([0; WORDS]);

    pub fn contains(&self, bucket: usize) -> bool {
        self.0[bucket / 64] & (1 << (bucket % 64)) != 0
    }

    pub fn insert(&mut self, bucket: usize) {
        self.0[bucket / 64] |= 1 << (bucket % 64);
    }

    pub fn len(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    pub fn meets(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).any(|(a, b)| a & b != 0)
    }

    pub fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a |= b);
    }

    /// Those that are not in `other`.
    pub fn without(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & !other.0[i]))
    }

    pub fn both(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] & other.0[i]))
    }

    pub fn iter(&self) -> impl Iterator<Item = usize> {
        let words = self.0.iter().enumerate().filter(|(_, w)| **w != 0);
        words.flat_map(|(i, w)| (0..64).filter(move |b| w & (1 << b) != 0).map(move |b| i * 64 + b))
    }
}

/// See the module doc.
pub struct Plane {
    /// Version of the plan at work.
    pub version: u64,
    /// Buckets whose new connections are accepted, while the lease holds.
    pub open: Bits,
    /// Those of them in which an unknown connection is reset.
    pub own: Bits,
    /// Buckets that are another's, in which connections of this host go on.
    pub draining: Bits,
    /// Buckets whose connection requests are kept for the next plan.
    pub keeps: Bits,
    /// Buckets whose connection requests are sent on to their owner in `owners`.
    pub sends_on: Bits,
    /// Whatever a member sends on is kept: the module is known.
    pub takes: bool,
    /// The map of the plan.
    pub owners: BucketMap,
    /// Buckets of connections on this host, and when the last of these ends.
    pub flows: BTreeMap<usize, Duration>,
    /// What was last reported as held, and when that was last something.
    pub told: BucketSet,
    pub held_at: Duration,
    /// Nothing is accepted past this moment.
    pub lease_until: Duration,
    /// Plans before this one are of a module that has been stopped since.
    pub not_before: u64,
    /// When the plan that was given last is at work.
    pub busy_until: Duration,
}

impl Plane {
    pub fn new() -> Self {
        Self {
            version: 0,
            open: Bits::NONE,
            own: Bits::NONE,
            draining: Bits::NONE,
            keeps: Bits::NONE,
            sends_on: Bits::NONE,
            takes: false,
            owners: BucketMap::default(),
            flows: BTreeMap::new(),
            told: BucketSet::default(),
            held_at: Duration::ZERO,
            lease_until: Duration::ZERO,
            not_before: 0,
            busy_until: Duration::ZERO,
        }
    }

    /// Works with `plan` of node `this` from here on; returns the buckets that it takes away.
    pub fn apply(&mut self, this: NodeId, version: u64, plan: Option<&GroupPlan>) -> Bits {
        let before = self.open.clone();
        self.clear();
        self.version = version;
        if let Some(plan) = plan.filter(|_| version >= self.not_before) {
            for (word, states) in plan.states.chunks_exact(64).enumerate() {
                let bits = |wanted: BucketState| {
                    let one = |(bit, state): (usize, &BucketState)| u64::from(*state == wanted) << bit;
                    states.iter().enumerate().map(one).sum::<u64>()
                };
                self.own.0[word] = bits(BucketState::Own);
                self.open.0[word] = self.own.0[word] | bits(BucketState::Guarded);
                self.draining.0[word] = bits(BucketState::Draining);
            }
            // As `balance::decide` has it for a connection request.
            self.owners.clone_from(&plan.owners);
            for i in plan.leaving.iter().filter(|i| !self.open.contains(*i)) {
                match plan.owners.owner_at(i).filter(|owner| *owner != this) {
                    Some(_) => self.sends_on.insert(i),
                    None => self.keeps.insert(i),
                }
            }
            self.takes = true;
        }
        before.without(&self.open)
    }

    /// Accepts nothing.
    pub fn clear(&mut self) {
        self.open = Bits::NONE;
        self.own = Bits::NONE;
        self.draining = Bits::NONE;
        self.keeps = Bits::NONE;
        self.sends_on = Bits::NONE;
        self.takes = false;
    }

    /// Buckets that are not open here and have connections at `now`.
    pub fn held(&self, now: Duration) -> BucketSet {
        let held = self.flows.iter().filter(|(_, end)| **end > now).map(|(i, _)| *i);
        held.filter(|i| !self.open.contains(*i)).collect()
    }

    /// Notes that `told` is told at `now`.
    pub fn note_held(&mut self, now: Duration) {
        if !self.told.is_empty() {
            self.held_at = now;
        }
    }

    /// True if new connections in `bucket` are accepted at `now`.
    pub fn accepts(&self, now: Duration, bucket: usize) -> bool {
        now < self.lease_until && self.open.contains(bucket)
    }

    /// True if packets of a connection that this host has in `bucket` get through.
    pub fn serves(&self, now: Duration, bucket: usize) -> bool {
        now < self.lease_until && (self.open.contains(bucket) || self.draining.contains(bucket))
    }

    /// Number of buckets that are open.
    pub fn open_count(&self) -> usize {
        self.open.len()
    }

    /// Number of buckets that are open and not guarded.
    pub fn own_count(&self) -> usize {
        self.own.len()
    }
}
