//! A seeded local network around real [`Farm`] objects, with a fake clock.
//!
//! Owns the time, the queue of what is to happen, the nodes, and what is left of connections. All of a run follows from its seed and the
//! [`Action`]s it is given. After every event the promises are checked ([`super::promises`], [`super::continuity`]); the first breach ends the run with its trace.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use super::action::Action;
use super::continuity::Connection;
use super::ears::Ears;
use super::network::Network;
use super::node::{Input, Node};
use super::promises::Breach;
use super::rng::Rng;
use crate::balance::plan::GroupPlan;
use crate::config::{ClusterConfig, cluster};
use crate::farm::{Event, Farm};
use crate::id::{ModuleName, NodeId};

pub const fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

pub const fn us(n: u64) -> Duration {
    Duration::from_micros(n)
}

pub fn id(i: usize) -> NodeId {
    NodeId::new(i).unwrap()
}

/// How often clients connect and connections are looked at.
const CLIENTS: Duration = ms(10);

/// What is to happen.
#[derive(Clone, PartialEq, Debug)]
pub enum Ev {
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
    /// A command says to the node that others hear it.
    Told {
        node: usize,
    },
    Clients,
    Action(Action),
}

/// See the module doc.
pub struct Sim {
    pub now: Duration,
    pub rng: Rng,
    pub cluster: ClusterConfig,
    pub module: ModuleName,
    /// Run beside it from the start, ready; nothing is checked of them.
    pub others: Vec<ModuleName>,
    pub nodes: Vec<Node>,
    pub net: Network,
    /// What comes in at nodes to which all ways are cut.
    pub ears: Ears,
    /// Per mille of lost buckets in which connections go on, and how long at most.
    pub flows: u64,
    pub flow_time: Duration,
    pub(super) connections: Vec<Connection>,
    /// Connections that were made, and that a node ended which could not know their server.
    pub connected: u64,
    pub reset_apart: u64,
    /// Longest time the data plane takes for a plan.
    pub apply_time: Duration,
    /// Per pair of running nodes that reach each other, since when some bucket is open at both; a breach if it lasts longer than this.
    pub longest_overlap: Option<Duration>,
    /// Nothing fails: each bucket is always open, or its requests are kept, at some node.
    pub planned: bool,
    /// Bit `b` of `overlap[a]`: the two have a bucket open, whatever their leases say; and since when that lasts with leases.
    pub(super) overlap: Vec<u64>,
    pub(super) overlaps: BTreeMap<(usize, usize), Duration>,
    queue: BTreeMap<(Duration, u64), Ev>,
    count: u64,
    pub(super) trace: Option<Vec<String>>,
    /// All that has happened, if asked.
    pub(super) record: Option<Vec<(Duration, Ev)>>,
    /// Heartbeats sent by each node.
    pub sent: Vec<u64>,
    /// When each node sent its newest heartbeats on the first lan, for a second; the most in any second of the run; and how many are allowed.
    pub(super) lately: Vec<VecDeque<Duration>>,
    pub busiest: usize,
    pub most_in_a_second: Option<usize>,
    /// Maps that were committed, and buckets that moved with them.
    pub maps: u64,
    pub moved: u64,
    /// Faults and commands.
    pub actions: u64,
    /// How long the core took for each datagram, if asked.
    pub spent: Option<Vec<Duration>>,
    /// All events of all nodes.
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
        let traced = ["FARM_TRACE", "FARM_SEED"]
            .iter()
            .any(|name| std::env::var_os(name).is_some());
        Self {
            now: ms(1000),
            rng: Rng::new(seed),
            cluster,
            module: "web".parse().unwrap(),
            others: Vec::new(),
            nodes: (0..nodes).map(|_| Node::new(nodes)).collect(),
            net: Network::new(nodes),
            ears: Ears::Frames,
            flows: 0,
            flow_time: ms(300),
            connections: Vec::new(),
            connected: 0,
            reset_apart: 0,
            apply_time: ms(5),
            longest_overlap: None,
            planned: false,
            overlap: vec![0; nodes],
            overlaps: BTreeMap::new(),
            queue: BTreeMap::new(),
            count: 0,
            trace: traced.then(Vec::new),
            record: None,
            sent: vec![0; nodes],
            lately: vec![VecDeque::new(); nodes],
            busiest: 0,
            most_in_a_second: None,
            maps: 0,
            moved: 0,
            actions: 0,
            spent: None,
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
        self.handle_action(action).unwrap();
    }

    /// From here on a few clients connect every [`CLIENTS`].
    pub fn let_clients_connect(&mut self) {
        self.push(self.now + CLIENTS, Ev::Clients);
    }

    /// Lets `time` pass.
    pub fn run(&mut self, time: Duration) -> Result<(), Breach> {
        let end = self.now + time;
        while let Some(entry) = self.queue.first_entry().filter(|e| e.key().0 <= end) {
            let ((at, _), event) = entry.remove_entry();
            self.now = at;
            if let Some(record) = &mut self.record {
                record.push((at, event.clone()));
            }
            self.handle(event)?;
            self.check_exclusion()?;
        }
        self.now = end;
        Ok(())
    }

    /// Number of things that have happened or are to.
    pub fn events(&self) -> u64 {
        self.count
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

    /// How long it takes until no node is paused and no burst of loss is under way any more.
    pub fn longest_pause(&self) -> Duration {
        let running = self.nodes.iter().filter(|n| n.farm.is_some());
        let ends = running.map(|n| n.paused_until).chain([self.net.bursts_end()]);
        ends.max().unwrap_or_default().saturating_sub(self.now)
    }

    /// The slowest data plane's time for a plan.
    pub fn slowest_plane(&self) -> Duration {
        self.apply_time + self.nodes.iter().map(|n| n.slower).max().unwrap_or_default()
    }

    pub(super) fn push(&mut self, at: Duration, event: Ev) {
        self.count += 1;
        self.queue.insert((at, self.count), event);
    }

    pub(super) fn note(&mut self, text: impl FnOnce() -> String) {
        let now = self.now;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:10.3} {}", now.as_secs_f64() * 1000.0, text()));
        }
    }

    fn handle(&mut self, event: Ev) -> Result<(), Breach> {
        match event {
            Ev::Deliver { to, lan, payload } => self.input(to, Input::Datagram(lan, payload)),
            Ev::Wake { node } => {
                if self.nodes[node].wake_at != Some(self.now) {
                    return Ok(());
                }
                self.nodes[node].wake_at = None;
                self.input(node, Input::Timeout)
            }
            event @ Ev::Apply { .. } => self.apply(event),
            Ev::Recount { node, incarnation } => self.recount(node, incarnation),
            Ev::Told { node } => self.told_deaf(node),
            Ev::Clients => {
                self.clients_connect();
                self.push(self.now + CLIENTS, Ev::Clients);
                self.check_connections()
            }
            Ev::Action(action) => self.handle_action(action),
        }
    }

    pub(super) fn send(&mut self, from: usize, to: usize, lan: usize, payload: &Rc<Vec<u8>>) {
        for at in self
            .net
            .carry(&mut self.rng, self.now, from, to, lan)
            .into_iter()
            .flatten()
        {
            let payload = Rc::clone(payload);
            self.push(at, Ev::Deliver { to, lan, payload });
        }
    }
}
