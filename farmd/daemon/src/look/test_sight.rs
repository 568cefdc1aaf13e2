//! A sight for the tests: node s1 of three, with one module; s3 was never heard.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use farm_core::api::{ModuleState, NodeModuleStatus, Quality};
use farm_core::balance::assign::{BucketMap, assign};
use farm_core::balance::hash::Seed;
use farm_core::balance::plan::{BucketState, GroupPlan, Plan, VipPlan};
use farm_core::config::{self, L2Mode};
use farm_core::id::{BUCKETS, MacAddr, NodeId};

use super::{GroupSight, ModuleSight, Sight};

/// The module's virtual address.
pub const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 18, 0, 20));
/// The group of TCP 80, by the client's address.
pub const CLIENT_ADDRS: &str = "addrs";
/// The group of TCP 443, by the client's address and port.
pub const CLIENT_PORTS: &str = "ports";

const MODULE: &str = r#"<safe><service mode="farm">
<farm><lan name="default"/></farm>
<vip><interface_list><interface>
<virtual_interface type="vmac_directed"><virtual_addr addr="198.18.0.20" where="alias"/></virtual_interface>
</interface></interface_list>
<loadbalancing_list>
<group name="addrs"><rule port="80" proto="tcp" filter="on_addr"/></group>
<group name="ports"><rule port="443" proto="tcp" filter="on_port"/></group>
<group name="names"><rule port="53" proto="udp" filter="on_ipid"/></group>
</loadbalancing_list></vip>
<user/></service></safe>"#;

/// Client `i`.
pub fn client(i: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(198, 18, 1, i))
}

fn node(i: usize) -> NodeId {
    NodeId::new(i).unwrap()
}

/// The module serves on s2, and here if it `runs`; then each has half of the buckets.
pub fn sight(runs: bool) -> Sight {
    let (config, _) = config::module::parse("userconfig.xml", MODULE, &BTreeMap::new(), None).unwrap();
    let vip = config.vip.clone().unwrap();
    let owners = assign(&BucketMap::default(), &[(node(0), 1), (node(1), 1)].into());
    let group = |name: &str| {
        let mut group = GroupPlan::closed(format!("web/{name}"));
        group.owners = owners.clone();
        for index in (0..BUCKETS).filter(|i| owners.owns(node(0), *i)) {
            group.states[index] = BucketState::Own;
        }
        group
    };
    let planned = vip.groups.iter().filter(|_| runs);
    let plan = Plan {
        version: 1,
        this: node(0),
        seed: Seed { s0: 1, s1: 2 },
        vips: (0..usize::from(runs))
            .map(|_| VipPlan {
                addr: VIP,
                interface: 3,
                own_mac: MacAddr([2, 0, 0, 0, 0, 1]),
                mode: L2Mode::Directed,
                entry_group: VipPlan::entry_group_of(&vip, VIP),
                rules: VipPlan::rules_of(&vip, VIP, 0),
                peers: [(node(1), MacAddr([2, 0, 0, 0, 0, 2]))].into(),
                choice: config::PlaneChoice::default(),
                xdp: config::XdpChoice::default(),
                arp_reroute: None,
            })
            .collect(),
        groups: planned.clone().map(|g| group(&g.name)).collect(),
        gone: BTreeMap::new(),
    };
    let status = |name: &str, state, why: &str| {
        let quality = match state {
            Some(ModuleState::Up) => Some(Quality::Ready),
            Some(_) => Some(Quality::NotReady),
            None => None,
        };
        NodeModuleStatus {
            node: name.to_owned(),
            state,
            quality,
            shares: Vec::new(),
            why: why.to_owned(),
            age_ms: 0,
        }
    };
    let here = if runs { ModuleState::Up } else { ModuleState::Stop };
    let weights = [node(0), node(1)].map(|n| (n, (1, String::new())));
    Sight {
        this: node(0),
        nodes: ["s1", "s2", "s3"].map(str::to_owned).into(),
        plan: Arc::new(plan),
        groups: planned.enumerate().map(|(i, _)| ("web".parse().unwrap(), i)).collect(),
        modules: vec![ModuleSight {
            name: "web".parse().unwrap(),
            nodes: vec![
                status("s1", Some(here), ""),
                status("s2", Some(ModuleState::Up), ""),
                status("s3", None, "not heard"),
            ],
            groups: vip
                .groups
                .iter()
                .map(|_| GroupSight {
                    map: 7,
                    weights: weights.clone().into(),
                })
                .collect(),
            config: Arc::new(config),
        }],
        since: None,
    }
}
