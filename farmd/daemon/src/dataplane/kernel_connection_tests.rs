//! Connections that this host has in guarded and draining buckets, of both families: their segments, whole or in fragments, and the ICMP errors that quote one are told
//! from those that belong to nothing here. XDP asks no socket and passes all of them up.

use super::battery::part;
use super::early::PASS;
use super::*;

/// Port of the group whose buckets are guarded, and of the one whose buckets are draining.
const PORTS: [u16; 2] = [80, 443];

/// Of one family: the service and, without a connection, a client; and a router on the way.
const ADDRESSES: [[&str; 3]; 2] = [
    ["127.0.0.20", "127.0.0.99", "192.0.2.1"],
    ["::1", "2001:db8:1::99", "2001:db8:2::1"],
];

/// The guarded group and the draining one.
fn two(addr: IpAddr, mode: L2Mode) -> Plan {
    let mut two = vec![
        group(BucketState::Guarded, Some(0)),
        group(BucketState::Draining, Some(1)),
    ];
    two[1].name = "web/other".to_owned();
    plan_of(addr, mode, Affinity::ClientIp, two)
}

/// A connection over the loopback interface, of which the program has seen nothing.
struct Connection {
    listener: TcpListener,
    client: TcpStream,
    server: TcpStream,
    peer: std::net::SocketAddr,
}

impl Bench {
    /// With the plan off: the program is in the way of what really comes in, too.
    fn connect(&mut self, plan: &Plan, addr: IpAddr, port: u16) -> Connection {
        self.kernel.install(&without_addresses(plan), &[]);
        let (listener, client) = self.ns.run(|| {
            let listener = TcpListener::bind((addr, port)).unwrap();
            let client = TcpStream::connect((addr, port)).unwrap();
            (listener, client)
        });
        let (server, peer) = listener.accept().unwrap();
        self.kernel.install(plan, &[]);
        Connection {
            listener,
            client,
            server,
            peer,
        }
    }

    /// Panics unless XDP passes `frame` up, the program at tc does with it what the core decides, and that is for `reason`.
    fn expect(&mut self, plan: &Plan, frame: &[u8], has_socket: bool, reason: Reason) {
        self.expect_passed_up(frame);
        let counter = Reason::ALL.iter().position(|r| *r == reason).unwrap();
        let before = self.counts()[counter];
        let is_left = self.compare(plan, frame, has_socket);
        let after = self.counts()[counter];
        assert_eq!((is_left, after - before), (false, 1), "{reason:?} {}", hex(frame));
    }

    fn expect_passed_up(&mut self, frame: &[u8]) {
        for sends in [true, false] {
            let (run, counted) = self.run_early(frame, sends);
            assert!(
                run.code == PASS && run.frame == frame && counted.is_empty(),
                "at XDP: {run:?} {counted:?} {}",
                hex(frame)
            );
        }
    }
}

fn without_addresses(plan: &Plan) -> Plan {
    Plan {
        vips: Vec::new(),
        ..plan.clone()
    }
}

/// Whole segments from `client_port` to `port`.
fn segments(way: &Way, client_port: u16, port: u16) -> Vec<Vec<u8>> {
    let mut all: Vec<Vec<u8>> = [Flags::Ack, Flags::SynAck, Flags::Rst]
        .map(|flags| way.tcp(client_port, port, flags))
        .into();
    if way.vip.is_ipv4() {
        all.push(with_options(&all[0], 10));
    }
    all
}

/// Segments of which the ports are not where they are looked for: fragments of `id`, the last of which have no ports at all, and whole ones behind extension headers.
fn odd_segments(way: &Way, client_port: u16, port: u16, id: u16) -> Vec<Vec<u8>> {
    let segment = way.tcp(client_port, port, Flags::Ack);
    let mut all = vec![
        part(&segment, id, 0, true, 16),
        part(&segment, id, 2, true, 8),
        part(&segment, id, 3, false, 8),
    ];
    if way.vip.is_ipv6() {
        all.extend([&[0][..], &[0, 43, 60], &[44]].map(|chain| with_extensions(&segment, chain, 0, false)));
    }
    all
}

/// ICMP errors of every type from `sender` about a segment that the service has sent to `way`'s client, as long as it was or as short as may be.
fn errors(way: &Way, sender: IpAddr, client_port: u16, port: u16) -> Vec<Vec<u8>> {
    let from = Way { client: sender, ..*way };
    let quoted = way.back().tcp(port, client_port, Flags::Ack);
    let (header, kinds) = if way.vip.is_ipv4() {
        (34, [3, 5, 11, 12])
    } else {
        (54, [1, 2, 3, 4])
    };
    let mut all: Vec<Vec<u8>> = kinds
        .map(|kind| {
            let mut frame = from.too_big(&quoted);
            frame[header] = kind;
            frame
        })
        .into();
    all.push(from.too_big(&quoted[..header + 8]));
    if way.vip.is_ipv4() {
        all.push(from.too_big(&with_options(&quoted, 4)));
        all.push(from.too_big(&part(&quoted, 7, 0, true, 16)));
    } else {
        all.push(from.too_big(&with_extensions(&quoted, &[0, 60], 0, false)));
        all.push(from.too_big(&part(&quoted, 7, 0, true, 16)));
        // The error itself behind a header.
        all.push(with_extensions(&from.too_big(&quoted), &[60], 0, false));
    }
    all
}

#[test]
fn a_connection_of_this_host_is_found_in_the_kernel() {
    for [addr, stranger, router] in ADDRESSES.map(|of| of.map(|text| text.parse::<IpAddr>().unwrap())) {
        let plan = two(addr, INVISIBLE);
        let Some(mut bench) = Bench::new(&plan) else { return };
        for port in PORTS {
            let Connection {
                listener: _listener,
                client,
                server,
                peer,
            } = bench.connect(&plan, addr, port);
            let way = Way::new(peer.ip(), addr, VIRTUAL_MAC);
            let frame = way.tcp(peer.port(), port, Flags::Ack);
            assert!(!bench.compare(&plan, &frame, true), "a segment of the connection");
            let foreign = Way::new(stranger, addr, VIRTUAL_MAC).tcp(peer.port(), port, Flags::Ack);
            assert!(!bench.compare(&plan, &foreign, false), "a listener is no connection");
            bench.kernel.install(&without_addresses(&plan), &[]);
            if port == 80 {
                // The client ends it, so TIME_WAIT is the client's.
                drop(client);
                drop(server);
            } else {
                // What the server keeps is TIME_WAIT, or an orphan that still waits for the client: the kernel's program cannot tell.
                drop(server);
            }
            std::thread::sleep(Duration::from_millis(50));
            bench.kernel.install(&plan, &[]);
            let error = errors(&way, router, peer.port(), port).swap_remove(0);
            for frame in [frame, error] {
                if port == 80 {
                    assert!(!bench.compare(&plan, &frame, false), "it is over");
                } else {
                    let (_, counted) = bench.run(&frame);
                    let known = [Count::Punted as usize, Reason::DrainingKnown as usize];
                    assert!(counted.iter().any(|count| known.contains(count)), "{counted:?}");
                }
            }
        }
    }
}

/// In either mode: in `vmac_directed` what comes from outside goes on to the owner of the draining bucket too.
#[test]
fn fragments_and_errors_of_a_connection_are_this_hosts_and_those_of_others_are_not() {
    for [addr, stranger, router] in ADDRESSES.map(|of| of.map(|text| text.parse::<IpAddr>().unwrap())) {
        for (mode, to) in [(INVISIBLE, VIRTUAL_MAC), (L2Mode::Directed, OWN_MAC)] {
            let plan = two(addr, mode);
            let Some(mut bench) = Bench::new(&plan) else { return };
            let reasons = [
                (Reason::GuardedKnown, Reason::GuardedUnknown),
                (Reason::DrainingKnown, Reason::DrainingOther),
            ];
            for (port, (known, unknown)) in PORTS.into_iter().zip(reasons) {
                let connection = bench.connect(&plan, addr, port);
                let peer = connection.peer;
                let has = Way::new(peer.ip(), addr, to);
                // The address of one that has a connection, but not its port, and the other way round.
                let has_not = [
                    (Way::new(stranger, addr, to), peer.port()),
                    (has, peer.port().wrapping_add(1)),
                ];
                let mut all = segments(&has, peer.port(), port);
                all.extend(odd_segments(&has, peer.port(), port, 100));
                for sender in [router, peer.ip()] {
                    all.extend(errors(&has, sender, peer.port(), port));
                }
                for frame in &all {
                    bench.expect(&plan, frame, true, known);
                }
                for (i, (way, client_port)) in has_not.into_iter().enumerate() {
                    let mut plain = segments(&way, client_port, port);
                    plain.extend(errors(&way, router, client_port, port));
                    for frame in plain {
                        bench.expect(&plan, &frame, false, unknown);
                    }
                    // It may bring a cookie back to the listener, which the program does not look for there.
                    for frame in odd_segments(&way, client_port, port, 200 + i as u16) {
                        bench.expect_passed_up(&frame);
                        let (_, counted) = bench.run(&frame);
                        assert_eq!(counted, [Count::Punted as usize], "{}", hex(&frame));
                    }
                }
                // No fragment of an error is judged by what it quotes.
                let error = errors(&has, router, peer.port(), port).swap_remove(0);
                for (frame, reason) in [
                    (part(&error, 300, 0, true, 40), Reason::NoRule),
                    (part(&error, 300, 5, false, 40), Reason::UnknownFragment),
                ] {
                    bench.expect(&plan, &frame, true, reason);
                }
                let Connection {
                    listener,
                    client: _client,
                    server: _server,
                    ..
                } = connection;
                drop(listener);
                for frame in &all {
                    bench.expect(&plan, frame, true, known);
                }
                for (i, (way, client_port)) in has_not.into_iter().enumerate() {
                    for frame in odd_segments(&way, client_port, port, 400 + i as u16) {
                        bench.expect(&plan, &frame, false, unknown);
                    }
                }
                // The end of it goes past the program.
                bench.kernel.install(&without_addresses(&plan), &[]);
            }
        }
    }
}
