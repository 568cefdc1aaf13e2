//! From whom to whom buckets go, for the log and the history. Pure counting; decides nothing.

use std::collections::BTreeMap;

use crate::balance::assign::BucketMap;
use crate::id::{BUCKETS, NodeId};

/// Buckets by (owner before, owner after); `None` is nobody.
pub type Moves = BTreeMap<(Option<NodeId>, Option<NodeId>), u32>;

/// What changes owner from `old` to `new`.
pub fn between(old: &BucketMap, new: &BucketMap) -> Moves {
    let mut moves = Moves::new();
    for key in (0..BUCKETS).map(|i| (old.owner_at(i), new.owner_at(i))) {
        if key.0 != key.1 {
            *moves.entry(key).or_insert(0) += 1;
        }
    }
    moves
}

/// Who owns how many of `buckets` in `map`.
pub fn heirs(map: &BucketMap, buckets: impl Iterator<Item = usize>) -> BTreeMap<NodeId, u32> {
    let mut heirs = BTreeMap::new();
    for owner in buckets.filter_map(|i| map.owner_at(i)) {
        *heirs.entry(owner).or_insert(0) += 1;
    }
    heirs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::assign::assign;

    fn map(previous: &BucketMap, weights: &[(usize, u16)]) -> BucketMap {
        let weights = weights.iter().map(|(n, w)| (NodeId::new(*n).unwrap(), *w)).collect();
        assign(previous, &weights)
    }

    #[test]
    fn moves_are_counted_by_who_gives_and_who_gets() {
        let node = |i| NodeId::new(i);
        let one = map(&BucketMap::default(), &[(0, 1)]);
        assert_eq!(
            between(&BucketMap::default(), &one),
            Moves::from([((None, node(0)), 4096)])
        );
        let two = map(&one, &[(0, 1), (1, 1)]);
        assert_eq!(between(&one, &two), Moves::from([((node(0), node(1)), 2048)]));
        assert_eq!(between(&two, &two), Moves::new());
        let none = map(&two, &[]);
        assert_eq!(
            between(&two, &none),
            Moves::from([((node(0), None), 2048), ((node(1), None), 2048)])
        );
        assert_eq!(heirs(&two, 0..BUCKETS).values().sum::<u32>(), 4096);
        assert!(heirs(&none, 0..BUCKETS).is_empty());
    }
}
