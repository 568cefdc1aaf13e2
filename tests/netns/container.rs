//! Connections that end in a container: another network namespace, to which the host translates them.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use farm_lab::process::spawn_kept;
use farm_lab::space::{Space, connect};
use farm_lab::{Group, Lab, LabConfig, MODULE, Node, VIP};
use tokio::net::TcpSocket;

use crate::common::{farm_of, mentions};

const PUBLISHED: u16 = 8080;
const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, PUBLISHED);
const INNER: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 18, 200, 2), 9000);
const LIMIT: Duration = Duration::from_secs(10);

/// A container of a node, with a service in it that answers at the virtual address.
struct Container {
    listener: TcpListener,
    /// By it the namespace is found, as a container's is.
    process: Child,
}

impl Container {
    /// With `masquerade` it takes all clients for its host.
    fn of(node: &Node, masquerade: bool) -> Self {
        let space = Space::create("container").expect("a namespace");
        connect(node.space(), "c1", &space, "c0").expect("a link");
        let host = Ipv4Addr::new(198, 18, 200, 1);
        node.space()
            .ip(&[format!("address add {host}/24 dev c1"), "link set c1 up".to_owned()])
            .expect("the host's end");
        space
            .ip(&[
                format!("address add {}/24 dev c0", INNER.ip()),
                "link set c0 up".to_owned(),
                format!("route add default via {host}"),
            ])
            .expect("the container's end");
        node.space().sysctl("net.ipv4.ip_forward", "1").expect("a sysctl");
        node.space()
            .nft(&format!(
                "table ip published {{ chain arrival {{ type nat hook prerouting priority -100; \
                 ip daddr {VIP} tcp dport {PUBLISHED} dnat to {INNER}; }}; \
                 chain passage {{ type nat hook postrouting priority 100; {}; }}; }}",
                if masquerade { "oif c1 masquerade" } else { "" }
            ))
            .expect("a translation");
        // Ends with the node's power at the latest.
        let init = node.init_pid().expect("the node has power").to_string();
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net={}", space.path()))
            .args(["--target", &init, "--pid", "--mount", "--"])
            .args(["sh", "-c", "echo; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut process = spawn_kept(command).expect("a process");
        let mut told = process.stdout.take().expect("its output");
        told.read_exact(&mut [0]).expect("it is there");
        let listener = space.run(|| TcpListener::bind(INNER).expect("the service listens"));
        Self { listener, process }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        // The node's power may have ended it.
        let _ = self.process.wait();
    }
}

/// A connection to the published port from each client address; those of the node without a container are refused.
fn connections(lab: &Lab) -> Vec<TcpStream> {
    let open = async |from: &Ipv4Addr| {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind(SocketAddr::from((*from, 0))).expect("an address");
        match socket.connect(WEB.into()).await {
            Ok(stream) => Some(stream.into_std().expect("a connection")),
            Err(refused) => {
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{from}: {refused}");
                None
            }
        }
    };
    lab.client.space().run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let mut opened = Vec::new();
            for from in lab.client.addrs() {
                opened.extend(open(from).await);
            }
            opened
        })
    })
}

/// A farm of two whose first node has a container behind the published port, and the connections to it, both ends.
fn farm_with_container(masquerade: bool) -> (Lab, Container, Vec<TcpStream>, Vec<TcpStream>) {
    let config = LabConfig {
        groups: vec![
            Group::tcp("web", 80, "on_addr"),
            Group::tcp("published", PUBLISHED, "on_addr"),
        ],
        ..farm_of(2)
    };
    let lab = Lab::new(config).expect("a lab");
    lab.start_daemons().expect("the daemons start");
    for node in &lab.nodes {
        let module = lab.module_text(node, Some("1s"));
        node.install_text(MODULE, &module, &["80".to_owned()])
            .expect("a module");
    }
    let container = Container::of(&lab.nodes[0], masquerade);
    lab.start_module(MODULE).expect("the module starts");
    let clients = connections(&lab);
    assert!(clients.len() > 5, "{}", clients.len());
    let servers: Vec<TcpStream> = clients
        .iter()
        .map(|_| container.listener.accept().expect("a connection").0)
        .collect();
    for mut stream in clients.iter().chain(&servers) {
        stream.set_nonblocking(false).expect("it waits");
        stream.set_read_timeout(Some(LIMIT)).expect("not for ever");
        stream.write_all(b"x").expect("it goes out");
    }
    for mut stream in clients.iter().chain(&servers) {
        stream.read_exact(&mut [0]).expect("it comes in");
    }
    (lab, container, clients, servers)
}

/// What a drain of the first node says that waits for a second.
fn drained(lab: &Lab) -> String {
    let drained = lab.nodes[0].farm(&["drain", "--group", "published", "--timeout", "1s"]);
    let drained = drained.expect("farm runs");
    assert!(drained.ok(), "{drained:?}");
    drained.stdout
}

fn end_with(streams: &[TcpStream], kind: ErrorKind) {
    for mut stream in streams {
        let ended = stream.read(&mut [0]).expect_err("an end");
        assert_eq!(ended.kind(), kind, "{stream:?}: {ended}");
    }
}

fn are_reset_by_a_drain(masquerade: bool) {
    let (lab, _container, clients, servers) = farm_with_container(masquerade);
    let from: BTreeSet<String> = clients
        .iter()
        .map(|c| c.local_addr().expect("its own").ip().to_string())
        .collect();
    let said = drained(&lab);
    mentions(&said, &[&format!("drained; {} connections were reset", clients.len())]);
    assert!(from.iter().any(|addr| said.contains(addr)), "who was left:\n{said}");
    end_with(&clients, ErrorKind::ConnectionReset);
    end_with(&servers, ErrorKind::ConnectionAborted);
}

#[test]
fn connections_that_end_in_a_container_are_reset_at_both_ends_when_the_time_of_a_drain_is_over() {
    are_reset_by_a_drain(false);
}

#[test]
fn a_container_that_takes_all_clients_for_its_host_is_none_the_less_found() {
    are_reset_by_a_drain(true);
}

#[test]
fn a_stop_resets_connections_that_end_in_a_container() {
    let (lab, _container, clients, servers) = farm_with_container(false);
    lab.nodes[0].farm_ok(&["stop", MODULE]).expect("it stops");
    end_with(&clients, ErrorKind::ConnectionReset);
    end_with(&servers, ErrorKind::ConnectionAborted);
}

#[test]
fn connections_of_a_container_that_has_gone_end_with_the_drain_and_their_clients_learn_it_when_they_speak() {
    for way_only in [false, true] {
        let (lab, container, clients, servers) = farm_with_container(false);
        // Nothing of it says goodbye.
        lab.nodes[0]
            .space()
            .ip(&["link del c1"])
            .expect("the container is cut off");
        let _left = way_only.then_some((container, servers));
        let said = drained(&lab);
        mentions(&said, &[&format!("drained; {} connections were reset", clients.len())]);
        for mut client in &clients {
            client.write_all(b"x").expect("it goes out");
        }
        end_with(&clients, ErrorKind::ConnectionReset);
    }
}
