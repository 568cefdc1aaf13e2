//! How often automatic reactions may act, and how long an ended script is waited for.
//!
//! Owns the count behind `maxloop` and `loop_interval`. The module machine asks it before it acts on a
//! checker's or a script's wish; administrators are never counted.

use std::collections::VecDeque;
use std::time::Duration;

/// Time a script has to end by itself after SIGTERM, before its process group gets SIGKILL.
pub const TERM_GRACE: Duration = Duration::from_secs(5);

/// Time after SIGKILL at which the daemon no longer waits for the process: only a process that hangs inside the
/// kernel is still there then, and nothing more can be done to it.
pub const KILL_GRACE: Duration = Duration::from_secs(5);

/// Counts automatic reactions within a sliding interval.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LoopGuard {
    maxloop: usize,
    interval: Duration,
    /// Times of the reactions allowed within the interval, oldest first; never more than `maxloop`.
    times: VecDeque<Duration>,
}

impl LoopGuard {
    /// Allows `maxloop` reactions within any `interval`; an interval of zero sets no limit.
    pub fn new(maxloop: u32, interval: Duration) -> Self {
        Self {
            maxloop: usize::try_from(maxloop).unwrap_or(usize::MAX),
            interval,
            times: VecDeque::new(),
        }
    }

    /// Counts a reaction at `now`. False if it is one more than allowed: then it must not be done.
    pub fn allow(&mut self, now: Duration) -> bool {
        if self.interval.is_zero() {
            return true;
        }
        self.forget(now);
        if self.times.len() >= self.maxloop {
            return false;
        }
        self.times.push_back(now);
        true
    }

    /// Begins to count anew, as after an administrator's command.
    pub fn reset(&mut self) {
        self.times.clear();
    }

    /// Reactions counted within the interval that ends at `now`.
    pub fn count(&mut self, now: Duration) -> usize {
        self.forget(now);
        self.times.len()
    }

    fn forget(&mut self, now: Duration) {
        while self
            .times
            .front()
            .is_some_and(|then| now.saturating_sub(*then) >= self.interval)
        {
            self.times.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn the_reaction_after_maxloop_is_refused() {
        let mut guard = LoopGuard::new(3, HOUR);
        let verdicts: Vec<bool> = (0..5).map(|i| guard.allow(Duration::from_secs(i))).collect();
        assert_eq!(verdicts, [true, true, true, false, false]);
        assert_eq!(guard.count(Duration::from_secs(5)), 3);
    }

    #[test]
    fn reactions_older_than_the_interval_do_not_count() {
        let mut guard = LoopGuard::new(1, HOUR);
        assert!(guard.allow(Duration::ZERO));
        assert!(!guard.allow(HOUR - Duration::from_nanos(1)));
        assert!(guard.allow(HOUR));
    }

    #[test]
    fn an_interval_of_zero_sets_no_limit_and_keeps_no_memory() {
        let mut guard = LoopGuard::new(0, Duration::ZERO);
        assert!((0..10_000).all(|_| guard.allow(HOUR)));
        assert_eq!(guard.count(HOUR), 0);
    }

    #[test]
    fn a_maxloop_of_zero_allows_none() {
        assert!(!LoopGuard::new(0, HOUR).allow(HOUR));
    }

    #[test]
    fn a_reset_begins_anew() {
        let mut guard = LoopGuard::new(1, HOUR);
        assert!(guard.allow(Duration::ZERO));
        guard.reset();
        assert!(guard.allow(Duration::ZERO));
    }
}
