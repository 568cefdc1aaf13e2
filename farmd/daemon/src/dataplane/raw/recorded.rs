//! The part of the data plane's thread that has recorded connection requests answered, or thrown away with all that has come in while this host did not run.
//!
//! What is recorded, and whose turn it is, [`Recorder`](crate::dataplane::replay::Recorder) knows.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use farm_core::balance::flow::FlowKey;
use farm_core::balance::plan::Plan;
use farm_sys::clock::BootInstant;
use tracing::debug;

use super::{RING_SLOTS, Worker};
use crate::dataplane::Count;

impl Worker {
    /// Takes the recorded connection requests out of their rings; `plan` says who was to answer them.
    pub(super) fn record(&mut self, plan: &Plan) {
        for interface in &mut self.interfaces {
            if let Some(syns) = &mut interface.syns {
                self.recorder.read(plan, syns);
            }
        }
        let pause = self.recorder.pause(plan);
        self.record_at = (!self.interfaces.is_empty()).then(|| Instant::now() + pause);
    }

    /// Answers, or sends on, what a node that is gone was to answer, apart from the flows in `answered`.
    pub(super) fn replay(&mut self, answered: &BTreeSet<FlowKey>) {
        if !self.judge.lease.holds(BootInstant::now()) {
            return;
        }
        let (plan, known) = (&self.judge.plan, &mut self.judge.known);
        let now = Instant::now();
        let due = self.recorder.take_due(plan, &mut |flow| {
            answered.contains(flow) || known.has(plan, now, flow, None)
        });
        self.judge.replay(due, &self.interfaces);
    }

    pub(super) fn discard_backlog(&mut self) {
        self.judge.forget_held();
        if let Some(tap) = &self.judge.tap
            && let Err(error) = tap.tap.drain()
        {
            debug!(%error, "reading the TAP failed");
        }
        for interface in &mut self.interfaces {
            match interface.ring.recv(2 * RING_SLOTS as usize, |_| {}) {
                Ok(frames) => self.judge.counters.add(Count::LeaseEnded, frames as u64),
                Err(error) => debug!(%error, interface = interface.name, "reading the ring failed"),
            }
        }
        let plan = Arc::clone(&self.judge.plan);
        self.record(&plan);
        self.recorder.forget();
    }
}
