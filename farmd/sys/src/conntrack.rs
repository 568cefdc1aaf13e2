//! Lists TCP connections that the kernel hands on to somewhere else by address translation, through its connection tracking.
//!
//! Owns one netlink socket. A service in a container has its sockets in another network namespace, where [`crate::sock_diag`]
//! does not see them; then the host's conntrack entry stands for the socket. The raw data plane asks at a change of the map.
//! It keeps no copy of the table, and changes it only where it is told to forget a connection.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::netlink_message::{Batch, Channel, Dump, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, array, attribute};
use crate::sockopt;

/// `linux/netfilter/nfnetlink.h`
const SUBSYSTEM: u16 = 1;

// linux/netfilter/nfnetlink_conntrack.h
const GET: u16 = 1;
const DELETE: u16 = 2;
const GET_STATS: u16 = 5;
const GLOBAL_ENTRIES: u16 = 1;
const ORIGINAL: u16 = 1;
const REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL_STATE: u16 = 4;
const TUPLE_ADDRESSES: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const SOURCE_V4: u16 = 1;
const DESTINATION_V4: u16 = 2;
const SOURCE_V6: u16 = 3;
const DESTINATION_V6: u16 = 4;
const PROTOCOL_NUMBER: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const TCP: u16 = 1;
const TCP_STATE: u16 = 1;

/// Status bit of an entry whose destination is translated (`linux/netfilter/nf_conntrack_common.h`).
const TRANSLATED: u32 = 1 << 5;

/// SYN_RECV, ESTABLISHED, FIN_WAIT, CLOSE_WAIT and LAST_ACK (`linux/netfilter/nf_conntrack_tcp.h`): the server has answered, and
/// not all is said and acknowledged. Before is SYN_SENT, after it TIME_WAIT and CLOSE.
const LIVE: RangeInclusive<u8> = 2..=6;

/// `struct nfgenmsg`, which stands before the attributes of each entry.
const GENERIC_HEADER: usize = 4;

/// A dump that the kernel keeps interrupting is taken as it is after this many tries.
const TRIES: u32 = 5;

/// A live TCP connection whose packets the kernel sends on to another address or port than the client asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct CtFlow {
    /// The client's end.
    pub client: SocketAddr,
    /// The address and port that the client speaks to, before translation.
    pub vip: SocketAddr,
    /// The address and port that answer, after it.
    pub server: SocketAddr,
    /// Whom these take for the client: its own end, unless that is translated too.
    pub peer: SocketAddr,
}

/// A reusable question channel to the kernel's connection tracking.
///
/// It asks about the network namespace of the thread that opened it, whichever thread uses it.
#[derive(Debug)]
pub struct Conntrack {
    /// `None` on a kernel without connection tracking.
    channel: Option<Channel>,
}

impl Conntrack {
    /// Opens the channel and asks a first time, so that a kernel that has connection tracking as a module loads it now.
    ///
    /// A kernel without it is no error; [`supported`](Self::supported) tells.
    ///
    /// # Errors
    /// `PermissionDenied` without CAP_NET_ADMIN.
    pub fn open() -> io::Result<Self> {
        let first = Channel::open(NETLINK_NETFILTER).and_then(|mut channel| {
            tracks_nothing(&mut channel)?;
            Ok(channel)
        });
        match first {
            Ok(channel) => Ok(Self { channel: Some(channel) }),
            Err(error) if is_missing(&error) => Ok(Self { channel: None }),
            Err(error) => Err(sockopt::context(&error, "connection tracking")),
        }
    }

    /// Whether the kernel has connection tracking that can be asked; else every list is empty.
    ///
    /// True says nothing about rules: with none that need it, the kernel tracks nothing, and lists are empty too.
    pub fn supported(&self) -> bool {
        self.channel.is_some()
    }

    /// Whether anything is tracked here at this moment.
    ///
    /// # Errors
    /// What the kernel reports; a kernel without connection tracking tracks nothing.
    pub fn tracks(&mut self) -> io::Result<bool> {
        let Some(channel) = &mut self.channel else {
            return Ok(false);
        };
        let nothing = tracks_nothing(channel);
        nothing
            .map(|nothing| !nothing)
            .map_err(|error| sockopt::context(&error, "number of tracked connections"))
    }

    /// Live TCP connections to one of `vips` that are translated to another address or port: those that the server has
    /// answered and that are not yet closed on both sides.
    ///
    /// Ordered by client, then VIP. Connections to a socket on the VIP itself are not among them, tracked or not.
    ///
    /// # Errors
    /// What the kernel reports; a kernel without connection tracking is an empty list.
    pub fn tcp_flows(&mut self, vips: &[IpAddr]) -> io::Result<Vec<CtFlow>> {
        let Some(channel) = &mut self.channel else {
            return Ok(Vec::new());
        };
        if tracks_nothing(channel).map_err(|error| sockopt::context(&error, "number of tracked connections"))? {
            return Ok(Vec::new());
        }
        let mut found = Vec::new();
        let families = [
            (libc::AF_INET, vips.iter().any(IpAddr::is_ipv4)),
            (libc::AF_INET6, vips.iter().any(IpAddr::is_ipv6)),
        ];
        for (family, _) in families.into_iter().filter(|(_, wanted)| *wanted) {
            for _ in 0..TRIES {
                let end = dump(channel, SUBSYSTEM, family as u8, |entry| {
                    found.extend(CtFlow::parse(entry).filter(|flow| vips.contains(&flow.vip.ip())));
                })
                .map_err(|error| sockopt::context(&error, "list of tracked connections"))?;
                if end == Dump::Complete {
                    break;
                }
            }
        }
        // Entries of interrupted dumps are kept: twice listed is mended here, a closed one more does no harm.
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// Whether [`tcp_flows`](Self::tcp_flows) would list this very connection. Costs some microseconds, however many there are.
    ///
    /// # Errors
    /// What the kernel reports; that there is none is `false`.
    pub fn has_tcp(&mut self, vip: SocketAddr, client: SocketAddr) -> io::Result<bool> {
        let Some(channel) = &mut self.channel else {
            return Ok(false);
        };
        let sequence = channel.next_sequence();
        let mut batch = Batch::default();
        batch.message(SUBSYSTEM << 8 | GET, NLM_F_REQUEST | NLM_F_ACK, sequence, |body| {
            original_tuple(body, client, vip);
        });
        let mut found = false;
        let end = channel.dump(&batch, sequence, |entry| {
            found |= CtFlow::parse(entry).is_some_and(|flow| (flow.client, flow.vip) == (client, vip));
        });
        match end {
            Ok(_) => Ok(found),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(sockopt::context(
                &error,
                format_args!("tracked connection {client} to {vip}"),
            )),
        }
    }

    /// Has the kernel forget a connection: what comes of it from here on is that of no connection it knows. Success if it knows none.
    ///
    /// # Errors
    /// What the kernel reports; `PermissionDenied` without CAP_NET_ADMIN.
    pub fn forget(&mut self, flow: &CtFlow) -> io::Result<()> {
        let Some(channel) = &mut self.channel else {
            return Ok(());
        };
        let sequence = channel.next_sequence();
        let mut batch = Batch::default();
        batch.message(SUBSYSTEM << 8 | DELETE, NLM_F_REQUEST | NLM_F_ACK, sequence, |body| {
            original_tuple(body, flow.client, flow.vip);
        });
        match channel.dump(&batch, sequence, |_| {}) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(sockopt::context(
                &error,
                format_args!("tracked connection {} to {}", flow.client, flow.vip),
            )),
        }
    }
}

/// True if the kernel says that it tracks nothing here: a dump would walk the table of the whole host to find that out.
fn tracks_nothing(channel: &mut Channel) -> io::Result<bool> {
    let sequence = channel.next_sequence();
    let mut batch = Batch::default();
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    batch.message(SUBSYSTEM << 8 | GET_STATS, flags, sequence, |body| {
        body.put(&[0; GENERIC_HEADER]);
    });
    let mut entries = None;
    channel.dump(&batch, sequence, |answer| {
        let attributes = answer.get(GENERIC_HEADER..).unwrap_or_default();
        entries = attribute(attributes, GLOBAL_ENTRIES).and_then(|value| array(value, 0));
    })?;
    Ok(entries.map(u32::from_be_bytes) == Some(0))
}

/// Hands every entry of a family whose destination is translated to `f`.
///
/// The kernel (since 5.15; older ones ignore the wish) leaves out the rest by the status bit. Its filter by address would leave out
/// more, but compares IPv6 addresses the wrong way round in many releases. Measured with 20 000 entries of other traffic, in a debug
/// build: some 15 ms with the wish, 70 ms without.
fn dump(channel: &mut Channel, subsystem: u16, family: u8, f: impl FnMut(&[u8])) -> io::Result<Dump> {
    let sequence = channel.next_sequence();
    let mut batch = Batch::default();
    batch.message(subsystem << 8 | GET, NLM_F_REQUEST | NLM_F_DUMP, sequence, |body| {
        body.put(&[family, 0, 0, 0]).attribute_be32(STATUS, TRANSLATED);
    });
    channel.dump(&batch, sequence, f)
}

/// Whether the kernel means "there is no such thing here": no netfilter netlink, or no connection tracking behind it.
fn is_missing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EPROTONOSUPPORT | libc::EOPNOTSUPP | libc::EINVAL)
    )
}

impl CtFlow {
    /// The flow, if the entry is of a live TCP connection that is translated to another address or port.
    ///
    /// ```text
    /// entry:           nfgenmsg 4 | ORIGINAL { tuple } | REPLY { tuple } | PROTOCOL_STATE { TCP { TCP_STATE 1 } } | ...
    /// tuple:           TUPLE_ADDRESSES { source, destination } | TUPLE_PROTOCOL { number 1, source port 2, destination port 2 }
    /// ```
    fn parse(entry: &[u8]) -> Option<Self> {
        let entry = entry.get(GENERIC_HEADER..)?;
        let (client, vip) = tcp_tuple(attribute(entry, ORIGINAL)?)?;
        let (server, peer) = tcp_tuple(attribute(entry, REPLY)?)?;
        let state = attribute(attribute(attribute(entry, PROTOCOL_STATE)?, TCP)?, TCP_STATE)?;
        (server != vip && LIVE.contains(state.first()?)).then_some(Self {
            client,
            vip,
            server,
            peer,
        })
    }
}

/// The tuple of the original direction, as [`CtFlow::parse`] reads it.
fn original_tuple(body: &mut Batch, client: SocketAddr, vip: SocketAddr) {
    let family = if vip.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    body.put(&[family as u8, 0, 0, 0]).nested(ORIGINAL, |tuple| {
        tuple.nested(TUPLE_ADDRESSES, |addresses| {
            for (end, v4, v6) in [(client, SOURCE_V4, SOURCE_V6), (vip, DESTINATION_V4, DESTINATION_V6)] {
                match end.ip() {
                    IpAddr::V4(address) => addresses.attribute(v4, &address.octets()),
                    IpAddr::V6(address) => addresses.attribute(v6, &address.octets()),
                };
            }
        });
        tuple.nested(TUPLE_PROTOCOL, |protocol| {
            protocol
                .attribute(PROTOCOL_NUMBER, &[libc::IPPROTO_TCP as u8])
                .attribute(SOURCE_PORT, &client.port().to_be_bytes())
                .attribute(DESTINATION_PORT, &vip.port().to_be_bytes());
        });
    });
}

/// Source and destination of one direction, if it is TCP.
fn tcp_tuple(tuple: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let (addresses, protocol) = (attribute(tuple, TUPLE_ADDRESSES)?, attribute(tuple, TUPLE_PROTOCOL)?);
    if i32::from(*attribute(protocol, PROTOCOL_NUMBER)?.first()?) != libc::IPPROTO_TCP {
        return None;
    }
    let address = |v4, v6| -> Option<IpAddr> {
        match attribute(addresses, v4) {
            Some(value) => Some(Ipv4Addr::from(array::<4>(value, 0)?).into()),
            None => Some(Ipv6Addr::from(array::<16>(attribute(addresses, v6)?, 0)?).into()),
        }
    };
    let port = |kind| array(attribute(protocol, kind)?, 0).map(u16::from_be_bytes);
    Some((
        SocketAddr::new(address(SOURCE_V4, SOURCE_V6)?, port(SOURCE_PORT)?),
        SocketAddr::new(address(DESTINATION_V4, DESTINATION_V6)?, port(DESTINATION_PORT)?),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: &str = "198.18.0.2:40000";
    const VIP: &str = "198.18.0.99:80";
    const SERVER: &str = "198.18.1.2:8080";
    const ESTABLISHED: u8 = 3;

    fn attr(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = (4 + value.len() as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn tuple(protocol: i32, source: &str, destination: &str) -> Vec<u8> {
        let ends: [SocketAddr; 2] = [source.parse().unwrap(), destination.parse().unwrap()];
        let addresses = ends.iter().zip(1..).map(|(end, kind)| match end.ip() {
            IpAddr::V4(address) => attr(kind, &address.octets()),
            IpAddr::V6(address) => attr(kind + 2, &address.octets()),
        });
        let addresses: Vec<u8> = addresses.flatten().collect();
        let ports = ends.iter().zip(2..);
        let ports = ports.flat_map(|(end, kind)| attr(kind, &end.port().to_be_bytes()));
        let protocol: Vec<u8> = attr(1, &[protocol as u8]).into_iter().chain(ports).collect();
        [attr(1, &addresses), attr(2, &protocol)].concat()
    }

    fn entry(protocol: i32, client: &str, vip: &str, server: &str, state: u8) -> Vec<u8> {
        entry_by(protocol, client, vip, server, client, state)
    }

    fn entry_by(protocol: i32, client: &str, vip: &str, server: &str, peer: &str, state: u8) -> Vec<u8> {
        [
            vec![libc::AF_INET as u8, 0, 0, 0],
            attr(ORIGINAL, &tuple(protocol, client, vip)),
            attr(REPLY, &tuple(protocol, server, peer)),
            attr(STATUS, &0x1aa_u32.to_be_bytes()),
            attr(PROTOCOL_STATE, &attr(TCP, &attr(TCP_STATE, &[state]))),
        ]
        .concat()
    }

    fn flow(client: &str, vip: &str, server: &str) -> CtFlow {
        CtFlow {
            client: client.parse().unwrap(),
            vip: vip.parse().unwrap(),
            server: server.parse().unwrap(),
            peer: client.parse().unwrap(),
        }
    }

    #[test]
    fn the_flow_is_what_the_client_sees() {
        let v4 = entry(libc::IPPROTO_TCP, CLIENT, VIP, SERVER, ESTABLISHED);
        assert_eq!(CtFlow::parse(&v4), Some(flow(CLIENT, VIP, SERVER)));
        let (client, vip, server) = ("[fd00::2]:40000", "[fd00::99]:80", "[fd00:1::2]:8080");
        let v6 = entry(libc::IPPROTO_TCP, client, vip, server, ESTABLISHED);
        assert_eq!(CtFlow::parse(&v6), Some(flow(client, vip, server)));
    }

    #[test]
    fn whom_the_server_sees_is_the_client_unless_that_is_translated_too() {
        let gateway = "198.18.1.1:1024";
        let entry = entry_by(libc::IPPROTO_TCP, CLIENT, VIP, SERVER, gateway, ESTABLISHED);
        let expected = CtFlow {
            peer: gateway.parse().unwrap(),
            ..flow(CLIENT, VIP, SERVER)
        };
        assert_eq!(CtFlow::parse(&entry), Some(expected));
    }

    #[test]
    fn only_live_states_count() {
        let live: Vec<u8> = (0..=u8::MAX)
            .filter(|&state| CtFlow::parse(&entry(libc::IPPROTO_TCP, CLIENT, VIP, SERVER, state)).is_some())
            .collect();
        assert_eq!(live, [2, 3, 4, 5, 6]);
    }

    #[test]
    fn another_port_is_elsewhere_and_the_vip_itself_is_not() {
        let port = "198.18.0.99:8080";
        let redirected = entry(libc::IPPROTO_TCP, CLIENT, VIP, port, ESTABLISHED);
        assert_eq!(CtFlow::parse(&redirected), Some(flow(CLIENT, VIP, port)));
        assert_eq!(
            CtFlow::parse(&entry(libc::IPPROTO_TCP, CLIENT, VIP, VIP, ESTABLISHED)),
            None
        );
    }

    #[test]
    fn another_protocol_or_a_short_entry_is_no_flow() {
        assert_eq!(
            CtFlow::parse(&entry(libc::IPPROTO_UDP, CLIENT, VIP, SERVER, ESTABLISHED)),
            None
        );
        let whole = entry(libc::IPPROTO_TCP, CLIENT, VIP, SERVER, ESTABLISHED);
        // The last three bytes pad the state.
        for length in 0..whole.len() - 3 {
            assert_eq!(CtFlow::parse(&whole[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn lengths_that_lie_break_nothing() {
        let whole = entry(libc::IPPROTO_TCP, CLIENT, VIP, SERVER, ESTABLISHED);
        for offset in 0..whole.len() {
            for value in [0, 1, 3, 5, 7, 0x7f, 0xff] {
                let mut bytes = whole.clone();
                bytes[offset] = value;
                // Whatever it is taken for, it ends, and only whole addresses come out.
                if let Some(found) = CtFlow::parse(&bytes) {
                    assert_eq!(found.client.is_ipv4(), found.vip.is_ipv4(), "{value} at {offset}");
                }
            }
        }
    }

    #[test]
    fn the_kernel_answers_for_a_missing_subsystem_as_expected() {
        let mut channel = Channel::open(NETLINK_NETFILTER).unwrap();
        let error = dump(&mut channel, 0x7f, libc::AF_INET as u8, |_| {}).unwrap_err();
        // Netfilter asks for the privilege first.
        let denied = error.kind() == io::ErrorKind::PermissionDenied && crate::process::effective_uid() != 0;
        assert!(is_missing(&error) || denied, "{error}");
    }
}
