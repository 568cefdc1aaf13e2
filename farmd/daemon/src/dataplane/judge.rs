//! What becomes of each captured frame: judged by the plan, then given to the stack, kept, sent on to its owner, or dropped.
//!
//! Owns the plan in force, the known flows of guarded and draining buckets, the fragments seen, and the connection requests kept
//! for buckets that are changing hands. It reads no ring by itself and never waits; the data plane's thread drives it.

// Looked up by key only; never iterated.
#![allow(clippy::disallowed_types)]

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::balance::decide::{Decision, Verdict, decide};
use farm_core::balance::flow::FlowKey;
use farm_core::balance::fragment::FragmentTable;
use farm_core::balance::plan::Plan;
use farm_core::id::{NodeId, NodeSet};
use farm_core::wire::packet::Packet;
use farm_sys::packet_socket::{PacketRing, VNET_HEADER as VNET};
use tracing::{debug, warn};

use super::replay;
use super::{Count, Counters, Interface, Lease, LocalDevice};

/// Frames taken from one ring before the others have their turn.
const BUDGET: usize = 256;
/// Most connection requests kept for buckets that are about to open; the oldest goes first.
const HOLD: usize = 1024;
/// How long: past a second the client has asked again by itself (RFC 6298 section 2.1).
const HOLD_TIME: Duration = Duration::from_secs(1);

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
    /// Connections of this host in guarded, draining and foreign buckets.
    pub flows: HashSet<FlowKey>,
    fragments: FragmentTable,
    /// Connection requests that wait for their bucket to open.
    held: VecDeque<(Instant, Vec<u8>)>,
    start: Instant,
}

impl Judge {
    /// Works by `plan`, with nothing known yet.
    pub fn new(plan: Arc<Plan>, lease: Arc<Lease>, counters: Arc<Counters>) -> Self {
        Self {
            plan,
            lease,
            counters,
            tap: None,
            flows: HashSet::new(),
            fragments: FragmentTable::default(),
            held: VecDeque::new(),
            start: Instant::now(),
        }
    }

    /// Works by `plan` from now on and returns the one before. Fragments whose first one it judged are unknown to the new one.
    pub fn swap(&mut self, plan: Arc<Plan>) -> Arc<Plan> {
        self.fragments.clear();
        std::mem::replace(&mut self.plan, plan)
    }

    /// Forgets the connection requests kept.
    pub fn forget_held(&mut self) {
        self.held.clear();
    }

    /// Counts what an interface's ring has lost.
    pub fn read_statistics(&self, interface: &Interface) {
        match interface.ring.stats() {
            Ok((_, drops)) => self.counters.add(Count::RingFull, drops.into()),
            Err(error) => debug!(%error, interface = interface.name, "ring statistics"),
        }
    }

    /// Judges what is in one ring.
    pub fn work(&mut self, interface: &mut Interface) {
        let mut forwards: Vec<(Vec<u8>, NodeSet)> = Vec::new();
        let now = Instant::now();
        let leased = self.lease.holds(now);
        let truncated = interface.ring.truncated();
        let result = interface
            .ring
            .recv(BUDGET, |bytes| self.judge(now, leased, bytes, &mut forwards));
        match result {
            Ok(_) => {}
            // Said once each time; capture goes on by itself when the interface is up again.
            Err(error) if error.kind() == io::ErrorKind::NetworkDown => {
                warn!(interface = interface.name, "the service interface went down");
            }
            Err(error) => debug!(%error, interface = interface.name, "reading the ring failed"),
        }
        self.counters
            .add(Count::Truncated, interface.ring.truncated() - truncated);
        for (mut bytes, to) in forwards {
            self.forward(&interface.ring, &mut bytes, to);
        }
    }

    fn judge(&mut self, since: Instant, leased: bool, bytes: &mut [u8], forwards: &mut Vec<(Vec<u8>, NodeSet)>) {
        let Some(packet) = bytes.get(VNET..).and_then(Packet::parse) else {
            return;
        };
        let decision = self.decide(&packet);
        if !leased {
            self.counters.add(Count::LeaseEnded, 1);
            return;
        }
        if decision.verdict == Verdict::Hold {
            self.hold(since, bytes);
        }
        self.counters.judged(decision.reason);
        if !decision.forward.is_empty() {
            forwards.push((bytes.to_vec(), decision.forward));
        }
        if decision.verdict == Verdict::Accept {
            self.flows.extend(decision.opens);
            self.accept(bytes);
        }
    }

    fn decide(&mut self, packet: &Packet) -> Decision {
        let flows = &self.flows;
        let now = self.start.elapsed();
        decide(&self.plan, packet, &mut self.fragments, now, &mut |flow| {
            flows.contains(flow)
        })
    }

    fn hold(&mut self, since: Instant, bytes: &[u8]) {
        if self.held.len() >= HOLD {
            self.held.pop_front();
            self.counters.add(Count::HoldFull, 1);
        }
        self.held.push_back((since, bytes.to_vec()));
        self.counters.add(Count::Held, 1);
    }

    /// A new plan may have opened the buckets that kept requests wait for, here or at another member, to
    /// which they are then sent on. Returns the flows of those that left, one way or the other.
    pub fn judge_held(&mut self, interfaces: &[Interface]) -> BTreeSet<FlowKey> {
        let mut left = BTreeSet::new();
        let now = Instant::now();
        let leased = self.lease.holds(now);
        for (since, mut bytes) in std::mem::take(&mut self.held) {
            let Some(packet) = Packet::parse(&bytes[VNET..]) else {
                continue;
            };
            if now.saturating_duration_since(since) >= HOLD_TIME {
                continue;
            }
            let decision = self.decide(&packet);
            let elsewhere = decision.owner.filter(|owner| *owner != self.plan.this);
            match (decision.verdict, elsewhere) {
                (Verdict::Hold, _) => self.hold(since, &bytes),
                (Verdict::Accept, _) if leased => {
                    self.flows.extend(decision.opens);
                    self.accept(&mut bytes);
                    left.extend(replay::flow_of(&packet));
                }
                (Verdict::Drop, Some(owner)) if leased => {
                    self.send_on(interfaces, &mut bytes, owner);
                    left.extend(replay::flow_of(&packet));
                }
                (Verdict::Accept | Verdict::Drop | Verdict::Pass, _) => {}
            }
        }
        left
    }

    /// Gives recorded connection requests that are due to the stack or to their new owner.
    pub fn replay(&mut self, due: Vec<replay::Due>, interfaces: &[Interface]) {
        for mut due in due {
            match due.to {
                replay::To::Stack { opens } => {
                    self.flows.extend(opens);
                    self.accept(&mut due.frame);
                }
                replay::To::Member(owner) => self.send_on(interfaces, &mut due.frame, owner),
            }
        }
    }

    /// Sends a client's frame on to another member, by the interface of its VIP.
    fn send_on(&self, interfaces: &[Interface], bytes: &mut [u8], to: NodeId) {
        let vip = Packet::parse(&bytes[VNET..]).and_then(|packet| self.plan.vip(packet.destination));
        if let Some(interface) = vip.and_then(|vip| interfaces.iter().find(|i| i.index == vip.interface)) {
            self.forward(&interface.ring, bytes, [to].into_iter().collect());
        }
    }

    /// To the stack: as if it had come for the TAP.
    fn accept(&mut self, bytes: &mut [u8]) {
        let Some(device) = &self.tap else { return };
        bytes[VNET..VNET + 6].copy_from_slice(&device.mac.0);
        match device.tap.write(bytes) {
            Ok(()) => self.counters.add(Count::BytesAccepted, (bytes.len() - VNET) as u64),
            Err(error) => {
                self.counters.add(Count::TapFailed, 1);
                debug!(%error, "the TAP did not take a frame");
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
