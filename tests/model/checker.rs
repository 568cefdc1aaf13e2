//! The farm as a [`stateright::Model`], and one run of the checker with what it prints.

use std::fmt::Write as _;
use std::io::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use farm_core::config::{PartitionPolicy, cluster};
use farm_core::id::{NodeId, NodeSet};
use farm_core::wire::auth::ClusterKey;
use stateright::{Checker, HasDiscoveries, Model, Property};

use crate::broken::Broken;
use crate::ears;
use crate::faults::{Action, Budget};
use crate::node::Fixed;
use crate::promises::Promise;
use crate::world::World;

/// A farm and what may happen to it.
#[derive(Clone, Debug)]
pub struct Farms {
    /// As it was written.
    pub spec: String,
    /// Number of nodes.
    pub nodes: usize,
    /// Lans, all nodes on each.
    pub lans: usize,
    /// Weight of the first node; the others have 1.
    pub weight: u16,
    /// Which part of a divided farm serves.
    pub partition: PartitionPolicy,
    /// The module of the last node has another configuration.
    pub other_module: bool,
    /// The last node has another `cluster.xml`.
    pub other_cluster: bool,
    /// So many pairs do not talk with each other from the beginning on: the first two nodes, the next two, and so on.
    pub apart: usize,
    /// For how long the first two nodes do not talk with each other just before the checker begins.
    pub blink: Duration,
    /// Missed heartbeats after which a node is down.
    pub lost: u32,
    /// Faults of one run.
    pub budget: Budget,
    /// Connections are left in buckets that are given away.
    pub flows: bool,
    /// How long after the last fault the farm may need; if `None` twice the detection time, in which silence is noticed and a node joins,
    /// and four pulses.
    pub recovery: Option<Duration>,
    /// A rule that is broken, and by which nodes.
    pub broken: Option<(Broken, NodeSet)>,
    /// How long the farm has run when the checker begins; if two are apart, half of the time.
    pub warm_up: Duration,
}

impl Farms {
    /// Of words such as `nodes=3 lost=5 faults=2 crash=1`: number of nodes (2 if it is not said), missed heartbeats after which one is
    /// down (4), faults in all (1), `lans` (1), the `weight` of the first node (1), and what the fields of [`Budget`] are called. `any_order`
    /// (datagrams overtake each other without limit), `flows`, `majority` and `witness` (the partition policies), `other` and `cluster` (the
    /// last node has another configuration of the module, another `cluster.xml`) take 0 or 1. `apart` is how many pairs, from the first node on, have lost each
    /// other before the checker begins. `blink` is for how many milliseconds, just before it begins, the first two nodes do not talk with each other.
    ///
    /// # Errors
    /// Says which word is none of these.
    pub fn parse(spec: &str) -> Result<Self, String> {
        let mut farms = Self {
            spec: spec.to_owned(),
            nodes: 2,
            lans: 1,
            weight: 1,
            partition: PartitionPolicy::Serve,
            other_module: false,
            other_cluster: false,
            apart: 0,
            blink: Duration::ZERO,
            lost: 4,
            budget: Budget {
                faults: 1,
                ..Budget::default()
            },
            flows: false,
            recovery: None,
            broken: None,
            warm_up: Duration::from_secs(1),
        };
        for word in spec.split_whitespace() {
            let wrong = || format!("`{word}` in `{spec}` is not what a space has, `nodes=3` or `crash=1` are");
            let (name, value) = word.split_once('=').ok_or_else(wrong)?;
            let value: u8 = value.parse().map_err(|_| wrong())?;
            match name {
                "nodes" if (2..=8).contains(&value) => farms.nodes = value.into(),
                "lans" if (1..=4).contains(&value) => farms.lans = value.into(),
                "weight" if value > 0 => farms.weight = value.into(),
                "majority" if value < 2 => farms.divided_by(PartitionPolicy::Majority, value),
                "witness" if value < 2 => farms.divided_by(PartitionPolicy::Witness, value),
                "lost" => farms.lost = value.into(),
                "any_order" => farms.budget.pick = if value > 0 { Budget::UNLIMITED } else { 0 },
                "flows" => farms.flows = value > 0,
                "other" if value < 2 => farms.other_module = value > 0,
                "cluster" if value < 2 => farms.other_cluster = value > 0,
                "apart" => farms.apart = value.into(),
                "blink" => farms.blink = Duration::from_millis(value.into()),
                name => *farms.budget.word(name).ok_or_else(wrong)? = value,
            }
        }
        if 2 * farms.apart > farms.nodes {
            return Err(format!("`{spec}`: {} pairs are more than the nodes make", farms.apart));
        }
        Ok(farms)
    }

    fn divided_by(&mut self, policy: PartitionPolicy, value: u8) {
        if value > 0 {
            self.partition = policy;
        }
    }

    fn fixed(&self, broken: Option<(Broken, NodeSet)>) -> Fixed {
        let lan = |l: usize| {
            let nodes = (0..self.nodes).map(|n| format!("<node name=\"s{n}\" addr=\"198.18.{l}.{}\"/>", n + 1));
            format!("<lan name=\"lan{l}\">{}</lan>", nodes.collect::<String>())
        };
        let text = format!(
            "<cluster><lans slost_count=\"{}\">{}</lans></cluster>",
            self.lost,
            (0..self.lans).map(lan).collect::<String>()
        );
        let (cluster, _) = cluster::parse("cluster.xml", &text).expect("the model's cluster.xml is in order");
        let usual = 2 * cluster.detection_time() + 4 * cluster.heartbeat_interval;
        let last = NodeId::new(self.nodes - 1);
        Fixed {
            cluster,
            key: ClusterKey::from_bytes([9; 32]),
            module: "web".parse().expect("`web` is a module's name"),
            broken: broken.map(|(rule, _)| rule),
            culprits: broken.map_or(NodeSet::EMPTY, |(_, nodes)| nodes),
            flows: self.flows,
            weight: self.weight,
            partition: self.partition,
            recovery: self.recovery.unwrap_or(usual),
            other_module: last.filter(|_| self.other_module),
            other_cluster: last.filter(|_| self.other_cluster),
            apart: self.apart,
            blink: self.blink,
            remembers: match self.budget.faults {
                // Of two nobody is told.
                _ if self.budget.deaf == 0 || self.nodes == 2 => Duration::ZERO,
                // Somebody goes on telling it.
                0 | 1 => ears::TELL_INTERVAL,
                _ => ears::BELIEVED,
            },
        }
    }

    /// Walks all states, or until a promise is broken; prints how many there were.
    pub fn check(&self) -> Verdict {
        let fixed = self.fixed(self.broken);
        let initial = World::new(&self.fixed(None), self.nodes, self.budget, self.warm_up);
        let model = Checked {
            initial,
            fixed: Arc::new(fixed),
        };
        let started = Instant::now();
        let checker = model
            .checker()
            .finish_when(HasDiscoveries::AnyFailures)
            .spawn_bfs()
            .join();
        // The checker goes on for a while after the first breach, and its map has another order in each run: the shortest way counts.
        let ways = checker
            .discoveries()
            .into_iter()
            .map(|(name, path)| (path.into_vec(), name));
        let found = ways.min_by_key(|(way, name)| (way.len(), *name)).map(|(way, _)| {
            let mut trace = String::new();
            let mut promise = None;
            for (world, action) in way {
                for (node, event) in &world.events {
                    let _ = writeln!(trace, "      s{}: {event:?}", node.index());
                }
                promise = world.breach.as_ref().map(|b| b.promise);
                let _ = match action {
                    Some(Action::Next) => writeln!(trace, "  {world:?}: next {:?}", world.next_work()),
                    Some(action) => writeln!(trace, "  {world:?}: {action:?} {:?}", world.next_work()),
                    None => writeln!(trace, "  {world:?}"),
                };
            }
            (promise, trace)
        });
        let verdict = Verdict {
            states: checker.state_count(),
            unique: checker.unique_state_count(),
            depth: checker.max_depth(),
            promise: found.as_ref().and_then(|(promise, _)| *promise),
            trace: found.map_or(String::new(), |(_, trace)| trace),
        };
        // Straight to the terminal: the harness keeps what a test that passes prints.
        let _ = writeln!(
            std::io::stderr(),
            "{}: {} states, {} of them different, depth {}, {:.1} s{}",
            self.spec,
            verdict.states,
            verdict.unique,
            verdict.depth,
            started.elapsed().as_secs_f64(),
            verdict.promise.map_or(String::new(), |p| format!(", {p:?} is broken")),
        );
        verdict
    }

    /// Every state keeps every promise.
    pub fn holds(&self) {
        let verdict = self.check();
        let (promise, trace) = (verdict.promise, &verdict.trace);
        assert!(promise.is_none(), "{}: {promise:?} is broken\n{trace}", self.spec);
        // A farm at rest alone has this many.
        assert!(
            verdict.unique > 40 * self.nodes,
            "{}: only {} states",
            self.spec,
            verdict.unique
        );
    }
}

/// What `FARM_MODEL` asks for.
pub enum Asked {
    /// It is not set.
    Default,
    /// More than usual.
    Deep,
    /// This space.
    One(String),
}

/// See [`Asked`].
pub fn asked() -> Asked {
    match std::env::var("FARM_MODEL") {
        Err(_) => Asked::Default,
        Ok(word) if word == "deep" => Asked::Deep,
        Ok(spec) => Asked::One(spec),
    }
}

/// What a run has shown.
pub struct Verdict {
    /// States reached, doubles counted.
    pub states: usize,
    /// Different ones.
    pub unique: usize,
    /// Longest way to one.
    pub depth: usize,
    /// A promise that is broken.
    pub promise: Option<Promise>,
    /// The way to it.
    pub trace: String,
}

#[derive(Clone)]
struct Checked {
    initial: World,
    fixed: Arc<Fixed>,
}

impl Model for Checked {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![self.initial.clone()]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        world.actions(actions);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        Some(world.step(action, &self.fixed))
    }

    fn properties(&self) -> Vec<Property<Self>> {
        fn kept(world: &World, promise: Promise) -> bool {
            world.breach.as_ref().is_none_or(|breach| breach.promise != promise)
        }
        vec![
            Property::always("exclusion", |_, world| kept(world, Promise::Exclusion)),
            Property::always("coverage", |_, world| kept(world, Promise::Coverage)),
            Property::always("few moves", |_, world| kept(world, Promise::FewMoves)),
            Property::always("continuity", |_, world| kept(world, Promise::Continuity)),
            Property::always("self-fencing", |_, world| kept(world, Promise::SelfFencing)),
            Property::always("completeness", |_, world| kept(world, Promise::Completeness)),
            Property::always("accuracy", |_, world| kept(world, Promise::Accuracy)),
        ]
    }
}
