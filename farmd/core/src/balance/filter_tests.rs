/// The frames with which the data plane in the kernel is compared with the decision.
#[allow(dead_code)]
#[path = "../../../daemon/src/dataplane/kernel/battery.rs"]
mod battery;

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::balance::assign::{BucketMap, assign};
use crate::balance::decide::{Reason, Verdict, decide};
use crate::balance::fragment::FragmentTable;
use crate::balance::hash;
use crate::balance::plan::RulePlan;
use crate::balance::test_frames::{self, *};
use crate::config::Protocol;
use crate::wire::nd::{Message, Nd};
use crate::wire::packet::{L4, Packet};

const INTERFACE: u32 = 3;

/// Runs a program as the kernel does: what lies outside the frame ends it with 0.
fn run(program: &[Insn], frame: &[u8]) -> u32 {
    run_tagged(program, frame, 0)
}

/// As [`run`], where the kernel has taken `tag` off the frame.
fn run_tagged(program: &[Insn], frame: &[u8], tag: u32) -> u32 {
    let word = |at: usize, n: usize| -> Option<u32> {
        if at == VLAN_TAG as usize {
            return Some(tag);
        }
        let bytes = frame.get(at..at.checked_add(n)?)?;
        Some(bytes.iter().fold(0, |acc, b| acc << 8 | u32::from(*b)))
    };
    let (mut a, mut x, mut memory) = (0u32, 0u32, [0u32; 16]);
    let mut at = 0;
    loop {
        let Insn { code, jt, jf, k } = program[at];
        at += 1;
        let branch = |taken: bool| usize::from(if taken { jt } else { jf });
        let loaded = match code {
            LD_W_ABS => word(k as usize, 4),
            LD_H_ABS => word(k as usize, 2),
            LD_B_ABS => word(k as usize, 1),
            LD_H_IND => word(x as usize + k as usize, 2),
            LD_B_IND => word(x as usize + k as usize, 1),
            LDX_MSH => word(k as usize, 1).map(|byte| {
                x = (byte & 0xf) * 4;
                a
            }),
            _ => Some(a),
        };
        let Some(loaded) = loaded else { return 0 };
        a = loaded;
        match code {
            LD_W_ABS | LD_H_ABS | LD_B_ABS | LD_H_IND | LD_B_IND | LDX_MSH => {}
            LD_IMM => a = k,
            LD_MEM => a = memory[k as usize],
            ST => memory[k as usize] = a,
            MUL_K => a = a.wrapping_mul(k),
            AND_K => a &= k,
            RSH_K => a >>= k,
            RSH_X => a = if x < 32 { a >> x } else { 0 },
            XOR_K => a ^= k,
            XOR_X => a ^= x,
            TAX => x = a,
            JA => at += k as usize,
            JEQ_K => at += branch(a == k),
            JGE_K => at += branch(a >= k),
            JSET_K => at += branch(a & k != 0),
            RET_K => return k,
            other => panic!("no instruction {other:#x}"),
        }
    }
}

/// What the kernel checks before it takes a program.
fn check(program: &[Insn]) {
    assert!((1..=MAX_LEN).contains(&program.len()), "{} instructions", program.len());
    for (at, i) in program.iter().enumerate() {
        let furthest = match i.code {
            JA => i.k as usize,
            JEQ_K | JGE_K | JSET_K => usize::from(i.jt.max(i.jf)),
            _ => 0,
        };
        assert!(
            at + 1 + furthest < program.len() || i.code == RET_K,
            "{i:?} at {at} leaves the program"
        );
    }
    assert_eq!(program.last().map(|i| i.code), Some(RET_K));
}

fn judge(plan: &Plan, frame: &[u8]) -> Option<(Verdict, Reason, bool)> {
    let packet = Packet::parse(frame)?;
    let decision = decide(
        plan,
        &packet,
        &mut FragmentTable::default(),
        Duration::ZERO,
        &mut |_| true,
    );
    Some((decision.verdict, decision.reason, !decision.forward.is_empty()))
}

/// Node 0's part of a map in which some buckets are guarded and some draining.
fn group_of(weights: [u16; 3], marks: &[(u16, u8)]) -> GroupPlan {
    let weights = (0..3).map(|i| (id(i), weights[i])).collect();
    let owners = assign(&BucketMap::default(), &weights);
    let mut group = GroupPlan::closed("web/g".to_owned());
    for i in 0..BUCKETS {
        if owners.owns(id(0), i) {
            group.states[i] = BucketState::Own;
        }
    }
    for (bucket, kind) in marks {
        let i = usize::from(*bucket) % BUCKETS;
        group.states[i] = [BucketState::Guarded, BucketState::Draining, BucketState::Foreign][usize::from(*kind) % 3];
    }
    group.owners = owners;
    group
}

fn affinity() -> impl Strategy<Value = Affinity> {
    use Affinity::{ClientIp, ClientNet, ClientPort, IpId};
    proptest::sample::select(vec![ClientIp, ClientPort, ClientNet, IpId])
}

fn rules() -> impl Strategy<Value = Vec<RulePlan>> {
    let one = (any::<bool>(), affinity(), 0usize..2, any::<bool>()).prop_map(|(tcp, affinity, group, wide)| {
        let protocol = if tcp { Protocol::Tcp } else { Protocol::Udp };
        let (first, last) = if wide { (0, 65535) } else { (80, 80) };
        rule(protocol, first, last, affinity, group)
    });
    prop_oneof![
        proptest::collection::vec(one, 0..4),
        // All alike, so that the filter hashes.
        (
            proptest::sample::select(vec![Affinity::ClientIp, Affinity::ClientPort]),
            0usize..2
        )
            .prop_map(|(affinity, group)| {
                vec![
                    rule(Protocol::Tcp, 0, 65535, affinity, group),
                    rule(Protocol::Udp, 0, 65535, affinity, group),
                ]
            }),
    ]
}

fn plans() -> impl Strategy<Value = Plan> {
    let groups = proptest::collection::vec(
        (
            proptest::array::uniform3(0u16..3),
            proptest::collection::vec((any::<u16>(), any::<u8>()), 0..300),
        ),
        2,
    );
    let vips = proptest::collection::vec((any::<bool>(), rules(), 0usize..2), 1..5);
    (groups, vips, any::<u32>(), any::<u32>()).prop_map(|(groups, vips, s0, s1)| {
        let groups = groups
            .iter()
            .map(|(weights, marks)| group_of(*weights, marks))
            .collect();
        let vips = vips
            .into_iter()
            .enumerate()
            .map(|(i, (invisible, rules, entry_group))| {
                let addr = one_of_vips(i as u8);
                let mode = if invisible {
                    L2Mode::Invisible(VIRTUAL_MAC)
                } else {
                    L2Mode::Directed
                };
                VipPlan {
                    entry_group,
                    ..vip_plan(addr, mode, rules)
                }
            });
        let vips: Vec<VipPlan> = vips.collect();
        Plan {
            seed: Seed { s0, s1 },
            vips,
            ..plan(vip_plan(vip(), L2Mode::Directed, Vec::new()), groups)
        }
    })
}

/// Addresses of both families, in turn.
fn one_of_vips(i: u8) -> IpAddr {
    match i % 2 {
        0 => IpAddr::from([198, 18, 0, 20 + i]),
        _ => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 20 + u16::from(i)]),
    }
}

/// Valid frames to and beside the VIPs, whole, in fragments, with IP options, from clients and members, and damaged ones.
fn frames() -> impl Strategy<Value = Vec<u8>> {
    let ends = (
        0u8..6,
        any::<bool>(),
        any::<bool>(),
        any::<u32>(),
        any::<u16>(),
        proptest::sample::select(vec![80u16, 53, 443]),
    );
    let shape = (0u8..6, 0u8..4, 0usize..4, any::<u16>());
    let damage = proptest::collection::vec((any::<u16>(), any::<u8>()), 0..3);
    (ends, shape, damage, 0usize..400).prop_map(
        |((vip, own, member, host, port, vip_port), (kind, cut, options, ipid), damage, length)| {
            let to_mac = if own { OWN_MAC } else { VIRTUAL_MAC };
            let vip = one_of_vips(vip);
            let client = if vip.is_ipv4() {
                IpAddr::V4(host.into())
            } else {
                client6(host)
            };
            let mut way = Way::new(client, vip, to_mac);
            if member {
                way.from_mac = mac(1);
            }
            let mut frame = match kind {
                0 => way.tcp(port, vip_port, Flags::Syn),
                1 | 2 => way.tcp(port, vip_port, Flags::Ack),
                3 => way.udp(port, vip_port, &[7; 64]),
                4 => way.echo(),
                _ => way.too_big(&way.back().tcp(vip_port, port, Flags::Ack)),
            };
            frame = match (cut, vip) {
                (_, IpAddr::V6(_)) => {
                    let chains: [&[u8]; 7] = [&[], &[0], &[43], &[60, 60], &[44], &[51], &[0, 44]];
                    with_extensions(
                        &frame,
                        chains[(options + usize::from(cut) * 4) % chains.len()],
                        ipid % 2,
                        cut == 1,
                    )
                }
                (1, _) => fragment(&frame, ipid, 0, true, 16),
                (2, _) => fragment(&frame, ipid, 1, false, 64),
                _ => with_options(&frame, options),
            };
            if vip.is_ipv4() {
                frame[18..20].copy_from_slice(&ipid.to_be_bytes());
            }
            if cut == 3 {
                for (at, bits) in damage {
                    let at = usize::from(at) % frame.len();
                    frame[at] ^= bits;
                }
                frame.truncate(length);
            }
            frame
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Too much may pass, never too little; the kernel takes every program.
    #[test]
    fn whatever_the_decision_needs_passes_the_filter(plan in plans(), frames in proptest::collection::vec(frames(), 1..40)) {
        let program = build(&plan, INTERFACE, Detail::Buckets);
        check(&program);
        for frame in frames {
            let Some((verdict, reason, forwarded)) = judge(&plan, &frame) else { continue };
            let needed = matches!(verdict, Verdict::Accept | Verdict::Hold) || forwarded;
            // The outermost VLAN tag is taken off before a socket filter runs; behind another one addresses are not told apart.
            let is_tagged = |frame: &[u8]| !matches!(frame[12..14], [8, 0] | [0x86, 0xdd]);
            let shown = if is_tagged(&frame) { [&frame[..12], &frame[16..]].concat() } else { frame.clone() };
            if needed {
                prop_assert_eq!(run(&program, &shown), ALL, "{:?} {:?}", (verdict, reason), Packet::parse(&frame));
            }
            if verdict == Verdict::Pass && !is_tagged(&shown) {
                prop_assert_eq!(run(&program, &shown), 0, "not for a VIP");
            }
        }
        prop_assert_eq!(run(&build(&plan, INTERFACE + 1, Detail::Buckets), &[0; 64]), 0);
    }

    /// Every whole connection request that the decision looks at is recorded, and nothing but connection requests.
    #[test]
    fn connection_requests_pass_their_filter_and_nothing_else_does(plan in plans(), frames in proptest::collection::vec(frames(), 1..40)) {
        let program = requests(&plan, INTERFACE);
        check(&program);
        for frame in frames {
            let Some(packet) = Packet::parse(&frame) else { continue };
            let request = matches!(packet.l4, L4::Tcp { syn: true, .. }) && !packet.more_fragments;
            let vip = plan.vip(packet.destination);
            let looked_at = vip.is_some_and(|vip| packet.destination_mac == vip.service_mac());
            let (flags, plain) = match frame[12..14] {
                [8, 0] => (frame.get(27 + usize::from(frame[14] & 0xf) * 4), true),
                [0x86, 0xdd] => (frame.get(67), !EXTENSIONS.contains(&frame[20].into())),
                _ => continue,
            };
            // A fragment header, which stands before whole segments too where somebody plays with it, is passed by no request that counts.
            let whole = frame[12] == 8 || packet.identification == 0;
            if request && looked_at && whole && (!plain || flags.map(|flags| flags & 0x17) == Some(2)) {
                prop_assert_eq!(run(&program, &frame), ALL, "{:?}", packet);
            }
            // What lies about its lengths may pass: the recorder parses it.
            let other = !request && packet.l4 != L4::Malformed && plain;
            if other || vip.is_none() {
                prop_assert_eq!(run(&program, &frame), 0, "{:?}", packet);
            }
        }
        prop_assert_eq!(run(&requests(&plan, INTERFACE + 1), &[0; 64]), 0);
    }

    /// The filter's hash is that of `hash.rs`: whole frames in foreign buckets do not pass, others do.
    #[test]
    fn a_uniform_invisible_vip_costs_no_wake_up_for_foreign_buckets(
        ipv6 in any::<bool>(), on_port in any::<bool>(), s0 in any::<u32>(), s1 in any::<u32>(), marks in proptest::collection::vec((any::<u16>(), any::<u8>()), 0..300),
        clients in proptest::collection::vec((any::<u32>(), any::<u16>(), 0usize..11), 50),
    ) {
        let affinity = if on_port { Affinity::ClientPort } else { Affinity::ClientIp };
        let vip = if ipv6 { vip6() } else { vip() };
        let vip_plan = vip_plan(vip, L2Mode::Invisible(VIRTUAL_MAC), vec![rule(Protocol::Tcp, 80, 443, affinity, 0)]);
        let plan = Plan { seed: Seed { s0, s1 }, ..plan(vip_plan, vec![group_of([1, 1, 1], &marks)]) };
        let program = build(&plan, INTERFACE, Detail::Buckets);
        check(&program);
        let mut seen = [0; 2];
        for (host, port, options) in clients {
            let client = if ipv6 { IpAddr::V6((u128::from(host) << 37 | u128::from(port) << 3).into()) } else { IpAddr::V4(host.into()) };
            let bucket = if on_port { hash::bucket_of_port(plan.seed, client, port) } else { hash::bucket_of_addr(plan.seed, client) };
            let foreign = plan.groups[0].states[bucket.index()] == BucketState::Foreign;
            seen[usize::from(foreign)] += 1;
            let way = Way::new(client, vip, VIRTUAL_MAC);
            for flags in [Flags::Syn, Flags::Ack] {
                let frame = way.tcp(port, 80, flags);
                let frame = if ipv6 { frame } else { with_options(&frame, options) };
                prop_assert_eq!(run(&program, &frame), if foreign { 0 } else { ALL }, "bucket {:?}", bucket);
            }
            prop_assert_eq!(run(&program, &way.echo()), ALL, "an echo has another key");
            if ipv6 {
                let frame = with_extensions(&way.tcp(port, 80, Flags::Syn), &[0], 0, false);
                prop_assert_eq!(run(&program, &frame), ALL, "extension headers are the daemon's");
            }
        }
        prop_assert!(seen[0] > 0 && seen[1] > 0, "{:?}", seen);
    }
}

#[test]
fn what_the_decision_needs_of_the_battery_passes_the_filter() {
    let half = (0..BUCKETS as u16).step_by(2);
    let marks: Vec<(u16, u8)> = half.map(|bucket| (bucket, (bucket / 2 % 3) as u8)).collect();
    let (mut passed, mut kept_out, mut datagram) = (0, 0, 0);
    for (addr, mode) in [vip(), vip6()]
        .into_iter()
        .flat_map(|addr| [L2Mode::Directed, L2Mode::Invisible(VIRTUAL_MAC)].map(|mode| (addr, mode)))
    {
        for affinity in [
            Affinity::ClientIp,
            Affinity::ClientPort,
            Affinity::ClientNet,
            Affinity::IpId,
        ] {
            // All alike, so that the filter hashes where it can.
            let rules = [
                rule(Protocol::Tcp, 0, 65535, affinity, 0),
                rule(Protocol::Udp, 53, 53, affinity, 0),
            ];
            let plan = plan(vip_plan(addr, mode, rules), vec![group_of([1, 1, 1], &marks)]);
            let mut fragments = FragmentTable::default();
            for (to, from) in [(plan.vips[0].service_mac(), CLIENT_MAC), (OWN_MAC, mac(1))] {
                for client in battery::clients(addr) {
                    datagram += 20;
                    let frames = battery::frames_from(client, addr, to, from, datagram);
                    let [through, out] = pass(&plan, &frames, &mut fragments);
                    passed += through;
                    kept_out += out;
                }
            }
        }
    }
    assert!(
        passed > 1000 && kept_out > 100,
        "{passed} had to pass, {kept_out} were kept out"
    );
}

/// Panics unless all of `frames` pass the filters of `plan` that the decision needs. Returns how many those are, and how many are kept out.
fn pass(plan: &Plan, frames: &[Vec<u8>], fragments: &mut FragmentTable) -> [usize; 2] {
    let programs = [Detail::Buckets, Detail::Vips].map(|detail| build(plan, INTERFACE, detail));
    let mut counts = [0; 2];
    for frame in frames {
        let Some(packet) = Packet::parse(frame) else { continue };
        let decision = decide(plan, &packet, fragments, Duration::ZERO, &mut |_| true);
        // The kernel takes the outer tag off before a socket filter runs.
        let (captured, tag) = match frame[12..14] {
            [0x81, 0] | [0x88, 0xa8] => ([&frame[..12], &frame[16..]].concat(), [frame[14], frame[15]]),
            _ => (frame.clone(), [0; 2]),
        };
        if !matches!(captured[12..14], [8, 0] | [0x86, 0xdd]) {
            continue;
        }
        let tag = u32::from(u16::from_be_bytes(tag));
        let outcomes = programs.each_ref().map(|program| run_tagged(program, &captured, tag));
        if matches!(decision.verdict, Verdict::Accept | Verdict::Hold) || !decision.forward.is_empty() {
            counts[0] += 1;
            assert_eq!(outcomes, [ALL; 2], "{decision:?} {packet:?}");
        } else {
            counts[1] += usize::from(outcomes[0] == 0);
        }
    }
    counts
}

#[test]
fn frames_that_are_cut_anywhere_end_the_program() {
    let vip_plan = vip_plan(
        vip(),
        L2Mode::Invisible(VIRTUAL_MAC),
        vec![rule(Protocol::Tcp, 80, 80, Affinity::ClientPort, 0)],
    );
    let plan = plan(vip_plan, vec![group(BucketState::Own, Some(0))]);
    let program = build(&plan, INTERFACE, Detail::Buckets);
    let frame = Way::new(client(1), vip(), VIRTUAL_MAC).tcp(4000, 80, Flags::Syn);
    for length in 0..36 {
        assert_eq!(run(&program, &frame[..length]), 0, "{length} bytes");
    }
    assert_eq!(run(&program, &frame), ALL);
    assert_eq!(run(&closed(), &frame), 0);
}

#[test]
fn the_program_stays_within_the_kernels_limit_with_many_vips_and_the_worst_map() {
    let mut worst = group(BucketState::Foreign, Some(1));
    for i in (0..BUCKETS).filter(|i| (i / 32) % 2 == 0 || i % 3 == 0) {
        worst.states[i] = BucketState::Own;
    }
    let one = vip_plan(
        vip(),
        L2Mode::Invisible(VIRTUAL_MAC),
        vec![rule(Protocol::Tcp, 0, 65535, Affinity::ClientPort, 0)],
    );
    let mut plan = plan(one.clone(), vec![worst]);
    for (count, family) in [1, 6, 7, 8, 100, 200]
        .into_iter()
        .flat_map(|count| [4, 6, 0].map(|family| (count, family)))
    {
        plan.vips = (0..count)
            .map(|i| VipPlan {
                addr: match (family, i % 2) {
                    (4, _) | (0, 0) => IpAddr::from([198, 18, 3, i]),
                    _ => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 3, i.into()]),
                },
                ..one.clone()
            })
            .collect();
        let program = build(&plan, INTERFACE, Detail::Buckets);
        check(&program);
        for vip in &plan.vips {
            let client = if vip.addr.is_ipv4() { client(1) } else { client6(1) };
            let frame = Way::new(client, vip.addr, OWN_MAC).tcp(1, 80, Flags::Syn);
            assert_eq!(run(&program, &frame), ALL, "{} of {count}", vip.addr);
        }
    }
}

#[test]
fn a_solicitation_for_a_vip_is_left_to_its_own_socket_and_other_icmp_passes() {
    let rules = vec![rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, 0)];
    let plan = plan(
        vip_plan(vip6(), L2Mode::Invisible(VIRTUAL_MAC), rules),
        vec![group(BucketState::Foreign, Some(1))],
    );
    let (IpAddr::V6(vip), IpAddr::V6(client)) = (vip6(), client6(1)) else {
        panic!("IPv6 addresses are expected");
    };
    let solicitation = Nd {
        destination_mac: VIRTUAL_MAC,
        source_mac: CLIENT_MAC,
        source: client,
        destination: vip,
        message: Message::Solicitation,
        target: vip,
        link_layer: Some(CLIENT_MAC),
    };
    let way = Way::new(client6(1), vip6(), VIRTUAL_MAC);
    for detail in [Detail::Buckets, Detail::Vips] {
        let program = build(&plan, INTERFACE, detail);
        assert_eq!(run(&program, &solicitation.emit()), 0);
        assert_eq!(run(&program, &way.echo()), ALL);
        assert_eq!(run(&program, &way.too_big(&way.back().tcp(80, 4000, Flags::Ack))), ALL);
    }
}

#[test]
fn requests_are_recorded_by_flags_and_by_the_address_of_the_mode() {
    let web = || vec![rule(Protocol::Tcp, 80, 80, Affinity::ClientPort, 0)];
    let groups = || vec![group(BucketState::Foreign, Some(1))];
    let directed = plan(vip_plan(vip(), L2Mode::Directed, web()), groups());
    let invisible = plan(vip_plan(vip(), L2Mode::Invisible(VIRTUAL_MAC), web()), groups());
    let frame = |to_mac, flags| Way::new(client(1), vip(), to_mac).tcp(4000, 80, flags);
    for (plan, to_mac, expected) in [
        (&directed, OWN_MAC, ALL),
        (&directed, mac(1), ALL),
        (&invisible, VIRTUAL_MAC, ALL),
        (&invisible, OWN_MAC, 0),
        (&invisible, mac(1), 0),
    ] {
        let program = requests(plan, INTERFACE);
        assert_eq!(run(&program, &frame(to_mac, Flags::Syn)), expected, "{to_mac}");
        for flags in [Flags::SynAck, Flags::Ack, Flags::Rst] {
            assert_eq!(run(&program, &frame(to_mac, flags)), 0, "{flags:?}");
        }
        let request = frame(to_mac, Flags::Syn);
        assert_eq!(run(&program, &with_options(&request, 10)), expected, "with IP options");
        assert_eq!(run(&program, &fragment(&request, 7, 0, true, 24)), 0, "a fragment");
        let elsewhere = Way::new(client(1), client(2), to_mac).tcp(4000, 80, Flags::Syn);
        assert_eq!(run(&program, &elsewhere), 0);
        for length in 0..request.len().min(48) {
            assert_eq!(run(&program, &request[..length]), 0, "{length} bytes");
        }
    }
    let mut many = invisible;
    let one = many.vips[0].clone();
    many.vips = (0..=u16::MAX / 64)
        .map(|i| VipPlan {
            addr: IpAddr::from([198, 19, (i / 256) as u8, (i % 256) as u8]),
            ..one.clone()
        })
        .collect();
    let program = requests(&many, INTERFACE);
    check(&program);
    let last = many.vips.last().unwrap().addr;
    let request = Way::new(client(1), last, VIRTUAL_MAC).tcp(4000, 80, Flags::Syn);
    assert_eq!(run(&program, &request), ALL, "past its limit it passes too much");
}

/// As the kernel shows a frame that had two tags: without the outer one.
#[test]
fn frames_with_a_second_tag_pass_if_it_names_a_priority() {
    let directed = vip_plan(
        vip(),
        L2Mode::Directed,
        [rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, 0)],
    );
    let plan = plan(directed, vec![group(BucketState::Own, Some(0))]);
    let request = Way::new(client(1), vip(), OWN_MAC).tcp(4000, 80, Flags::Syn);
    let program = build(&plan, INTERFACE, Detail::Buckets);
    for (tags, passes) in [
        (&[0x8100_0000][..], true),
        (&[0x88a8_e000], true),
        (&[0x8100_0000, 0x88a8_2000], true),
        (&[0x8100_0005], false),
        (&[0x88a8_efff], false),
    ] {
        let frame = tagged(&request, tags);
        assert_eq!(run(&program, &frame) != 0, passes, "{tags:x?}");
        assert_eq!(run(&requests(&plan, INTERFACE), &frame), 0, "not recorded");
        assert_eq!(
            run(&build(&plan, INTERFACE + 1, Detail::Buckets), &frame),
            0,
            "not of this interface"
        );
    }
}

#[test]
fn frames_of_another_vlan_do_not_pass() {
    let plan = plan(
        vip_plan(
            vip(),
            L2Mode::Directed,
            [rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, 0)],
        ),
        vec![group(BucketState::Own, Some(0))],
    );
    let frame = Way::new(client(1), vip(), OWN_MAC).tcp(4000, 80, Flags::Syn);
    for program in [build(&plan, INTERFACE, Detail::Buckets), requests(&plan, INTERFACE)] {
        check(&program);
        let passes = [0, 0xe000, 5, 0xefff].map(|tag| run_tagged(&program, &frame, tag) != 0);
        assert_eq!(passes, [true, true, false, false]);
    }
}
