//! Notices when the machine itself stands still: what clients waited for in that time says nothing about the farm.
//!
//! Owns one thread per processor, from the first [`watch`] to the end of the process. Each runs before everything else there and looks how late it
//! wakes. A virtual machine that its host does not run is late on one of them or on all; a busy one on none.

use std::sync::{Mutex, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How often each thread wakes.
const STEP: Duration = Duration::from_millis(20);
/// What is longer between two wakings is kept: a farm notices from about there on.
const LONG: Duration = Duration::from_millis(100);
/// Above farmd, which cannot delay it then.
const PRIORITY: u8 = 99;

static STALLS: Mutex<Vec<(Instant, Duration)>> = Mutex::new(Vec::new());

/// Starts watching, unless something of this process did already. Where real-time priority is not allowed nothing is watched.
pub fn watch() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        for processor in 0..processors {
            // One that cannot be watched is no reason to do without the others.
            let _ = thread::Builder::new()
                .name("stall".to_owned())
                .spawn(move || watch_one(processor));
        }
    });
}

fn watch_one(processor: usize) {
    if farm_sys::sched::stay_on(processor).is_err() || farm_sys::sched::set_realtime(PRIORITY).is_err() {
        return;
    }
    let mut last = Instant::now();
    loop {
        thread::sleep(STEP);
        let now = Instant::now();
        if now - last > LONG {
            let mut stalls = STALLS.lock().unwrap_or_else(PoisonError::into_inner);
            stalls.push((now, now - last));
        }
        last = now;
    }
}

/// The longest time after `since` in which a processor did nothing at all, if it was more than 100 ms.
pub fn longest_since(since: Instant) -> Option<Duration> {
    let stalls = STALLS.lock().unwrap_or_else(PoisonError::into_inner);
    let later = stalls.iter().filter(|(at, _)| *at >= since);
    later.map(|(_, length)| *length).max()
}
