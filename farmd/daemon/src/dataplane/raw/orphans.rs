//! The part of the data plane's thread that has peers asked for connections which this host does not know ([`farm_core::balance::orphans`]).

use std::time::{Duration, Instant};

use farm_sys::clock::BootInstant;

use super::Worker;
use crate::dataplane::Count;
use crate::event::Event;

/// Shortest time between two questions to the peers: what comes meanwhile goes into one.
const QUESTION_INTERVAL: Duration = Duration::from_millis(10);

impl Worker {
    /// A node has died: segments that this host does not know may be nobody's.
    pub(super) fn watch_orphans(&mut self, until: BootInstant) {
        let left = until.saturating_duration_since(BootInstant::now());
        self.judge.orphans.watch(self.judge.elapsed() + left);
        self.tell_asks();
    }

    /// Ends that in time.
    pub(super) fn expire_orphans(&mut self) {
        if self.judge.orphans.handle_timeout(self.judge.elapsed()) {
            self.tell_asks();
        }
    }

    fn tell_asks(&mut self) {
        if let Some(kernel) = &mut self.judge.kernel {
            kernel.set_asks(self.judge.orphans.is_watching());
        }
        // A plan that waits brings it.
        if self.waiting.is_none() {
            self.install_anew();
        }
    }

    /// Has peers asked for connections that this host does not know, one question at a time.
    pub(super) fn ask_for_unknown(&mut self) {
        if self.asking || !self.judge.orphans.has_questions() {
            return;
        }
        let now = Instant::now();
        if self.ask_at.is_some_and(|at| now < at) {
            return;
        }
        if let Some(flows) = self.judge.orphans.next_question(self.judge.elapsed()) {
            self.asking = true;
            self.ask_at = Some(now + QUESTION_INTERVAL);
            self.judge.counters.add(Count::OrphanAsked, flows.len() as u64);
            self.events.send(Event::Unknown(flows));
        }
    }
}
