use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use farm_sys::conntrack::{Conntrack, CtFlow};
use farm_sys::netns::NetNs;
use farm_sys::sysctl;

use crate::lab::{self, LIMIT, Lab, SILENCE};

/// Addresses of one family. Client `b` asks for the VIP at host `a`, which sends it on to container `c`, by table:
/// port 80 to the container, 81 to an address behind which nobody answers, 82 to another port of the VIP itself.
struct Family {
    nft: &'static str,
    client: &'static str,
    vip: &'static str,
    host: &'static str,
    container: &'static str,
    silent: &'static str,
    prefix: u8,
}

const V4: Family = Family {
    nft: "ip",
    client: "198.18.0.2",
    vip: "198.18.0.99",
    host: "198.18.1.1",
    container: "198.18.1.2",
    silent: "198.18.1.77",
    prefix: 24,
};

const V6: Family = Family {
    nft: "ip6",
    client: "fd00:198:18::2",
    vip: "fd00:198:18::99",
    host: "fd00:198:19::1",
    container: "fd00:198:19::2",
    silent: "fd00:198:19::77",
    prefix: 64,
};

/// The port in the container, and the one of the VIP that port 82 is translated to.
const INNER: u16 = 8080;

struct Translated {
    lab: Lab,
    c: NetNs,
    vip: IpAddr,
    conntrack: Conntrack,
}

/// Runs a program in a namespace; each line of `lines` holds its arguments.
fn run(ns: &NetNs, program: &str, lines: &str) {
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let mut command = Command::new(program);
        ns.command(command.args(line.split_whitespace()));
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program} {line}: {text}");
    }
}

impl Translated {
    fn new(family: &Family) -> Self {
        let (lab, c) = (Lab::new(), NetNs::create().unwrap());
        let Family {
            nft,
            client,
            vip,
            host,
            container,
            silent,
            prefix,
        } = family;
        let nodad = if *nft == "ip6" { "nodad" } else { "" };
        let wake = |ns: &NetNs, name: &str| {
            ns.run(|| sysctl::write(&sysctl::interface("ipv6", name, "disable_ipv6"), "0").unwrap());
        };
        run(&lab.a, "ip", "link add a1 type veth peer name c0");
        run(&lab.a, "ip", &format!("link set c0 netns {}", c.path().display()));
        if *nft == "ip6" {
            wake(&lab.a, "a0");
            wake(&lab.b, "b0");
            run(&lab.b, "ip", &format!("address add {client}/{prefix} dev b0 nodad"));
        }
        lab.a.run(|| {
            sysctl::write("net/ipv4/ip_forward", "1").unwrap();
            sysctl::write("net/ipv6/conf/all/forwarding", "1").unwrap();
        });
        run(
            &lab.a,
            "ip",
            &format!(
                "address add {vip}/{prefix} dev a0 {nodad}
                 address add {host}/{prefix} dev a1 {nodad}
                 link set a1 up
                 neighbour add {silent} lladdr 02:00:00:00:00:77 dev a1"
            ),
        );
        run(
            &c,
            "ip",
            &format!(
                "address add {container}/{prefix} dev c0 {nodad}
                 link set c0 up
                 route add default via {host}"
            ),
        );
        let at = |address: &str, port: u16| SocketAddr::new(address.parse().unwrap(), port);
        run(
            &lab.a,
            "nft",
            &format!(
                "add table {nft} service
                 add chain {nft} service arrival {{ type nat hook prerouting priority -100 ; }}
                 add rule {nft} service arrival {nft} daddr {vip} tcp dport 80 dnat to {}
                 add rule {nft} service arrival {nft} daddr {vip} tcp dport 81 dnat to {}
                 add rule {nft} service arrival {nft} daddr {vip} tcp dport 82 dnat to {}",
                at(container, INNER),
                at(silent, INNER),
                at(vip, INNER),
            ),
        );
        let conntrack = lab.a.run(|| Conntrack::open().unwrap());
        assert!(conntrack.supported());
        Self {
            lab,
            c,
            vip: vip.parse().unwrap(),
            conntrack,
        }
    }

    fn connect(&self, port: u16, limit: Duration) -> std::io::Result<TcpStream> {
        let client = self
            .lab
            .b
            .run(|| TcpStream::connect_timeout(&SocketAddr::new(self.vip, port), limit))?;
        client.set_read_timeout(Some(LIMIT)).unwrap();
        Ok(client)
    }

    fn flows(&mut self) -> Vec<CtFlow> {
        self.conntrack.tcp_flows(&[self.vip]).unwrap()
    }

    /// The question for one connection.
    fn has(&mut self, flow: CtFlow) -> bool {
        self.conntrack.has_tcp(flow.vip, flow.client).unwrap()
    }

    /// Waits until nothing is listed any more.
    fn wait_empty(&mut self) {
        let begin = Instant::now();
        while !self.flows().is_empty() {
            assert!(begin.elapsed() < LIMIT, "{:?}", self.flows());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How many entries the host's table has, as a second opinion.
    fn tracked(&self) -> usize {
        let count = self
            .lab
            .a
            .run(|| sysctl::read("net/netfilter/nf_conntrack_count").unwrap());
        count.parse().unwrap()
    }
}

fn flow_of(client: &TcpStream, server: SocketAddr) -> CtFlow {
    CtFlow {
        client: client.local_addr().unwrap(),
        vip: client.peer_addr().unwrap(),
        server,
        peer: client.local_addr().unwrap(),
    }
}

fn lists_a_connection_while_it_lives(family: &Family) {
    if !lab::privileged() {
        return;
    }
    let mut host = Translated::new(family);
    let inner = SocketAddr::new(family.container.parse().unwrap(), INNER);
    let listener = host.c.run(|| TcpListener::bind(inner).unwrap());
    assert_eq!(host.flows(), []);
    assert!(!host.conntrack.tracks().unwrap());

    let mut client = host.connect(80, LIMIT).unwrap();
    let (mut server, peer) = listener.accept().unwrap();
    assert_eq!(peer, client.local_addr().unwrap(), "the client's own address");
    client.write_all(b"ask").unwrap();
    server.read_exact(&mut [0; 3]).unwrap();
    let flow = flow_of(&client, inner);
    assert_eq!(host.flows(), [flow]);
    assert!(host.has(flow) && host.conntrack.tracks().unwrap());
    let mut other = flow;
    other.client.set_port(1);
    assert!(!host.has(other));
    let others = [
        "198.18.0.98".parse().unwrap(),
        "fd00:198:18::98".parse().unwrap(),
        inner.ip(),
    ];
    assert_eq!(host.conntrack.tcp_flows(&others).unwrap(), [], "not their VIP");
    assert_eq!(host.conntrack.tcp_flows(&[]).unwrap(), []);
    let all = [others[0], host.vip, others[1]];
    assert_eq!(host.conntrack.tcp_flows(&all).unwrap(), [flow]);

    // Half closed, the rest of the answer is still to come.
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(server.read(&mut [0]).unwrap(), 0);
    assert_eq!(host.flows(), [flow]);
    assert!(host.has(flow));
    drop(server);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    host.wait_empty();
    assert!(!host.has(flow));
    assert_ne!(host.tracked(), 0, "the entry is there yet, in TIME_WAIT");
}

#[test]
fn a_connection_into_a_container_is_listed_while_it_lives() {
    lists_a_connection_while_it_lives(&V4);
}

#[test]
fn an_ipv6_connection_into_a_container_is_listed_while_it_lives() {
    lists_a_connection_while_it_lives(&V6);
}

fn a_forgotten_connection_is_none(family: &Family) {
    if !lab::privileged() {
        return;
    }
    let mut host = Translated::new(family);
    let inner = SocketAddr::new(family.container.parse().unwrap(), INNER);
    let listener = host.c.run(|| TcpListener::bind(inner).unwrap());
    let (gone, stays) = (host.connect(80, LIMIT).unwrap(), host.connect(80, LIMIT).unwrap());
    let _servers = [listener.accept().unwrap(), listener.accept().unwrap()];
    let (gone, stays) = (flow_of(&gone, inner), flow_of(&stays, inner));
    for _ in ["known", "unknown by now"] {
        host.conntrack.forget(&gone).unwrap();
        assert_eq!(host.flows(), [stays]);
    }
}

#[test]
fn a_connection_that_is_to_be_forgotten_is_none_any_more() {
    a_forgotten_connection_is_none(&V4);
}

#[test]
fn an_ipv6_connection_that_is_to_be_forgotten_is_none_any_more() {
    a_forgotten_connection_is_none(&V6);
}

#[test]
fn a_tracked_connection_to_the_vip_itself_is_not_listed() {
    if !lab::privileged() {
        return;
    }
    let mut host = Translated::new(&V4);
    let listener = host.lab.a.run(|| TcpListener::bind((host.vip, INNER)).unwrap());
    let direct = host.connect(INNER, LIMIT).unwrap();
    let _server = listener.accept().unwrap();
    assert_eq!(host.tracked(), 1);
    assert_eq!(host.flows(), []);
    let inner = SocketAddr::new(host.vip, INNER);
    assert!(!host.has(flow_of(&direct, inner)));

    // The same socket under another port of the VIP is one that the socket table shows under a port no client asked for.
    let translated = host.connect(82, LIMIT).unwrap();
    assert_eq!(host.flows(), [flow_of(&translated, inner)]);
}

#[test]
fn a_request_that_nobody_answers_is_not_listed() {
    if !lab::privileged() {
        return;
    }
    let mut host = Translated::new(&V4);
    let error = host.connect(81, SILENCE).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    assert_eq!(host.tracked(), 1);
    assert_eq!(host.flows(), []);
    // A refused one neither: nobody listens in the container.
    let error = host.connect(80, LIMIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    host.wait_empty();
}

#[test]
fn a_host_that_translates_nothing_has_an_empty_list() {
    if !lab::privileged() {
        return;
    }
    let ns = NetNs::create().unwrap();
    let mut conntrack = ns.run(|| Conntrack::open().unwrap());
    let vips = [V4.vip.parse().unwrap(), V6.vip.parse().unwrap()];
    assert_eq!(conntrack.tcp_flows(&vips).unwrap(), []);
}

#[test]
fn a_table_full_of_other_traffic_costs_little() {
    if !lab::privileged() {
        return;
    }
    const COUNT: u16 = 20_000;
    let mut host = Translated::new(&V4);
    let inner = SocketAddr::new(V4.container.parse().unwrap(), INNER);
    let listener = host.c.run(|| TcpListener::bind(inner).unwrap());
    let client = host.connect(80, LIMIT).unwrap();
    let _server = listener.accept().unwrap();
    host.lab.b.run(|| {
        let socket = std::net::UdpSocket::bind((V4.client, 0)).unwrap();
        for port in 1..=COUNT {
            // Closed ports answer with errors, which the next send reports.
            let _ = socket.send_to(b"x", (V4.vip, port));
        }
    });
    let tracked = host.tracked();
    assert!(tracked > usize::from(COUNT) / 2, "{tracked}");
    let begin = Instant::now();
    let flows = host.flows();
    let elapsed = begin.elapsed();
    println!("one among {tracked} in {elapsed:?}");
    assert_eq!(flows, [flow_of(&client, inner)]);
    // Room for a busy machine and an older kernel that lists all of them.
    assert!(elapsed < Duration::from_millis(500), "{elapsed:?} for {tracked}");
}

#[test]
fn without_privilege_it_says_so() {
    if !lab::privileged() {
        return;
    }
    let ns = NetNs::create().unwrap();
    ns.run(|| {
        // SAFETY: setresuid takes three integers, and as a bare system call changes this thread alone.
        assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, 65_534, 65_534, 65_534) }, 0);
        let error = Conntrack::open().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}");
        assert!(error.to_string().contains("connection tracking"), "{error}");
    });
}
