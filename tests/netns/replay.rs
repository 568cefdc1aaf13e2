//! SYN replay: who connects while a node crashes waits until the crash is seen, and not for its own retransmission; and who
//! connects during a planned move waits for nothing.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use farm_core::api::history::Happening;
use farm_lab::client::Record;
use farm_lab::probe::{ProbeConfig, Prober};
use farm_lab::wire::Watcher;
use farm_lab::{Group, Lab, LabConfig, MODULE, Mode, Node, VIP6, Vip};

use crate::common::{counter, entry_of, frames_of, history};

/// A client that has no answer asks again after a second. Where the farm itself took this long, because the machine was busy, that tells nothing.
const IN_TIME: Duration = Duration::from_millis(700);
/// Power cuts, and how many more there may be in place of such.
const CUTS: usize = 3;
const MORE: usize = 5;
/// How long after the crash connections may have been begun that met it.
const CRASH: Duration = Duration::from_millis(400);
/// What is sent within this after the port went down may still have reached the node before.
const UNSURE: Duration = Duration::from_millis(5);

fn config(mode: Mode, affinity: &'static str) -> LabConfig {
    LabConfig {
        groups: vec![Group::tcp("web", 80, affinity)],
        plane: "bpf",
        ..LabConfig::with_mode(mode)
    }
}

/// 400 connections a second from 200 addresses, each with time for two retransmissions.
fn probing(lab: &Lab) -> Prober {
    let config = ProbeConfig {
        sources: 200,
        rate: 400,
        limit: Duration::from_secs(5),
        ..ProbeConfig::new(SocketAddr::new(vip(lab), 80))
    };
    Prober::start(&lab.client, config).expect("probing")
}

fn vip(lab: &Lab) -> IpAddr {
    lab.config().vips[0].addr
}

fn sent_again(lab: &Lab) -> u64 {
    lab.client.requests_sent_again().expect("the kernel counts")
}

/// How long the buckets of the node that was cut had nobody, by the longest memory of the others.
fn unserved(nodes: &[&Node], after: &[u64]) -> Duration {
    let gaps = nodes.iter().zip(after).flat_map(|(node, after)| {
        let new = history(node).into_iter().filter(move |entry| entry.seq > *after);
        new.filter_map(|entry| match entry.what {
            Happening::MapChanged { unserved_ms, .. } => unserved_ms,
            _ => None,
        })
    });
    Duration::from_millis(gaps.max().expect("somebody has taken over"))
}

fn sum(nodes: &[&Node], name: &str) -> u64 {
    nodes.iter().map(|node| counter(node, name)).sum()
}

/// Power cuts in turn over the nodes while clients connect.
fn crashes(config: LabConfig) {
    let what = format!("{:?} {:?}", config.vips, config.groups[0].rules);
    let lab = Lab::serve(config).expect("the farm comes up");
    let mut waited: Vec<Duration> = Vec::new();
    let mut in_time = 0;
    for round in 0..CUTS + MORE {
        if in_time == CUTS {
            break;
        }
        let victim = round % lab.nodes.len();
        let others = lab.others(victim);
        let remembered: Vec<u64> = others
            .iter()
            .map(|node| history(node).last().map_or(0, |entry| entry.seq))
            .collect();
        let given = |nodes: &[&Node]| sum(nodes, "dataplane_replay_accepted") + sum(nodes, "dataplane_replay_sent_on");
        let before = (given(&others), sent_again(&lab));
        let entry = entry_of(&lab, vip(&lab));
        let watcher = Watcher::start(&lab).expect("the wire can be watched");
        let prober = probing(&lab);
        // Another phase of the heartbeats in each round.
        std::thread::sleep(Duration::from_millis(600 + 17 * round as u64));
        let crashed = lab.nodes[victim].crash().expect("power goes");
        std::thread::sleep(CRASH);
        lab.wait_ready(MODULE, &others, Duration::from_secs(10))
            .expect("the others have all");
        // The prober waits for all that it has begun.
        let report = prober.stop().expect("the prober ends").report;
        let evidence = watcher.stop().expect("the watcher ends");

        let met = |record: &&Record| record.started >= crashed + UNSURE && record.started < crashed + CRASH;
        let met: Vec<&Record> = report.records.iter().filter(met).collect();
        let wrong: Vec<&&Record> = met
            .iter()
            .filter(|record| record.outcome.is_err() || record.local.is_none_or(|own| evidence.requests_of(own) != 1))
            .collect();
        let unserved = unserved(&others, &remembered);
        println!(
            "{what}, {} cut: unserved for {unserved:?}; {} connections in {CRASH:?}, {} replayed, {} requests sent again, {} of {} lost",
            lab.nodes[victim].name(),
            met.len(),
            given(&others) - before.0,
            sent_again(&lab) - before.1,
            report.lost(),
            report.records.len(),
        );
        if unserved <= IN_TIME {
            in_time += 1;
            let told: Vec<String> = others.iter().map(|node| frames_of(node)).collect();
            let first: Vec<&&&Record> = wrong.iter().take(3).collect();
            assert!(
                wrong.is_empty(),
                "{} of {} had to ask again, of which the entry was {entry:?}: {first:#?}\n{}",
                wrong.len(),
                met.len(),
                told.join("\n")
            );
            assert!(given(&others) > before.0, "nothing was replayed: {met:?}");
        }
        waited.extend(met.iter().map(|record| record.latency));

        // The dead node may have answered just before it died; no two of the living ones answer the same request.
        assert_eq!(evidence.missed, 0, "the watcher saw everything");
        let port = format!("p{}", victim + 1);
        let doubled = evidence.two_owners();
        let living = doubled
            .iter()
            .filter(|(_, ports)| ports.len() > 2 || !ports.contains_key(&port))
            .count();
        assert_eq!(living, 0, "requests answered by two living nodes: {doubled:?}");
        println!(
            "  {} requests were answered by the dead node before it died, and again",
            doubled.len()
        );
        assert!(evidence.vmac_sources.is_empty(), "{:?}", evidence.vmac_sources);
        lab.rejoin(victim, MODULE).expect("the node comes back");
    }
    assert!(in_time > 0, "the machine was too busy in each of {} cuts", CUTS + MORE);
    waited.sort_unstable();
    let at = |share: usize| waited[waited.len() * share / 100];
    println!(
        "{what}: of {} connections begun in a crash: median {:?}, 90 % {:?}, 99 % {:?}, longest {:?}",
        waited.len(),
        at(50),
        at(90),
        at(99),
        waited[waited.len() - 1]
    );
}

#[test]
fn replay_spares_clients_their_retransmission_in_invisible_mode() {
    crashes(config(Mode::Invisible, "on_addr"));
}

#[test]
fn replay_spares_clients_their_retransmission_in_directed_mode() {
    crashes(config(Mode::Directed, "on_addr"));
}

#[test]
fn replay_spares_clients_their_retransmission_by_port_in_directed_mode() {
    crashes(config(Mode::Directed, "on_port"));
}

#[test]
fn replay_spares_ipv6_clients_their_retransmission() {
    for (mode, affinity) in [(Mode::Invisible, "on_addr"), (Mode::Directed, "on_port")] {
        crashes(LabConfig {
            vips: vec![Vip::new(VIP6, mode)],
            ..config(mode, affinity)
        });
    }
}

#[test]
fn replay_in_user_space_spares_clients_their_retransmission() {
    crashes(LabConfig {
        plane: "raw",
        ..config(Mode::Directed, "on_addr")
    });
}

/// Nodes stop and start under a stream of new connections: no request is lost, so none is sent again.
fn planned_moves(config: LabConfig) {
    let what = format!("{:?}, {}", config.vips, config.plane);
    let lab = Lab::serve(config).expect("the farm comes up");
    let all: Vec<&Node> = lab.nodes.iter().collect();
    let before = sent_again(&lab);
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    let prober = probing(&lab);
    std::thread::sleep(Duration::from_millis(300));
    for moving in 0..lab.nodes.len() {
        lab.nodes[moving].farm_ok(&["stop", MODULE]).expect("the module stops");
        lab.wait_ready(MODULE, &lab.others(moving), Duration::from_secs(10))
            .expect("the others have all");
        lab.nodes[moving]
            .farm_ok(&["start", MODULE])
            .expect("the module starts");
        lab.wait_ready(MODULE, &all, Duration::from_secs(20))
            .expect("all serve");
    }
    let report = prober.stop().expect("the prober ends").report;
    let evidence = watcher.stop().expect("the watcher ends");
    let again = sent_again(&lab) - before;
    println!(
        "{what}: {} connections through six moves: median {:?}, 99 % {:?}, longest {:?}; {again} requests sent again",
        report.records.len(),
        report.latency(0.5),
        report.latency(0.99),
        report.latency(1.0)
    );
    assert_eq!(report.lost(), 0, "{:?}", report.failures());
    assert_eq!(again, 0, "a connection request was lost");
    assert!(evidence.two_owners().is_empty(), "{:?}", evidence.two_owners());
    let replayed = sum(&all, "dataplane_replay_accepted") + sum(&all, "dataplane_replay_sent_on");
    assert_eq!(replayed, 0, "nobody was gone, so there was nothing to replay");
}

#[test]
fn replay_is_not_needed_for_planned_moves_in_directed_mode() {
    planned_moves(config(Mode::Directed, "on_port"));
}

#[test]
fn replay_is_not_needed_for_planned_moves_in_invisible_mode() {
    planned_moves(config(Mode::Invisible, "on_port"));
}

#[test]
fn replay_is_not_needed_for_planned_moves_in_user_space_and_of_ipv6_addresses() {
    planned_moves(LabConfig {
        plane: "raw",
        ..config(Mode::Invisible, "on_port")
    });
    planned_moves(LabConfig {
        vips: vec![Vip::new(VIP6, Mode::Directed)],
        ..config(Mode::Directed, "on_port")
    });
}
