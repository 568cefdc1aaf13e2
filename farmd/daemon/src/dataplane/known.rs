//! Which connections this host has in buckets that are not its alone.
//!
//! Owns what the last look-up of all connections has found, what was opened since, and a question to the kernel for single ones: a connection
//! may end at any time without a frame that tells so, and its client may open a new one, elsewhere, from the same addresses. So the
//! list only says for which frames the kernel is asked. Decides nothing.

// Looked up by key; where it is iterated the order does not matter.
#![allow(clippy::disallowed_types)]

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use farm_core::balance::flow::FlowKey;
use farm_core::balance::plan::Plan;
use farm_core::wire::heartbeat::BucketSet;
use tracing::debug;

use super::connections::{Connection, Connections, place, sort_out, with_half_open};
use super::half_open::HalfOpen;
use super::lister::Lost;
use super::{Count, Counters, change};
use crate::event::HeldGroup;

/// See the module doc.
#[derive(Debug)]
pub struct Known {
    /// Connections in guarded, draining and foreign buckets, some of which may have ended.
    flows: HashSet<FlowKey>,
    /// Buckets of each group whose connections were this host's alone when they were last looked up: all of them, because nobody else can have
    /// had any.
    own_before: Vec<BucketSet>,
    half_open: HalfOpen,
    looked_since: Option<Instant>,
    /// What has ended, as it turned out, while the look-up was under way.
    ended: HashSet<Connection>,
    kernel: Connections,
    /// Connections are opened without this thread, by the program in the kernel: each is asked for.
    all: bool,
    counters: Arc<Counters>,
}

impl Known {
    /// Knows of nothing yet.
    pub fn new(kernel: Connections, counters: Arc<Counters>) -> Self {
        Self {
            flows: HashSet::new(),
            own_before: Vec::new(),
            half_open: HalfOpen::default(),
            looked_since: None,
            ended: HashSet::new(),
            kernel,
            all: false,
            counters,
        }
    }

    /// How many connections are remembered.
    pub fn count(&self) -> usize {
        self.flows.len()
    }

    /// Whether connections may be opened that this thread does not see.
    pub fn set_all(&mut self, all: bool) {
        self.all = all;
    }

    /// `new` takes the place of `old`.
    pub fn handle_plan(&mut self, old: &Plan, new: &Plan) {
        self.own_before = change::own_before(old, &self.own_before, new);
    }

    /// The request of `flow` was accepted; `sequence` is its own. `guarded` if others may have connections in its bucket.
    pub fn open(&mut self, now: Instant, flow: FlowKey, sequence: u32, guarded: bool) {
        let since = self.looked_since.map_or(now, |looked| looked.min(now));
        self.half_open.note(now, since, flow, sequence);
        if guarded {
            self.flows.insert(flow);
        }
    }

    /// True if this host has the connection that a frame belongs to, a handshake with `sequence` included. Costs some microseconds
    /// where that is likely.
    pub fn has(&mut self, plan: &Plan, now: Instant, flow: &FlowKey, sequence: Option<u32>) -> bool {
        if !self.all && !self.flows.contains(flow) && !self.was_own(plan, flow) {
            return false;
        }
        match self.kernel.has(flow.into()) {
            Ok(true) => {
                self.flows.insert(*flow);
                true
            }
            Ok(false) if self.half_open.contains(now, flow, sequence) => true,
            Ok(false) => {
                self.forget(flow);
                false
            }
            Err(error) => {
                self.counters.add(Count::ListFailed, 1);
                debug!(%error, "one connection could not be looked up");
                true
            }
        }
    }

    fn forget(&mut self, flow: &FlowKey) {
        if self.flows.remove(flow) {
            self.counters.add(Count::FlowEnded, 1);
        }
        if self.looked_since.is_some() {
            self.ended.insert(flow.into());
        }
    }

    /// Forgets what was half open in buckets that are `lost`.
    pub fn forget_half_open(&mut self, lost: &Lost) {
        self.half_open.forget(|flow| lost.contains(flow.into()));
    }

    /// True if `flow` lies in a bucket whose connections have not been looked up since it was this host's alone.
    fn was_own(&self, plan: &Plan, flow: &FlowKey) -> bool {
        if self.own_before.iter().all(BucketSet::is_empty) {
            return false;
        }
        place(plan, flow.into()).is_some_and(|(group, bucket, _)| {
            self.own_before
                .get(group)
                .is_some_and(|before| before.contains(bucket.index()))
        })
    }

    /// All connections are looked up from `now` on, until [`Self::replace`]: younger ones are remembered by their requests.
    pub fn look_since(&mut self, now: Instant) {
        self.looked_since.get_or_insert(now);
    }

    /// Knows from here on which connections this host had at `began`, and returns what of them is in buckets it does not own.
    pub fn replace(&mut self, plan: &Plan, began: Instant, mut connections: Vec<Connection>) -> Vec<HeldGroup> {
        connections.retain(|connection| !self.ended.contains(connection));
        let connections = with_half_open(connections, self.half_open.since(began).map(Connection::from));
        self.ended.clear();
        self.looked_since = None;
        self.own_before = vec![BucketSet::default(); plan.groups.len()];
        self.flows.clear();
        sort_out(plan, connections, |flow| {
            self.flows.insert(flow);
        })
    }

    /// What this host has, of what it knows, in buckets it does not own.
    pub fn held(&self, plan: &Plan) -> Vec<HeldGroup> {
        sort_out(plan, self.flows.iter().map(Connection::from), drop)
    }
}
