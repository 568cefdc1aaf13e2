//! Resets that wait a little before they leave, while a node is missing.
//!
//! A node that takes over a missing one's buckets has its stack reset what it does not know. If the missing one is not dead but was cut off, its clients' segments come in
//! here as soon as the way is open again, up to a pulse before its first heartbeat does. So such resets are kept for some pulses, and when somebody has come
//! back meanwhile they never leave: the client repeats its segment, and whoever has the connection answers. Owns what is kept. It asks nobody and reads no clock.

use std::collections::VecDeque;
use std::time::Duration;

/// Most resets that are kept; while there are more, further ones do not leave.
pub const MAX_KEPT: usize = 4096;

/// What becomes of a reset.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It leaves at once.
    Leaves,
    /// It is kept.
    Waits,
    /// Somebody has come back just now.
    Withdrawn,
    /// There is no room.
    Full,
}

/// See the module doc.
#[derive(Clone, Debug, Default)]
pub struct Resets {
    /// How long each waits, while a node is missing.
    wait: Option<Duration>,
    /// Until then none leaves.
    silent_until: Duration,
    /// When each leaves, oldest first.
    kept: VecDeque<(Duration, Vec<u8>)>,
}

impl Resets {
    /// From now on each waits for `wait`, or none does. What is kept leaves when it would have.
    pub fn set_wait(&mut self, wait: Option<Duration>) {
        self.wait = wait;
    }

    /// A node has come back: what is kept is its, or may be, and so is what comes in the next `silence`. Returns how many were kept.
    pub fn withdraw(&mut self, now: Duration, silence: Duration) -> usize {
        self.silent_until = self.silent_until.max(now + silence);
        let count = self.kept.len();
        self.kept.clear();
        count
    }

    /// This host's stack sends a reset, in `frame`.
    pub fn handle(&mut self, now: Duration, frame: &[u8]) -> Fate {
        if now < self.silent_until {
            return Fate::Withdrawn;
        }
        let Some(wait) = self.wait else { return Fate::Leaves };
        if self.kept.len() >= MAX_KEPT {
            return Fate::Full;
        }
        self.kept.push_back((now + wait, frame.to_vec()));
        Fate::Waits
    }

    /// When [`Self::next_due`] has something.
    pub fn poll_timeout(&self) -> Option<Duration> {
        self.kept.front().map(|(due, _)| *due)
    }

    /// The oldest one that has waited long enough.
    pub fn next_due(&mut self, now: Duration) -> Option<Vec<u8>> {
        if self.poll_timeout()? > now {
            return None;
        }
        self.kept.pop_front().map(|(_, frame)| frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const WAIT: Duration = Duration::from_millis(100);

    fn waiting() -> Resets {
        let mut resets = Resets::default();
        resets.set_wait(Some(WAIT));
        resets
    }

    #[test]
    fn while_nobody_is_missing_a_reset_leaves_at_once() {
        assert_eq!(Resets::default().handle(MS, b"a"), Fate::Leaves);
    }

    #[test]
    fn one_that_waits_leaves_in_time_and_in_order() {
        let mut resets = waiting();
        assert_eq!(resets.handle(MS, b"a"), Fate::Waits);
        assert_eq!(resets.handle(2 * MS, b"b"), Fate::Waits);
        assert_eq!(resets.poll_timeout(), Some(MS + WAIT));
        assert_eq!(resets.next_due(WAIT), None);
        assert_eq!(resets.next_due(WAIT + MS).as_deref(), Some(&b"a"[..]));
        assert_eq!(resets.next_due(WAIT + MS), None);
        assert_eq!(resets.next_due(WAIT + 2 * MS).as_deref(), Some(&b"b"[..]));
        assert_eq!(resets.poll_timeout(), None);
    }

    #[test]
    fn when_somebody_comes_back_none_leaves_for_a_while() {
        let mut resets = waiting();
        resets.handle(MS, b"a");
        assert_eq!(resets.withdraw(2 * MS, 50 * MS), 1);
        assert_eq!(resets.next_due(WAIT * 2), None);
        assert_eq!(resets.handle(51 * MS, b"b"), Fate::Withdrawn);
        assert_eq!(resets.handle(52 * MS, b"c"), Fate::Waits);
        // Nor when everybody is there by then, or when more is withdrawn.
        resets.withdraw(52 * MS, 50 * MS);
        resets.withdraw(53 * MS, Duration::ZERO);
        resets.set_wait(None);
        assert_eq!(resets.handle(60 * MS, b"d"), Fate::Withdrawn);
        assert_eq!(resets.handle(102 * MS, b"e"), Fate::Leaves);
    }

    #[test]
    fn what_is_kept_leaves_also_when_nobody_is_missed_any_more() {
        let mut resets = waiting();
        resets.handle(MS, b"a");
        resets.set_wait(None);
        assert_eq!(resets.next_due(MS + WAIT).as_deref(), Some(&b"a"[..]));
    }

    #[test]
    fn no_more_are_kept_than_there_is_room_for() {
        let mut resets = waiting();
        for _ in 0..MAX_KEPT {
            assert_eq!(resets.handle(MS, b"a"), Fate::Waits);
        }
        assert_eq!(resets.handle(MS, b"b"), Fate::Full);
        assert!(resets.next_due(MS + WAIT).is_some());
        assert_eq!(resets.handle(MS + WAIT, b"b"), Fate::Waits);
    }
}
