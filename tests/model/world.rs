//! The state of the model: some nodes, their network, the clock, and what may still go wrong.
//!
//! Whatever is under way has a moment at which it is due: a datagram after [`LATENCY`], a plan of a data plane as long after it was
//! published, a node's own turn at [`farm_core::farm::Farm::poll_timeout`]. [`World::step`] does one of these, or one fault, and then has
//! the promises checked. Called by [`crate::checker`].

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use farm_core::farm::Event;
use farm_core::id::{NodeId, NodeSet};

use crate::faults::{Action, Budget};
use crate::fingerprint::START;
use crate::node::{Datagram, Fixed, Input, Node, Outcome};
use crate::plane::Bits;
use crate::promises::Breach;

/// How long a datagram is under way, and a plan until the data plane takes it.
pub const LATENCY: Duration = Duration::from_millis(1);

/// Something under way.
#[derive(Clone, Debug)]
pub enum Work {
    /// A heartbeat to a node.
    Datagram(NodeId, Arc<Datagram>),
    /// A data plane takes its next plan.
    Plan(NodeId),
    /// A node's module is ready.
    Ready(NodeId),
    /// The next farmd of a node that has left to return runs.
    Back(NodeId),
    /// A command to a deaf node.
    Told(NodeId),
    /// A heartbeat to a node that somebody has recorded; again a pulse later.
    Recording(NodeId, Arc<Datagram>),
}

/// When it is due, and what.
#[derive(Clone, Debug)]
pub struct Item {
    /// When.
    pub due: Duration,
    /// It has been kept back before.
    pub late: bool,
    /// What.
    pub work: Work,
}

/// See the module doc.
#[derive(Clone)]
pub struct World {
    /// The present.
    pub now: Duration,
    /// All nodes, whether or not they run.
    pub nodes: Vec<Arc<Node>>,
    /// What is under way, the earliest first.
    pub queue: Vec<Item>,
    /// Per node, to whom nothing gets from it.
    pub cut: Vec<NodeSet>,
    /// Nodes at which no heartbeats come in, but commands.
    pub deaf: NodeSet,
    /// Nodes at which nothing comes in.
    pub dead: NodeSet,
    /// When a deaf node was last told so: row by row, by each node to each.
    pub told: Vec<Option<Duration>>,
    /// The lan on which nothing gets through.
    pub lan_down: Option<usize>,
    /// Per node, since when the witness has not been answering it.
    pub hidden: Vec<Option<Duration>>,
    /// When each pair, the lower one first, was cut off from each other last, in both directions.
    pub parted: Vec<Option<Duration>>,
    /// When something that can come in was sent last: row by row, by each node to each.
    pub spoken: Vec<Duration>,
    /// What may still go wrong.
    pub budget: Budget,
    /// Nothing has gone wrong, and nothing was set right, since.
    pub calm_since: Duration,
    /// The promise that was not kept.
    pub breach: Option<Breach>,
    /// What the nodes had to say in the last step; for traces only.
    pub events: Vec<(NodeId, Event)>,
    /// Who took the last turn, and whether by its own clock.
    pub last: Option<(NodeId, bool)>,
    digest: u64,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = (self.now.saturating_sub(START)).as_secs_f64() * 1000.0;
        let open = self.nodes.iter().map(|n| n.plane.accepts(self.now).len());
        write!(f, "{at:.0} ms, accepting {:?}", open.collect::<Vec<_>>())?;
        self.breach.iter().try_for_each(|breach| write!(f, ", {breach}"))
    }
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.digest.hash(state);
    }
}

impl World {
    /// `nodes` nodes that have started a third of a pulse after each other and have run for `warm_up`, and as long again after the first two
    /// have lost each other, if they have, or for as long as they have just lost each other.
    pub fn new(fixed: &Fixed, nodes: usize, budget: Budget, warm_up: Duration) -> Self {
        let ids = (0..nodes).filter_map(NodeId::new);
        let mut world = Self {
            now: START,
            nodes: ids
                .clone()
                .map(|id| Arc::new(Node::new(id, nodes, fixed.cluster.lans.len())))
                .collect(),
            queue: Vec::new(),
            cut: vec![NodeSet::EMPTY; nodes],
            deaf: NodeSet::EMPTY,
            dead: NodeSet::EMPTY,
            told: vec![None; nodes * nodes],
            lan_down: None,
            hidden: vec![None; nodes],
            parted: vec![None; nodes * nodes],
            spoken: vec![START; nodes * nodes],
            budget: Budget::default(),
            calm_since: START,
            breach: None,
            last: None,
            events: Vec::new(),
            digest: 0,
        };
        for id in ids {
            world.restart(id, fixed);
            let until = world.now + fixed.pulse() / 3;
            while world.due().is_some_and(|at| at < until) {
                world.next(fixed);
            }
            world.now = until;
        }
        world.run_until(START + warm_up, fixed);
        let split = |world: &Self, pair: usize| Action::Split(world.nodes[2 * pair].id, world.nodes[2 * pair + 1].id);
        for pair in 0..fixed.apart {
            world.act(split(&world, pair), fixed);
        }
        if fixed.apart > 0 {
            world.run_until(START + 2 * warm_up, fixed);
        }
        if !fixed.blink.is_zero() {
            world.act(split(&world, 0), fixed);
            world.run_until(world.now + fixed.blink, fixed);
            world.act(Action::Mend, fixed);
        }
        world.budget = budget;
        world.calm_since = world.now;
        world.finish_step(fixed);
        world
    }

    /// Without a fault.
    fn run_until(&mut self, until: Duration, fixed: &Fixed) {
        while self.now < until {
            self.next(fixed);
        }
    }

    /// A node.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// A node, to be changed.
    pub fn node_mut(&mut self, id: NodeId) -> &mut Node {
        Arc::make_mut(&mut self.nodes[id.index()])
    }

    /// All that can happen now.
    pub fn actions(&self, actions: &mut Vec<Action>) {
        if self.breach.is_some() {
            return;
        }
        actions.push(Action::Next);
        let mut offer = |action| {
            if self.budget.allows(action) {
                actions.push(action);
            }
        };
        let next = self
            .queue
            .first()
            .filter(|item| self.due() == Some(item.due.max(self.now)));
        match next {
            Some(Item {
                work: Work::Datagram(..),
                late,
                ..
            }) => {
                offer(Action::Lose);
                offer(Action::Record);
                if !late {
                    offer(Action::Late);
                    offer(Action::Twice);
                }
            }
            Some(Item {
                work: Work::Plan(_),
                late: false,
                ..
            }) => offer(Action::Slow),
            _ => {}
        }
        if let Some(first) = next {
            let near = |item: &Item| item.due <= first.due + LATENCY && matches!(item.work, Work::Datagram(..));
            let others = self.queue.iter().enumerate().skip(1).filter(|(_, item)| near(item));
            others.for_each(|(i, _)| offer(Action::Pick(i)));
        }
        self.offer_faults(&mut offer);
    }

    /// What happens to one node is tried after that node's turns only: before its next turn nobody can tell when it was. What ends a fault
    /// is tried whenever somebody's pulse is due.
    fn offer_faults(&self, offer: &mut impl FnMut(Action)) {
        let Some((last, by_clock)) = self.last else { return };
        let node = self.node(last);
        if node.farm.is_some() && !node.paused {
            offer(Action::Crash(last));
            offer(Action::Pause(last));
            if node.local.ready && !node.stopping {
                offer(Action::Stop(last));
                offer(Action::Leave(last));
                offer(Action::Reload(last));
            }
            offer(Action::Deaf(last));
            offer(Action::Dead(last));
            if last.index() < self.nodes.len() / 2 {
                offer(Action::Oneway);
            }
            for to in self
                .nodes
                .iter()
                .filter(|to| to.id != last && !self.cut[last.index()].contains(to.id))
            {
                offer(Action::Cut(last, to.id));
                if last < to.id {
                    offer(Action::Split(last, to.id));
                }
            }
        }
        for lan in (0..node.seen.len()).filter(|_| self.lan_down.is_none()) {
            offer(Action::LanDown(lan));
        }
        if self.hidden[last.index()].is_none() {
            offer(Action::Hide(last));
        }
        if !node.plane.flows.is_empty() {
            offer(Action::Close(last));
        }
        if !by_clock {
            return;
        }
        for node in &self.nodes {
            match &node.farm {
                None if node.incarnation > 0 && !node.away => offer(Action::Restart(node.id)),
                Some(_) if node.paused => offer(Action::Wake(node.id)),
                Some(_) if !node.local.ready && !node.stopping => offer(Action::Start(node.id)),
                _ => {}
            }
            if self.hidden[node.id.index()].is_some() {
                offer(Action::Show(node.id));
            }
        }
        if self.lan_down.is_some() || self.has_broken_way() {
            offer(Action::Mend);
        }
    }

    /// The world after `action`.
    pub fn step(&self, action: Action, fixed: &Fixed) -> Self {
        let mut world = self.clone();
        world.events.clear();
        world.budget.spend(action);
        if !matches!(action, Action::Next | Action::Pick(_)) {
            world.calm_since = world.now;
        }
        world.act(action, fixed);
        world.finish_step(fixed);
        world
    }

    fn act(&mut self, action: Action, fixed: &Fixed) {
        match action {
            Action::Next => self.next(fixed),
            Action::Pick(index) => {
                let item = self.queue.remove(index);
                self.now = self.now.max(item.due);
                self.work(item.work, fixed);
            }
            Action::Lose => drop(self.queue.remove(0)),
            Action::Late => self.keep_back(fixed.pulse() * 4 / 5),
            Action::Twice => {
                let copy = self.queue[0].clone();
                self.keep_back(fixed.pulse() * 4 / 5);
                self.queue.insert(0, copy);
                self.next(fixed);
            }
            Action::Record => {
                let first = self.queue.first().map(|item| (item.due, item.work.clone()));
                if let Some((due, Work::Datagram(to, datagram))) = first {
                    self.push(due + fixed.pulse(), Work::Recording(to, datagram));
                }
                self.next(fixed);
            }
            Action::Slow => self.keep_back(fixed.pulse()),
            Action::Crash(id) => {
                self.node_mut(id).crash();
                self.forget(id);
            }
            Action::Restart(id) => self.restart(id, fixed),
            Action::Pause(id) => {
                self.node_mut(id).paused = true;
                self.last = None;
            }
            Action::Wake(id) => {
                let now = self.now;
                let node = self.node_mut(id);
                node.paused = false;
                node.upset_at = Some(now);
                self.input(id, Input::Timeout, fixed);
            }
            Action::Cut(from, to) => self.cut[from.index()].insert(to),
            Action::Split(a, b) => {
                self.cut[a.index()].insert(b);
                self.cut[b.index()].insert(a);
            }
            Action::Oneway => {
                let half = self.nodes.len() / 2;
                let others: NodeSet = self.nodes[half..].iter().map(|n| n.id).collect();
                for to in &mut self.cut[..half] {
                    *to = NodeSet::from_bits(to.bits() | others.bits());
                }
            }
            Action::Deaf(id) => self.deaf.insert(id),
            Action::Dead(id) => self.close_ear(id),
            Action::LanDown(lan) => self.lan_down = Some(lan),
            Action::Hide(id) => self.witness(id, false, fixed),
            Action::Show(id) => self.witness(id, true, fixed),
            Action::Mend => {
                self.cut.fill(NodeSet::EMPTY);
                self.open_ears();
                self.lan_down = None;
            }
            Action::Stop(id) => {
                self.node_mut(id).hand_over();
                self.input(id, Input::Module, fixed);
            }
            Action::Leave(id) => {
                let now = self.now;
                self.node_mut(id).end(now, fixed);
                self.input(id, Input::Module, fixed);
            }
            Action::Reload(id) => {
                self.node_mut(id).reload();
                self.input(id, Input::Module, fixed);
            }
            Action::Start(id) => {
                self.node_mut(id).ready();
                self.input(id, Input::Module, fixed);
            }
            Action::Close(id) => {
                let plane = &mut self.node_mut(id).plane;
                plane.flows = Bits::NONE;
                let version = plane.sheet.version;
                self.input(id, Input::Applied(version, Box::new(Bits::NONE)), fixed);
            }
        }
    }

    /// When something happens next.
    fn due(&self) -> Option<Duration> {
        let turns = self.nodes.iter().filter_map(|n| n.wakes_at());
        let queued = self.queue.first().map(|item| item.due);
        turns.chain(queued).min().map(|at| at.max(self.now))
    }

    /// What [`Action::Next`] does, in words.
    pub fn next_work(&self) -> String {
        let due = self.due();
        match self.queue.first().filter(|item| due.is_some_and(|due| item.due <= due)) {
            Some(Item {
                work: Work::Datagram(to, d),
                ..
            }) => {
                format!("heartbeat {} of s{} to s{}", d.seq, d.from.index(), to.index())
            }
            Some(Item {
                work: Work::Plan(of), ..
            }) => format!("plan of s{}", of.index()),
            Some(Item {
                work: Work::Ready(of), ..
            }) => format!("module of s{} is ready", of.index()),
            Some(Item {
                work: Work::Back(of), ..
            }) => format!("s{} is back", of.index()),
            Some(Item {
                work: Work::Told(to), ..
            }) => format!("command to s{}, which is deaf", to.index()),
            Some(Item {
                work: Work::Recording(to, d),
                ..
            }) => format!("recorded heartbeat {} of s{} to s{}", d.seq, d.from.index(), to.index()),
            None => "turn".to_owned(),
        }
    }

    fn next(&mut self, fixed: &Fixed) {
        let Some(due) = self.due() else { return };
        self.now = due;
        if self.queue.first().is_some_and(|item| item.due <= due) {
            let item = self.queue.remove(0);
            return self.work(item.work, fixed);
        }
        let turn = self.nodes.iter().find(|n| n.wakes_at().is_some_and(|at| at <= due));
        if let Some(id) = turn.map(|n| n.id) {
            self.input(id, Input::Timeout, fixed);
        }
    }

    fn work(&mut self, work: Work, fixed: &Fixed) {
        match work {
            Work::Datagram(to, datagram) => self.input(to, Input::Datagram(datagram), fixed),
            Work::Plan(id) => {
                let flows = fixed.flows;
                let plane = &mut self.node_mut(id).plane;
                let before = plane.flows;
                if let Some(version) = plane.take(flows) {
                    let held = plane.held();
                    if held != before {
                        self.calm_since = self.now;
                    }
                    self.input(id, Input::Applied(version, Box::new(held)), fixed);
                }
            }
            Work::Ready(id) => {
                self.node_mut(id).ready();
                self.input(id, Input::Module, fixed);
            }
            Work::Back(id) => {
                let (now, answers) = (self.now, self.hidden[id.index()].is_none());
                self.calm_since = now;
                self.node_mut(id).come_back(now, answers, fixed);
                self.input(id, Input::Timeout, fixed);
            }
            Work::Told(id) => self.input(id, Input::Told, fixed),
            Work::Recording(to, datagram) => {
                self.push(self.now + fixed.pulse(), Work::Recording(to, Arc::clone(&datagram)));
                self.input(to, Input::Datagram(datagram), fixed);
            }
        }
    }

    fn restart(&mut self, id: NodeId, fixed: &Fixed) {
        let (now, answers) = (self.now, self.hidden[id.index()].is_none());
        self.node_mut(id).start(now, answers, fixed);
        self.push(now + fixed.pulse(), Work::Ready(id));
        self.input(id, Input::Timeout, fixed);
    }

    fn witness(&mut self, id: NodeId, answers: bool, fixed: &Fixed) {
        self.hidden[id.index()] = (!answers).then_some(self.now);
        self.node_mut(id).notice_witness(answers, fixed);
        self.input(id, Input::Module, fixed);
    }

    fn input(&mut self, id: NodeId, input: Input, fixed: &Fixed) {
        let now = self.now;
        let by_clock = matches!(input, Input::Timeout);
        let outcome = self.node_mut(id).handle(now, input, fixed);
        self.last = Some((id, by_clock));
        self.follow(id, outcome, fixed);
        self.tell_the_deaf(id);
    }

    /// Does what came of a node's turn.
    pub fn follow(&mut self, id: NodeId, outcome: Outcome, fixed: &Fixed) {
        let at = self.now + LATENCY;
        for _ in 0..outcome.published {
            self.push(at, Work::Plan(id));
        }
        self.events.extend(outcome.events.into_iter().map(|event| (id, event)));
        for (to, datagram) in outcome.sent {
            let cut = self.unreached_by(id);
            if self.lan_down == Some(datagram.lan) {
                continue;
            }
            for to in to.iter().filter(|to| !cut.contains(*to)) {
                let pair = id.index() * self.nodes.len() + to.index();
                self.spoken[pair] = self.now;
                self.push(at, Work::Datagram(to, Arc::clone(&datagram)));
            }
        }
        if let Some(heartbeat) = outcome.proposed {
            self.check_moves(id, &heartbeat, fixed);
        }
        for version in outcome.too_early {
            let held = self.node(id).plane.held();
            self.input(id, Input::Applied(version, Box::new(held)), fixed);
        }
        if outcome.handed_over && self.node(id).reloading {
            self.replace(id, fixed);
        } else if outcome.handed_over {
            self.node_mut(id).stop();
            self.input(id, Input::Module, fixed);
            if self.node(id).ending {
                let now = self.now;
                let goodbye = self.node_mut(id).leave(now, fixed);
                self.follow(id, goodbye, fixed);
                self.forget(id);
            }
        }
    }

    /// Nothing of a node that has ended is under way but what it has sent.
    pub fn forget(&mut self, id: NodeId) {
        self.queue.retain(|item| match &item.work {
            Work::Datagram(..) | Work::Told(_) | Work::Recording(..) => true,
            Work::Plan(of) | Work::Ready(of) | Work::Back(of) => *of != id,
        });
        self.last = None;
    }

    /// Puts something under way.
    pub fn push(&mut self, due: Duration, work: Work) {
        // A data plane takes its plans one after the other.
        let before = self.queue.iter().rev().find(|item| match (&item.work, &work) {
            (Work::Plan(a), Work::Plan(b)) => a == b,
            _ => false,
        });
        let due = before.map_or(due, |item| item.due.max(due));
        let at = self.queue.partition_point(|item| item.due <= due);
        self.queue.insert(at, Item { due, late: false, work });
    }

    fn keep_back(&mut self, by: Duration) {
        let Some(first) = self.queue.first() else { return };
        let due = self.now.max(first.due) + by;
        let plane = match first.work {
            Work::Plan(id) => Some(id),
            _ => None,
        };
        for (i, item) in self.queue.iter_mut().enumerate() {
            let waits = matches!(item.work, Work::Plan(id) if Some(id) == plane);
            if i == 0 || waits {
                item.due = item.due.max(due);
                item.late = true;
            }
        }
        self.queue.sort_by_key(|item| item.due);
    }

    fn finish_step(&mut self, fixed: &Fixed) {
        self.check_promises(fixed);
        self.digest = self.fingerprint(fixed);
    }
}
