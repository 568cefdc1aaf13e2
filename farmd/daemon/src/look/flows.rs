//! `GET /v1/flows`: which connections this host has, and whose buckets they lie in. `GET /v1/has`: which of some single connections it has, for another node that does
//! not know them.
//!
//! For the first it reads the kernel's tables once per question; the numbers are exact, the names bounded; one such look-up runs at a time. For the second it asks the
//! kernel for each connection.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;

use farm_core::api::flows::{DEFAULT_FLOWS, Flow, FlowClient, FlowGroup, FlowOwner, Flows, SomeFlows};
use farm_core::api::why::BucketWord;
use farm_core::id::{Bucket, ModuleName, NodeId};

use super::Sight;
use crate::dataplane::connections::{Connection, Connections, place};

/// Which connections are asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FlowFilter {
    /// Only those of this client.
    pub client: Option<IpAddr>,
    /// Only those in buckets that this node owns.
    pub owner: Option<String>,
    /// Only those of this module.
    pub module: Option<ModuleName>,
    /// At most so many clients and so many connections are named.
    pub most: usize,
}

impl Default for FlowFilter {
    fn default() -> Self {
        Self {
            client: None,
            owner: None,
            module: None,
            most: DEFAULT_FLOWS,
        }
    }
}

/// What the filter names is not there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FlowsError {
    /// No node has that name.
    NoNode {
        /// The name.
        node: String,
        /// Those there are.
        nodes: Vec<String>,
    },
    /// No module that is configured here has that name.
    NoModule(ModuleName),
}

impl fmt::Display for FlowsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoNode { node, nodes } => write!(f, "there is no node `{node}`; there are: {}", nodes.join(", ")),
            Self::NoModule(module) => write!(f, "`{module}` is not configured on this node"),
        }
    }
}

impl std::error::Error for FlowsError {}

/// The connections to `vips` that this host has. For a thread that may wait.
///
/// # Errors
/// If the kernel cannot be asked.
pub fn list(vips: &[IpAddr]) -> io::Result<Vec<Connection>> {
    Connections::open()?.list(vips)
}

/// Those of the connections `asked` for that this host has. For a thread that may wait.
///
/// # Errors
/// If the kernel cannot be asked, for sockets or for tracked connections: no answer is not the same as none.
pub fn has(asked: &SomeFlows) -> io::Result<SomeFlows> {
    let mut connections = Connections::open_whole()?;
    let interfaces: Vec<u32> = farm_sys::interface::interfaces().iter().map(|i| i.index).collect();
    let mut told = SomeFlows::default();
    for (client, vip) in &asked.flows {
        let (client, vip) = (*client, *vip);
        if connections.has_on(Connection { vip, client }, &interfaces)? {
            told.flows.push((client, vip));
        }
    }
    Ok(told)
}

/// A connection and where it lies.
struct Placed {
    connection: Connection,
    group: usize,
    bucket: Bucket,
    owner: Option<NodeId>,
    state: BucketWord,
}

/// The answer, made of `connections`.
///
/// # Errors
/// If the filter names a node or a module that is not there.
pub fn answer(sight: &Sight, filter: &FlowFilter, connections: Vec<Connection>) -> Result<Flows, FlowsError> {
    if let Some(module) = filter
        .module
        .as_ref()
        .filter(|name| sight.module(name.as_str()).is_none())
    {
        return Err(FlowsError::NoModule(module.clone()));
    }
    let owner = filter.owner.as_ref().map(|name| node_named(sight, name)).transpose()?;
    let mut unshared = 0;
    let mut placed: Vec<Placed> = Vec::new();
    for connection in connections {
        if filter.client.is_some_and(|client| client != connection.client.ip()) {
            continue;
        }
        let Some(found) = placed_by(sight, connection) else {
            unshared += 1;
            continue;
        };
        let of_module = |name: &ModuleName| sight.groups.get(found.group).is_some_and(|(module, _)| module == name);
        let wanted = owner.is_none_or(|node| found.owner == Some(node)) && filter.module.as_ref().is_none_or(of_module);
        if wanted {
            placed.push(found);
        }
    }
    let elsewhere = |p: &Placed| p.state.is_elsewhere();
    placed.sort_by_key(|p| (Reverse(elsewhere(p)), p.connection.client, p.connection.vip));
    let (clients_of, clients) = clients(&placed, filter.most);
    Ok(Flows {
        node: sight.name(sight.this),
        connections: placed.len() as u32,
        elsewhere: placed.iter().filter(|p| elsewhere(p)).count() as u32,
        unshared,
        groups: groups(sight, &placed),
        owners: owners(sight, &placed),
        clients,
        clients_of,
        flows: placed.iter().take(filter.most).map(|p| flow(sight, p)).collect(),
    })
}

fn node_named(sight: &Sight, name: &str) -> Result<NodeId, FlowsError> {
    let position = sight.nodes.iter().position(|node| node == name);
    position.and_then(NodeId::new).ok_or_else(|| FlowsError::NoNode {
        node: name.to_owned(),
        nodes: sight.nodes.clone(),
    })
}

fn placed_by(sight: &Sight, connection: Connection) -> Option<Placed> {
    let (group, bucket, _) = place(&sight.plan, connection)?;
    let plan = sight.plan.groups.get(group)?;
    Some(Placed {
        connection,
        group,
        bucket,
        owner: plan.owners.owner(bucket),
        state: plan.states[bucket.index()].into(),
    })
}

/// How many clients there are, and the `most` of them with the most connections.
fn clients(placed: &[Placed], most: usize) -> (u32, Vec<FlowClient>) {
    let mut by_client: BTreeMap<IpAddr, (u32, u32)> = BTreeMap::new();
    for p in placed {
        let (connections, elsewhere) = by_client.entry(p.connection.client.ip()).or_default();
        *connections += 1;
        *elsewhere += u32::from(p.state.is_elsewhere());
    }
    let mut clients: Vec<FlowClient> = by_client
        .into_iter()
        .map(|(addr, (connections, elsewhere))| FlowClient {
            addr,
            connections,
            elsewhere,
        })
        .collect();
    let all = clients.len() as u32;
    clients.sort_by_key(|client| Reverse(client.connections));
    clients.truncate(most);
    (all, clients)
}

/// Every group of which there is a connection.
fn groups(sight: &Sight, placed: &[Placed]) -> Vec<FlowGroup> {
    let group = |position: usize| {
        let of_group = || placed.iter().filter(move |p| p.group == position);
        let mut clients: Vec<IpAddr> = of_group().map(|p| p.connection.client.ip()).collect();
        clients.sort_unstable();
        clients.dedup();
        let (module, group) = sight.group_name(position);
        FlowGroup {
            module,
            group,
            connections: of_group().count() as u32,
            guarded: of_group().filter(|p| p.state == BucketWord::Guarded).count() as u32,
            elsewhere: of_group().filter(|p| p.state.is_elsewhere()).count() as u32,
            clients: clients.len() as u32,
        }
    };
    let groups = (0..sight.groups.len()).map(group);
    groups.filter(|group| group.connections > 0).collect()
}

fn owners(sight: &Sight, placed: &[Placed]) -> Vec<FlowOwner> {
    let mut owners: BTreeMap<Option<NodeId>, u32> = BTreeMap::new();
    for p in placed {
        *owners.entry(p.owner).or_default() += 1;
    }
    let owner = |(node, connections): (Option<NodeId>, u32)| FlowOwner {
        node: node.map(|node| sight.name(node)),
        connections,
    };
    owners.into_iter().map(owner).collect()
}

fn flow(sight: &Sight, placed: &Placed) -> Flow {
    let (module, group) = sight.group_name(placed.group);
    Flow {
        client: placed.connection.client,
        vip: placed.connection.vip,
        module,
        group,
        bucket: placed.bucket.index() as u16,
        owner: placed.owner.map(|node| sight.name(node)),
        state: placed.state,
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;
    use crate::look::test_sight::{VIP, client, sight};

    /// `count` connections of client `i` to `port`.
    fn connections(i: u8, port: u16, count: u16) -> impl Iterator<Item = Connection> {
        (0..count).map(move |n| Connection {
            vip: SocketAddr::new(VIP, port),
            client: SocketAddr::new(client(i), 2000 + n),
        })
    }

    fn some() -> Vec<Connection> {
        let rules = connections(1, 443, 30)
            .chain(connections(2, 443, 10))
            .chain(connections(3, 80, 5));
        let from_here = Connection {
            vip: SocketAddr::new(VIP, 80),
            client: SocketAddr::new(VIP, 999),
        };
        rules.chain(connections(4, 8080, 2)).chain([from_here]).collect()
    }

    fn ask(filter: &FlowFilter) -> Flows {
        answer(&sight(true), filter, some()).unwrap()
    }

    #[test]
    fn connections_are_counted_whole_and_named_up_to_a_number() {
        let all = ask(&FlowFilter {
            most: 7,
            ..FlowFilter::default()
        });
        assert_eq!(
            (all.connections, all.unshared, all.clients_of, all.flows.len()),
            (45, 3, 3, 7)
        );
        let groups: Vec<(&str, u32, u32)> = all
            .groups
            .iter()
            .map(|g| (g.group.as_str(), g.connections, g.clients))
            .collect();
        assert_eq!(groups, [("addrs", 5, 1), ("ports", 40, 2)]);
        let clients: Vec<u32> = all.clients.iter().map(|c| c.connections).collect();
        assert_eq!(clients, [30, 10, 5]);
        let by_owner: u32 = all.owners.iter().map(|o| o.connections).sum();
        let of_s2 = all.owners.iter().find(|o| o.node.as_deref() == Some("s2")).unwrap();
        assert_eq!((by_owner, of_s2.connections), (45, all.elsewhere));
        assert!(
            all.elsewhere > 7 && all.flows.iter().all(|f| f.state.is_elsewhere()),
            "those first"
        );
        let none = ask(&FlowFilter {
            most: 0,
            ..FlowFilter::default()
        });
        assert_eq!((none.connections, none.clients.len(), none.flows.len()), (45, 0, 0));
    }

    #[test]
    fn a_filter_narrows_the_numbers_too() {
        let all = ask(&FlowFilter::default());
        let of_s1 = ask(&FlowFilter {
            owner: Some("s1".to_owned()),
            ..FlowFilter::default()
        });
        assert_eq!((of_s1.connections, of_s1.elsewhere), (45 - all.elsewhere, 0));
        let of_client = ask(&FlowFilter {
            client: Some(client(2)),
            ..FlowFilter::default()
        });
        assert_eq!(
            (of_client.connections, of_client.clients_of, of_client.unshared),
            (10, 1, 0)
        );
        let wrong = FlowFilter {
            owner: Some("s9".to_owned()),
            ..FlowFilter::default()
        };
        let error = answer(&sight(true), &wrong, some()).unwrap_err().to_string();
        assert_eq!(error, "there is no node `s9`; there are: s1, s2, s3");
        let wrong = FlowFilter {
            module: Some("shop".parse().unwrap()),
            ..FlowFilter::default()
        };
        assert!(answer(&sight(true), &wrong, some()).is_err());
    }
}
