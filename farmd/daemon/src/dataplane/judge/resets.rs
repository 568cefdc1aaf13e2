//! Resets of this host's stack that nf_tables has sent to the TAP, because a node is missing ([`farm_core::balance::resets`]).

use std::time::{Duration, Instant};

use farm_core::balance::resets::Fate;
use farm_core::wire::packet;
use farm_sys::clock::BootInstant;
use tracing::{debug, info};

use super::{Judge, VNET};
use crate::dataplane::{Count, Interface};

impl Judge {
    /// Whether a frame out of the TAP is a reset without ACK that this host's stack sends for a virtual address.
    pub(super) fn is_own_reset(&self, bytes: &[u8]) -> bool {
        let source = bytes.get(VNET..).and_then(packet::bare_reset_source);
        source.is_some_and(|source| self.plan.vip(source).is_some())
    }

    pub(super) fn handle_reset(&mut self, interfaces: &[Interface], bytes: &[u8]) {
        match self.resets.handle(self.start.elapsed(), bytes) {
            Fate::Leaves => self.send_reset(interfaces, bytes),
            Fate::Waits => self.counters.add(Count::ResetHeld, 1),
            Fate::Withdrawn => self.counters.add(Count::ResetWithdrawn, 1),
            Fate::Full => self.counters.add(Count::ResetFull, 1),
        }
    }

    /// When [`Self::send_due_resets`] has something to do.
    pub fn next_reset_at(&self) -> Option<Instant> {
        self.resets.poll_timeout().map(|due| self.start + due)
    }

    /// Sends those that have waited long enough.
    pub fn send_due_resets(&mut self, interfaces: &[Interface]) {
        while let Some(bytes) = self.resets.next_due(self.start.elapsed()) {
            self.send_reset(interfaces, &bytes);
        }
    }

    /// See [`crate::dataplane::DataPlane::withdraw_resets`].
    pub fn withdraw_resets(&mut self, silence: Duration) {
        let withdrawn = self.resets.withdraw(self.start.elapsed(), silence);
        self.counters.add(Count::ResetWithdrawn, withdrawn as u64);
        if withdrawn > 0 {
            info!(
                withdrawn,
                "a node is heard again: resets that waited do not leave, as its clients may have been meant"
            );
        }
    }

    /// By the interface by which it was to leave: that of its address. A node that may have been taken over resets nobody.
    fn send_reset(&self, interfaces: &[Interface], bytes: &[u8]) {
        if !self.lease.holds(BootInstant::now()) {
            return self.counters.add(Count::LeaseEnded, 1);
        }
        let vip = packet::bare_reset_source(&bytes[VNET..]).and_then(|source| self.plan.vip(source));
        let interface = vip.and_then(|vip| interfaces.iter().find(|i| i.index == vip.interface));
        let sent = interface.map(|interface| interface.ring.send(bytes));
        match sent {
            Some(Ok(())) => return self.counters.add(Count::ResetSent, 1),
            Some(Err(error)) => debug!(%error, "a reset could not be sent"),
            None => debug!("a reset of an address that is not served any more"),
        }
        self.counters.add(Count::ResetFailed, 1);
    }
}
