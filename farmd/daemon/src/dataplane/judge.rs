//! What becomes of each captured frame: judged by the plan, then given to the stack, kept, sent on to its owner, or dropped.
//!
//! Owns the plan in force, what is known of this host's connections, the fragments seen, and what is kept
//! for buckets that are changing hands. It reads no ring by itself and never waits; the data plane's thread drives it.

mod resets;
mod telling;

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::balance::decide::{Decision, Reason, Verdict, decide};
use farm_core::balance::flow::{FlowKey, TCP};
use farm_core::balance::fragment::FragmentTable;
use farm_core::balance::orphans::{Answer, Orphans};
use farm_core::balance::plan::Plan;
use farm_core::balance::resets::Resets;
use farm_core::config::L2Mode;
use farm_core::id::{NodeId, NodeSet};
use farm_core::trace::{Cause, Outcome};
use farm_core::wire::packet::{L4, Packet};
use farm_sys::clock::BootInstant;
use farm_sys::packet_socket::{PacketRing, VNET_HEADER as VNET};
use tracing::{debug, warn};

use super::change;
use super::kernel::Kernel;
use super::known::Known;
use super::replay;
use super::taken::Taken;
use super::trace::Tracer;
use super::{Count, Counters, Interface, Lease, LocalDevice};

/// Frames taken from one ring before the others have their turn.
const BUDGET: usize = 256;
/// Most frames kept for buckets that change hands; the oldest goes first.
const HOLD: usize = 4096;
/// How long: past a second the client has asked again by itself (RFC 6298 section 2.1).
const HOLD_TIME: Duration = Duration::from_secs(1);

/// Longest frame that comes out of the TAP, with its header.
const MAX_FRAME: usize = VNET + (1 << 16) + 64;

/// A frame that is kept.
#[derive(Debug)]
struct Held {
    since: Instant,
    why: Reason,
    bytes: Vec<u8>,
}

/// What judging a frame needs; apart from the interfaces, so that a ring can be read while it is used.
#[derive(Debug)]
pub struct Judge {
    /// In force.
    pub plan: Arc<Plan>,
    /// Ends the acceptance of frames when the owner loop does not run.
    pub lease: Arc<Lease>,
    /// Of the data plane.
    pub counters: Arc<Counters>,
    /// The way to the stack, while there is one.
    pub tap: Option<LocalDevice>,
    /// Connections of this host.
    pub known: Known,
    /// Segments that may be nobody's.
    pub orphans: Orphans,
    /// What the stack says of those that it does not know.
    pub resets: Resets,
    /// Judges most frames before they get here, where there is one.
    pub kernel: Option<Kernel>,
    /// Whom each frame is told, while somebody listens.
    pub trace: Option<Tracer>,
    buffer: Box<[u8]>,
    fragments: FragmentTable,
    /// Connection requests, datagrams and echoes that wait for their bucket to open.
    held: VecDeque<Held>,
    /// What was accepted since buckets opened here: those who gave them up send on what this host may have seen itself.
    taken: Taken,
    start: Instant,
}

impl Judge {
    /// Works by `plan`, with nothing known yet.
    pub fn new(plan: Arc<Plan>, lease: Arc<Lease>, counters: Arc<Counters>, known: Known) -> Self {
        Self {
            plan,
            lease,
            counters,
            tap: None,
            known,
            orphans: Orphans::default(),
            resets: Resets::default(),
            kernel: None,
            trace: None,
            buffer: vec![0; MAX_FRAME].into_boxed_slice(),
            fragments: FragmentTable::default(),
            held: VecDeque::new(),
            taken: Taken::default(),
            start: Instant::now(),
        }
    }

    /// Works by `plan` from now on and returns the one before.
    pub fn swap(&mut self, plan: Arc<Plan>) -> Arc<Plan> {
        let old = std::mem::replace(&mut self.plan, plan);
        self.known.handle_plan(&old, &self.plan);
        if change::opens(&old, &self.plan) {
            self.taken.watch(Instant::now());
        }
        if let Some(trace) = &self.trace {
            trace.set_plan(Arc::clone(&self.plan));
        }
        old
    }

    /// Forgets what is kept.
    pub fn forget_held(&mut self) {
        let resets = self.resets.withdraw(self.start.elapsed(), Duration::ZERO);
        self.counters.add(Count::LeaseEnded, (self.held.len() + resets) as u64);
        self.held.clear();
    }

    /// Counts what an interface's ring has lost.
    pub fn read_statistics(&self, interface: &Interface) {
        match interface.ring.stats() {
            Ok((_, drops)) => self.counters.add(Count::RingFull, drops.into()),
            Err(error) => debug!(%error, interface = interface.name, "ring statistics"),
        }
    }

    /// Gives up what has been kept for too long; all of it is looked at again with each plan, so that only the oldest need be.
    pub fn expire_held(&mut self, now: Instant) {
        while self.held.front().is_some_and(|held| held.since + HOLD_TIME <= now) {
            let expired = self.held.pop_front();
            self.counters.add(Count::HoldExpired, 1);
            self.tell_lost(expired, Cause::HoldExpired);
        }
    }

    /// Judges all that is in one ring now.
    pub fn work_off(&mut self, interface: &mut Interface) {
        for _ in 0..super::raw::RING_SLOTS as usize / BUDGET {
            if self.work(interface) < BUDGET {
                return;
            }
        }
    }

    /// Judges what is in one ring, a part of it if it is much; returns how many frames.
    pub fn work(&mut self, interface: &mut Interface) -> usize {
        let mut forwards: Vec<(Vec<u8>, NodeSet)> = Vec::new();
        let truncated = interface.ring.truncated();
        let result = interface
            .ring
            .recv(BUDGET, |bytes| self.judge_captured(bytes, &mut forwards));
        let frames = result.unwrap_or_else(|error| {
            // Said once each time; capture goes on by itself when the interface is up again.
            if error.kind() == io::ErrorKind::NetworkDown {
                warn!(interface = interface.name, "the service interface went down");
            } else {
                debug!(%error, interface = interface.name, "reading the ring failed");
            }
            0
        });
        self.counters
            .add(Count::Truncated, interface.ring.truncated() - truncated);
        for (mut bytes, to) in forwards {
            self.forward(&interface.ring, &mut bytes, to);
        }
        frames
    }

    /// What the kernel judges itself is not judged again.
    fn judge_captured(&mut self, bytes: &mut [u8], forwards: &mut Vec<(Vec<u8>, NodeSet)>) {
        let taken = |kernel: &Kernel| Packet::parse(&bytes[VNET..]).is_some_and(|p| kernel.takes(p.destination));
        if !self
            .kernel
            .as_ref()
            .is_some_and(|kernel| kernel.is_at_work() && taken(kernel))
        {
            self.judge(bytes, forwards);
        }
    }

    /// Takes what comes out of the TAP, a part of it if it is much: what the program in the kernel has left to this thread, and resets. Returns how many frames.
    pub fn work_tap(&mut self, interfaces: &[Interface]) -> usize {
        let Some(device) = self.tap.take() else { return 0 };
        let mut punted: Vec<Vec<u8>> = Vec::new();
        let result = device
            .tap
            .recv(BUDGET, &mut self.buffer, |bytes| punted.push(bytes.to_vec()));
        self.tap = Some(device);
        if let Err(error) = result {
            debug!(%error, "reading the TAP failed");
        }
        let mut forwards: Vec<(Vec<u8>, NodeSet)> = Vec::new();
        let judges_here = self.kernel.as_ref().is_some_and(Kernel::is_at_work);
        for bytes in &mut punted {
            if self.is_own_reset(bytes) {
                self.handle_reset(interfaces, bytes);
            } else if judges_here {
                self.judge(bytes, &mut forwards);
            }
        }
        for (mut bytes, to) in forwards {
            for node in to.iter() {
                self.send_on(interfaces, &mut bytes, node);
            }
        }
        punted.len()
    }

    /// Judges all that the program in the kernel has left to this thread by now.
    pub fn work_off_punted(&mut self, interfaces: &[Interface]) {
        for _ in 0..super::raw::RING_SLOTS as usize / BUDGET {
            if self.work_tap(interfaces) < BUDGET {
                return;
            }
        }
    }

    fn judge(&mut self, bytes: &mut [u8], forwards: &mut Vec<(Vec<u8>, NodeSet)>) {
        let Some(packet) = bytes.get(VNET..).and_then(Packet::parse) else {
            return;
        };
        let decision = self.decide(&packet);
        let decision = self.unless_orphaned(&packet, decision, bytes);
        let decision = self.without_repetition(&packet, decision);
        // As it came: what is accepted is addressed anew.
        let came = self.snap(bytes);
        // For each frame anew: this thread may have stood still since the last one, and others have answered since.
        let now = Instant::now();
        if !self.lease.holds(BootInstant::now()) {
            self.counters.add(Count::LeaseEnded, 1);
            self.tell(came, bytes.len(), &decision, Outcome::Dropped, Cause::LeaseEnded);
            return;
        }
        if decision.verdict == Verdict::Hold {
            self.hold(now, decision.reason, bytes);
        }
        self.counters.judged(decision.reason);
        if !decision.forward.is_empty() {
            forwards.push((bytes.to_vec(), decision.forward));
        }
        let failed = match decision.verdict {
            Verdict::Accept => self.accept_first(now, &packet, &decision, bytes).err(),
            Verdict::Drop | Verdict::Hold | Verdict::Pass => None,
        };
        if decision.verdict == Verdict::Accept && decision.reason == Reason::GuardedUnknown && failed.is_none() {
            // What nobody has is accepted to be reset.
            self.counters.add(Count::OrphanReset, 1);
        }
        self.tell_judged(came, bytes.len(), &decision, failed);
    }

    /// To the stack, unless it is the copy of a frame that has been accepted already.
    fn accept_first(
        &mut self,
        now: Instant,
        packet: &Packet,
        decision: &Decision,
        bytes: &mut [u8],
    ) -> Result<(), Cause> {
        if let Some(handed_on) = self.may_come_twice(packet) {
            let forgotten = self.taken.forgotten();
            let repeated = self.taken.is_repeated(now, handed_on, &bytes[VNET..]);
            self.counters.add(Count::TakenFull, self.taken.forgotten() - forgotten);
            if repeated {
                self.counters.add(Count::Repeated, 1);
                return Err(Cause::Repeated);
            }
        }
        self.note_opening(now, packet, decision.opens.is_some());
        self.accept(bytes)
    }

    /// Of a frame that starts something, where every node has it from the client: whether a member has handed it on all the same.
    fn may_come_twice(&self, packet: &Packet) -> Option<bool> {
        let starts = match packet.l4 {
            L4::Tcp { syn, .. } => syn,
            L4::Udp { .. } | L4::Echo | L4::LaterFragment => true,
            L4::Error(_) | L4::Other | L4::Malformed => false,
        };
        let vip = self.plan.vip(packet.destination)?;
        (starts && vip.mode != L2Mode::Directed).then_some(packet.destination_mac == vip.own_mac)
    }

    fn note_opening(&mut self, now: Instant, packet: &Packet, guarded: bool) {
        if let (Some(flow), L4::Tcp { sequence, .. }) = (replay::flow_of(packet), packet.l4) {
            self.known.open(now, flow, sequence, guarded);
        }
    }

    fn decide(&mut self, packet: &Packet) -> Decision {
        // The program remembers the first fragments that it has judged; of this one's datagram another part may have been left to this thread.
        if packet.l4 == L4::LaterFragment
            && let Some(first) = self.kernel.as_ref().and_then(|kernel| kernel.first_fragment(packet))
        {
            self.fragments.remember(self.start.elapsed(), packet, first);
        }
        let (plan, known) = (&self.plan, &mut self.known);
        let sequence = match packet.l4 {
            L4::Tcp { sequence, .. } => Some(sequence),
            _ => None,
        };
        decide(plan, packet, &mut self.fragments, self.start.elapsed(), &mut |flow| {
            known.has(plan, Instant::now(), flow, sequence)
        })
    }

    /// A segment that this host does not know, in a bucket that peers have connections in too, goes to the stack, which resets it (RFC 9293, section 3.10.7.1), if none of
    /// them has its connection.
    fn unless_orphaned(&mut self, packet: &Packet, decision: Decision, bytes: &[u8]) -> Decision {
        if decision.reason != Reason::GuardedUnknown || !self.orphans.is_watching() {
            return decision;
        }
        // What else belongs to a connection nobody resets.
        let L4::Tcp {
            source, destination, ..
        } = packet.l4
        else {
            return decision;
        };
        let flow = FlowKey {
            protocol: TCP,
            vip: packet.destination,
            vip_port: destination,
            client: packet.source,
            client_port: source,
        };
        match self.orphans.ask(self.start.elapsed(), &flow, bytes) {
            Answer::Nobody => Decision {
                verdict: Verdict::Accept,
                forward: NodeSet::EMPTY,
                ..decision
            },
            Answer::NoRoom => {
                self.counters.add(Count::OrphanFull, 1);
                decision
            }
            Answer::Silence => decision,
        }
    }

    /// What the program in the kernel has sent on to all who may have its connection, before it left it to this thread, has this host's own source.
    fn without_repetition(&self, packet: &Packet, decision: Decision) -> Decision {
        let sent = self
            .plan
            .vip(packet.destination)
            .is_some_and(|vip| vip.own_mac == packet.source_mac);
        Decision {
            forward: if sent { NodeSet::EMPTY } else { decision.forward },
            ..decision
        }
    }

    /// All peers have said which of the connections `asked` for they have, or (`None`) one has not: judges the segments anew that are nobody's.
    pub fn handle_told(&mut self, asked: &[FlowKey], theirs: Option<&BTreeSet<FlowKey>>) {
        let Some(theirs) = theirs else {
            self.counters.add(Count::OrphanUntold, asked.len() as u64);
            return self.orphans.handle_failure(asked);
        };
        let mut nowhere = Vec::new();
        for mut frame in self.orphans.handle_answer(self.start.elapsed(), asked, theirs) {
            self.judge(&mut frame, &mut nowhere);
        }
    }

    /// Time of [`Self::orphans`].
    pub fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    fn hold(&mut self, since: Instant, why: Reason, bytes: &[u8]) {
        if self.held.len() >= HOLD {
            let oldest = self.held.pop_front();
            self.counters.add(Count::HoldFull, 1);
            self.tell_lost(oldest, Cause::HoldFull);
        }
        let bytes = bytes.to_vec();
        self.held.push_back(Held { since, why, bytes });
        self.counters.add(Count::Held, 1);
    }

    /// A new plan may have opened the buckets that kept frames wait for, here or at another member, to
    /// which they are then sent on. Returns the flows of the connection requests that left, one way or the other.
    pub fn judge_held(&mut self, interfaces: &[Interface]) -> BTreeSet<FlowKey> {
        let mut left = BTreeSet::new();
        for Held { since, why, mut bytes } in std::mem::take(&mut self.held) {
            let Some(packet) = Packet::parse(&bytes[VNET..]) else {
                continue;
            };
            let now = Instant::now();
            if now.saturating_duration_since(since) >= HOLD_TIME {
                self.counters.add(Count::HoldExpired, 1);
                self.tell_lost(Some(Held { since, why, bytes }), Cause::HoldExpired);
                continue;
            }
            let decision = self.decide(&packet);
            let (came, length) = (self.snap(&bytes), bytes.len());
            let leased = self.lease.holds(BootInstant::now());
            let elsewhere = decision.owner.filter(|owner| *owner != self.plan.this);
            match (decision.verdict, elsewhere) {
                // It was kept until the new owner works, which is no longer waited for.
                (Verdict::Hold, Some(owner)) if leased && why == Reason::HandedOver && decision.reason != why => {
                    left.extend(replay::flow_of(&packet));
                    self.tell_sent_on(came, length, &decision, owner);
                    self.send_on(interfaces, &mut bytes, owner);
                }
                (Verdict::Hold, _) => {
                    let why = decision.reason;
                    self.held.push_back(Held { since, why, bytes });
                }
                _ if !leased => {
                    self.counters.add(Count::LeaseEnded, 1);
                    self.tell(came, length, &decision, Outcome::Dropped, Cause::LeaseEnded);
                }
                (Verdict::Accept, _) if leased => {
                    left.extend(replay::flow_of(&packet));
                    let failed = self.accept_first(now, &packet, &decision, &mut bytes).err();
                    self.tell_judged(came, length, &decision, failed);
                }
                (Verdict::Drop, Some(owner)) if leased => {
                    left.extend(replay::flow_of(&packet));
                    self.tell_sent_on(came, length, &decision, owner);
                    self.send_on(interfaces, &mut bytes, owner);
                }
                (Verdict::Accept | Verdict::Drop | Verdict::Pass, _) => {
                    self.counters.add(Count::HoldExpired, 1);
                    self.tell(came, length, &decision, Outcome::Dropped, Cause::HoldExpired);
                }
            }
        }
        left
    }

    /// Gives recorded connection requests that are due to the stack or to their new owner.
    pub fn replay(&mut self, due: Vec<replay::Due>, interfaces: &[Interface]) {
        for mut due in due {
            let leased = self.lease.holds(BootInstant::now());
            self.tell_replay(&due, leased);
            if !leased {
                self.counters.add(Count::LeaseEnded, 1);
                continue;
            }
            match due.to {
                replay::To::Stack { opens } => {
                    if let Some(packet) = Packet::parse(&due.frame[VNET..]) {
                        self.note_opening(Instant::now(), &packet, opens.is_some());
                    }
                    // Told above; that the TAP did not take it is counted.
                    let _ = self.accept(&mut due.frame);
                }
                replay::To::Member(owner) => self.send_on(interfaces, &mut due.frame, owner),
            }
        }
    }

    /// Sends a client's frame on to another member, by the interface of its VIP.
    fn send_on(&self, interfaces: &[Interface], bytes: &mut [u8], to: NodeId) {
        let vip = Packet::parse(&bytes[VNET..]).and_then(|packet| self.plan.vip(packet.destination));
        match vip.and_then(|vip| interfaces.iter().find(|i| i.index == vip.interface)) {
            Some(interface) => self.forward(&interface.ring, bytes, [to].into_iter().collect()),
            None => self.counters.add(Count::ForwardUnknown, 1),
        }
    }

    /// To the stack: as if it had come for the TAP.
    fn accept(&mut self, bytes: &mut [u8]) -> Result<(), Cause> {
        let Some(device) = &self.tap else {
            self.counters.add(Count::TapFailed, 1);
            return Err(Cause::TapFailed);
        };
        bytes[VNET..VNET + 6].copy_from_slice(&device.mac.0);
        match device.tap.write(bytes) {
            Ok(()) => {
                self.counters.add(Count::BytesAccepted, (bytes.len() - VNET) as u64);
                Ok(())
            }
            Err(error) => {
                self.counters.add(Count::TapFailed, 1);
                debug!(%error, "the TAP did not take a frame");
                Err(Cause::TapFailed)
            }
        }
    }

    /// To other members: destination rewritten, source this host's own address.
    fn forward(&self, ring: &PacketRing, bytes: &mut [u8], to: NodeSet) {
        let Some(packet) = Packet::parse(&bytes[VNET..]) else {
            return;
        };
        let Some(vip) = self.plan.vip(packet.destination) else {
            return;
        };
        for node in to.iter() {
            let Some(mac) = vip.peers.get(&node) else {
                self.counters.add(Count::ForwardUnknown, 1);
                continue;
            };
            bytes[VNET..VNET + 6].copy_from_slice(&mac.0);
            bytes[VNET + 6..VNET + 12].copy_from_slice(&vip.own_mac.0);
            match ring.send(bytes) {
                Ok(()) => self.counters.add(Count::Forwarded, 1),
                Err(error) => {
                    self.counters.add(Count::ForwardFailed, 1);
                    debug!(%error, "a frame could not be sent on");
                }
            }
        }
    }
}
