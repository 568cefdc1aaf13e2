//! The part of the data plane's thread that keeps the program in the kernel in step: its plans, which buckets it leaves to the thread, and from when on a look-up of
//! connections is whole although the program opens some.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::balance::plan::Plan;
use farm_core::wire::heartbeat::BucketSet;
use farm_sys::interface;
use tracing::{debug, warn};

use super::{FAILURE_LOG_INTERVAL, Worker, set_filter};
use crate::dataplane::kernel::Kernel;
use crate::dataplane::taken::WATCH;
use crate::dataplane::{Count, change};

/// Time that a frame takes from the program in the kernel to the stack, on a busy machine.
const SETTLE: Duration = Duration::from_millis(2);

impl Worker {
    /// Has the kernel judge by `plan`, which takes the place of the one at work. Buckets that have opened lately are told, so that what starts something in them
    /// comes to this thread, which knows what it has taken.
    pub(super) fn install(&mut self, plan: &Plan) {
        if self.judge.kernel.is_none() {
            return;
        }
        let opened = change::opened(&self.judge.plan, plan);
        let now = Instant::now();
        if opened.iter().any(|set| !set.is_empty()) {
            self.young_until = Some(now + WATCH);
        }
        let before = self.judge.plan.groups.iter().zip(std::mem::take(&mut self.young));
        let before: Vec<(&str, BucketSet)> = before.map(|(group, set)| (group.name.as_str(), set)).collect();
        let still = |name: &str| before.iter().find(|(known, _)| *known == name).map(|(_, set)| set);
        let young = plan.groups.iter().zip(&opened).map(|(group, opened)| {
            let still = still(&group.name).into_iter().flat_map(BucketSet::iter);
            still.chain(opened.iter()).collect()
        });
        self.young = young.collect();
        let young = self.young.clone();
        self.install_with(plan, &young);
    }

    /// Until `next` takes its buckets away, what starts something in them comes to this thread, which notes it: the kernel answers it while the connections
    /// are looked up.
    pub(super) fn watch_openings(&mut self, next: &Plan) {
        if !self.judge.kernel.as_ref().is_some_and(Kernel::is_at_work) {
            return;
        }
        let closing = change::opened(next, &self.judge.plan);
        let watched = closing.iter().enumerate().map(|(i, closing)| {
            let young = self.young.get(i).into_iter().flat_map(BucketSet::iter);
            young.chain(closing.iter()).collect()
        });
        let watched: Vec<BucketSet> = watched.collect();
        self.install_again(&watched);
        self.settle();
    }

    /// No bucket has opened lately.
    pub(super) fn grow_up(&mut self) {
        self.young_until = None;
        self.young = vec![BucketSet::default(); self.judge.plan.groups.len()];
        let young = self.young.clone();
        self.install_again(&young);
    }

    /// The plan at work, as it is; what is looked up for the one that waits is looked up anew.
    pub(super) fn install_anew(&mut self) {
        let young = self.young.clone();
        self.install_again(&young);
        if let Some(next) = self.waiting.clone() {
            self.watch_openings(&next);
        }
    }

    /// The plan at work, with other buckets young.
    pub(super) fn install_again(&mut self, young: &[BucketSet]) {
        let plan = Arc::clone(&self.judge.plan);
        self.install_with(&plan, young);
        self.set_filters();
    }

    fn install_with(&mut self, plan: &Plan, young: &[BucketSet]) {
        let follows = self.follows(plan);
        let Some(kernel) = &mut self.judge.kernel else { return };
        if follows {
            kernel.cover(plan);
        } else {
            kernel.install(plan, young);
            kernel.succeed();
        }
        self.judge.known.set_all(kernel.is_at_work());
        let (taken, refused) = (kernel.taken(), kernel.refused().clone());
        self.stand(|standing| {
            standing.in_kernel = taken;
            standing.refused = refused;
        });
        self.steer_early(plan);
    }

    pub(super) fn set_filters(&mut self) {
        for interface in &mut self.interfaces {
            set_filter(&self.judge, interface);
        }
    }

    /// What the kernel takes until now may not have reached the stack yet: only a look-up that begins a little later counts.
    pub(super) fn settle(&mut self) {
        let now = Instant::now();
        self.judge.known.look_since(now);
        self.believed_from = Some(now + SETTLE);
        self.look_up_at = Some(now + SETTLE);
    }

    /// Frames that the TAP has had no room for since it was made.
    pub(super) fn punts_lost_by_now(&self) -> u64 {
        let Some(device) = &self.judge.tap else { return 0 };
        interface::dropped_on_send(device.tap.name()).unwrap_or_else(|error| {
            debug!(%error, "what the TAP has dropped");
            self.punts_lost
        })
    }

    /// Counts what the program has left to this thread and the TAP had no room for.
    pub(super) fn count_lost_punts(&mut self) {
        let now = self.punts_lost_by_now();
        let lost = now.saturating_sub(self.punts_lost);
        self.punts_lost = now;
        if lost == 0 || !self.judge.kernel.as_ref().is_some_and(Kernel::is_at_work) {
            return;
        }
        self.judge.counters.add(Count::PuntLost, lost);
        if self
            .punts_lost_told
            .is_none_or(|at| at.elapsed() > FAILURE_LOG_INTERVAL)
        {
            self.punts_lost_told = Some(Instant::now());
            warn!(
                lost,
                "frames that the kernel leaves to farmd come faster than it reads them: some are lost, and their senders repeat them"
            );
        }
    }
}
