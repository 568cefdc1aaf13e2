//! Whose each bucket is: what `GET /v1/map` answers.
//!
//! Owns the form of the answer and the way from a plan's group to ranges of equal buckets. Pure; the picture is the command line's.

use serde::{Deserialize, Serialize};

use super::why::BucketWord;
use crate::balance::plan::{BucketState, GroupPlan};
use crate::id::{BUCKETS, NodeId, NodeSet};

/// Answer to `GET /v1/map`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Maps {
    /// The node that answers.
    pub node: String,
    /// Groups of modules that run here.
    pub groups: Vec<GroupMap>,
    /// Modules that do not, and why this node knows no map of theirs.
    pub absent: Vec<MapAbsent>,
}

/// A module of which this node knows no map.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MapAbsent {
    /// The module.
    pub module: String,
    /// Why, in words.
    pub why: String,
}

/// The buckets of one group, as one node knows them.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct GroupMap {
    /// The module.
    pub module: String,
    /// The group.
    pub group: String,
    /// Number of the map in force; 0 before there was one.
    pub map: u64,
    /// Buckets there are (4096).
    pub of: u32,
    /// Every node of the cluster, in its order.
    pub nodes: Vec<MapNode>,
    /// Buckets of nobody.
    pub nobody: u32,
    /// What the buckets are to the node that answers.
    pub here: HereCounts,
    /// All buckets in order, equal neighbours together.
    pub ranges: Vec<MapRange>,
}

/// One node's part of a map.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MapNode {
    /// The node.
    pub node: String,
    /// Buckets it owns.
    pub buckets: u32,
    /// Its weight, as it was told last; absent if it takes no part.
    pub weight: Option<u16>,
    /// State and quality of the module there, or why none is known.
    pub state: String,
    /// Buckets in which it has connections although they are another node's, as far as it has told.
    pub holds: u32,
}

/// Buckets by what they are to the node that answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HereCounts {
    /// Its own, and nobody else has connections in them.
    pub own: u32,
    /// Its own; another node still has connections in them.
    pub guarded: u32,
    /// Another node's; its own connections in them go on.
    pub draining: u32,
    /// Just given up, and not yet open elsewhere.
    pub leaving: u32,
}

/// Neighbouring buckets of which the same is known.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MapRange {
    /// Number of the first.
    pub first: u16,
    /// Number of the last.
    pub last: u16,
    /// Who owns them; absent if nobody.
    pub owner: Option<String>,
    /// What they are to the node that answers.
    pub state: BucketWord,
    /// Other nodes that have connections in them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holders: Vec<String>,
    /// They are on their way from the node that answers to their owner.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leaving: bool,
}

impl MapRange {
    /// True if not all of it is with one node: another than the owner has connections in it, or it is on its way.
    pub fn in_transition(&self) -> bool {
        let shared = match self.state {
            BucketWord::Guarded | BucketWord::Draining => true,
            BucketWord::Own | BucketWord::Foreign => false,
        };
        shared || self.leaving || !self.holders.is_empty()
    }
}

/// `plan`'s buckets in order, equal neighbours together.
pub fn ranges(plan: &GroupPlan, name: impl Fn(NodeId) -> String) -> Vec<MapRange> {
    let of = |index: usize| {
        let holders = plan.holders.get(&index).copied().unwrap_or(NodeSet::EMPTY);
        let leaving = plan.leaving.contains(index);
        (plan.owners.owner_at(index), plan.states[index], holders, leaving)
    };
    let mut ranges: Vec<MapRange> = Vec::new();
    let mut before = None;
    for index in 0..BUCKETS {
        let (owner, state, holders, leaving) = of(index);
        match ranges.last_mut() {
            Some(range) if before == Some((owner, state, holders, leaving)) => range.last = index as u16,
            _ => ranges.push(MapRange {
                first: index as u16,
                last: index as u16,
                owner: owner.map(&name),
                state: state.into(),
                holders: holders.iter().map(&name).collect(),
                leaving,
            }),
        }
        before = Some((owner, state, holders, leaving));
    }
    ranges
}

/// What `plan`'s buckets are to this node.
pub fn here(plan: &GroupPlan) -> HereCounts {
    let count = |state: BucketState| plan.states.iter().filter(|s| **s == state).count() as u32;
    HereCounts {
        own: count(BucketState::Own),
        guarded: count(BucketState::Guarded),
        draining: count(BucketState::Draining),
        leaving: plan.leaving.len() as u32,
    }
}

/// In how many of `plan`'s buckets `node`, another one than this, has connections.
pub fn held_by(plan: &GroupPlan, node: NodeId) -> u32 {
    plan.holders.values().filter(|set| set.contains(node)).count() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::assign::assign;
    use crate::balance::test_frames::{group, id};
    use proptest::prelude::*;

    fn name(node: NodeId) -> String {
        format!("s{}", node.index() + 1)
    }

    #[test]
    fn equal_neighbours_are_one_range() {
        let plan = group(BucketState::Own, Some(0));
        let all = ranges(&plan, name);
        assert_eq!((all.len(), all[0].first, all[0].last), (1, 0, 4095));
        assert_eq!((all[0].owner.as_deref(), all[0].in_transition()), (Some("s1"), false));
        let mut plan = plan;
        plan.states[9] = BucketState::Guarded;
        plan.holders.insert(9, [id(1), id(2)].into_iter().collect());
        plan.leaving.insert(4095);
        let parts = ranges(&plan, name);
        let spans: Vec<(u16, u16)> = parts.iter().map(|r| (r.first, r.last)).collect();
        assert_eq!(spans, [(0, 8), (9, 9), (10, 4094), (4095, 4095)]);
        assert_eq!(parts[1].holders, ["s2", "s3"]);
        let moving: Vec<bool> = parts.iter().map(MapRange::in_transition).collect();
        assert_eq!(moving, [false, true, false, true]);
        let counts = here(&plan);
        assert_eq!(
            (counts.own, counts.guarded, counts.draining, counts.leaving),
            (4095, 1, 0, 1)
        );
        assert_eq!((held_by(&plan, id(1)), held_by(&plan, id(3))), (1, 0));
    }

    proptest! {
        #[test]
        fn ranges_tell_each_bucket_once_and_as_it_is(
            weights in proptest::collection::btree_map(0_usize..64, 0_u16..5, 0..6),
            draining in proptest::collection::vec(0_usize..BUCKETS, 0..40),
        ) {
            let weights = weights.into_iter().map(|(n, w)| (id(n), w)).collect();
            let mut plan = group(BucketState::Foreign, None);
            plan.owners = assign(&plan.owners, &weights);
            for index in draining {
                plan.states[index] = BucketState::Draining;
            }
            let mut next = 0;
            for range in ranges(&plan, name) {
                prop_assert_eq!(usize::from(range.first), next);
                for index in range.first..=range.last {
                    let index = usize::from(index);
                    prop_assert_eq!(plan.owners.owner_at(index).map(name), range.owner.clone());
                    prop_assert_eq!(BucketWord::from(plan.states[index]), range.state);
                }
                next = usize::from(range.last) + 1;
            }
            prop_assert_eq!(next, BUCKETS);
        }
    }
}
