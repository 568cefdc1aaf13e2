//! The programs at XDP against the decision of the core, with every frame that the one at tc gets.

use farm_core::config::XdpChoice;

use super::*;

/// `linux/bpf.h`
const DROP: i32 = 1;
pub(super) const PASS: i32 = 2;
const TX: i32 = 3;

impl Bench {
    /// The outcome of one frame at XDP, and what it counted.
    pub(super) fn run_early(&mut self, frame: &[u8], sends: bool) -> (DryRun, Vec<usize>) {
        let before = self.counts();
        let run = self.kernel.filter().dry_run_xdp(frame, 1, sends).unwrap();
        let after = self.counts();
        let counted = (0..COUNTS).filter(|i| after[*i] > before[*i]).collect();
        (run, counted)
    }

    /// Panics unless XDP does with `frame` what the core decides by `plan`, or passes it up, unchanged and uncounted, where it has to. Returns whether it
    /// passed it up.
    pub(super) fn compare_early(&mut self, plan: &Plan, frame: &[u8], has_socket: bool, sends: bool) -> bool {
        let packet = Packet::parse(frame);
        let decision = packet.as_ref().map(|packet| {
            let mut fragments = FragmentTable::default();
            decide(plan, packet, &mut fragments, Duration::ZERO, &mut |_| has_socket)
        });
        let (run, counted) = self.run_early(frame, sends);
        let context = || {
            format!(
                "at XDP\n{}",
                both(decision.as_ref(), packet.as_ref(), &run, &counted, frame)
            )
        };
        let passes = run.code == PASS;
        if passes {
            assert!(run.frame == frame && counted.is_empty(), "{}", context());
        }
        let Some((packet, decision)) = packet.as_ref().zip(decision.as_ref()) else {
            // What the core cannot even read never gets past the nf_tables rule; here it may end earlier.
            // Its addresses may be looked at before the rest.
            let ends = [Reason::Malformed, Reason::OtherMac].map(|reason| vec![reason as usize]);
            assert!(passes || run.code == DROP && ends.contains(&counted), "{}", context());
            return passes;
        };
        if decision.verdict != Verdict::Drop {
            assert!(passes, "{}", context());
            return true;
        }
        // The responder waits for it.
        let is_discovery = is_discovery(packet) && packet.l4 == L4::Other && is_plain(frame);
        assert!(passes || !is_discovery, "{}", context());
        let vip = plan.vip(packet.destination).unwrap();
        let known: Vec<MacAddr> = decision
            .forward
            .iter()
            .filter_map(|node| vip.peers.get(&node).copied())
            .collect();
        if passes {
            let sent_by_tc = !known.is_empty() && !sends;
            assert!(
                sent_by_tc || is_passed_up(plan, frame, packet, decision),
                "need not be passed up: {}",
                context()
            );
            return true;
        }
        let reason = Reason::ALL.iter().position(|r| *r == decision.reason).unwrap();
        assert!(counted.contains(&reason), "{}", context());
        assert_eq!(
            counted.contains(&(Count::Forwarded as usize)),
            !known.is_empty(),
            "{}",
            context()
        );
        assert_eq!(
            counted.contains(&(Count::ForwardUnknown as usize)),
            known.is_empty() && !decision.forward.is_empty(),
            "{}",
            context()
        );
        if let [to] = known[..] {
            assert_eq!(run.code, TX, "{}", context());
            assert_eq!(
                (&run.frame[..6], &run.frame[6..12]),
                (&to.0[..], &vip.own_mac.0[..]),
                "{}",
                context()
            );
            assert_eq!(run.frame[12..], frame[12..], "{}", context());
        } else {
            assert!(known.is_empty(), "{}", context());
            assert_eq!((run.code, &run.frame[..]), (DROP, frame), "{}", context());
        }
        false
    }
}

/// What is dropped or sent on, but not by XDP: what is left to the daemon, what depends on a socket or may have several receivers, what has its ports in
/// another place, and what packet sockets wait for.
fn is_passed_up(plan: &Plan, frame: &[u8], packet: &Packet, decision: &Decision) -> bool {
    let vip = plan.vip(packet.destination).unwrap();
    let tcp = matches!(packet.l4, L4::Tcp { .. });
    let looked_up = tcp && matches!(decision.reason, Reason::GuardedUnknown | Reason::DrainingOther);
    let shared = vip.mode == L2Mode::Directed && plan.groups.iter().any(|group| !group.holders.is_empty());
    let request = matches!(packet.l4, L4::Tcp { syn: true, .. });
    let error = matches!(packet.l4, L4::Error(_) | L4::Malformed);
    looked_up
        || shared
        || request
        || is_discovery(packet)
        || error
        || !is_plain(frame)
        || may_be_left(plan, packet, decision)
}

/// ICMPv6, and no echo.
fn is_discovery(packet: &Packet) -> bool {
    packet.destination.is_ipv6() && packet.protocol == 58 && packet.l4 != L4::Echo
}

/// No tag, no fragment, no extension header.
fn is_plain(frame: &[u8]) -> bool {
    match frame[12..14] {
        [0x08, 0x00] => u16::from_be_bytes([frame[20], frame[21]]) & 0x3fff == 0,
        [0x86, 0xdd] => matches!(frame[20], 6 | 17 | 58),
        _ => false,
    }
}

/// A plan under which everything is another's.
fn foreign(addr: IpAddr, mode: L2Mode) -> Plan {
    let groups = vec![
        group(BucketState::Foreign, Some(1)),
        group(BucketState::Foreign, Some(2)),
    ];
    plan_of(addr, mode, Affinity::ClientIp, groups)
}

#[test]
fn what_is_foreign_ends_at_xdp_and_requests_do_not() {
    let plan = foreign(vip(), INVISIBLE);
    let Some(mut bench) = Bench::new(&plan) else { return };
    bench.kernel.install(&plan, &[]);
    let way = Way::new(client(1), vip(), VIRTUAL_MAC);
    for (frame, code) in [
        (way.tcp(4000, 80, Flags::Ack), DROP),
        (way.tcp(4000, 80, Flags::Rst), DROP),
        (way.udp(4000, 53, b"?"), DROP),
        (way.echo(), DROP),
        (way.tcp(4000, 81, Flags::Syn), DROP),
        (way.tcp(4000, 80, Flags::Syn), PASS),
    ] {
        let (run, counted) = bench.run_early(&frame, true);
        assert_eq!((run.code, counted.is_empty()), (code, code == PASS), "{counted:?}");
    }
    // A request to a member that may be gone is recorded too.
    let elsewhere = Way::new(client(1), vip(), mac(1));
    for (frame, code) in [
        (elsewhere.tcp(4000, 80, Flags::Syn), PASS),
        (elsewhere.tcp(4000, 80, Flags::Ack), DROP),
    ] {
        assert_eq!(bench.run_early(&frame, true).0.code, code);
    }
}

#[test]
fn what_goes_on_to_a_member_is_sent_by_the_driver_or_by_tc() {
    for addr in [vip(), vip6()] {
        let plan = foreign(addr, L2Mode::Directed);
        let Some(mut bench) = Bench::new(&plan) else { return };
        bench.kernel.install(&plan, &[]);
        let from = if addr.is_ipv4() { client(1) } else { client6(1) };
        let frame = Way::new(from, addr, OWN_MAC).tcp(4000, 80, Flags::Ack);
        let (run, counted) = bench.run_early(&frame, true);
        assert_eq!(run.code, TX);
        assert_eq!(counted, [Reason::Foreign as usize, Count::Forwarded as usize]);
        assert_eq!(bench.run_early(&frame, false).0.code, PASS);
        // As it comes in at the owner, it is never sent again.
        let again = Way {
            from_mac: mac(1),
            ..Way::new(from, addr, OWN_MAC)
        };
        let (run, counted) = bench.run_early(&again.tcp(4000, 80, Flags::Ack), true);
        assert_eq!((run.code, &counted[..]), (DROP, &[Reason::Foreign as usize][..]));
        // Past the lease nothing leaves.
        bench
            .kernel
            .lease()
            .renew(farm_sys::clock::BootInstant::now().as_nanos());
        let (run, counted) = bench.run_early(&frame, true);
        assert_eq!((run.code, &counted[..]), (DROP, &[Count::LeaseEnded as usize][..]));
    }
}

#[test]
fn without_a_plan_and_with_a_tag_everything_is_passed_up() {
    let plan = foreign(vip(), INVISIBLE);
    let Some(mut bench) = Bench::new(&plan) else { return };
    let frame = Way::new(client(1), vip(), VIRTUAL_MAC).tcp(4000, 80, Flags::Ack);
    assert_eq!(bench.run_early(&frame, true).0.code, PASS);
    bench.kernel.install(&plan, &[]);
    assert_eq!(bench.run_early(&frame, true).0.code, DROP);
    let mut tagged = frame.clone();
    tagged.splice(12..12, [0x81, 0x00, 0x00, 0x64]);
    assert_eq!(bench.run_early(&tagged, true).0.code, PASS);
}

#[test]
fn while_somebody_listens_everything_is_passed_up() {
    let plan = foreign(vip(), L2Mode::Directed);
    let Some(mut bench) = Bench::new(&plan) else { return };
    bench.kernel.install(&plan, &[]);
    let way = Way::new(client(1), vip(), OWN_MAC);
    let frames = [
        (way.tcp(4000, 80, Flags::Ack), TX),
        (way.udp(4000, 53, b"?"), TX),
        (way.tcp(4000, 81, Flags::Ack), DROP),
    ];
    for (frame, code) in &frames {
        assert_eq!(bench.run_early(frame, true).0.code, *code);
        bench.kernel.tell(Some(74)).unwrap();
        for sends in [true, false] {
            let (run, counted) = bench.run_early(frame, sends);
            assert_eq!((run.code, &run.frame), (PASS, frame));
            assert!(counted.is_empty(), "{counted:?}");
        }
        bench.kernel.tell(None).unwrap();
        assert_eq!(bench.run_early(frame, true).0.code, *code);
    }
}

/// A dry run at tc takes no frame without its IP header; one at XDP does.
#[test]
fn cut_frames_are_dropped_or_passed_up_and_never_sent() {
    for addr in [vip(), vip6()] {
        let plan = foreign(addr, L2Mode::Directed);
        let Some(mut bench) = Bench::new(&plan) else { return };
        bench.kernel.install(&plan, &[]);
        let from = if addr.is_ipv4() { client(1) } else { client6(1) };
        let way = Way::new(from, addr, OWN_MAC);
        for whole in [
            way.tcp(4000, 80, Flags::Ack),
            way.udp(4000, 53, b"?"),
            way.echo(),
            way.too_big(&way.back().udp(53, 4000, b"x")),
        ] {
            for length in 14..whole.len() {
                let (run, counted) = bench.run_early(&whole[..length], true);
                let refused = run.code == DROP && counted == [Reason::Malformed as usize];
                assert!(
                    refused || run.code == PASS && counted.is_empty(),
                    "{length}: {run:?} {counted:?}"
                );
            }
        }
    }
}

#[test]
fn several_wishes_for_one_interface_become_one() {
    use crate::dataplane::early::wish;
    let mut plan = foreign(vip(), INVISIBLE);
    plan.vips.push(plan.vips[0].clone());
    let mut of = |first, second| {
        plan.vips[0].xdp = first;
        plan.vips[1].xdp = second;
        wish(&plan, INTERFACE)
    };
    assert_eq!(of(XdpChoice::Auto, XdpChoice::Auto), Some(XdpChoice::Auto));
    assert_eq!(of(XdpChoice::Auto, XdpChoice::On), Some(XdpChoice::On));
    assert_eq!(of(XdpChoice::Off, XdpChoice::On), Some(XdpChoice::Off));
    plan.vips[0].choice = PlaneChoice::Raw;
    plan.vips[1].xdp = XdpChoice::On;
    assert_eq!(wish(&plan, INTERFACE), Some(XdpChoice::On));
    assert_eq!(wish(&plan, INTERFACE + 1), None);
}
