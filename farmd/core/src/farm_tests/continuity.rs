//! Connections in a simulated farm, and the promise that those of a live server survive every change.
//!
//! A connection lies in one bucket, at the server that accepted it. All nodes on the client's side of the network see its packets. It *breaks* if one of
//! them owns the bucket outright ([`crate::balance::plan::BucketState::Own`]): that one's stack resets what it does not know. It *stalls* while its own
//! server takes no packets of it. Looked at whenever a data plane has gone over to another plan, and every time clients connect.

use std::time::Duration;

use super::node::Node;
use super::plane::Bits;
use super::promises::Breach;
use super::sim::{Sim, ms};
use crate::id::{BUCKETS, NodeId};

/// Connections made at a time.
const AT_A_TIME: usize = 4;
/// The longest connections outlast every fault of a random run.
const LONGEST: u64 = 3000;

pub struct Connection {
    pub bucket: usize,
    pub server: usize,
    /// The server's [`super::node::Node::run`] in which it was made.
    run: u64,
    end: Duration,
}

impl Sim {
    pub(super) fn connect(&mut self, server: usize, bucket: usize, end: Duration) {
        let n = &mut self.nodes[server];
        let last = n.plane.flows.entry(bucket).or_default();
        *last = end.max(*last);
        let run = n.run;
        self.connected += 1;
        self.connections.push(Connection {
            bucket,
            server,
            run,
            end,
        });
    }

    /// Each client meets one of the nodes that accept its bucket.
    pub(super) fn clients_connect(&mut self) {
        for _ in 0..AT_A_TIME {
            let bucket = self.rng.index(BUCKETS);
            let accepts = |n: &usize| {
                let n = &self.nodes[*n];
                n.farm.is_some() && n.plane.accepts(self.now, bucket)
            };
            let accepting: Vec<usize> = (0..self.nodes.len()).filter(accepts).collect();
            if !accepting.is_empty() {
                let server = self.rng.pick(&accepting);
                let end = self.now + ms(self.rng.range(10..=LONGEST));
                self.connect(server, bucket, end);
            }
        }
    }

    /// Two nodes have been hearing each other for so long that each knows what the other holds.
    fn know_each_other(&self, a: usize, b: usize) -> bool {
        let settled = self.cluster.heartbeat_interval * 2 + self.slowest_plane() * 3 + self.net.late_by;
        self.hear_each_other(a, b, settled)
    }

    /// No connection of a live server is reset by a node that knows the server.
    pub(super) fn check_connections(&mut self) -> Result<(), Breach> {
        let now = self.now;
        let mut connections = std::mem::take(&mut self.connections);
        let nodes = &self.nodes;
        let lives = |n: &Node| n.farm.is_some() || n.away;
        connections.retain(|c| c.end > now && lives(&nodes[c.server]) && nodes[c.server].run == c.run);
        let owner = |c: &Connection| {
            let mut others = (0..nodes.len()).filter(|n| *n != c.server);
            others.find(|&n| {
                let n = &nodes[n];
                n.farm.is_some() && now < n.plane.lease_until && n.plane.own.contains(c.bucket)
            })
        };
        let resets: Vec<(usize, usize)> = connections
            .iter()
            .enumerate()
            .filter_map(|(i, c)| Some((i, owner(c)?)))
            .collect();
        for (i, by) in resets.into_iter().rev() {
            let c = connections.swap_remove(i);
            if self.know_each_other(by, c.server) {
                return Err(self.breach(format!(
                    "s{by} resets a connection of s{} in bucket {}",
                    c.server, c.bucket
                )));
            }
            self.reset_apart += 1;
        }
        self.connections = connections;
        Ok(())
    }

    /// Once faults have stopped every connection that is left gets its packets to its server.
    pub fn check_served(&mut self) -> Result<(), Breach> {
        self.check_connections()?;
        let stalled = self
            .connections
            .iter()
            .find(|c| !self.nodes[c.server].plane.serves(self.now, c.bucket));
        match stalled {
            Some(c) => Err(self.breach(format!(
                "s{} no longer serves its connection in bucket {}",
                c.server, c.bucket
            ))),
            None => Ok(()),
        }
    }

    /// True if a request that `from` sends on ends at a node that accepts or keeps it.
    fn arrives(&self, bucket: usize, mut from: usize) -> bool {
        for _ in 0..self.nodes.len() {
            let sender = &self.nodes[from].plane;
            let Some(to) = sender.owners.owner_at(bucket).map(NodeId::index) else {
                return false;
            };
            let n = &self.nodes[to];
            let plane = &n.plane;
            if n.farm.is_none() || self.now >= plane.lease_until {
                return false;
            }
            // What comes from the very node that it would go to is kept.
            let goes_back = plane.owners.owner_at(bucket).map(NodeId::index) == Some(from);
            if !plane.sends_on.contains(bucket) || goes_back {
                return plane.takes;
            }
            from = to;
        }
        false
    }

    /// If all changes are planned, a connection request for any bucket is accepted or kept, and packets of every connection get to their server.
    pub(super) fn check_no_gap(&self) -> Result<(), Breach> {
        if !self.planned {
            return Ok(());
        }
        let mut taken = Bits::NONE;
        let works = |n: &&Node| n.farm.is_some() && self.now < n.plane.lease_until;
        for n in self.nodes.iter().filter(works) {
            taken.add(&n.plane.open);
            taken.add(&n.plane.keeps);
        }
        for (i, n) in self.nodes.iter().enumerate().filter(|(_, n)| works(n)) {
            let sent = n.plane.sends_on.without(&taken);
            sent.iter()
                .filter(|bucket| self.arrives(*bucket, i))
                .for_each(|bucket| taken.insert(bucket));
        }
        let missing = BUCKETS - taken.len();
        if missing > 0 {
            let first = (0..BUCKETS).find(|b| !taken.contains(*b));
            return Err(self.breach(format!(
                "nobody accepts or keeps requests for {missing} buckets, the first is {first:?}"
            )));
        }
        let stalled = self.connections.iter().find(|c| {
            let n = &self.nodes[c.server];
            c.end > self.now && n.farm.is_some() && n.run == c.run && !n.plane.serves(self.now, c.bucket)
        });
        match stalled {
            Some(c) => Err(self.breach(format!(
                "s{} drops packets of its connection in bucket {}",
                c.server, c.bucket
            ))),
            None => Ok(()),
        }
    }
}
