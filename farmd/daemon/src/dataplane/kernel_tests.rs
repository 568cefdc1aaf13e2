//! The program in the kernel against the decision of the core: the same frames, the same verdicts, reasons and rewritten addresses.

#[path = "kernel/battery.rs"]
mod battery;
#[path = "kernel_telling_tests.rs"]
mod telling;
#[allow(dead_code)]
#[path = "../../../core/src/balance/test_frames.rs"]
pub(super) mod test_frames;

#[path = "kernel_asking_tests.rs"]
mod asking;
#[path = "kernel_bucket_tests.rs"]
mod buckets;
#[path = "kernel_connection_tests.rs"]
mod connections;
#[path = "kernel_discovery_tests.rs"]
mod discovery;
#[path = "kernel_early_tests.rs"]
mod early;
#[path = "kernel_fixture_tests.rs"]
mod fixtures;
#[path = "kernel_live_tests.rs"]
mod live;

use std::fmt::Write as _;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use battery::{clients, frames_for, frames_from, without_tags};
use farm_core::balance::decide::{Decision, Reason, Verdict, decide};
use farm_core::balance::filter;
use farm_core::balance::fragment::FragmentTable;
use farm_core::balance::plan::{BucketState, GroupPlan, RulePlan};
use farm_core::config::{Affinity, L2Mode, Protocol};
use farm_core::wire::packet::{L4, Packet};
use farm_sys::bpf::{COUNTS, Count, DryRun, MAX_GROUPS, MAX_VIPS};
use farm_sys::netns::{NetNs, NetNsGuard};
use farm_sys::packet_socket::{PacketRing, VNET_HEADER};
use test_frames::*;

use super::*;
use crate::dataplane::kernel_program;

/// Of the loopback interface, on which dry runs come in.
const INTERFACE: u32 = 1;
const TAP_MAC: MacAddr = MacAddr([2, 0xfa, 0, 0, 0, 1]);
/// `linux/pkt_cls.h`
const UNSPEC: i32 = -1;
const OK: i32 = 0;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;

/// The program in a network namespace of its own, in which the test's thread is.
struct Bench {
    kernel: Kernel,
    /// What the core remembers; nothing is as old as to be forgotten.
    fragments: FragmentTable,
    /// Identification of the next datagram.
    identification: u16,
    // These go last.
    _guard: NetNsGuard,
    ns: NetNs,
}

impl Bench {
    /// `None`, and a line, where the kernel cannot be asked, unless `FARM_NEED_BPF` says that it must be.
    fn new(seed: &Plan) -> Option<Self> {
        let is_needed = std::env::var_os("FARM_NEED_BPF").is_some();
        if farm_sys::process::effective_uid() != 0 {
            assert!(!is_needed, "FARM_NEED_BPF is set, and only root can ask the kernel");
            println!("not root: the kernel's program is not looked at");
            return None;
        }
        let ns = NetNs::create().unwrap();
        let kernel = ns.run(|| {
            let filter = match Filter::load() {
                Ok(filter) => filter,
                Err(error) if !is_needed && (error.is_missing() || error.is_denied()) => {
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
        let guard = ns.enter().unwrap();
        Some(Self {
            kernel,
            fragments: FragmentTable::default(),
            identification: 1,
            _guard: guard,
            ns,
        })
    }

    /// What the program returns for a frame that it accepts.
    fn accepted(&self) -> i32 {
        if self.kernel.control.passes_up { OK } else { REDIRECT }
    }

    fn counts(&mut self) -> [u64; COUNTS] {
        self.kernel.filter().counters().read().unwrap()
    }

    /// The outcome of one frame, and what it counted.
    fn run(&mut self, frame: &[u8]) -> (DryRun, Vec<usize>) {
        let (run, counts) = self.run_counting(frame);
        (run, (0..COUNTS).filter(|i| counts[*i] > 0).collect())
    }

    fn run_counting(&mut self, frame: &[u8]) -> (DryRun, [u64; COUNTS]) {
        let before = self.counts();
        let run = self.kernel.filter().dry_run(frame, 1).unwrap();
        let mut counts = self.counts();
        for (count, before) in counts.iter_mut().zip(before) {
            *count -= before;
        }
        (run, counts)
    }

    /// Panics unless the kernel does with `frame` what the core decides by `plan`, which is installed. Returns whether it left it to the daemon.
    fn compare(&mut self, plan: &Plan, frame: &[u8], has_socket: bool) -> bool {
        // What is dropped or sent at XDP, the program at tc drops or sends as well.
        for sends in [true, false] {
            self.compare_early(plan, frame, has_socket, sends);
        }
        // Either way up, in turn.
        self.kernel.set_passes_up(!self.kernel.control.passes_up);
        let packet = Packet::parse(frame);
        let fragments = &mut self.fragments;
        let decision = packet
            .as_ref()
            .map(|packet| decide(plan, packet, fragments, Duration::ZERO, &mut |_| has_socket));
        let (run, counts) = self.run_counting(frame);
        let counted: Vec<usize> = (0..COUNTS).filter(|i| counts[*i] > 0).collect();
        let bare = without_tags(frame);
        let context = || both(decision.as_ref(), packet.as_ref(), &run, &counted, frame);
        if counted.contains(&(Count::Punted as usize)) {
            // What the core cannot read the daemon drops.
            if let Some((packet, decision)) = packet.as_ref().zip(decision.as_ref()) {
                assert!(
                    may_be_left(plan, packet, decision),
                    "need not be left to the daemon: {}",
                    context()
                );
            }
            assert_eq!((run.code, &run.frame[..]), (REDIRECT, &bare[..]), "{}", context());
            return true;
        }
        let ends = [Reason::Malformed, Reason::OtherMac].map(|reason| vec![reason as usize]);
        if packet.is_none() && ends.contains(&counted) {
            // What the core cannot even read never gets past the nf_tables rule; here it ends earlier, by its addresses or by what is wrong with it.
            assert_eq!(run.code, SHOT, "{}", context());
            return false;
        }
        let Some(decision) = decision.as_ref().filter(|d| d.verdict != Verdict::Pass) else {
            assert_eq!(run.code, UNSPEC, "{}", context());
            assert!(run.frame == frame || run.frame == bare, "{}", context());
            return false;
        };
        let reason = Reason::ALL.iter().position(|r| *r == decision.reason).unwrap();
        assert!(counted.contains(&reason), "{}", context());
        let to: Vec<NodeId> = decision.forward.iter().collect();
        let vip = plan.vip(packet.as_ref().unwrap().destination).unwrap();
        let known: Vec<MacAddr> = to.iter().filter_map(|node| vip.peers.get(node).copied()).collect();
        let sent = [
            counts[Count::Forwarded as usize],
            counts[Count::ForwardUnknown as usize],
        ];
        assert_eq!(
            sent.map(|n| n as usize),
            [known.len(), to.len() - known.len()],
            "{}",
            context()
        );
        match decision.verdict {
            Verdict::Accept => {
                assert_eq!(run.code, self.accepted(), "{}", context());
                let destination = if run.code == OK { &bare[..6] } else { &TAP_MAC.0 };
                assert_eq!(&run.frame[..6], destination, "{}", context());
                assert_eq!(run.frame[6..], bare[6..], "{}", context());
            }
            // The owner is the last to get it, if it is known.
            Verdict::Drop
                if decision
                    .owner
                    .is_none_or(|owner| !to.contains(&owner) || !vip.peers.contains_key(&owner)) =>
            {
                assert_eq!(run.code, SHOT, "{}", context());
            }
            Verdict::Drop => {
                assert_eq!(run.code, REDIRECT, "{}", context());
                assert_eq!(
                    (&run.frame[..6], &run.frame[6..12]),
                    (&vip.peers[&decision.owner.unwrap()].0[..], &vip.own_mac.0[..]),
                    "{}",
                    context()
                );
                assert_eq!(run.frame[12..], bare[12..], "{}", context());
            }
            Verdict::Hold | Verdict::Pass => panic!("the daemon's: {}", context()),
        }
        false
    }
}

/// As people and `kernel/fixtures.txt` read it: what the core says of a frame, what the program did with it, and its bytes.
fn both(decision: Option<&Decision>, packet: Option<&Packet>, run: &DryRun, counted: &[usize], frame: &[u8]) -> String {
    let name = |i: &usize| {
        Reason::ALL
            .get(*i)
            .map_or_else(|| format!("counter {i}"), |r| r.name().to_owned())
    };
    let counted: Vec<String> = counted.iter().map(name).collect();
    let (code, left) = (run.code, hex(&run.frame));
    format!(
        "core: {decision:?}\nread: {packet:?}\nprogram: returned {code}, counted {}, made of it {left}\nframe: {}",
        counted.join(" "),
        hex(frame)
    )
}

fn hex(frame: &[u8]) -> String {
    frame.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What the program leaves to the daemon: what waits, and what a member hands on that every node has had.
fn may_be_left(plan: &Plan, packet: &Packet, decision: &Decision) -> bool {
    let vip = plan.vip(packet.destination).unwrap();
    let handed_on = packet.destination_mac == vip.own_mac && vip.peers.values().any(|mac| *mac == packet.source_mac);
    let starts = match packet.l4 {
        L4::Tcp { syn, .. } => syn,
        L4::Error(flow) => flow.protocol != 6,
        L4::Udp { .. } | L4::Echo | L4::LaterFragment => true,
        L4::Malformed | L4::Other => false,
    };
    let waits = decision.verdict == Verdict::Hold || decision.reason == Reason::HandedOver;
    // The program does not know who is shut.
    let shut = plan.groups.iter().any(|group| group.shut);
    waits || (starts && handed_on && (shut || vip.mode != L2Mode::Directed))
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
const AFFINITIES: [Affinity; 4] = [
    Affinity::ClientIp,
    Affinity::ClientPort,
    Affinity::ClientNet,
    Affinity::IpId,
];

/// Every state, mode, affinity and sender with every kind of frame: some hundred thousand pairs.
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
        let mut clients = clients(addr).into_iter().cycle();
        for mode in [INVISIBLE, L2Mode::Directed] {
            let service = if mode == L2Mode::Directed { OWN_MAC } else { VIRTUAL_MAC };
            for (state, affinity) in STATES.into_iter().flat_map(|s| AFFINITIES.map(|a| (s, a))) {
                for owner in [Some(0), Some(1), Some(9), None] {
                    let closed = matches!(state, BucketState::Draining | BucketState::Foreign);
                    for (leaving, held) in [(false, false), (true, false), (false, true)] {
                        let plain = matches!(affinity, Affinity::ClientIp | Affinity::ClientPort);
                        if (leaving && !closed) || (held && affinity != Affinity::ClientPort) {
                            continue;
                        }
                        if !plain && !matches!(owner, Some(0 | 1)) {
                            continue;
                        }
                        let mut one = group(state, owner);
                        one.leaving = (0..BUCKETS).filter(|i| leaving && i % 2 == 0).collect();
                        one.shut = state == BucketState::Foreign && affinity == Affinity::ClientNet;
                        if held {
                            let sets: [&[usize]; 4] = [&[1, 2], &[0, 2, 9], &[1], &[0]];
                            let holders = (0..BUCKETS).map(|i| (i, sets[i % 4].iter().map(|n| id(*n)).collect()));
                            one.holders = holders.collect();
                        }
                        let other = group(BucketState::Foreign, Some(2));
                        let plan = plan_of(addr, mode, affinity, vec![one, other]);
                        bench.kernel.install(&plan, &[]);
                        assert!(bench.kernel.takes(addr));
                        for (to, from) in [(service, CLIENT_MAC), (OWN_MAC, mac(1)), (mac(7), CLIENT_MAC)] {
                            if to == mac(7) && (affinity != Affinity::ClientIp || owner.is_some()) {
                                continue;
                            }
                            bench.identification += 20;
                            let client = clients.next().unwrap();
                            for frame in frames_from(client, addr, to, from, bench.identification) {
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
        frames > 50_000 && left < frames / 5,
        "{frames} frames, {left} left to the daemon"
    );
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
    for passes_up in [true, false] {
        bench.kernel.set_passes_up(passes_up);
        bench.kernel.lease().renew(u64::MAX);
        assert_eq!(bench.run(&frame).0.code, bench.accepted());
        bench
            .kernel
            .lease()
            .renew(farm_sys::clock::BootInstant::now().as_nanos());
        let (run, counted) = bench.run(&frame);
        assert_eq!(run.code, SHOT);
        assert_eq!(counted, [Count::LeaseEnded as usize], "it is counted once");
    }
    bench.kernel.lease().renew(u64::MAX);
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
    // An address whose rules lead past the tables is captured; the others are not.
    let mut many = plan.clone();
    many.vips.truncate(2);
    many.vips[0].rules = [rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, MAX_GROUPS as usize)].into();
    many.groups = vec![group(BucketState::Own, Some(0)); MAX_GROUPS as usize + 1];
    bench.kernel.install(&many, &[]);
    assert!(!bench.kernel.takes(many.vips[0].addr) && bench.kernel.takes(many.vips[1].addr));
    assert_eq!(
        *bench.kernel.refused(),
        BTreeMap::from([(many.vips[0].addr, NoRoom::Groups)])
    );
    many.vips[1].choice = PlaneChoice::Raw;
    bench.kernel.install(&many, &[]);
    assert!(!bench.kernel.takes(many.vips[1].addr), "as it was configured");
}

/// What the program sends to several, as it goes over the wire.
#[test]
fn a_connection_that_several_may_have_goes_to_all_of_them() {
    let addr = vip();
    let mut one = group(BucketState::Own, Some(0));
    one.holders = (0..BUCKETS)
        .map(|i| (i, [id(0), id(1), id(2)].into_iter().collect()))
        .collect();
    let plan = plan_of(
        addr,
        L2Mode::Directed,
        Affinity::ClientIp,
        vec![one, group(BucketState::Foreign, Some(2))],
    );
    let Some(mut bench) = Bench::new(&plan) else { return };
    bench.kernel.install(&plan, &[]);
    let mut wire = PacketRing::open(INTERFACE, 64, &kernel_program(&filter::open())).unwrap();
    let way = Way::new(client(1), addr, OWN_MAC);
    for (frame, expected) in [
        (way.tcp(4000, 80, Flags::Ack), BTreeSet::from([mac(1), mac(2)])),
        (way.tcp(4000, 80, Flags::Syn), BTreeSet::new()),
    ] {
        assert!(!bench.compare(&plan, &frame, false));
        let mut seen = BTreeSet::new();
        let mut late = 0;
        while seen.len() < expected.len() && late < 500 {
            wire.recv(64, |bytes| {
                let packet = Packet::parse(&bytes[VNET_HEADER..]).unwrap();
                assert_eq!(packet.source_mac, OWN_MAC);
                seen.insert(packet.destination_mac);
            })
            .unwrap();
            std::thread::sleep(Duration::from_millis(10));
            late += 1;
        }
        assert_eq!(seen, expected);
    }
}

#[test]
fn what_the_program_knows_of_a_datagram_the_daemon_can_ask_for() {
    let plan = plan_of(
        vip(),
        INVISIBLE,
        Affinity::ClientPort,
        vec![group(BucketState::Own, Some(0))],
    );
    let Some(mut bench) = Bench::new(&plan) else { return };
    bench.kernel.install(&plan, &[]);
    for (way, header) in [
        (Way::new(client(1), vip(), VIRTUAL_MAC), 34),
        (Way::new(client6(1), vip6(), VIRTUAL_MAC), 54),
    ] {
        let plan = plan_of(way.vip, INVISIBLE, Affinity::ClientPort, plan.groups.clone());
        bench.kernel.install(&plan, &[]);
        let whole = way.udp(4000, 53, &[7; 64]);
        let (first, later) = if header == 34 {
            (fragment(&whole, 9, 0, true, 32), fragment(&whole, 9, 4, false, 32))
        } else {
            (
                with_extensions(&whole, &[44], 0, true),
                with_extensions(&whole, &[44], 9, false),
            )
        };
        let later_packet = Packet::parse(&later).unwrap();
        assert_eq!(bench.kernel.first_fragment(&later_packet), None);
        bench.run(&first);
        let expected = L4::Udp {
            source: 4000,
            destination: 53,
        };
        assert_eq!(bench.kernel.first_fragment(&later_packet), Some(expected));
        assert_eq!(bench.run(&later).0.code, bench.accepted());
    }
}
