//! The clock by which a host knows that it did not run, even if it was suspended.

use std::ops::Add;
use std::time::Duration;

/// A point in time by CLOCK_BOOTTIME (`clock_gettime(2)`), the kernel program's clock. Unlike [`std::time::Instant`], whose clock stands still meanwhile, it
/// goes on while the host is suspended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct BootInstant(Duration);

impl BootInstant {
    /// This very moment.
    pub fn now() -> Self {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid place for the answer; this clock is always there.
        unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
        let nanos = u32::try_from(time.tv_nsec).unwrap_or(0);
        Self(Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), nanos))
    }

    /// The moment that the kernel program calls `nanos`.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(Duration::from_nanos(nanos))
    }

    /// Nanoseconds since the host has started: 584 years fit.
    pub fn as_nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }

    /// Time since then; zero if it is still to come.
    pub fn elapsed(self) -> Duration {
        Self::now().saturating_duration_since(self)
    }

    /// Time since `earlier`; zero if that is later.
    pub fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }

    /// `age` before; the start of the host at the earliest.
    pub fn saturating_sub(self, age: Duration) -> Self {
        Self(self.0.saturating_sub(age))
    }
}

impl Add<Duration> for BootInstant {
    type Output = Self;

    fn add(self, time: Duration) -> Self {
        Self(self.0.saturating_add(time))
    }
}

/// Seconds by which this process's clock is ahead of the kernel program's, which knows no time namespaces (`time_namespaces(7)`): zero outside of such.
pub fn ahead_of_kernel() -> i64 {
    // A kernel without such namespaces has no such file.
    std::fs::read_to_string("/proc/self/timens_offsets").map_or(0, |offsets| boot_offset(&offsets))
}

/// In seconds, rounded away from zero.
fn boot_offset(offsets: &str) -> i64 {
    let numbers = offsets.lines().find_map(|line| line.strip_prefix("boottime"));
    let mut numbers = numbers
        .into_iter()
        .flat_map(str::split_whitespace)
        .map(str::parse::<i64>);
    let mut next = || numbers.next().and_then(Result::ok).unwrap_or(0);
    // The file's nanoseconds are never negative.
    let (secs, nanos) = (next(), next());
    if secs >= 0 && nanos > 0 { secs + 1 } else { secs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_counts_from_the_start_of_the_host() {
        let uptime = |text: &str| text.split_whitespace().next()?.parse::<f64>().ok();
        let before = uptime(&std::fs::read_to_string("/proc/uptime").unwrap()).unwrap();
        let now = BootInstant::now();
        let after = uptime(&std::fs::read_to_string("/proc/uptime").unwrap()).unwrap();
        let secs = now.0.as_secs_f64();
        // The file has two digits after the point.
        assert!(before <= secs && secs < after + 0.01, "{before} {secs} {after}");
        assert_eq!(BootInstant::from_nanos(now.as_nanos()), now);
    }

    #[test]
    fn what_is_later_is_that_long_ago_and_not_the_other_way_round() {
        let (first, time) = (BootInstant::from_nanos(5), Duration::from_nanos(7));
        let second = first + time;
        assert_eq!(second.saturating_duration_since(first), time);
        assert_eq!(first.saturating_duration_since(second), Duration::ZERO);
        assert_eq!(second.saturating_sub(time), first);
        assert_eq!(first.saturating_sub(time), BootInstant::from_nanos(0));
        assert!(first.elapsed() > Duration::ZERO && BootInstant::from_nanos(u64::MAX).elapsed() == Duration::ZERO);
    }

    #[test]
    fn a_time_namespace_tells_how_far_its_clock_is_off() {
        assert_eq!(
            boot_offset("monotonic           0         0\nboottime       100000         0\n"),
            100_000
        );
        assert_eq!(
            boot_offset("monotonic           7         0\nboottime            0         1\n"),
            1
        );
        assert_eq!(
            boot_offset("monotonic           7         0\nboottime           -1         1\n"),
            -1
        );
        assert_eq!(
            boot_offset("monotonic           7         0\nboottime            0         0\n"),
            0
        );
        assert_eq!(boot_offset(""), 0);
    }
}
