//! The sockets that heartbeats travel on: per lan one for this node's address and, where there is one, one for the broadcast address, over IPv6 for the
//! address of all nodes of the link (RFC 4291, section 2.7.1).
//!
//! A node that could not be reached for a while is also sought by broadcast: the kernel asks for its Ethernet address once a second only
//! (`retrans_time_ms`, arp(7)), and until then two nodes that cannot hear each other may both serve.
//!
//! Owns the sockets and which of them a datagram leaves by; it neither reads a datagram nor decides when one is sent. The owner loop
//! polls [`HeartbeatIo::fds`], takes what came in and hands over what the core wants sent.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use farm_core::config::{Cast, ClusterConfig, Lan};
use farm_core::farm::Transmit;
use farm_core::id::{NodeId, NodeSet};

/// With `cast="auto"` a lan of more nodes is spoken to by broadcast. What fewer of them send costs less than the attention of every host of the subnet.
const MOST_BY_UNICAST: usize = 16;

/// With `cast="auto"` a node of which no broadcast came in for so many pulses is sent to by itself too: what does not pass one way, on a lan of
/// several subnets or through a switch that drops broadcasts, mostly does not pass the other way.
const BROADCAST_PULSES: u32 = 3;

/// And so is one to or from which heartbeats have gone missing, for so many pulses: broadcasts may pass one way only.
const NUDGED_PULSES: u32 = 20;

/// How often it is looked whether an IPv6 lan is on another interface than before.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Sockets and addresses of one lan.
#[derive(Debug)]
struct LanIo {
    /// Position in `cluster.xml`.
    lan: usize,
    own: IpAddr,
    peers: Vec<(NodeId, IpAddr)>,
    /// All of them.
    everybody: NodeSet,
    /// For datagrams to this node, and for all that it sends.
    socket: UdpSocket,
    cast: Cast,
    /// Where broadcasts come in, and the address they go to.
    broadcast: Option<(UdpSocket, SocketAddr)>,
    /// What goes to everybody goes by broadcast.
    by_broadcast: bool,
    /// When a broadcast of each peer came in last, and for how long that counts.
    broadcasts: BTreeMap<IpAddr, Instant>,
    memory: Duration,
    /// Until when each peer is sent to by itself.
    nudged: BTreeMap<IpAddr, Instant>,
    nudge_memory: Duration,
    /// When the socket for broadcasts may be opened anew.
    reopen_at: Instant,
}

/// What became of one [`Transmit`].
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Sent {
    /// Datagrams handed to the kernel.
    pub datagrams: u64,
    /// Datagrams it did not take.
    pub failed: u64,
}

/// See the module doc.
#[derive(Debug)]
pub struct HeartbeatIo {
    lans: Vec<LanIo>,
    port: u16,
}

/// Why a lan's sockets could not be opened.
#[derive(Debug)]
pub struct OpenError {
    /// Name of the lan.
    pub lan: String,
    /// The address that was to be used.
    pub addr: SocketAddr,
    /// What the system says.
    pub error: io::Error,
}

/// The addresses of `node` that are not among `here`, those of this host, each with its lan's name. They can be bound where the kernel
/// allows it (`ip_nonlocal_bind`), and no heartbeat leaves from them.
pub fn foreign<'a>(
    cluster: &'a ClusterConfig,
    node: NodeId,
    here: &'a [IpAddr],
) -> impl Iterator<Item = (&'a str, IpAddr)> {
    let of = move |lan: &'a Lan| {
        lan.nodes
            .iter()
            .find(|(n, _)| *n == node)
            .map(|(_, addr)| (lan.name.as_str(), *addr))
    };
    cluster
        .lans
        .iter()
        .filter_map(of)
        .filter(|(_, addr)| !here.contains(addr))
}

impl HeartbeatIo {
    /// Opens the sockets of all lans that `this` node is on.
    ///
    /// # Errors
    /// The first address that cannot be used. A lan with `cast="broadcast"` needs its address on an interface with a broadcast address.
    pub fn open(cluster: &ClusterConfig, this: NodeId) -> Result<Self, OpenError> {
        let mut lans = Vec::new();
        for (index, lan) in cluster.lans.iter().enumerate() {
            let Some((_, own)) = lan.nodes.iter().find(|(node, _)| *node == this) else {
                continue;
            };
            let local = SocketAddr::new(*own, cluster.port);
            let failed = |addr: SocketAddr| {
                move |error: io::Error| OpenError {
                    lan: lan.name.clone(),
                    addr,
                    error,
                }
            };
            let socket = farm_sys::udp::bind(local).map_err(failed(local))?;
            let broadcast = match lan.cast {
                Cast::Broadcast => Some(open_broadcast(*own, cluster.port, &socket).map_err(failed(local))?),
                Cast::Auto | Cast::Unicast => open_broadcast(*own, cluster.port, &socket)
                    .inspect_err(|error| tracing::debug!(%error, lan = lan.name, "nobody is sought by broadcast here"))
                    .ok(),
            };
            let peers: Vec<(NodeId, IpAddr)> = lan.nodes.iter().filter(|(node, _)| *node != this).copied().collect();
            let by_broadcast = match lan.cast {
                Cast::Auto => broadcast.is_some() && lan.nodes.len() > MOST_BY_UNICAST,
                Cast::Unicast => false,
                Cast::Broadcast => true,
            };
            if by_broadcast {
                tracing::info!(lan = lan.name, nodes = lan.nodes.len(), "heartbeats go by broadcast");
            }
            lans.push(LanIo {
                lan: index,
                own: *own,
                everybody: peers.iter().map(|(node, _)| *node).collect(),
                peers,
                socket,
                cast: lan.cast,
                broadcast,
                by_broadcast,
                broadcasts: BTreeMap::new(),
                memory: cluster.heartbeat_interval * BROADCAST_PULSES,
                nudged: BTreeMap::new(),
                nudge_memory: cluster.heartbeat_interval * NUDGED_PULSES,
                reopen_at: Instant::now(),
            });
        }
        Ok(Self {
            lans,
            port: cluster.port,
        })
    }

    /// What becomes readable when a datagram has come in.
    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let sockets = self.lans.iter().flat_map(LanIo::sockets);
        sockets.map(|socket| socket.as_fd())
    }

    /// Throws away all that has come in.
    pub fn discard(&self) {
        let mut void = [0; 1];
        for socket in self.lans.iter().flat_map(LanIo::sockets) {
            while socket.recv_from(&mut void).is_ok() {}
        }
    }

    /// Calls `take(lan, from, datagram)` for what has come in, up to `budget` datagrams of each socket.
    ///
    /// `from` is the address of a node on that lan; what others send is counted in the answer. A datagram longer than `buffer` is cut.
    pub fn receive(&mut self, buffer: &mut [u8], budget: usize, mut take: impl FnMut(usize, SocketAddr, &[u8])) -> u64 {
        let mut strangers = 0;
        for lan in &mut self.lans {
            let mut spoke = Vec::new();
            for (i, socket) in lan.sockets().enumerate() {
                for _ in 0..budget {
                    match socket.recv_from(buffer) {
                        // One's own broadcast comes back.
                        Ok((_, from)) if i > 0 && from.ip() == lan.own => {}
                        Ok((length, from)) if from.ip() == lan.own || lan.has(from.ip()) => {
                            if i > 0 && lan.by_broadcast {
                                spoke.push(from.ip());
                            }
                            take(lan.lan, from, &buffer[..length]);
                        }
                        Ok(_) => strangers += 1,
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        // An ICMP error about an earlier datagram: that peer's daemon is not running.
                        Err(error) => tracing::debug!(%error, "receiving heartbeats"),
                    }
                }
            }
            if !spoke.is_empty() {
                let now = Instant::now();
                lan.broadcasts.extend(spoke.into_iter().map(|peer| (peer, now)));
            }
        }
        strangers
    }

    /// Sends a heartbeat: by one broadcast if it is for everybody and the lan is spoken to so, and to each node that this does not reach. One that seeks
    /// nodes goes by broadcast alone; it is left out where there is no broadcast address, and where every heartbeat is broadcast anyway.
    pub fn send(&mut self, transmit: &Transmit) -> Sent {
        let mut sent = Sent::default();
        let port = self.port;
        let Some(lan) = self.lans.iter_mut().find(|lan| lan.lan == transmit.lan) else {
            return sent;
        };
        let now = Instant::now();
        lan.look_after_interface(port, now);
        let lan = if transmit.nudge && lan.by_broadcast {
            lan.note_nudged(transmit.to, now)
        } else {
            &*lan
        };
        let mut send = |to: SocketAddr| match lan.socket.send_to(&transmit.payload, to) {
            Ok(_) => {
                sent.datagrams += 1;
                true
            }
            Err(error) => {
                sent.failed += 1;
                tracing::debug!(%error, %to, "sending a heartbeat");
                false
            }
        };
        let broadcast = lan.broadcast.as_ref().map(|(_, to)| *to);
        if transmit.broadcast {
            if let Some(to) = broadcast.filter(|_| !lan.by_broadcast) {
                send(to);
            }
            return sent;
        }
        let to_all = lan.by_broadcast && !transmit.nudge && transmit.to == lan.everybody;
        let at_once = broadcast.filter(|_| to_all).is_some_and(&mut send);
        for (_, addr) in lan.peers.iter().filter(|(node, _)| transmit.to.contains(*node)) {
            if !(at_once && lan.reaches_by_broadcast(*addr, now)) {
                send(SocketAddr::new(*addr, port));
            }
        }
        sent
    }
}

impl LanIo {
    fn sockets(&self) -> impl Iterator<Item = &UdpSocket> {
        std::iter::once(&self.socket).chain(self.broadcast.as_ref().map(|(socket, _)| socket))
    }

    /// The address of all nodes of an IPv6 link is one of an interface, and its socket goes with it: one that was made anew needs another.
    fn look_after_interface(&mut self, port: u16, now: Instant) {
        let Some((_, SocketAddr::V6(to))) = &self.broadcast else {
            return;
        };
        if now < self.reopen_at {
            return;
        }
        self.reopen_at = now + LOOK_INTERVAL;
        match broadcast_address(self.own, port) {
            Ok(SocketAddr::V6(found)) if found != *to => match open_broadcast(self.own, port, &self.socket) {
                Ok(broadcast) => {
                    tracing::info!(own = %self.own, interface = found.scope_id(), "the interface of the lan is another one; it is listened to there");
                    self.broadcast = Some(broadcast);
                }
                Err(error) => tracing::debug!(%error, own = %self.own, "listening on the new interface"),
            },
            _ => {}
        }
    }

    fn has(&self, addr: IpAddr) -> bool {
        self.peers.iter().any(|(_, peer)| *peer == addr)
    }

    /// Heartbeats to or from `nodes` have gone missing.
    fn note_nudged(&mut self, nodes: NodeSet, now: Instant) -> &Self {
        let until = now + self.nudge_memory;
        let nudged = self.peers.iter().filter(|(node, _)| nodes.contains(*node));
        self.nudged.extend(nudged.map(|(_, addr)| (*addr, until)));
        self
    }

    /// True if a broadcast needs no datagram to `peer` beside it.
    fn reaches_by_broadcast(&self, peer: IpAddr, now: Instant) -> bool {
        let lately = |at: &Instant| now.saturating_duration_since(*at) < self.memory;
        let nudged = self.nudged.get(&peer).is_some_and(|until| now < *until);
        self.cast == Cast::Broadcast || (!nudged && self.broadcasts.get(&peer).is_some_and(lately))
    }
}

/// Lets `socket` send broadcasts, and opens the one on which those of others come in.
fn open_broadcast(own: IpAddr, port: u16, socket: &UdpSocket) -> io::Result<(UdpSocket, SocketAddr)> {
    let to = broadcast_address(own, port)?;
    if to.is_ipv4() {
        socket.set_broadcast(true)?;
    }
    Ok((farm_sys::udp::bind(to)?, to))
}

/// Every host listens there, without having joined, so that no switch can have missed it.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Where a datagram goes that is for all hosts of the subnet in which this host has `own`, over IPv6 for all on that link.
fn broadcast_address(own: IpAddr, port: u16) -> io::Result<SocketAddr> {
    let interfaces = farm_sys::interface::interfaces();
    let found = interfaces.iter().find_map(|interface| {
        let (_, prefix) = interface.addrs.iter().find(|(addr, _)| *addr == own)?;
        Some((interface.index, *prefix))
    });
    match (own, found) {
        (IpAddr::V4(own), Some((_, prefix @ 0..=30))) => Ok((subnet_broadcast(own, prefix), port).into()),
        // One by itself is no subnet, and mostly on the loopback interface.
        (IpAddr::V6(_), Some((index, 0..=126))) => Ok(SocketAddrV6::new(ALL_NODES, port, 0, index).into()),
        (_, Some((_, prefix))) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{own}/{prefix} has no broadcast address; cast=\"auto\" is expected on this lan"),
        )),
        (_, None) => Err(io::ErrorKind::AddrNotAvailable.into()),
    }
}

/// All host bits set (RFC 919).
fn subnet_broadcast(own: Ipv4Addr, prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(own) | u32::MAX.checked_shr(prefix.into()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_broadcast_address_has_all_host_bits_set() {
        let own = Ipv4Addr::new(198, 18, 5, 77);
        assert_eq!(subnet_broadcast(own, 24), Ipv4Addr::new(198, 18, 5, 255));
        assert_eq!(subnet_broadcast(own, 15), Ipv4Addr::new(198, 19, 255, 255));
        assert_eq!(subnet_broadcast(own, 30), Ipv4Addr::new(198, 18, 5, 79));
        assert_eq!(subnet_broadcast(own, 32), own);
    }

    #[test]
    fn addresses_of_a_node_that_this_host_does_not_have_are_named_with_their_lan() {
        let text = "<cluster><lans><lan name=\"default\"><node name=\"s1\" addr=\"198.18.0.11\"/>\
                    <node name=\"s2\" addr=\"198.18.0.12\"/></lan></lans></cluster>";
        let (cluster, _) = farm_core::config::cluster::parse("cluster.xml", text).unwrap();
        let addr = |text: &str| text.parse::<IpAddr>().unwrap();
        let (first, own) = (cluster.node_by_name("s1").unwrap(), [addr("198.18.0.12")]);
        let missing: Vec<_> = foreign(&cluster, first, &own).collect();
        assert_eq!(missing, [("default", addr("198.18.0.11"))]);
        let second = cluster.node_by_name("s2").unwrap();
        assert_eq!(foreign(&cluster, second, &own).count(), 0);
    }

    #[test]
    fn an_address_of_another_host_has_none() {
        let error = broadcast_address("198.18.255.254".parse().unwrap(), 4800).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    }
}
