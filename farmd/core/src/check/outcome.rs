//! Hysteresis: from single probe results to a verdict, and when to probe next.
//!
//! ```text
//!            rise successes                 fall failures in a row
//!   init ───────────────────────► up ─────────────────────────────► down
//!     │                            ▲                                  │ ▲
//!     │                            └──────── rise successes ──────────┘ │
//!     └───── no success within fall × timeout ──────────────────────────┘
//! ```
//! While the verdict may be about to change, probes come quickly; a steady one is confirmed every `interval`.

use std::time::Duration;

/// Time between two probes until the first verdict, so that a started application takes traffic without delay.
pub const INIT_INTERVAL: Duration = Duration::from_millis(200);

/// Longest time to the next probe once a result contradicts the verdict.
pub const DOUBT_INTERVAL: Duration = Duration::from_secs(1);

/// How a checker judges.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct JudgeConfig {
    /// Time between two probes while the verdict is steady.
    pub interval: Duration,
    /// Time one probe may take.
    pub timeout: Duration,
    /// Successes in a row before the resource is up; 0 counts as 1.
    pub rise: u32,
    /// Failures in a row before it is down; 0 counts as 1.
    pub fall: u32,
}

/// What is thought of a resource.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Not judged yet.
    Init,
    /// It answers.
    Up,
    /// It does not.
    Down,
}

impl Verdict {
    /// The value shown for the resource.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Init => "init",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// The judge of one resource.
#[derive(Clone, Debug)]
pub struct Judge {
    config: JudgeConfig,
    started: Duration,
    verdict: Verdict,
    /// Results in a row that speak against the verdict; while it is `Init`, successes in a row.
    against: u32,
}

impl Judge {
    /// A judge without a verdict, whose time for the first one begins at `now`.
    pub fn new(config: JudgeConfig, now: Duration) -> Self {
        Self {
            config,
            started: now,
            verdict: Verdict::Init,
            against: 0,
        }
    }

    /// The present verdict.
    pub const fn verdict(&self) -> Verdict {
        self.verdict
    }

    /// Takes the result of a probe that ended at `now`; answers with the verdict if this changed it.
    pub fn handle_result(&mut self, now: Duration, success: bool) -> Option<Verdict> {
        let next = match (self.verdict, success) {
            (Verdict::Init, true) | (Verdict::Down, true) => self.count(self.config.rise, Verdict::Up),
            (Verdict::Up, false) => self.count(self.config.fall, Verdict::Down),
            (Verdict::Init, false) => {
                self.against = 0;
                let given = self.config.timeout.saturating_mul(self.config.fall.max(1));
                (now.saturating_sub(self.started) >= given).then_some(Verdict::Down)
            }
            (Verdict::Up, true) | (Verdict::Down, false) => {
                self.against = 0;
                None
            }
        };
        if let Some(verdict) = next {
            self.verdict = verdict;
            self.against = 0;
        }
        next
    }

    /// Time from the beginning of the last probe to the beginning of the next. Changes only with `handle_result`.
    pub fn next_probe_in(&self) -> Duration {
        let longest = match (self.verdict, self.against) {
            (Verdict::Init, _) => INIT_INTERVAL,
            (Verdict::Up | Verdict::Down, 0) => self.config.interval,
            (Verdict::Up | Verdict::Down, _) => DOUBT_INTERVAL,
        };
        longest.min(self.config.interval)
    }

    fn count(&mut self, needed: u32, verdict: Verdict) -> Option<Verdict> {
        self.against = self.against.saturating_add(1);
        (self.against >= needed).then_some(verdict)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CONFIG: JudgeConfig = JudgeConfig {
        interval: Duration::from_secs(10),
        timeout: Duration::from_secs(5),
        rise: 2,
        fall: 3,
    };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn judged(results: &[bool]) -> Judge {
        let mut judge = Judge::new(CONFIG, Duration::ZERO);
        for success in results {
            judge.handle_result(Duration::ZERO, *success);
        }
        judge
    }

    #[test]
    fn up_needs_rise_successes_in_a_row() {
        assert_eq!(judged(&[true]).verdict(), Verdict::Init);
        assert_eq!(judged(&[true, false, true]).verdict(), Verdict::Init);
        assert_eq!(judged(&[true, true]).verdict(), Verdict::Up);
    }

    #[test]
    fn down_needs_fall_failures_in_a_row() {
        assert_eq!(judged(&[true, true, false, false]).verdict(), Verdict::Up);
        assert_eq!(
            judged(&[true, true, false, false, true, false, false]).verdict(),
            Verdict::Up
        );
        assert_eq!(judged(&[true, true, false, false, false]).verdict(), Verdict::Down);
    }

    #[test]
    fn a_first_verdict_of_down_comes_only_after_fall_times_timeout() {
        let mut judge = Judge::new(CONFIG, at(100));
        for second in 100..115 {
            assert_eq!(judge.handle_result(at(second), false), None, "at {second} s");
        }
        assert_eq!(judge.handle_result(at(115), false), Some(Verdict::Down));
    }

    #[test]
    fn a_change_is_told_once() {
        let mut judge = judged(&[true]);
        assert_eq!(judge.handle_result(at(1), true), Some(Verdict::Up));
        assert_eq!(judge.handle_result(at(2), true), None);
    }

    #[test]
    fn probes_are_quick_while_the_verdict_may_change() {
        assert_eq!(judged(&[]).next_probe_in(), INIT_INTERVAL);
        assert_eq!(judged(&[true, true]).next_probe_in(), at(10));
        assert_eq!(judged(&[true, true, false]).next_probe_in(), DOUBT_INTERVAL);
        assert_eq!(judged(&[true, true, false, false, false]).next_probe_in(), at(10));
        assert_eq!(
            judged(&[true, true, false, false, false, true]).next_probe_in(),
            DOUBT_INTERVAL
        );
    }

    #[test]
    fn a_short_interval_is_never_lengthened() {
        let config = JudgeConfig {
            interval: Duration::from_millis(50),
            ..CONFIG
        };
        assert_eq!(Judge::new(config, at(0)).next_probe_in(), Duration::from_millis(50));
    }

    proptest! {
        /// Reference: the verdict is what the longest run of equal results at the end says, if it is long enough.
        #[test]
        fn the_verdict_follows_the_last_long_run(results in proptest::collection::vec(any::<bool>(), 0..40)) {
            let mut expected = Verdict::Init;
            for end in 1..=results.len() {
                let last = results[end - 1];
                let run = results[..end].iter().rev().take_while(|r| **r == last).count();
                expected = match (expected, last) {
                    (Verdict::Init | Verdict::Down, true) if run >= 2 => Verdict::Up,
                    (Verdict::Up, false) if run >= 3 => Verdict::Down,
                    (same, _) => same,
                };
            }
            prop_assert_eq!(judged(&results).verdict(), expected);
        }
    }
}
