//! What a data plane counts, in user space and in the kernel, by name.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use farm_core::balance::decide::Reason;
use farm_sys::bpf::{self, KernelCounters};

/// What a data plane counts beside verdicts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Count {
    /// Frames sent on to another member.
    Forwarded,
    /// Frames that could not be sent on.
    ForwardFailed,
    /// Frames whose owner's Ethernet address is not known.
    ForwardUnknown,
    /// Accepted frames that the TAP did not take, or that the program in the kernel could not address.
    TapFailed,
    /// Frames dropped because the lease had ended.
    LeaseEnded,
    /// Frames lost because the ring was full.
    RingFull,
    /// Frames too long for the ring that could not be fetched.
    Truncated,
    /// ARP requests for a VIP that were answered.
    ArpAnswered,
    /// ARP requests for a VIP left to another node.
    ArpLeft,
    /// Unsolicited ARP replies sent.
    ArpAnnounced,
    /// Requesters asked whether they are there, because all other nodes had fallen silent.
    ArpAsked,
    /// ARP packets that claim a VIP for a host that is no member.
    ArpConflict,
    /// ARP packets that could not be sent.
    ArpFailed,
    /// Neighbour solicitations for a VIP that were answered.
    NdAnswered,
    /// Neighbour solicitations for a VIP left to another node.
    NdLeft,
    /// Unsolicited neighbour advertisements sent.
    NdAnnounced,
    /// Neighbour discovery in which a host that is no member claims a VIP, or is about to take it.
    NdConflict,
    /// Neighbour discovery that could not be sent.
    NdFailed,
    /// Bytes accepted.
    BytesAccepted,
    /// Plans applied.
    PlansApplied,
    /// Connection requests, datagrams and echoes kept while their bucket changes hands.
    Held,
    /// Those given up for newer ones.
    HoldFull,
    /// Those given up after a second, or because nobody answers for their bucket.
    HoldExpired,
    /// Frames sent on by a member that this host has had from the client.
    Repeated,
    /// Connections counted as this host's that had ended when the next frame from their client's addresses came.
    FlowEnded,
    /// Handshakes that were forgotten in buckets lost without a hand-over.
    HandshakeForgotten,
    /// Frames that would not be known if a member sent them on, because there were too many.
    TakenFull,
    /// Look-ups of this host's connections that failed.
    ListFailed,
    /// Socket filters too long for the kernel, replaced by coarser ones.
    FilterCoarse,
    /// Socket filters that could not be set at all.
    FilterFailed,
    /// Connection requests recorded that another node is to answer.
    ReplayRecorded,
    /// Recorded requests given to the stack because their node is gone.
    ReplayAccepted,
    /// Recorded requests sent on to the member that has taken over.
    ReplaySentOn,
    /// Recorded requests forgotten because their time was over.
    ReplayExpired,
    /// Requests not recorded, or given up for newer ones, because there were too many or they were too long.
    ReplayOverflow,
    /// Frames that the program in the kernel left to the daemon.
    Punted,
    /// Frames that the program in the kernel dropped because plans changed too fast under it.
    PlanChanged,
    /// Times that somebody else has taken the program off an interface.
    ProgramLost,
    /// Frames that a trace wanted and did not get, because its reader was too slow.
    TraceLost,
    /// Frames that the program in the kernel left to the daemon, lost because they came faster than they were read.
    PuntLost,
    /// Segments given to the stack to be reset: of connections that a dead node had and no other one has.
    OrphanReset,
    /// Connections for which peers were asked.
    OrphanAsked,
    /// Segments that may have been such, and peers were not asked, because there were too many.
    OrphanFull,
    /// Connections for which peers were asked of whom one has not answered.
    OrphanUntold,
    /// Resets that waited, because a node was missing; some are counted again below.
    ResetHeld,
    /// Resets that came to this thread and left.
    ResetSent,
    /// Resets that did not leave, because a node had come back.
    ResetWithdrawn,
    /// Resets that did not leave, because too many waited.
    ResetFull,
    /// Resets that could not be sent.
    ResetFailed,
}

impl Count {
    const ALL: [Self; 49] = [
        Self::Forwarded,
        Self::ForwardFailed,
        Self::ForwardUnknown,
        Self::TapFailed,
        Self::LeaseEnded,
        Self::RingFull,
        Self::Truncated,
        Self::ArpAnswered,
        Self::ArpLeft,
        Self::ArpAnnounced,
        Self::ArpAsked,
        Self::ArpConflict,
        Self::ArpFailed,
        Self::NdAnswered,
        Self::NdLeft,
        Self::NdAnnounced,
        Self::NdConflict,
        Self::NdFailed,
        Self::BytesAccepted,
        Self::PlansApplied,
        Self::Held,
        Self::HoldFull,
        Self::HoldExpired,
        Self::Repeated,
        Self::FlowEnded,
        Self::HandshakeForgotten,
        Self::TakenFull,
        Self::ListFailed,
        Self::FilterCoarse,
        Self::FilterFailed,
        Self::ReplayRecorded,
        Self::ReplayAccepted,
        Self::ReplaySentOn,
        Self::ReplayExpired,
        Self::ReplayOverflow,
        Self::Punted,
        Self::PlanChanged,
        Self::ProgramLost,
        Self::TraceLost,
        Self::PuntLost,
        Self::OrphanReset,
        Self::OrphanAsked,
        Self::OrphanFull,
        Self::OrphanUntold,
        Self::ResetHeld,
        Self::ResetSent,
        Self::ResetWithdrawn,
        Self::ResetFull,
        Self::ResetFailed,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::ForwardFailed => "forward_failed",
            Self::ForwardUnknown => "forward_unknown",
            Self::TapFailed => "tap_failed",
            Self::LeaseEnded => "lease_ended",
            Self::RingFull => "ring_full",
            Self::Truncated => "truncated",
            Self::ArpAnswered => "arp_answered",
            Self::ArpLeft => "arp_left",
            Self::ArpAnnounced => "arp_announced",
            Self::ArpAsked => "arp_asked",
            Self::ArpConflict => "arp_conflict",
            Self::ArpFailed => "arp_failed",
            Self::NdAnswered => "nd_answered",
            Self::NdLeft => "nd_left",
            Self::NdAnnounced => "nd_announced",
            Self::NdConflict => "nd_conflict",
            Self::NdFailed => "nd_failed",
            Self::BytesAccepted => "bytes_accepted",
            Self::PlansApplied => "plans_applied",
            Self::Held => "held",
            Self::HoldFull => "hold_full",
            Self::HoldExpired => "hold_expired",
            Self::Repeated => "repeated",
            Self::FlowEnded => "flow_ended",
            Self::HandshakeForgotten => "handshake_forgotten",
            Self::TakenFull => "taken_full",
            Self::ListFailed => "list_failed",
            Self::FilterCoarse => "filter_coarse",
            Self::FilterFailed => "filter_failed",
            Self::ReplayRecorded => "replay_recorded",
            Self::ReplayAccepted => "replay_accepted",
            Self::ReplaySentOn => "replay_sent_on",
            Self::ReplayExpired => "replay_expired",
            Self::ReplayOverflow => "replay_overflow",
            Self::Punted => "punted",
            Self::PlanChanged => "plan_changed",
            Self::ProgramLost => "program_lost",
            Self::TraceLost => "trace_lost",
            Self::PuntLost => "punt_lost",
            Self::OrphanReset => "orphan_reset",
            Self::OrphanAsked => "orphan_asked",
            Self::OrphanFull => "orphan_full",
            Self::OrphanUntold => "orphan_untold",
            Self::ResetHeld => "reset_held",
            Self::ResetSent => "reset_sent",
            Self::ResetWithdrawn => "reset_withdrawn",
            Self::ResetFull => "reset_full",
            Self::ResetFailed => "reset_failed",
        }
    }

    /// The counter of the kernel's program that is part of this one.
    const fn in_kernel(self) -> Option<bpf::Count> {
        match self {
            Self::LeaseEnded => Some(bpf::Count::LeaseEnded),
            Self::Forwarded => Some(bpf::Count::Forwarded),
            Self::ForwardUnknown => Some(bpf::Count::ForwardUnknown),
            Self::ForwardFailed => Some(bpf::Count::ForwardFailed),
            Self::Punted => Some(bpf::Count::Punted),
            Self::PlanChanged => Some(bpf::Count::PlanChanged),
            Self::BytesAccepted => Some(bpf::Count::BytesAccepted),
            Self::TapFailed => Some(bpf::Count::TapFailed),
            _ => None,
        }
    }
}

/// Counters of a data plane; one writer, any number of readers.
#[derive(Debug)]
pub struct Counters {
    reasons: [AtomicU64; Reason::ALL.len()],
    counts: [AtomicU64; Count::ALL.len()],
    /// What the program in the kernel counts; the reasons come first, in their order.
    kernel: OnceLock<KernelCounters>,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            reasons: std::array::from_fn(|_| AtomicU64::new(0)),
            counts: std::array::from_fn(|_| AtomicU64::new(0)),
            kernel: OnceLock::new(),
        }
    }
}

impl Counters {
    /// One more frame judged for `reason`.
    pub fn judged(&self, reason: Reason) {
        self.reasons[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// `n` more of `count`.
    pub fn add(&self, count: Count, n: u64) {
        self.counts[count as usize].fetch_add(n, Ordering::Relaxed);
    }

    /// What the program in the kernel counts is part of the whole from here on.
    pub fn include(&self, kernel: KernelCounters) {
        // One program at most in the life of a data plane.
        let _ = self.kernel.set(kernel);
    }

    /// Frames that were judged, whatever became of them.
    pub fn frames(&self) -> u64 {
        let in_kernel = self.in_kernel();
        let judged = self.reasons.iter().map(|here| here.load(Ordering::Relaxed));
        judged.zip(in_kernel).map(|(here, kernel)| here + kernel).sum()
    }

    fn in_kernel(&self) -> [u64; bpf::COUNTS] {
        let in_kernel = self.kernel.get().and_then(|kernel| {
            kernel
                .read()
                .inspect_err(|error| tracing::debug!(%error, "the counters in the kernel"))
                .ok()
        });
        in_kernel.unwrap_or([0; bpf::COUNTS])
    }

    /// All of them, by name.
    pub fn read(&self) -> BTreeMap<String, u64> {
        let in_kernel = self.in_kernel();
        let reasons = Reason::ALL.iter().zip(&in_kernel).map(|(r, kernel)| {
            let here = self.reasons[*r as usize].load(Ordering::Relaxed);
            (format!("frames_{}", r.name()), here + kernel)
        });
        let counts = Count::ALL.iter().map(|c| {
            let here = self.counts[*c as usize].load(Ordering::Relaxed);
            let kernel = c.in_kernel().map_or(0, |count| in_kernel[count as usize]);
            (format!("dataplane_{}", c.name()), here + kernel)
        });
        reasons.chain(counts).collect()
    }
}
