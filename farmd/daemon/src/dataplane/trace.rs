//! Live frames for `farm trace`: who listens, and what each of them is shown.
//!
//! Owns the traces that run and their queues. The data plane offers every frame of a VIP while there are any, from its own thread and from the one that reads what the
//! program in the kernel tells; neither ever waits: a queue that is full loses the frame, which is counted. [`crate::control`] starts traces, and a trace ends when
//! its [`Running`] is dropped. With the first one the data plane is told to tell, with the last one to stop it.

pub mod reader;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use farm_core::balance::decide::Decision;
use farm_core::balance::plan::Plan;
use farm_core::id::{NodeId, NodeSet};
use farm_core::trace::filter::{Filter, Subject};
use farm_core::trace::{Cause, Outcome, View};
use tokio::sync::{mpsc, oneshot};

use super::{Count, Counters};

/// Most traces at a time: each costs the data plane a look at every frame.
pub const MAX_TRACES: usize = 4;
/// Frames that wait for one reader; 128 bytes of each are some 1.5 MB.
const QUEUE: usize = 4096;

/// A frame as it came in, and what became of it.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Microseconds since 1970.
    pub unix_us: u64,
    /// Index of the interface it came in on.
    pub interface: u32,
    /// The program in the kernel has judged it.
    pub by_kernel: bool,
    /// Length of the whole.
    pub length: u32,
    /// As many of its first bytes as there are.
    pub bytes: &'a [u8],
    /// What became of it.
    pub outcome: Outcome,
    /// Why.
    pub cause: Cause,
    /// Members that it was sent on to.
    pub sent_on: NodeSet,
    /// Position of its group in the plan, and its bucket.
    pub place: Option<(usize, u16)>,
    /// Who owns that.
    pub owner: Option<NodeId>,
}

/// The same for a reader, who knows no plan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Microseconds since 1970.
    pub unix_us: u64,
    /// Name of the interface.
    pub interface: String,
    /// The program in the kernel has judged it.
    pub by_kernel: bool,
    /// Length of the whole.
    pub length: u32,
    /// Its first bytes.
    pub bytes: Vec<u8>,
    /// What they say, what became of it, and why.
    pub subject: Subject,
    /// Members that it was sent on to.
    pub sent_on: NodeSet,
    /// `module/group` and bucket.
    pub place: Option<(String, u16)>,
    /// Who owns that.
    pub owner: Option<NodeId>,
}

/// What the data plane says when it has begun to tell of frames: why it cannot of those judged in the kernel, if so.
pub type Begun = oneshot::Sender<Option<String>>;

/// Has the data plane look whether there are traces.
pub type Switch = Box<dyn Fn(Option<Begun>) + Send + Sync>;

/// The traces of one data plane. A handle: clones are the same.
#[derive(Clone, Default)]
pub struct Tracer(Arc<Inner>);

#[derive(Default)]
struct Inner {
    switch: OnceLock<Switch>,
    counters: Arc<Counters>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    last_id: u64,
    traces: Vec<Trace>,
    /// What numbers in frames stand for.
    plan: Option<Arc<Plan>>,
    interfaces: BTreeMap<u32, String>,
}

struct Trace {
    id: u64,
    filter: Filter,
    snap: usize,
    tally: Arc<Tally>,
    queue: mpsc::Sender<Record>,
}

/// What one trace has come across.
#[derive(Debug, Default)]
pub struct Tally {
    seen: AtomicU64,
    lost: AtomicU64,
}

impl Tally {
    /// Frames of VIPs.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }

    /// Frames that there was no room for.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

/// A trace that runs, until this is dropped.
pub struct Running {
    tracer: Tracer,
    /// Its number.
    pub id: u64,
    /// Frames that it is shown; closed when somebody else has ended it.
    pub records: mpsc::Receiver<Record>,
    /// What it has come across.
    pub tally: Arc<Tally>,
    /// Answered when frames are told.
    pub begun: oneshot::Receiver<Option<String>>,
}

/// There are [`MAX_TRACES`] already.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooMany;

impl fmt::Display for TooMany {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{MAX_TRACES} traces run here already, and no more can; end one of them"
        )
    }
}

impl std::error::Error for TooMany {}

impl fmt::Debug for Tracer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracer")
            .field("traces", &self.state().traces.len())
            .finish_non_exhaustive()
    }
}

impl Tracer {
    /// No traces yet; `switch` is called whenever one begins or ends.
    pub fn new(counters: Arc<Counters>, switch: Switch) -> Self {
        Self(Arc::new(Inner {
            switch: OnceLock::from(switch),
            counters,
            state: Mutex::default(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn switch(&self, begun: Option<Begun>) {
        if let Some(switch) = self.0.switch.get() {
            switch(begun);
        }
    }

    /// Begins a trace of what `filter` wants, with at most `snap` bytes of each frame.
    ///
    /// # Errors
    /// If there are too many.
    pub fn start(&self, filter: Filter, snap: u32) -> Result<Running, TooMany> {
        let (queue, records) = mpsc::channel(QUEUE);
        let tally = Arc::new(Tally::default());
        let mut state = self.state();
        if state.traces.len() >= MAX_TRACES {
            return Err(TooMany);
        }
        state.last_id += 1;
        let id = state.last_id;
        state.traces.push(Trace {
            id,
            filter,
            snap: snap as usize,
            tally: Arc::clone(&tally),
            queue,
        });
        drop(state);
        let (begins, begun) = oneshot::channel();
        self.switch(Some(begins));
        Ok(Running {
            tracer: self.clone(),
            id,
            records,
            tally,
            begun,
        })
    }

    /// Ends a trace; false if there is none of that number.
    pub fn stop(&self, id: u64) -> bool {
        let mut state = self.state();
        let before = state.traces.len();
        state.traces.retain(|trace| trace.id != id);
        let ended = state.traces.len() < before;
        drop(state);
        if ended {
            self.switch(None);
        }
        ended
    }

    /// Bytes of each frame that somebody wants; `None` if there is no trace.
    pub fn snap(&self) -> Option<usize> {
        self.state().traces.iter().map(|trace| trace.snap).max()
    }

    /// What numbers in frames stand for from now on.
    pub fn set_plan(&self, plan: Arc<Plan>) {
        self.state().plan = Some(plan);
    }

    /// Names of the service interfaces.
    pub fn set_interfaces(&self, interfaces: BTreeMap<u32, String>) {
        self.state().interfaces = interfaces;
    }

    /// Names of the service interfaces.
    pub fn interfaces(&self) -> Vec<String> {
        self.state().interfaces.values().cloned().collect()
    }

    /// Shows `frame` to whoever wants it.
    pub fn offer(&self, frame: &Frame<'_>) {
        let Some(view) = View::of(frame.bytes) else { return };
        let subject = Subject {
            view,
            outcome: frame.outcome,
            sent_on: !frame.sent_on.is_empty(),
            cause: frame.cause,
        };
        let state = self.state();
        for trace in &state.traces {
            trace.tally.seen.fetch_add(1, Ordering::Relaxed);
            if !trace.filter.matches(&subject) {
                continue;
            }
            // The place first: what does not fit is not copied.
            match trace.queue.try_reserve() {
                Ok(place) => place.send(state.record(frame, subject, trace.snap)),
                Err(_) => self.lose(trace, 1),
            }
        }
    }

    /// `n` frames could not be told by the program in the kernel.
    pub fn lost_in_kernel(&self, n: u64) {
        for trace in &self.state().traces {
            trace.tally.seen.fetch_add(n, Ordering::Relaxed);
            self.lose(trace, n);
        }
    }

    fn lose(&self, trace: &Trace, n: u64) {
        trace.tally.lost.fetch_add(n, Ordering::Relaxed);
        self.0.counters.add(Count::TraceLost, n);
    }

    /// Ends them all.
    pub fn close(&self) {
        self.state().traces.clear();
    }

    /// Shows what the data plane's thread has judged. `bytes` are those that came in.
    pub fn judged(
        &self,
        plan: &Plan,
        bytes: &[u8],
        length: usize,
        decision: &Decision,
        outcome: Outcome,
        cause: Cause,
    ) {
        let Some(vip) = View::of(bytes).and_then(|view| plan.vip(view.vip)) else {
            return;
        };
        let known = decision.forward.iter().filter(|node| vip.peers.contains_key(node));
        let sent_on: NodeSet = known.collect();
        let nowhere = outcome == Outcome::Forwarded && sent_on.is_empty();
        self.offer(&Frame {
            unix_us: unix_us(),
            interface: vip.interface,
            by_kernel: false,
            length: u32::try_from(length).unwrap_or(u32::MAX),
            bytes,
            outcome: if nowhere { Outcome::Dropped } else { outcome },
            cause: if nowhere { Cause::ForwardUnknown } else { cause },
            sent_on,
            place: decision
                .place
                .and_then(|(group, bucket)| Some((group, u16::try_from(bucket.index()).ok()?))),
            owner: decision.owner,
        });
    }
}

/// Now, as other clocks count.
pub fn unix_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

impl State {
    fn record(&self, frame: &Frame<'_>, subject: Subject, snap: usize) -> Record {
        let name = |group: usize| {
            let group = self.plan.as_ref().and_then(|plan| plan.groups.get(group));
            group.map_or_else(|| "?".to_owned(), |group| group.name.clone())
        };
        let interface = self.interfaces.get(&frame.interface).cloned();
        Record {
            unix_us: frame.unix_us,
            interface: interface.unwrap_or_else(|| format!("if{}", frame.interface)),
            by_kernel: frame.by_kernel,
            length: frame.length,
            bytes: frame.bytes.get(..snap).unwrap_or(frame.bytes).to_vec(),
            subject,
            sent_on: frame.sent_on,
            place: frame.place.map(|(group, bucket)| (name(group), bucket)),
            owner: frame.owner,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tracer.stop(self.id);
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("id", &self.id).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "trace_tests.rs"]
mod tests;
