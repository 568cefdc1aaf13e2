//! How fast a counter rises, over the last seconds. Owned by the owner loop, read for the status.

use std::collections::VecDeque;
use std::time::Duration;

/// Time between two samples.
const EVERY: Duration = Duration::from_secs(1);
/// Samples kept: the rate is that of the last ten seconds.
const KEPT: usize = 10;

/// See the module doc.
#[derive(Clone, Debug, Default)]
pub(super) struct Rate {
    samples: VecDeque<(Duration, u64)>,
}

impl Rate {
    /// The counter stands at `total`; cheap enough for every turn of the loop.
    pub(super) fn note(&mut self, now: Duration, total: u64) {
        if self.samples.back().is_some_and(|(at, _)| now < *at + EVERY) {
            return;
        }
        if self.samples.len() == KEPT {
            self.samples.pop_front();
        }
        self.samples.push_back((now, total));
    }

    /// Rise per second since the oldest sample; 0 before a tenth of a second has gone by.
    pub(super) fn per_second(&self, now: Duration, total: u64) -> u64 {
        let Some((at, was)) = self.samples.front() else {
            return 0;
        };
        let ms = now.saturating_sub(*at).as_millis() as u64;
        if ms < 100 {
            0
        } else {
            total.saturating_sub(*was) * 1000 / ms
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let ms = Duration::from_millis;
        let mut rate = Rate::default();
        assert_eq!(rate.per_second(ms(0), 0), 0);
        for i in 0..1000_u64 {
            rate.note(ms(i * 50), i * 100);
        }
        assert_eq!(rate.per_second(ms(50_000), 100_000), 2000);
        // Nothing more is sent: it falls to nothing within the time that is looked at.
        for i in 1000..1400_u64 {
            rate.note(ms(i * 50), 100_000);
        }
        assert_eq!(rate.per_second(ms(70_000), 100_000), 0);
    }
}
