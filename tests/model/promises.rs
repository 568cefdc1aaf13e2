//! The promises of `farmd/docs/PROTOCOL.md`, checked after every step of the world, and two that they rest on: that the failure detector is
//! complete and accurate (Chandra and Toueg, Unreliable Failure Detectors for Reliable Distributed Systems, section 2).
//!
//! What the nodes believe is not asked: whether two of them can hear each other is what the world does with their datagrams.

use std::fmt;

use farm_core::balance::assign::BucketMap;
use farm_core::config::PartitionPolicy;
use farm_core::id::{Epoch, NodeId, NodeSet};
use farm_core::wire::heartbeat::Heartbeat;

use crate::node::{Fixed, Node};
use crate::plane::Bits;
use crate::world::World;

/// The five promises, and the two of the failure detector.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Promise {
    /// No two nodes that can hear each other accept new connections of one bucket.
    Exclusion,
    /// Some time after the last fault each bucket has one owner that is ready, and the shares are exact.
    Coverage,
    /// A map has exact shares and moves no more than they ask for.
    FewMoves,
    /// Nobody resets connections that a live node has.
    Continuity,
    /// A node that was not run, or that some cannot hear, has stopped accepting before they take over.
    SelfFencing,
    /// Nobody is taken for alive who has been silent for long, nor for one that others hear.
    Completeness,
    /// Some time after the last fault, of three or more nobody is taken for gone who talks with all others but one.
    Accuracy,
}

/// A promise that was not kept.
#[derive(Clone, Debug)]
pub struct Breach {
    /// Which one.
    pub promise: Promise,
    /// In which way.
    pub how: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.promise, self.how)
    }
}

impl World {
    /// Notes the first breach.
    pub fn check_promises(&mut self, fixed: &Fixed) {
        self.note_parted(fixed);
        if self.breach.is_none() {
            self.breach = self
                .check_pairs(fixed)
                .or_else(|| self.check_coverage(fixed))
                .or_else(|| self.check_completeness(fixed))
                .or_else(|| self.check_accuracy(fixed));
        }
    }

    fn breach(&mut self, promise: Promise, how: String) {
        self.breach.get_or_insert(Breach { promise, how });
    }

    /// Pairs that hear nothing of each other, not even by a third node: both sides serve, by policy. So does a node that hears nobody, which looks
    /// the same to it.
    fn note_parted(&mut self, fixed: &Fixed) {
        let n = self.nodes.len();
        let now = self.now;
        // Agreement after a merge takes the detection time and two round trips, or what a lost datagram adds to it.
        let grace = fixed.detection() + 4 * fixed.pulse();
        let cut = |from: usize, to: usize| self.nodes.get(to).is_some_and(|to| self.cut[from].contains(to.id));
        let deaf: Vec<bool> = (0..n)
            .map(|to| n > 2 && (0..n).all(|from| from == to || cut(from, to)))
            .collect();
        // Runs for long enough that it is in one view with all whom it talks with, and passes on what they say.
        let is_settled = |node: &Node| {
            let ends = node.stopping || node.ending || node.reloading || node.away;
            let hears = !node.dead && !self.deaf.contains(node.id);
            let late = node.upset_at.is_some_and(|at| now < at + fixed.lately());
            node.farm.is_some() && !node.paused && !ends && hears && !late
        };
        let hub = |a: usize, b: usize| {
            let between = |c: usize| [a, b].iter().all(|end| *end != c && !cut(*end, c) && !cut(c, *end));
            (0..n).any(|c| between(c) && is_settled(&self.nodes[c]))
        };
        let parted = |a: usize, b: usize| (cut(a, b) && cut(b, a) && !hub(a, b)) || deaf[a] || deaf[b];
        let pairs: Vec<bool> = (0..n * n).map(|i| parted(i / n, i % n)).collect();
        for (at, parted) in self.parted.iter_mut().zip(pairs) {
            *at = if parted {
                Some(now)
            } else {
                at.filter(|at| now < *at + grace)
            };
        }
    }

    fn check_pairs(&self, fixed: &Fixed) -> Option<Breach> {
        let n = self.nodes.len();
        for a in 0..n {
            for b in a + 1..n {
                let breach = match self.parted[a * n + b] {
                    Some(_) => self.check_parted_pair(a, b, fixed),
                    None => self.check_pair(a, b, fixed),
                };
                if breach.is_some() {
                    return breach;
                }
            }
        }
        None
    }

    fn check_pair(&self, a: usize, b: usize, fixed: &Fixed) -> Option<Breach> {
        let now = self.now;
        let (one, other) = (&self.nodes[a], &self.nodes[b]);
        let both = one.plane.accepts(now).and(&other.plane.accepts(now));
        let names = format!("s{a} and s{b}");
        if !both.is_empty() {
            let out = |x: &Node| x.paused || x.upset_at.is_some_and(|at| now < at + fixed.lately());
            let unheard = self.cut.iter().any(|to| !to.is_empty());
            let promise = if out(one) || out(other) || unheard {
                Promise::SelfFencing
            } else {
                Promise::Exclusion
            };
            let how = format!("{names} both accept {} buckets", both.len());
            return Some(Breach { promise, how });
        }
        // Who is replaced has its connections all the time.
        let gone = |x: &Node| x.farm.is_none() && !x.away;
        let upset = |x: &Node| x.paused || gone(x) || x.upset_at.is_some_and(|at| now < at + fixed.recovery);
        if upset(one) || upset(other) {
            return None;
        }
        for (x, y) in [(one, other), (other, one)] {
            let reset = x.plane.resets(now).and(&y.plane.keeps());
            if !reset.is_empty() {
                let how = format!(
                    "s{} resets connections that s{} has in {} buckets",
                    x.id.index(),
                    y.id.index(),
                    reset.len()
                );
                return Some(Breach {
                    promise: Promise::Continuity,
                    how,
                });
            }
        }
        None
    }

    /// By the policy `witness` two that do not talk accept the same only while the witness answers both, as soon as both have noticed: the
    /// one up to a pulse after the other, which takes over when it does, and then the data plane closes.
    fn check_parted_pair(&self, a: usize, b: usize, fixed: &Fixed) -> Option<Breach> {
        let noticed = self.calm_since + fixed.detection() + 2 * fixed.pulse();
        let answered = |i: usize| self.hidden[i].is_none();
        if fixed.partition != PartitionPolicy::Witness || self.now < noticed || (answered(a) && answered(b)) {
            return None;
        }
        let both = self.nodes[a].plane.accepts(self.now);
        let both = both.and(&self.nodes[b].plane.accepts(self.now)).len();
        (both > 0).then(|| Breach {
            promise: Promise::Exclusion,
            how: format!("s{a} and s{b} both accept {both} buckets, and the witness does not answer both"),
        })
    }

    fn check_coverage(&self, fixed: &Fixed) -> Option<Breach> {
        let now = self.now;
        if now < self.calm_since + fixed.recovery {
            return None;
        }
        let breach = |how: String| {
            Some(Breach {
                promise: Promise::Coverage,
                how,
            })
        };
        // Where nothing comes in nobody is served.
        let serving = |n: &&Node| n.serves() && !n.dead;
        let serving: Vec<&Node> = self.nodes.iter().map(|n| &**n).filter(serving).collect();
        if serving.is_empty() {
            return None;
        }
        if fixed.partition == PartitionPolicy::Majority {
            let first = serving.iter().any(|n| n.id.index() == 0);
            let whole = 2 * serving.len() + usize::from(first) > self.nodes.len();
            if self.has_broken_way() || !whole {
                return self.check_one_part_serves();
            }
        }
        let divided = self.nodes.iter().any(|n| n.farm.is_none()) || self.has_broken_way();
        if fixed.partition == PartitionPolicy::Witness && divided {
            return self.check_parts_with_witness(fixed);
        }
        let mut covered = Bits::NONE;
        for node in &serving {
            covered = covered.or(&node.plane.accepts(now));
        }
        if covered.len() < farm_core::id::BUCKETS {
            return breach(format!(
                "{} buckets are nobody's",
                farm_core::id::BUCKETS - covered.len()
            ));
        }
        if self.has_broken_way() {
            return None;
        }
        // One configuration serves; who has another one is kept out.
        let accepting = serving.iter().find(|n| !n.plane.accepts(now).is_empty());
        let counts = accepting.map(|n| fixed.configuration_of(n.id));
        let serving: Vec<&Node> = serving
            .into_iter()
            .filter(|n| counts == Some(fixed.configuration_of(n.id)))
            .collect();
        let shares: Vec<usize> = self.nodes.iter().map(|n| n.plane.accepts(now).len()).collect();
        let total: u64 = serving.iter().map(|n| u64::from(fixed.weight_of(n.id))).sum();
        let uneven = serving
            .iter()
            .any(|n| !is_share(shares[n.id.index()], fixed.weight_of(n.id), total));
        if uneven || shares.iter().sum::<usize>() != farm_core::id::BUCKETS {
            return breach(format!("the shares are {shares:?}"));
        }
        let held = self
            .nodes
            .iter()
            .any(|n| n.farm.is_some() && !n.plane.held().is_empty());
        let guarded: usize = serving
            .iter()
            .map(|n| n.plane.sheet.open.minus(&n.plane.sheet.own).len())
            .sum();
        if guarded > 0 && !held {
            return breach(format!(
                "{guarded} buckets are guarded although nobody has connections in them"
            ));
        }
        None
    }

    /// Belief ends some time after the last word that can have come in, however long it has waited there.
    fn check_completeness(&self, fixed: &Fixed) -> Option<Breach> {
        let n = self.nodes.len();
        for (i, node) in self.nodes.iter().enumerate().filter(|(_, node)| !node.paused) {
            let Some(farm) = &node.farm else { continue };
            let spoken = |peer: NodeId| self.spoken[peer.index() * n + i];
            let heard = farm.membership().heard(self.now);
            let silent = heard.iter().find(|peer| self.now >= spoken(*peer) + fixed.silence());
            if let Some(peer) = silent {
                let silence = self.now - spoken(peer);
                return Some(Breach {
                    promise: Promise::Completeness,
                    how: format!("s{i} takes s{} for alive after {silence:?} of silence", peer.index()),
                });
            }
            let membership = farm.membership();
            let known = NodeSet::from_bits(membership.view().bits() | membership.excluded().bits());
            let silent = |peer: &NodeId| {
                let said = peer.index() * n;
                peer.index() != i && (0..n).all(|to| self.now >= self.spoken[said + to] + fixed.silence())
            };
            // Who has stepped out need not look any more.
            let mut known = known.iter().filter(|_| membership.fenced().is_none());
            if let Some(peer) = known.find(silent) {
                return Some(Breach {
                    promise: Promise::Completeness,
                    how: format!("s{i} knows of s{}, which nobody has heard for long", peer.index()),
                });
            }
        }
        None
    }

    /// It takes two observers to evict a node, where there are three or more.
    fn check_accuracy(&self, fixed: &Fixed) -> Option<Breach> {
        if self.now < self.calm_since + fixed.recovery {
            return None;
        }
        let running = self.nodes.iter().map(|n| &**n);
        let running: Vec<&Node> = running.filter(|n| n.farm.is_some() && !n.paused).collect();
        let missed = |a: &Node| running.iter().filter(|b| !self.talk(a, b, fixed)).count();
        if running.len() < 3 {
            return None;
        }
        let members: Vec<&Node> = running.iter().copied().filter(|n| missed(n) <= 1).collect();
        for a in &members {
            let view = a.farm.as_ref().map_or(NodeSet::EMPTY, |f| f.membership().view());
            let evicted = members.iter().find(|b| b.id != a.id && !view.contains(b.id));
            if let Some(b) = evicted {
                let how = format!("s{} is not in the view {view:?} of s{}", b.id.index(), a.id.index());
                return Some(Breach {
                    promise: Promise::Accuracy,
                    how,
                });
            }
        }
        None
    }

    /// What either says comes to the other, and is meant for it.
    fn talk(&self, a: &Node, b: &Node, fixed: &Fixed) -> bool {
        let cut = |from: &Node, to: &Node| self.is_cut(from.id, to.id);
        let lan = self.lan_down.is_none() || a.seen.len() > 1;
        let one_cluster = fixed.cluster_digest_of(a.id) == fixed.cluster_digest_of(b.id);
        a.id == b.id || (lan && one_cluster && !cut(a, b) && !cut(b, a))
    }

    /// By the policy `majority` at most one part of a divided farm serves.
    fn check_one_part_serves(&self) -> Option<Breach> {
        let mut covered = Bits::NONE;
        for node in &self.nodes {
            let accepts = node.plane.accepts(self.now);
            let both = covered.and(&accepts).len();
            if both > 0 {
                return Some(Breach {
                    promise: Promise::Exclusion,
                    how: format!("two parts accept {both} buckets, and only one has the majority"),
                });
            }
            covered = covered.or(&accepts);
        }
        None
    }

    /// By the policy `witness` a part that lacks nodes is served by those of its nodes that the witness answers, and by all of them alone; a
    /// part that lacks none by all its nodes. Not judged while a way is cut in one direction only: parts are not what that makes.
    fn check_parts_with_witness(&self, fixed: &Fixed) -> Option<Breach> {
        let n = self.nodes.len();
        let cut = |from: usize, to: usize| self.is_cut(self.nodes[from].id, self.nodes[to].id);
        if (0..n).any(|a| (0..n).any(|b| cut(a, b) != cut(b, a))) {
            return None;
        }
        let talk = |a: usize, b: usize| a == b || (!cut(a, b) && [a, b].iter().all(|i| self.nodes[*i].farm.is_some()));
        for first in 0..n {
            let mut part = vec![first];
            while let Some(more) = (0..n).find(|i| !part.contains(i) && part.iter().any(|j| talk(*i, *j))) {
                part.push(more);
            }
            let answered = |i: &usize| part.len() == n || self.hidden[*i].is_none();
            let serving = |i: &usize| self.nodes[*i].serves() && answered(i);
            let total: u64 = part
                .iter()
                .filter(|i| serving(i))
                .map(|i| u64::from(fixed.weight_of(self.nodes[*i].id)))
                .sum();
            let mut covered = Bits::NONE;
            for i in &part {
                let (node, accepts) = (&self.nodes[*i], self.nodes[*i].plane.accepts(self.now));
                let weight = if serving(i) { fixed.weight_of(node.id) } else { 0 };
                if !is_share(accepts.len(), weight, total.max(1)) || !covered.and(&accepts).is_empty() {
                    let how = format!("s{i} of the part {part:?} accepts {} buckets", accepts.len());
                    return Some(Breach {
                        promise: Promise::Coverage,
                        how,
                    });
                }
                covered = covered.or(&accepts);
            }
            if total > 0 && covered.len() < farm_core::id::BUCKETS {
                let how = format!(
                    "in the part {part:?} {} buckets are nobody's",
                    farm_core::id::BUCKETS - covered.len()
                );
                return Some(Breach {
                    promise: Promise::Coverage,
                    how,
                });
            }
        }
        None
    }

    /// A map that node `by` proposes in `heartbeat` is the nearest to the newest one that is known to those who are to take part.
    pub fn check_moves(&mut self, by: NodeId, heartbeat: &Heartbeat, fixed: &Fixed) {
        if self.parted.iter().any(Option::is_some) {
            return;
        }
        let group = heartbeat.modules.first().and_then(|m| m.groups.first());
        let Some(proposal) = group.and_then(|g| g.map.as_ref()) else {
            return;
        };
        let members = self.nodes.iter().filter(|n| proposal.view.contains(n.id) && !n.paused);
        let newest = members.max_by_key(|n| n.committed(fixed));
        // Where nothing is committed nothing is open, and no move costs anything.
        let newest = newest.filter(|n| n.committed(fixed) > Epoch::default());
        let Some(newest) = newest.and_then(|n| n.farm.as_ref()?.map(&fixed.module, 0)) else {
            return;
        };
        let moves = newest.moves_to(&proposal.map);
        let least = least_moves(newest, &proposal.map);
        let counts = proposal.map.counts();
        let total: u64 = counts.keys().map(|n| u64::from(fixed.weight_of(*n))).sum();
        let uneven = counts
            .iter()
            .any(|(n, count)| !is_share(*count as usize, fixed.weight_of(*n), total));
        if moves > least || uneven {
            let how = format!(
                "s{} moves {moves} buckets where {least} are enough; shares {counts:?}",
                by.index()
            );
            self.breach(Promise::FewMoves, how);
        }
    }
}

/// True if `count` buckets are the share of one that has `weight` of `total`, rounded up or down.
fn is_share(count: usize, weight: u16, total: u64) -> bool {
    let (count, exact) = (count as u64 * total, farm_core::id::BUCKETS as u64 * u64::from(weight));
    count.abs_diff(exact) < total
}

/// Moves without which the shares of `new` cannot be had from `old`: what each owner gains, and what has no owner any more.
fn least_moves(old: &BucketMap, new: &BucketMap) -> usize {
    let (before, after) = (old.counts(), new.counts());
    let gains = after
        .iter()
        .map(|(n, count)| count.saturating_sub(before.get(n).copied().unwrap_or(0)) as usize);
    let unowned = |counts: u32| farm_core::id::BUCKETS - counts as usize;
    gains.sum::<usize>() + unowned(after.values().sum()).saturating_sub(unowned(before.values().sum()))
}
