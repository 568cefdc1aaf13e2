//! The promises of `farmd/docs/ARCHITECTURE.md`, "Life of a failover", as checks on a simulated farm: exclusion and
//! continuity after every event, coverage and exact shares once faults have stopped.

use std::time::Duration;

use super::plane::common;
use super::sim::{Node, Sim};
use crate::farm::Event;
use crate::handover;
use crate::id::BUCKETS;

/// A promise that was not kept.
#[derive(Debug)]
pub struct Breach(pub String);

impl Sim {
    fn breach(&self, text: String) -> Breach {
        let trace = self.trace.as_ref().map_or_else(
            || "set FARM_TRACE=1 for the trace".to_owned(),
            |t| t[t.len().saturating_sub(400)..].join("\n"),
        );
        Breach(format!("{trace}\nat {:.3} ms: {text}", self.now.as_secs_f64() * 1000.0))
    }

    /// Nobody accepts new connections of a bucket that somebody else, whom it has been hearing and who has been hearing it, accepts too.
    pub(super) fn check_exclusion(&mut self) -> Result<(), Breach> {
        let now = self.now;
        let settled = 2 * self.detection();
        let serving: Vec<usize> = (0..self.nodes.len())
            .filter(|&i| self.nodes[i].farm.is_some() && now < self.nodes[i].plane.lease_until)
            .collect();
        for (k, &a) in serving.iter().enumerate() {
            for &b in &serving[k + 1..] {
                let (one, other) = (&self.nodes[a].plane, &self.nodes[b].plane);
                let hears = |x, y| self.heard_since.get(&(x, y)).is_some_and(|at| now > *at + settled);
                let agreed = hears(a, b) && hears(b, a);
                if agreed {
                    for (x, y) in [(a, b), (b, a)] {
                        let (own, flows) = (&self.nodes[x].plane.own, &self.nodes[y].plane.flows);
                        let in_danger = flows
                            .iter()
                            .find(|(i, end)| **end > now && own[*i / 64] & (1 << (*i % 64)) != 0);
                        if let Some((bucket, _)) = in_danger {
                            return Err(
                                self.breach(format!("s{x} resets connections that s{y} has in bucket {bucket}"))
                            );
                        }
                    }
                }
                let reach = !self.cut.contains(&(a, b)) && !self.cut.contains(&(b, a));
                let both = one.open.iter().zip(&other.open).any(|(x, y)| x & y != 0);
                if !both || !reach {
                    self.overlaps.remove(&(a, b));
                    continue;
                }
                let since = *self.overlaps.entry((a, b)).or_insert(now);
                let too_long = self.longest_overlap.is_some_and(|longest| now > since + longest);
                if agreed || too_long {
                    let buckets: Vec<usize> = common(&one.open, &other.open).collect();
                    let n = buckets.len();
                    return Err(self.breach(format!(
                        "s{a} and s{b} both accept {n} buckets, {:?}, since {since:?}",
                        &buckets[..n.min(5)]
                    )));
                }
            }
        }
        Ok(())
    }

    /// Each bucket has exactly one owner, and it is ready; the shares are exact. Nobody owns anything if nobody is ready.
    pub fn check_covered(&self) -> Result<(), Breach> {
        let ready = |n: &Node| n.farm.is_some() && n.local.ready;
        let total: u64 = self
            .nodes
            .iter()
            .filter(|n| ready(n))
            .map(|n| u64::from(n.local.weights[0]))
            .sum();
        for (i, n) in self.nodes.iter().enumerate() {
            let weight = if ready(n) { u64::from(n.local.weights[0]) } else { 0 };
            let exact = if total == 0 {
                0.0
            } else {
                BUCKETS as f64 * weight as f64 / total as f64
            };
            let got = self.counts()[i];
            if (got as f64 - exact).abs() >= 1.0 {
                return Err(self.breach(format!(
                    "s{i} accepts {got} buckets, {exact:.1} are its share: {:?}",
                    self.counts()
                )));
            }
        }
        if total == 0 {
            return Ok(());
        }
        let quiet = self
            .nodes
            .iter()
            .all(|n| n.farm.is_none() || n.plane.held(self.now).is_empty());
        for (i, n) in self.nodes.iter().enumerate().filter(|(_, n)| quiet && n.farm.is_some()) {
            let guarded = n.plane.open_count() - n.plane.own_count();
            if guarded > 0 {
                return Err(self.breach(format!("s{i} guards {guarded} buckets in which nobody has connections")));
            }
        }
        for bucket in 0..BUCKETS {
            let owners = self
                .nodes
                .iter()
                .filter(|n| n.farm.is_some() && n.plane.accepts(self.now, bucket))
                .count();
            if owners != 1 {
                return Err(self.breach(format!("bucket {bucket} has {owners} owners: {:?}", self.counts())));
            }
        }
        Ok(())
    }

    /// Number of maps proposed since `since`.
    pub fn proposals(&self, since: Duration) -> usize {
        let proposed = |e: &Event| {
            matches!(
                e,
                Event::Handover {
                    event: handover::Event::Proposed { .. },
                    ..
                }
            )
        };
        self.log.iter().filter(|(at, _, e)| *at >= since && proposed(e)).count()
    }
}
