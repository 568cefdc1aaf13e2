//! The part of the data plane's thread that keeps the program in the kernel in step: its plans, which buckets it leaves to the thread, and from when on a look-up of
//! connections is whole although the program opens some.

use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::balance::plan::Plan;
use farm_core::wire::heartbeat::BucketSet;

use super::{Worker, set_filter};
use crate::dataplane::change;
use crate::dataplane::kernel::Kernel;
use crate::dataplane::taken::WATCH;

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

    /// The plan at work, with other buckets young.
    pub(super) fn install_again(&mut self, young: &[BucketSet]) {
        let plan = Arc::clone(&self.judge.plan);
        self.install_with(&plan, young);
        self.set_filters();
    }

    fn install_with(&mut self, plan: &Plan, young: &[BucketSet]) {
        let Some(kernel) = &mut self.judge.kernel else { return };
        kernel.install(plan, young);
        self.judge.known.set_all(kernel.is_at_work());
        let taken = kernel.taken();
        self.stand(|standing| standing.in_kernel = taken);
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
}
