//! `GET /v1/map`: whose each bucket of each group is.

use std::fmt;

use farm_core::api::NodeModuleStatus;
use farm_core::api::map::{GroupMap, MapAbsent, MapNode, Maps, held_by, here, ranges};
use farm_core::id::{BUCKETS, ModuleName, NodeId};

use super::{ModuleSight, Sight};

/// Which maps are asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MapFilter {
    /// Only those of this module.
    pub module: Option<ModuleName>,
    /// Only those of groups with this name.
    pub group: Option<String>,
}

/// Nothing fits the filter.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum MapError {
    /// No module that is configured here has that name.
    NoModule(ModuleName),
    /// None of the modules asked for has such a group.
    NoGroup {
        /// The name.
        group: String,
        /// Those there are, as `MODULE/GROUP`.
        groups: Vec<String>,
    },
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoModule(module) => write!(f, "`{module}` is not configured on this node"),
            Self::NoGroup { group, groups } => {
                write!(f, "there is no group `{group}`; there are: {}", groups.join(", "))
            }
        }
    }
}

impl std::error::Error for MapError {}

/// The answer.
///
/// # Errors
/// If nothing fits the filter.
pub fn answer(sight: &Sight, filter: &MapFilter) -> Result<Maps, MapError> {
    let wanted = |module: &&ModuleSight| filter.module.as_ref().is_none_or(|name| *name == module.name);
    let modules: Vec<&ModuleSight> = sight.modules.iter().filter(wanted).collect();
    if let (Some(module), true) = (&filter.module, modules.is_empty()) {
        return Err(MapError::NoModule(module.clone()));
    }
    let named = |name: &str| filter.group.as_ref().is_none_or(|group| group == name);
    let groups = || modules.iter().flat_map(|m| m.group_names().map(|name| (*m, name)));
    if let Some(group) = &filter.group
        && !groups().any(|(_, name)| named(name))
    {
        return Err(MapError::NoGroup {
            group: group.clone(),
            groups: groups()
                .map(|(module, name)| format!("{}/{name}", module.name))
                .collect(),
        });
    }
    let mut maps = Maps {
        node: sight.name(sight.this),
        groups: Vec::new(),
        absent: Vec::new(),
    };
    for module in modules {
        let planned = sight
            .groups
            .iter()
            .enumerate()
            .filter(|(_, (name, _))| *name == module.name);
        let planned: Vec<(usize, usize)> = planned.map(|(position, (_, index))| (position, *index)).collect();
        if planned.is_empty() {
            maps.absent.push(absent(sight, module));
        }
        let wanted = planned
            .into_iter()
            .filter(|(_, index)| module.group_name(*index).is_some_and(named));
        maps.groups
            .extend(wanted.map(|(position, index)| group_map(sight, module, position, index)));
    }
    Ok(maps)
}

fn absent(sight: &Sight, module: &ModuleSight) -> MapAbsent {
    let name = &module.name;
    let why = if module.config.vip.is_none() {
        "it has no virtual IP, and so no buckets".to_owned()
    } else {
        let state = module.on(sight.this).map_or_else(String::new, state_text);
        let elsewhere = module.ask_elsewhere(&format!("map {name}"));
        format!(
            "{state} on {}, which follows no map of it; {elsewhere}",
            sight.name(sight.this)
        )
    };
    MapAbsent {
        module: name.to_string(),
        why,
    }
}

fn group_map(sight: &Sight, module: &ModuleSight, position: usize, index: usize) -> GroupMap {
    let plan = &sight.plan.groups[position];
    let counts = plan.owners.counts();
    let group = module.groups.get(index);
    let here = here(plan);
    let nodes = (0..sight.nodes.len()).filter_map(NodeId::new).map(|node| MapNode {
        node: sight.name(node),
        buckets: counts.get(&node).copied().unwrap_or(0),
        weight: group.and_then(|g| g.weights.get(&node)).map(|(weight, _)| *weight),
        state: module.on(node).map_or_else(String::new, state_text),
        holds: match node == sight.this {
            true => here.draining,
            false => held_by(plan, node),
        },
    });
    GroupMap {
        module: module.name.to_string(),
        group: module.group_name(index).unwrap_or("?").to_owned(),
        map: group.map_or(0, |g| g.map),
        of: BUCKETS as u32,
        nodes: nodes.collect(),
        nobody: BUCKETS as u32 - counts.values().sum::<u32>(),
        here,
        ranges: ranges(plan, |node| sight.name(node)),
    }
}

/// `UP Ready`, with the reason behind it if there is one; or why no state is known.
fn state_text(node: &NodeModuleStatus) -> String {
    match (node.state, node.quality, node.why.as_str()) {
        (Some(state), Some(quality), "") => format!("{state} {quality}"),
        (Some(state), Some(quality), why) => format!("{state} {quality} ({why})"),
        (_, _, why) => why.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use farm_core::api::why::BucketWord;

    use super::*;
    use crate::look::test_sight::{CLIENT_PORTS, sight};

    #[test]
    fn a_map_has_every_bucket_once_and_every_node() {
        let sight = sight(true);
        let maps = answer(&sight, &MapFilter::default()).unwrap();
        assert_eq!((maps.node.as_str(), maps.groups.len(), maps.absent.len()), ("s1", 3, 0));
        let ports = maps.groups.iter().find(|g| g.group == CLIENT_PORTS).unwrap();
        let covered: u32 = ports.ranges.iter().map(|r| u32::from(r.last - r.first) + 1).sum();
        assert_eq!((covered, ports.nobody), (4096, 0));
        let owned: Vec<u32> = ports.nodes.iter().map(|n| n.buckets).collect();
        assert_eq!(owned, [2048, 2048, 0]);
        let mut mine = ports
            .ranges
            .iter()
            .filter(|r| r.owner.as_deref() == Some("s1"))
            .peekable();
        assert!(mine.peek().is_some() && mine.all(|r| r.state == BucketWord::Own));
        assert_eq!(ports.nodes[0].weight, Some(1));
        assert_eq!(
            (ports.nodes[2].weight, ports.nodes[2].state.as_str()),
            (None, "not heard")
        );
    }

    #[test]
    fn a_filter_that_nothing_fits_is_told_with_what_there_is() {
        let sight = sight(true);
        let ask = |module: Option<&str>, group: Option<&str>| {
            let filter = MapFilter {
                module: module.map(|m| m.parse().unwrap()),
                group: group.map(str::to_owned),
            };
            answer(&sight, &filter)
                .map(|maps| maps.groups.len())
                .map_err(|e| e.to_string())
        };
        assert_eq!(ask(Some("web"), Some(CLIENT_PORTS)), Ok(1));
        assert_eq!(
            ask(Some("shop"), None),
            Err("`shop` is not configured on this node".to_owned())
        );
        assert!(ask(None, Some("x")).unwrap_err().contains("web/ports"));
    }

    #[test]
    fn a_module_that_does_not_run_here_has_no_map_but_a_reason() {
        let maps = answer(&sight(false), &MapFilter::default()).unwrap();
        assert!(maps.groups.is_empty());
        let why = &maps.absent[0].why;
        assert!(
            why.contains("STOP NotReady") && why.contains("farm -H s2 map web"),
            "{why}"
        );
    }
}
