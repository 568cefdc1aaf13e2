//! What judging tells of each frame while somebody listens (`farm trace`). Nothing here changes what becomes of a frame, and without a listener nothing is copied.

use farm_core::balance::decide::{Decision, Reason, Verdict};
use farm_core::id::NodeId;
use farm_core::trace::{Cause, Outcome};

use super::{Held, Judge, VNET};
use crate::dataplane::replay;

impl Judge {
    /// The first bytes of a frame with its header, for [`Self::tell`]; `None` while nobody listens.
    pub(super) fn snap(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let snap = self.trace.as_ref()?.snap()?;
        let frame = bytes.get(VNET..)?;
        Some(frame.get(..snap).unwrap_or(frame).to_vec())
    }

    /// Tells what became of the frame that began with `came` and has `length` bytes with its header.
    pub(super) fn tell(
        &self,
        came: Option<Vec<u8>>,
        length: usize,
        decision: &Decision,
        outcome: Outcome,
        cause: Cause,
    ) {
        if let (Some(trace), Some(came)) = (&self.trace, came) {
            trace.judged(&self.plan, &came, length.saturating_sub(VNET), decision, outcome, cause);
        }
    }

    /// As [`Self::tell`], after what `decision` says; `failed` if it was accepted and did not reach the stack.
    pub(super) fn tell_judged(&self, came: Option<Vec<u8>>, length: usize, decision: &Decision, failed: Option<Cause>) {
        let outcome = match decision.verdict {
            Verdict::Accept if failed.is_none() => Outcome::Accepted,
            Verdict::Drop if !decision.forward.is_empty() => Outcome::Forwarded,
            Verdict::Accept | Verdict::Drop => Outcome::Dropped,
            Verdict::Hold => Outcome::Held,
            Verdict::Pass => return,
        };
        let cause = failed.unwrap_or(Cause::Judged(decision.reason));
        self.tell(came, length, decision, outcome, cause);
    }

    /// As [`Self::tell`], of one that goes to `owner` only.
    pub(super) fn tell_sent_on(&self, came: Option<Vec<u8>>, length: usize, decision: &Decision, owner: NodeId) {
        let decision = Decision {
            forward: [owner].into_iter().collect(),
            ..*decision
        };
        self.tell(
            came,
            length,
            &decision,
            Outcome::Forwarded,
            Cause::Judged(Reason::HandedOver),
        );
    }

    /// Tells that a frame is no longer kept.
    pub(super) fn tell_lost(&self, held: Option<Held>, cause: Cause) {
        if let Some(held) = held {
            let nothing = Decision::local(Verdict::Drop, held.why);
            self.tell(
                self.snap(&held.bytes),
                held.bytes.len(),
                &nothing,
                Outcome::Dropped,
                cause,
            );
        }
    }

    /// Tells of a recorded connection request whose turn has come.
    pub(super) fn tell_replay(&self, due: &replay::Due, leased: bool) {
        let came = self.snap(&due.frame);
        let (forward, outcome) = match due.to {
            _ if !leased => (None, Outcome::Dropped),
            replay::To::Stack { .. } => (None, Outcome::Accepted),
            replay::To::Member(owner) => (Some(owner), Outcome::Forwarded),
        };
        let decision = Decision {
            forward: forward.into_iter().collect(),
            owner: forward,
            ..Decision::local(Verdict::Accept, Reason::Own)
        };
        let cause = if leased { Cause::Replay } else { Cause::LeaseEnded };
        self.tell(came, due.frame.len(), &decision, outcome, cause);
    }
}
