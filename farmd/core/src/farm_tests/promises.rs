//! The promises of `farmd/docs/PROTOCOL.md` as checks on a simulated farm: exclusion after every event, coverage and exact shares once
//! faults have stopped. Few moves are checked where a map is committed ([`super::node`]), continuity in [`super::continuity`].

use std::collections::VecDeque;
use std::time::Duration;

use super::node::Node;
use super::sim::Sim;
use crate::farm::Event;
use crate::handover;
use crate::id::BUCKETS;

/// Over which the rate of heartbeats is taken.
const SECOND: Duration = Duration::from_secs(1);

/// A promise that was not kept.
#[derive(Debug)]
pub struct Breach(pub String);

impl Sim {
    pub(super) fn breach(&self, text: String) -> Breach {
        let trace = self
            .trace
            .as_ref()
            .map_or_else(String::new, |t| t[t.len().saturating_sub(400)..].join("\n") + "\n");
        Breach(format!("{trace}at {:.3} ms: {text}", self.now.as_secs_f64() * 1000.0))
    }

    /// Both have known for longer than `time` that they hear each other.
    pub(super) fn hear_each_other(&self, a: usize, b: usize, time: Duration) -> bool {
        let long = |x: usize, y: usize| {
            let n = &self.nodes[x];
            n.hears(y) && self.now > n.heard_since[y] + time
        };
        long(a, b) && long(b, a)
    }

    /// The data plane of `a` works otherwise than before: with whom does it share a bucket?
    pub(super) fn plane_changed(&mut self, a: usize) {
        let open = &self.nodes[a].plane.open;
        let both = |b: usize| b != a && self.nodes[b].plane.open.meets(open);
        let row = (0..self.nodes.len())
            .filter(|b| both(*b))
            .fold(0, |row, b| row | 1 << b);
        for (b, other) in self.overlap.iter_mut().enumerate() {
            *other = *other & !(1 << a) | (row >> b & 1) << a;
        }
        self.overlap[a] = row;
        let left = &self.overlap;
        self.overlaps.retain(|(a, b), _| left[*a] & (1 << b) != 0);
    }

    /// A third node has talked with both for so long that the three are in one view, whether or not these two hear each other.
    fn is_bridged(&self, a: usize, b: usize) -> bool {
        let long = 4 * self.detection();
        let talks = |c: usize, end: usize| c != end && self.net.reach(c, end) && self.hear_each_other(c, end, long);
        (0..self.nodes.len()).any(|c| self.nodes[c].farm.is_some() && talks(c, a) && talks(c, b))
    }

    /// Nobody accepts new connections of a bucket that somebody else accepts too, if they have been hearing each other, or a third node both.
    pub(super) fn check_exclusion(&mut self) -> Result<(), Breach> {
        let nodes = self.nodes.len();
        for a in (0..nodes).filter(|a| self.overlap[*a] != 0).collect::<Vec<_>>() {
            for b in (a + 1..nodes)
                .filter(|b| self.overlap[a] & (1 << b) != 0)
                .collect::<Vec<_>>()
            {
                self.check_pair(a, b)?;
            }
        }
        Ok(())
    }

    fn check_pair(&mut self, a: usize, b: usize) -> Result<(), Breach> {
        let now = self.now;
        let serves = |n: &Node| n.farm.is_some() && now < n.plane.lease_until;
        let serve = serves(&self.nodes[a]) && serves(&self.nodes[b]);
        let bridged = serve && self.is_bridged(a, b);
        if !serve || !self.net.reach(a, b) && !bridged {
            self.overlaps.remove(&(a, b));
            return Ok(());
        }
        let since = *self.overlaps.entry((a, b)).or_insert(now);
        let too_long = self.longest_overlap.is_some_and(|longest| now > since + longest);
        if !too_long && !bridged && !self.hear_each_other(a, b, 2 * self.detection()) {
            return Ok(());
        }
        let both = self.nodes[a].plane.open.both(&self.nodes[b].plane.open);
        let some: Vec<usize> = both.iter().take(5).collect();
        Err(self.breach(format!(
            "s{a} and s{b} both accept {} buckets, {some:?}, since {since:?}",
            both.len()
        )))
    }

    /// Each bucket has exactly one owner, and it is ready; the shares are exact. Nobody owns anything if nobody is ready.
    pub fn check_covered(&self) -> Result<(), Breach> {
        self.check_covered_by(&(0..self.nodes.len()).collect::<Vec<_>>())
    }

    /// The same of some nodes, which are a farm of their own.
    pub fn check_covered_by(&self, side: &[usize]) -> Result<(), Breach> {
        let weight = |i: usize| {
            let n = &self.nodes[i];
            if n.ready() { u64::from(n.local.weights[0]) } else { 0 }
        };
        let total: u64 = side.iter().map(|i| weight(*i)).sum();
        let counts = self.counts();
        for &i in side {
            let exact = if total == 0 {
                0.0
            } else {
                BUCKETS as f64 * weight(i) as f64 / total as f64
            };
            if (counts[i] as f64 - exact).abs() >= 1.0 {
                return Err(self.breach(format!(
                    "s{i} accepts {} buckets, {exact:.1} are its share: {counts:?}",
                    counts[i]
                )));
            }
        }
        if total == 0 {
            return Ok(());
        }
        let running = || {
            side.iter()
                .map(|i| (*i, &self.nodes[*i]))
                .filter(|(_, n)| n.farm.is_some())
        };
        // The count of connections that finds none, a heartbeat, and the plan of whoever guarded.
        let told_by = Duration::from_millis(160) + self.slowest_plane() * 4;
        if running().all(|(_, n)| n.plane.held_at + told_by < self.now) {
            for (i, n) in running() {
                let guarded = n.plane.open_count() - n.plane.own_count();
                if guarded > 0 {
                    return Err(self.breach(format!("s{i} guards {guarded} buckets in which nobody has connections")));
                }
            }
        }
        for bucket in 0..BUCKETS {
            let owners = running().filter(|(_, n)| n.plane.accepts(self.now, bucket)).count();
            if owners != 1 {
                return Err(self.breach(format!("bucket {bucket} has {owners} owners: {counts:?}")));
            }
        }
        Ok(())
    }

    /// From here on no node sends more than `times` as many heartbeats on a lan, in any second, as one at rest does.
    pub fn limit_rate(&mut self, times: usize) {
        self.lately.iter_mut().for_each(VecDeque::clear);
        self.most_in_a_second = Some(times * (SECOND.as_nanos() / self.cluster.heartbeat_interval.as_nanos()) as usize);
    }

    /// A node sends a heartbeat on the first lan.
    pub(super) fn check_rate(&mut self, node: usize) -> Result<(), Breach> {
        let lately = &mut self.lately[node];
        lately.push_back(self.now);
        while lately.front().is_some_and(|at| *at + SECOND <= self.now) {
            lately.pop_front();
        }
        let sent = lately.len();
        self.busiest = self.busiest.max(sent);
        match self.most_in_a_second {
            Some(most) if sent > most => Err(self.breach(format!(
                "s{node} sent {sent} heartbeats in a second, {most} are the most"
            ))),
            _ => Ok(()),
        }
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
