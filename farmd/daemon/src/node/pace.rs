//! Whether the owner loop keeps its time: how long its turns take, and how late heartbeats go.
//!
//! Owns both at their worst since start, and what has delayed the loop since the last heartbeat, so that one that goes late is told with its cause. The owner
//! loop tells it the time; it decides nothing.

use std::fmt;
use std::time::Duration;

/// Time between two log lines about late heartbeats.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// See the module doc.
#[derive(Debug)]
pub(super) struct Pace {
    /// Time between two heartbeats.
    pulse: Duration,
    longest_turn: Duration,
    latest: Duration,
    late: u64,
    woke_at: Option<Duration>,
    slept_at: Duration,
    /// When the last heartbeat to everybody went.
    spoke_at: Option<Duration>,
    since: Since,
    logged: Option<Duration>,
}

/// What has delayed the loop since the last heartbeat.
#[derive(Debug, Default)]
struct Since {
    /// Longest part of a turn.
    turn: Duration,
    /// Longest time between the moment to wake and the waking.
    overslept: Duration,
    /// It is in the log already.
    told: bool,
}

/// A heartbeat that went late.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Late {
    by: Duration,
    cause: Delay,
}

/// What took the most time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Delay {
    /// The loop had much to do, or was not run on its way.
    Turn(Duration),
    /// The loop waited, and was not run when it was to go on.
    NotRun(Duration),
}

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "A heartbeat went {} ms late: ", self.by.as_millis())?;
        match self.cause {
            Delay::Turn(turn) => write!(f, "a turn of its thread took {} ms", turn.as_millis()),
            Delay::NotRun(time) => write!(f, "its thread was not run for {} ms", time.as_millis()),
        }
    }
}

impl Pace {
    /// Of a loop that is to send a heartbeat every `pulse`.
    pub(super) fn new(pulse: Duration) -> Self {
        Self {
            pulse,
            longest_turn: Duration::ZERO,
            latest: Duration::ZERO,
            late: 0,
            woke_at: None,
            slept_at: Duration::ZERO,
            spoke_at: None,
            since: Since::default(),
            logged: None,
        }
    }

    /// A turn begins at `now`; the loop was to wake at `deadline`, or earlier if something came in.
    pub(super) fn wake(&mut self, now: Duration, deadline: Option<Duration>) {
        let overslept = deadline.map_or(Duration::ZERO, |at| now.saturating_sub(at.max(self.slept_at)));
        self.since.overslept = self.since.overslept.max(overslept);
        self.woke_at = Some(now);
    }

    /// The turn ends at `now`: the loop waits.
    pub(super) fn sleep(&mut self, now: Duration) {
        if let Some(at) = self.woke_at {
            self.longest_turn = self.longest_turn.max(now.saturating_sub(at));
        }
        self.since.turn = self.since.turn.max(self.worked(now));
        self.slept_at = now;
    }

    /// Why the next heartbeat goes late is in the log already.
    pub(super) fn excuse(&mut self) {
        self.since.told = true;
    }

    /// A heartbeat to everybody has gone at `now`. What is to be logged, if it went more than a pulse late and that was not told lately.
    pub(super) fn speak(&mut self, now: Duration) -> Option<Late> {
        let turn = self.since.turn.max(self.worked(now));
        let since = std::mem::take(&mut self.since);
        let before = self.spoke_at.replace(now)?;
        let by = now.saturating_sub(before + self.pulse);
        self.latest = self.latest.max(by);
        if by <= self.pulse / 2 {
            return None;
        }
        self.late += 1;
        let lately = self.logged.is_some_and(|at| now < at + LOG_INTERVAL);
        if by <= self.pulse || since.told || lately {
            return None;
        }
        self.logged = Some(now);
        let cause = if turn > since.overslept {
            Delay::Turn(turn)
        } else {
            Delay::NotRun(since.overslept)
        };
        Some(Late { by, cause })
    }

    /// For how long the present turn has gone on since the last heartbeat.
    fn worked(&self, now: Duration) -> Duration {
        let begun = self.woke_at.max(self.spoke_at);
        begun.map_or(Duration::ZERO, |at| now.saturating_sub(at))
    }

    /// The longest turn since start.
    pub(super) fn longest_turn(&self) -> Duration {
        self.longest_turn
    }

    /// By how much a heartbeat went late at most.
    pub(super) fn latest(&self) -> Duration {
        self.latest
    }

    /// How many heartbeats went more than half a pulse late.
    pub(super) fn late(&self) -> u64 {
        self.late
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(millis: u64) -> Duration {
        Duration::from_millis(millis)
    }

    /// The loop waits from the end of the last turn to `deadline`, wakes at `woke` and sends a heartbeat at `spoke`, which ends the turn. What it logs.
    fn beat(pace: &mut Pace, deadline: u64, woke: u64, spoke: u64) -> Option<String> {
        pace.wake(ms(woke), Some(ms(deadline)));
        let late = pace.speak(ms(spoke));
        pace.sleep(ms(spoke));
        late.map(|late| late.to_string())
    }

    #[test]
    fn a_heartbeat_is_late_from_half_a_pulse_on_and_told_with_its_cause_from_a_pulse_on_once_a_minute() {
        let mut pace = Pace::new(ms(50));
        assert_eq!(beat(&mut pace, 0, 70, 70), None, "the first is due at no time");
        assert_eq!(beat(&mut pace, 120, 120, 120), None);
        assert_eq!(beat(&mut pace, 170, 195, 195), None);
        assert_eq!((pace.late(), pace.latest()), (0, ms(25)), "half a pulse");
        assert_eq!(beat(&mut pace, 245, 245, 295), None);
        assert_eq!((pace.late(), pace.latest()), (1, ms(50)), "a pulse");

        let told = beat(&mut pace, 345, 424, 425);
        assert_eq!(
            told.as_deref(),
            Some("A heartbeat went 80 ms late: its thread was not run for 79 ms")
        );
        assert_eq!(beat(&mut pace, 475, 475, 60_424), None, "within the minute");
        assert_eq!((pace.late(), pace.latest()), (3, ms(59_949)));
        let told = beat(&mut pace, 60_474, 60_475, 60_600);
        assert_eq!(
            told.as_deref(),
            Some("A heartbeat went 126 ms late: a turn of its thread took 125 ms")
        );
    }

    #[test]
    fn what_a_heartbeat_waited_for_is_no_cause_of_the_next_one() {
        let mut pace = Pace::new(ms(50));
        beat(&mut pace, 0, 0, 0);
        // Most of this turn is before its heartbeat.
        pace.wake(ms(50), Some(ms(50)));
        assert_eq!(pace.speak(ms(90)), None);
        pace.sleep(ms(100));
        let told = beat(&mut pace, 140, 200, 200);
        assert_eq!(
            told.as_deref(),
            Some("A heartbeat went 60 ms late: its thread was not run for 60 ms")
        );
        assert_eq!(pace.longest_turn(), ms(50));
    }

    #[test]
    fn a_pause_that_is_told_is_counted_and_not_told_again() {
        let mut pace = Pace::new(ms(50));
        beat(&mut pace, 0, 0, 0);
        pace.excuse();
        assert_eq!(beat(&mut pace, 50, 900, 900), None);
        assert_eq!((pace.late(), pace.latest()), (1, ms(850)));
        assert_eq!(beat(&mut pace, 950, 1000, 1000), None, "no more than a pulse");
        assert!(beat(&mut pace, 1050, 1101, 1101).is_some());
    }
}
