//! With which entry of the history each bucket has come to whom it belongs.
//!
//! Owns a copy of each group's map as it was at its last entry, and one number per bucket: 36 KiB a group. The chronicle tells it of every
//! entry that changes a map; `farm why` asks. It decides nothing and outlasts no restart: then every bucket has come with the first map.

use std::collections::BTreeMap;

use farm_core::balance::assign::BucketMap;
use farm_core::id::{BUCKETS, Bucket, ModuleName, NodeId};

/// See the module doc.
#[derive(Debug, Default)]
pub(super) struct Origins(BTreeMap<(ModuleName, usize), Origin>);

#[derive(Debug)]
struct Origin {
    map: BucketMap,
    /// Number of the entry that changed the bucket last.
    entry: Box<[u64; BUCKETS]>,
    /// This node has closed its buckets since.
    closed: bool,
}

impl Origins {
    /// Entry `seq` has brought `map` to the group at `key`. After [`Self::close`] this node's buckets come with it too, as they are opened
    /// anew.
    pub(super) fn note(&mut self, key: &(ModuleName, usize), seq: u64, map: &BucketMap, this: NodeId) {
        let Some(origin) = self.0.get_mut(key) else {
            let origin = Origin {
                map: map.clone(),
                entry: Box::new([seq; BUCKETS]),
                closed: false,
            };
            self.0.insert(key.clone(), origin);
            return;
        };
        let reopened = std::mem::take(&mut origin.closed);
        for (index, entry) in origin.entry.iter_mut().enumerate() {
            let moved = origin.map.owner_at(index) != map.owner_at(index);
            if moved || (reopened && map.owns(this, index)) {
                *entry = seq;
            }
        }
        origin.map.clone_from(map);
    }

    /// Entry `seq` says that this node has closed all that it had of the group at `key`.
    pub(super) fn close(&mut self, key: &(ModuleName, usize), seq: u64, this: NodeId) {
        let Some(origin) = self.0.get_mut(key) else { return };
        origin.closed = true;
        for (index, entry) in origin.entry.iter_mut().enumerate() {
            if origin.map.owns(this, index) {
                *entry = seq;
            }
        }
    }

    /// Number of the entry that changed `bucket` last, if there was one since this daemon has started.
    pub(super) fn of(&self, key: &(ModuleName, usize), bucket: Bucket) -> Option<u64> {
        self.0.get(key).map(|origin| origin.entry[bucket.index()])
    }
}

#[cfg(test)]
mod tests {
    use farm_core::balance::assign::assign;

    use super::*;

    fn node(i: usize) -> NodeId {
        NodeId::new(i).unwrap()
    }

    fn map(previous: &BucketMap, nodes: &[usize]) -> BucketMap {
        assign(previous, &nodes.iter().map(|n| (node(*n), 1)).collect())
    }

    fn bucket(index: usize) -> Bucket {
        Bucket::of_hash((index as u32) << 20)
    }

    #[test]
    fn a_bucket_comes_with_the_last_entry_that_changed_its_owner() {
        let key = ("web".parse().unwrap(), 0);
        let mut origins = Origins::default();
        assert_eq!(origins.of(&key, bucket(0)), None);
        let alone = map(&BucketMap::default(), &[0]);
        origins.note(&key, 3, &alone, node(0));
        let two = map(&alone, &[0, 1]);
        origins.note(&key, 7, &two, node(0));
        origins.note(&key, 9, &two, node(0));
        for index in 0..BUCKETS {
            let expected = if two.owns(node(1), index) { 7 } else { 3 };
            assert_eq!(origins.of(&key, bucket(index)), Some(expected), "bucket {index}");
        }
    }

    #[test]
    fn what_was_closed_comes_anew_although_its_owner_is_the_same() {
        let key = ("web".parse().unwrap(), 0);
        let mut origins = Origins::default();
        let two = map(&BucketMap::default(), &[0, 1]);
        origins.note(&key, 1, &two, node(0));
        origins.close(&key, 2, node(0));
        let seen = |origins: &Origins, owner: usize| -> Vec<u64> {
            let mut seen: Vec<u64> = (0..BUCKETS)
                .filter(|i| two.owns(node(owner), *i))
                .filter_map(|i| origins.of(&key, bucket(i)))
                .collect();
            seen.dedup();
            seen
        };
        assert_eq!((seen(&origins, 0), seen(&origins, 1)), (vec![2], vec![1]));
        origins.note(&key, 5, &two, node(0));
        origins.note(&key, 6, &two, node(0));
        assert_eq!((seen(&origins, 0), seen(&origins, 1)), (vec![5], vec![1]));
    }
}
