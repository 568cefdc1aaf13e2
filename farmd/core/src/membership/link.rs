//! What one lan does with the heartbeats of one peer: which came last, how many are missing, how long the way there and back is.
//!
//! Only counts; it judges nobody. Called by [`super::peer::Peer`].

use std::collections::VecDeque;
use std::time::Duration;

/// Length of one slot of the recent past.
const SLOT: Duration = Duration::from_secs(1);
/// Slots remembered.
const SLOTS: u64 = 10;
/// A gap in the beats that no loss explains: the peer was away.
const AWAY: u16 = 1000;

/// One peer on one lan.
#[derive(Clone, Debug, Default)]
pub struct Link {
    seq: u64,
    beat: Option<u16>,
    heard_at: Option<Duration>,
    received: u64,
    lost: u64,
    /// Slot number, received and lost in it; the oldest first.
    recent: VecDeque<(u64, u32, u32)>,
    rtt: Option<Rtt>,
}

/// Round trips on one link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rtt {
    /// The newest one.
    pub last: Duration,
    /// The shortest one.
    pub least: Duration,
    /// Weighted average; a new one counts an eighth (RFC 6298 section 2).
    pub smoothed: Duration,
}

impl Link {
    /// Sequence number of the newest heartbeat that came in.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    /// When that was.
    pub fn heard_at(&self) -> Option<Duration> {
        self.heard_at
    }

    /// Heartbeats that came in, of those that go to everybody.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// And those that did not.
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Received and lost in the ten seconds before `now`.
    pub fn recent(&self, now: Duration) -> (u32, u32) {
        let first = slot(now).saturating_sub(SLOTS - 1);
        let recent = self.recent.iter().filter(|(slot, ..)| *slot >= first);
        recent.fold((0, 0), |(received, lost), (_, r, l)| (received + r, lost + l))
    }

    /// Of the heartbeats of the ten seconds before `now`, those that `newest`, another lan of the same peer, has brought and this one has
    /// not, after the last that it did bring; less one, which may be on its way.
    pub fn behind(&self, newest: &Self, now: Duration) -> u32 {
        let (received, lost) = newest.recent(now);
        let step = match (self.beat, newest.beat) {
            (Some(own), Some(newest)) => u32::from(newest.wrapping_sub(own)),
            // Nothing since the peer's start.
            (None, Some(_)) => received + lost,
            (_, None) => 0,
        };
        step.saturating_sub(1).min(received + lost)
    }

    /// Round trips, if one was taken.
    pub fn rtt(&self) -> Option<Rtt> {
        self.rtt
    }

    /// The peer counts anew.
    pub fn restart(&mut self) {
        self.seq = 0;
        self.beat = None;
    }

    /// A heartbeat newer than all before.
    pub fn handle_heartbeat(&mut self, now: Duration, seq: u64, beat: u16) {
        self.seq = seq;
        self.heard_at = Some(now);
        let step = self.beat.map_or(1, |last| beat.wrapping_sub(last));
        // One between two beats, or older than the last.
        if step == 0 || step > u16::MAX / 2 {
            return;
        }
        self.beat = Some(beat);
        let lost = if step < AWAY { u32::from(step) - 1 } else { 0 };
        self.received += 1;
        self.lost += u64::from(lost);
        let slot = slot(now);
        if self.recent.back().is_none_or(|(last, ..)| *last != slot) {
            self.recent.push_back((slot, 0, 0));
        }
        if self.recent.len() > SLOTS as usize {
            self.recent.pop_front();
        }
        if let Some((_, r, l)) = self.recent.back_mut() {
            *r += 1;
            *l += lost;
        }
    }

    /// A round trip was taken.
    pub fn handle_rtt(&mut self, rtt: Duration) {
        self.rtt = Some(match self.rtt {
            None => Rtt {
                last: rtt,
                least: rtt,
                smoothed: rtt,
            },
            Some(before) => Rtt {
                last: rtt,
                least: before.least.min(rtt),
                smoothed: (before.smoothed * 7 + rtt) / 8,
            },
        });
    }
}

fn slot(now: Duration) -> u64 {
    now.as_secs() / SLOT.as_secs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_between_two_beats_is_lost_and_ages() {
        let at = Duration::from_secs;
        let mut link = Link::default();
        link.handle_heartbeat(at(1), 10, 65_534);
        link.handle_heartbeat(at(1), 12, 65_535);
        link.handle_heartbeat(at(1), 13, 65_535);
        link.handle_heartbeat(at(2), 15, 3);
        assert_eq!((link.received(), link.lost()), (3, 3));
        assert_eq!(link.recent(at(2)), (3, 3));
        assert_eq!(link.recent(at(11)), (1, 3));
        assert_eq!(link.recent(at(12)), (0, 0));
    }

    #[test]
    fn a_silent_lan_is_behind_one_that_is_heard() {
        let at = Duration::from_secs;
        let (mut silent, mut heard) = (Link::default(), Link::default());
        silent.handle_heartbeat(at(1), 1, 7);
        for beat in 0..20 {
            heard.handle_heartbeat(at(1 + u64::from(beat)), 2 + u64::from(beat), 7 + beat);
        }
        assert_eq!(heard.behind(&heard, at(20)), 0);
        // Of the 18 only those that the last ten seconds can have had.
        assert_eq!((silent.behind(&heard, at(20)), silent.behind(&heard, at(25))), (10, 5));
        assert_eq!(Link::default().behind(&heard, at(25)), 4, "never heard");
        silent.handle_heartbeat(at(20), 21, 25);
        assert_eq!(silent.behind(&heard, at(20)), 0, "one may be on its way");
    }

    #[test]
    fn an_absence_or_a_restart_is_no_loss() {
        let mut link = Link::default();
        link.handle_heartbeat(Duration::ZERO, 1, 5);
        link.handle_heartbeat(Duration::ZERO, 2, 6 + AWAY);
        assert_eq!((link.received(), link.lost()), (2, 0));
        link.restart();
        link.handle_heartbeat(Duration::ZERO, 1, 0);
        assert_eq!((link.received(), link.lost()), (3, 0));
    }

    #[test]
    fn round_trips_are_smoothed() {
        let mut link = Link::default();
        assert_eq!(link.rtt(), None);
        link.handle_rtt(Duration::from_micros(800));
        link.handle_rtt(Duration::from_micros(1600));
        let rtt = link.rtt().unwrap();
        assert_eq!(
            (rtt.last.as_micros(), rtt.least.as_micros(), rtt.smoothed.as_micros()),
            (1600, 800, 900)
        );
    }
}
