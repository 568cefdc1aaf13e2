//! What stands for the data plane of one simulated node: it works with the last plan it was given, some time later, and counts the
//! connections that are left in buckets it no longer owns.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::balance::plan::{BucketState, GroupPlan};
use crate::id::BUCKETS;
use crate::wire::heartbeat::BucketSet;

/// One bit per bucket.
pub type Bits = [u64; BUCKETS / 64];

/// Buckets in which both are set.
pub fn common(a: &Bits, b: &Bits) -> impl Iterator<Item = usize> {
    let words = a.iter().zip(b.iter()).enumerate();
    let words: Vec<(usize, u64)> = words.map(|(i, (a, b))| (i, a & b)).filter(|(_, w)| *w != 0).collect();
    words
        .into_iter()
        .flat_map(|(i, word)| (0..64).filter(move |b| word & (1 << b) != 0).map(move |b| i * 64 + b))
}

/// See the module doc.
pub struct Plane {
    /// Version of the plan at work.
    pub version: u64,
    /// Buckets whose new connections are accepted, while the lease holds.
    pub open: Bits,
    /// Those of them in which an unknown connection is reset.
    pub own: Bits,
    /// Buckets of connections on this host, and when these end.
    pub flows: BTreeMap<usize, Duration>,
    /// What was last reported as held.
    pub told: BucketSet,
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
            open: [0; BUCKETS / 64],
            own: [0; BUCKETS / 64],
            flows: BTreeMap::new(),
            told: BucketSet::default(),
            lease_until: Duration::ZERO,
            not_before: 0,
            busy_until: Duration::ZERO,
        }
    }

    /// Works with `plan` from here on; returns the buckets that it takes away.
    pub fn apply(&mut self, version: u64, plan: Option<&GroupPlan>) -> Vec<usize> {
        let before = self.open;
        self.clear();
        self.version = version;
        if let Some(plan) = plan.filter(|_| version >= self.not_before) {
            for (i, state) in plan.states.iter().enumerate() {
                let bit = 1 << (i % 64);
                match state {
                    BucketState::Own => {
                        self.open[i / 64] |= bit;
                        self.own[i / 64] |= bit;
                    }
                    BucketState::Guarded => self.open[i / 64] |= bit,
                    BucketState::Draining | BucketState::Foreign => {}
                }
            }
        }
        let lost: Vec<u64> = before.iter().zip(&self.open).map(|(b, a)| b & !a).collect();
        (0..BUCKETS).filter(|i| lost[i / 64] & (1 << (i % 64)) != 0).collect()
    }

    /// Accepts nothing.
    pub fn clear(&mut self) {
        self.open = [0; BUCKETS / 64];
        self.own = [0; BUCKETS / 64];
    }

    /// Buckets that are not open here and have connections at `now`.
    pub fn held(&self, now: Duration) -> BucketSet {
        let held = self.flows.iter().filter(|(_, end)| **end > now).map(|(i, _)| *i);
        held.filter(|i| self.open[i / 64] & (1 << (i % 64)) == 0).collect()
    }

    /// True if new connections in `bucket` are accepted at `now`.
    pub fn accepts(&self, now: Duration, bucket: usize) -> bool {
        now < self.lease_until && self.open[bucket / 64] & (1 << (bucket % 64)) != 0
    }

    /// Number of buckets that are open.
    pub fn open_count(&self) -> usize {
        self.open.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Number of buckets that are open and not guarded.
    pub fn own_count(&self) -> usize {
        self.own.iter().map(|w| w.count_ones() as usize).sum()
    }
}
