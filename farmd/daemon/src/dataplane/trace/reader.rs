//! Reads what the program in the kernel tells, on a thread of its own, and offers it to those who listen.
//!
//! Owns the thread, which is there only while somebody listens. It judges nothing, and the data plane never waits for it: what it does not read in time the program
//! cannot tell, and counts.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use farm_core::balance::decide::Reason;
use farm_core::id::{NodeId, NodeSet};
use farm_core::trace::{Cause, Outcome};
use farm_sys::bpf::Count;
use farm_sys::bpf::trace::{self as told, Event, Events};
use farm_sys::clock::BootInstant;
use farm_sys::event_fd::EventFd;
use tracing::warn;

use super::{Frame, Tracer, unix_us};

/// Frames read between two looks at the clock and at what was lost.
const BATCH: usize = 256;

/// See the module doc.
#[derive(Debug)]
pub struct Reader {
    stop: Arc<EventFd>,
    thread: JoinHandle<()>,
    ends: bool,
}

impl Reader {
    /// Reads `events` until [`Self::end`].
    ///
    /// # Errors
    /// What the system says if there is no thread.
    pub fn start(events: Events, tracer: Tracer) -> io::Result<Self> {
        let stop = Arc::new(EventFd::new()?);
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("trace".into())
            .spawn(move || read(events, &tracer, &stopped))?;
        Ok(Self {
            stop,
            thread,
            ends: false,
        })
    }

    /// True until it was told to end.
    pub fn is_at_work(&self) -> bool {
        !self.ends
    }

    /// Has it end, soon.
    pub fn end(&mut self) {
        self.ends = true;
        self.stop.notify();
    }

    /// Waits until it has ended.
    pub fn wait(mut self) {
        self.end();
        if self.thread.join().is_err() {
            warn!("the thread that reads what the kernel program tells ended with a panic");
        }
    }
}

fn read(mut events: Events, tracer: &Tracer, stop: &EventFd) {
    loop {
        match farm_sys::poll::wait_readable(&[stop.as_fd(), events.as_fd()], None) {
            Ok(ready) if ready & 1 != 0 => return,
            Ok(_) => {}
            Err(error) => {
                warn!(%error, "what the kernel program tells cannot be waited for");
                return;
            }
        }
        // The two clocks drift apart, and the one of them is set now and then.
        let start = unix_us().saturating_sub(BootInstant::now().as_nanos() / 1000);
        events.read(BATCH, |event| tracer.offer(&frame(&event, start)));
        let untold = events.untold();
        if untold > 0 {
            tracer.lost_in_kernel(untold);
        }
    }
}

/// `event`, of a clock that began `start` microseconds after 1970.
fn frame<'a>(event: &Event<'a>, start: u64) -> Frame<'a> {
    let owner = event.owner.and_then(|owner| NodeId::new(owner.into()));
    Frame {
        unix_us: start.saturating_add(event.at / 1000),
        interface: event.ifindex,
        by_kernel: true,
        length: event.length,
        bytes: event.bytes,
        outcome: match event.outcome {
            told::Outcome::Accepted => Outcome::Accepted,
            told::Outcome::Dropped => Outcome::Dropped,
            told::Outcome::SentOn => Outcome::Forwarded,
            told::Outcome::LeftToFarmd => Outcome::Punted,
        },
        cause: cause(event.why),
        sent_on: NodeSet::from_bits(event.sent_to),
        place: event.place.map(|(group, bucket)| (group.into(), bucket)),
        owner,
    }
}

/// What a counter of the program stands for.
fn cause(counter: usize) -> Cause {
    const OTHERS: [(Count, Cause); 6] = [
        (Count::LeaseEnded, Cause::LeaseEnded),
        (Count::ForwardUnknown, Cause::ForwardUnknown),
        (Count::ForwardFailed, Cause::ForwardFailed),
        (Count::Punted, Cause::Punted),
        (Count::PlanChanged, Cause::PlanChanged),
        (Count::TapFailed, Cause::TapFailed),
    ];
    let judged = Reason::ALL.get(counter).map(|reason| Cause::Judged(*reason));
    let other = || OTHERS.iter().find(|(count, _)| *count as usize == counter);
    // Nothing else ends the way of a frame.
    judged
        .or_else(|| other().map(|(_, cause)| *cause))
        .unwrap_or(Cause::TapFailed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_of_the_program_is_the_cause_of_that_name() {
        let other = [Count::LeaseEnded, Count::Punted, Count::PlanChanged, Count::TapFailed];
        let names = ["lease_ended", "punted", "plan_changed", "tap_failed"];
        for (count, name) in other.into_iter().zip(names) {
            assert_eq!(cause(count as usize).name(), name);
        }
        for (counter, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(cause(counter), Cause::Judged(reason));
        }
    }

    #[test]
    fn a_frame_has_the_time_of_other_clocks_and_goes_on_to_members() {
        let event = Event {
            at: 5_000,
            ifindex: 3,
            length: 60,
            outcome: told::Outcome::SentOn,
            why: Reason::Foreign as usize,
            place: Some((1, 17)),
            owner: Some(2),
            sent_to: 1 << 2 | 1 << 9,
            bytes: &[],
        };
        let shown = frame(&event, 1_000);
        assert_eq!((shown.unix_us, shown.outcome), (1_005, Outcome::Forwarded));
        assert_eq!(shown.sent_on, [2, 9].into_iter().filter_map(NodeId::new).collect());
        let alone = frame(&Event { sent_to: 0, ..event }, 0);
        assert!(alone.sent_on.is_empty() && alone.owner == NodeId::new(2));
    }
}
