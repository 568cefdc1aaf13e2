//! From "who hears whom" to one set of nodes that can agree with each other.

use std::collections::BTreeMap;

use crate::id::{NodeId, NodeSet};

/// What a peer says of its ears.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Row {
    /// Whom it hears.
    pub hears: NodeSet,
    /// It has just started and cannot have heard everybody.
    pub joining: bool,
    /// And has not heard this node since.
    pub new_here: bool,
    /// It hears this node, as lately as [`super::Peer`] asks for.
    pub hears_this: bool,
    /// Whom it leaves out of its view.
    pub excludes: NodeSet,
    /// It has stepped out.
    pub fenced: bool,
}

/// What [`agree`] finds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Agreement {
    /// The members, or none if this node must step out.
    pub view: Option<NodeSet>,
    /// Candidates that were left out.
    pub excluded: NodeSet,
    /// Who hears whom among the candidates.
    pub links: Links,
}

/// All that is known at one node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ears {
    /// This node.
    pub this: NodeId,
    /// It has just started.
    pub joining: bool,
    /// The peers it hears, with their rows.
    pub heard: BTreeMap<NodeId, Row>,
    /// Peers that have said lately that they are no members.
    pub gone: NodeSet,
}

/// Who hears whom, as far as one node knows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Links(BTreeMap<NodeId, NodeSet>);

impl Links {
    /// True if `a` and `b` hear each other. Of a node without a row nothing bad is known.
    pub fn talk(&self, a: NodeId, b: NodeId) -> bool {
        self.hears(a, b) && self.hears(b, a)
    }

    /// True if somebody in `nodes` does not talk with another of them.
    pub fn is_broken(&self, nodes: NodeSet) -> bool {
        nodes.iter().any(|a| nodes.iter().any(|b| a < b && !self.talk(a, b)))
    }

    fn hears(&self, from: NodeId, to: NodeId) -> bool {
        self.0.get(&from).is_none_or(|row| row.contains(to))
    }

    /// Those of `nodes` that can agree with each other, and among them the *hubs*, that talk with all the others.
    ///
    /// One pair that does not talk costs nobody his place as long as somebody talks with all: messages that matter go by the hub. A
    /// node goes if it fails to talk with two others (of two nodes: with the other one), or, while there is no hub, with one. Of several
    /// the one goes that talks with the fewest; among equals the one that the fewest hear, because the deaf cannot know that
    /// they are; then the higher id.
    pub fn settle(&self, nodes: NodeSet) -> (NodeSet, NodeSet) {
        let mut left = nodes;
        loop {
            let others = |n: NodeId| left.iter().filter(move |m| *m != n);
            let silent = |n: NodeId| others(n).filter(|m| !self.talk(n, *m)).count();
            let hubs: NodeSet = left.iter().filter(|n| silent(*n) == 0).collect();
            let allowed = usize::from(left.len() > 2 && !hubs.is_empty());
            let rank = |n: &NodeId| {
                let heard_by = others(*n).filter(|m| self.hears(*m, *n)).count();
                (std::cmp::Reverse(silent(*n)), heard_by, std::cmp::Reverse(*n))
            };
            match left.iter().filter(|n| silent(*n) > allowed).min_by_key(rank) {
                None => return (left, hubs),
                Some(worst) => left.remove(worst),
            }
        }
    }
}

/// The view this node belongs to, or `None` if it must step out because others cannot hear it.
///
/// Candidates are this node, the peers it hears, and those that a peer hears although this node does not (one that only this node cannot
/// hear is not dead), unless a settled peer leaves that one out. Of a candidate that is not heard here nothing else is known; it counts as hearing everybody. Of the candidates
/// [`Links::settle`] leaves the view. What this node cannot see, a peer between it and the others can: a settled peer that leaves this node
/// out has the last word.
pub fn agree(ears: &Ears) -> Agreement {
    // A peer that is joining, or that this joining node has not yet reached, is no candidate until both hear each other; from then on it is one.
    let settled = |row: &Row| row.hears_this || !(row.new_here || ears.joining);
    let rows: BTreeMap<NodeId, Row> = ears
        .heard
        .iter()
        .filter(|(_, r)| settled(r))
        .map(|(n, r)| (*n, *r))
        .collect();
    let mut candidates: NodeSet = rows.keys().copied().collect();
    let settled = || rows.values().filter(|row| row.hears_this && !row.joining);
    let left_out = settled().fold(0, |bits, row| bits | row.excludes.bits());
    let left_out = NodeSet::from_bits(left_out | ears.gone.bits());
    for row in settled() {
        let unheard = row.hears.iter();
        let unheard = unheard.filter(|n| !ears.heard.contains_key(n) && !left_out.contains(*n));
        candidates = NodeSet::from_bits(candidates.bits() | unheard.collect::<NodeSet>().bits());
    }
    candidates.insert(ears.this);
    let joining: NodeSet = rows.iter().filter(|(_, r)| r.joining).map(|(n, _)| *n).collect();
    let mut links = Links::default();
    for (node, row) in &rows {
        // Missing ears of and for a joining node count against nobody but in what concerns this node.
        let mut hears = if row.joining {
            candidates
        } else {
            NodeSet::from_bits(row.hears.bits() | joining.bits())
        };
        hears.remove(ears.this);
        if row.hears_this {
            hears.insert(ears.this);
        }
        links.0.insert(*node, hears);
    }
    links.0.insert(ears.this, ears.heard.keys().copied().collect());
    let (view, _) = links.settle(candidates);
    let inside = view.contains(ears.this);
    let view = match inside {
        true => Some(view),
        // A joining node serves nothing and need not step out; it leaves out whom it cannot agree with.
        false if ears.joining => Some([ears.this].into_iter().collect()),
        false => None,
    };
    let excluded: NodeSet = candidates
        .iter()
        .filter(|&n| n != ears.this && !view.is_some_and(|v| v.contains(n)))
        .collect();
    // Who has stepped out and is left out by a settled peer is no member, though nothing bad of it is seen here. That is hearsay and not passed
    // on, or it would go round for ever.
    let stepped_out = rows.iter().filter(|(_, row)| row.fenced).map(|(n, _)| *n);
    let stepped_out = stepped_out.collect::<NodeSet>().bits() & left_out.bits();
    let view = view.map(|view| NodeSet::from_bits(view.bits() & !stepped_out));
    let told = rows.iter().any(|(n, row)| {
        row.excludes.contains(ears.this) && row.hears_this && !row.joining && (*n < ears.this || !excluded.contains(*n))
    });
    match view {
        Some(view) if !told || ears.joining => Agreement {
            view: Some(view),
            excluded,
            links,
        },
        _ => Agreement {
            view: None,
            excluded: NodeSet::EMPTY,
            links,
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
            let excludes = told.get(p.index()).copied().unwrap_or_default();
            (
                p,
                Row {
                    hears: row,
                    joining: false,
                    new_here: false,
                    hears_this: row.contains(n(this)),
                    excludes,
                    fenced: false,
                },
            )
        });
        Ears {
            this: n(this),
            joining: false,
            heard: heard.collect(),
            gone: NodeSet::EMPTY,
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
    fn one_pair_of_three_that_does_not_talk_costs_nobody_his_place() {
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            let cuts: [&[(usize, usize)]; 3] = [&[(a, b)], &[(b, a)], &[(a, b), (b, a)]];
            for cut in cuts {
                assert_eq!(all(3, cut), vec![Some(set(&[0, 1, 2])); 3], "{cut:?}");
            }
        }
    }

    #[test]
    fn the_hub_is_the_one_that_talks_with_all() {
        let agreement = agree(&ears(1, 3, &[(0, 1)], &[]));
        let (members, hubs) = agreement.links.settle(set(&[0, 1, 2]));
        assert_eq!((members, hubs), (set(&[0, 1, 2]), set(&[2])));
        assert_eq!(
            agreement.links.settle(set(&[0, 1])),
            (set(&[1]), set(&[1])),
            "of two that do not talk one goes"
        );
    }

    #[test]
    fn without_a_hub_somebody_goes() {
        // 0 and 1, and 2 and 3, do not hear each other: nobody talks with all.
        let cut = [(0, 1), (1, 0), (2, 3), (3, 2)];
        assert_eq!(
            all(4, &cut),
            vec![
                Some(set(&[0, 1, 2])),
                Some(set(&[0, 1, 2])),
                Some(set(&[0, 1, 2])),
                None
            ]
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
                    new_here: true,
                    hears_this: false,
                    excludes: NodeSet::EMPTY,
                    fenced: false,
                };
            } else {
                row.hears.remove(n(2));
            }
        }
        let agreement = agree(&ears);
        assert_eq!(agreement.view, Some(set(&[0, 1])));
        assert_eq!(agreement.excluded, NodeSet::EMPTY);
    }
}
