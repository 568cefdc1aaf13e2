//! A seeded local network around real [`Farm`] objects, with a fake clock.
//!
//! Each node does what the daemon's owner loop does: it takes one input at a time, publishes the plan when its number has changed, renews the lease of
//! its data plane at the end of each turn, and notices by the gap between two turns that it was not run. After every event the promises are
//! checked; the first breach ends the run with its trace.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use super::plane::Plane;
use super::promises::Breach;
use crate::api::{ModuleState, Quality};
use crate::balance::plan::GroupPlan;
use crate::config::{ClusterConfig, PartitionPolicy, cluster};
use crate::farm::{Event, Farm, LocalModule};
use crate::id::{Incarnation, MacAddr, ModuleName, NodeId};
use crate::wire::auth::ClusterKey;
use crate::wire::heartbeat::BucketSet;

pub const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub const fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

pub fn id(i: usize) -> NodeId {
    NodeId::new(i).unwrap()
}

/// xorshift64*: enough for faults, and the same on every machine.
#[derive(Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    /// A number in `range`.
    pub fn range(&mut self, range: std::ops::RangeInclusive<u64>) -> u64 {
        range.start() + self.next() % (range.end() - range.start() + 1)
    }

    /// True in `permille` of a thousand cases.
    pub fn chance(&mut self, permille: u64) -> bool {
        self.next() % 1000 < permille
    }
}

/// How often a data plane counts connections that are left.
const RECOUNT: Duration = ms(50);

/// Something done to the farm from outside.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Action {
    Crash(usize),
    Restart(usize),
    /// The node is not run; with `true` its data plane works on.
    Pause(usize, Duration, bool),
    /// Nothing gets from the first to the second.
    Cut(usize, usize),
    Mend(usize, usize),
    MendAll,
    LanDown(usize),
    LanUp(usize),
    /// Per mille of datagrams.
    Loss(u64),
    /// `start` and, some time later, ready.
    Start(usize),
    Ready(usize, bool),
    /// Graceful: hands over, then STOP.
    Stop(usize),
    /// STOP at once.
    ForceStop(usize),
    Weight(usize, u16),
    Digest(usize, u64),
    Leave(usize),
}

/// What a node has to take.
#[derive(Clone)]
enum Input {
    Datagram(usize, Rc<Vec<u8>>),
    Applied(u64, BucketSet),
    Module,
    Timeout,
}

enum Ev {
    Deliver {
        to: usize,
        lan: usize,
        payload: Rc<Vec<u8>>,
    },
    Wake {
        node: usize,
    },
    Apply {
        node: usize,
        incarnation: u64,
        version: u64,
        plan: Option<Rc<GroupPlan>>,
    },
    Recount {
        node: usize,
        incarnation: u64,
    },
    Action(Action),
}

pub struct Node {
    pub farm: Option<Farm>,
    pub incarnation: u64,
    pub local: LocalModule,
    pub plane: Plane,
    paused_until: Duration,
    frozen_plane: bool,
    inbox: VecDeque<Input>,
    last_turn: Duration,
    fenced_until: Option<u64>,
    published: u64,
    wake_at: Option<Duration>,
    stopping: bool,
}

pub struct Sim {
    pub now: Duration,
    pub rng: Rng,
    pub cluster: ClusterConfig,
    pub module: ModuleName,
    pub nodes: Vec<Node>,
    /// Per mille of datagrams lost, and doubled.
    pub loss: u64,
    pub duplication: u64,
    pub cut: BTreeSet<(usize, usize)>,
    pub lans_down: BTreeSet<usize>,
    /// Per mille of lost buckets in which connections go on, and how long at most.
    pub flows: u64,
    pub flow_time: Duration,
    /// Longest time the data plane takes for a plan.
    pub apply_time: Duration,
    /// Per pair of running nodes that reach each other, since when some bucket is open at both; a breach if it lasts longer than this.
    pub longest_overlap: Option<Duration>,
    pub(super) overlaps: BTreeMap<(usize, usize), Duration>,
    pub(super) heard_since: BTreeMap<(usize, usize), Duration>,
    queue: BTreeMap<(Duration, u64), Ev>,
    count: u64,
    pub(super) trace: Option<Vec<String>>,
    /// Heartbeats sent by each node.
    pub sent: Vec<u64>,
    /// Handover events, for scenarios.
    pub log: Vec<(Duration, usize, Event)>,
}

impl Sim {
    pub fn new(nodes: usize, lans: usize, seed: u64) -> Self {
        let lan = |l: usize| {
            let nodes: String = (0..nodes)
                .map(|n| format!("<node name=\"s{n}\" addr=\"198.18.{l}.{}\"/>", n + 1))
                .collect();
            format!("<lan name=\"lan{l}\">{nodes}</lan>")
        };
        let text = format!(
            "<cluster><lans>{}</lans></cluster>",
            (0..lans).map(lan).collect::<String>()
        );
        let (cluster, _) = cluster::parse("cluster.xml", &text).unwrap();
        let local = LocalModule {
            digest: 7,
            state: ModuleState::Stop,
            quality: Quality::NotReady,
            why: String::new(),
            ready: false,
            shut: false,
            macs: vec![MacAddr([2, 0, 0, 0, 0, 1])],
            weights: vec![1],
            partition: PartitionPolicy::Serve,
            witness_answers: false,
        };
        let node = |_| Node {
            farm: None,
            incarnation: 0,
            local: local.clone(),
            plane: Plane::new(),
            paused_until: Duration::ZERO,
            frozen_plane: false,
            inbox: VecDeque::new(),
            last_turn: Duration::ZERO,
            fenced_until: None,
            published: 0,
            wake_at: None,
            stopping: false,
        };
        Self {
            now: ms(1000),
            rng: Rng::new(seed),
            cluster,
            module: "web".parse().unwrap(),
            nodes: (0..nodes).map(node).collect(),
            loss: 0,
            duplication: 0,
            cut: BTreeSet::new(),
            lans_down: BTreeSet::new(),
            flows: 0,
            flow_time: ms(300),
            apply_time: ms(5),
            longest_overlap: None,
            overlaps: BTreeMap::new(),
            heard_since: BTreeMap::new(),
            queue: BTreeMap::new(),
            count: 0,
            trace: std::env::var_os("FARM_TRACE").map(|_| Vec::new()),
            sent: vec![0; nodes],
            log: Vec::new(),
        }
    }

    /// All nodes run, their module is up and ready.
    pub fn started(nodes: usize, seed: u64) -> Self {
        let mut sim = Self::new(nodes, 1, seed);
        for node in 0..nodes {
            sim.act(Action::Restart(node));
            sim.act(Action::Start(node));
        }
        sim.run(ms(1000)).unwrap();
        sim.check_covered().unwrap();
        sim
    }

    pub fn detection(&self) -> Duration {
        self.cluster.detection_time()
    }

    pub fn at(&mut self, when: Duration, action: Action) {
        self.push(when, Ev::Action(action));
    }

    /// Does it now.
    pub fn act(&mut self, action: Action) {
        self.handle_action(action);
    }

    /// Lets `time` pass.
    pub fn run(&mut self, time: Duration) -> Result<(), Breach> {
        let end = self.now + time;
        while let Some(entry) = self.queue.first_entry().filter(|e| e.key().0 <= end) {
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            self.handle(event);
            self.check_exclusion()?;
        }
        self.now = end;
        Ok(())
    }

    pub fn farm(&self, node: usize) -> &Farm {
        self.nodes[node].farm.as_ref().unwrap()
    }

    /// Buckets open at each node, with its lease.
    pub fn counts(&self) -> Vec<usize> {
        let count = |n: &Node| {
            if n.farm.is_some() && self.now < n.plane.lease_until {
                n.plane.open_count()
            } else {
                0
            }
        };
        self.nodes.iter().map(count).collect()
    }

    /// How long it takes until no node is paused any more.
    pub fn longest_pause(&self) -> Duration {
        let ends = self
            .nodes
            .iter()
            .filter(|n| n.farm.is_some())
            .map(|n| n.paused_until.saturating_sub(self.now));
        ends.max().unwrap_or_default()
    }

    fn push(&mut self, at: Duration, event: Ev) {
        self.count += 1;
        self.queue.insert((at, self.count), event);
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:10.3} {}", now.as_secs_f64() * 1000.0, text()));
        }
    }

    fn handle(&mut self, event: Ev) {
        match event {
            Ev::Deliver { to, lan, payload } => self.input(to, Input::Datagram(lan, payload)),
            Ev::Wake { node } => {
                if self.nodes[node].wake_at == Some(self.now) {
                    self.nodes[node].wake_at = None;
                    self.input(node, Input::Timeout);
                }
            }
            Ev::Apply {
                node,
                incarnation,
                version,
                plan,
            } => self.apply(node, incarnation, version, plan),
            Ev::Recount { node, incarnation } => {
                let n = &mut self.nodes[node];
                if n.farm.is_none() || n.incarnation != incarnation || n.plane.flows.is_empty() {
                    return;
                }
                let held = n.plane.held(self.now);
                n.plane.flows.retain(|_, end| *end > self.now);
                let version = n.plane.version;
                self.push(self.now + RECOUNT, Ev::Recount { node, incarnation });
                if held != self.nodes[node].plane.told {
                    self.nodes[node].plane.told = held.clone();
                    self.input(node, Input::Applied(version, held));
                }
            }
            Ev::Action(action) => self.handle_action(action),
        }
    }

    fn apply(&mut self, node: usize, incarnation: u64, version: u64, plan: Option<Rc<GroupPlan>>) {
        let n = &mut self.nodes[node];
        if n.farm.is_none() || n.incarnation != incarnation {
            return;
        }
        if self.now < n.paused_until && n.frozen_plane {
            let until = n.paused_until;
            return self.push(
                until,
                Ev::Apply {
                    node,
                    incarnation,
                    version,
                    plan,
                },
            );
        }
        let lost = n.plane.apply(version, plan.as_deref());
        for bucket in lost {
            if self.rng.chance(self.flows) {
                let end = self.now + us(self.rng.range(0..=self.flow_time.as_micros() as u64));
                self.nodes[node].plane.flows.insert(bucket, end);
            }
        }
        let n = &mut self.nodes[node];
        let held = n.plane.held(self.now);
        n.plane.told = held.clone();
        if !n.plane.flows.is_empty() {
            self.push(self.now + RECOUNT, Ev::Recount { node, incarnation });
        }
        let open = self.nodes[node].plane.open_count();
        self.note(|| format!("s{node} applied {version}: {open} open"));
        self.input(node, Input::Applied(version, held));
    }

    fn handle_action(&mut self, action: Action) {
        self.note(|| format!("{action:?}"));
        let of_running = match action {
            Action::Start(i) | Action::Ready(i, _) | Action::Stop(i) | Action::ForceStop(i) => Some(i),
            _ => None,
        };
        if of_running.is_some_and(|i| self.nodes[i].farm.is_none()) {
            return;
        }
        match action {
            Action::Crash(i) => {
                let n = &mut self.nodes[i];
                n.farm = None;
                n.plane = Plane::new();
                n.inbox.clear();
                n.paused_until = Duration::ZERO;
                n.wake_at = None;
                n.stopping = false;
                n.local.ready = false;
                n.local.state = ModuleState::Stop;
                n.local.quality = Quality::NotReady;
                self.heard_since.retain(|(a, _), _| *a != i);
            }
            Action::Restart(i) => {
                if self.nodes[i].farm.is_some() {
                    return;
                }
                let key = ClusterKey::from_bytes([9; 32]);
                let n = &mut self.nodes[i];
                n.incarnation = self.now.as_micros() as u64;
                let mut farm = Farm::new(&self.cluster, key, id(i), Incarnation(n.incarnation), self.now);
                farm.set_module(self.now, self.module.clone(), n.local.clone());
                n.farm = Some(farm);
                n.published = 0;
                n.fenced_until = None;
                n.last_turn = self.now;
                self.input(i, Input::Timeout);
            }
            Action::Pause(i, time, plane_works_on) => {
                let n = &mut self.nodes[i];
                n.paused_until = n.paused_until.max(self.now + time);
                n.frozen_plane = !plane_works_on;
                n.wake_at = Some(n.paused_until);
                let until = n.paused_until;
                self.push(until, Ev::Wake { node: i });
            }
            Action::Cut(a, b) => drop(self.cut.insert((a, b))),
            Action::Mend(a, b) => drop(self.cut.remove(&(a, b))),
            Action::MendAll => self.cut.clear(),
            Action::LanDown(lan) => drop(self.lans_down.insert(lan)),
            Action::LanUp(lan) => drop(self.lans_down.remove(&lan)),
            Action::Loss(permille) => self.loss = permille,
            Action::Start(i) => {
                let delay = ms(self.rng.range(0..=30));
                let local = &mut self.nodes[i].local;
                if local.state == ModuleState::Stop {
                    local.state = ModuleState::Wait;
                    local.quality = Quality::Transient;
                }
                self.nodes[i].stopping = false;
                self.at(self.now + delay, Action::Ready(i, true));
                self.input(i, Input::Module);
            }
            Action::Ready(i, ready) => {
                let n = &mut self.nodes[i];
                if n.local.state == ModuleState::Stop || n.stopping {
                    return;
                }
                n.local.state = ModuleState::Up;
                n.local.quality = if ready { Quality::Ready } else { Quality::NotReady };
                n.local.ready = ready;
                self.input(i, Input::Module);
            }
            Action::Stop(i) => {
                self.nodes[i].stopping = self.nodes[i].local.state != ModuleState::Stop;
                self.nodes[i].local.ready = false;
                self.input(i, Input::Module);
            }
            Action::ForceStop(i) => self.stop_now(i),
            Action::Weight(i, weight) => {
                self.nodes[i].local.weights = vec![weight];
                self.input(i, Input::Module);
            }
            Action::Digest(i, digest) => {
                self.nodes[i].local.digest = digest;
                self.input(i, Input::Module);
            }
            Action::Leave(i) => {
                let now = self.now;
                if let Some(farm) = &mut self.nodes[i].farm {
                    farm.leave(now);
                    self.finish_turn(i);
                }
                self.handle_action(Action::Crash(i));
            }
        }
    }

    /// STOP takes the VIP off the host first.
    fn stop_now(&mut self, i: usize) {
        let n = &mut self.nodes[i];
        n.stopping = false;
        n.local.state = ModuleState::Stop;
        n.local.quality = Quality::NotReady;
        n.local.ready = false;
        n.plane.clear();
        n.plane.flows.clear();
        n.plane.not_before = n.farm.as_ref().map_or(0, Farm::plan_version) + 1;
        self.input(i, Input::Module);
    }

    /// Gives a node something to take, at once or after its pause.
    fn input(&mut self, i: usize, input: Input) {
        let now = self.now;
        let n = &mut self.nodes[i];
        let Some(farm) = &mut n.farm else { return };
        n.inbox.push_back(input);
        if now < n.paused_until {
            if n.wake_at.is_none_or(|at| at < n.paused_until) {
                n.wake_at = Some(n.paused_until);
                let until = n.paused_until;
                self.push(until, Ev::Wake { node: i });
            }
            return;
        }
        let lease = self.cluster.detection_time() - self.cluster.heartbeat_interval;
        let gap = now - n.last_turn;
        n.last_turn = now;
        if gap >= lease {
            farm.handle_pause(now);
            n.fenced_until = Some(farm.plan_version());
            self.note(|| format!("s{i} was paused for {gap:?}"));
            self.publish(i);
        }
        let n = &mut self.nodes[i];
        let Some(farm) = &mut n.farm else { return };
        for input in n.inbox.drain(..) {
            match input {
                // What cannot be used is refused; that is counted, not an error of the run.
                Input::Datagram(lan, payload) => drop(farm.handle_datagram(now, lan, &payload)),
                Input::Applied(version, held) => {
                    if n.fenced_until.is_some_and(|fenced| fenced <= version) {
                        n.fenced_until = None;
                    }
                    let connections = held.len() as u32;
                    farm.handle_applied(now, version, [((self.module.clone(), 0), (held, connections))].into());
                }
                Input::Module => farm.set_module(now, self.module.clone(), n.local.clone()),
                Input::Timeout => {}
            }
        }
        farm.handle_timeout(now);
        self.finish_turn(i);
    }

    fn publish(&mut self, i: usize) {
        let n = &mut self.nodes[i];
        let Some(farm) = &n.farm else { return };
        let version = farm.plan_version();
        if version == n.published {
            return;
        }
        n.published = version;
        let plan = farm.group_plan(&self.module, 0).map(Rc::new);
        let at = self.now + us(self.rng.range(0..=self.apply_time.as_micros() as u64));
        n.plane.busy_until = n.plane.busy_until.max(at);
        let (at, incarnation) = (n.plane.busy_until, n.incarnation);
        self.push(
            at,
            Ev::Apply {
                node: i,
                incarnation,
                version,
                plan,
            },
        );
    }

    fn finish_turn(&mut self, i: usize) {
        self.publish(i);
        let now = self.now;
        let n = &mut self.nodes[i];
        let Some(farm) = &mut n.farm else { return };
        if n.fenced_until.is_none() {
            n.plane.lease_until = now + self.cluster.detection_time() - self.cluster.heartbeat_interval;
        }
        let handed_over = n.stopping && farm.is_handed_over(&self.module);
        let transmits: Vec<_> = std::iter::from_fn(|| farm.poll_transmit()).collect();
        let events: Vec<Event> = std::iter::from_fn(|| farm.poll_event()).collect();
        let heard = farm.membership().heard(now);
        let wake = farm.poll_timeout().max(now);
        let new_wake = n.wake_at.is_none_or(|at| at < now || at > wake);
        if new_wake {
            n.wake_at = Some(wake);
            self.push(wake, Ev::Wake { node: i });
        }
        for event in events {
            self.note(|| format!("s{i} {event:?}"));
            if !matches!(event, Event::Membership(_)) || self.trace.is_some() {
                self.log.push((now, i, event));
            }
        }
        for peer in 0..self.nodes.len() {
            if heard.contains(id(peer)) {
                self.heard_since.entry((i, peer)).or_insert(now);
            } else {
                self.heard_since.remove(&(i, peer));
            }
        }
        for transmit in transmits {
            self.sent[i] += 1;
            let payload = Rc::new(transmit.payload);
            for to in transmit.to.iter() {
                self.send(i, to.index(), transmit.lan, &payload);
            }
        }
        if handed_over {
            self.note(|| format!("s{i} has handed over and stops"));
            self.stop_now(i);
        }
    }

    fn send(&mut self, from: usize, to: usize, lan: usize, payload: &Rc<Vec<u8>>) {
        if self.cut.contains(&(from, to)) || self.lans_down.contains(&lan) || self.rng.chance(self.loss) {
            return;
        }
        let copies = if self.rng.chance(self.duplication) { 2 } else { 1 };
        for _ in 0..copies {
            let at = self.now + us(self.rng.range(100..=2000));
            self.push(
                at,
                Ev::Deliver {
                    to,
                    lan,
                    payload: Rc::clone(payload),
                },
            );
        }
    }
}
