//! What the kernel program costs by itself: nanoseconds for one frame of each kind, without those of a program that does nothing.
//!
//! The frame, the tables and the connection lie in the processor's cache: it is the cost of the instructions, and the least that a frame costs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use farm_core::balance::decide::Reason;
use farm_core::balance::plan::{BucketState, Plan, RulePlan};
use farm_core::config::Protocol;
use farm_sys::bpf::Count;

use super::frames::{self, Segment, Way};
use super::judge::{Judge, LOOPBACK};
use super::{Effort, Figure, Goals, bar};
use crate::config::{VIP, VIP6};
use crate::outcome::{Outcome, Plot, Progress, Table};

/// Name of the part.
pub const NAME: &str = "cost";

const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 18, 1, 1);
const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1);
/// An address of the same network that is not virtual.
const OTHER: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 99);
const OTHER6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x99);

/// A port for each state of a bucket, one without a rule, and the client's.
const OWN: u16 = 80;
const GUARDED: u16 = 81;
const DRAINING: u16 = 82;
const FOREIGN: u16 = 83;
const NO_RULE: u16 = 8080;
const CLIENT_PORT: u16 = 4000;

/// Goals in nanoseconds.
const STEADY: f64 = 35.0;
const TRANSITION: f64 = 100.0;

/// What runs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Runs {
    /// The program at tc.
    Tc,
    /// The one at XDP.
    Xdp,
    /// One that reads the clock at tc and does nothing else.
    Clock,
}

/// One kind of frame.
struct Case {
    name: &'static str,
    frame: Vec<u8>,
    runs: Runs,
    /// What one such frame raises, so that what is measured is what is said.
    counts: Option<usize>,
    goal: Option<f64>,
    values: Vec<f64>,
}

/// Measures every kind of frame.
///
/// # Errors
/// The kernel does not take the program, or judges a frame as something else than it is said to be.
pub fn run(effort: Effort, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new(NAME, 0);
    let plan = plan()?;
    let mut judge = Judge::new(&plan)?;
    // Held until the end: what the program is to find.
    let connections = connect(&judge)?;
    let (rounds, repeat) = (effort.rounds(9, 3), effort.pick(1_000_000, 200_000));
    let mut steady = steady(&connections)?;
    let mut idle = Vec::new();
    say(&format!("{rounds} rounds of {repeat} runs for each kind of frame"))?;
    check(&mut judge, &steady)?;
    for round in 1..=rounds {
        say(&format!("round {round}/{rounds}"))?;
        for case in &mut steady {
            case.values.push(case.measure(&mut judge, repeat)?);
        }
        idle.push(judge.idle_nanos(&steady[0].frame, repeat)?);
    }
    judge.install(&plan, true)?;
    let mut young = vec![Case::new(
        "TCP request, bucket just opened: to farmd",
        way(VIP.into(), OWN).tcp(Segment::Syn)?,
        Some(Count::Punted as usize),
        Some(TRANSITION),
    )];
    check(&mut judge, &young)?;
    for _ in 0..rounds {
        for case in &mut young {
            case.values.push(case.measure(&mut judge, repeat)?);
        }
    }
    let all: Vec<Case> = steady.into_iter().chain(young).collect();
    let mut table = Table::new(
        &format!(
            "Nanoseconds of the kernel program for one frame, less those of one that does nothing ({}): medians with the least and the \
             most (rounds: {rounds}, of {repeat} runs)",
            Figure::of(&idle).text(0)
        ),
        &["frame", "ns", "goal"],
    );
    let mut goals = Goals::new();
    for case in &all {
        let figure = Figure::of(&case.values);
        let goal = case.goal.map_or("–".to_owned(), |goal| format!("≤ {goal:.0}"));
        table.row([case.name.to_owned(), figure.text(0), goal]);
        if let Some(goal) = case.goal {
            goals.at_most(&format!("ns, {}", case.name), goal, figure.median, 0);
        }
    }
    outcome.tables.push(table);
    outcome.plots.push(Plot {
        name: NAME.to_owned(),
        title: "The kernel program on one frame".to_owned(),
        unit: "ns, less those of a program that does nothing".to_owned(),
        lines: all.iter().map(|case| bar(short(case.name), &case.values)).collect(),
        ..Plot::default()
    });
    goals.conclude(&mut outcome);
    Ok(outcome)
}

/// What fits beside a bar.
fn short(name: &str) -> &str {
    name.split(": ").next().unwrap_or(name)
}

impl Case {
    fn new(name: &'static str, frame: Vec<u8>, counts: Option<usize>, goal: Option<f64>) -> Self {
        Self {
            name,
            frame,
            runs: Runs::Tc,
            counts,
            goal,
            values: Vec::new(),
        }
    }

    /// The same with another program.
    fn of(self, runs: Runs) -> Self {
        Self { runs, ..self }
    }

    fn measure(&self, judge: &mut Judge, repeat: u32) -> Result<f64> {
        match self.runs {
            Runs::Tc => judge.net_nanos(&self.frame, repeat),
            Runs::Xdp => judge.net_nanos_early(&self.frame, repeat),
            Runs::Clock => judge.net_nanos_clock(&self.frame, repeat),
        }
    }
}

/// Both virtual addresses, each with a port for each state.
fn plan() -> Result<Plan> {
    let states = [
        (OWN, BucketState::Own),
        (GUARDED, BucketState::Guarded),
        (DRAINING, BucketState::Draining),
        (FOREIGN, BucketState::Foreign),
    ];
    let rules: Vec<RulePlan> = states
        .iter()
        .enumerate()
        .flat_map(|(group, (port, _))| [Protocol::Tcp, Protocol::Udp].map(|of| frames::rule(of, *port, group)))
        .collect();
    let groups = states.iter().map(|(_, state)| frames::group(*state));
    Ok(frames::plan(
        LOOPBACK,
        &[VIP.into(), VIP6.into()],
        &rules,
        groups.collect::<Result<_>>()?,
    ))
}

fn way(to: IpAddr, port: u16) -> Way {
    let from = if to.is_ipv4() { CLIENT.into() } else { CLIENT6.into() };
    Way {
        from: (from, CLIENT_PORT),
        to: (to, port),
    }
}

/// A connection to a virtual address, both ends of it, and what it was accepted by: a frame of another one is looked for there too.
struct Connected {
    from: SocketAddr,
    to: SocketAddr,
    _held: (TcpListener, TcpStream, TcpStream),
}

/// One connection to each virtual address, in a guarded and in a draining bucket.
fn connect(judge: &Judge) -> Result<Vec<Connected>> {
    let space = judge.space();
    // An address is in use as soon as it is there.
    space.sysctl("net.ipv6.conf.lo.accept_dad", "0")?;
    space.ip(&[
        format!("address add {VIP}/32 dev lo"),
        format!("address add {VIP6}/128 dev lo nodad"),
    ])?;
    let pair = |to: SocketAddr| {
        space.run(|| -> Result<_> {
            let listener = TcpListener::bind(to)?;
            let client = TcpStream::connect_timeout(&to, Duration::from_secs(2))?;
            let (server, from) = listener.accept()?;
            Ok(Connected {
                from,
                to,
                _held: (listener, client, server),
            })
        })
    };
    let ports = [GUARDED, DRAINING];
    let both = |port: u16| [SocketAddr::from((VIP, port)), SocketAddr::from((VIP6, port))];
    ports.into_iter().flat_map(both).map(pair).collect()
}

/// Frames of every kind for buckets that are not young.
fn steady(connections: &[Connected]) -> Result<Vec<Case>> {
    let known = |port: u16, v6: bool| -> Result<Vec<u8>> {
        let mut all = connections.iter();
        let found = all.find(|one| one.to.port() == port && one.to.is_ipv6() == v6);
        let found = found.context("the connection was made")?;
        let way = Way {
            from: (found.from.ip(), found.from.port()),
            to: (found.to.ip(), found.to.port()),
        };
        way.tcp(Segment::Ack)
    };
    let reason = |reason: Reason| Reason::ALL.iter().position(|r| *r == reason);
    let (v4, v6) = (IpAddr::from(VIP), IpAddr::from(VIP6));
    let ack = |to: IpAddr, port: u16| way(to, port).tcp(Segment::Ack);
    let case = |name, frame: Result<Vec<u8>>, of, goal| -> Result<Case> { Ok(Case::new(name, frame?, of, goal)) };
    [
        case("TCP, owned", ack(v4, OWN), reason(Reason::Own), Some(STEADY)),
        case("TCP, foreign", ack(v4, FOREIGN), reason(Reason::Foreign), Some(STEADY)),
        case("UDP, owned", way(v4, OWN).udp(), reason(Reason::Own), Some(STEADY)),
        case(
            "UDP, foreign",
            way(v4, FOREIGN).udp(),
            reason(Reason::Foreign),
            Some(STEADY),
        ),
        case("echo request, owned", way(v4, OWN).echo(), reason(Reason::Own), None),
        case(
            "TCP, no rule for the port",
            ack(v4, NO_RULE),
            reason(Reason::NoRule),
            None,
        ),
        case("TCP, not for a VIP", ack(OTHER.into(), OWN), None, None),
        case("IPv6 TCP, owned", ack(v6, OWN), reason(Reason::Own), Some(STEADY)),
        case(
            "IPv6 TCP, foreign",
            ack(v6, FOREIGN),
            reason(Reason::Foreign),
            Some(STEADY),
        ),
        case("IPv6 TCP, not for a VIP", ack(OTHER6.into(), OWN), None, None),
        case(
            "TCP, guarded, connection is here",
            known(GUARDED, false),
            reason(Reason::GuardedKnown),
            Some(TRANSITION),
        ),
        case(
            "TCP, guarded, no such connection",
            ack(v4, GUARDED),
            reason(Reason::GuardedUnknown),
            Some(TRANSITION),
        ),
        case(
            "TCP, draining, connection is here",
            known(DRAINING, false),
            reason(Reason::DrainingKnown),
            Some(TRANSITION),
        ),
        case(
            "TCP, draining, no such connection",
            ack(v4, DRAINING),
            reason(Reason::DrainingOther),
            Some(TRANSITION),
        ),
        case(
            "IPv6 TCP, guarded, connection is here",
            known(GUARDED, true),
            reason(Reason::GuardedKnown),
            Some(TRANSITION),
        ),
        case(
            "XDP, TCP, foreign",
            ack(v4, FOREIGN),
            reason(Reason::Foreign),
            Some(STEADY),
        )
        .map(|case| case.of(Runs::Xdp)),
        case("XDP, TCP, owned: passed up", ack(v4, OWN), None, Some(STEADY)).map(|case| case.of(Runs::Xdp)),
        case("XDP, TCP, not for a VIP", ack(OTHER.into(), OWN), None, None).map(|case| case.of(Runs::Xdp)),
        case("reading the clock, by itself", ack(v4, OWN), None, None).map(|case| case.of(Runs::Clock)),
    ]
    .into_iter()
    .collect()
}

/// Each frame raises the counter that it is to raise.
fn check(judge: &mut Judge, cases: &[Case]) -> Result<()> {
    for case in cases.iter().filter(|case| case.runs != Runs::Clock) {
        let counted = judge.counted(&case.frame, case.runs == Runs::Xdp)?;
        let right = match case.counts {
            Some(one) => counted.contains(&one),
            None => counted.is_empty(),
        };
        if !right {
            bail!(
                "{}: the program counts {counted:?}, {:?} is expected",
                case.name,
                case.counts
            );
        }
    }
    Ok(())
}
