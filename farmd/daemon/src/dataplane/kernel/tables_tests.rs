//! Layouts and tables against the plan they are made from.

use std::collections::BTreeMap;

use farm_core::config::PlaneChoice;
use farm_core::id::MacAddr;

use super::super::tests::test_frames::{group, id, plan, rule, vip, vip_plan};
use super::*;

fn plan_of(rules: &[Vec<RulePlan>]) -> Plan {
    let one = vip_plan(vip(), L2Mode::Directed, []);
    let vips = (0u32..).zip(rules).map(|(i, rules)| VipPlan {
        addr: IpAddr::V4((0xc612_0100 + i).into()),
        rules: rules.clone().into(),
        ..one.clone()
    });
    Plan {
        vips: vips.collect(),
        ..plan(one.clone(), vec![group(BucketState::Own, Some(0)); 40])
    }
}

fn wanted(vip: &VipPlan) -> bool {
    vip.choice != PlaneChoice::Raw
}

fn layout(plan: &Plan) -> Layout {
    Layout::new(plan, &wanted, &BTreeMap::new())
}

/// A rule for each of `ports`, with groups that take turns.
fn single_ports(ports: impl Iterator<Item = u16>, groups: usize) -> Vec<RulePlan> {
    let rules = ports.enumerate();
    rules
        .map(|(i, port)| rule(Protocol::Tcp, port, port, Affinity::ClientPort, i % groups))
        .collect()
}

#[test]
fn each_port_has_the_rule_that_the_plan_has_for_it() {
    let rules = vec![
        rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, 0),
        rule(Protocol::Udp, 53, 53, Affinity::IpId, 1),
        rule(Protocol::Tcp, 250, 260, Affinity::ClientNet, 2),
        rule(Protocol::Tcp, 0, 1023, Affinity::ClientPort, 3),
        rule(Protocol::Udp, 0, 65535, Affinity::ClientPort, 31),
    ];
    let plan = plan_of(&[rules]);
    let layout = layout(&plan);
    let (vip, place) = (&plan.vips[0], &layout.places[0]);
    for port in 0..=u16::MAX {
        for (protocol, directory) in [
            (Protocol::Tcp, &place.directories.tcp),
            (Protocol::Udp, &place.directories.udp),
        ] {
            let page = &layout.pages[usize::from(directory[usize::from(port >> 8)])];
            let expected = vip.rule(protocol, port).map_or(0, |rule| {
                let key = match rule.affinity {
                    Affinity::ClientIp => 0,
                    Affinity::ClientPort => 1,
                    Affinity::ClientNet => 2,
                    Affinity::IpId => 3,
                };
                1 + (rule.group as u16) * 4 + key
            });
            assert_eq!(page[usize::from(port & 0xff)], expected, "{protocol:?} {port}");
        }
    }
    assert_eq!(layout.groups, BTreeSet::from([0, 1, 2, 3, 31]));
}

#[test]
fn a_layout_holds_until_the_configuration_is_another() {
    let plan = plan_of(&[single_ports(80..90, 3), single_ports(80..90, 3)]);
    let layout = layout(&plan);
    assert_eq!(layout.pages.len(), 2, "equal rules have one page");
    let mut other = plan.clone();
    other.groups[0] = group(BucketState::Foreign, Some(1));
    other.vips[0].peers = BTreeMap::from([(id(7), MacAddr([7; 6]))]);
    assert!(layout.fits(&other, &wanted), "buckets and peers are no part of it");
    let changes: [fn(&mut Plan); 5] = [
        |plan| plan.vips[1].rules = single_ports(80..91, 3).into(),
        |plan| plan.vips[1].entry_group = 2,
        |plan| plan.vips[1].interface += 1,
        |plan| plan.vips[1].choice = PlaneChoice::Raw,
        |plan| plan.vips.truncate(1),
    ];
    for change in changes {
        let mut other = plan.clone();
        change(&mut other);
        assert!(!layout.fits(&other, &wanted), "{:?}", other.vips);
    }
}

#[test]
fn an_address_keeps_its_place() {
    let plan = plan_of(&[
        single_ports(80..81, 1),
        single_ports(80..81, 1),
        single_ports(80..81, 1),
    ]);
    let key = |i: usize| (plan.vips[i].interface, plan.vips[i].addr);
    let numbers = BTreeMap::from([(key(1), 0), (key(2), 5)]);
    let layout = Layout::new(&plan, &wanted, &numbers);
    let places: Vec<u32> = layout.places.iter().map(|place| place.number).collect();
    assert_eq!(places, [1, 0, 5]);
}

/// Rules of which no 256 ports are like others, of this address or of one with another `mark`.
fn every_page(mark: usize, protocol: Protocol) -> impl Iterator<Item = RulePlan> {
    (0..=u8::MAX).flat_map(move |high| {
        let groups = (0..8).map(move |bit| usize::from(high >> bit & 1)).chain([mark]);
        (u16::from(high) << 8..)
            .zip(groups)
            .map(move |(port, group)| rule(protocol, port, port, Affinity::ClientIp, group))
    })
}

#[test]
fn what_there_is_no_room_for_is_refused_with_its_reason() {
    let few = || single_ports(80..81, 1);
    let tcp = |mark| every_page(mark, Protocol::Tcp).collect::<Vec<_>>();
    let most = tcp(1).into_iter().chain(every_page(1, Protocol::Udp)).collect();
    let one = layout(&plan_of(&[most]));
    assert!(one.refused.is_empty(), "there is room for all rules of one address");
    assert_eq!(one.pages.len(), 1 + 256, "pages are shared by the protocols");
    let of = |plan: &Plan| {
        let layout = layout(plan);
        let reasons = plan.vips.iter().map(move |vip| layout.refused.get(&vip.addr).copied());
        reasons.collect::<Vec<_>>()
    };
    let plan = plan_of(&[tcp(1), tcp(2), tcp(3), tcp(4), few()]);
    assert_eq!(of(&plan), [None, None, None, Some(NoRoom::Pages), None]);
    let past = vec![rule(Protocol::Tcp, 80, 80, Affinity::ClientIp, MAX_GROUPS as usize)];
    assert_eq!(of(&plan_of(&[past, few()])), [Some(NoRoom::Groups), None]);
    let many = vec![few(); MAX_VIPS as usize + 1];
    assert_eq!(of(&plan_of(&many)).last(), Some(&Some(NoRoom::Addresses)));
    assert_eq!(of(&plan_of(&many)).iter().flatten().count(), 1);
}

#[test]
fn a_bucket_tells_state_owner_and_what_is_special_about_it() {
    let mut of = group(BucketState::Draining, Some(9));
    of.leaving = [3].into_iter().collect();
    of.holders = BTreeMap::from([(4, [id(1)].into_iter().collect())]);
    of.states[5] = BucketState::Own;
    let young: BucketSet = [6].into_iter().collect();
    let mut table = [0; BUCKETS];
    buckets(&of, Some(&young), false, &mut table);
    let owner = 9 << 8;
    let expected = [
        bucket::DRAINING | owner,
        bucket::DRAINING | owner | bucket::LEAVING,
        bucket::DRAINING | owner | bucket::HELD,
        bucket::OWN | owner,
        bucket::DRAINING | owner | bucket::YOUNG,
    ];
    assert_eq!(table[2..7], expected);
    buckets(&group(BucketState::Foreign, None), None, true, &mut table);
    assert!(table.iter().all(|entry| *entry == bucket::FOREIGN | 0xff00));
}
