//! Ways of serving: the farm by each of its data planes, one server alone, a proxy, and servers that share an address by netfilter.
//!
//! Owns the ways, their order (the straight way first and last in every round, so that drift of the machine shows) and the goals. Absolute figures
//! belong to the machine; ratios to the straight way of the same round are what counts.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Result, bail};

use super::bulk::{BULK_PORT, BulkServer, Direction, transfer};
use super::load::{Keep, Times, WEB_PORT, times, wrk};
use super::rivals::{Cluster, PROXY, Proxy, iptables_version};
use super::{Effort, Figure, Goals, bar, ratios};
use crate::config::{Group, LabConfig, Mode, VIP, VIP2, Vip};
use crate::outcome::{Outcome, Plot, Progress, Table};
use crate::{Client, Lab, MODULE};

/// Name of the part.
pub const NAME: &str = "ways";

const STRAIGHT: &str = "straight to one nginx";
const HAPROXY: &str = "HAProxy, TCP, 2 threads";

/// Goals against the straight way.
const REQUESTS: f64 = 0.75;
const CONNECTIONS: f64 = 0.85;
const LATENCY: f64 = 1.05;
const BULK: f64 = 0.95;
/// Goal against HAProxy.
const PROXIED: f64 = 2.3;

/// By port: the client has one address, and all servers share its load on the same processors.
const BY_PORT: &str = "on_port";
/// By address, as the modules here do: one server has the client and does all its work, as on the straight way, and the others drop it.
const BY_ADDRESS: &str = "on_addr";

/// The farms: name, word of [`LabConfig::plane`], by what they deal, and whether the goals are for them.
const FARMS: [(&str, &str, &str, bool); 4] = [
    ("bpf at tc", "bpf", BY_PORT, true),
    ("bpf at tc, by address", "bpf", BY_ADDRESS, true),
    ("bpf with XDP", "xdp", BY_PORT, false),
    ("raw", "raw", BY_PORT, false),
];

/// The farm's modes and the addresses that have them.
const MODES: [(&str, Ipv4Addr, Mode); 2] = [
    ("vmac_directed", VIP, Mode::Directed),
    ("vmac_invisible", VIP2, Mode::Invisible),
];

struct Way<'a> {
    name: String,
    client: &'a Client,
    addr: Ipv4Addr,
    /// The goals are for it.
    judged: bool,
    found: Found,
}

/// What was measured, one value for each round.
#[derive(Default)]
struct Found {
    requests: Vec<f64>,
    connections: Vec<f64>,
    request_time: Vec<f64>,
    connection_time: Vec<f64>,
    down: Vec<f64>,
    up: Vec<f64>,
}

/// How long each measurement is.
struct Windows {
    wrk: u64,
    times: Duration,
    bulk: Duration,
}

/// A farm of three, and what answers bulk on its nodes.
struct Farm {
    // Ended before the namespaces it is in.
    _bulk: Vec<BulkServer>,
    lab: Lab,
}

/// Measures all ways that this machine has.
///
/// # Errors
/// The farm, nginx or HAProxy does not start, wrk is missing, or `say` ends the run.
pub fn run(effort: Effort, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new(NAME, 0);
    let windows = Windows {
        wrk: effort.seconds(3, 1),
        times: effort.pick(Duration::from_millis(1000), Duration::from_millis(300)),
        bulk: effort.pick(Duration::from_millis(1500), Duration::from_millis(500)),
    };
    let mut farms = Vec::new();
    for (name, plane, filter, judged) in FARMS {
        say(&format!("building the farm, {name}"))?;
        match Farm::start(plane, filter) {
            Ok(farm) => farms.push((name, judged, farm)),
            Err(error) if plane == "xdp" => outcome.notes.push(left_out(name, &error)),
            Err(error) => return Err(error),
        }
    }
    let Some((_, _, first)) = farms.first() else {
        bail!("there is no farm to measure");
    };
    say("building the rivals")?;
    let _proxy = Proxy::start(&first.lab)?;
    let cluster = match Cluster::start() {
        Ok(cluster) => Some(cluster),
        Err(error) => {
            outcome.notes.push(left_out("keepalived and xt_cluster", &error));
            None
        }
    };
    let straight = (STRAIGHT, &first.lab.client, first.lab.nodes[0].addr());
    let mut ways = vec![Way::new(straight.0, straight.1, straight.2, false)];
    for (name, judged, farm) in &farms {
        for (mode, addr, _) in MODES {
            ways.push(Way::new(
                &format!("farm {name}, {mode}"),
                &farm.lab.client,
                addr,
                *judged,
            ));
        }
    }
    ways.push(Way::new(HAPROXY, &first.lab.client, PROXY, false));
    if let Some(cluster) = &cluster {
        ways.push(Way::new("keepalived, xt_cluster", &cluster.lab.client, VIP, false));
    }
    let mut again = Way::new(straight.0, straight.1, straight.2, false);
    let rounds = effort.rounds(6, 1);
    for round in 1..=rounds {
        for way in &mut ways {
            say(&format!("round {round}/{rounds}: {}", way.name))?;
            way.measure(&windows)?;
        }
        say(&format!("round {round}/{rounds}: {STRAIGHT}, again"))?;
        again.measure(&windows)?;
    }
    ways[0].found.average_with(&again.found);
    report(&ways, rounds, &windows, &mut outcome);
    if cluster.is_some() {
        outcome.notes.push(format!(
            "The `cluster` match deals by client address alone, and wrk has one: one of the three servers does all of its work, and the other two \
             drop it ({}).",
            iptables_version()?
        ));
    }
    Ok(outcome)
}

fn left_out(what: &str, error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    format!("Left out: {what}, because {}.", text.lines().next().unwrap_or_default())
}

impl Farm {
    fn start(plane: &'static str, filter: &'static str) -> Result<Self> {
        let rule = |port: u16| ("tcp", port.to_string(), filter);
        let lab = Lab::serve(LabConfig {
            vips: MODES.map(|(_, addr, mode)| Vip::new(addr, mode)).to_vec(),
            groups: vec![Group {
                name: "web".into(),
                rules: vec![rule(WEB_PORT), rule(BULK_PORT)],
                powers: Vec::new(),
            }],
            plane,
            ..LabConfig::default()
        })?;
        let status = lab.nodes[0].status()?;
        let served = status.modules.iter().find(|module| module.name == MODULE);
        let (works, why) = served.map_or((String::new(), String::new()), |module| {
            (module.dataplane.clone(), module.dataplane_why.clone())
        });
        let as_wanted = match plane {
            "xdp" => works == "bpf" && why.contains("XDP") && !why.contains("no XDP"),
            plane => works == plane,
        };
        if !as_wanted {
            bail!("the data plane is {works} ({why}) where {plane} is wanted");
        }
        let bulk = lab.nodes.iter().map(|node| BulkServer::start(node.space()));
        Ok(Self {
            _bulk: bulk.collect::<Result<_>>()?,
            lab,
        })
    }
}

impl<'a> Way<'a> {
    fn new(name: &str, client: &'a Client, addr: Ipv4Addr, judged: bool) -> Self {
        Self {
            name: name.to_owned(),
            client,
            addr,
            judged,
            found: Found::default(),
        }
    }

    fn measure(&mut self, windows: &Windows) -> Result<()> {
        let Times { request, connection } = times(self.client, self.addr, windows.times)?;
        self.found.request_time.push(request);
        self.found.connection_time.push(connection);
        let rate = |keep| wrk(self.client, self.addr, windows.wrk, keep);
        self.found.requests.push(rate(Keep::Alive)?);
        self.found.connections.push(rate(Keep::Never)?);
        let bulk = |direction| transfer(self.client.space(), self.addr, direction, windows.bulk);
        self.found.down.push(bulk(Direction::Down)?);
        self.found.up.push(bulk(Direction::Up)?);
        Ok(())
    }
}

impl Found {
    /// All of it, each with its field, for what treats all alike.
    fn all(&mut self) -> [&mut Vec<f64>; 6] {
        [
            &mut self.requests,
            &mut self.connections,
            &mut self.request_time,
            &mut self.connection_time,
            &mut self.down,
            &mut self.up,
        ]
    }

    fn average_with(&mut self, other: &Self) {
        let others = [
            &other.requests,
            &other.connections,
            &other.request_time,
            &other.connection_time,
            &other.down,
            &other.up,
        ];
        for (own, other) in self.all().into_iter().zip(others) {
            for (value, other) in own.iter_mut().zip(other) {
                *value = f64::midpoint(*value, *other);
            }
        }
    }
}

/// Which values of a way a table or a picture shows.
type Pick = fn(&Found) -> &Vec<f64>;

fn report(ways: &[Way<'_>], rounds: usize, windows: &Windows, outcome: &mut Outcome) {
    let base = &ways[0].found;
    let of_straight = |way: &Way<'_>, pick: Pick| ratios(pick(&way.found), pick(base));
    let proxied = ways.iter().find(|way| way.name == HAPROXY);
    let of_proxy =
        |way: &Way<'_>| proxied.map_or(Vec::new(), |proxy| ratios(&way.found.requests, &proxy.found.requests));
    let cells = |way: &Way<'_>, picks: &[(Pick, usize)]| -> Vec<String> {
        let pair = |(pick, digits): &(Pick, usize)| {
            let value = Figure::of(pick(&way.found)).median;
            [
                format!("{value:.digits$}"),
                Figure::of(&of_straight(way, *pick)).text(2),
            ]
        };
        std::iter::once(way.name.clone())
            .chain(picks.iter().flat_map(pair))
            .collect()
    };
    let mut rates = Table::new(
        &format!(
            "Requests and connections per second (wrk, 64 connections, {} s each): medians, ratios to the straight way and to \
             HAProxy of the same round, with the least and the most (rounds: {rounds})",
            windows.wrk
        ),
        &[
            "way",
            "requests/s",
            "of straight",
            "of HAProxy",
            "connections/s",
            "of straight",
        ],
    );
    let mut rest = Table::new(
        "One request at a time (median, µs), and bulk over one connection (Gbit/s)",
        &[
            "way",
            "request",
            "of straight",
            "new connection",
            "of straight",
            "download",
            "of straight",
            "upload",
            "of straight",
        ],
    );
    for way in ways {
        let mut row = cells(way, &[(|f| &f.requests, 0), (|f| &f.connections, 0)]);
        row.insert(3, Figure::of(&of_proxy(way)).text(2));
        rates.row(row);
        rest.row(cells(
            way,
            &[
                (|f| &f.request_time, 0),
                (|f| &f.connection_time, 0),
                (|f| &f.down, 1),
                (|f| &f.up, 1),
            ],
        ));
    }
    outcome.tables.extend([rates, rest]);
    let pictures: [(&str, &str, Pick, f64); 5] = [
        ("requests", "Requests per second, keep-alive", |f| &f.requests, REQUESTS),
        ("connections", "Connections per second", |f| &f.connections, CONNECTIONS),
        ("request-time", "Time of one request", |f| &f.request_time, LATENCY),
        ("download", "Download over one connection", |f| &f.down, BULK),
        ("upload", "Upload over one connection", |f| &f.up, BULK),
    ];
    for (name, title, pick, goal) in pictures {
        outcome.plots.push(Plot {
            name: format!("{NAME}-{name}"),
            title: title.to_owned(),
            unit: "ratio to the straight way of the same round".to_owned(),
            lines: ways.iter().map(|way| bar(&way.name, &of_straight(way, pick))).collect(),
            goal: Some(goal),
            ..Plot::default()
        });
    }
    let mut goals = Goals::new();
    for way in ways.iter().filter(|way| way.judged) {
        let median = |pick: Pick| Figure::of(&of_straight(way, pick)).median;
        let name = &way.name;
        goals.at_least(
            &format!("{name}: requests/s of straight"),
            REQUESTS,
            median(|f| &f.requests),
            2,
        );
        goals.at_least(
            &format!("{name}: connections/s of straight"),
            CONNECTIONS,
            median(|f| &f.connections),
            2,
        );
        let against = Figure::of(&of_proxy(way)).median;
        goals.at_least(&format!("{name}: requests/s of HAProxy"), PROXIED, against, 2);
        goals.at_most(
            &format!("{name}: time of one request of straight"),
            LATENCY,
            median(|f| &f.request_time),
            2,
        );
        goals.at_least(&format!("{name}: download of straight"), BULK, median(|f| &f.down), 2);
        goals.at_least(&format!("{name}: upload of straight"), BULK, median(|f| &f.up), 2);
    }
    goals.conclude(outcome);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_straight_way_of_a_round_is_the_mean_of_its_two() {
        let found = |rate: f64| Found {
            requests: vec![rate, 2.0 * rate],
            ..Found::default()
        };
        let mut straight = found(90.0);
        straight.average_with(&found(110.0));
        assert_eq!(straight.requests, [100.0, 200.0]);
        assert_eq!(ratios(&[50.0, 150.0], &straight.requests), [0.5, 0.75]);
    }
}
