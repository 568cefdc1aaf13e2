//! The program in the kernel against the decision of the core: the same frames, the same verdicts, reasons and rewritten addresses.

#[path = "kernel_telling_tests.rs"]
mod telling;
#[allow(dead_code)]
#[path = "../../../core/src/balance/test_frames.rs"]
mod test_frames;

use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use farm_core::balance::decide::{Decision, Reason, Verdict, decide};
use farm_core::balance::fragment::FragmentTable;
use farm_core::id::NodeId;
use farm_core::wire::packet::{L4, Packet};
use farm_sys::bpf::{COUNTS, Count, DryRun};
use farm_sys::netns::NetNs;
use test_frames::*;

use super::*;

/// Of the loopback interface, on which dry runs come in.
const INTERFACE: u32 = 1;
const TAP_MAC: MacAddr = MacAddr([2, 0xfa, 0, 0, 0, 1]);
/// `linux/pkt_cls.h`
const UNSPEC: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

/// The program in a network namespace of its own.
struct Bench {
    kernel: Kernel,
    // Goes last.
    ns: NetNs,
}

impl Bench {
    /// `None`, and a line, where the kernel cannot be asked.
    fn new(seed: &Plan) -> Option<Self> {
        if farm_sys::process::effective_uid() != 0 {
            println!("not root: the kernel's program is not looked at");
            return None;
        }
        let ns = NetNs::create().unwrap();
        let kernel = ns.run(|| {
            let filter = match Filter::load() {
                Ok(filter) => filter,
                Err(error) if error.is_missing() && std::env::var_os("FARM_NEED_BPF").is_some() => {
                    panic!("{error}, and FARM_NEED_BPF says that it must have one")
                }
                Err(error) if error.is_missing() || error.is_denied() => {
                    println!("the kernel's program is not looked at: {error}");
                    return None;
                }
                Err(error) => panic!("{error}"),
            };
            let mut kernel = Kernel::new(filter, seed);
            kernel.set_tap(Some((INTERFACE, TAP_MAC)));
            kernel.set_tracked(false);
            kernel.attach(INTERFACE, "lo").unwrap();
            kernel.lease().renew(u64::MAX);
            Some(kernel)
        })?;
        Some(Self { kernel, ns })
    }

    fn counts(&mut self) -> [u64; COUNTS] {
        self.kernel.filter().counters().read().unwrap()
    }

    /// The outcome of one frame, and what it counted.
    fn run(&mut self, frame: &[u8]) -> (DryRun, Vec<usize>) {
        let Self { kernel, ns } = self;
        let before = kernel.filter().counters().read().unwrap();
        let run = ns.run(|| kernel.filter().dry_run(frame, 1).unwrap());
        let after = self.counts();
        let counted = (0..COUNTS).filter(|i| after[*i] > before[*i]).collect();
        (run, counted)
    }

    /// Panics unless the kernel does with `frame` what the core decides by `plan`, which is installed. Returns whether it left it to the daemon.
    fn compare(&mut self, plan: &Plan, frame: &[u8], has_socket: bool) -> bool {
        let packet = Packet::parse(frame);
        let decision = packet.as_ref().map(|packet| {
            let mut fragments = FragmentTable::default();
            decide(plan, packet, &mut fragments, Duration::ZERO, &mut |_| has_socket)
        });
        let (run, counted) = self.run(frame);
        let context = || format!("{decision:?}\n{packet:?}\n{run:?} counted {counted:?}\n{frame:02x?}");
        if counted.contains(&(Count::Punted as usize)) {
            // What the core cannot read the daemon drops.
            if let Some((packet, decision)) = packet.as_ref().zip(decision.as_ref()) {
                assert!(
                    may_be_left(plan, packet, decision),
                    "need not be left to the daemon: {}",
                    context()
                );
            }
            assert_eq!((run.code, &run.frame[..]), (REDIRECT, frame), "{}", context());
            return true;
        }
        if packet.is_none() && counted == [Reason::Malformed as usize] {
            // What the core cannot even read never gets past the nf_tables rule; here it ends earlier.
            assert_eq!(run.code, SHOT, "{}", context());
            return false;
        }
        let Some(decision) = decision.filter(|d| d.verdict != Verdict::Pass) else {
            assert_eq!((run.code, &run.frame[..]), (UNSPEC, frame), "{}", context());
            return false;
        };
        let reason = Reason::ALL.iter().position(|r| *r == decision.reason).unwrap();
        assert!(counted.contains(&reason), "{}", context());
        let to: Vec<NodeId> = decision.forward.iter().collect();
        let vip = plan.vip(packet.unwrap().destination).unwrap();
        let known: Vec<MacAddr> = to.iter().filter_map(|node| vip.peers.get(node).copied()).collect();
        assert_eq!(
            counted.contains(&(Count::Forwarded as usize)),
            !known.is_empty(),
            "{}",
            context()
        );
        assert_eq!(
            counted.contains(&(Count::ForwardUnknown as usize)),
            known.len() < to.len(),
            "{}",
            context()
        );
        match decision.verdict {
            Verdict::Accept => {
                assert_eq!(run.code, REDIRECT, "{}", context());
                assert_eq!(run.frame[..6], TAP_MAC.0, "{}", context());
                assert_eq!(run.frame[6..], frame[6..], "{}", context());
            }
            Verdict::Drop if known.is_empty() => assert_eq!(run.code, SHOT, "{}", context()),
            Verdict::Drop => {
                assert_eq!(run.code, REDIRECT, "{}", context());
                assert_eq!(
                    (&run.frame[..6], &run.frame[6..12]),
                    (&known[0].0[..], &vip.own_mac.0[..]),
                    "{}",
                    context()
                );
                assert_eq!(run.frame[12..], frame[12..], "{}", context());
            }
            Verdict::Hold | Verdict::Pass => panic!("the daemon's: {}", context()),
        }
        false
    }
}

/// What the program leaves to the daemon: what is kept, what needs memory, and what more than one may get.
fn may_be_left(plan: &Plan, packet: &Packet, decision: &Decision) -> bool {
    let vip = plan.vip(packet.destination).unwrap();
    let handed_on = packet.destination_mac == vip.own_mac && vip.peers.values().any(|mac| *mac == packet.source_mac);
    let starts = matches!(packet.l4, L4::Tcp { syn: true, .. } | L4::Udp { .. } | L4::Echo);
    let transitional = decision.verdict == Verdict::Hold || decision.reason == Reason::HandedOver;
    let fragment = packet.more_fragments || packet.l4 == L4::LaterFragment;
    let extended = packet.destination.is_ipv6() && !matches!(packet.protocol, 6 | 17 | 58);
    transitional
        || fragment
        || extended
        || has_extension_header(packet)
        || matches!(packet.l4, L4::Error(_) | L4::Malformed | L4::Other)
        || (starts && handed_on && vip.mode != L2Mode::Directed)
        || decision.forward.iter().count() > 1
        || (plan.groups.iter().any(|g| !g.holders.is_empty()) && vip.mode == L2Mode::Directed)
}

/// An IPv6 packet whose transport does not follow at once is told by nothing in [`Packet`]; the tests make few of them.
fn has_extension_header(packet: &Packet) -> bool {
    packet.destination.is_ipv6() && packet.identification != 0
}

/// Frames of every kind for `addr`, from a client outside.
fn frames_for(addr: IpAddr, to_mac: MacAddr, from_mac: MacAddr) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let clients: Vec<IpAddr> = match addr {
        IpAddr::V4(_) => vec![client(1)],
        IpAddr::V6(_) => vec![client6(1)],
    };
    for from in clients {
        let way = Way {
            from_mac,
            ..Way::new(from, addr, to_mac)
        };
        for flags in [Flags::Syn, Flags::SynAck, Flags::Ack, Flags::Rst] {
            for port in [80, 81, 443, 1023, 8080, 9000] {
                all.push(way.tcp(4000, port, flags));
            }
        }
        all.push(way.udp(4000, 53, b"?"));
        all.push(way.udp(4000, 54, b""));
        all.push(way.echo());
        let back = way.back();
        all.push(way.too_big(&back.tcp(80, 4000, Flags::Ack)));
        all.push(way.too_big(&back.udp(53, 4000, b"x")));
        let whole = way.tcp(4001, 80, Flags::Ack);
        // A dry run takes no frame without its IP header.
        let header = if addr.is_ipv4() { 34 } else { 54 };
        for more in [0, 1, 6, 12, 13, 14, 19, 20] {
            all.push(whole[..header + more].to_vec());
        }
        if addr.is_ipv4() {
            all.push(fragment(&way.udp(4000, 53, &[7; 64]), 9, 0, true, 32));
            all.push(fragment(&way.udp(4000, 53, &[7; 64]), 9, 4, false, 32));
            all.push(with_options(&way.tcp(4002, 80, Flags::Syn), 3));
            all.push(with_options(&way.tcp(4002, 443, Flags::Ack), 10));
            // Lengths that lie, a header shorter than can be, a protocol that is not shared, another version.
            for (at, value) in [(16, 0xff), (17, 10), (14, 0x44), (23, 47), (14, 0x65), (46, 0x40)] {
                let mut frame = way.tcp(4003, 80, Flags::Ack);
                frame[at] = value;
                all.push(frame);
            }
        } else {
            let mut longer = way.tcp(4003, 80, Flags::Ack);
            longer[18] = 0xff;
            all.push(longer);
        }
    }
    all
}

fn rules(affinity: Affinity) -> Vec<RulePlan> {
    vec![
        rule(Protocol::Tcp, 80, 80, affinity, 0),
        rule(Protocol::Udp, 53, 53, affinity, 0),
        rule(Protocol::Tcp, 443, 443, Affinity::ClientPort, 1),
        rule(Protocol::Tcp, 200, 1023, Affinity::ClientNet, 1),
        rule(Protocol::Tcp, 8000, 8999, Affinity::IpId, 0),
    ]
}

fn plan_of(addr: IpAddr, mode: L2Mode, affinity: Affinity, groups: Vec<GroupPlan>) -> Plan {
    let vip = VipPlan {
        interface: INTERFACE,
        ..vip_plan(addr, mode, rules(affinity))
    };
    plan(vip, groups)
}

const INVISIBLE: L2Mode = L2Mode::Invisible(VIRTUAL_MAC);
const STATES: [BucketState; 4] = [
    BucketState::Own,
    BucketState::Guarded,
    BucketState::Draining,
    BucketState::Foreign,
];

/// Every state, mode, affinity and sender with every kind of frame: some ten thousand pairs.
#[test]
fn the_kernel_decides_as_the_core_does() {
    let first = plan_of(
        vip(),
        INVISIBLE,
        Affinity::ClientIp,
        vec![group(BucketState::Own, Some(0))],
    );
    let Some(mut bench) = Bench::new(&first) else { return };
    let (mut frames, mut left) = (0, 0);
    for addr in [vip(), vip6()] {
        for mode in [INVISIBLE, L2Mode::Directed] {
            let service = if mode == L2Mode::Directed { OWN_MAC } else { VIRTUAL_MAC };
            for (state, affinity) in STATES.into_iter().flat_map(|s| {
                [
                    Affinity::ClientIp,
                    Affinity::ClientPort,
                    Affinity::ClientNet,
                    Affinity::IpId,
                ]
                .map(|a| (s, a))
            }) {
                for owner in [Some(0), Some(1), Some(9), None] {
                    let leaving = [false, true].into_iter();
                    for leaving in
                        leaving.filter(|l| !l || matches!(state, BucketState::Draining | BucketState::Foreign))
                    {
                        let mut one = group(state, owner);
                        one.leaving = (0..BUCKETS).filter(|i| leaving && i % 2 == 0).collect();
                        let other = group(BucketState::Foreign, Some(2));
                        let plan = plan_of(addr, mode, affinity, vec![one, other]);
                        bench.kernel.install(&plan, &[]);
                        assert!(bench.kernel.takes(addr));
                        for (to, from) in [(service, CLIENT_MAC), (OWN_MAC, mac(1)), (mac(7), CLIENT_MAC)] {
                            for frame in frames_for(addr, to, from) {
                                frames += 1;
                                left += usize::from(bench.compare(&plan, &frame, false));
                            }
                        }
                    }
                }
            }
        }
    }
    println!("{frames} frames, {left} left to the daemon");
    assert!(
        frames > 10_000 && left < frames / 2,
        "{frames} frames, {left} left to the daemon"
    );
}

#[test]
fn a_connection_of_this_host_is_found_in_the_kernel() {
    let addr: IpAddr = "127.0.0.20".parse().unwrap();
    let mut two = vec![
        group(BucketState::Guarded, Some(0)),
        group(BucketState::Draining, Some(1)),
    ];
    two[1].name = "web/other".to_owned();
    let plan = plan_of(addr, INVISIBLE, Affinity::ClientIp, two);
    let Some(mut bench) = Bench::new(&plan) else { return };
    let nothing = Plan {
        vips: Vec::new(),
        ..plan.clone()
    };
    for port in [80, 443] {
        // The program is in the way of what really comes in, too.
        bench.kernel.install(&nothing, &[]);
        let (listener, client) = bench.ns.run(|| {
            let listener = TcpListener::bind((addr, port)).unwrap();
            let client = TcpStream::connect((addr, port)).unwrap();
            (listener, client)
        });
        let (server, peer) = listener.accept().unwrap();
        bench.kernel.install(&plan, &[]);
        let way = Way::new(peer.ip(), addr, VIRTUAL_MAC);
        let frame = way.tcp(peer.port(), port, Flags::Ack);
        assert!(!bench.compare(&plan, &frame, true), "a segment of the connection");
        let from = "127.0.0.99".parse().unwrap();
        let stranger = Way::new(from, addr, VIRTUAL_MAC).tcp(peer.port(), port, Flags::Ack);
        assert!(!bench.compare(&plan, &stranger, false), "a listener is no connection");
        bench.kernel.install(&nothing, &[]);
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
        if port == 80 {
            assert!(!bench.compare(&plan, &frame, false), "it is over");
        } else {
            let (_, counted) = bench.run(&frame);
            let known = [Count::Punted as usize, Reason::DrainingKnown as usize];
            assert!(counted.iter().any(|count| known.contains(count)), "{counted:?}");
        }
    }
}

#[test]
fn past_the_lease_and_without_a_plan_nothing_passes() {
    let plan = plan_of(
        vip(),
        INVISIBLE,
        Affinity::ClientIp,
        vec![group(BucketState::Own, Some(0))],
    );
    let Some(mut bench) = Bench::new(&plan) else { return };
    let frame = Way::new(client(1), vip(), VIRTUAL_MAC).tcp(4000, 80, Flags::Syn);
    // The nf_tables rule drops what the program lets by.
    assert_eq!(bench.run(&frame).0.code, UNSPEC);
    bench.kernel.install(&plan, &[]);
    assert_eq!(bench.run(&frame).0.code, REDIRECT);
    bench.kernel.lease().renew(farm_sys::bpf::monotonic_nanos());
    let (run, counted) = bench.run(&frame);
    assert_eq!(run.code, SHOT);
    assert!(counted.contains(&(Count::LeaseEnded as usize)));
    bench.kernel.lease().renew(u64::MAX);
    assert_eq!(bench.run(&frame).0.code, REDIRECT);
    let elsewhere = Plan {
        vips: Vec::new(),
        ..plan
    };
    bench.kernel.install(&elsewhere, &[]);
    assert!(!bench.kernel.takes(vip()) && !bench.kernel.is_at_work());
    assert_eq!(bench.run(&frame).0.code, UNSPEC);
}

#[test]
fn what_starts_something_in_a_young_bucket_is_the_daemons() {
    let plan = plan_of(
        vip(),
        INVISIBLE,
        Affinity::ClientIp,
        vec![group(BucketState::Own, Some(0))],
    );
    let Some(mut bench) = Bench::new(&plan) else { return };
    let all: BucketSet = (0..BUCKETS).collect();
    bench.kernel.install(&plan, &[all]);
    let way = Way::new(client(1), vip(), VIRTUAL_MAC);
    for (frame, left) in [
        (way.tcp(4000, 80, Flags::Syn), true),
        (way.udp(4000, 53, b"?"), true),
        (way.tcp(4000, 80, Flags::Ack), false),
    ] {
        let (_, counted) = bench.run(&frame);
        assert_eq!(counted.contains(&(Count::Punted as usize)), left);
    }
}

#[test]
fn where_connections_may_end_in_containers_the_daemon_looks_for_them() {
    let mut two = vec![
        group(BucketState::Guarded, Some(0)),
        group(BucketState::Draining, Some(1)),
    ];
    two[1].name = "web/other".to_owned();
    let plan = plan_of(vip(), INVISIBLE, Affinity::ClientIp, two);
    let Some(mut bench) = Bench::new(&plan) else { return };
    bench.kernel.install(&plan, &[]);
    let way = Way::new(client(1), vip(), VIRTUAL_MAC);
    for port in [80, 443] {
        for tracked in [true, false] {
            bench.kernel.set_tracked(tracked);
            let (_, counted) = bench.run(&way.tcp(4000, port, Flags::Ack));
            assert_eq!(counted.contains(&(Count::Punted as usize)), tracked, "port {port}");
        }
    }
}

#[test]
fn more_than_the_tables_hold_is_captured() {
    let mut plan = plan_of(
        vip(),
        INVISIBLE,
        Affinity::ClientIp,
        vec![group(BucketState::Own, Some(0))],
    );
    let one = plan.vips[0].clone();
    plan.vips = (0..MAX_VIPS + 3)
        .map(|i| VipPlan {
            addr: IpAddr::V4((0xc612_0100 + i).into()),
            ..one.clone()
        })
        .collect();
    let Some(mut bench) = Bench::new(&plan) else { return };
    bench.kernel.install(&plan, &[]);
    let taken = plan.vips.iter().filter(|vip| bench.kernel.takes(vip.addr)).count();
    assert_eq!(taken, MAX_VIPS as usize);
    // A page of its own for each port: too many for one address, which is captured then; the others are not.
    let mut many = plan.clone();
    many.vips.truncate(2);
    many.vips[0].rules = (0..65_000)
        .map(|port| rule(Protocol::Tcp, port, port, Affinity::ClientIp, usize::from(port % 31)))
        .collect();
    many.groups = vec![group(BucketState::Own, Some(0)); 32];
    bench.kernel.install(&many, &[]);
    assert!(bench.kernel.takes(many.vips[1].addr));
    many.vips[1].choice = PlaneChoice::Raw;
    bench.kernel.install(&many, &[]);
    assert!(!bench.kernel.takes(many.vips[1].addr), "as it was configured");
}

/// The next of a sequence of numbers that look random (SplitMix64).
fn random(state: &mut u64) -> usize {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ *state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z >> 33) as usize
}

/// Frames with random bytes in them, another state of the plan for each hundred.
#[test]
fn frames_with_flaws_are_judged_alike() {
    let first = plan_of(
        vip(),
        INVISIBLE,
        Affinity::ClientIp,
        vec![group(BucketState::Own, Some(0))],
    );
    let Some(mut bench) = Bench::new(&first) else { return };
    let mut state = 20;
    for _ in 0..200 {
        let (mode, service) = [(INVISIBLE, VIRTUAL_MAC), (L2Mode::Directed, OWN_MAC)][random(&mut state) % 2];
        let addr = [vip(), vip6()][random(&mut state) % 2];
        let one = group(STATES[random(&mut state) % 4], Some(random(&mut state) % 3));
        let plan = plan_of(
            addr,
            mode,
            Affinity::ClientPort,
            vec![one, group(BucketState::Foreign, Some(2))],
        );
        bench.kernel.install(&plan, &[]);
        let frames = frames_for(addr, service, [CLIENT_MAC, mac(1)][random(&mut state) % 2]);
        for _ in 0..100 {
            let mut frame = frames[random(&mut state) % frames.len()].clone();
            for _ in 0..=random(&mut state) % 3 {
                let at = random(&mut state) % frame.len();
                frame[at] = random(&mut state) as u8;
            }
            // A tag is stripped before the program sees the frame.
            if !matches!(frame.get(12..14), Some([0x81, 0] | [0x88, 0xa8] | [0x91, 0])) {
                bench.compare(&plan, &frame, false);
            }
        }
    }
}
