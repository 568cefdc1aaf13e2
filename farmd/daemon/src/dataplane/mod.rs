//! The packet path: what every data plane must do, and what it counts.
//!
//! The owner loop publishes immutable [`Plan`]s; a data plane swaps one in whole, works by it, and answers with
//! [`Event::PlanApplied`](crate::event::Event::PlanApplied) once no frame is judged by an older one. It renews nothing itself: past the
//! [`Lease`] it drops every VIP frame, so that a daemon that hangs takes nothing others have taken over.

pub mod arp;
pub mod change;
pub mod connections;
pub mod early;
pub mod half_open;
pub mod judge;
pub mod kernel;
pub mod known;
pub mod lister;
pub mod neighbour;
pub mod raw;
pub mod replay;
pub mod taken;
pub mod trace;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use farm_core::balance::decide::Reason;
use farm_core::balance::flow::FlowKey;
use farm_core::balance::plan::Plan;
use farm_core::config::PlaneChoice;
use farm_core::wire::heartbeat::Requester;
use farm_sys::bpf::{self, KernelCounters, KernelLease};
use kernel::tables::NoRoom;
use tokio::sync::oneshot;

/// A service interface that is ready to be worked with.
#[derive(Debug)]
pub struct Interface {
    /// Kernel index.
    pub index: u32,
    /// Name, for messages.
    pub name: String,
    /// Captures what comes in.
    pub ring: farm_sys::packet_socket::PacketRing,
    /// Records connection requests; `None` where the kernel did not give it.
    pub syns: Option<replay::SynRing>,
    /// Hears and answers ARP and neighbour discovery.
    pub neighbours: farm_sys::neighbour_socket::NeighbourSocket,
    /// Virtual MACs that the ring receives, and those of the groups that the other socket hears; they leave with these.
    pub joined: std::collections::BTreeSet<[u8; 6]>,
    /// There was no memory for a ring of the size that captured frames need, and that was told.
    pub is_narrow: bool,
}

/// A filter of the core in the form the kernel takes.
pub fn kernel_program(program: &[farm_core::balance::filter::Insn]) -> Vec<farm_sys::packet_socket::BpfInsn> {
    program
        .iter()
        .map(|i| farm_sys::packet_socket::BpfInsn {
            code: i.code,
            jt: i.jt,
            jf: i.jf,
            k: i.k,
        })
        .collect()
}

/// The packet path.
pub trait DataPlane: Send + Sync {
    /// Works by `plan` from now on and says so with an event.
    fn apply(&self, plan: Arc<Plan>);
    /// Takes a service interface into work.
    fn attach(&self, interface: Interface);
    /// Lets go of the interface with this index.
    fn detach(&self, index: u32);
    /// Takes or, with `None`, gives back the device through which frames accepted here reach the stack.
    fn set_tap(&self, tap: Option<LocalDevice>);
    /// Learns of a requester that another node has heard.
    fn learn(&self, requester: Requester);
    /// Asks some requesters whether they are there: what they answer shows that something comes in.
    fn ask_around(&self);
    /// A node has died: until `until` peers are asked for connections that this host does not know ([`crate::event::Event::Unknown`]), and those that nobody has are reset.
    fn watch_orphans(&self, until: Instant);
    /// All peers have said which of the connections `asked` for they have, or, with `None`, one has not.
    fn learn_flows(&self, asked: Vec<FlowKey>, theirs: Option<BTreeSet<FlowKey>>);
    /// Where frames are judged.
    fn standing(&self) -> Standing;
    /// Tells when [`Self::standing`] knows what has become of all that was attached and detached before this call: at once where nothing waits in between.
    fn caught_up(&self) -> oneshot::Receiver<()> {
        let (done, told) = oneshot::channel();
        _ = done.send(());
        told
    }
    /// Who may listen to what becomes of each frame.
    fn tracer(&self) -> trace::Tracer;
    /// Has what is in the kernel stay at work until `until` when this ends, for the farmd that takes this process's place: nothing is open by the plan at work.
    fn leave(&self, until: Instant);
    /// Ends it and waits until it has ended.
    fn stop(&mut self);
}

/// Where a data plane judges frames, for people and for whoever asks for one of the two.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Standing {
    /// Virtual addresses whose frames are judged in the kernel.
    pub in_kernel: BTreeSet<IpAddr>,
    /// How the program gets its frames; `None` as long as it has none.
    pub attachment: Option<bpf::Attachment>,
    /// Why none can be, if so.
    pub problem: Option<String>,
    /// For each of these addresses, whether XDP is ahead of the kernel's decision, or why not.
    pub early: BTreeMap<IpAddr, String>,
    /// Virtual addresses for which the kernel's tables have no room, and why.
    pub refused: BTreeMap<IpAddr, NoRoom>,
    /// Service interfaces that have no program, by name, and why.
    pub captured: BTreeMap<String, String>,
}

impl Standing {
    /// `bpf`, `raw` or both, for the addresses of a module, and why.
    pub fn tell(&self, choice: PlaneChoice, vips: &[IpAddr]) -> (String, String) {
        let (kernel, user): (Vec<&IpAddr>, Vec<&IpAddr>) = vips.iter().partition(|vip| self.in_kernel.contains(*vip));
        let names = |vips: &[&IpAddr]| vips.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let mut reasons: Vec<String> = self.captured.values().cloned().collect();
        reasons.extend(user.iter().filter_map(|vip| Some(self.refused.get(*vip)?.to_string())));
        reasons.dedup();
        let captured = (!reasons.is_empty()).then(|| reasons.join("; "));
        let way = self.attachment.map_or(String::new(), |way| format!(", {way}"));
        match (kernel.is_empty(), user.is_empty()) {
            (_, true) if !kernel.is_empty() => (
                "bpf".to_owned(),
                format!("eBPF at tc ingress{way}{}", self.tell_early(&kernel)),
            ),
            (false, false) => (
                "bpf, raw".to_owned(),
                format!(
                    "eBPF at tc ingress{way} for {}{}; {} in user space: {}",
                    names(&kernel),
                    self.tell_early(&kernel),
                    names(&user),
                    captured.as_deref().unwrap_or("the kernel did not take them"),
                ),
            ),
            _ => {
                let why = match (choice, &self.problem, captured) {
                    (PlaneChoice::Raw, ..) => "as configured".to_owned(),
                    (_, Some(problem), _) => problem.clone(),
                    (_, None, Some(captured)) => captured,
                    (_, None, None) => "no virtual address is served here".to_owned(),
                };
                ("raw".to_owned(), why)
            }
        }
    }

    /// Of XDP, once for each interface.
    fn tell_early(&self, vips: &[&IpAddr]) -> String {
        let early: BTreeSet<&String> = vips.iter().filter_map(|vip| self.early.get(*vip)).collect();
        early.into_iter().map(|text| format!("; {text}")).collect()
    }
}

/// The device that carries the VIPs. Frames accepted in user space reach the stack through it, and what the kernel leaves to user space comes out of it.
#[derive(Debug)]
pub struct LocalDevice {
    /// The TAP.
    pub tap: farm_sys::tap::Tap,
    /// Its own Ethernet address, which frames that go through it to the stack get as destination.
    pub mac: farm_core::id::MacAddr,
}

/// Until when VIP frames may be accepted, shared by the owner loop, which renews it, and the data plane, which obeys it, in user space and in the kernel.
#[derive(Debug)]
pub struct Lease {
    start: Instant,
    /// The kernel's name for `start`.
    start_nanos: u64,
    until_nanos: AtomicU64,
    kernel: OnceLock<KernelLease>,
}

impl Lease {
    /// A lease that has already ended.
    pub fn new() -> Self {
        // Read first: in the kernel the lease ends at the same time, or a little earlier.
        let start_nanos = bpf::monotonic_nanos();
        Self {
            start: Instant::now(),
            start_nanos,
            until_nanos: AtomicU64::new(0),
            kernel: OnceLock::new(),
        }
    }

    /// Extends the lease to `until`.
    pub fn renew(&self, until: Instant) {
        let nanos = until.saturating_duration_since(self.start).as_nanos();
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        self.until_nanos.store(nanos, Ordering::Release);
        if let Some(kernel) = self.kernel.get() {
            kernel.renew(if nanos == 0 {
                0
            } else {
                self.start_nanos.saturating_add(nanos)
            });
        }
    }

    /// `kernel` is renewed along with this one from here on.
    pub fn extend_to(&self, kernel: KernelLease) {
        let nanos = self.until_nanos.load(Ordering::Acquire);
        kernel.renew(if nanos == 0 {
            0
        } else {
            self.start_nanos.saturating_add(nanos)
        });
        // One program at most in the life of a data plane.
        let _ = self.kernel.set(kernel);
    }

    /// True if frames may be accepted at `now`.
    pub fn holds(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.start) < Duration::from_nanos(self.until_nanos.load(Ordering::Acquire))
    }
}

impl Default for Lease {
    fn default() -> Self {
        Self::new()
    }
}

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
}

impl Count {
    const ALL: [Self; 43] = [
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
    ];

    const fn name(self) -> &'static str {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_frames_are_judged_is_told_with_its_reason() {
        let vips: Vec<IpAddr> = ["198.18.0.20", "198.18.0.21"].map(|addr| addr.parse().unwrap()).into();
        let standing = |in_kernel: &[IpAddr], problem: Option<&str>| Standing {
            in_kernel: in_kernel.iter().copied().collect(),
            attachment: Some(bpf::Attachment::Tcx).filter(|_| !in_kernel.is_empty()),
            problem: problem.map(str::to_owned),
            ..Standing::default()
        };
        let early = |of: &[(usize, &str)]| Standing {
            early: of.iter().map(|(i, text)| (vips[*i], (*text).to_owned())).collect(),
            ..standing(&vips, None)
        };
        let full = |in_kernel: &[IpAddr]| Standing {
            refused: BTreeMap::from([(vips[1], NoRoom::Groups)]),
            ..standing(in_kernel, None)
        };
        let mut taken_off = standing(&[], None);
        taken_off
            .captured
            .insert("eth0".to_owned(), "eth0 takes none".to_owned());
        let tell = |standing: Standing, choice| {
            let (plane, why) = standing.tell(choice, &vips);
            format!("{plane} ({why})")
        };
        for (told, expected) in [
            (
                tell(standing(&vips, None), PlaneChoice::Auto),
                "bpf (eBPF at tc ingress, tcx)",
            ),
            (
                tell(standing(&vips[..1], None), PlaneChoice::Auto),
                "bpf, raw (eBPF at tc ingress, tcx for 198.18.0.20; 198.18.0.21 in user space: the kernel did not take them)",
            ),
            (
                tell(full(&vips[..1]), PlaneChoice::Auto),
                "bpf, raw (eBPF at tc ingress, tcx for 198.18.0.20; 198.18.0.21 in user space: the kernel's tables have room for the first 32 groups)",
            ),
            (
                tell(full(&[]), PlaneChoice::Bpf),
                "raw (the kernel's tables have room for the first 32 groups)",
            ),
            (
                tell(
                    early(&[(0, "XDP on eth0 (ixgbe)"), (1, "XDP on eth0 (ixgbe)")]),
                    PlaneChoice::Auto,
                ),
                "bpf (eBPF at tc ingress, tcx; XDP on eth0 (ixgbe))",
            ),
            (
                tell(
                    early(&[(0, "XDP on eth0 (ixgbe)"), (1, "no XDP on br0: it is a bridge device")]),
                    PlaneChoice::Bpf,
                ),
                "bpf (eBPF at tc ingress, tcx; XDP on eth0 (ixgbe); no XDP on br0: it is a bridge device)",
            ),
            (tell(standing(&[], None), PlaneChoice::Raw), "raw (as configured)"),
            (tell(taken_off, PlaneChoice::Auto), "raw (eth0 takes none)"),
            (
                tell(standing(&[], Some("no clang")), PlaneChoice::Auto),
                "raw (no clang)",
            ),
        ] {
            assert_eq!(told, expected);
        }
    }

    #[test]
    fn a_lease_ends_and_may_be_renewed() {
        let lease = Lease::new();
        let now = Instant::now();
        assert!(!lease.holds(now));
        lease.renew(now + Duration::from_secs(1));
        assert!(lease.holds(now) && !lease.holds(now + Duration::from_secs(1)));
    }
}
