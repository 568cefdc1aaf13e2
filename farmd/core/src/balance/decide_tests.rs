use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::balance::assign::{BucketMap, assign};
use crate::balance::plan::{GroupPlan, RulePlan};
use crate::balance::test_frames::*;
use crate::config::{GroupConfig, PlaneChoice, PortRule, VipConfig, XdpChoice};
use crate::id::NodeId;

const INVISIBLE: L2Mode = L2Mode::Invisible(VIRTUAL_MAC);

fn now() -> Duration {
    Duration::from_secs(1)
}

fn judge_with(plan: &Plan, frame: &[u8], fragments: &mut FragmentTable, has_socket: bool) -> Decision {
    let packet = Packet::parse(frame).unwrap();
    decide(plan, &packet, fragments, now(), &mut |_| has_socket)
}

pub(super) fn judge(plan: &Plan, frame: &[u8]) -> Decision {
    judge_with(plan, frame, &mut FragmentTable::default(), false)
}

fn web(affinity: Affinity) -> Vec<RulePlan> {
    vec![
        rule(Protocol::Tcp, 80, 80, affinity, 0),
        rule(Protocol::Udp, 53, 53, affinity, 0),
    ]
}

pub(super) fn invisible(state: BucketState) -> Plan {
    let owner = match state {
        BucketState::Own | BucketState::Guarded => 0,
        BucketState::Draining | BucketState::Foreign => 1,
    };
    plan(
        vip_plan(vip(), INVISIBLE, web(Affinity::ClientIp)),
        vec![group(state, Some(owner))],
    )
}

pub(super) fn way() -> Way {
    Way::new(client(1), vip(), VIRTUAL_MAC)
}

pub(super) fn directed_way() -> Way {
    Way::new(client(1), vip(), OWN_MAC)
}

/// The table of `farmd/docs/ARCHITECTURE.md`, "Buckets and verdicts".
#[test]
fn each_state_judges_each_kind_as_the_table_says() {
    use BucketState::{Draining, Foreign, Guarded, Own};
    use Reason as R;
    use Verdict::{Accept, Drop};
    let syn = way().tcp(4000, 80, Flags::Syn);
    let ack = way().tcp(4000, 80, Flags::Ack);
    let udp = way().udp(4000, 53, b"?");
    let echo = way().echo();
    let table = [
        // state, kind, this host has a socket, verdict, reason
        (Own, &syn, false, Accept, R::Own),
        (Own, &ack, false, Accept, R::Own),
        (Own, &ack, true, Accept, R::Own),
        (Own, &udp, false, Accept, R::Own),
        (Own, &echo, false, Accept, R::Own),
        (Guarded, &syn, false, Accept, R::GuardedNew),
        (Guarded, &ack, false, Drop, R::GuardedUnknown),
        (Guarded, &ack, true, Accept, R::GuardedKnown),
        (Guarded, &udp, false, Accept, R::GuardedNew),
        (Guarded, &echo, false, Accept, R::GuardedNew),
        (Draining, &syn, true, Drop, R::DrainingOther),
        (Draining, &ack, false, Drop, R::DrainingOther),
        (Draining, &ack, true, Accept, R::DrainingKnown),
        (Draining, &udp, true, Drop, R::DrainingOther),
        (Draining, &echo, true, Drop, R::DrainingOther),
        (Foreign, &syn, true, Drop, R::Foreign),
        (Foreign, &ack, true, Drop, R::Foreign),
        (Foreign, &udp, true, Drop, R::Foreign),
        (Foreign, &echo, true, Drop, R::Foreign),
    ];
    for (state, frame, has_socket, verdict, reason) in table {
        let decision = judge_with(&invisible(state), frame, &mut FragmentTable::default(), has_socket);
        let kind = Packet::parse(frame).unwrap().l4;
        assert_eq!(
            (decision.verdict, decision.reason),
            (verdict, reason),
            "{state:?} {kind:?} socket {has_socket}"
        );
        assert!(decision.forward.is_empty(), "nothing is forwarded under a virtual MAC");
        let opens = state == Guarded && matches!(kind, L4::Tcp { syn: true, .. });
        assert_eq!(decision.opens.is_some(), opens, "{state:?} {kind:?}");
    }
}

#[test]
fn a_syn_with_ack_opens_nothing() {
    for flags in [Flags::SynAck, Flags::Rst, Flags::Ack] {
        let decision = judge(&invisible(BucketState::Guarded), &way().tcp(4000, 80, flags));
        assert_eq!(decision.reason, Reason::GuardedUnknown, "{flags:?}");
    }
}

#[test]
fn sockets_are_asked_for_the_flow_as_the_client_names_it_and_only_where_it_matters() {
    for (state, asked) in [
        (BucketState::Own, 0),
        (BucketState::Guarded, 1),
        (BucketState::Draining, 1),
        (BucketState::Foreign, 0),
    ] {
        let packet = Packet::parse(&way().tcp(4000, 80, Flags::Ack)).unwrap();
        let mut flows = Vec::new();
        let mut ask = |flow: &FlowKey| {
            flows.push(*flow);
            true
        };
        decide(
            &invisible(state),
            &packet,
            &mut FragmentTable::default(),
            now(),
            &mut ask,
        );
        assert_eq!(flows.len(), asked, "{state:?}");
        let expected = FlowKey {
            protocol: TCP,
            vip: vip(),
            vip_port: 80,
            client: client(1),
            client_port: 4000,
        };
        assert!(flows.iter().all(|f| *f == expected), "{flows:?}");
    }
}

#[test]
fn what_is_not_for_a_vip_passes_and_another_ethernet_address_is_dropped() {
    let plan = invisible(BucketState::Own);
    let other = Way::new(client(1), IpAddr::from([198, 18, 0, 21]), OWN_MAC);
    assert_eq!(judge(&plan, &other.tcp(1, 80, Flags::Syn)).verdict, Verdict::Pass);
    let decision = judge(&plan, &directed_way().tcp(1, 80, Flags::Syn));
    assert_eq!((decision.verdict, decision.reason), (Verdict::Drop, Reason::OtherMac));
    // What a member has kept for this node comes to its own address.
    let handed_on = Way {
        from_mac: mac(1),
        ..directed_way()
    };
    assert_eq!(judge(&plan, &handed_on.tcp(1, 80, Flags::Syn)).verdict, Verdict::Accept);
}

#[test]
fn ports_and_protocols_without_a_rule_are_dropped() {
    let plan = invisible(BucketState::Own);
    for frame in [
        way().tcp(1, 81, Flags::Syn),
        way().udp(1, 80, b""),
        way().tcp(1, 53, Flags::Syn),
    ] {
        let decision = judge(&plan, &frame);
        assert_eq!((decision.verdict, decision.reason), (Verdict::Drop, Reason::NoRule));
    }
    let mut other = way().udp(1, 53, b"");
    other[23] = 132;
    assert_eq!(judge(&plan, &other).reason, Reason::NoRule, "SCTP");
    let mut reply = way().echo();
    reply[34] = 0;
    assert_eq!(judge(&plan, &reply).reason, Reason::NoRule, "an echo reply");
}

#[test]
fn nobodys_bucket_is_counted_apart() {
    let plan = plan(
        vip_plan(vip(), INVISIBLE, web(Affinity::ClientIp)),
        vec![group(BucketState::Foreign, None)],
    );
    let decision = judge(&plan, &way().tcp(1, 80, Flags::Syn));
    assert_eq!((decision.verdict, decision.reason), (Verdict::Drop, Reason::NoOwner));
}

fn port_rule(vip: Option<IpAddr>, first_port: u16, last_port: u16, affinity: Affinity) -> PortRule {
    PortRule {
        vip,
        protocol: Protocol::Tcp,
        first_port,
        last_port,
        affinity,
    }
}

#[test]
fn the_most_specific_rule_counts() {
    use Affinity::{ClientIp, ClientNet, ClientPort, IpId};
    let group = |rules| GroupConfig {
        name: "g".to_owned(),
        weights: Default::default(),
        rules,
        arp: false,
    };
    let other: IpAddr = [198, 18, 0, 21].into();
    let config = VipConfig {
        tcp_reset: true,
        plane: PlaneChoice::Auto,
        xdp: XdpChoice::Auto,
        drain: Duration::ZERO,
        interfaces: Vec::new(),
        groups: vec![
            group(vec![
                port_rule(None, 0, 65535, ClientIp),
                port_rule(None, 443, 443, ClientPort),
            ]),
            group(vec![
                port_rule(Some(vip()), 0, 1023, ClientNet),
                port_rule(Some(vip()), 400, 500, IpId),
            ]),
        ],
    };
    let rules = VipPlan::rules_of(&config, vip(), 5);
    let vip_plan = vip_plan(vip(), INVISIBLE, rules);
    let of = |port| vip_plan.rule(Protocol::Tcp, port).map(|r| (r.affinity, r.group));
    assert_eq!(
        of(443),
        Some((IpId, 6)),
        "a named VIP before *, however narrow the latter's range"
    );
    assert_eq!(of(399), Some((ClientNet, 6)));
    assert_eq!(of(1024), Some((ClientIp, 5)));
    assert_eq!(vip_plan.rule(Protocol::Udp, 443), None);
    let others = VipPlan::rules_of(&config, other, 0);
    assert_eq!(
        others.iter().map(|r| r.affinity).collect::<Vec<_>>(),
        [ClientPort, ClientIp],
        "narrow before wide"
    );
}

#[test]
fn an_echo_follows_the_entry_group() {
    let mut vip_plan = vip_plan(vip(), INVISIBLE, web(Affinity::ClientIp));
    for (entry_group, verdict) in [(0, Verdict::Drop), (1, Verdict::Accept)] {
        vip_plan.entry_group = entry_group;
        let groups = vec![group(BucketState::Foreign, Some(1)), group(BucketState::Own, Some(0))];
        assert_eq!(judge(&plan(vip_plan.clone(), groups), &way().echo()).verdict, verdict);
    }
}

/// Two groups, so that it shows which rule was looked up; buckets differ, so that it shows which client was.
#[test]
fn an_icmp_error_goes_where_the_packet_it_quotes_came_from() {
    for (client, vip, router) in [(client(1), vip(), client(77)), (client6(1), vip6(), client6(77))] {
        let rules = vec![
            rule(Protocol::Tcp, 80, 80, Affinity::ClientPort, 1),
            rule(Protocol::Udp, 53, 53, Affinity::ClientIp, 1),
        ];
        let mut own = group(BucketState::Foreign, Some(1));
        let bucket = crate::balance::hash::bucket_of_port(SEED, client, 4000);
        own.states[bucket.index()] = BucketState::Guarded;
        let plan = plan(
            vip_plan(vip, INVISIBLE, rules),
            vec![group(BucketState::Foreign, Some(1)), own],
        );
        let reply = Way::new(client, vip, VIRTUAL_MAC).back().tcp(80, 4000, Flags::Ack);
        let error = Way::new(router, vip, VIRTUAL_MAC).too_big(&reply);
        let known = judge_with(&plan, &error, &mut FragmentTable::default(), true);
        assert_eq!((known.verdict, known.reason), (Verdict::Accept, Reason::GuardedKnown));
        let unknown = judge(&plan, &error);
        assert_eq!(
            (unknown.verdict, unknown.reason),
            (Verdict::Drop, Reason::GuardedUnknown)
        );
        // About another address of this host: not the VIP's business.
        let foreign = Way::new(client, router, VIRTUAL_MAC).back().tcp(80, 4000, Flags::Ack);
        assert_eq!(
            judge(&plan, &Way::new(router, vip, VIRTUAL_MAC).too_big(&foreign)).reason,
            Reason::Malformed
        );
    }
}

#[test]
fn later_fragments_go_where_the_first_one_went() {
    let payload = vec![7; 3000];
    for (affinity, port) in [(Affinity::ClientPort, 4000), (Affinity::ClientIp, 4001)] {
        for state in [BucketState::Own, BucketState::Foreign] {
            let rules = vec![
                rule(Protocol::Udp, 53, 53, affinity, 0),
                rule(Protocol::Udp, 80, 80, Affinity::ClientPort, 0),
            ];
            let plan = plan(vip_plan(vip(), INVISIBLE, rules), vec![group(state, Some(0))]);
            let whole = way().udp(port, 53, &payload);
            let first = fragment(&whole, 9, 0, true, 1480);
            let middle = fragment(&whole, 9, 185, true, 1480);
            let last = fragment(&whole, 9, 370, false, 1480);
            let mut table = FragmentTable::default();
            let unknown = judge_with(&plan, &middle, &mut table, false);
            assert_eq!(
                (unknown.verdict, unknown.reason),
                (Verdict::Drop, Reason::UnknownFragment)
            );
            let decision = judge_with(&plan, &first, &mut table, false);
            assert_eq!(decision.verdict == Verdict::Accept, state == BucketState::Own);
            for later in [&middle, &last] {
                assert_eq!(judge_with(&plan, later, &mut table, false), decision);
            }
            let of_another = fragment(&whole, 10, 185, true, 1480);
            assert_eq!(
                judge_with(&plan, &of_another, &mut table, false).reason,
                Reason::UnknownFragment
            );
            // By the plan of the moment, not by that of the first one.
            let mut next = plan.clone();
            next.groups = vec![group(BucketState::Draining, Some(1))];
            assert_eq!(
                judge_with(&next, &last, &mut table, false).reason,
                Reason::DrainingOther
            );
            let packet = Packet::parse(&last).unwrap();
            let late = now() + crate::balance::fragment::LIFETIME + Duration::from_millis(1);
            let forgotten = decide(&plan, &packet, &mut table, late, &mut |_| false);
            assert_eq!(forgotten.reason, Reason::UnknownFragment);
        }
    }
}

#[test]
fn a_large_echo_is_taken_whole() {
    let plan = invisible(BucketState::Own);
    let mut ping = way().echo();
    ping.resize(14 + 20 + 3008, 0);
    let mut table = FragmentTable::default();
    for (offset, more) in [(0, true), (185, true), (370, false)] {
        let part = fragment(&ping, 4, offset, more, 1480);
        assert_eq!(
            judge_with(&plan, &part, &mut table, false).verdict,
            Verdict::Accept,
            "at {offset}"
        );
    }
}

#[test]
fn without_the_first_fragment_a_rule_that_needs_no_port_tells() {
    let whole = way().udp(4000, 53, &[7; 3000]);
    let later = fragment(&whole, 9, 185, false, 1480);
    for (affinity, verdict) in [
        (Affinity::ClientIp, Verdict::Accept),
        (Affinity::ClientNet, Verdict::Accept),
        (Affinity::IpId, Verdict::Accept),
        (Affinity::ClientPort, Verdict::Drop),
    ] {
        let plan = plan(
            vip_plan(vip(), INVISIBLE, web(affinity)),
            vec![group(BucketState::Own, Some(0))],
        );
        assert_eq!(judge(&plan, &later).verdict, verdict, "{affinity:?}");
    }
}

pub(super) fn directed(state: BucketState, owner: Option<usize>) -> Plan {
    plan(
        vip_plan(vip(), L2Mode::Directed, web(Affinity::ClientIp)),
        vec![group(state, owner)],
    )
}

pub(super) fn nodes(nodes: &[usize]) -> NodeSet {
    nodes.iter().map(|i| id(*i)).collect()
}

#[test]
fn an_entry_node_forwards_to_the_owner_and_what_may_be_known_elsewhere_to_the_holders() {
    let bucket = crate::balance::hash::bucket_of_addr(SEED, client(1)).index();
    let syn = directed_way().tcp(4000, 80, Flags::Syn);
    let ack = directed_way().tcp(4000, 80, Flags::Ack);
    let udp = directed_way().udp(4000, 53, b"?");
    for (state, owner, holders, frame, forward) in [
        (BucketState::Foreign, 1, &[][..], &syn, &[1][..]),
        (BucketState::Foreign, 1, &[2], &syn, &[1]),
        (BucketState::Foreign, 1, &[2], &ack, &[1, 2]),
        (BucketState::Foreign, 1, &[2], &udp, &[1]),
        (BucketState::Foreign, 1, &[0, 2], &ack, &[1, 2]),
        (BucketState::Draining, 1, &[0], &ack, &[1]),
        (BucketState::Guarded, 0, &[1, 2], &ack, &[1, 2]),
        (BucketState::Guarded, 0, &[1, 2], &syn, &[]),
        (BucketState::Own, 0, &[], &ack, &[]),
    ] {
        let mut plan = directed(state, Some(owner));
        plan.groups[0].holders = [(bucket, nodes(holders))].into();
        let decision = judge(&plan, frame);
        assert_eq!(
            decision.forward,
            nodes(forward),
            "{state:?} {:?}",
            Packet::parse(frame).unwrap().l4
        );
        assert_eq!(decision.owner, Some(id(owner)));
        assert!(!decision.forward.contains(plan.this), "never to itself");
        // From a member it has been forwarded already; what starts something is kept until the plan here is as new as the member's.
        let mut forwarded = frame.clone();
        forwarded[6..12].copy_from_slice(&mac(2).0);
        let again = judge(&plan, &forwarded);
        let kept = decision.verdict == Verdict::Drop && *frame != ack;
        let verdict = if kept { Verdict::Hold } else { decision.verdict };
        assert_eq!((again.forward, again.verdict), (NodeSet::EMPTY, verdict));
    }
    assert_eq!(
        judge(&directed(BucketState::Foreign, None), &syn).forward,
        NodeSet::EMPTY,
        "nobody to forward to"
    );
}

#[test]
fn later_fragments_are_forwarded_like_the_first_and_not_twice() {
    let plan = directed(BucketState::Foreign, Some(2));
    let whole = directed_way().udp(4000, 53, &[7; 3000]);
    let mut table = FragmentTable::default();
    assert_eq!(
        judge_with(&plan, &fragment(&whole, 9, 0, true, 1480), &mut table, false).forward,
        nodes(&[2])
    );
    let mut later = fragment(&whole, 9, 185, false, 1480);
    assert_eq!(judge_with(&plan, &later, &mut table, false).forward, nodes(&[2]));
    later[6..12].copy_from_slice(&mac(1).0);
    assert_eq!(judge_with(&plan, &later, &mut table, false).forward, NodeSet::EMPTY);
}

/// The plans of `n` nodes after convergence on one map per group.
fn converged(n: usize, rules: &[RulePlan], addr: IpAddr, weights: &[u16], groups: usize) -> Vec<Plan> {
    let weights = |shift: usize| {
        (0..n)
            .map(|i| (id(i), weights[(i + shift) % weights.len()].max(1)))
            .collect()
    };
    let maps: Vec<BucketMap> = (0..groups)
        .map(|g| assign(&BucketMap::default(), &weights(g)))
        .collect();
    let states = |map: &BucketMap, node: NodeId| {
        let state = |i| {
            if map.owns(node, i) {
                BucketState::Own
            } else {
                BucketState::Foreign
            }
        };
        Box::new(std::array::from_fn(state))
    };
    let plan_of = |node: NodeId| {
        let groups = maps.iter().map(|map| GroupPlan {
            states: states(map, node),
            owners: map.clone(),
            ..GroupPlan::closed("web/g".to_owned())
        });
        let vip = VipPlan {
            own_mac: mac(node.as_u8()),
            ..vip_plan(addr, INVISIBLE, rules.to_vec())
        };
        Plan {
            this: node,
            ..plan(vip, groups.collect())
        }
    };
    (0..n).map(|i| plan_of(id(i))).collect()
}

fn affinity() -> impl Strategy<Value = Affinity> {
    use Affinity::{ClientIp, ClientNet, ClientPort, IpId};
    proptest::sample::select(vec![ClientIp, ClientPort, ClientNet, IpId])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn exactly_one_of_all_nodes_accepts(
        n in 2usize..9,
        kinds in proptest::collection::vec(affinity(), 2),
        weights in proptest::collection::vec(1u16..9, 1..5),
        v6 in any::<bool>(),
        clients in proptest::collection::vec((any::<u32>(), any::<u16>(), any::<u16>()), 1..20),
    ) {
        let addr = if v6 { vip6() } else { vip() };
        let rules = [rule(Protocol::Tcp, 80, 443, kinds[0], 0), rule(Protocol::Udp, 0, 65535, kinds[1], 1)];
        let plans = converged(n, &rules, addr, &weights, 2);
        for (host, port, identification) in clients {
            let client = if v6 { client6(host) } else { IpAddr::V4(host.into()) };
            let way = Way::new(client, addr, VIRTUAL_MAC);
            let mut frames = vec![way.tcp(port, 443, Flags::Syn), way.tcp(port, 80, Flags::Ack), way.udp(port, 53, b"?"), way.echo()];
            if !v6 {
                frames.iter_mut().for_each(|f| f[18..20].copy_from_slice(&identification.to_be_bytes()));
            }
            for frame in frames {
                let accepting = plans.iter().filter(|p| judge(p, &frame).verdict == Verdict::Accept).count();
                prop_assert_eq!(accepting, 1, "{:?}", Packet::parse(&frame));
            }
        }
    }
}
