//! Part `plan` of `farm-lab bench`: how long a plan takes, from a node that comes or goes to the tables in the kernel.
//!
//! Owns the farms of 32 nodes that exist only as their hand-over, the plans made from them, and the arithmetic. No packet flows; what is
//! timed is the daemon's own code: the step of the hand-over with the bucket states that follow from it, the tables of the program at tc, and the
//! socket filter of the raw data plane.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use farm_core::balance::filter;
use farm_core::balance::hash::Seed;
use farm_core::balance::plan::{GroupPlan, Plan, RulePlan, VipPlan};
use farm_core::config::{Affinity, L2Mode, PlaneChoice, Protocol};
use farm_core::handover::{Closed, Event, Handover, PeerGroup, Surroundings};
use farm_core::id::{BUCKETS, MacAddr, NodeId, NodeSet};
use farm_core::wire::heartbeat::GroupReport;
use farm_lab::outcome::{Outcome, Table};
use farm_sys::bpf::Filter;
use farm_sys::netns::NetNs;
use farm_sys::packet_socket::PacketRing;
use farmd::dataplane::kernel::Kernel;
use farmd::dataplane::{change, kernel_program};

use crate::stop;

/// Nodes of the farm.
const NODES: usize = 32;
/// Times a node goes and comes back.
const ROUNDS: usize = 100;
/// Of a network namespace's loopback interface.
const LOOPBACK: u32 = 1;
/// What each step may take.
const GOAL: Duration = Duration::from_millis(1);
const VIRTUAL_MAC: MacAddr = MacAddr([0x5a, 0xfe, 198, 18, 0, 20]);

/// How long one step took over all rounds, in microseconds.
struct Row {
    /// What was done.
    step: String,
    /// Half of the times took no longer.
    median_us: f64,
    /// 99 of 100 took no longer.
    p99_us: f64,
    /// The issue of every change of buckets, which is to take a millisecond at most; the others come with a new configuration.
    has_goal: bool,
}

impl Row {
    fn new(step: impl Into<String>, has_goal: bool, mut times: Vec<Duration>) -> Self {
        times.sort();
        let at = |share: usize| times.get((times.len() * share / 100).min(times.len().saturating_sub(1)));
        let micros = |share| at(share).map_or(0.0, |time| time.as_secs_f64() * 1e6);
        Self {
            step: step.into(),
            median_us: micros(50),
            p99_us: micros(99),
            has_goal,
        }
    }
}

/// Name of this part.
pub const NAME: &str = "plan";

/// Measures all steps.
///
/// # Errors
/// Not root, or the kernel does not take the program.
pub fn run() -> Result<Outcome> {
    let goal = GOAL.as_secs_f64() * 1e6;
    let mut outcome = Outcome::new(NAME, 0);
    let mut table = Table::new(
        &format!("A plan of {BUCKETS} buckets and {NODES} nodes, in µs"),
        &["step", "p50", "p99", "goal p50"],
    );
    for row in measure()? {
        let goal_cell = if row.has_goal {
            format!("{goal:.0}")
        } else {
            "–".to_owned()
        };
        if row.has_goal && row.median_us > goal {
            outcome.missed.push(format!(
                "plan, {}: {:.0} µs, goal {goal:.0} µs",
                row.step, row.median_us
            ));
        }
        table.row([
            row.step,
            format!("{:.0}", row.median_us),
            format!("{:.0}", row.p99_us),
            goal_cell,
        ]);
    }
    outcome.tables.push(table);
    Ok(outcome)
}

/// All steps.
fn measure() -> Result<Vec<Row>> {
    let mut farm = Farm::settled()?;
    let mut rows = Vec::from(farm.compute()?);
    let moves = farm.two_maps()?;
    let this = farm.view.first().context("the first node")?;
    let ns = NetNs::create().context("the tables are written in a network namespace of their own, which needs root")?;
    for addresses in [1, 8, 64] {
        for rules in [1, 100, 10_000] {
            stop::check()?;
            let plans = plans(this, &moves, addresses, rules);
            rows.extend(ns.run(|| install(&plans, addresses, rules))?);
        }
    }
    rows.extend(ns.run(|| filters(&plans(this, &moves, 1, 1)))?);
    Ok(rows)
}

/// One group at each of the nodes; reports go from all to all at once.
struct Farm {
    nodes: Vec<Handover>,
    reports: Vec<GroupReport>,
    view: NodeSet,
    version: u64,
    /// The steps in which a coordinator has dealt the buckets anew.
    deals: Vec<Duration>,
}

fn nodes() -> impl Iterator<Item = NodeId> {
    (0..NODES).filter_map(NodeId::new)
}

impl Farm {
    fn settled() -> Result<Self> {
        let mut farm = Self {
            nodes: nodes().map(Handover::new).collect(),
            reports: vec![GroupReport::default(); NODES],
            view: nodes().collect(),
            version: 0,
            deals: Vec::new(),
        };
        farm.settle();
        let open: usize = farm.nodes.iter().map(Handover::open_count).sum();
        ensure!(
            open == farm_core::id::BUCKETS,
            "the farm has not settled: {open} buckets are open"
        );
        Ok(farm)
    }

    /// One step of node `i` with the plan that follows from it; how long that took, if there is one.
    fn advance(&mut self, i: usize) -> Option<Duration> {
        let peers: BTreeMap<NodeId, PeerGroup<'_>> = self
            .view
            .iter()
            .filter(|node| node.index() != i)
            .map(|node| {
                let peer = PeerGroup {
                    eligible: true,
                    fenced: false,
                    hears_us: true,
                    report: &self.reports[node.index()],
                };
                (node, peer)
            })
            .collect();
        let around = Surroundings {
            view: self.view,
            coordinator: self.view.first(),
            weight: 1,
            closed: Closed::No,
            unheard: false,
            peers: &peers,
            away: &BTreeMap::new(),
        };
        let began = Instant::now();
        let node = &mut self.nodes[i];
        let outcome = node.advance(&around);
        let proposes = |event: &Event| matches!(event, Event::Proposed { .. });
        if outcome.events.iter().any(proposes) {
            self.deals.push(began.elapsed());
        }
        if !outcome.plan_changed {
            return None;
        }
        let plan = node.plan("web/default".to_owned());
        let took = began.elapsed();
        drop(plan);
        self.version += 1;
        node.planned(self.version);
        Some(took)
    }

    /// Reports and plans go round until nothing changes any more; the times of all plans.
    fn settle(&mut self) -> Vec<Duration> {
        let mut times = Vec::new();
        // What one node says the others act on in the next round, or in the one after.
        let mut quiet = 0;
        while quiet < 4 {
            let before = self.version;
            for node in self.view.iter().collect::<Vec<_>>() {
                let i = node.index();
                times.extend(self.advance(i));
                self.nodes[i].handle_applied(self.version, Default::default(), 0);
                times.extend(self.advance(i));
                self.reports[i] = self.nodes[i].report(1, true);
            }
            quiet = if self.version == before { quiet + 1 } else { 0 };
        }
        times
    }

    fn compute(&mut self) -> Result<[Row; 2]> {
        let mut times = Vec::new();
        self.deals.clear();
        for round in 0..ROUNDS / 10 {
            stop::check()?;
            // Never the coordinator: it would be another one's map then.
            let gone = NodeId::new(1 + round % (NODES - 1)).context("a node of the farm")?;
            self.view.remove(gone);
            times.extend(self.settle());
            self.view.insert(gone);
            times.extend(self.settle());
        }
        let step = format!("compute: the step of a hand-over and its plan, {NODES} nodes");
        let deal = format!("compute: a coordinator deals the buckets anew, {NODES} nodes");
        Ok([
            Row::new(deal, true, std::mem::take(&mut self.deals)),
            Row::new(step, true, times),
        ])
    }

    /// Node 0's part before and after a node goes.
    fn two_maps(&mut self) -> Result<[GroupPlan; 2]> {
        let whole = self.nodes[0].plan("web/default".to_owned());
        self.view.remove(NodeId::new(NODES - 1).context("the last node")?);
        self.settle();
        let after = self.nodes[0].plan("web/default".to_owned());
        ensure!(whole.states != after.states, "no bucket has moved");
        Ok([whole, after])
    }
}

/// Plans of one configuration, which share its rules.
fn plans(this: NodeId, groups: &[GroupPlan; 2], addresses: u32, rules: u32) -> [Plan; 2] {
    let first = plan(this, &groups[0], addresses, rules);
    let second = Plan {
        groups: vec![groups[1].clone()],
        ..first.clone()
    };
    [first, second]
}

/// A plan with so many addresses, each with all the rules.
fn plan(this: NodeId, group: &GroupPlan, addresses: u32, rules: u32) -> Plan {
    let rules: Arc<[RulePlan]> = (0..rules)
        .map(|i| {
            // Ports all over the place, each of them once.
            let port = (i * 40_503 + 80) as u16;
            RulePlan {
                protocol: Protocol::Tcp,
                first_port: port,
                last_port: port,
                affinity: Affinity::ClientPort,
                group: 0,
            }
        })
        .collect();
    let peers = nodes()
        .skip(1)
        .map(|node| (node, MacAddr([2, 0, 0, 0, 0, node.as_u8()])));
    let peers: BTreeMap<NodeId, MacAddr> = peers.collect();
    let vips = (0..addresses).map(|i| VipPlan {
        addr: IpAddr::V4((0xc612_0100 + i).into()),
        interface: LOOPBACK,
        own_mac: MacAddr([2, 0, 0, 0, 0, 0]),
        mode: L2Mode::Invisible(VIRTUAL_MAC),
        entry_group: 0,
        rules: Arc::clone(&rules),
        peers: peers.clone(),
        choice: PlaneChoice::Auto,
        xdp: farm_core::config::XdpChoice::Auto,
        arp_reroute: None,
    });
    Plan {
        version: 1,
        this,
        seed: Seed { s0: 1, s1: 2 },
        vips: vips.collect(),
        groups: vec![group.clone()],
        gone: BTreeMap::new(),
    }
}

/// The tables of the program at tc: with a new configuration, and as buckets move.
fn install(plans: &[Plan; 2], addresses: u32, rules: u32) -> Result<[Row; 2]> {
    let of = format!("{addresses} addresses, {rules} rules each");
    let mut kernel = Kernel::new(Filter::load()?, &plans[0]);
    kernel.set_tap(Some((LOOPBACK, MacAddr([2, 0xfa, 0, 0, 0, 1]))));
    kernel.attach(LOOPBACK, "lo")?;
    let mut first = Vec::new();
    let empty = Plan {
        vips: Vec::new(),
        ..plans[0].clone()
    };
    for _ in 0..ROUNDS / 10 {
        // All slots forget.
        for _ in 0..4 {
            kernel.install(&empty, &[]);
        }
        let began = Instant::now();
        kernel.install(&plans[0], &[]);
        first.push(began.elapsed());
    }
    ensure!(
        kernel.taken().len() == addresses as usize,
        "the tables have no room for {of}"
    );
    let mut moves = Vec::new();
    let mut before = &plans[0];
    for plan in plans.iter().cycle().skip(1).take(2 * ROUNDS) {
        let began = Instant::now();
        change::of(before, plan);
        let young = change::opened(before, plan);
        kernel.install(plan, &young);
        moves.push(began.elapsed());
        before = plan;
    }
    Ok([
        Row::new(format!("install, buckets move: {of}"), true, moves),
        Row::new(format!("install, new configuration: {of}"), false, first),
    ])
}

/// The socket filter of the raw data plane, which has the buckets in its instructions.
fn filters(plans: &[Plan; 2]) -> Result<[Row; 2]> {
    let ring = PacketRing::open(LOOPBACK, 64, &kernel_program(&filter::closed()))?;
    let (mut build, mut set, mut length) = (Vec::new(), Vec::new(), 0);
    for plan in plans.iter().cycle().take(2 * ROUNDS) {
        let began = Instant::now();
        let program = kernel_program(&filter::build(plan, LOOPBACK, filter::Detail::Buckets));
        build.push(began.elapsed());
        length = length.max(program.len());
        let began = Instant::now();
        ring.set_filter(&program)?;
        set.push(began.elapsed());
    }
    let of = format!("1 address, 1 rule: {length} instructions");
    Ok([
        Row::new(format!("raw data plane, compute the filter, {of}"), true, build),
        Row::new("raw data plane, set the filter", true, set),
    ])
}
