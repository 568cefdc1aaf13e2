//! The packet path: what every data plane must do, and what it counts.
//!
//! The owner loop publishes immutable [`Plan`]s; a data plane swaps one in whole, works by it, and answers with
//! [`Event::PlanApplied`](crate::event::Event::PlanApplied) once no frame is judged by an older one. It renews nothing itself: past the
//! [`Lease`] it drops every VIP frame, so that a daemon that hangs takes nothing others have taken over.

pub mod arp;
pub mod change;
pub mod connections;
mod count;
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
use std::time::Duration;

pub use count::{Count, Counters};
use farm_core::balance::flow::FlowKey;
use farm_core::balance::plan::Plan;
use farm_core::config::PlaneChoice;
use farm_core::wire::heartbeat::Requester;
use farm_sys::bpf::{self, KernelLease};
use farm_sys::clock::BootInstant;
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
    fn watch_orphans(&self, until: BootInstant);
    /// All peers have said which of the connections `asked` for they have, or, with `None`, one has not.
    fn learn_flows(&self, asked: Vec<FlowKey>, theirs: Option<BTreeSet<FlowKey>>);
    /// Of the resets that come out of the TAP each leaves after this time, or, with `None`, at once.
    fn set_reset_wait(&self, wait: Option<Duration>);
    /// A node has come back: those that wait do not leave, nor does one that comes in the next `silence`.
    fn withdraw_resets(&self, silence: Duration);
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
    fn leave(&self, until: BootInstant);
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
    /// Of [`BootInstant`]: the lease of a host that is suspended ends too.
    until_nanos: AtomicU64,
    kernel: OnceLock<KernelLease>,
}

impl Lease {
    /// A lease that has already ended.
    pub fn new() -> Self {
        Self {
            until_nanos: AtomicU64::new(0),
            kernel: OnceLock::new(),
        }
    }

    /// Extends the lease to `until`.
    pub fn renew(&self, until: BootInstant) {
        let nanos = until.as_nanos();
        self.until_nanos.store(nanos, Ordering::Release);
        if let Some(kernel) = self.kernel.get() {
            kernel.renew(nanos);
        }
    }

    /// `kernel` is renewed along with this one from here on.
    pub fn extend_to(&self, kernel: KernelLease) {
        kernel.renew(self.until_nanos.load(Ordering::Acquire));
        // One program at most in the life of a data plane.
        let _ = self.kernel.set(kernel);
    }

    /// True if frames may be accepted at `now`.
    pub fn holds(&self, now: BootInstant) -> bool {
        now.as_nanos() < self.until_nanos.load(Ordering::Acquire)
    }
}

impl Default for Lease {
    fn default() -> Self {
        Self::new()
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
        let now = BootInstant::now();
        assert!(!lease.holds(now));
        lease.renew(now + Duration::from_secs(1));
        assert!(lease.holds(now) && !lease.holds(now + Duration::from_secs(1)));
    }
}
