//! The part of the data plane's thread that begins and ends telling of frames (`farm trace`): in user space, and in the kernel.

use std::sync::Arc;

use tracing::{info, warn};

use super::Worker;
use crate::dataplane::trace::Begun;
use crate::dataplane::trace::reader::Reader;

impl Worker {
    /// A trace has begun, and says so with `begun`, or one has ended. Frames are told while there are any.
    pub(super) fn handle_trace(&mut self, begun: Option<Begun>) {
        let snap = self.tracer.snap();
        let told = self.judge.trace.is_some();
        if snap.is_some() && !told {
            self.tracer.set_plan(Arc::clone(&self.judge.plan));
            self.judge.trace = Some(self.tracer.clone());
            self.tell_interfaces();
        }
        if snap.is_none() {
            self.judge.trace = None;
        }
        if told != self.judge.trace.is_some() {
            self.set_filters();
        }
        let problem = self.tell_in_kernel(snap);
        if let Some(begun) = begun {
            // Whoever asked may have gone.
            let _ = begun.send(problem);
        }
    }

    /// Nothing is told any more: what is left attached tells nobody.
    pub(super) fn hush(&mut self) {
        self.tracer.close();
        self.handle_trace(None);
        if let Some(reader) = self.reader.take() {
            reader.wait();
        }
    }

    /// Has the program in the kernel tell of what it judges, or no longer; why it does not.
    fn tell_in_kernel(&mut self, snap: Option<usize>) -> Option<String> {
        let kernel = self.judge.kernel.as_mut()?;
        let snap = snap.map(|snap| u32::try_from(snap).unwrap_or(u32::MAX));
        let reads = self.reader.as_ref().is_some_and(Reader::is_at_work);
        if snap.is_some() && !reads {
            if let Some(before) = self.reader.take() {
                before.wait();
            }
            let started = kernel.events().map_err(|e| e.to_string()).and_then(|events| {
                let reader = Reader::start(events, self.tracer.clone());
                reader.map_err(|e| format!("no thread: {e}"))
            });
            match started {
                Ok(reader) => self.reader = Some(reader),
                Err(problem) => return Some(problem),
            }
        }
        match kernel.tell(snap) {
            Ok(true) if snap.is_some() => info!("the kernel program tells of each frame, for a trace"),
            Ok(true) => info!("the kernel program tells of frames no longer"),
            Ok(false) => {}
            Err(error) => {
                warn!(%error, "a trace");
                return Some(error.to_string());
            }
        }
        if snap.is_none()
            && let Some(reader) = &mut self.reader
        {
            reader.end();
        }
        None
    }

    /// Names the service interfaces to whoever listens.
    pub(super) fn tell_interfaces(&self) {
        let named = self.interfaces.iter().map(|i| (i.index, i.name.clone()));
        self.tracer.set_interfaces(named.collect());
    }
}
