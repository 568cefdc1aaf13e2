//! What a node says of single clients, buckets and connections, beside what clients see.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use farm_core::api::exit;
use farm_core::api::flows::Flows;
use farm_core::api::history::{Happening, MapCause};
use farm_core::api::map::Maps;
use farm_core::api::why::{BucketWord, Why};
use farm_lab::hold::{HoldConfig, Holder};
use farm_lab::udp::UdpService;
use farm_lab::{Group, Lab, LabConfig, MODULE, Node, VIP, wait_until};
use serde::de::DeserializeOwned;

use crate::common::mentions;

const LIMIT: Duration = Duration::from_secs(20);
const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
const VOICE: SocketAddrV4 = SocketAddrV4::new(VIP, 5000);

/// The JSON answer of a command that must succeed.
fn json<T: DeserializeOwned>(node: &Node, args: &[&str]) -> T {
    let args: Vec<&str> = args.iter().copied().chain(["--json"]).collect();
    let text = node.farm_ok(&args).expect("an answer");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{args:?}: {e}: {text}"))
}

fn why(node: &Node, client: &str) -> Why {
    json(node, &["why", client, &WEB.to_string()])
}

/// Fails unless the command ends with `code` and says one of `words`.
fn refused(node: &Node, args: &[&str], code: u8, words: &[&str]) {
    let finished = node.farm(args).expect("the command line runs");
    assert_eq!(finished.code, Some(code.into()), "{args:?}: {finished:?}");
    assert_eq!(finished.stderr.lines().count(), 1, "one line: {finished:?}");
    mentions(&finished.stderr, words);
}

/// The name of the node that answers a datagram from this socket.
fn answers(socket: &UdpSocket) -> String {
    socket.set_read_timeout(Some(Duration::from_secs(1))).expect("a limit");
    let mut buffer = [0; 64];
    let length = wait_until(LIMIT, "an answer", || {
        socket.send_to(b"who", VOICE).expect("it is sent");
        socket.recv(&mut buffer).ok()
    });
    let length = length.expect("somebody answers");
    let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
    text.strip_suffix(" who").expect("a name in front").to_owned()
}

/// Datagrams from ports of one client are answered by whom two nodes name beforehand.
fn datagrams_go_where_nodes_say(lab: &Lab) {
    let services = lab.nodes.iter().map(|node| UdpService::start(node, VOICE));
    let services: Vec<UdpService> = services.collect::<Result<_, _>>().expect("the VIP is there");
    let source = lab.client.addrs()[0];
    let mut owners = BTreeSet::new();
    for _ in 0..12 {
        let socket = lab.client.space().run(|| UdpSocket::bind((source, 0)));
        let socket = socket.expect("a socket");
        let client = socket.local_addr().expect("its own address").to_string();
        let ask = |node| -> Why { json(node, &["why", &client, &VOICE.to_string(), "udp"]) };
        let told = [&lab.nodes[0], &lab.nodes[2]].map(ask);
        let answered = answers(&socket);
        for why in told {
            let bucket = why.bucket.expect("a bucket");
            assert_eq!(bucket.owner.as_ref(), Some(&answered), "{client} by {}", why.node);
            let expected = match why.node == answered {
                true => (BucketWord::Own, "accept", "own"),
                false => (BucketWord::Foreign, "drop", "foreign"),
            };
            let opening = (why.opening.verdict.as_str(), why.opening.reason.as_str());
            assert_eq!(
                (bucket.state, opening.0, opening.1),
                expected,
                "{client} by {}",
                why.node
            );
            // To the owner, if it came in here.
            let sent_on: Vec<&str> = (why.node != answered)
                .then_some(answered.as_str())
                .into_iter()
                .collect();
            assert_eq!(why.opening.sent_on, sent_on, "{client} by {}", why.node);
            assert_eq!(
                (why.protocol.as_str(), why.connection, why.belonging),
                ("udp", None, None)
            );
            assert_eq!(why.rule.map(|rule| rule.group).as_deref(), Some("voice"));
        }
        owners.insert(answered);
    }
    assert!(owners.len() > 1, "twelve ports and one owner: {owners:?}");
    drop(services);
}

#[test]
fn every_node_names_the_one_that_answers_and_says_what_is_missing() {
    let voice = Group {
        rules: vec![("udp", "5000".to_owned(), "on_port")],
        ..Group::tcp("voice", 0, "on_port")
    };
    let lab = Lab::serve(LabConfig {
        client_addrs: 12,
        groups: vec![
            Group::tcp("web", 80, "on_addr"),
            Group::tcp("shop", 8080, "on_port"),
            voice,
        ],
        ..LabConfig::default()
    })
    .expect("the farm comes up");
    let first = &lab.nodes[0];
    for addr in lab.client.addrs() {
        let record = lab.client.ask(*addr, WEB, LIMIT).expect("an answer");
        let answered = record.outcome.expect("a node answers");
        let mut buckets = Vec::new();
        for node in &lab.nodes {
            let why = why(node, &addr.to_string());
            let bucket = why.bucket.expect("a bucket");
            let mine = node.name() == answered;
            assert_eq!(why.node, node.name());
            assert_eq!(
                bucket.owner.as_deref(),
                Some(answered.as_str()),
                "{addr} by {}",
                node.name()
            );
            assert_eq!(why.opening.verdict, if mine { "accept" } else { "drop" });
            let expected = if mine { BucketWord::Own } else { BucketWord::Foreign };
            assert_eq!(bucket.state, expected, "{addr} by {}", node.name());
            assert_eq!(
                bucket.entry.as_deref(),
                Some(answered.as_str()),
                "with on_addr nobody forwards"
            );
            let since = bucket.since.expect("the entry that brought it");
            assert_eq!(since.module.as_deref(), Some(MODULE));
            let told = matches!(since.what, Happening::MapChanged { .. } | Happening::MapLearned { .. });
            assert!(told, "{since:?}");
            buckets.push(bucket.number);
        }
        assert!(buckets.windows(2).all(|pair| pair[0] == pair[1]), "{buckets:?}");
    }
    datagrams_go_where_nodes_say(&lab);
    let client = lab.client.addrs()[0].to_string();
    let second = lab.nodes[1].name();
    let there: Why = json(first, &["-H", second, "why", &client, &WEB.to_string()]);
    assert_eq!(there.node, second);
    let text = first.farm_ok(&["why", &client, &WEB.to_string()]).expect("text");
    assert!(text.contains(&format!("{MODULE}/web: tcp port 80, on_addr")), "{text}");

    let uncovered: Why = json(first, &["why", &client, &format!("{VIP}:81")]);
    assert_eq!((uncovered.rule, uncovered.opening.reason.as_str()), (None, "no_rule"));
    let text = first.farm_ok(&["why", &client, &format!("{VIP}:81")]).expect("text");
    mentions(&text, &["none of"]);
    let shop = format!("{VIP}:8080");
    refused(
        first,
        &["why", &client, &shop],
        exit::USAGE,
        &["name the client's port"],
    );
    let with_port: Why = json(first, &["why", &format!("{client}:4000"), &shop]);
    assert_eq!(
        (with_port.rule.map(|r| r.group), with_port.connection),
        (Some("shop".to_owned()), Some(false))
    );
    refused(
        first,
        &["why", &client, "198.18.0.77:80"],
        exit::NOT_FOUND,
        &["is no virtual IP"],
    );
    refused(first, &["map", "nothing"], exit::NOT_FOUND, &["is not configured"]);
    refused(first, &["map", "--group", "x"], exit::NOT_FOUND, &["there is no group"]);
    refused(first, &["flows", "--node", "x"], exit::NOT_FOUND, &["there is no node"]);

    let stopped = &lab.nodes[2];
    stopped.farm_ok(&["stop", MODULE]).expect("the module stops");
    let idle = why(stopped, &client);
    assert_eq!(
        (idle.rule.map(|r| r.group), idle.bucket),
        (Some("web".to_owned()), None)
    );
    assert_eq!(idle.opening.verdict, "pass", "this host does not carry the address");
    assert_eq!(idle.serving, [first.name(), second]);
    let text = stopped.farm_ok(&["why", &client, &WEB.to_string()]).expect("text");
    mentions(&text, &["is STOP NotReady on"]);
    // What it does not know it asks one that serves.
    let told = idle.elsewhere.expect("a node that serves was asked");
    let here = why(first, &client);
    assert_eq!(told.node, first.name());
    assert_eq!(
        told.bucket.map(|b| (b.number, b.owner)),
        here.bucket.map(|b| (b.number, b.owner))
    );
    mentions(
        &text,
        &[
            &format!("as {} sees it", stopped.name()),
            &format!("as {} sees it", first.name()),
        ],
    );
    refused(stopped, &["map", MODULE], exit::REFUSED, &["follows no map"]);
    let maps: Maps = json(stopped, &["map"]);
    assert_eq!((maps.groups.len(), maps.absent.len()), (0, 1));
    assert_eq!(stopped.stop_farmd().expect("farmd ends"), Some(0));
    let web = WEB.to_string();
    for args in [&["why", client.as_str(), web.as_str()][..], &["map"], &["flows"]] {
        refused(stopped, args, exit::NO_DAEMON, &["farmd is not running"]);
    }
}

#[test]
fn a_drained_node_still_has_its_connections_and_everybody_says_so() {
    let lab = Lab::serve(LabConfig {
        client_addrs: 40,
        groups: vec![Group::tcp("web", 80, "on_port")],
        ..LabConfig::default()
    })
    .expect("the farm comes up");
    let holder = Holder::start(&lab.client, HoldConfig::new(WEB, 90)).expect("connections can be held");
    let before: Vec<Flows> = lab
        .nodes
        .iter()
        .map(|node| json(node, &["flows", "-n", "1000"]))
        .collect();
    let counts: Vec<u32> = before.iter().map(|flows| flows.connections).collect();
    assert_eq!(counts.iter().sum::<u32>(), 90, "each is somewhere: {counts:?}");
    assert!(
        before.iter().all(|flows| flows.elsewhere == 0),
        "and at home: {before:?}"
    );

    let drained = &lab.nodes[2];
    drained
        .farm_ok(&["drain", "--no-wait", "--timeout", "2m"])
        .expect("drains");
    let flows: Flows = wait_until(LIMIT, "its connections to be in others' buckets", || {
        let flows: Flows = json(drained, &["flows", "-n", "3"]);
        (flows.elsewhere == counts[2]).then_some(flows)
    })
    .unwrap_or_else(|e| panic!("{e}: {counts:?}"));
    assert_eq!(
        (flows.connections, flows.flows.len(), flows.clients.len()),
        (counts[2], 3, 3)
    );
    assert!(
        flows
            .owners
            .iter()
            .all(|owner| owner.node.as_deref() != Some(drained.name()))
    );

    let flow = flows.flows.first().expect("one is named");
    let owner = lab
        .nodes
        .iter()
        .find(|node| Some(node.name()) == flow.owner.as_deref())
        .expect("an owner");
    let filter = [
        "flows",
        "--client",
        &flow.client.ip().to_string(),
        "--node",
        owner.name(),
    ];
    let narrowed: Flows = json(drained, &filter);
    assert!(narrowed.flows.contains(flow), "{flow:?} in {narrowed:?}");
    assert!(
        narrowed
            .flows
            .iter()
            .all(|f| f.client.ip() == flow.client.ip() && f.owner == flow.owner)
    );

    let here = why(drained, &flow.client.to_string());
    let bucket = here.bucket.expect("a bucket");
    assert_eq!(
        (bucket.number, bucket.owner.as_ref()),
        (flow.bucket, flow.owner.as_ref())
    );
    assert_eq!((bucket.state, here.connection), (BucketWord::Draining, Some(true)));
    assert_eq!(here.opening.verdict, "drop");
    assert_eq!(here.belonging.map(|v| v.verdict).as_deref(), Some("accept"));
    let since = bucket.since.expect("the entry that brought it");
    let Happening::MapChanged { causes, .. } = &since.what else {
        panic!("{since:?}")
    };
    let named = causes.iter().any(|cause| {
        matches!(cause, MapCause::Weight { node, to: 0, why, .. } if node == drained.name() && why.starts_with("drained"))
    });
    assert!(named, "the drain is the cause: {causes:?}");

    let there = why(owner, &flow.client.to_string());
    let bucket = there.bucket.expect("a bucket");
    assert_eq!((bucket.state, there.connection), (BucketWord::Guarded, Some(false)));
    assert_eq!(bucket.holders, [drained.name()]);
    assert_eq!(there.opening.verdict, "accept");
    let belonging = there.belonging.expect("a verdict");
    assert_eq!(
        (belonging.verdict.as_str(), belonging.reason.as_str()),
        ("drop", "guarded_unknown")
    );
    assert_eq!(belonging.sent_on, [drained.name()], "the one that has it gets it");

    let maps: Maps = json(owner, &["map", MODULE, "--group", "web"]);
    let row = maps.groups[0]
        .nodes
        .iter()
        .find(|n| n.node == drained.name())
        .expect("a row");
    assert_eq!((row.buckets, row.weight), (0, Some(0)));
    assert!(
        row.holds > 0 && maps.groups[0].here.guarded > 0,
        "{row:?} {:?}",
        maps.groups[0].here
    );
    let picture = drained.farm_ok(&["map"]).expect("a picture");
    let cells: Vec<char> = picture
        .lines()
        .filter(|line| line.len() == 7 + 64)
        .flat_map(|line| line[7..].chars())
        .collect();
    assert_eq!(cells.len(), 4096, "{picture}");
    let shown = |sign: char| cells.iter().filter(|cell| **cell == sign).count() as u32;
    let maps: Maps = json(drained, &["map"]);
    let group = &maps.groups[0];
    assert_eq!(shown('C') + shown('c'), 0, "it owns nothing: {picture}");
    assert_eq!(shown('a') + shown('b'), group.here.draining, "{picture}");
    assert_eq!(shown('A') + shown('a'), group.nodes[0].buckets, "{picture}");

    drained.farm_ok(&["undrain"]).expect("undrains");
    let report = holder.stop().expect("they end");
    assert!(report.broken().is_empty(), "{:?}", report.broken());
}

/// A question about all connections costs farmd's owner loop nothing that a heartbeat would wait for.
#[test]
fn questions_one_after_the_other_leave_no_pause() {
    let lab = Lab::serve(LabConfig {
        client_addrs: 40,
        groups: vec![Group::tcp("web", 80, "on_port")],
        ..LabConfig::default()
    })
    .expect("the farm comes up");
    let node = &lab.nodes[0];
    let holder = Holder::start(&lab.client, HoldConfig::new(WEB, 300)).expect("connections can be held");
    let run = |path: &str| -> serde_json::Value { node.ask(path).expect("an answer") };
    for _ in 0..50 {
        assert!(run("/v1/flows?n=1000")["connections"].as_u64().is_some_and(|n| n > 50));
        assert_eq!(run("/v1/map")["groups"][0]["of"], 4096);
        let client = Ipv4Addr::new(198, 18, 16, 1);
        assert!(run(&format!("/v1/why?client={client}&port=9&vip={VIP}&vip_port=80"))["bucket"].is_object());
    }
    assert_eq!(crate::common::counter(node, "pauses"), 0);
    assert!(holder.stop().expect("they end").broken().is_empty());
}
