//! One node of the model: the real [`Farm`], and around it what the daemon's owner loop does.
//!
//! It takes one input at a time, publishes the plan when its number has changed, renews the lease of its data plane at the end of each
//! turn, notices by the gap between two turns that it was not run, and then discards what waits in its sockets, closes everything and
//! renews no lease before the data plane has confirmed that. When it is to end it hands over, says goodbye, and is gone. A [`Broken`]
//! node leaves one of these out, or lies. Called by [`crate::world`].

use std::sync::Arc;
use std::time::Duration;

use farm_core::api::{ModuleState, Quality};
use farm_core::config::{ClusterConfig, PartitionPolicy};
use farm_core::farm::{Event, Farm, LocalModule};
use farm_core::handover;
use farm_core::id::{Epoch, Incarnation, ModuleName, NodeId, NodeSet};
use farm_core::wire::auth::ClusterKey;
use farm_core::wire::heartbeat::Heartbeat;

use crate::broken::{self, Broken, Kept};
use crate::fingerprint::{self, Seqs, Token, report_tokens};
use crate::plane::{Bits, Plane, Sheet};

/// Digest of the configuration of the module that all nodes have, or all but one.
pub const CONFIGURATION: u64 = 7;

/// What does not change in a model.
#[derive(Debug)]
pub struct Fixed {
    /// `cluster.xml`.
    pub cluster: ClusterConfig,
    /// Its key.
    pub key: ClusterKey,
    /// The one module.
    pub module: ModuleName,
    /// What the nodes in `culprits` do wrong.
    pub broken: Option<Broken>,
    /// Nodes that break a rule.
    pub culprits: NodeSet,
    /// Buckets that are closed have connections.
    pub flows: bool,
    /// Weight of the first node; the others have 1.
    pub weight: u16,
    /// Which part of a divided farm serves.
    pub partition: PartitionPolicy,
    /// How long after the last fault the farm may need.
    pub recovery: Duration,
    /// The node whose module has another configuration.
    pub other_module: Option<NodeId>,
    /// The node that has another `cluster.xml`.
    pub other_cluster: Option<NodeId>,
    /// So many pairs of nodes, from the first on, do not talk with each other when the checker begins.
    pub apart: usize,
    /// For how long they do not just before the checker begins.
    pub blink: Duration,
    /// How far back a node remembers what it was told by commands.
    pub remembers: Duration,
}

impl Fixed {
    /// Time between two heartbeats.
    pub fn pulse(&self) -> Duration {
        self.cluster.heartbeat_interval
    }

    /// Silence after which a peer is down.
    pub fn detection(&self) -> Duration {
        self.cluster.detection_time()
    }

    /// How far back the promises look: the time to recover and [`Self::silence`].
    pub fn lately(&self) -> Duration {
        self.silence().max(self.recovery) + self.pulse()
    }

    /// How far back anything is remembered: the same, or by the core what it was told; of all else twice the detection time.
    pub fn memory(&self) -> Duration {
        self.lately().max(self.remembers + self.pulse())
    }

    /// How long after its last word a node may be taken for alive: the detection time, as long again at one that was not run meanwhile, which
    /// reads late or judges nobody at once, and what a late datagram and a reprieve take.
    pub fn silence(&self) -> Duration {
        2 * (self.detection() + self.pulse())
    }

    /// Digest of the configuration of the module at `node`.
    pub fn digest_of(&self, node: NodeId) -> u64 {
        CONFIGURATION + u64::from(self.other_module == Some(node))
    }

    /// Digest of the `cluster.xml` of `node`.
    pub fn cluster_digest_of(&self, node: NodeId) -> u64 {
        if self.other_cluster == Some(node) {
            !self.cluster.digest
        } else {
            self.cluster.digest
        }
    }

    /// What two nodes need to have in common to serve together.
    pub fn configuration_of(&self, node: NodeId) -> (u64, u64) {
        (self.digest_of(node), self.cluster_digest_of(node))
    }

    /// Weight of `node`.
    pub fn weight_of(&self, node: NodeId) -> u16 {
        if node.index() == 0 { self.weight } else { 1 }
    }

    /// What `node` does wrong.
    pub fn breaks(&self, node: NodeId) -> Option<Broken> {
        self.broken.filter(|_| self.culprits.contains(node))
    }
}

/// A heartbeat under way.
#[derive(Debug)]
pub struct Datagram {
    /// Who sent it.
    pub from: NodeId,
    /// On which lan.
    pub lan: usize,
    /// The sealed bytes.
    pub payload: Vec<u8>,
    /// Incarnation of the sender.
    pub incarnation: u64,
    /// And its number.
    pub seq: u64,
    /// What it says, numbers left out.
    pub tokens: Vec<Token>,
    /// Whom its sender hears, with the incarnation and number of the newest that was heard.
    pub acks: Vec<(NodeId, (u64, u64))>,
}

/// What a node has to take.
#[derive(Clone, Debug)]
pub enum Input {
    /// A heartbeat has come in.
    Datagram(Arc<Datagram>),
    /// The data plane works with this plan, and these buckets that are not open have connections.
    Applied(u64, Box<Bits>),
    /// The module is in another state.
    Module,
    /// A command says that others hear this node.
    Told,
    /// Time has passed.
    Timeout,
}

/// What came of a turn.
#[derive(Default)]
pub struct Outcome {
    /// Heartbeats, and to whom.
    pub sent: Vec<(NodeSet, Arc<Datagram>)>,
    /// Plans given to the data plane.
    pub published: usize,
    /// Plans that a broken node takes for confirmed.
    pub too_early: Vec<u64>,
    /// A map was proposed in this turn, as the wire has it.
    pub proposed: Option<Heartbeat>,
    /// The module's buckets are with others; it stops.
    pub handed_over: bool,
    /// What the core has to say.
    pub events: Vec<Event>,
}

/// See the module doc.
#[derive(Clone, Debug)]
pub struct Node {
    /// Which one.
    pub id: NodeId,
    /// `None` if it does not run.
    pub farm: Option<Farm>,
    /// Starts so far.
    pub incarnation: u64,
    /// What it says of its module.
    pub local: LocalModule,
    /// Its data plane.
    pub plane: Plane,
    /// It is not run.
    pub paused: bool,
    /// What came in meanwhile.
    pub inbox: Vec<Input>,
    /// Incarnation and number of the newest heartbeat taken on each lan of each node.
    pub seen: Vec<Vec<(u64, u64)>>,
    /// The numbers it has used.
    pub seqs: Seqs,
    /// Hands over before it stops.
    pub stopping: bool,
    /// Says goodbye and ends when it has.
    pub ending: bool,
    /// Says goodbye and is replaced when it has.
    pub reloading: bool,
    /// Its farmd is being replaced: there is none, and its connections go on.
    pub away: bool,
    /// Nothing at all comes in.
    pub dead: bool,
    /// When it looks next whether anything does.
    pub look_at: Option<Duration>,
    /// Its farm, for the fingerprint.
    pub tokens: Vec<Token>,
    /// When it was started, woken, or stepped out last.
    pub upset_at: Option<Duration>,
    /// End of its last turn.
    pub last_turn: Duration,
    published: u64,
    /// For what it says if it breaks a rule.
    kept: Kept,
}

impl Node {
    /// A node that does not run yet.
    pub fn new(id: NodeId, nodes: usize, lans: usize) -> Self {
        Self {
            id,
            farm: None,
            incarnation: 0,
            local: LocalModule {
                digest: CONFIGURATION,
                state: ModuleState::Stop,
                quality: Quality::NotReady,
                why: String::new(),
                ready: false,
                shut: false,
                macs: Vec::new(),
                weights: vec![1],
                partition: PartitionPolicy::Serve,
                witness_answers: false,
            },
            plane: Plane::new(),
            paused: false,
            inbox: Vec::new(),
            seen: vec![vec![(0, 0); nodes]; lans],
            seqs: Seqs::default(),
            stopping: false,
            ending: false,
            reloading: false,
            away: false,
            dead: false,
            look_at: None,
            tokens: Vec::new(),
            upset_at: None,
            last_turn: Duration::ZERO,
            published: 0,
            kept: Kept::default(),
        }
    }

    /// Starts the daemon; its module starts too, and is ready at [`Self::ready`]. The witness answers it, or not.
    pub fn start(&mut self, now: Duration, answers: bool, fixed: &Fixed) {
        let broken = fixed.breaks(self.id);
        let again = self.incarnation > 0 && broken == Some(Broken::SameIncarnation);
        let incarnation = if again { self.incarnation } else { self.incarnation + 1 };
        let feigned = broken::feigned_joining(broken, fixed);
        let begun = now - feigned.map_or(Duration::ZERO, |(early, _)| early);
        *self = Self {
            incarnation,
            upset_at: Some(now),
            last_turn: now,
            kept: Kept {
                feigns_until: feigned.map(|(_, time)| now + time),
                ..Kept::default()
            },
            dead: self.dead,
            ..Self::new(self.id, self.seen[0].len(), self.seen.len())
        };
        self.local.state = ModuleState::Wait;
        self.local.quality = Quality::Transient;
        self.local.partition = fixed.partition;
        self.local.witness_answers = broken::witness(broken, answers);
        self.local.weights = vec![fixed.weight_of(self.id)];
        self.local.digest = broken::digest(broken, self.id, fixed);
        self.plane.mirrored = fixed.digest_of(self.id) != CONFIGURATION;
        let (key, local) = (fixed.key.clone(), self.local.clone());
        let cluster = ClusterConfig {
            digest: fixed.cluster_digest_of(self.id),
            ..fixed.cluster.clone()
        };
        let mut farm = Farm::new(&cluster, key, self.id, Incarnation(incarnation), begun);
        // A core that began long enough ago has joined, with its module.
        let joined = begun + fixed.detection() + fixed.pulse();
        if joined <= now {
            farm.set_module(begun, fixed.module.clone(), local);
            farm.handle_timeout(joined);
        } else {
            farm.set_module(now, fixed.module.clone(), local);
        }
        self.farm = Some(farm);
    }

    /// The power fails.
    pub fn crash(&mut self) {
        *self = Self {
            incarnation: self.incarnation,
            dead: self.dead,
            ..Self::new(self.id, self.seen[0].len(), self.seen.len())
        };
    }

    /// The module is UP and ready.
    pub fn ready(&mut self) {
        self.local.state = ModuleState::Up;
        self.local.quality = Quality::Ready;
        self.local.ready = true;
        self.stopping = false;
    }

    /// The witness answers it from here on, or no longer.
    pub fn notice_witness(&mut self, answers: bool, fixed: &Fixed) {
        self.local.witness_answers = broken::witness(fixed.breaks(self.id), answers);
    }

    /// The module is to stop: its buckets go to others first.
    pub fn hand_over(&mut self) {
        self.stopping = true;
        self.local.ready = false;
        self.local.quality = Quality::Transient;
    }

    /// The daemon is to end: its module stops first.
    pub fn end(&mut self, now: Duration, fixed: &Fixed) {
        self.hand_over();
        self.ending = true;
        let early = fixed.breaks(self.id) == Some(Broken::SaysGoodbyeEarly);
        if let Some(farm) = self.farm.as_mut().filter(|_| early) {
            farm.leave(now, false);
        }
    }

    /// Says goodbye and is gone.
    pub fn leave(&mut self, now: Duration, fixed: &Fixed) -> Outcome {
        let mut outcome = Outcome::default();
        if let Some(farm) = &mut self.farm {
            farm.leave(now, false);
        }
        self.transmit(now, fixed, &mut outcome);
        self.crash();
        outcome
    }

    /// STOP: the VIP is off the host.
    pub fn stop(&mut self) {
        self.local.state = ModuleState::Stop;
        self.local.quality = Quality::NotReady;
        self.local.ready = false;
        self.stopping = false;
        self.plane.flows = Bits::NONE;
    }

    /// It runs, and its module should have a share.
    pub fn serves(&self) -> bool {
        self.farm.is_some() && !self.paused && self.local.ready
    }

    /// When it takes a turn by itself.
    pub fn wakes_at(&self) -> Option<Duration> {
        let at = self.farm.as_ref().filter(|_| !self.paused)?.poll_timeout();
        Some(self.look_at.map_or(at, |look| look.min(at)))
    }

    /// Epoch of the map it works with, if it runs.
    pub fn committed(&self, fixed: &Fixed) -> Epoch {
        let group = self.farm.as_ref().and_then(|f| f.group(&fixed.module, 0));
        group.map_or(Epoch::default(), |g| g.committed())
    }

    /// Gives the node something to take.
    pub fn handle(&mut self, now: Duration, input: Input, fixed: &Fixed) -> Outcome {
        if self.farm.is_none() {
            return Outcome::default();
        }
        // What comes in after the lease is discarded on waking, with what came in before. Where it is not there is no room for more.
        let expired = now - self.last_turn >= fixed.detection() - fixed.pulse();
        if expired && fixed.breaks(self.id) != Some(Broken::TakesOldHeartbeats) {
            self.inbox.retain(|input| !matches!(input, Input::Datagram(_)));
        }
        if !expired || !matches!(input, Input::Datagram(_)) {
            self.inbox.push(input);
        }
        if self.paused {
            return Outcome::default();
        }
        self.turn(now, fixed)
    }

    /// One pass of the owner loop.
    pub fn turn(&mut self, now: Duration, fixed: &Fixed) -> Outcome {
        let mut outcome = Outcome::default();
        let broken = fixed.breaks(self.id);
        // Before the checker begins nobody breaks a rule, so a node may have started with the policy and the configuration as they are.
        let partition = broken::partition(broken, fixed.partition);
        let digest = broken::digest(broken, self.id, fixed);
        if self.local.partition != partition || self.local.digest != digest {
            self.local.partition = partition;
            self.local.digest = digest;
            self.inbox.push(Input::Module);
        }
        let lease = fixed.detection() - fixed.pulse();
        let before = std::mem::replace(&mut self.last_turn, now);
        let gap = now - before;
        let hides = broken == Some(Broken::HidesShortStop) && gap < lease;
        if let Some(farm) = self.farm.as_mut().filter(|_| hides) {
            broken::hide_stop(farm, before, now, fixed);
        }
        if gap >= lease && broken != Some(Broken::ForgetsPause) {
            if broken != Some(Broken::TakesOldHeartbeats) {
                self.inbox.retain(|input| !matches!(input, Input::Datagram(_)));
            }
            if let Some(farm) = &mut self.farm {
                let feigned = broken::feigned_joining(broken, fixed).filter(|(early, _)| *early < gap);
                farm.handle_pause(now - feigned.map_or(Duration::ZERO, |(early, _)| early));
                self.kept.feigns_until = feigned.map_or(self.kept.feigns_until, |(_, time)| Some(now + time));
            }
            self.upset_at = Some(now);
            self.publish(fixed, &mut outcome);
        }
        for input in std::mem::take(&mut self.inbox) {
            self.take(now, input, fixed);
        }
        self.look_for_frames(now, fixed);
        if let Some(farm) = &mut self.farm {
            if farm.poll_timeout() <= now {
                farm.handle_timeout(now);
            }
            outcome.handed_over = self.stopping && farm.is_handed_over(&fixed.module);
            if farm.membership().fenced().is_some() {
                self.upset_at = Some(now);
            }
        }
        self.publish(fixed, &mut outcome);
        self.plane.lease_until = broken::lease(broken, now, self.farm.as_ref(), fixed);
        self.transmit(now, fixed, &mut outcome);
        self.describe();
        outcome
    }

    fn take(&mut self, now: Duration, input: Input, fixed: &Fixed) {
        let Some(farm) = &mut self.farm else { return };
        match input {
            Input::Datagram(datagram) => {
                let (id, seqs) = (self.id, &self.seqs);
                let misread = fixed.breaks(id);
                let misread =
                    misread.and_then(|broken| broken::misread(broken, now, id, &datagram.payload, farm, seqs, fixed));
                let payload = misread.as_ref().unwrap_or(&datagram.payload);
                if farm.handle_datagram(now, datagram.lan, payload).is_ok() {
                    self.seen[datagram.lan][datagram.from.index()] = (datagram.incarnation, datagram.seq);
                }
            }
            Input::Applied(version, held) => {
                let held = (held.to_set(), held.len() as u32);
                farm.handle_applied(now, version, [((fixed.module.clone(), 0), held)].into());
            }
            Input::Module => farm.set_module(now, fixed.module.clone(), self.local.clone()),
            Input::Told if fixed.breaks(self.id) == Some(Broken::IgnoresCommand) => {}
            Input::Told => farm.handle_told_deaf(now),
            Input::Timeout => {}
        }
    }

    fn publish(&mut self, fixed: &Fixed, outcome: &mut Outcome) {
        let Some(farm) = &self.farm else { return };
        let version = farm.plan_version();
        if version == self.published {
            return;
        }
        self.published = version;
        let broken = fixed.breaks(self.id);
        let sheet = farm.group_plan(&fixed.module, 0);
        let sheet = sheet.map(|plan| broken::sheet(broken, Sheet::new(version, &plan)));
        self.plane
            .given
            .push_back(Arc::new(sheet.unwrap_or_else(Sheet::closed)));
        outcome.published += 1;
        if broken == Some(Broken::ConfirmsEarly) {
            outcome.too_early.push(version);
        }
    }

    /// Takes from the core what it has to say and to send.
    pub fn transmit(&mut self, now: Duration, fixed: &Fixed, outcome: &mut Outcome) {
        let kept = &mut self.kept;
        let Some(farm) = &mut self.farm else { return };
        let mut proposed = false;
        while let Some(event) = farm.poll_event() {
            let handover = match &event {
                Event::Handover { event, .. } => Some(event),
                _ => None,
            };
            proposed |= matches!(handover, Some(handover::Event::Proposed { .. }));
            outcome.events.push(event);
        }
        while let Some(transmit) = farm.poll_transmit() {
            // Nobody has to be sought in the model: its network resolves no addresses.
            if transmit.broadcast {
                continue;
            }
            let Ok(mut heartbeat) = Heartbeat::parse(&fixed.key, &transmit.payload) else {
                continue;
            };
            let forged = fixed
                .breaks(self.id)
                .is_some_and(|broken| broken::forge(broken, now, &mut heartbeat, farm, kept, fixed));
            let payload = if forged {
                heartbeat.emit(&fixed.key)
            } else {
                transmit.payload
            };
            if self.seqs.newest() != heartbeat.seq {
                self.seqs.push(now, heartbeat.seq, fixed.memory());
            }
            if proposed {
                outcome.proposed = Some(heartbeat.clone());
            }
            outcome
                .sent
                .push((transmit.to, Arc::new(datagram(heartbeat, payload, &self.seen))));
        }
    }

    fn describe(&mut self) {
        let Some(farm) = &self.farm else { return };
        self.tokens = fingerprint::tokens(farm, farm.plan_version());
        for modules in farm.reports().values() {
            report_tokens(modules, &mut self.tokens);
        }
    }

    /// By how much plan `version` is older than the farm's newest.
    pub fn behind(&self, version: u64) -> Token {
        let newest = self.farm.as_ref().map_or(0, Farm::plan_version);
        Token::Same(newest.wrapping_sub(version))
    }

    /// All that is not in the world's own fields, for the fingerprint.
    pub fn tokens(&self) -> impl Iterator<Item = Token> {
        let ahead = |of: u64| self.behind(of);
        let own = [
            Token::Same(self.farm.is_some().into()),
            Token::Same(self.incarnation),
            Token::Same(u64::from(self.paused) | u64::from(self.stopping) << 1 | u64::from(self.local.ready) << 2),
            Token::Same(self.ending.into()),
            Token::Same(u64::from(self.reloading) | u64::from(self.away) << 1 | u64::from(self.dead) << 2),
            Token::Same(self.kept.rows.len() as u64),
            Token::Epoch(self.kept.promised.0),
            Token::Time(self.look_at.unwrap_or_default()),
            Token::Time(self.last_turn),
            Token::Time(self.upset_at.unwrap_or_default()),
            Token::Time(self.kept.feigns_until.unwrap_or_default()),
            ahead(self.published),
            Token::Time(self.plane.lease_until),
        ];
        let plane = std::iter::once(&self.plane.sheet).chain(&self.plane.given);
        let plane = plane.flat_map(move |sheet| [self.behind(sheet.version), Token::Same(sheet.digest)]);
        own.into_iter().chain(plane).chain(self.tokens.iter().copied())
    }
}

fn datagram(mut heartbeat: Heartbeat, payload: Vec<u8>, seen: &[Vec<(u64, u64)>]) -> Datagram {
    let newest = |n: NodeId| seen.iter().map(|lan| lan[n.index()]).max().unwrap_or_default();
    // What is acknowledged is told as numbers; the reader of this datagram knows when it sent them.
    let hears = heartbeat.hears_set();
    heartbeat.hears.clear();
    let mut tokens = fingerprint::tokens(&heartbeat, 0);
    report_tokens(&heartbeat.modules, &mut tokens);
    tokens.push(Token::Same(hears.bits()));
    Datagram {
        from: heartbeat.sender,
        lan: heartbeat.lan.into(),
        payload,
        incarnation: heartbeat.incarnation.0,
        seq: heartbeat.seq,
        tokens,
        acks: hears.iter().map(|n| (n, newest(n))).collect(),
    }
}
