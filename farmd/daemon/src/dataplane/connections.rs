//! Which connections to the VIPs this host holds, as the kernel's own tables tell.
//!
//! Owns the two questions to the kernel: for sockets here, and for tracked connections that stand for the sockets of services in
//! other network namespaces (containers). It keeps no answer and decides nothing. [`super::lister::Lister`] asks at changes
//! of the plan and while buckets are guarded or held.

// Filled here, looked up by key elsewhere; never iterated.
#![allow(clippy::disallowed_types)]

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};

use farm_core::api::{ClientConnections, MAX_CLIENTS};
use farm_core::balance::flow::{FlowKey, TCP};
use farm_core::balance::hash;
use farm_core::balance::plan::{BucketState, Plan};
use farm_core::config::{Affinity, Protocol};
use farm_core::id::Bucket;
use farm_sys::conntrack::Conntrack;
use farm_sys::sock_diag::SockDiag;
use tracing::debug;

use crate::event::HeldGroup;

/// Most client addresses told apart when the connections of a group are counted; further ones count, but are not named.
const MAX_COUNTED_CLIENTS: usize = 4096;

/// One connection of this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    /// The end that the client speaks to.
    pub vip: SocketAddr,
    /// The client's end.
    pub client: SocketAddr,
}

/// The questions to the kernel, about the network namespace of the thread that opened them.
#[derive(Debug)]
pub struct Connections {
    sockets: SockDiag,
    /// `None` where it cannot be asked.
    conntrack: Option<Conntrack>,
}

impl Connections {
    /// Opens both channels. Without connection tracking only sockets count.
    ///
    /// # Errors
    /// What the kernel says if sockets cannot be asked for.
    pub fn open() -> io::Result<Self> {
        let sockets = SockDiag::open()?;
        let conntrack = match Conntrack::open() {
            Ok(conntrack) if conntrack.supported() => Some(conntrack),
            Ok(_) => {
                debug!("the kernel has no connection tracking: services in containers are not seen");
                None
            }
            Err(error) => {
                debug!(%error, "connection tracking cannot be asked: services in containers are not seen");
                None
            }
        };
        Ok(Self { sockets, conntrack })
    }

    /// As [`Self::open`], where a kernel that has connection tracking must be asked for that too.
    ///
    /// # Errors
    /// What the kernel says if either cannot be asked for.
    pub fn open_whole() -> io::Result<Self> {
        Ok(Self {
            conntrack: Some(Conntrack::open()?).filter(Conntrack::supported),
            sockets: SockDiag::open()?,
        })
    }

    /// As [`Self::has`], with sockets that are bound to one of these interfaces.
    ///
    /// # Errors
    /// If a table cannot be asked.
    pub fn has_on(&mut self, connection: Connection, interfaces: &[u32]) -> io::Result<bool> {
        let Connection { vip, client } = connection;
        for interface in interfaces {
            if self.sockets.has_tcp_on(vip, client, *interface)? {
                return Ok(true);
            }
        }
        self.has(connection)
    }

    /// The connections to `vips` at this moment.
    ///
    /// # Errors
    /// If either table cannot be listed whole: taking what is missing for ended would let others reset it.
    pub fn list(&mut self, vips: &[IpAddr]) -> io::Result<Vec<Connection>> {
        if vips.is_empty() {
            return Ok(Vec::new());
        }
        let sockets = self.sockets.tcp_sockets(vips)?;
        let flows = self
            .conntrack
            .as_mut()
            .map_or(Ok(Vec::new()), |conntrack| conntrack.tcp_flows(vips))?;
        let sockets = sockets.into_iter().map(|socket| Connection {
            vip: socket.local,
            client: socket.remote,
        });
        let flows = flows.into_iter().map(|flow| Connection {
            vip: flow.vip,
            client: flow.client,
        });
        Ok(sockets.chain(flows).collect())
    }

    /// Whether connections may end in containers: connection tracking is in use here. If that cannot be told, they may.
    pub fn tracked(&mut self) -> bool {
        let tracks = |conntrack: &mut Conntrack| conntrack.tracks().unwrap_or(true);
        self.conntrack.as_mut().is_some_and(tracks)
    }

    /// Whether this host has this very connection. Costs some microseconds, however many there are.
    ///
    /// # Errors
    /// If a table cannot be asked.
    pub fn has(&mut self, connection: Connection) -> io::Result<bool> {
        let Connection { vip, client } = connection;
        if self.sockets.has_tcp(vip, client)? {
            return Ok(true);
        }
        self.conntrack
            .as_mut()
            .map_or(Ok(false), |conntrack| conntrack.has_tcp(vip, client))
    }
}

impl From<&FlowKey> for Connection {
    fn from(flow: &FlowKey) -> Self {
        Self {
            vip: (flow.vip, flow.vip_port).into(),
            client: (flow.client, flow.client_port).into(),
        }
    }
}

/// Adds to `listed` those of `half_open` that are not in it, each once.
pub fn with_half_open(mut listed: Vec<Connection>, half_open: impl Iterator<Item = Connection>) -> Vec<Connection> {
    let mut half_open = half_open.peekable();
    if half_open.peek().is_some() {
        let mut known: HashSet<Connection> = listed.iter().copied().collect();
        listed.extend(half_open.filter(|connection| known.insert(*connection)));
    }
    listed
}

/// Group (index in the plan), bucket and flow of a connection of this host, if a rule covers it.
pub fn place(plan: &Plan, connection: Connection) -> Option<(usize, Bucket, FlowKey)> {
    let Connection { vip: local, client } = connection;
    let vip = plan.vip(local.ip())?;
    let rule = vip.rule(Protocol::Tcp, local.port())?;
    let bucket = match rule.affinity {
        Affinity::ClientIp => hash::bucket_of_addr(plan.seed, client.ip()),
        Affinity::ClientPort => hash::bucket_of_port(plan.seed, client.ip(), client.port()),
        Affinity::ClientNet => hash::bucket_of_net(plan.seed, client.ip()),
        // Not allowed for TCP.
        Affinity::IpId => return None,
    };
    // A connection of this host to its own VIP never came over the wire.
    if plan.vip(client.ip()).is_some() {
        return None;
    }
    let flow = FlowKey {
        protocol: TCP,
        vip: vip.addr,
        vip_port: local.port(),
        client: client.ip(),
        client_port: client.port(),
    };
    Some((rule.group, bucket, flow))
}

/// Hands the connections of guarded and closed buckets to `found`, and says what lies in closed ones.
pub fn sort_out(
    plan: &Plan,
    connections: impl IntoIterator<Item = Connection>,
    mut found: impl FnMut(FlowKey),
) -> Vec<HeldGroup> {
    let mut held = vec![BTreeSet::new(); plan.groups.len()];
    let mut count = vec![0; plan.groups.len()];
    let mut clients = vec![BTreeMap::new(); plan.groups.len()];
    for connection in connections {
        let Some((group, bucket, flow)) = place(plan, connection) else {
            continue;
        };
        match plan.groups[group].states[bucket.index()] {
            BucketState::Own => {}
            BucketState::Guarded => {
                found(flow);
            }
            BucketState::Draining | BucketState::Foreign => {
                found(flow);
                held[group].insert(bucket.index() as u16);
                count[group] += 1;
                if clients[group].len() < MAX_COUNTED_CLIENTS || clients[group].contains_key(&flow.client) {
                    *clients[group].entry(flow.client).or_insert(0) += 1;
                }
            }
        }
    }
    let groups = held.into_iter().zip(count).zip(clients);
    let group = |((buckets, connections), clients): ((BTreeSet<u16>, u32), BTreeMap<IpAddr, u32>)| HeldGroup {
        buckets: buckets.into_iter().collect(),
        connections,
        clients: most(clients),
    };
    groups.map(group).collect()
}

/// The clients with the most connections, in that order.
fn most(clients: BTreeMap<IpAddr, u32>) -> Vec<ClientConnections> {
    let clients = clients.into_iter();
    let mut most: Vec<ClientConnections> = clients
        .map(|(addr, connections)| ClientConnections { addr, connections })
        .collect();
    most.sort_by_key(|client| std::cmp::Reverse(client.connections));
    most.truncate(MAX_CLIENTS);
    most
}

#[cfg(test)]
mod tests {
    use farm_core::balance::hash::Seed;
    use farm_core::balance::plan::{GroupPlan, RulePlan, VipPlan};
    use farm_core::config::{L2Mode, PlaneChoice, XdpChoice};
    use farm_core::id::{MacAddr, NodeId};

    use super::*;

    const VIP: &str = "198.18.0.99:80";
    const CLIENT: &str = "198.18.0.2:40000";

    fn plan(affinity: Affinity) -> Plan {
        let rule = |port, group| RulePlan {
            protocol: Protocol::Tcp,
            first_port: port,
            last_port: port,
            affinity,
            group,
        };
        Plan {
            version: 1,
            this: NodeId::new(1).unwrap(),
            seed: Seed::default(),
            vips: vec![VipPlan {
                addr: VIP.parse::<SocketAddr>().unwrap().ip(),
                interface: 1,
                own_mac: MacAddr([2, 0, 0, 0, 0, 1]),
                mode: L2Mode::Directed,
                entry_group: 0,
                rules: [rule(443, 0), rule(80, 1)].into(),
                peers: BTreeMap::new(),
                choice: PlaneChoice::Auto,
                xdp: XdpChoice::Auto,
                arp_reroute: None,
            }],
            groups: ["web/secure", "web/plain"]
                .map(|name| GroupPlan::closed(name.into()))
                .into(),
            gone: BTreeMap::new(),
        }
    }

    fn connection(vip: &str, client: &str) -> Connection {
        Connection {
            vip: vip.parse().unwrap(),
            client: client.parse().unwrap(),
        }
    }

    #[test]
    fn a_handshake_that_the_kernel_does_not_list_counts_once() {
        let connection = |port: u16| Connection {
            vip: VIP.parse().unwrap(),
            client: SocketAddr::new("198.18.0.2".parse().unwrap(), port),
        };
        let listed = vec![connection(1), connection(2)];
        let half_open = [2, 3, 3].map(connection).into_iter();
        let all = with_half_open(listed, half_open);
        assert_eq!(all, [1, 2, 3].map(connection));
    }

    #[test]
    fn a_connection_is_placed_by_its_rule_and_its_client() {
        let plan_by_address = plan(Affinity::ClientIp);
        let (group, bucket, flow) = place(&plan_by_address, connection(VIP, CLIENT)).unwrap();
        let client: SocketAddr = CLIENT.parse().unwrap();
        assert_eq!((group, flow.vip_port), (1, 80));
        assert_eq!((flow.client, flow.client_port), (client.ip(), client.port()));
        assert_eq!(bucket, hash::bucket_of_addr(plan_by_address.seed, client.ip()));
        let plan_by_port = plan(Affinity::ClientPort);
        let (_, bucket, _) = place(&plan_by_port, connection(VIP, CLIENT)).unwrap();
        assert_eq!(
            bucket,
            hash::bucket_of_port(plan_by_port.seed, client.ip(), client.port())
        );
    }

    #[test]
    fn what_no_rule_covers_or_never_came_over_the_wire_has_no_place() {
        let plan = plan(Affinity::ClientIp);
        for (vip, client) in [
            ("198.18.0.99:8080", CLIENT),
            ("198.18.0.98:80", CLIENT),
            (VIP, "198.18.0.99:40000"),
        ] {
            assert_eq!(place(&plan, connection(vip, client)), None, "{client} to {vip}");
        }
    }

    #[test]
    fn what_is_held_is_counted_with_the_clients_that_have_most() {
        let mut plan = plan(Affinity::ClientPort);
        let client = |i: u8, port: u16| connection(VIP, &format!("198.18.1.{i}:{port}"));
        // Client i has i connections; one more is in a bucket that this host owns.
        let mut connections: Vec<Connection> = (1..=12)
            .flat_map(|i| (0..i).map(move |p| (i, 2000 + u16::from(p))))
            .map(|(i, port)| client(i, port))
            .collect();
        let own = client(99, 3000);
        let (_, bucket, own_flow) = place(&plan, own).unwrap();
        let taken: Vec<Bucket> = connections.iter().filter_map(|c| Some(place(&plan, *c)?.1)).collect();
        assert!(!taken.contains(&bucket), "the addresses of this test are chosen so");
        plan.groups[1].states[bucket.index()] = BucketState::Own;
        connections.push(own);
        let mut flows = HashSet::new();
        let held = sort_out(&plan, connections, |flow| {
            flows.insert(flow);
        });
        assert_eq!(held[0], HeldGroup::default());
        assert_eq!(
            (held[1].connections, flows.len(), flows.contains(&own_flow)),
            (78, 78, false)
        );
        let most: Vec<(String, u32)> = held[1]
            .clients
            .iter()
            .map(|c| (c.addr.to_string(), c.connections))
            .collect();
        let expected: Vec<(String, u32)> = (5..=12).rev().map(|i| (format!("198.18.1.{i}"), i)).collect();
        assert_eq!(most, expected);
        assert!(held[1].buckets.is_sorted() && !held[1].buckets.contains(&(bucket.index() as u16)));
    }
}
