//! The part of the data plane's thread that begins and ends telling of frames (`farm trace`): in user space, and in the kernel.

use std::sync::Arc;

use super::Worker;
use crate::dataplane::trace::Begun;

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
        if let Some(begun) = begun {
            // Whoever asked may have gone.
            let _ = begun.send(None);
        }
    }

    /// Names the service interfaces to whoever listens.
    pub(super) fn tell_interfaces(&self) {
        let named = self.interfaces.iter().map(|i| (i.index, i.name.clone()));
        self.tracer.set_interfaces(named.collect());
    }
}
