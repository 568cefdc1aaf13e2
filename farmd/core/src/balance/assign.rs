//! Deals buckets to nodes: exact shares, and under that the fewest moves.
//!
//! [`assign`] is a pure function of (previous map, weights). Shares are exact by the largest remainder: each node gets
//! `floor(4096·w/W)` buckets and the rest go to the largest remainders, ties first to a node that owns more
//! than its floor already (that spares a move), then to the lowest id. A bucket moves only if its owner is gone or over its share, so the number of
//! moves is the least possible: orphans plus surplus.

use std::collections::BTreeMap;
use std::fmt;

use crate::id::{BUCKETS, Bucket, MAX_NODES, NodeId, NodeSet};

/// The byte that says "nobody".
const NOBODY: u8 = 0xff;

/// Owner of each bucket of one group.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct BucketMap(Box<[u8; BUCKETS]>);

impl Default for BucketMap {
    fn default() -> Self {
        Self(Box::new([NOBODY; BUCKETS]))
    }
}

impl fmt::Debug for BucketMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.counts()).finish()
    }
}

impl BucketMap {
    /// A map from one byte per bucket: a node, or 255 for nobody. `None` if a byte is neither.
    pub fn from_bytes(bytes: Box<[u8; BUCKETS]>) -> Option<Self> {
        bytes
            .iter()
            .all(|&b| b == NOBODY || NodeId::new(b.into()).is_some())
            .then_some(Self(bytes))
    }

    /// One byte per bucket.
    pub fn as_bytes(&self) -> &[u8; BUCKETS] {
        &self.0
    }

    /// Owner of `bucket`, if anybody.
    pub fn owner(&self, bucket: Bucket) -> Option<NodeId> {
        self.owner_at(bucket.index())
    }

    /// Owner of the bucket at `index`, below 4096.
    pub fn owner_at(&self, index: usize) -> Option<NodeId> {
        match self.0[index] {
            NOBODY => None,
            node => NodeId::new(node.into()),
        }
    }

    /// True if `node` owns the bucket at `index`.
    pub fn owns(&self, node: NodeId, index: usize) -> bool {
        self.0[index] == node.as_u8()
    }

    /// Number of buckets of each owner.
    pub fn counts(&self) -> BTreeMap<NodeId, u32> {
        let mut counts = [0; 1 + NOBODY as usize];
        for &owner in self.0.iter() {
            counts[usize::from(owner)] += 1;
        }
        let owners = (0..MAX_NODES).filter_map(NodeId::new);
        owners.map(|n| (n, counts[n.index()])).filter(|(_, n)| *n > 0).collect()
    }

    /// Everybody who owns something.
    pub fn owners(&self) -> NodeSet {
        self.counts().into_keys().collect()
    }

    /// Number of buckets with another owner in `other`.
    pub fn moves_to(&self, other: &Self) -> usize {
        self.0.iter().zip(other.0.iter()).filter(|(a, b)| a != b).count()
    }
}

/// Exact shares for `weights` by the largest remainder; ties go to who has more than the floor in `have`, then to the lowest id.
fn shares(weights: &BTreeMap<NodeId, u16>, have: &BTreeMap<NodeId, u32>) -> BTreeMap<NodeId, u32> {
    let total: u64 = weights.values().map(|&w| u64::from(w)).sum();
    if total == 0 {
        return BTreeMap::new();
    }
    let mut shares = BTreeMap::new();
    let mut rest = Vec::new();
    for (&node, &weight) in weights.iter().filter(|(_, w)| **w > 0) {
        let product = BUCKETS as u64 * u64::from(weight);
        shares.insert(node, (product / total) as u32);
        let has_one_more = u64::from(have.get(&node).copied().unwrap_or(0)) > product / total;
        rest.push((
            std::cmp::Reverse(product % total),
            std::cmp::Reverse(has_one_more),
            node,
        ));
    }
    rest.sort();
    let missing = BUCKETS as u32 - shares.values().sum::<u32>();
    for (_, _, node) in rest.iter().cycle().take(missing as usize) {
        if let Some(share) = shares.get_mut(node) {
            *share += 1;
        }
    }
    shares
}

/// The map for `weights` (nodes with weight 0 get nothing) that differs least from `previous`.
///
/// With no node of positive weight nobody owns anything. Idempotent: `assign(&assign(m, w), w)` moves nothing.
pub fn assign(previous: &BucketMap, weights: &BTreeMap<NodeId, u16>) -> BucketMap {
    let shares = shares(weights, &previous.counts());
    if shares.is_empty() {
        return BucketMap::default();
    }
    let mut map = previous.clone();
    let mut left = shares;
    // Keep what fits; what does not becomes an orphan. Surplus is given up from the top of the hash space.
    let mut orphans = Vec::new();
    for index in 0..BUCKETS {
        match map.owner_at(index).and_then(|owner| left.get_mut(&owner)) {
            Some(quota) if *quota > 0 => *quota -= 1,
            _ => orphans.push(index),
        }
    }
    // Deal orphans in turn to whoever misses most, so that one node's buckets spread over all others.
    let mut wanting: std::collections::BTreeSet<(std::cmp::Reverse<u32>, NodeId)> = left
        .into_iter()
        .filter(|(_, n)| *n > 0)
        .map(|(node, n)| (std::cmp::Reverse(n), node))
        .collect();
    for index in orphans {
        let Some((std::cmp::Reverse(missing), node)) = wanting.pop_first() else {
            break;
        };
        map.0[index] = node.as_u8();
        if missing > 1 {
            wanting.insert((std::cmp::Reverse(missing - 1), node));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(i: usize) -> NodeId {
        NodeId::new(i).unwrap()
    }

    fn equal(nodes: impl IntoIterator<Item = usize>) -> BTreeMap<NodeId, u16> {
        nodes.into_iter().map(|i| (node(i), 1)).collect()
    }

    #[test]
    fn three_equal_nodes_get_1366_1365_1365() {
        let map = assign(&BucketMap::default(), &equal(0..3));
        assert_eq!(map.counts().into_values().collect::<Vec<_>>(), [1366, 1365, 1365]);
    }

    #[test]
    fn a_leaver_moves_only_its_own_buckets() {
        let before = assign(&BucketMap::default(), &equal(0..5));
        let after = assign(&before, &equal([0, 1, 3, 4]));
        assert_eq!(before.moves_to(&after), before.counts()[&node(2)] as usize);
    }

    #[test]
    fn weight_zero_owns_nothing_and_nobody_ready_means_nobody() {
        let weights = BTreeMap::from([(node(0), 3), (node(1), 0), (node(2), 1)]);
        let map = assign(&BucketMap::default(), &weights);
        assert_eq!(map.counts(), BTreeMap::from([(node(0), 3072), (node(2), 1024)]));
        assert_eq!(assign(&map, &BTreeMap::new()), BucketMap::default());
    }

    #[test]
    fn a_tie_of_remainders_does_not_move_a_bucket_to_the_larger_node() {
        // 545 and 937 leave the same remainder of 4096·w / 7168.
        let weights = [166, 439, 595, 545, 328, 772, 343, 324, 341, 286, 937, 397, 808, 887];
        let weights = weights.iter().enumerate().map(|(i, w)| (node(i), *w)).collect();
        let map = assign(&BucketMap::default(), &weights);
        assert_eq!(assign(&map, &weights), map);
    }

    fn weights() -> impl Strategy<Value = BTreeMap<NodeId, u16>> {
        proptest::collection::btree_map((0usize..64).prop_map(node), 0u16..1000, 0..64)
    }

    proptest! {
        #[test]
        fn shares_are_exact_moves_are_fewest_and_it_is_idempotent(steps in proptest::collection::vec(weights(), 1..6)) {
            let mut map = BucketMap::default();
            for weights in steps {
                let next = assign(&map, &weights);
                let total: u64 = weights.values().map(|&w| u64::from(w)).sum();
                let counts = next.counts();
                if total == 0 {
                    prop_assert!(counts.is_empty());
                } else {
                    prop_assert_eq!(counts.values().sum::<u32>() as usize, BUCKETS);
                    for (n, w) in &weights {
                        let exact = BUCKETS as f64 * f64::from(*w) / total as f64;
                        let got = f64::from(counts.get(n).copied().unwrap_or(0));
                        prop_assert!((got - exact).abs() < 1.0, "{:?} has {} of {}", n, got, exact);
                    }
                    // Lower bound of moves: what each node must gain over what it has.
                    let before = map.counts();
                    let gains: u32 = counts.iter().map(|(n, c)| c.saturating_sub(before.get(n).copied().unwrap_or(0))).sum();
                    prop_assert_eq!(map.moves_to(&next), gains as usize);
                }
                prop_assert_eq!(&assign(&next, &weights), &next);
                map = next;
            }
        }
    }
}
