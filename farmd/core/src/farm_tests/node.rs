//! One simulated node: a real [`Farm`] in what stands for the daemon's owner loop.
//!
//! It takes its inputs, publishes the plan when its number has changed, renews the lease of its data plane at the end of each turn, and notices by the
//! gap between two turns that it was not run. It has a clock of its own: no two nodes agree on the time.

use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::plane::{Bits, Plane};
use super::promises::Breach;
use super::sim::{Ev, Sim, id, us};
use crate::api::{ModuleState, Quality};
use crate::balance::assign::BucketMap;
use crate::config::PartitionPolicy;
use crate::farm::{Event, Farm, LocalModule};
use crate::handover;
use crate::id::{Incarnation, MacAddr, NodeId, NodeSet};
use crate::membership::Peer;
use crate::wire::auth::ClusterKey;
use crate::wire::heartbeat::BucketSet;

/// How often a data plane counts connections that are left.
const RECOUNT: Duration = Duration::from_millis(50);

/// What a node has to take.
#[derive(Clone)]
pub enum Input {
    Datagram(usize, Rc<Vec<u8>>),
    Applied(u64, BucketSet),
    Module,
    /// A command says that others hear this node.
    Told,
    Timeout,
}

/// A node's clock: begins anywhere and runs a little fast or slow.
#[derive(Clone, Copy, Default)]
pub struct Clock {
    pub offset: Duration,
    /// Parts per million by which it is fast.
    pub fast: i32,
    /// For so long it has stood still, with its machine.
    pub stood: Duration,
}

impl Clock {
    /// What it shows at `now`.
    pub fn local(self, now: Duration) -> Duration {
        let nanos = now.as_nanos() as i128;
        let shown = self.offset + Duration::from_nanos((nanos + nanos * i128::from(self.fast) / 1_000_000) as u64);
        shown.saturating_sub(self.stood)
    }

    /// When it shows `local`, or just after.
    pub fn global(self, local: Duration) -> Duration {
        let rate = 1_000_000 + i128::from(self.fast);
        let nanos = (local + self.stood).saturating_sub(self.offset).as_nanos() as i128 * 1_000_000;
        Duration::from_nanos(((nanos + rate - 1) / rate) as u64)
    }
}

pub struct Node {
    pub farm: Option<Farm>,
    pub clock: Clock,
    pub incarnation: u64,
    pub local: LocalModule,
    pub plane: Plane,
    /// Its data plane takes so much longer for each plan.
    pub slower: Duration,
    /// Rises whenever all connections of this host end.
    pub run: u64,
    /// Bit per node with which it talks both ways, as far as it knows; and since when with each.
    pub heard: u64,
    pub heard_since: Vec<Duration>,
    /// The map it worked with after its last input, and the plan's number then.
    pub map: BucketMap,
    pub map_version: u64,
    pub paused_until: Duration,
    pub frozen_plane: bool,
    pub inbox: VecDeque<Input>,
    /// By its own clock.
    pub last_turn: Duration,
    pub published: u64,
    pub wake_at: Option<Duration>,
    /// When it looks next whether anything comes in, by its own clock, and when it told whom last that it hears him.
    pub look_at: Duration,
    pub told: Vec<Option<Duration>>,
    pub recounts: bool,
    pub stopping: bool,
    /// farmd is being restarted in place: there is none, and connections go on.
    pub away: bool,
}

impl Node {
    pub fn new(nodes: usize) -> Self {
        Self {
            farm: None,
            clock: Clock::default(),
            incarnation: 0,
            local: LocalModule {
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
            },
            plane: Plane::new(),
            slower: Duration::ZERO,
            run: 0,
            heard: 0,
            heard_since: vec![Duration::ZERO; nodes],
            map: BucketMap::default(),
            map_version: 0,
            paused_until: Duration::ZERO,
            frozen_plane: false,
            inbox: VecDeque::new(),
            last_turn: Duration::ZERO,
            published: 0,
            wake_at: None,
            look_at: Duration::ZERO,
            told: vec![None; nodes],
            recounts: false,
            stopping: false,
            away: false,
        }
    }

    pub fn hears(&self, peer: usize) -> bool {
        self.heard & (1 << peer) != 0
    }

    /// Its module is up, and the node runs.
    pub fn ready(&self) -> bool {
        self.farm.is_some() && self.local.ready
    }

    pub fn stopped(&mut self) {
        self.stopping = false;
        self.local.state = ModuleState::Stop;
        self.local.quality = Quality::NotReady;
        self.local.ready = false;
        self.run += 1;
    }
}

impl Sim {
    pub(super) fn restart(&mut self, i: usize) -> Result<(), Breach> {
        if self.nodes[i].farm.is_some() {
            return Ok(());
        }
        let n = &mut self.nodes[i];
        let now = n.clock.local(self.now);
        n.incarnation = now.as_micros() as u64;
        let key = ClusterKey::from_bytes([9; 32]);
        let mut farm = Farm::new(&self.cluster, key, id(i), Incarnation(n.incarnation), now);
        farm.set_module(now, self.module.clone(), n.local.clone());
        for other in &self.others {
            let ready = LocalModule {
                state: ModuleState::Up,
                quality: Quality::Ready,
                ready: true,
                ..n.local.clone()
            };
            farm.set_module(now, other.clone(), ready);
        }
        n.farm = Some(farm);
        n.away = false;
        n.map = BucketMap::default();
        n.map_version = 0;
        n.published = 0;
        n.last_turn = now;
        self.input(i, Input::Timeout)
    }

    pub(super) fn crash(&mut self, i: usize) {
        let n = &mut self.nodes[i];
        n.farm = None;
        n.plane = Plane::new();
        n.inbox.clear();
        n.paused_until = Duration::ZERO;
        n.wake_at = None;
        n.recounts = false;
        n.heard = 0;
        n.stopped();
        self.plane_changed(i);
    }

    /// As `farm reload` does once the share is elsewhere; [`Self::restart`] is the next farmd.
    pub(super) fn leave_to_return(&mut self, i: usize) -> Result<(), Breach> {
        let n = &mut self.nodes[i];
        let now = n.clock.local(self.now);
        if let Some(farm) = &mut n.farm {
            farm.leave(now, true);
            self.finish_turn(i)?;
        }
        let n = &mut self.nodes[i];
        n.farm = None;
        n.away = true;
        n.plane.clear();
        n.inbox.clear();
        n.wake_at = None;
        n.recounts = false;
        n.heard = 0;
        self.plane_changed(i);
        Ok(())
    }

    /// The machine stands still with its clock, as a virtual one that is stopped and goes on.
    pub(super) fn stand_still(&mut self, i: usize, time: Duration) {
        let until = self.now + time;
        let n = &mut self.nodes[i];
        n.clock.stood += time;
        n.plane.lease_until += time;
        n.paused_until = until;
        n.frozen_plane = true;
        n.wake_at = Some(until);
        self.push(until, Ev::Wake { node: i });
    }

    /// STOP takes the VIP off the host first.
    pub(super) fn stop_now(&mut self, i: usize) -> Result<(), Breach> {
        let n = &mut self.nodes[i];
        n.stopped();
        n.plane.clear();
        n.plane.flows.clear();
        n.plane.not_before = n.farm.as_ref().map_or(0, Farm::plan_version) + 1;
        self.plane_changed(i);
        self.input(i, Input::Module)
    }

    /// Gives a node something to take, at once or after its pause.
    pub(super) fn input(&mut self, i: usize, input: Input) -> Result<(), Breach> {
        let n = &mut self.nodes[i];
        if n.farm.is_none() {
            return Ok(());
        }
        n.inbox.push_back(input);
        if self.now < n.paused_until {
            if n.wake_at.is_none_or(|at| at < n.paused_until) {
                n.wake_at = Some(n.paused_until);
                let until = n.paused_until;
                self.push(until, Ev::Wake { node: i });
            }
            return Ok(());
        }
        self.turn(i)
    }

    /// One turn of the owner loop: all that has come in.
    fn turn(&mut self, i: usize) -> Result<(), Breach> {
        let n = &mut self.nodes[i];
        let now = n.clock.local(self.now);
        let Some(farm) = &mut n.farm else { return Ok(()) };
        let gap = now - n.last_turn;
        n.last_turn = now;
        if gap >= self.cluster.detection_time() - self.cluster.heartbeat_interval {
            farm.handle_pause(now);
            self.note(|| format!("s{i} was paused for {gap:?}"));
            self.publish(i);
        }
        let n = &mut self.nodes[i];
        let inputs = std::mem::take(&mut n.inbox);
        for input in inputs {
            let n = &mut self.nodes[i];
            let Some(farm) = &mut n.farm else { return Ok(()) };
            match input {
                Input::Datagram(lan, payload) => {
                    let began = Instant::now();
                    // What cannot be used is refused; that is counted, not an error of the run.
                    let _ = farm.handle_datagram(now, lan, &payload);
                    if let Some(spent) = &mut self.spent {
                        spent.push(began.elapsed());
                    }
                }
                Input::Applied(version, held) => {
                    let connections = held.len() as u32;
                    farm.handle_applied(now, version, [((self.module.clone(), 0), (held, connections))].into());
                }
                Input::Module => farm.set_module(now, self.module.clone(), n.local.clone()),
                Input::Told => farm.handle_told_deaf(now),
                Input::Timeout => {}
            }
            self.take_events(i)?;
        }
        self.look_for_frames(i);
        let Some(farm) = &mut self.nodes[i].farm else {
            return Ok(());
        };
        if farm.poll_timeout() <= now {
            farm.handle_timeout(now);
        }
        self.finish_turn(i)
    }

    /// Looks at what the last input has led to.
    fn take_events(&mut self, i: usize) -> Result<(), Breach> {
        while let Some(event) = self.nodes[i].farm.as_mut().and_then(Farm::poll_event) {
            self.note(|| format!("s{i} {event:?}"));
            if let Event::Handover { event, .. } = &event {
                self.check_moves(i, event)?;
            }
            self.log.push((self.now, i, event));
        }
        let n = &mut self.nodes[i];
        if let Some(farm) = &n.farm
            && farm.plan_version() != n.map_version
            && let Some(map) = farm.map(&self.module, 0)
        {
            n.map_version = farm.plan_version();
            n.map.clone_from(map);
        }
        Ok(())
    }

    /// Hands a new plan to the data plane.
    fn publish(&mut self, i: usize) {
        let n = &mut self.nodes[i];
        let Some(farm) = &n.farm else { return };
        let version = farm.plan_version();
        if version == n.published {
            return;
        }
        n.published = version;
        let plan = farm.group_plan(&self.module, 0).map(Rc::new);
        let takes = n.slower + us(self.rng.range(0..=self.apply_time.as_micros() as u64));
        n.plane.busy_until = n.plane.busy_until.max(self.now + takes);
        let (at, incarnation) = (n.plane.busy_until, n.incarnation);
        let apply = Ev::Apply {
            node: i,
            incarnation,
            version,
            plan,
        };
        self.push(at, apply);
    }

    pub(super) fn finish_turn(&mut self, i: usize) -> Result<(), Breach> {
        self.take_events(i)?;
        self.publish(i);
        let n = &mut self.nodes[i];
        let now = n.clock.local(self.now);
        let Some(farm) = &mut n.farm else { return Ok(()) };
        n.plane.lease_until = n.clock.global(farm.lease_until(now));
        let handed_over = n.stopping && farm.is_handed_over(&self.module);
        let transmits: Vec<_> = std::iter::from_fn(|| farm.poll_transmit()).collect();
        let membership = farm.membership();
        let hears_us = |n: &NodeId| membership.peer(*n).is_some_and(Peer::hears_us);
        let heard = membership
            .heard(now)
            .iter()
            .filter(hears_us)
            .collect::<NodeSet>()
            .bits();
        for peer in (0..heard_len(heard)).filter(|p| heard & !n.heard & (1 << p) != 0) {
            n.heard_since[peer] = self.now;
        }
        n.heard = heard;
        let due = farm.poll_timeout();
        let due = self.looks_at(i).map_or(due, |at| at.min(due));
        let n = &mut self.nodes[i];
        let wake = n.clock.global(due).max(self.now);
        if n.wake_at.is_none_or(|at| at < self.now || at > wake) {
            n.wake_at = Some(wake);
            self.push(wake, Ev::Wake { node: i });
        }
        for transmit in transmits {
            self.sent[i] += 1;
            if transmit.lan == 0 {
                self.check_rate(i)?;
            }
            let payload = Rc::new(transmit.payload);
            // A broadcast comes to everybody.
            let to = match transmit.broadcast {
                true => (0..self.nodes.len()).filter(|n| *n != i).map(id).collect(),
                false => transmit.to,
            };
            for to in to.iter() {
                self.send(i, to.index(), transmit.lan, &payload);
            }
        }
        self.tell_the_deaf(i);
        if handed_over {
            self.note(|| format!("s{i} has handed over and stops"));
            self.stop_now(i)?;
        }
        Ok(())
    }

    /// A map that this node proposed has been committed: it moves what it must and no bucket more.
    fn check_moves(&mut self, i: usize, event: &handover::Event) -> Result<(), Breach> {
        let handover::Event::Committed { epoch, .. } = event else {
            return Ok(());
        };
        if epoch.0 as u8 != id(i).as_u8() {
            return Ok(());
        }
        let n = &self.nodes[i];
        let Some(map) = n.farm.as_ref().and_then(|f| f.map(&self.module, 0)) else {
            return Ok(());
        };
        let (moves, least) = (n.map.moves_to(map), least_moves(&n.map, map));
        self.maps += 1;
        self.moved += moves as u64;
        if moves == least {
            return Ok(());
        }
        Err(self.breach(format!(
            "s{i} committed {epoch:?}: {moves} buckets move, {least} have to"
        )))
    }

    pub(super) fn apply(&mut self, event: Ev) -> Result<(), Breach> {
        let Ev::Apply {
            node,
            incarnation,
            version,
            ref plan,
        } = event
        else {
            return Ok(());
        };
        let n = &mut self.nodes[node];
        if n.farm.is_none() || n.incarnation != incarnation {
            return Ok(());
        }
        if self.now < n.paused_until && n.frozen_plane {
            let until = n.paused_until;
            self.push(until, event);
            return Ok(());
        }
        let lost = n.plane.apply(id(node), version, plan.as_deref());
        self.leave_connections(node, &lost);
        self.plane_changed(node);
        let n = &mut self.nodes[node];
        let held = n.plane.held(self.now);
        n.plane.told = held.clone();
        n.plane.note_held(self.now);
        if !n.plane.flows.is_empty() && !n.recounts {
            n.recounts = true;
            self.push(self.now + RECOUNT, Ev::Recount { node, incarnation });
        }
        let open = self.nodes[node].plane.open_count();
        self.note(|| format!("s{node} applied {version}: {open} open"));
        self.check_connections()?;
        self.check_no_gap()?;
        self.input(node, Input::Applied(version, held))
    }

    pub(super) fn recount(&mut self, node: usize, incarnation: u64) -> Result<(), Breach> {
        let now = self.now;
        let n = &mut self.nodes[node];
        if n.farm.is_none() || n.incarnation != incarnation {
            return Ok(());
        }
        n.recounts = !n.plane.flows.is_empty();
        if !n.recounts {
            return Ok(());
        }
        let held = n.plane.held(now);
        n.plane.flows.retain(|_, end| *end > now);
        let version = n.plane.version;
        let changed = held != n.plane.told;
        n.plane.told.clone_from(&held);
        n.plane.note_held(now);
        self.push(now + RECOUNT, Ev::Recount { node, incarnation });
        if changed {
            self.input(node, Input::Applied(version, held))
        } else {
            Ok(())
        }
    }

    /// In some of the buckets that a node no longer owns its connections go on.
    fn leave_connections(&mut self, node: usize, lost: &Bits) {
        if self.flows == 0 {
            return;
        }
        for bucket in lost.iter() {
            if self.rng.chance(self.flows) {
                let end = self.now + us(self.rng.range(0..=self.flow_time.as_micros() as u64));
                self.connect(node, bucket, end);
            }
        }
    }
}

/// Positions below which all bits of `set` are.
fn heard_len(set: u64) -> usize {
    (u64::BITS - set.leading_zeros()) as usize
}

/// The least number of buckets that must change owner if `new` has the right shares: what nobody owned and what somebody owns too much of.
pub fn least_moves(old: &BucketMap, new: &BucketMap) -> usize {
    let (old, new) = (old.counts(), new.counts());
    let surplus = old
        .iter()
        .map(|(n, had)| had.saturating_sub(new.get(n).copied().unwrap_or(0)) as usize);
    let nobodys =
        |counts: &std::collections::BTreeMap<_, u32>| crate::id::BUCKETS - counts.values().sum::<u32>() as usize;
    surplus.sum::<usize>() + nobodys(&old).saturating_sub(nobodys(&new))
}
