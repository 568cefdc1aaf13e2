//! From "who hears whom" to one set of nodes that can agree with each other.

use std::collections::BTreeMap;

use crate::id::{MAX_NODES, NodeId, NodeSet};

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
}

/// What [`agree`] finds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Agreement {
    /// The members, or none if this node must step out.
    pub view: Option<NodeSet>,
    /// Candidates that were left out.
    pub excluded: NodeSet,
    /// Who hears whom among those that are known.
    pub links: Links,
    /// Some of them does not talk with another, or one that is heard is cut off: what is heard of them is passed on.
    pub divided: bool,
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
    /// Of which others it is told, and whom these hear.
    pub told: BTreeMap<NodeId, NodeSet>,
    /// Peers that have said lately that they are no members.
    pub gone: NodeSet,
    /// Those of them that are heard, and hear nobody.
    pub cut_off: NodeSet,
    /// Peers of which others have been telling nothing new for the detection time.
    pub silent: NodeSet,
    /// Peers that only others hear, and these only lately.
    pub starting: NodeSet,
}

impl Ears {
    /// The peers it hears that are candidates: one that is joining, or that this joining node has not yet reached, is none until both hear each other.
    fn candidates(&self) -> impl Iterator<Item = (NodeId, Row)> {
        let settled = |row: &Row| row.hears_this || !(row.new_here || self.joining);
        self.heard
            .iter()
            .filter(move |(_, r)| settled(r))
            .map(|(n, r)| (*n, *r))
    }

    fn heard(&self) -> NodeSet {
        self.heard.keys().copied().collect()
    }

    /// Of which others it is told, and whom these hear.
    fn told(&self) -> impl Iterator<Item = (NodeId, NodeSet)> {
        let told = self.told.iter();
        let told = told.filter(|(n, _)| !self.heard.contains_key(n) && !self.gone.contains(**n));
        told.map(|(n, hears)| (*n, *hears))
    }

    /// Whom others hear, as they say or as is told of them.
    pub fn heard_elsewhere(&self) -> NodeSet {
        let rows = self.heard.values().map(|row| row.hears);
        let rows = rows.chain(self.told.values().copied());
        NodeSet::from_bits(rows.fold(0, |bits, row| bits | row.bits()))
    }

    /// Those that a settled peer hears, or one of which it is told, and that it does not hear itself.
    pub fn unheard(&self) -> NodeSet {
        let by_settled = self.candidates().filter(|(_, row)| row.hears_this && !row.joining);
        let by_settled = by_settled.fold(0, |bits, (_, row)| bits | row.hears.bits());
        // What is told of is told no more once nobody misses anybody: then those that hear it say that they do.
        let by_told = self.told().fold(0, |bits, (_, hears)| bits | hears.bits()) & !self.silent.bits();
        let mut unheard = NodeSet::from_bits((by_settled | by_told) & !self.heard().bits() & !self.gone.bits());
        unheard.remove(self.this);
        unheard
    }
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
        nodes.iter().any(|n| !self.misses(n, nodes).is_empty())
    }

    fn hears(&self, from: NodeId, to: NodeId) -> bool {
        self.0.get(&from).is_none_or(|row| row.contains(to))
    }

    /// Which of `nodes` `node` hears.
    fn heard_by(&self, node: NodeId, nodes: NodeSet) -> NodeSet {
        let row = self.0.get(&node).map_or(u64::MAX, |row| row.bits());
        NodeSet::from_bits(nodes.bits() & row)
    }

    /// Which of `nodes` other than itself `node` does not hear.
    fn misses(&self, node: NodeId, nodes: NodeSet) -> NodeSet {
        let mut missed = NodeSet::from_bits(nodes.bits() & !self.heard_by(node, nodes).bits());
        missed.remove(node);
        missed
    }

    /// Those of `nodes` that talk with all the others.
    pub fn hubs(&self, nodes: NodeSet) -> NodeSet {
        // Who misses somebody, and who is missed.
        let mut apart = NodeSet::EMPTY;
        for n in nodes.iter() {
            let missed = self.misses(n, nodes);
            if !missed.is_empty() {
                apart = NodeSet::from_bits(apart.bits() | missed.bits());
                apart.insert(n);
            }
        }
        NodeSet::from_bits(nodes.bits() & !apart.bits())
    }

    /// Those of `nodes` that can agree with each other.
    ///
    /// A node goes if it fails to talk with two others, or, of two nodes, with the other one. Pairs that do not talk cost nobody his place as long as no node
    /// is in two of them: what they say is passed on to each other. Of several the one goes that talks with the fewest; among equals the one that the fewest hear, because the deaf cannot know that
    /// they are; then the higher id.
    pub fn settle(&self, nodes: NodeSet) -> NodeSet {
        // By whom each is not heard, and with whom it does not talk. Nearly always these are empty.
        let (mut unheard, mut apart) = ([NodeSet::EMPTY; MAX_NODES], [NodeSet::EMPTY; MAX_NODES]);
        for n in nodes.iter() {
            for missed in self.misses(n, nodes).iter() {
                unheard[missed.index()].insert(n);
                apart[missed.index()].insert(n);
                apart[n.index()].insert(missed);
            }
        }
        let mut left = nodes;
        loop {
            let within = |set: NodeSet| NodeSet::from_bits(set.bits() & left.bits()).len();
            let silent = |n: NodeId| within(apart[n.index()]);
            let allowed = usize::from(left.len() > 2);
            let rank = |n: &NodeId| {
                let heard_by = left.len() - 1 - within(unheard[n.index()]);
                (std::cmp::Reverse(silent(*n)), heard_by, std::cmp::Reverse(*n))
            };
            match left.iter().filter(|n| silent(*n) > allowed).min_by_key(rank) {
                None => return left,
                Some(worst) => left.remove(worst),
            }
        }
    }
}

/// The view this node belongs to, or `None` if it must step out.
///
/// Known are this node, the peers it hears, those of which it is told, and those that a settled peer hears; of the last nothing else is known,
/// and they count as hearing everybody. What any of them says comes, from one to the other, to all that can be reached by ways that work, if
/// only in one direction. So nodes that reach each other know the same: they form a *circle*, and [`Links::settle`] leaves the same view of it at
/// each of them. A circle that only hears another one, and is not heard there, cannot agree with it and cannot be known to it: it steps out
/// (`Ways::gives_way`).
pub fn agree(ears: &Ears) -> Agreement {
    let rows: BTreeMap<NodeId, Row> = ears.candidates().collect();
    let told: BTreeMap<NodeId, NodeSet> = ears.told().collect();
    let mut known: NodeSet = rows.keys().chain(told.keys()).copied().collect();
    known.insert(ears.this);
    known = NodeSet::from_bits(known.bits() | ears.unheard().bits());
    let joining = rows.iter().filter(|(_, r)| r.joining).map(|(n, _)| *n);
    // Nor do missing ears for one that has just started, even if it is not heard here yet.
    let starting = NodeSet::from_bits(ears.starting.bits() & known.bits());
    let joining: NodeSet = joining.chain(starting.iter()).collect();
    let mut links = Links::default();
    for (node, row) in &rows {
        // Missing ears of and for a joining node count against nobody but in what concerns this node.
        let mut hears = if row.joining {
            known
        } else {
            NodeSet::from_bits(row.hears.bits() | joining.bits())
        };
        hears.remove(ears.this);
        if row.hears_this {
            hears.insert(ears.this);
        }
        links.0.insert(*node, hears);
    }
    for (node, hears) in told {
        links.0.insert(node, NodeSet::from_bits(hears.bits() | joining.bits()));
    }
    let heard = NodeSet::from_bits(ears.heard().bits() | starting.bits());
    links.0.insert(ears.this, heard);
    let broken = links.is_broken(known);
    let (view, gives_way) = match broken {
        false => (known, false),
        true => {
            let ways = Ways::of(&links, known);
            (links.settle(ways.circle(ears.this)), ways.gives_way(ears.this))
        }
    };
    let inside = view.contains(ears.this) && !gives_way;
    let view = match inside {
        true => Some(view),
        // A joining node serves nothing and need not step out; it leaves out whom it cannot agree with.
        false if ears.joining => Some([ears.this].into_iter().collect()),
        false => None,
    };
    let left_out = |n: &NodeId| *n != ears.this && view.is_some_and(|v| !v.contains(*n));
    Agreement {
        view,
        excluded: known.iter().filter(left_out).collect(),
        links,
        divided: broken || !ears.cut_off.is_empty(),
    }
}

/// By which ways, over however many others, what each node says comes to each.
struct Ways {
    nodes: NodeSet,
    /// Whose word comes to each of them, its own included; none to any other.
    to: [NodeSet; MAX_NODES],
}

impl Ways {
    fn of(links: &Links, nodes: NodeSet) -> Self {
        let mut heard = [NodeSet::EMPTY; MAX_NODES];
        nodes.iter().for_each(|n| heard[n.index()] = links.heard_by(n, nodes));
        let mut to = [NodeSet::EMPTY; MAX_NODES];
        for node in nodes.iter() {
            let mut from: NodeSet = [node].into_iter().collect();
            let mut looked_at = NodeSet::EMPTY;
            while let Some(next) = NodeSet::from_bits(from.bits() & !looked_at.bits()).first() {
                looked_at.insert(next);
                from = NodeSet::from_bits(from.bits() | heard[next.index()].bits());
            }
            to[node.index()] = from;
        }
        Self { nodes, to }
    }

    /// Whose word comes to `node`, its own included.
    fn to(&self, node: NodeId) -> NodeSet {
        self.to[node.index()]
    }

    /// The nodes that reach `node` and are reached by it, itself included.
    fn circle(&self, node: NodeId) -> NodeSet {
        self.to(node).iter().filter(|n| self.to(*n).contains(node)).collect()
    }

    /// True if the circle of `node` hears another one that goes on. One deaf node, which cannot know that it is deaf, makes no two or more step out.
    fn gives_way(&self, node: NodeId) -> bool {
        let mut nodes: Vec<NodeId> = self.nodes.iter().collect();
        nodes.sort_by_key(|n| self.to(*n).len());
        let mut go_on = NodeSet::EMPTY;
        for n in nodes {
            let circle = self.circle(n);
            let above = NodeSet::from_bits(self.to(n).bits() & !circle.bits());
            let yields_to = |m: NodeId| go_on.contains(m) && (circle.len() < 2 || self.to(m).len() > 1);
            if !above.iter().any(yields_to) {
                go_on.insert(n);
            }
        }
        !go_on.contains(node)
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

    /// What node `this` sees when `broken` are the one-way links (from, to) that do not work.
    fn ears(this: usize, count: usize, broken: &[(usize, usize)]) -> Ears {
        let hears = |to: usize| -> NodeSet {
            (0..count)
                .filter(|&from| from != to && !broken.contains(&(from, to)))
                .map(n)
                .collect()
        };
        let heard = hears(this).iter().map(|p| (p, hears(p.index()))).collect::<Vec<_>>();
        let heard = heard.into_iter().map(|(p, row)| {
            (
                p,
                Row {
                    hears: row,
                    joining: false,
                    new_here: false,
                    hears_this: row.contains(n(this)),
                },
            )
        });
        // What is said goes round.
        let mut told = set(&[this]);
        for _ in 0..count {
            let heard = told.iter().map(|p| hears(p.index()).bits());
            told = NodeSet::from_bits(heard.fold(told.bits(), |bits, heard| bits | heard));
        }
        let direct = hears(this);
        let told = told.iter().filter(|p| *p != n(this) && !direct.contains(*p));
        Ears {
            this: n(this),
            joining: false,
            heard: heard.collect(),
            told: told.map(|p| (p, hears(p.index()))).collect(),
            gone: NodeSet::EMPTY,
            cut_off: NodeSet::EMPTY,
            silent: NodeSet::EMPTY,
            starting: NodeSet::EMPTY,
        }
    }

    fn all(count: usize, broken: &[(usize, usize)]) -> Vec<Option<NodeSet>> {
        (0..count).map(|i| agree(&ears(i, count, broken)).view).collect()
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
        let agreement = agree(&ears(1, 3, &[(0, 1)]));
        let links = agreement.links;
        assert_eq!(links.settle(set(&[0, 1, 2])), set(&[0, 1, 2]));
        assert_eq!(links.hubs(set(&[0, 1, 2])), set(&[2]));
        assert_eq!(
            links.settle(set(&[0, 1])),
            set(&[1]),
            "of two that do not talk one goes"
        );
        assert_eq!(links.hubs(set(&[0, 1])), NodeSet::EMPTY);
    }

    #[test]
    fn without_a_hub_nobody_goes_for_what_one_node_says() {
        // 0 and 1, and 2 and 3, do not hear each other, or one of them does not: nobody talks with all.
        for cut in [&[(0, 1), (1, 0), (2, 3), (3, 2)][..], &[(0, 1), (3, 2)]] {
            assert_eq!(all(4, cut), vec![Some(set(&[0, 1, 2, 3])); 4], "{cut:?}");
            let links = agree(&ears(0, 4, cut)).links;
            assert_eq!(links.settle(set(&[0, 1, 2, 3])), set(&[0, 1, 2, 3]));
            assert_eq!(links.hubs(set(&[0, 1, 2, 3])), NodeSet::EMPTY);
            assert_eq!(links.hubs(set(&[0, 1, 2])), set(&[2]), "whose partner is gone is a hub");
        }
        // 4 hears neither 0 nor 1, which two observers know; then 2 and 3 are the only pair.
        let cut = [(0, 4), (1, 4), (2, 3)];
        let rest = Some(set(&[0, 1, 2, 3]));
        assert_eq!(all(5, &cut), vec![rest, rest, rest, rest, None]);
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
    fn every_pattern_of_broken_ways_leaves_views_that_fit_together() {
        for count in 2..=4 {
            let ways: Vec<(usize, usize)> = (0..count)
                .flat_map(|a| (0..count).map(move |b| (a, b)))
                .filter(|(a, b)| a != b)
                .collect();
            for pattern in 0..1_u32 << ways.len() {
                let broken = ways.iter().enumerate().filter(|(i, _)| pattern & (1 << i) != 0);
                let broken: Vec<(usize, usize)> = broken.map(|(_, way)| *way).collect();
                let talk = |a: usize, b: usize| !broken.contains(&(a, b)) && !broken.contains(&(b, a));
                let views = all(count, &broken);
                for (i, view) in views.iter().enumerate() {
                    let Some(view) = view else { continue };
                    assert!(view.contains(n(i)), "{broken:?}: {views:?}");
                    for member in view.iter() {
                        assert_eq!(views[member.index()], Some(*view), "{broken:?}: {views:?}");
                    }
                    let others = (0..count).filter(|j| !view.contains(n(*j)) && views[*j].is_some());
                    others.for_each(|j| assert!(!talk(i, j), "{broken:?}: {views:?}"));
                }
                let hub = (0..count).any(|a| (0..count).all(|b| a == b || talk(a, b)));
                assert!(!hub || views.iter().any(Option::is_some), "{broken:?}: {views:?}");
            }
        }
    }

    #[test]
    fn a_joining_node_is_never_left_out() {
        let ways: Vec<(usize, usize)> = (0..4)
            .flat_map(|a| (0..4).map(move |b| (a, b)))
            .filter(|(a, b)| a != b)
            .collect();
        let mut alone = 0;
        for pattern in 0..1_u32 << ways.len() {
            let broken = ways.iter().enumerate().filter(|(i, _)| pattern & (1 << i) != 0);
            let broken: Vec<(usize, usize)> = broken.map(|(_, way)| *way).collect();
            let settled = ears(0, 4, &broken);
            let joining = Ears {
                joining: true,
                ..settled.clone()
            };
            let view = agree(&joining).view;
            assert!(view.is_some_and(|view| view.contains(n(0))), "{broken:?}");
            alone += u32::from(view == Some(set(&[0])) && agree(&settled).view.is_none());
        }
        assert!(alone > 0, "some of these nodes would step out if they had joined");
    }

    #[test]
    fn a_joining_node_disturbs_nobody() {
        let mut ears = ears(0, 3, &[]);
        for (node, row) in &mut ears.heard {
            if *node == n(2) {
                *row = Row {
                    hears: NodeSet::EMPTY,
                    joining: true,
                    new_here: true,
                    hears_this: false,
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
