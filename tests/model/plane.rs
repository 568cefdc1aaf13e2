//! The data plane of one node of the model: it works with the plan it took last, and knows in which buckets connections are left.
//!
//! It accepts while the lease holds, whether its node is run or not. A bucket's number stands for some connections; by another
//! configuration it stands for others. Called by [`crate::node`] and [`crate::world`].

use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use farm_core::balance::plan::{BucketState, GroupPlan};
use farm_core::id::BUCKETS;
use farm_core::wire::heartbeat::BucketSet;

use crate::fingerprint::hasher;

/// One bit per bucket.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Bits([u64; BUCKETS / 64]);

impl Bits {
    /// No bucket.
    pub const NONE: Self = Self([0; BUCKETS / 64]);

    /// The buckets at which `test` holds.
    pub fn of(mut test: impl FnMut(usize) -> bool) -> Self {
        let mut bits = Self::NONE;
        for i in (0..BUCKETS).filter(|&i| test(i)) {
            bits.0[i / 64] |= 1 << (i % 64);
        }
        bits
    }

    /// Applies `f` to the words of both.
    pub fn with(&self, other: &Self, f: impl Fn(u64, u64) -> u64) -> Self {
        let mut bits = *self;
        for (word, other) in bits.0.iter_mut().zip(&other.0) {
            *word = f(*word, *other);
        }
        bits
    }

    /// In both.
    pub fn and(&self, other: &Self) -> Self {
        self.with(other, |a, b| a & b)
    }

    /// In one of them.
    pub fn or(&self, other: &Self) -> Self {
        self.with(other, |a, b| a | b)
    }

    /// Here and not there.
    pub fn minus(&self, other: &Self) -> Self {
        self.with(other, |a, b| a & !b)
    }

    /// Number of buckets.
    pub fn len(&self) -> usize {
        self.0.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::NONE
    }

    /// Counted from the other end.
    pub fn mirrored(&self) -> Self {
        let mut bits = *self;
        bits.0.reverse();
        bits.0.iter_mut().for_each(|word| *word = word.reverse_bits());
        bits
    }

    /// As the core takes it.
    pub fn to_set(self) -> BucketSet {
        let bits = self.0.iter().enumerate().filter(|(_, word)| **word != 0);
        bits.flat_map(|(i, word)| (0..64).filter(move |b| word & (1 << b) != 0).map(move |b| i * 64 + b))
            .collect()
    }
}

/// What the model keeps of one published plan.
#[derive(Debug)]
pub struct Sheet {
    /// The plan's number.
    pub version: u64,
    /// New connections are accepted.
    pub open: Bits,
    /// And unknown ones are reset.
    pub own: Bits,
    /// All of the plan, its number excepted.
    pub digest: u64,
}

impl std::fmt::Debug for Bits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bits({})", self.len())
    }
}

impl Sheet {
    /// Nothing is open; the plan before the first one.
    pub fn closed() -> Self {
        Self {
            version: 0,
            open: Bits::NONE,
            own: Bits::NONE,
            digest: 0,
        }
    }

    /// Of a plan of the core.
    pub fn new(version: u64, plan: &GroupPlan) -> Self {
        let mut digest = hasher();
        let states: Vec<u8> = plan.states.iter().map(|s| *s as u8).collect();
        states.hash(&mut digest);
        plan.owners.hash(&mut digest);
        plan.leaving.as_bytes().hash(&mut digest);
        plan.holders.hash(&mut digest);
        Self {
            version,
            open: Bits::of(|i| matches!(plan.states[i], BucketState::Own | BucketState::Guarded)),
            own: Bits::of(|i| plan.states[i] == BucketState::Own),
            digest: digest.finish(),
        }
    }
}

/// See the module doc.
#[derive(Clone, Debug)]
pub struct Plane {
    /// The plan at work.
    pub sheet: Arc<Sheet>,
    /// Plans it has been given and not taken yet, the oldest first.
    pub given: VecDeque<Arc<Sheet>>,
    /// Buckets that were closed here and have connections.
    pub flows: Bits,
    /// Nothing is accepted at or past this moment.
    pub lease_until: Duration,
    /// It works by another configuration: what is in a bucket here is for the others in the one that is as far from the other end.
    pub mirrored: bool,
}

impl Plane {
    /// Nothing open, no connections, no lease.
    pub fn new() -> Self {
        Self {
            sheet: Arc::new(Sheet::closed()),
            given: VecDeque::new(),
            flows: Bits::NONE,
            lease_until: Duration::ZERO,
            mirrored: false,
        }
    }

    /// Takes the next plan; with `connected` there are connections in every bucket that it closes.
    pub fn take(&mut self, connected: bool) -> Option<u64> {
        let sheet = self.given.pop_front()?;
        if connected {
            self.flows = self.flows.or(&self.sheet.open.minus(&sheet.open));
        }
        self.sheet = sheet;
        Some(self.sheet.version)
    }

    /// Buckets of which new connections are accepted at `now`, as the others number them.
    pub fn accepts(&self, now: Duration) -> Bits {
        if now < self.lease_until {
            self.for_others(self.sheet.open)
        } else {
            Bits::NONE
        }
    }

    /// Buckets in which unknown connections are reset at `now`, as the others number them.
    pub fn resets(&self, now: Duration) -> Bits {
        if now < self.lease_until {
            self.for_others(self.sheet.own)
        } else {
            Bits::NONE
        }
    }

    /// Buckets that are not open and have connections, as the others number them.
    pub fn keeps(&self) -> Bits {
        self.for_others(self.held())
    }

    /// The same as this node numbers them.
    pub fn held(&self) -> Bits {
        self.flows.minus(&self.sheet.open)
    }

    fn for_others(&self, bits: Bits) -> Bits {
        if self.mirrored { bits.mirrored() } else { bits }
    }
}
