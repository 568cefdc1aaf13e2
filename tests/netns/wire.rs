//! Traffic that is not one small segment: fragments, merged segments, ICMP errors; and what must not pass, or not leave the host.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use farm_lab::client::Batch;
use farm_lab::http::Failure;
use farm_lab::process::run_limited;
use farm_lab::wire::Watcher;
use farm_lab::{Client, Group, Lab, LabConfig, MODULE, Mode, Node, VIP};

use crate::bulk::{Service, Step, bulk, pattern, spread, transfers};
use crate::common::{counter, shell_ok};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
const BULK: SocketAddr = SocketAddr::V4(SocketAddrV4::new(VIP, 8080));
const BY_ADDR: SocketAddrV4 = SocketAddrV4::new(VIP, 5000);
const BY_PORT: SocketAddrV4 = SocketAddrV4::new(VIP, 5001);
const MIB: usize = 1024 * 1024;

fn farm(mode: Mode, filter: &'static str) -> Lab {
    let tcp = Group {
        rules: vec![("tcp", "80".to_owned(), filter), ("tcp", "8080".to_owned(), filter)],
        ..Group::tcp("web", 0, filter)
    };
    let udp = Group {
        rules: vec![
            ("udp", "5000".to_owned(), "on_addr"),
            ("udp", "5001".to_owned(), "on_port"),
        ],
        ..Group::tcp("voice", 0, "on_addr")
    };
    let lab = Lab::serve(LabConfig {
        routed: true,
        client_addrs: 40,
        groups: vec![tcp, udp],
        ..LabConfig::with_mode(mode)
    });
    lab.expect("the farm comes up")
}

/// Answers each datagram to `at` with the node's name and the datagram.
fn udp_echo(node: &Node, at: SocketAddrV4) -> Service {
    let socket = node.space().run(|| UdpSocket::bind(at)).expect("the VIP is there");
    socket
        .set_read_timeout(Some(Duration::from_millis(50)))
        .expect("a limit");
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, name) = (Arc::clone(&stop), node.name().to_owned());
    let thread = std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while !stopped.load(Ordering::Relaxed) {
            if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                let answer = [name.as_bytes(), b" ", &buffer[..length]].concat();
                let _ = socket.send_to(&answer, from);
            }
        }
    });
    Service {
        stop,
        threads: vec![thread],
    }
}

/// Sends `text` once and returns the names of the nodes that sent it back.
fn udp_ask(client: &Client, source: Ipv4Addr, to: SocketAddrV4, text: &[u8]) -> Vec<String> {
    let socket = client.space().run(|| UdpSocket::bind((source, 0))).expect("a socket");
    socket.send_to(text, to).expect("it is sent");
    socket.set_read_timeout(Some(Duration::from_secs(2))).expect("a limit");
    let mut answers = Vec::new();
    let mut buffer = vec![0; 65_536];
    while let Ok(length) = socket.recv(&mut buffer) {
        let at = buffer.iter().position(|byte| *byte == b' ').expect("a name in front");
        assert!(buffer[at + 1..length] == *text, "{source}: not what was sent came back");
        answers.push(String::from_utf8_lossy(&buffer[..at]).into_owned());
        // After the first answer only a second one, by another node, is waited for.
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .expect("a limit");
    }
    answers
}

/// Each client's echo request of 4000 bytes is answered once.
fn echo_of_4000_bytes(lab: &Lab) {
    let mut wrong = Vec::new();
    for source in &lab.client.addrs()[..12] {
        let mut ping = lab.client.space().command("ping");
        let (source, vip) = (source.to_string(), VIP.to_string());
        ping.args(["-c", "2", "-i", "0.02", "-W", "1", "-s", "4000", "-I", &source, &vip]);
        let pinged = run_limited(ping, Duration::from_secs(10)).expect("ping runs");
        if !pinged.ok() || !pinged.stdout.contains(" 0% packet loss") || pinged.stdout.contains("DUP!") {
            wrong.push(pinged.stdout);
        }
    }
    assert!(wrong.is_empty(), "{} of 12 clients: {}", wrong.len(), wrong[0]);
}

/// Each client's datagram of 4000 bytes is answered once, and whole.
fn datagrams_of_4000_bytes(lab: &Lab) {
    let services: Vec<Service> = lab
        .nodes
        .iter()
        .flat_map(|node| [udp_echo(node, BY_ADDR), udp_echo(node, BY_PORT)])
        .collect();
    let far = lab.far.as_ref().expect("the lab is routed");
    for to in [BY_ADDR, BY_PORT] {
        let mut served = BTreeMap::<String, usize>::new();
        for (client, sources) in [(&lab.client, 20), (far, 10)] {
            for source in &client.addrs()[..sources] {
                let text = pattern(u64::from(u32::from(*source)), 4000);
                let answers = udp_ask(client, *source, to, &text);
                assert_eq!(answers.len(), 1, "{source} to {to}: {answers:?}");
                *served.entry(answers[0].clone()).or_default() += 1;
            }
        }
        assert_eq!(served.len(), 3, "{to}: {served:?}");
    }
    drop(services);
}

fn fragments(mode: Mode) {
    let lab = farm(mode, "on_addr");
    datagrams_of_4000_bytes(&lab);
    echo_of_4000_bytes(&lab);
}

#[test]
fn fragmented_datagrams_and_echoes_are_answered_once_in_directed_mode() {
    fragments(Mode::Directed);
}

#[test]
fn fragmented_datagrams_and_echoes_are_answered_once_in_invisible_mode() {
    fragments(Mode::Invisible);
}

/// Uploads in merged segments; and downloads by a client behind a link whose MTU shrinks under its connections: the
/// router's "fragmentation needed" must reach the server that has the connection.
fn bulk_transfers(mode: Mode) {
    let lab = farm(mode, "on_addr");
    let services: Vec<Service> = lab.nodes.iter().map(|node| bulk(node, BULK)).collect();
    let near = spread(&lab.client, WEB.into(), 12);
    let servers = transfers(&lab.client, BULK, &near, &[Step::Up(MIB), Step::Down(MIB)], || ());
    assert_eq!(servers.len(), 3, "{servers:?}");
    transfers(&lab.client, BULK, &near[..1], &[Step::Up(16 * MIB)], || ());

    let (far, router) = (
        lab.far.as_ref().expect("the lab is routed"),
        lab.router.as_ref().expect("the lab is routed"),
    );
    let beyond = spread(far, WEB.into(), 32);
    let steps = [Step::Up(MIB / 4), Step::Down(MIB), Step::Down(MIB)];
    let servers = transfers(far, BULK, &beyond[..16], &steps, || {
        router.ip(&["link set eth1 mtu 1000"]).expect("a smaller MTU");
    });
    assert_eq!(servers.len(), 3, "{servers:?}");
    // And for connections that begin on the small link.
    transfers(far, BULK, &beyond[16..], &[Step::Down(MIB)], || ());
    let learned: usize = lab
        .nodes
        .iter()
        .map(|node| shell_ok(node, "ip -o route show cache").matches("mtu 1000").count())
        .sum();
    assert!(
        learned >= 32,
        "the servers learned of {learned} clients, 32 are behind the link"
    );
    drop(services);
}

#[test]
fn uploads_and_a_shrinking_path_keep_every_byte_in_directed_mode() {
    bulk_transfers(Mode::Directed);
}

#[test]
fn uploads_and_a_shrinking_path_keep_every_byte_in_invisible_mode() {
    bulk_transfers(Mode::Invisible);
}

#[test]
fn traffic_to_a_port_without_a_rule_is_dropped_in_silence_and_counted() {
    let lab = farm(Mode::Directed, "on_addr");
    // Something listens there on every node: it must not be reached.
    let listeners: Vec<TcpListener> = lab
        .nodes
        .iter()
        .map(|node| {
            node.space()
                .run(|| TcpListener::bind("0.0.0.0:81"))
                .expect("a free port")
        })
        .collect();
    let dropped = || {
        lab.nodes
            .iter()
            .map(|node| counter(node, "frames_no_rule"))
            .sum::<u64>()
    };
    let before = dropped();
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    let to = SocketAddrV4::new(VIP, 81);
    let report = lab.client.batch(Batch {
        limit: Duration::from_millis(500),
        ..Batch::new(to, 16)
    });
    let failures = report.expect("a batch").failures();
    assert_eq!(failures.get(&Failure::ConnectTimeout), Some(&16), "{failures:?}");
    // The same port of another protocol, and a protocol without ports.
    for source in &lab.client.addrs()[..4] {
        let udp = SocketAddrV4::new(VIP, 80);
        let socket = lab
            .client
            .space()
            .run(|| UdpSocket::bind((*source, 0)))
            .expect("a socket");
        socket.connect(udp).expect("a destination");
        socket.send(b"who").expect("it is sent");
        socket
            .set_read_timeout(Some(Duration::from_millis(100)))
            .expect("a limit");
        let answer = socket.recv(&mut [0; 16]);
        let kind = answer.expect_err("nobody answers").kind();
        assert!(
            matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
            "{kind:?}"
        );
    }
    let evidence = watcher.stop().expect("the watcher ends");
    evidence.check_single_owner().expect("not a word on the wire");
    assert!(evidence.syn_acks.is_empty(), "{:?}", evidence.syn_acks);
    assert!(dropped() - before >= 20, "{} frames were counted", dropped() - before);
    drop(listeners);
}

/// One request from a process of the node itself; the name of who answered.
fn ask_locally(node: &Node) -> io::Result<String> {
    let stream = node
        .space()
        .run(|| TcpStream::connect_timeout(&WEB.into(), Duration::from_millis(800)))?;
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    (&stream).write_all(b"GET /who HTTP/1.1\r\nHost: farm\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    (&stream).read_to_string(&mut answer)?;
    let body = answer.split("\r\n\r\n").nth(1).unwrap_or_default();
    let who: BTreeMap<String, String> = serde_json::from_str(body)?;
    Ok(who.get("node").cloned().unwrap_or_default())
}

/// A process of a node uses the service by its virtual address like everybody else.
fn local_processes(mode: Mode) {
    let lab = farm(mode, "on_port");
    for node in &lab.nodes {
        for _ in 0..5 {
            let who = ask_locally(node).unwrap_or_else(|e| panic!("{}: {e}", node.name()));
            assert_eq!(who, node.name(), "its own service is the nearest");
        }
    }
    // A node whose module is stopped is a client like any other: its connections are dealt to the others, whichever is its entry.
    let [stopped, others @ ..] = &lab.nodes[..] else {
        panic!("three nodes")
    };
    stopped.farm_ok(&["stop", MODULE]).expect("it stops");
    let asked: Vec<io::Result<String>> = (0..16).map(|_| ask_locally(stopped)).collect();
    let failed = asked.iter().filter(|one| one.is_err()).count();
    assert_eq!(failed, 0, "of 16 connections of a stopped node: {asked:?}");
    let served: BTreeSet<String> = asked.into_iter().flatten().collect();
    let expected: BTreeSet<String> = others.iter().map(|node| node.name().to_owned()).collect();
    assert_eq!(served, expected);
}

#[test]
fn a_process_on_a_node_reaches_the_service_in_directed_mode() {
    local_processes(Mode::Directed);
}

#[test]
fn a_process_on_a_node_reaches_the_service_in_invisible_mode() {
    local_processes(Mode::Invisible);
}
