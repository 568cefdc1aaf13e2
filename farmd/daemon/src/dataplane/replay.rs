//! SYN replay: connection requests that a crashed node was to answer are answered by who takes its buckets over, without waiting
//! for the client to ask again.
//!
//! Nobody knows of a crash when it happens, so every node records at all times. The kernel writes the requests for its VIPs into a
//! [`SynRing`] that nobody waits for: a request costs no wake-up. The data plane empties it ten times a second into the
//! [`Recorder`], which keeps those that another node is to answer for a little longer than a crash takes to be seen. With a
//! plan in which that node is gone, [`Recorder::take_due`] says what becomes of each. Neither touches the stack or the wire, and
//! of a data plane they know the plan and the decision only.
//!
//! Who answers a recorded request, so that no two do: a request sent to every node (`vmac_invisible`, or flooded by the switch because the
//! dead host's port is down) is recorded by all and taken by the one whose plan accepts it; the others forget it. A request
//! sent to this node as entry node is here only, and goes on to the new owner. What members send on is not recorded: who sent it on has it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use farm_core::balance::decide::{Decision, Verdict, decide};
use farm_core::balance::filter::{self, Insn};
use farm_core::balance::flow::{FlowKey, TCP};
use farm_core::balance::fragment::FragmentTable;
use farm_core::balance::plan::{Plan, VipPlan};
use farm_core::config::L2Mode;
use farm_core::id::{MacAddr, NodeId, NodeSet};
use farm_core::wire::packet::{L4, Packet};
use farm_sys::clock::BootInstant;
use farm_sys::packet_socket::{PacketRing, VNET_HEADER as VNET};
use tracing::debug;

use super::{Count, Counters};

/// How often the rings are read.
const READ_INTERVAL: Duration = Duration::from_millis(100);
/// And while a node is newly gone.
const READ_INTERVAL_GONE: Duration = Duration::from_millis(20);
/// Slots of 256 bytes in a ring, 1 MB: 40 000 requests a second between two readings.
const SLOTS: u32 = 4096;
/// Most requests kept, the oldest goes first: 20 000 a second for 0.8 s.
const CAPACITY: usize = 16_384;
/// How long a take-over may last after the crash was seen: agreement, and a busy machine.
const TAKE_OVER: Duration = Duration::from_millis(500);

/// The clock of plans, and how long a crash takes to be seen.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// When the owner loop's time began; [`Plan::gone`] counts from here.
    pub start: BootInstant,
    /// Time between two heartbeats.
    pub pulse: Duration,
    /// Silence after which a peer is down.
    pub detection: Duration,
}

/// The kernel's record of connection requests on one interface.
#[derive(Debug)]
pub struct SynRing {
    interface: u32,
    ring: PacketRing,
    program: Vec<Insn>,
    read_at: BootInstant,
    truncated: u64,
}

impl SynRing {
    /// Opens the ring on interface number `interface`; it records nothing before [`Self::set_plan`].
    ///
    /// # Errors
    /// What the kernel says, by step.
    pub fn open(interface: u32) -> io::Result<Self> {
        let program = filter::closed();
        Ok(Self {
            interface,
            ring: PacketRing::open_small(interface, SLOTS, &super::kernel_program(&program))?,
            program,
            read_at: BootInstant::now(),
            truncated: 0,
        })
    }

    /// Records requests for the VIPs of `plan` from now on.
    ///
    /// # Errors
    /// If the kernel refuses the filter; the one before stays.
    pub fn set_plan(&mut self, plan: &Plan) -> io::Result<()> {
        let program = filter::requests(plan, self.interface);
        if program != self.program {
            self.ring.set_filter(&super::kernel_program(&program))?;
            self.program = program;
        }
        Ok(())
    }

    /// Hands each request to `f`, oldest first, with the moment it came in; returns how many were lost.
    fn read(&mut self, mut f: impl FnMut(BootInstant, &mut [u8])) -> u64 {
        let (now, clock) = (BootInstant::now(), SystemTime::now());
        let since = now.saturating_duration_since(self.read_at);
        self.read_at = now;
        let read = self.ring.recv_timed(SLOTS as usize, |arrived, bytes| {
            // The system's clock may be set between the two; a request is never older than the reading before.
            let age = clock.duration_since(arrived).unwrap_or_default().min(since);
            f(now.saturating_sub(age), bytes);
        });
        if let Err(error) = read {
            // The ring of frames tells of an interface that goes down.
            debug!(%error, interface = self.interface, "reading the recorded requests failed");
        }
        let full = self.ring.stats().map_or(0, |(_, drops)| drops.into());
        let truncated = self.ring.truncated();
        full + truncated - std::mem::replace(&mut self.truncated, truncated)
    }
}

/// Where a recorded request goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum To {
    /// To this host's stack.
    Stack {
        /// The flow is known from here on, as [`Decision::opens`] says.
        opens: Option<FlowKey>,
    },
    /// To the member that has taken over.
    Member(NodeId),
}

/// A recorded request whose turn has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Due {
    /// Where to.
    pub to: To,
    /// `virtio_net_hdr` and frame.
    pub frame: Vec<u8>,
}

#[derive(Debug)]
struct Record {
    /// When it came in, in the owner loop's time.
    at: Duration,
    /// Who is to answer it, or to send it on.
    awaits: NodeId,
    to: Addressee,
    frame: Vec<u8>,
}

/// See the module doc.
#[derive(Debug)]
pub struct Recorder {
    timing: Timing,
    /// Oldest first, as far as they come from one ring.
    records: VecDeque<Record>,
    /// Whose Ethernet address is which, for each VIP; of nodes that are gone too.
    peers: BTreeMap<(IpAddr, MacAddr), NodeId>,
    /// Requests are never fragments; the decision asks for one.
    fragments: FragmentTable,
    counters: Arc<Counters>,
}

impl Recorder {
    /// A recorder without records.
    pub fn new(timing: Timing, counters: Arc<Counters>) -> Self {
        Self {
            timing,
            records: VecDeque::new(),
            peers: BTreeMap::new(),
            fragments: FragmentTable::default(),
            counters,
        }
    }

    /// Takes what a ring has recorded; `plan` was in force meanwhile and says who was to answer.
    pub fn read(&mut self, plan: &Plan, ring: &mut SynRing) {
        self.learn_peers(plan);
        let lost = ring.read(|at, frame| self.record(plan, at, frame));
        self.counters.add(Count::ReplayOverflow, lost);
        self.expire(BootInstant::now());
    }

    /// True if a node fell silent so lately that a recorded request may await it.
    pub fn concerns(&self, plan: &Plan) -> bool {
        let now = self.timing.start.elapsed();
        plan.gone.values().any(|heard| now < *heard + self.keep())
    }

    /// How long until the rings are to be read again.
    pub fn pause(&self, plan: &Plan) -> Duration {
        if self.concerns(plan) {
            READ_INTERVAL_GONE
        } else {
            READ_INTERVAL
        }
    }

    /// Forgets everything.
    pub fn forget(&mut self) {
        self.counters.add(Count::ReplayExpired, self.records.len() as u64);
        self.records.clear();
    }

    /// What becomes of the requests whose node is gone, oldest first; each is returned at most once. Those it has answered while it
    /// lived are forgotten, and so are those that another member answers and those of `known` flows.
    pub fn take_due(&mut self, plan: &Plan, known: &mut dyn FnMut(&FlowKey) -> bool) -> Vec<Due> {
        if !self.concerns(plan) {
            return Vec::new();
        }
        let mapped: Vec<NodeSet> = plan.groups.iter().map(|group| group.owners.owners()).collect();
        let mut due = Vec::new();
        for record in std::mem::take(&mut self.records) {
            match self.fate(plan, &mapped, &record) {
                Fate::Wait => self.records.push_back(record),
                Fate::Forget => self.counters.add(Count::ReplayExpired, 1),
                Fate::Go(flow, to) => due.push((record.at, flow, to, record.frame)),
            }
        }
        due.sort_by_key(|(at, ..)| *at);
        // Of several requests of one flow the newest is the one that the client waits for.
        let mut seen = BTreeSet::new();
        let mut newest: Vec<Due> = Vec::new();
        for (_, flow, to, frame) in due.into_iter().rev() {
            let count = match to {
                _ if known(&flow) || !seen.insert(flow) => Count::ReplayExpired,
                To::Stack { .. } => Count::ReplayAccepted,
                To::Member(_) => Count::ReplaySentOn,
            };
            self.counters.add(count, 1);
            if count != Count::ReplayExpired {
                newest.push(Due { to, frame });
            }
        }
        newest.reverse();
        newest
    }

    fn keep(&self) -> Duration {
        self.timing.detection + self.timing.pulse + TAKE_OVER
    }

    fn expire(&mut self, now: BootInstant) {
        let now = now.saturating_duration_since(self.timing.start);
        let keep = self.keep();
        while self.records.front().is_some_and(|r| r.at + keep < now) {
            self.records.pop_front();
            self.counters.add(Count::ReplayExpired, 1);
        }
    }

    fn learn_peers(&mut self, plan: &Plan) {
        let here = |vip: IpAddr, node: NodeId, mac: MacAddr| plan.vip(vip)?.peers.get(&node).map(|m| *m == mac);
        self.peers
            .retain(|(vip, mac), node| here(*vip, *node, *mac).unwrap_or_else(|| plan.gone.contains_key(node)));
        for vip in &plan.vips {
            self.peers
                .extend(vip.peers.iter().map(|(node, mac)| ((vip.addr, *mac), *node)));
        }
    }

    /// Keeps a request that another node is to answer.
    fn record(&mut self, plan: &Plan, at: BootInstant, bytes: &mut [u8]) {
        let Some(packet) = bytes.get(VNET..).and_then(Packet::parse) else {
            return;
        };
        let Some(vip) = plan.vip(packet.destination) else {
            return;
        };
        if flow_of(&packet).is_none() || vip.peers.values().any(|mac| *mac == packet.source_mac) {
            return;
        }
        let Some(addressee) = self.addressee(vip, packet.destination_mac) else {
            return;
        };
        // As if it had been sent to this node: that is how it is judged when its turn comes.
        bytes[VNET..VNET + 6].copy_from_slice(&vip.service_mac().0);
        let awaits = match addressee {
            Addressee::Peer(peer) => Some(peer),
            Addressee::All | Addressee::This => self.judge(plan, bytes).and_then(|(_, decision)| decision.owner),
        };
        let Some(awaits) = awaits.filter(|node| *node != plan.this) else {
            return;
        };
        if self.records.len() >= CAPACITY {
            self.records.pop_front();
            self.counters.add(Count::ReplayOverflow, 1);
        }
        self.records.push_back(Record {
            at: at.saturating_duration_since(self.timing.start),
            awaits,
            to: addressee,
            frame: bytes.to_vec(),
        });
        self.counters.add(Count::ReplayRecorded, 1);
    }

    fn addressee(&self, vip: &VipPlan, mac: MacAddr) -> Option<Addressee> {
        if vip.mode != L2Mode::Directed {
            return (mac == vip.service_mac()).then_some(Addressee::All);
        }
        if mac == vip.own_mac {
            return Some(Addressee::This);
        }
        self.peers.get(&(vip.addr, mac)).copied().map(Addressee::Peer)
    }

    /// `mapped` are the owners in each group of `plan`.
    fn fate(&mut self, plan: &Plan, mapped: &[NodeSet], record: &Record) -> Fate {
        let Some(heard) = plan.gone.get(&record.awaits) else {
            return Fate::Wait;
        };
        // A node that was heard after the request came in has had it. To answer it a second time would, should that node only be cut off,
        // end the connection when both are together again.
        if record.at < *heard {
            return Fate::Forget;
        }
        let Some((flow, decision)) = self.judge(plan, &record.frame) else {
            return Fate::Forget;
        };
        let entries = plan.vip(flow.vip).and_then(|vip| mapped.get(vip.entry_group));
        if matches!(record.to, Addressee::Peer(_)) && entries.is_some_and(|nodes| nodes.contains(record.awaits)) {
            // Its clients have not heard of another entry node: what they sent next would be lost.
            return Fate::Wait;
        }
        match (decision.verdict, decision.owner) {
            (Verdict::Accept, _) => Fate::Go(flow, To::Stack { opens: decision.opens }),
            (Verdict::Hold, _) => Fate::Wait,
            (Verdict::Drop | Verdict::Pass, None) => Fate::Wait,
            (Verdict::Drop | Verdict::Pass, Some(owner)) if owner == plan.this || plan.gone.contains_key(&owner) => {
                Fate::Wait
            }
            (Verdict::Drop | Verdict::Pass, Some(owner)) if record.to == Addressee::This => {
                Fate::Go(flow, To::Member(owner))
            }
            (Verdict::Drop | Verdict::Pass, Some(_)) => Fate::Forget,
        }
    }

    fn judge(&mut self, plan: &Plan, bytes: &[u8]) -> Option<(FlowKey, Decision)> {
        let packet = Packet::parse(bytes.get(VNET..)?)?;
        let flow = flow_of(&packet)?;
        let decision = decide(plan, &packet, &mut self.fragments, Duration::ZERO, &mut |_| false);
        Some((flow, decision))
    }
}

/// Whom a request was sent to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Addressee {
    /// Every node has it.
    All,
    /// This node alone, as entry node.
    This,
    /// Another entry node; here it is because the switch flooded it.
    Peer(NodeId),
}

enum Fate {
    Wait,
    Forget,
    Go(FlowKey, To),
}

/// The flow that a whole connection request opens; `None` for any other packet.
pub fn flow_of(packet: &Packet) -> Option<FlowKey> {
    let L4::Tcp {
        source,
        destination,
        syn: true,
        ..
    } = packet.l4
    else {
        return None;
    };
    (!packet.more_fragments).then_some(FlowKey {
        protocol: TCP,
        vip: packet.destination,
        vip_port: destination,
        client: packet.source,
        client_port: source,
    })
}

#[cfg(test)]
#[path = "replay_tests.rs"]
mod tests;
