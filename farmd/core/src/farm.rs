//! One node's whole part in the farm: membership, and for each module and group the hand-over, behind one
//! sans-IO surface.
//!
//! Inputs: [`Farm::handle_datagram`], [`Farm::handle_timeout`], [`Farm::handle_applied`],
//! [`Farm::handle_pause`], [`Farm::set_module`], [`Farm::remove_module`], [`Farm::learn_requester`]. After
//! any of them drain [`Farm::poll_transmit`] and [`Farm::poll_event`], look at [`Farm::plan_version`], and
//! ask [`Farm::poll_timeout`] when to come back. The owner loop of the daemon, the simulator and the model
//! checker all drive this same object.

pub mod away;
mod electorate;
mod query;
mod relay;
mod transmit;
mod turn;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use crate::api::{ModuleState, Quality};
use crate::config::{ClusterConfig, PartitionPolicy};
use crate::handover::{self, Handover};
use crate::id::{Epoch, Incarnation, MacAddr, ModuleName, NodeId, NodeSet};
use crate::membership::{self, Membership, Peer};
use crate::requesters::Requesters;
use crate::wire::auth::ClusterKey;
use crate::wire::heartbeat::{BucketSet, Heartbeat, ModuleReport, ParseError, Requester};
use away::Away;
use relay::Relays;

/// What the daemon says of one of its modules.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LocalModule {
    /// Digest of the configuration all nodes must share.
    pub digest: u64,
    /// State of its machine.
    pub state: ModuleState,
    /// And how far it is.
    pub quality: Quality,
    /// Why it is not UP Ready.
    pub why: String,
    /// It may take buckets.
    pub ready: bool,
    /// Its application is being stopped although buckets are still open here: everything is closed at once.
    pub shut: bool,
    /// Ethernet address of each service interface.
    pub macs: Vec<MacAddr>,
    /// Weight of this node in each group.
    pub weights: Vec<u16>,
    /// Which part of a divided farm serves.
    pub partition: PartitionPolicy,
    /// The witness of that policy answers this node.
    pub witness_answers: bool,
}

/// A change worth a line in the log.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// About nodes.
    Membership(membership::Event),
    /// About the buckets of one group.
    Handover {
        /// Which module.
        module: ModuleName,
        /// Position of the group in its file.
        group: usize,
        /// What.
        event: handover::Event,
    },
    /// This node's module is kept out, or no longer.
    KeptOut {
        /// Which module.
        module: ModuleName,
        /// Why; `None` if it may take part again.
        why: Option<String>,
    },
    /// This node stops serving the module because of its part of the farm, or may serve again.
    Withheld {
        /// Which module.
        module: ModuleName,
        /// Why; `None` if it may serve again.
        why: Option<String>,
    },
    /// A peer tells of requesters this node did not know.
    Learned(Requester),
    /// A peer that had left to be back at once is not back: its connections are given up.
    NotBack(NodeId),
}

/// A datagram to send.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Transmit {
    /// Position of the lan in `cluster.xml`.
    pub lan: usize,
    /// To all these nodes on that lan.
    pub to: NodeSet,
    /// These nodes are not heard: the datagram goes where no address resolution is needed, as the kernel may be waiting for one. Everybody on
    /// the lan may get it; it is no copy of another.
    pub broadcast: bool,
    /// Heartbeats to or from these nodes have gone missing: the datagram goes to each of them by itself.
    pub nudge: bool,
    /// The sealed datagram.
    pub payload: Vec<u8>,
}

/// Why a datagram was not used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refused {
    /// Not a heartbeat of this cluster.
    Parse(ParseError),
    /// Not fit for use.
    Membership(membership::Refusal),
}

impl Refused {
    /// Name of its counter.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Parse(ParseError::Authentication) => "authentication",
            Self::Parse(ParseError::Version(_)) => "version",
            Self::Parse(ParseError::Malformed(_)) => "malformed",
            Self::Membership(refusal) => refusal.name(),
        }
    }
}

#[derive(Clone, Debug)]
struct Module {
    local: LocalModule,
    groups: Vec<Handover>,
    kept_out: Option<String>,
    withheld: Option<String>,
    /// A module that leaves STOP takes part at once, but proposes nothing before this: the others may have
    /// left STOP at the same moment, and neither would wait for the promise of one that it takes to be
    /// stopped.
    join_until: Duration,
    joining: bool,
    /// What each group has promised, and since when, and when this node was withheld last: what a peer said before it knew of that excuses nobody from his
    /// promise.
    promised: Vec<Epoch>,
    since: Duration,
    /// Which map of each group is committed here, and since when: its owners were running the module.
    committed: Vec<(Epoch, Duration)>,
}

impl Module {
    fn note_promises(&mut self, now: Duration) {
        let promised = self.groups.iter().map(Handover::promised);
        if !promised.clone().eq(self.promised.iter().copied()) {
            self.promised = promised.collect();
            self.since = now;
        }
    }

    fn note_committed(&mut self, now: Duration) {
        self.committed.resize(self.groups.len(), (Epoch::default(), now));
        for (noted, group) in self.committed.iter_mut().zip(&self.groups) {
            if noted.0 != group.committed() {
                *noted = (group.committed(), now);
            }
        }
    }

    /// True if `node` has buckets by a map that was committed here after `said`: it was running the module then.
    fn has_since(&self, node: NodeId, said: Duration) -> bool {
        let mut groups = self.groups.iter().zip(&self.committed);
        groups.any(|(group, (_, at))| *at >= said && group.map().owners().contains(node))
    }

    /// True if nothing is under way.
    fn is_at_rest(&self) -> bool {
        let stopped = self.local.state == ModuleState::Stop;
        let rests = |group: &Handover| match stopped {
            true => group.is_released(),
            false => group.is_at_rest(),
        };
        !self.joining && self.kept_out.is_none() && self.withheld.is_none() && self.groups.iter().all(rests)
    }
}

/// See the module doc.
#[derive(Clone, Debug)]
pub struct Farm {
    this: NodeId,
    names: Vec<String>,
    key: ClusterKey,
    incarnation: Incarnation,
    digest: u64,
    interval: Duration,
    lans: Vec<NodeSet>,
    membership: Membership,
    /// What peers say of their modules: those that are heard, and others of which somebody passes it on.
    reports: BTreeMap<NodeId, Vec<ModuleReport>>,
    relays: Relays,
    /// Ethernet addresses that a peer has told per module; kept while it is in the view, heard or not.
    macs: BTreeMap<NodeId, Vec<(ModuleName, Vec<MacAddr>)>>,
    modules: BTreeMap<ModuleName, Module>,
    requesters: Requesters,
    seq: u64,
    /// Counts the heartbeats that go to everybody.
    beat: u16,
    next_heartbeat: Duration,
    /// Not before this are heartbeats repeated to `endangered` peers, or to those in `answer`.
    next_nudge: Duration,
    nudge_at: Option<Duration>,
    /// When the next heartbeat is due though there is no news.
    beat_at: Duration,
    /// What goes out before its time puts this off by a nudge each; see [`Self::may_hurry_at`]. Zero if nothing has lately.
    hurried: Duration,
    /// Peers of which a heartbeat came in after some had gone missing: they wait to know that they are heard.
    answer: NodeSet,
    /// Position, among all groups, of the one whose map is sent first.
    map_turn: usize,
    /// Heartbeats that are still to follow for the maps that found no place in one.
    follow_ups: usize,
    leaving: bool,
    returning: bool,
    away: Away,
    plan_version: u64,
    /// This node has stepped out, or was not run, and may be back since: there is no lease before the data plane works with this plan, by which nothing
    /// is open.
    closed_by: Option<u64>,
    /// A pause closed everything; lifted by the next turn.
    paused: bool,
    /// The last turn found nothing to do, and nothing is under way: a heartbeat without news calls for none.
    at_rest: bool,
    /// Its shares could not be taken at the last turn; see [`Membership::waits`].
    waited: bool,
    turns: u64,
    transmits: VecDeque<Transmit>,
    events: VecDeque<Event>,
}

impl Farm {
    /// Node `this` of the cluster, started at `now`.
    pub fn new(config: &ClusterConfig, key: ClusterKey, this: NodeId, incarnation: Incarnation, now: Duration) -> Self {
        let lans = config.lans.iter().map(|lan| {
            let nodes: NodeSet = lan.nodes.iter().map(|(n, _)| *n).collect();
            if nodes.contains(this) {
                nodes.iter().filter(|n| *n != this).collect()
            } else {
                NodeSet::EMPTY
            }
        });
        Self {
            this,
            names: config.nodes.clone(),
            key,
            incarnation,
            digest: config.digest,
            interval: config.heartbeat_interval,
            lans: lans.collect(),
            membership: Membership::new(config, this, now),
            reports: BTreeMap::new(),
            relays: Relays::default(),
            macs: BTreeMap::new(),
            modules: BTreeMap::new(),
            requesters: Requesters::default(),
            seq: transmit::first_seq(incarnation),
            beat: 0,
            next_heartbeat: now,
            next_nudge: now,
            nudge_at: None,
            beat_at: now,
            hurried: Duration::ZERO,
            answer: NodeSet::EMPTY,
            map_turn: 0,
            follow_ups: 0,
            leaving: false,
            returning: false,
            away: Away::default(),
            plan_version: 0,
            closed_by: None,
            paused: false,
            at_rest: false,
            waited: true,
            turns: 0,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Takes a datagram that came in on `lan`.
    pub fn handle_datagram(&mut self, now: Duration, lan: usize, datagram: &[u8]) -> Result<(), Refused> {
        let heartbeat = Heartbeat::parse(&self.key, datagram).map_err(Refused::Parse)?;
        // Sequence numbers are per lan; a recording of one lan must not pass for news on another.
        if usize::from(heartbeat.lan) != lan {
            return Err(Refused::Membership(membership::Refusal::OtherLan));
        }
        let missed = self.membership.endangered(now).contains(heartbeat.sender);
        let flags = |farm: &Self| farm.membership.peer(heartbeat.sender).map(Peer::flags);
        let before = flags(self);
        let newest = self.membership.handle_heartbeat(now, lan, &heartbeat);
        let newest = newest.map_err(Refused::Membership)?;
        if missed {
            self.answer(now, heartbeat.sender);
        }
        for requester in &heartbeat.requesters {
            if self.requesters.learn_told(*requester) {
                self.events.push_back(Event::Learned(*requester));
            }
        }
        let same_cluster = self.membership.peer(heartbeat.sender).is_some_and(|p| p.same_cluster());
        let nothing_new = same_cluster
            && before == flags(self)
            && heartbeat.hearsay.is_empty()
            && heartbeat.relayed.is_empty()
            && (!newest || self.reports.get(&heartbeat.sender) == Some(&heartbeat.modules));
        // Nearly all heartbeats are so. What only time changes is looked at with each of this node's own, and when the membership asks for it.
        if nothing_new && self.at_rest && self.membership.is_at_rest() && now < self.next_heartbeat {
            self.transmit(now);
            return Ok(());
        }
        if same_cluster && heartbeat.leaving && heartbeat.returning {
            self.away.insert(now, heartbeat.sender, &heartbeat.modules);
        }
        if same_cluster && newest {
            let is_news = self.reports.get(&heartbeat.sender) != Some(&heartbeat.modules);
            self.learn_reports(heartbeat.sender, heartbeat.modules);
            self.relays.remove(heartbeat.sender);
            if is_news && self.passes_on().contains(heartbeat.sender) {
                self.next_heartbeat = now;
            }
            for word in heartbeat.relayed {
                self.take_relayed(now, heartbeat.sender, word);
            }
        } else if !same_cluster {
            self.reports.remove(&heartbeat.sender);
            self.relays.remove(heartbeat.sender);
        }
        self.turn(now);
        Ok(())
    }

    /// Lets time pass.
    pub fn handle_timeout(&mut self, now: Duration) {
        self.turn(now);
    }

    /// The data plane works with plan `version`; `held` are, per module and group, the buckets in which this
    /// host has connections, and how many connections lie in buckets it does not own.
    pub fn handle_applied(
        &mut self,
        now: Duration,
        version: u64,
        held: BTreeMap<(ModuleName, usize), (BucketSet, u32)>,
    ) {
        let mut held = held;
        let mut changed = false;
        for (name, module) in &mut self.modules {
            for (i, group) in module.groups.iter_mut().enumerate() {
                let (buckets, connections) = held.remove(&(name.clone(), i)).unwrap_or_default();
                changed |= group.handle_applied(version, buckets, connections);
            }
        }
        if changed {
            self.next_heartbeat = now;
        }
        self.closed_by.take_if(|plan| *plan <= version);
        self.turn(now);
    }

    /// This node did not run for so long that others may have taken over: everything is closed and has to be
    /// given anew.
    pub fn handle_pause(&mut self, now: Duration) {
        self.membership.handle_pause(now);
        self.relays.clear();
        self.next_heartbeat = now;
        self.paused = true;
        self.turn(now);
        self.paused = false;
        self.turn(now);
    }

    /// Nothing at all comes in by the interfaces that clients use; see [`Membership::handle_nothing_in`].
    pub fn handle_nothing_in(&mut self, now: Duration) {
        self.membership.handle_nothing_in(now);
        self.turn(now);
    }

    /// Something comes in again; see [`Membership::handle_something_in`].
    pub fn handle_something_in(&mut self, now: Duration) {
        self.membership.handle_something_in(now);
        self.turn(now);
    }

    /// Another node says, by another way than a heartbeat, that this one is heard; see [`Membership::handle_told_deaf`].
    pub fn handle_told_deaf(&mut self, now: Duration) {
        self.membership.handle_told_deaf(now);
        self.next_heartbeat = now;
        self.turn(now);
    }

    /// Adds a module or changes what is said of it.
    pub fn set_module(&mut self, now: Duration, name: ModuleName, local: LocalModule) {
        let groups = local.weights.len();
        match self.modules.get_mut(&name) {
            Some(module) if module.groups.len() == groups => {
                if module.local == local {
                    return;
                }
                // A stopped module has nothing open and no say; it starts from nothing.
                if local.state == ModuleState::Stop && module.local.state != ModuleState::Stop {
                    module.groups.iter_mut().for_each(Handover::stop);
                    module.kept_out = None;
                    module.withheld = None;
                    self.plan_version += 1;
                }
                if local.state != ModuleState::Stop && module.local.state == ModuleState::Stop {
                    module.join_until = now + self.membership.join_time();
                    module.joining = true;
                }
                module.local = local;
            }
            _ => {
                let groups = (0..groups).map(|_| Handover::new(self.this)).collect();
                self.modules.insert(
                    name,
                    Module {
                        local,
                        groups,
                        kept_out: None,
                        withheld: None,
                        join_until: now + self.membership.join_time(),
                        joining: true,
                        promised: Vec::new(),
                        since: now,
                        committed: Vec::new(),
                    },
                );
                self.plan_version += 1;
            }
        }
        self.next_heartbeat = now;
        self.turn(now);
    }

    /// Forgets a module.
    pub fn remove_module(&mut self, now: Duration, name: &ModuleName) {
        if self.modules.remove(name).is_some() {
            self.plan_version += 1;
            self.next_heartbeat = now;
            self.turn(now);
        }
    }

    /// Somebody asked for a VIP's Ethernet address; goes round in heartbeats so that nodes that start later
    /// know it too.
    pub fn learn_requester(&mut self, requester: Requester) {
        self.requesters.learn(requester);
    }

    /// Says goodbye: peers need not wait for the detection time. Nothing may be open any more. If this node is `returning`, peers do not reset
    /// the connections it has while it is away ([`away::LIMIT`]).
    pub fn leave(&mut self, now: Duration, returning: bool) {
        self.leaving = true;
        self.returning = returning;
        self.next_heartbeat = now;
        // The last word waits for nothing.
        self.beat_at = now;
        self.turn(now);
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.transmits.pop_front()
    }

    /// The next event, oldest first.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] should be called if nothing else happens. May change after every input.
    pub fn poll_timeout(&self) -> Duration {
        let joining = self.modules.values().filter(|m| m.joining);
        joining
            .map(|m| m.join_until + self.late_words())
            .chain(self.away.next_timeout())
            .chain(self.membership.poll_timeout())
            .chain(self.nudge_at)
            .fold(self.next_heartbeat, Duration::min)
    }

    /// True from when this node steps out, or goes on after a pause, until the data plane works with a plan by which nothing is open.
    pub fn is_closing(&self) -> bool {
        self.closed_by.is_some()
    }

    /// Until when the data plane may accept although this node takes no other turn, after a turn at `now`; `now` itself if it must not accept
    /// at all: this node has stepped out, or was not run, and what the data plane had open is not closed yet, be the node back or not.
    ///
    /// Not later than the detection time less a pulse from `now`.
    pub fn lease_until(&self, now: Duration) -> Duration {
        if self.is_closing() {
            return now;
        }
        self.membership.lease_until(now)
    }

    /// How often conclusions were drawn; not from heartbeats without news.
    pub fn turns(&self) -> u64 {
        self.turns
    }

    fn name(&self, node: NodeId) -> &str {
        self.names.get(node.index()).map_or("?", String::as_str)
    }
}

#[cfg(test)]
#[path = "farm_tests.rs"]
mod tests;
