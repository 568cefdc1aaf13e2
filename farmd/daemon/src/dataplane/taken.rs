//! Frames accepted lately, so that none is taken twice in a planned move.
//!
//! In `vmac_invisible` every node has each frame from the client. Who gives a bucket up sends on what comes for it until the new owner is
//! known to work; what the new owner has seen itself by then must not reach its stack a second time: TCP would not mind, but a datagram would be
//! answered twice. Knows frames by a digest; copies of one frame and equal frames of a client are told apart by their number.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hasher};
use std::time::{Duration, Instant};

/// How long after a bucket has opened here others may still send on what came for it: their end of a move, and a busy machine.
pub const WATCH: Duration = Duration::from_millis(500);
/// How long a frame may be on its way by a member that gives its bucket up.
const KEEP: Duration = Duration::from_millis(250);
/// Most frames remembered, the oldest goes first.
const CAPACITY: usize = 8192;

/// See the module doc.
#[derive(Debug, Default)]
pub struct Taken {
    until: Option<Instant>,
    frames: VecDeque<(Instant, u64)>,
    forgotten: u64,
}

impl Taken {
    /// Buckets have opened here at `now`.
    pub fn watch(&mut self, now: Instant) {
        self.until = Some(now + WATCH);
    }

    /// Frames forgotten before their time, because there were too many: a copy of one of them would be taken twice.
    pub fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// True if `frame`, which is about to be accepted, is `handed_on` by a member and has been accepted from the client; each frame
    /// accepted answers for one copy. `frame` begins with the Ethernet header.
    pub fn is_repeated(&mut self, now: Instant, handed_on: bool, frame: &[u8]) -> bool {
        let Some(until) = self.until else { return false };
        if now > until + KEEP {
            self.until = None;
            self.frames = VecDeque::new();
            return false;
        }
        while self.frames.front().is_some_and(|(at, _)| *at + KEEP < now) {
            self.frames.pop_front();
        }
        if self.frames.len() >= CAPACITY {
            self.frames.pop_front();
            self.forgotten += 1;
        }
        let digest = digest(frame);
        if handed_on {
            let copied = self.frames.iter().position(|(_, taken)| *taken == digest);
            return copied.is_some_and(|at| self.frames.remove(at).is_some());
        }
        if now <= until {
            self.frames.push_back((now, digest));
        }
        false
    }
}

/// Of all that no member changes: the Ethernet header is the sender's, and an unfinished checksum may be finished on the way.
fn digest(frame: &[u8]) -> u64 {
    const ETHERNET: usize = 14;
    let packet = frame.get(ETHERNET..).unwrap_or_default();
    let (header, checksum) = match packet.first().map(|first| first >> 4) {
        Some(4) => (usize::from(packet[0] & 15) * 4, packet.get(9)),
        _ => (40, packet.get(6)),
    };
    let at = match checksum {
        Some(6) => header + 16,
        Some(17) => header + 6,
        _ => packet.len(),
    }
    .min(packet.len());
    let mut hasher = DefaultHasher::new();
    hasher.write(&packet[..at]);
    hasher.write(packet.get(at + 2..).unwrap_or_default());
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An IPv4 datagram with this payload and checksum.
    fn frame(source_mac: u8, checksum: u8, payload: u8) -> Vec<u8> {
        let mut frame = vec![source_mac; 14];
        frame.extend([0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0, 198, 18, 0, 1, 198, 18, 0, 99]);
        frame.extend([0x10, 0, 0, 53, 0, 9, checksum, checksum, payload]);
        frame
    }

    #[test]
    fn a_copy_that_a_member_sends_on_is_told_from_what_the_client_has_sent() {
        let mut taken = Taken::default();
        let now = Instant::now();
        assert!(
            !taken.is_repeated(now, true, &frame(9, 1, 1)),
            "nothing has opened here"
        );
        taken.watch(now);
        assert!(!taken.is_repeated(now, false, &frame(1, 1, 1)));
        // The same request again is another one.
        assert!(!taken.is_repeated(now, false, &frame(1, 1, 1)));
        for _ in 0..2 {
            assert!(taken.is_repeated(now, true, &frame(9, 2, 1)), "one for each");
        }
        assert!(
            !taken.is_repeated(now, true, &frame(9, 2, 1)),
            "a third has not been here"
        );
        assert!(!taken.is_repeated(now, true, &frame(9, 2, 2)), "another payload");
    }

    #[test]
    fn what_was_accepted_is_forgotten_in_time() {
        let mut taken = Taken::default();
        let now = Instant::now();
        taken.watch(now);
        assert!(!taken.is_repeated(now, false, &frame(1, 1, 1)));
        let later = now + KEEP + Duration::from_millis(1);
        assert!(!taken.is_repeated(later, true, &frame(9, 1, 1)));
        for payload in 0..=255 {
            for _ in 0..CAPACITY / 128 {
                taken.is_repeated(later, false, &frame(1, 1, payload));
            }
        }
        assert_eq!(taken.frames.len(), CAPACITY);
        assert!(taken.forgotten() > 0);
        assert!(!taken.is_repeated(now + WATCH + KEEP + KEEP, false, &frame(1, 1, 1)));
        assert_eq!(taken.frames.len(), 0);
    }

    #[test]
    fn short_and_strange_frames_have_a_digest_too() {
        for length in 0..40 {
            digest(&frame(1, 1, 1)[..length.min(43)]);
        }
        digest(&[0; 15]);
    }
}
