//! What a new plan changes for this host, and so what has to be known before it may be at work.

use farm_core::balance::plan::{BucketState, GroupPlan, Plan};
use farm_core::wire::heartbeat::BucketSet;

/// See [`of`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// Every bucket is to this host what it was.
    Nothing,
    /// Buckets open, or what is known of their connections is enough: the plan may be at work at once.
    Opens,
    /// Buckets are released for another node, which waits for this one's word: until this host's connections are known the old plan stays at
    /// work, so that clients wait for that word and not for the look-up.
    Releases,
    /// Buckets close, or are to be guarded from now on, or VIPs or rules are others: the plan is at work at once, and its report waits for the look-up.
    Closes,
}

/// What `new` changes against `old`.
pub fn of(old: &Plan, new: &Plan) -> Change {
    let names = old.groups.iter().map(|g| &g.name);
    let mut vips = old.vips.iter().zip(&new.vips);
    let same =
        old.vips.len() == new.vips.len() && vips.all(|(old, new)| old.addr == new.addr && old.has_rules(&new.rules));
    if !same || !names.eq(new.groups.iter().map(|g| &g.name)) {
        return Change::Closes;
    }
    let mut change = Change::Nothing;
    for (old, group) in old.groups.iter().zip(&new.groups) {
        for (i, (was, is)) in old.states.iter().zip(group.states.iter()).enumerate() {
            let released = group.leaving.contains(i) && group.owners.owns(new.this, i);
            match (was, is) {
                _ if was == is => {}
                (BucketState::Own, BucketState::Guarded) => return Change::Closes,
                (_, BucketState::Own | BucketState::Guarded) => change = change.max(Change::Opens),
                (BucketState::Own | BucketState::Guarded, _) if released => change = Change::Releases,
                (BucketState::Own | BucketState::Guarded, _) => return Change::Closes,
                (BucketState::Draining | BucketState::Foreign, _) => change = change.max(Change::Opens),
            }
        }
    }
    change
}

/// Buckets of each group of `new` that are open by it and were not by `old`.
pub fn opened(old: &Plan, new: &Plan) -> Vec<BucketSet> {
    let is_open = |state: &BucketState| matches!(state, BucketState::Own | BucketState::Guarded);
    let of = |group: &GroupPlan| {
        let before = old.groups.iter().find(|g| g.name == group.name);
        let was_open = |i: usize| before.is_some_and(|g| is_open(&g.states[i]));
        let states = group.states.iter().enumerate();
        let opened = states.filter(|(i, state)| is_open(state) && !was_open(*i));
        opened.map(|(i, _)| i).collect()
    };
    new.groups.iter().map(of).collect()
}

/// Buckets of each group of `new` that were open by `old` and are open no more, although this host has not released them: it has stepped out, was not run, or has
/// found another one that has them too.
pub fn lost(old: &Plan, new: &Plan) -> Vec<BucketSet> {
    let is_open = |state: &BucketState| matches!(state, BucketState::Own | BucketState::Guarded);
    let of = |group: &GroupPlan| {
        let before = old.groups.iter().find(|g| g.name == group.name);
        let was_open = |i: usize| before.is_some_and(|g| is_open(&g.states[i]));
        let released = |i: usize| group.leaving.contains(i) && group.owners.owns(new.this, i);
        let states = group.states.iter().enumerate();
        // What nobody has nobody else has answered for.
        let has_owner = |i: usize| group.owners.owner_at(i).is_some();
        let lost = states.filter(|(i, state)| !is_open(state) && was_open(*i) && !released(*i) && has_owner(*i));
        lost.map(|(i, _)| i).collect()
    };
    new.groups.iter().map(of).collect()
}

/// True if a bucket is open by `new` that was not by `old`.
pub fn opens(old: &Plan, new: &Plan) -> bool {
    opened(old, new).iter().any(|set| !set.is_empty())
}

impl Change {
    fn max(self, other: Self) -> Self {
        if self == Self::Nothing { other } else { self }
    }
}

/// Buckets of each group of `new` that were this host's alone, in `old` or by `before`, which is as long as the groups of `old`: whatever came for
/// them was this host's, so until its connections are known it goes on to be.
pub fn own_before(old: &Plan, before: &[BucketSet], new: &Plan) -> Vec<BucketSet> {
    let of = |name: &str| {
        let at = old.groups.iter().position(|g| g.name == name)?;
        let own = (0..).zip(old.groups[at].states.iter());
        let own = own.filter(|(_, state)| **state == BucketState::Own).map(|(i, _)| i);
        Some(
            own.chain(before.get(at).into_iter().flat_map(BucketSet::iter))
                .collect(),
        )
    };
    new.groups.iter().map(|g| of(&g.name).unwrap_or_default()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use farm_core::balance::assign::BucketMap;
    use farm_core::balance::hash::Seed;
    use farm_core::id::{BUCKETS, NodeId};

    use super::*;
    use BucketState::{Draining, Foreign, Guarded, Own};

    /// All buckets in `state`, owned by node `owner`; this is node 0.
    fn plan(state: BucketState, owner: usize, leaving: bool) -> Plan {
        let owner = NodeId::new(owner).unwrap();
        let mut group = GroupPlan::closed("web/g".into());
        group.states = Box::new([state; BUCKETS]);
        group.owners = BucketMap::from_bytes(Box::new([owner.as_u8(); BUCKETS])).unwrap();
        group.leaving = (0..BUCKETS).filter(|_| leaving).collect();
        Plan {
            version: 1,
            this: NodeId::new(0).unwrap(),
            seed: Seed::default(),
            vips: Vec::new(),
            groups: vec![group],
            gone: BTreeMap::new(),
        }
    }

    #[test]
    fn each_change_is_known_for_what_it_needs() {
        for (from, to, change) in [
            (plan(Own, 0, false), plan(Own, 0, false), Change::Nothing),
            (plan(Foreign, 1, false), plan(Guarded, 0, false), Change::Opens),
            (plan(Guarded, 0, false), plan(Own, 0, false), Change::Opens),
            (plan(Draining, 1, true), plan(Foreign, 1, false), Change::Opens),
            // Told to release, still the owner by the committed map.
            (plan(Own, 0, false), plan(Draining, 0, true), Change::Releases),
            // Learned that another has them: no time to lose.
            (plan(Own, 0, false), plan(Draining, 1, true), Change::Closes),
            // Fenced.
            (plan(Own, 0, false), plan(Foreign, 0, false), Change::Closes),
            (plan(Own, 0, false), plan(Guarded, 0, false), Change::Closes),
        ] {
            assert_eq!(
                of(&from, &to),
                change,
                "{:?} to {:?}",
                from.groups[0].states[0],
                to.groups[0].states[0]
            );
        }
        let mut renamed = plan(Own, 0, false);
        renamed.groups[0].name = "dns/g".into();
        assert_eq!(of(&plan(Own, 0, false), &renamed), Change::Closes);
    }

    #[test]
    fn the_most_urgent_of_several_changes_counts() {
        let from = plan(Own, 0, false);
        let mut to = plan(Draining, 0, true);
        to.groups[0].states[7] = Own;
        assert_eq!(of(&from, &to), Change::Releases);
        to.groups[0].states[4000] = Guarded;
        assert_eq!(of(&from, &to), Change::Closes);
        let mut from = plan(Foreign, 1, false);
        from.groups[0].states[0] = Guarded;
        let mut to = plan(Guarded, 0, false);
        to.groups[0].states[0] = Draining;
        to.groups[0].leaving.insert(0);
        assert_eq!(of(&from, &to), Change::Releases);
    }

    #[test]
    fn a_bucket_that_opens_is_seen() {
        let opens_between = |from: BucketState, to: BucketState| opens(&plan(from, 1, false), &plan(to, 0, false));
        assert!(opens_between(Foreign, Guarded) && opens_between(Draining, Own));
        assert!(!opens_between(Guarded, Own) && !opens_between(Own, Draining));
    }

    #[test]
    fn what_is_closed_without_a_release_is_lost() {
        let lost = |from: &Plan, to: &Plan| lost(from, to)[0].len();
        let own = plan(Own, 0, false);
        assert_eq!(lost(&own, &plan(Foreign, 0, false)), BUCKETS, "fenced");
        assert_eq!(lost(&plan(Guarded, 0, false), &plan(Foreign, 1, false)), BUCKETS);
        assert_eq!(lost(&own, &plan(Draining, 1, true)), BUCKETS, "another has them");
        assert_eq!(lost(&own, &plan(Draining, 0, true)), 0, "released");
        assert_eq!(lost(&own, &plan(Guarded, 0, false)), 0);
        assert_eq!(lost(&plan(Draining, 1, true), &plan(Foreign, 1, false)), 0, "before");
        let mut unowned = plan(Draining, 0, false);
        unowned.groups[0].owners = BucketMap::default();
        assert_eq!(lost(&own, &unowned), 0, "nobody is to have them");
    }

    #[test]
    fn what_was_own_is_remembered_by_the_name_of_its_group() {
        let mut old = plan(Own, 0, false);
        old.groups[0].states[1] = Foreign;
        let mut new = plan(Draining, 0, true);
        new.groups.insert(0, GroupPlan::closed("dns/g".into()));
        let before = own_before(&old, &[BucketSet::default()], &new);
        assert_eq!(before.iter().map(BucketSet::len).collect::<Vec<_>>(), [0, BUCKETS - 1]);
        let again = own_before(&new, &before, &new);
        assert_eq!(again[1], before[1], "as long as nobody has looked");
    }
}
