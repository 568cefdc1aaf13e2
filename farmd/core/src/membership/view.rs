//! From "who hears whom" to one set of nodes that all hear each other.

use std::collections::BTreeMap;

use crate::id::{NodeId, NodeSet};

/// What a peer says of its ears.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// Whom it hears.
    pub hears: NodeSet,
    /// It has just started and cannot have heard everybody.
    pub joining: bool,
    /// It hears the present incarnation of this node.
    pub hears_this: bool,
    /// It leaves this node out of its view.
    pub excludes_this: bool,
}

/// What [`agree`] finds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Agreement {
    /// The nodes that all hear each other, or none if this node must step out.
    pub view: Option<NodeSet>,
    /// Candidates that were left out.
    pub excluded: NodeSet,
}

/// All that is known at one node.
#[derive(Clone, Debug)]
pub struct Ears {
    /// This node.
    pub this: NodeId,
    /// It has just started.
    pub joining: bool,
    /// The peers it hears, with their rows.
    pub heard: BTreeMap<NodeId, Row>,
}

/// The view this node belongs to, or `None` if it must step out because others cannot hear it.
///
/// Candidates are this node, the peers it hears, and those that a peer hears although this node does not (one that only this node cannot hear is
/// not dead). Of a candidate that is not heard here nothing is known but that; it counts as hearing everybody. While a pair does not hear each other, the candidate
/// that talks both ways with the fewest goes; among equals the one that the fewest hear (the deaf cannot know that they are), then the higher id. What this node cannot see, a peer between it and the others can: a settled peer that leaves this node out has
/// the last word.
pub fn agree(ears: &Ears) -> Agreement {
    // A peer that is joining, or that this joining node has not yet reached, is no candidate until both hear each other.
    let settled = |row: &Row| row.hears_this || !(row.joining || ears.joining);
    let rows: BTreeMap<NodeId, Row> = ears
        .heard
        .iter()
        .filter(|(_, r)| settled(r))
        .map(|(n, r)| (*n, *r))
        .collect();
    let mut candidates: NodeSet = rows.keys().copied().collect();
    for row in rows.values().filter(|row| row.hears_this && !row.joining) {
        let unheard = row.hears.iter().filter(|n| !ears.heard.contains_key(n));
        candidates = NodeSet::from_bits(candidates.bits() | unheard.collect::<NodeSet>().bits());
    }
    candidates.insert(ears.this);
    let hears = |from: NodeId, to: NodeId| -> bool {
        if from == ears.this {
            return ears.heard.contains_key(&to);
        }
        match rows.get(&from) {
            Some(row) if to == ears.this => row.hears_this,
            Some(row) => row.hears.contains(to) || rows.get(&to).is_some_and(|r| r.joining) || row.joining,
            None => true,
        }
    };
    let all = candidates;
    let view = loop {
        let heard_by = |n: NodeId| candidates.iter().filter(|&m| m != n && hears(m, n)).count();
        let deaf_pair = |n: NodeId| candidates.iter().any(|m| m != n && !(hears(n, m) && hears(m, n)));
        let talks_with = |n: NodeId| {
            candidates
                .iter()
                .filter(|&m| m != n && hears(m, n) && hears(n, m))
                .count()
        };
        let rank = |n: &NodeId| (talks_with(*n), heard_by(*n), std::cmp::Reverse(*n));
        let worst = candidates.iter().filter(|&n| deaf_pair(n)).min_by_key(rank);
        match worst {
            None => break Some(candidates),
            Some(n) if n == ears.this && !ears.joining => break None,
            // A joining node serves nothing and need not step out; it leaves out whom it cannot agree with.
            Some(n) if n == ears.this => break Some([ears.this].into_iter().collect()),
            Some(n) => candidates.remove(n),
        }
    };
    let excluded: NodeSet = all
        .iter()
        .filter(|&n| n != ears.this && !view.is_some_and(|v| v.contains(n)))
        .collect();
    let told = rows.iter().any(|(n, row)| {
        row.excludes_this && row.hears_this && !row.joining && (*n < ears.this || !excluded.contains(*n))
    });
    match view {
        Some(view) if !told || ears.joining => Agreement {
            view: Some(view),
            excluded,
        },
        _ => Agreement {
            view: None,
            excluded: NodeSet::EMPTY,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(i: usize) -> NodeId {
        NodeId::new(i).unwrap()
    }

    fn set(nodes: &[usize]) -> NodeSet {
        nodes.iter().map(|&i| n(i)).collect()
    }

    /// What node `this` sees when `broken` are the one-way links (from, to) that do not work, and `told` is what each node excludes.
    fn ears(this: usize, count: usize, broken: &[(usize, usize)], told: &[NodeSet]) -> Ears {
        let hears = |to: usize| -> NodeSet {
            (0..count)
                .filter(|&from| from != to && !broken.contains(&(from, to)))
                .map(n)
                .collect()
        };
        let heard = hears(this).iter().map(|p| (p, hears(p.index()))).collect::<Vec<_>>();
        let heard = heard.into_iter().map(|(p, row)| {
            let excludes_this = told.get(p.index()).is_some_and(|s| s.contains(n(this)));
            (
                p,
                Row {
                    hears: row,
                    joining: false,
                    hears_this: row.contains(n(this)),
                    excludes_this,
                },
            )
        });
        Ears {
            this: n(this),
            joining: false,
            heard: heard.collect(),
        }
    }

    /// The views after everybody has told everybody whom it excludes.
    fn all(count: usize, broken: &[(usize, usize)]) -> Vec<Option<NodeSet>> {
        let first: Vec<NodeSet> = (0..count)
            .map(|i| agree(&ears(i, count, broken, &[])).excluded)
            .collect();
        (0..count)
            .map(|i| agree(&ears(i, count, broken, &first)).view)
            .collect()
    }

    #[test]
    fn whole_ears_make_one_view() {
        assert_eq!(all(4, &[]), vec![Some(set(&[0, 1, 2, 3])); 4]);
    }

    #[test]
    fn a_node_that_nobody_hears_steps_out_and_the_others_go_on() {
        let mute = [(0, 1), (0, 2)];
        assert_eq!(all(3, &mute), vec![None, Some(set(&[1, 2])), Some(set(&[1, 2]))]);
        assert_eq!(all(2, &[(0, 1)]), vec![None, Some(set(&[1]))]);
    }

    #[test]
    fn a_node_that_hears_nobody_costs_the_others_nothing() {
        let deaf = [(0, 1), (2, 1)];
        assert_eq!(
            all(3, &deaf),
            vec![Some(set(&[0, 2])), Some(set(&[1])), Some(set(&[0, 2]))]
        );
    }

    #[test]
    fn one_broken_way_of_three_leaves_out_the_same_node_everywhere() {
        for (from, to) in [(0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)] {
            let views = all(3, &[(from, to)]);
            let inside: Vec<NodeSet> = views.iter().flatten().copied().collect();
            assert_eq!(inside.len(), 2, "{from}->{to}: {views:?}");
            assert!(inside.iter().all(|v| *v == inside[0]), "{from}->{to}: {views:?}");
            for (i, view) in views.iter().enumerate() {
                assert_eq!(view.is_some(), inside[0].contains(n(i)), "{from}->{to}: {views:?}");
            }
        }
    }

    #[test]
    fn a_cut_between_two_of_three_leaves_out_one_of_them() {
        assert_eq!(
            all(3, &[(0, 1), (1, 0)]),
            vec![Some(set(&[0, 2])), None, Some(set(&[0, 2]))]
        );
    }

    #[test]
    fn a_partition_makes_two_views() {
        let cut: Vec<(usize, usize)> = [0, 1]
            .iter()
            .flat_map(|&a| [2, 3].iter().flat_map(move |&b| [(a, b), (b, a)]))
            .collect();
        let (left, right) = (Some(set(&[0, 1])), Some(set(&[2, 3])));
        assert_eq!(all(4, &cut), vec![left, left, right, right]);
    }

    #[test]
    fn a_joining_node_disturbs_nobody() {
        let mut ears = ears(0, 3, &[], &[]);
        for (node, row) in &mut ears.heard {
            if *node == n(2) {
                *row = Row {
                    hears: NodeSet::EMPTY,
                    joining: true,
                    hears_this: false,
                    excludes_this: false,
                };
            } else {
                row.hears.remove(n(2));
            }
        }
        assert_eq!(
            agree(&ears),
            Agreement {
                view: Some(set(&[0, 1])),
                excluded: NodeSet::EMPTY
            }
        );
    }
}
