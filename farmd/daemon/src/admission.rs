//! Whether a module fits beside the others of this node; asked before its configuration is put into force.

use std::net::IpAddr;

use farm_core::config::{MAX_GROUPS, MAX_MODULES, ModuleConfig};
use farm_core::id::ModuleName;

/// What another module of this node has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Other {
    name: ModuleName,
    vips: Vec<IpAddr>,
    groups: usize,
}

impl Other {
    /// The claims of a configured module.
    pub fn new(name: ModuleName, config: &ModuleConfig) -> Self {
        let vips = config.vip.iter().flat_map(|v| v.addrs()).collect();
        Self {
            name,
            vips,
            groups: groups(config),
        }
    }
}

fn groups(config: &ModuleConfig) -> usize {
    config.vip.as_ref().map_or(0, |v| v.groups.len())
}

/// Refuses a module that shares a virtual address with `others`, or that a heartbeat would not hold beside them.
///
/// # Errors
/// A sentence for the administrator.
pub fn admit(config: &ModuleConfig, others: &[Other]) -> Result<(), String> {
    for other in others {
        let shared = config
            .vip
            .iter()
            .flat_map(|v| v.addrs())
            .find(|addr| other.vips.contains(addr));
        if let Some(addr) = shared {
            let name = &other.name;
            return Err(format!(
                "{addr} belongs to module {name} already; each module needs its own virtual address"
            ));
        }
    }
    if others.len() >= MAX_MODULES {
        return Err(format!(
            "this node has {MAX_MODULES} modules already, which is the limit"
        ));
    }
    let all = groups(config) + others.iter().map(|o| o.groups).sum::<usize>();
    if all > 2 * MAX_GROUPS {
        let most = 2 * MAX_GROUPS;
        return Err(format!(
            "the modules of this node would have {all} groups together, at most {most} are possible"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn config(vip: &str, groups: usize) -> ModuleConfig {
        let rule = |i: usize| {
            format!(
                "<group name=\"g{i}\"><rule port=\"{}\" proto=\"tcp\" filter=\"on_addr\"/></group>",
                1000 + i
            )
        };
        let text = format!(
            "<safe><service mode=\"farm\"><farm><lan name=\"default\"/></farm><vip><interface_list><interface><virtual_interface \
             type=\"vmac_directed\"><virtual_addr addr=\"{vip}\" where=\"alias\"/></virtual_interface></interface></interface_list>\
             <loadbalancing_list>{}</loadbalancing_list></vip></service></safe>",
            (0..groups).map(rule).collect::<String>()
        );
        farm_core::config::module::parse("t.xml", &text, &BTreeMap::new(), None)
            .unwrap()
            .0
    }

    #[test]
    fn a_shared_address_and_too_many_groups_are_refused() {
        let other = |name: &str, vip: &str, groups| Other::new(name.parse().unwrap(), &config(vip, groups));
        let others = [other("web", "198.18.0.20", 32), other("mail", "198.18.0.21", 31)];
        assert_eq!(admit(&config("198.18.0.22", 1), &others), Ok(()));
        assert!(
            admit(&config("198.18.0.21", 1), &others)
                .unwrap_err()
                .contains("module mail")
        );
        assert!(
            admit(&config("198.18.0.22", 2), &others)
                .unwrap_err()
                .contains("65 groups")
        );
    }
}
