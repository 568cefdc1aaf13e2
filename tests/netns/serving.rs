//! A farm serves: every connection once, by the node the map says, in both L2 modes, on the LAN and from behind a router.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::time::Duration;

use farm_lab::client::{Batch, Report};
use farm_lab::config::{Group, LabConfig, Mode, VIP, VIP2, Vip};
use farm_lab::process::run_limited;
use farm_lab::udp::{self, UdpService};
use farm_lab::wire::Watcher;
use farm_lab::{Lab, MODULE};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

/// Source addresses that each node answered; fails if one source met two nodes.
fn sources_per_node(report: &Report) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for (source, nodes) in report.nodes_by_source() {
        assert_eq!(nodes.len(), 1, "{source} was answered by {nodes:?}");
        *counts.entry(nodes[0].clone()).or_default() += 1;
    }
    counts
}

/// The nodes whose count is more than three standard deviations off their share.
fn unfair(counts: &BTreeMap<String, usize>, shares: &BTreeMap<String, f64>) -> Vec<String> {
    let total = counts.values().sum::<usize>() as f64;
    let off = |(node, share): (&String, &f64)| {
        let seen = counts.get(node).copied().unwrap_or(0) as f64;
        let deviation = (total * share * (1.0 - share)).sqrt();
        ((seen - total * share).abs() > 3.0 * deviation).then(|| format!("{node}: {seen} of {total}, share {share:.3}"))
    };
    shares.iter().filter_map(off).collect()
}

fn serves(mode: Mode) {
    let config = LabConfig {
        routed: true,
        // All hosts of the lab share the kernel's one neighbour table, which holds 1024 entries by default.
        client_addrs: 500,
        ..LabConfig::with_mode(mode)
    };
    let lab = Lab::serve(config).expect("the farm comes up");
    let far = lab.far.as_ref().expect("the lab is routed");
    let watcher = Watcher::start(&lab).expect("the wire can be watched");

    let near = lab
        .client
        .batch(Batch {
            sources: 0..250,
            ..Batch::new(WEB, 3000)
        })
        .expect("a batch");
    assert_eq!(near.lost(), 0, "{:?}", near.failures());
    let from_far = far.batch(Batch::new(WEB, 600)).expect("a batch");
    assert_eq!(from_far.lost(), 0, "{:?}", from_far.failures());

    let evidence = watcher.stop().expect("the watcher ends");
    evidence.check_single_owner().expect("one owner per connection");
    assert_eq!(evidence.syn_acks.len(), 3600, "every handshake was seen on the wire");
    for vip in &lab.config().vips {
        assert!(
            !lab.switch_knows(&vip.vmac().to_string()).expect("bridge(8) runs"),
            "the switch learned the virtual MAC"
        );
    }

    // A fair farm is outside three standard deviations once in about 150 times; with other clients again, once in 20 000.
    let shares = lab.shares(MODULE, "web").expect("shares");
    sources_per_node(&from_far);
    let first = unfair(&sources_per_node(&near), &shares);
    if !first.is_empty() {
        let other = lab
            .client
            .batch(Batch {
                sources: 250..500,
                ..Batch::new(WEB, 1000)
            })
            .expect("a batch");
        let second = unfair(&sources_per_node(&other), &shares);
        assert!(second.is_empty(), "{first:?}, then {second:?}");
    }
}

#[test]
fn three_thousand_connections_are_each_answered_by_one_node_in_directed_mode() {
    serves(Mode::Directed);
}

#[test]
fn three_thousand_connections_are_each_answered_by_one_node_in_invisible_mode() {
    serves(Mode::Invisible);
}

#[test]
fn an_echo_request_is_answered_once() {
    for mode in [Mode::Directed, Mode::Invisible] {
        let lab = Lab::serve(LabConfig::with_mode(mode)).expect("the farm comes up");
        let watcher = Watcher::start(&lab).expect("the wire can be watched");
        for source in &lab.client.addrs()[..12] {
            let mut ping = lab.client.space().command("ping");
            ping.args([
                "-c",
                "3",
                "-i",
                "0.05",
                "-W",
                "2",
                "-I",
                &source.to_string(),
                &VIP.to_string(),
            ]);
            let pinged = run_limited(ping, Duration::from_secs(10)).expect("ping runs");
            assert!(
                pinged.ok() && !pinged.stdout.contains("DUP!"),
                "{mode:?} {}",
                pinged.stdout
            );
        }
        let evidence = watcher.stop().expect("the watcher ends");
        evidence.check_single_owner().expect("one reply each");
        assert_eq!(evidence.echo_replies.len(), 36);
        let repliers: std::collections::BTreeSet<&String> =
            evidence.echo_replies.values().flat_map(|p| p.keys()).collect();
        assert!(repliers.len() > 1, "twelve clients and one replier: {repliers:?}");
    }
}

#[test]
fn each_requester_of_the_vip_hears_one_answer_in_directed_mode() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    for source in &lab.client.addrs()[..20] {
        // One neighbour entry serves all addresses of a host: without it the kernel asks anew, in the name of this source.
        lab.client.space().ip(&["neighbour flush dev eth0"]).expect("ip runs");
        let record = lab
            .client
            .ask(*source, WEB, Duration::from_secs(2))
            .expect("a connection");
        assert!(record.outcome.is_ok(), "{record:?}");
    }
    let evidence = watcher.stop().expect("the watcher ends");
    let mut entries = BTreeMap::<String, usize>::new();
    for source in &lab.client.addrs()[..20] {
        let seen = evidence
            .arp
            .get(&((*source).into(), VIP.into()))
            .unwrap_or_else(|| panic!("{source} asked nothing"));
        assert_eq!((seen.replies.len(), seen.macs.len()), (1, 1), "{source}: {seen:?}");
        *entries
            .entry(seen.replies.keys().next().expect("one").clone())
            .or_default() += 1;
    }
    assert!(entries.len() > 1, "twenty requesters and one entry node: {entries:?}");
}

#[test]
fn powers_several_vips_port_ranges_and_udp_follow_their_own_maps() {
    let powers = vec![
        ("node1".to_owned(), 3),
        ("node2".to_owned(), 1),
        ("node3".to_owned(), 0),
    ];
    let by_port = Group {
        powers,
        ..Group::tcp("web", 80, "on_port")
    };
    let range = Group {
        rules: vec![("udp", "5000-5010".to_owned(), "on_addr")],
        ..Group::tcp("voice", 0, "on_addr")
    };
    let config = LabConfig {
        vips: vec![Vip::new(VIP, Mode::Directed), Vip::new(VIP2, Mode::Invisible)],
        groups: vec![by_port, range],
        ..LabConfig::default()
    };
    let lab = Lab::serve(config).expect("the farm comes up");
    let shares = lab.shares(MODULE, "web").expect("shares");
    assert_eq!(shares.values().copied().collect::<Vec<_>>(), [0.75, 0.25, 0.0]);

    for vip in [VIP, VIP2] {
        let report = lab
            .client
            .batch(Batch::new(SocketAddrV4::new(vip, 80), 2000))
            .expect("a batch");
        assert_eq!(report.lost(), 0, "{vip}: {:?}", report.failures());
        let counts = report.per_node();
        assert_eq!(counts.get("node3"), None, "power 0 takes nothing");
        let ratio = counts["node1"] as f64 / 2000.0;
        assert!((ratio - 0.75).abs() < 0.05, "{vip}: {counts:?}");
    }

    for vip in [VIP, VIP2] {
        let at = SocketAddrV4::new(vip, 5004);
        let services: Vec<UdpService> = lab
            .nodes
            .iter()
            .map(|node| UdpService::start(node, at).expect("the VIP is there"))
            .collect();
        let mut nodes = BTreeMap::<String, usize>::new();
        for source in &lab.client.addrs()[..60] {
            // A datagram may be lost on a busy machine.
            let mut asked = (0..3).map(|_| udp::ask(&lab.client, *source, at, "who", Duration::from_secs(1)));
            let answered = asked.find(|answers| !matches!(answers, Ok(none) if none.is_empty()));
            let answers = answered.expect("an answer to one of three").expect("a datagram");
            assert_eq!(answers.len(), 1, "{source} to {at}: {answers:?}");
            *nodes.entry(answers[0].clone()).or_default() += 1;
        }
        assert_eq!(nodes.len(), 3, "{nodes:?}");
        drop(services);
    }
}
