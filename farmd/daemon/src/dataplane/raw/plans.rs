//! The part of the data plane's thread that goes over from one plan to the next, and knows this host's connections when it does.

use std::sync::Arc;
use std::time::Instant;

use farm_core::balance::plan::{BucketState, GroupPlan, Plan};
use farm_sys::clock::BootInstant;
use tracing::{debug, warn};

use super::interface::join_groups;
use super::{FAILURE_LOG_INTERVAL, RECOUNT, Worker};
use crate::dataplane::Count;
use crate::dataplane::change::{self, Change};
use crate::dataplane::kernel::Kernel;
use crate::dataplane::lister::{Listed, Lost};
use crate::event::{Event, HeldGroup};

/// And that many times the duration of a look-up lie between two, so that many connections do not stop the packets.
const RECOUNT_REST: u32 = 20;

impl Worker {
    /// Goes over to `plan`, at once or when what it needs is known.
    pub(super) fn handle_plan(&mut self, plan: Arc<Plan>) {
        let change = change::of(&self.judge.plan, &plan);
        self.waiting = None;
        if change == Change::Releases {
            self.watch_openings(&plan);
            self.waiting = Some(plan);
            if self.look_up_at.is_none() {
                self.look_up();
            }
            return;
        }
        let buckets = change::lost(&self.judge.plan, &plan);
        self.apply(Arc::clone(&plan));
        if buckets.iter().any(|set| !set.is_empty()) {
            let lost = Lost { plan, buckets };
            self.judge.known.forget_half_open(&lost);
            self.lost.push(lost);
        }
        if change == Change::Closes {
            self.owes_report = true;
            if self.judge.kernel.as_ref().is_some_and(Kernel::is_at_work) {
                self.settle();
            } else {
                self.look_up();
            }
        } else if !self.owes_report {
            if self.known {
                self.found = self.judge.known.held(&self.judge.plan);
            } else {
                self.hold_all();
            }
            self.report();
        }
    }

    /// Swaps the plan between two frames. What has come before is judged by the old one: a bucket opens here after another node has closed it,
    /// and what came before that is the other node's.
    fn apply(&mut self, plan: Arc<Plan>) {
        if !self.judge.lease.holds(BootInstant::now()) {
            // What came in while this host did not run has been answered by others.
            self.discard_backlog();
        }
        let began = Instant::now();
        for interface in &mut self.interfaces {
            self.judge.work_off(interface);
        }
        if self.judge.kernel.as_ref().is_some_and(Kernel::is_at_work) {
            self.judge.work_off_punted(&self.interfaces);
        }
        let judged = began.elapsed();
        for interface in &mut self.interfaces {
            join_groups(&plan, interface);
        }
        self.install(&plan);
        let old = self.judge.swap(plan);
        self.set_filters();
        let filtered = began.elapsed();
        // Only from here on the new owner's filter passes what comes for it; all that came before was for the old one.
        self.record(&old);
        // Before anything is answered in a dead node's place: the client's next packet must not go to the dead one.
        self.responder.handle_plan(&old, &self.judge.plan, &mut self.interfaces);
        let answered = self.judge.judge_held(&self.interfaces);
        self.replay(&answered);
        self.judge.counters.add(Count::PlansApplied, 1);
        if self.recount_at.is_none() && self.judge.plan.groups.iter().any(GroupPlan::needs_sockets) {
            self.recount_at = Some(Instant::now() + RECOUNT);
        }
        let version = self.judge.plan.version;
        debug!(version, ?judged, ?filtered, whole = ?began.elapsed(), "plan applied");
    }

    /// Asks for this host's connections; the answer comes as a command.
    pub(super) fn look_up(&mut self) {
        let plan = self.waiting.as_ref().unwrap_or(&self.judge.plan);
        self.lister.ask(plan.vips.iter().map(|v| v.addr).collect(), &self.lost);
        self.judge.known.look_since(Instant::now());
        self.recount_at = None;
    }

    /// This host's connections are known: what waited for that is done, and the owner loop is told what it holds.
    pub(super) fn handle_listed(&mut self, listed: Listed) {
        self.lister.handle_answer();
        self.judge
            .counters
            .add(Count::HandshakeForgotten, listed.handshakes.into());
        let plan = self.waiting.as_ref().unwrap_or(&self.judge.plan);
        if !plan.vips.iter().all(|vip| listed.vips.contains(&vip.addr)) {
            // Asked for a plan before this one.
            return self.look_up();
        }
        if let Some(from) = self.believed_from.filter(|from| listed.began < *from) {
            self.look_up_at = Some(from);
            return;
        }
        self.believed_from = None;
        for lost in self.lost.drain(..listed.forgot.min(self.lost.len())) {
            // What was taken in the moment before the plan may have come to this thread after it.
            self.judge.known.forget_half_open(&lost);
        }
        if !self.lost.is_empty() {
            // Lost since it was asked.
            return self.look_up();
        }
        if let Some(kernel) = &mut self.judge.kernel {
            kernel.set_tracked(listed.tracked);
        }
        if let Some(plan) = self.waiting.take() {
            self.apply(plan);
        }
        match listed.connections {
            Ok(connections) => {
                self.found = self.judge.known.replace(&self.judge.plan, listed.began, connections);
                self.known = true;
                self.counted = !self.judge.plan.vips.is_empty();
                let pause = RECOUNT.max(listed.began.elapsed() * RECOUNT_REST);
                let needed = self.judge.plan.groups.iter().any(GroupPlan::needs_sockets);
                self.recount_at = needed.then(|| Instant::now() + pause);
            }
            Err(error) => {
                self.known = false;
                self.hold_all();
                self.recount_at = Some(Instant::now() + RECOUNT / 10);
                self.judge.counters.add(Count::ListFailed, 1);
                if self.failure_told.is_none_or(|at| at.elapsed() > FAILURE_LOG_INTERVAL) {
                    self.failure_told = Some(Instant::now());
                    warn!(%error, "this host's connections cannot be listed; buckets that change hands wait for it");
                }
            }
        }
        self.owes_report = false;
        self.report();
        self.succeed();
    }

    /// What may be held is held, or peers would reset it.
    fn hold_all(&mut self) {
        let plan = &self.judge.plan;
        self.found.resize(plan.groups.len(), HeldGroup::default());
        for (found, group) in self.found.iter_mut().zip(&plan.groups) {
            let states = (0u16..).zip(group.states.iter());
            let draining = states.filter(|(_, state)| **state == BucketState::Draining);
            found.buckets = draining.map(|(index, _)| index).collect();
        }
    }

    fn report(&self) {
        self.events.send(Event::PlanApplied {
            version: self.judge.plan.version,
            held: self.found.clone(),
        });
    }
}
