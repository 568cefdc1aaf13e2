//! Repeatable randomness: the same seed gives the same run.
//!
//! Owns one SplitMix64 stream. Good enough to choose victims and moments, never for secrets.

use std::time::Duration;

/// A stream of numbers that only its seed decides.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from 0 to `end` - 1; 0 if `end` is 0.
    pub fn below(&mut self, end: usize) -> usize {
        // The bias of the remainder is far below what any run could show.
        self.next().checked_rem(end as u64).unwrap_or(0) as usize
    }

    /// A time from zero to `end`, in microseconds.
    pub fn up_to(&mut self, end: Duration) -> Duration {
        Duration::from_micros(self.below(end.as_micros() as usize + 1) as u64)
    }

    /// One of `all`; `None` if it is empty.
    pub fn pick<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(self.below(all.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_run() {
        let run = |seed| {
            let mut random = Random::new(seed);
            (0..4).map(|_| random.next()).collect::<Vec<_>>()
        };
        assert_eq!(run(7), run(7));
        assert_ne!(run(7), run(8));
    }

    #[test]
    fn what_is_chosen_lies_within_its_bounds() {
        let mut random = Random::new(1);
        assert_eq!((random.below(0), random.pick::<u8>(&[])), (0, None));
        assert!((0..1000).all(|_| random.below(3) < 3));
        assert!((0..1000).all(|_| random.up_to(Duration::from_millis(2)) <= Duration::from_millis(2)));
    }
}
