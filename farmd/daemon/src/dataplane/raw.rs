//! The raw data plane: AF_PACKET ring in, TAP out, one thread.
//!
//! The kernel's own receive path never sees VIP frames (an nf_tables rule drops them after the ring has got
//! its copy); what the decision accepts is written to the TAP that carries the VIP, with its
//! `virtio_net_hdr`, so that unfinished checksums and merged segments stay what they are. Replies leave by
//! the kernel's ordinary route.
//!
//! A new plan takes effect between two frames: the thread looks up this host's connections once (its sockets,
//! and tracked connections that stand for sockets in containers), swaps the plan and goes on; frames wait in
//! the ring meanwhile. Connection requests for buckets that are changing hands are kept and judged again by
//! the next plan; what is another's by then is sent on to it. The connections found are the flow table for
//! guarded and draining buckets; connections opened later in a guarded bucket are added as their first packet
//! is accepted.

// Looked up by key only; never iterated.
#![allow(clippy::disallowed_types)]

use std::collections::{HashSet, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use farm_core::balance::decide::{Decision, Verdict, decide};
use farm_core::balance::filter;
use farm_core::balance::flow::FlowKey;
use farm_core::balance::fragment::FragmentTable;
use farm_core::balance::plan::{BucketState, GroupPlan, Plan};
use farm_core::config::L2Mode;
use farm_core::id::NodeSet;
use farm_core::wire::heartbeat::Requester;
use farm_core::wire::packet::Packet;
use farm_sys::event_fd::EventFd;
use farm_sys::packet_socket::PacketRing;
use tracing::{debug, warn};

use super::arp::Responder;
use super::connections::{Connections, sort_out};
use super::{Count, Counters, DataPlane, Interface, Lease, LocalDevice};
use crate::event::{Event, EventSender, HeldGroup};

/// Slots of 2 kB in each interface's ring: 4 MB, some 30 ms at 70 000 frames a second.
pub const RING_SLOTS: u32 = 2048;
/// Frames taken from one ring before the others have their turn.
const BUDGET: usize = 256;
/// How often connections in buckets that are guarded or held are counted anew.
const RECOUNT: Duration = Duration::from_secs(1);
/// And that many times the duration of a look-up lie between two, so that many connections do not stop the packets.
const RECOUNT_REST: u32 = 20;
/// Most connections remembered; past it they are counted anew, which forgets those that have ended.
const MAX_FLOWS: usize = 1 << 20;
/// Time between two log lines about a look-up that fails.
const FAILURE_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Most connection requests kept for buckets that are about to open; the oldest goes first.
const HOLD: usize = 1024;
/// How long: past a second the client has asked again by itself (RFC 6298 section 2.1).
const HOLD_TIME: Duration = Duration::from_secs(1);
/// Length of the `virtio_net_hdr` before each frame.
const VNET: usize = 10;

enum Command {
    Plan(Arc<Plan>),
    Attach(Interface),
    Detach(u32),
    Tap(Option<LocalDevice>),
    Learn(Requester),
    Stop,
}

/// Handle of the thread.
#[derive(Debug)]
pub struct RawPlane {
    commands: mpsc::Sender<Command>,
    wake: Arc<EventFd>,
    thread: Option<thread::JoinHandle<()>>,
}

impl RawPlane {
    /// Starts the thread in the network namespace of the caller.
    pub fn start(plan: Arc<Plan>, lease: Arc<Lease>, counters: Arc<Counters>, events: EventSender) -> io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let wake = Arc::new(EventFd::new()?);
        let mut worker = Worker {
            inbox,
            wake: Arc::clone(&wake),
            events,
            connections: Connections::open()?,
            responder: Responder::new(Arc::clone(&counters)),
            core: Core {
                plan,
                lease,
                counters,
                tap: None,
                flows: HashSet::new(),
                fragments: FragmentTable::default(),
                held: VecDeque::new(),
                start: Instant::now(),
            },
            interfaces: Vec::new(),
            recount_at: None,
            found: Vec::new(),
            statistics_at: Instant::now(),
            failure_told: None,
        };
        let thread = thread::Builder::new()
            .name("dataplane".into())
            .spawn(move || worker.run())?;
        Ok(Self {
            commands,
            wake,
            thread: Some(thread),
        })
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            self.wake.notify();
        }
    }
}

impl DataPlane for RawPlane {
    fn apply(&self, plan: Arc<Plan>) {
        self.send(Command::Plan(plan));
    }

    fn attach(&self, interface: Interface) {
        self.send(Command::Attach(interface));
    }

    fn detach(&self, index: u32) {
        self.send(Command::Detach(index));
    }

    fn set_tap(&self, tap: Option<LocalDevice>) {
        self.send(Command::Tap(tap));
    }

    fn learn(&self, requester: Requester) {
        self.send(Command::Learn(requester));
    }

    fn stop(&mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the data-plane thread ended with a panic");
        }
    }
}

impl Drop for RawPlane {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Worker {
    inbox: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    events: EventSender,
    connections: Connections,
    responder: Responder,
    core: Core,
    interfaces: Vec<Interface>,
    recount_at: Option<Instant>,
    /// What was last found, per group of the plan.
    found: Vec<HeldGroup>,
    statistics_at: Instant,
    /// When a failing look-up was last in the log.
    failure_told: Option<Instant>,
}

/// What judging a frame needs; apart from the interfaces, so that a ring can be read while it is used.
struct Core {
    plan: Arc<Plan>,
    lease: Arc<Lease>,
    counters: Arc<Counters>,
    tap: Option<LocalDevice>,
    flows: HashSet<FlowKey>,
    fragments: FragmentTable,
    /// Connection requests that wait for their bucket to open.
    held: VecDeque<(Instant, Vec<u8>)>,
    start: Instant,
}

impl Worker {
    fn run(&mut self) {
        loop {
            let mut fds = vec![self.wake.as_fd()];
            fds.extend(self.interfaces.iter().map(|i| i.ring.as_fd()));
            fds.extend(self.interfaces.iter().map(|i| i.arp.as_fd()));
            if let Some(tap) = &self.core.tap {
                fds.push(tap.tap.as_fd());
            }
            let polled = self.interfaces.len();
            let now = Instant::now();
            let wakes = [self.recount_at, self.responder.next_at(), Some(self.statistics_at)];
            let timeout = wakes
                .into_iter()
                .flatten()
                .min()
                .map(|at| at.saturating_duration_since(now));
            let ready = farm_sys::poll::wait_readable(&fds, timeout).unwrap_or_else(|error| {
                warn!(%error, "poll failed");
                thread::sleep(Duration::from_millis(10));
                0
            });
            if ready & 1 != 0 {
                self.wake.drain();
                if !self.handle_commands() {
                    return;
                }
                if self.interfaces.len() != polled {
                    continue;
                }
            }
            for (i, interface) in self.interfaces.iter_mut().enumerate() {
                let responder = &mut self.responder;
                if ready & (1 << (1 + i)) != 0 {
                    self.core.work(interface);
                }
                if ready & (1 << (1 + polled + i)) == 0 {
                    continue;
                }
                for requester in responder.handle_arp(&self.core.plan, &self.core.lease, interface) {
                    self.events.send(Event::Requester(requester));
                }
            }
            if let Some(tap) = &self.core.tap
                && let Err(error) = tap.tap.drain()
            {
                debug!(%error, "reading the TAP failed");
            }
            self.handle_timers();
        }
    }

    fn handle_commands(&mut self) -> bool {
        let mut plan = None;
        while let Ok(command) = self.inbox.try_recv() {
            match command {
                Command::Plan(newer) => plan = Some(newer),
                Command::Attach(interface) => {
                    self.set_filter(&interface);
                    self.interfaces.push(interface);
                }
                Command::Detach(index) => {
                    for interface in self.interfaces.iter().filter(|i| i.index == index) {
                        self.core.read_statistics(interface);
                    }
                    self.interfaces.retain(|i| i.index != index);
                }
                Command::Tap(tap) => self.core.tap = tap,
                Command::Learn(requester) => self.responder.learn(requester),
                Command::Stop => return false,
            }
        }
        if let Some(plan) = plan {
            self.apply(plan);
        }
        true
    }

    /// Swaps the plan between two frames; what waits in the rings is judged by the new one.
    fn apply(&mut self, plan: Arc<Plan>) {
        if !self.core.lease.holds(Instant::now()) {
            // What came in while this host did not run has been answered by others.
            self.discard_backlog();
        }
        let old = std::mem::replace(&mut self.core.plan, plan);
        self.core.fragments.clear();
        for interface in &mut self.interfaces {
            join_virtual_macs(&self.core.plan, interface);
        }
        for interface in &self.interfaces {
            self.set_filter(interface);
        }
        if same_states(&old, &self.core.plan) {
            // Owners, holders or the map to come have changed: what this host has is as it was.
            self.report();
        } else {
            self.count_connections();
        }
        self.core.judge_held(&self.interfaces);
        self.responder.handle_plan(&old, &self.core.plan, &mut self.interfaces);
        self.core.counters.add(Count::PlansApplied, 1);
    }

    fn discard_backlog(&mut self) {
        self.core.held.clear();
        for interface in &mut self.interfaces {
            match interface.ring.recv(2 * RING_SLOTS as usize, |_| {}) {
                Ok(frames) => self.core.counters.add(Count::LeaseEnded, frames as u64),
                Err(error) => debug!(%error, interface = interface.name, "reading the ring failed"),
            }
        }
    }

    /// The kernel may refuse a long program (`optmem_max`); a coarser one passes more, never less.
    fn set_filter(&self, interface: &Interface) {
        let plan = &self.core.plan;
        let fine = filter::build(plan, interface.index, filter::Detail::Buckets);
        let coarse = || filter::build(plan, interface.index, filter::Detail::Vips);
        let Err(error) = set_program(interface, &fine).or_else(|_| {
            self.core.counters.add(Count::FilterCoarse, 1);
            set_program(interface, &coarse())
        }) else {
            return;
        };
        self.core.counters.add(Count::FilterFailed, 1);
        warn!(%error, interface = interface.name, "the socket filter could not be set; passing everything to the daemon instead");
        if let Err(error) = set_program(interface, &filter::open()) {
            warn!(%error, interface = interface.name, "not even that: new clients of this node may not be answered; raise net.core.optmem_max");
        }
    }

    /// Looks up this host's connections and tells the owner loop what it holds.
    fn count_connections(&mut self) {
        let plan = &self.core.plan;
        let vips: Vec<IpAddr> = plan.vips.iter().map(|v| v.addr).collect();
        let start = Instant::now();
        match self.connections.list(&vips) {
            Ok(connections) => {
                self.core.flows.clear();
                self.found = sort_out(plan, connections, &mut self.core.flows);
                let pause = RECOUNT.max(start.elapsed() * RECOUNT_REST);
                self.recount_at = plan
                    .groups
                    .iter()
                    .any(GroupPlan::needs_sockets)
                    .then(|| Instant::now() + pause);
            }
            Err(error) => {
                // What may be held is held, or peers would reset it.
                self.found.resize(plan.groups.len(), HeldGroup::default());
                for (found, group) in self.found.iter_mut().zip(&plan.groups) {
                    let states = (0u16..).zip(group.states.iter());
                    let draining = states.filter(|(_, state)| **state == BucketState::Draining);
                    found.buckets = draining.map(|(index, _)| index).collect();
                }
                self.recount_at = Some(Instant::now() + RECOUNT / 10);
                self.core.counters.add(Count::ListFailed, 1);
                if self.failure_told.is_none_or(|at| at.elapsed() > FAILURE_LOG_INTERVAL) {
                    self.failure_told = Some(Instant::now());
                    warn!(%error, "this host's connections cannot be listed; buckets that change hands wait for it");
                }
            }
        }
        self.report();
    }

    fn report(&self) {
        self.events.send(Event::PlanApplied {
            version: self.core.plan.version,
            held: self.found.clone(),
        });
    }

    fn handle_timers(&mut self) {
        let now = Instant::now();
        if self.recount_at.is_some_and(|at| at <= now) || self.core.flows.len() > MAX_FLOWS {
            self.count_connections();
        }
        if self.statistics_at <= now {
            self.statistics_at = now + RECOUNT;
            for interface in &self.interfaces {
                self.core.read_statistics(interface);
            }
        }
        self.responder
            .handle_timeout(now, &self.core.plan, &mut self.interfaces);
    }
}

fn set_program(interface: &Interface, program: &[filter::Insn]) -> io::Result<()> {
    interface.ring.set_filter(&super::kernel_program(program))
}

/// True if every bucket is to this host what it was, of the same VIPs and rules.
fn same_states(old: &Plan, new: &Plan) -> bool {
    let services = |plan: &Plan| plan.vips.iter().map(|v| (v.addr, v.rules.clone())).collect::<Vec<_>>();
    old.groups.len() == new.groups.len()
        && old
            .groups
            .iter()
            .zip(&new.groups)
            .all(|(a, b)| a.name == b.name && a.states == b.states)
        && services(old) == services(new)
}

/// Lets the interface receive the virtual MACs of its VIPs.
fn join_virtual_macs(plan: &Plan, interface: &mut Interface) {
    for vip in plan.vips.iter().filter(|v| v.interface == interface.index) {
        let L2Mode::Invisible(mac) = vip.mode else { continue };
        if interface.joined.insert(mac.0)
            && let Err(error) = interface.ring.add_unicast_mac(mac.0)
        {
            warn!(%error, interface = interface.name, %mac, "the interface does not take the virtual MAC; trying promiscuous mode");
            if let Err(error) = interface.ring.set_promiscuous(true) {
                warn!(%error, interface = interface.name, "promiscuous mode was refused too: frames for the virtual address will not come in");
            }
        }
    }
}

impl Core {
    fn read_statistics(&self, interface: &Interface) {
        match interface.ring.stats() {
            Ok((_, drops)) => self.counters.add(Count::RingFull, drops.into()),
            Err(error) => debug!(%error, interface = interface.name, "ring statistics"),
        }
    }

    /// Judges what is in one ring.
    fn work(&mut self, interface: &mut Interface) {
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
    /// which they are then sent on.
    fn judge_held(&mut self, interfaces: &[Interface]) {
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
            match (
                decision.verdict,
                decision.owner.filter(|owner| *owner != self.plan.this),
            ) {
                (Verdict::Hold, _) => self.hold(since, &bytes),
                (Verdict::Accept, _) if leased => {
                    self.flows.extend(decision.opens);
                    self.accept(&mut bytes);
                }
                (Verdict::Drop, Some(owner)) if leased => {
                    let Some(vip) = self.plan.vip(packet.destination) else {
                        continue;
                    };
                    if let Some(interface) = interfaces.iter().find(|i| i.index == vip.interface) {
                        self.forward(&interface.ring, &mut bytes, [owner].into_iter().collect());
                    }
                }
                (Verdict::Accept | Verdict::Drop | Verdict::Pass, _) => {}
            }
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
