//! Lists the TCP sockets of the network namespace and ends single ones, through `sock_diag(7)`.
//!
//! Owns one netlink socket. The kernel's own socket table is the farm's flow table: the raw data plane dumps it at a change of
//! the map to learn which connections this host holds, and a forced hand-over ends those that must go. It never keeps a
//! copy of the table.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use crate::netlink_message::{Batch, Channel, Dump, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, array};
use crate::sockopt;

/// States as `net/tcp_states.h` numbers them.
pub mod state {
    /// Open in both directions.
    pub const ESTABLISHED: u8 = 1;
    /// A SYN is answered, the last step of the handshake is awaited.
    pub const SYN_RECV: u8 = 3;
    /// The same before the kernel has made a full socket of it.
    pub const NEW_SYN_RECV: u8 = 12;
    /// We closed, and our FIN is not acknowledged.
    pub const FIN_WAIT1: u8 = 4;
    /// We closed, the peer has not.
    pub const FIN_WAIT2: u8 = 5;
    /// Closed on both sides; the address pair is kept from reuse.
    pub const TIME_WAIT: u8 = 6;
    /// The peer closed, we have not.
    pub const CLOSE_WAIT: u8 = 8;
    /// The peer closed, then we; our FIN is not acknowledged.
    pub const LAST_ACK: u8 = 9;
    /// Both closed at once; our FIN is not acknowledged.
    pub const CLOSING: u8 = 11;
}

/// States in which a frame of the connection needs this host's answer.
const CONNECTED: u32 = 1 << state::ESTABLISHED
    | 1 << state::SYN_RECV
    | 1 << state::NEW_SYN_RECV
    | 1 << state::FIN_WAIT1
    | 1 << state::FIN_WAIT2
    | 1 << state::CLOSE_WAIT
    | 1 << state::LAST_ACK
    | 1 << state::CLOSING;

/// `linux/sock_diag.h`
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

/// Stands for whichever socket there is (`INET_DIAG_NOCOOKIE`).
const ANY_COOKIE: u64 = u64::MAX;

/// A dump that the kernel keeps interrupting is taken as it is after this many tries.
const TRIES: u32 = 5;

/// One TCP socket with a peer, at the moment of the dump.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct TcpSocket {
    /// This host's end. IPv4 connections of IPv6 sockets are told as IPv4.
    pub local: SocketAddr,
    /// The client's end.
    pub remote: SocketAddr,
    /// One of the numbers in [`state`].
    pub state: u8,
    /// Inode of the socket, as in `/proc/PID/fd`; 0 when no process holds it (in a handshake, in TIME_WAIT, closed).
    pub inode: u32,
    /// The kernel's name for this very socket, so that a later one on the same addresses is never mistaken for it.
    pub cookie: u64,
    /// Number of the interface the socket is bound to, or 0.
    interface: u32,
}

/// A reusable question channel to the kernel's socket table.
///
/// It asks about the network namespace of the thread that opened it, whichever thread uses it.
#[derive(Debug)]
pub struct SockDiag {
    channel: Channel,
}

impl SockDiag {
    /// Opens the channel. Listing needs no privilege.
    pub fn open() -> io::Result<Self> {
        let channel = Channel::open(NETLINK_SOCK_DIAG).map_err(|error| sockopt::context(&error, "sock_diag"))?;
        Ok(Self { channel })
    }

    /// All connected TCP sockets (handshakes and closing ones included, TIME_WAIT not) whose local address is one of `locals`.
    ///
    /// Ordered by local address, then remote. A table that changes during the dump is asked again, a few times.
    pub fn tcp_sockets(&mut self, locals: &[IpAddr]) -> io::Result<Vec<TcpSocket>> {
        self.tcp_sockets_in(locals, CONNECTED)
    }

    /// As [`tcp_sockets`](Self::tcp_sockets), with those in TIME_WAIT besides.
    pub fn tcp_sockets_with_time_wait(&mut self, locals: &[IpAddr]) -> io::Result<Vec<TcpSocket>> {
        self.tcp_sockets_in(locals, CONNECTED | 1 << state::TIME_WAIT)
    }

    /// As [`tcp_sockets`](Self::tcp_sockets), of those that wait for the last step of their handshake.
    ///
    /// # Errors
    /// As there.
    pub fn half_open_tcp_sockets(&mut self, locals: &[IpAddr]) -> io::Result<Vec<TcpSocket>> {
        self.tcp_sockets_in(locals, 1 << state::SYN_RECV | 1 << state::NEW_SYN_RECV)
    }

    /// Whether this host has a connection (handshakes and closing ones included, TIME_WAIT not) between exactly these two
    /// ends. Costs some microseconds, however many there are. A socket that is bound to an interface is not found.
    ///
    /// # Errors
    /// What the kernel reports; that there is none is `false`.
    pub fn has_tcp(&mut self, local: SocketAddr, remote: SocketAddr) -> io::Result<bool> {
        self.has_tcp_on(local, remote, 0)
    }

    /// As [`has_tcp`](Self::has_tcp); a socket that is bound to `interface` is found too.
    ///
    /// # Errors
    /// As there.
    pub fn has_tcp_on(&mut self, local: SocketAddr, remote: SocketAddr, interface: u32) -> io::Result<bool> {
        let sequence = self.channel.next_sequence();
        let mut batch = Batch::default();
        batch.message(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_ACK, sequence, |body| {
            request(
                body,
                family_of(local),
                u32::MAX,
                &identity(local, remote, interface, ANY_COOKIE),
            );
        });
        let mut found = false;
        let end = self.channel.dump(&batch, sequence, |entry| {
            // Where nothing fits better the kernel answers with the listener.
            found |= TcpSocket::parse(entry).is_some_and(|socket| socket.remote == remote && socket.is_in(CONNECTED));
        });
        match end {
            Ok(_) => Ok(found),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(sockopt::context(&error, format_args!("TCP socket {local} to {remote}"))),
        }
    }

    fn tcp_sockets_in(&mut self, locals: &[IpAddr], states: u32) -> io::Result<Vec<TcpSocket>> {
        let mut found = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            for _ in 0..TRIES {
                match self.dump(family as u8, locals, states, &mut found) {
                    Ok(Dump::Complete) => break,
                    Ok(Dump::Interrupted) => {}
                    // A kernel without IPv6.
                    Err(error) if error.kind() == io::ErrorKind::NotFound && family == libc::AF_INET6 => break,
                    Err(error) => return Err(sockopt::context(&error, "list of TCP sockets")),
                }
            }
        }
        // Entries of interrupted dumps are kept: twice listed is mended here, a closed one more does no harm.
        found.sort_unstable();
        found.dedup_by(|a, b| a.cookie == b.cookie && a.local == b.local && a.remote == b.remote);
        Ok(found)
    }

    fn dump(&mut self, family: u8, locals: &[IpAddr], states: u32, found: &mut Vec<TcpSocket>) -> io::Result<Dump> {
        let sequence = self.channel.next_sequence();
        let mut batch = Batch::default();
        batch.message(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, sequence, |body| {
            request(body, family, states, &[0; 48]);
        });
        self.channel.dump(&batch, sequence, |entry| {
            // One may have ended between the kernel's choice and its answer.
            let asked = |socket: &TcpSocket| locals.contains(&socket.local.ip()) && socket.is_in(states);
            found.extend(TcpSocket::parse(entry).filter(asked));
        })
    }

    /// Ends a connection at once: the peer gets a reset, the local process an error at its next use of the socket.
    ///
    /// Success if the connection is gone already.
    ///
    /// # Errors
    /// `PermissionDenied` without CAP_NET_ADMIN; `Unsupported` on a kernel built without socket destruction.
    pub fn destroy(&mut self, socket: &TcpSocket) -> io::Result<()> {
        let sequence = self.channel.next_sequence();
        let mut batch = Batch::default();
        batch.message(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, sequence, |body| {
            request(body, family_of(socket.local), u32::MAX, &socket.identity());
        });
        match self.channel.acknowledged(&batch, sequence) {
            // ESTALE: another socket has the addresses by now. It, too, is not the one that was meant.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESTALE)) => Ok(()),
            Err(error) => {
                let what = format_args!("cannot end the connection {} to {}", socket.local, socket.remote);
                Err(sockopt::context(&error, what))
            }
            Ok(()) => Ok(()),
        }
    }
}

/// ```text
/// inet_diag_req_v2:  family 1 | protocol 1 | extensions 1 | pad 1 | states 4 | inet_diag_sockid 48
/// ```
fn request(body: &mut Batch, family: u8, states: u32, identity: &[u8; 48]) {
    body.put(&[family, libc::IPPROTO_TCP as u8, 0, 0])
        .put(&states.to_ne_bytes())
        .put(identity);
}

impl TcpSocket {
    /// True if its state is one of `states`, a bit for each.
    fn is_in(&self, states: u32) -> bool {
        1_u32.checked_shl(self.state.into()).unwrap_or(0) & states != 0
    }

    /// ```text
    /// inet_diag_msg:     family 1 | state 1 | timer 1 | retransmits 1 | inet_diag_sockid 48 | expires 4 | rqueue 4 | wqueue 4 | uid 4 | inode 4
    /// inet_diag_sockid:  sport 2 | dport 2 (big endian) | source 16 | destination 16 | interface 4 | cookie 8
    /// ```
    fn parse(entry: &[u8]) -> Option<Self> {
        let family = i32::from(*entry.first()?);
        let address = |offset: usize| -> Option<IpAddr> {
            match family {
                libc::AF_INET => Some(Ipv4Addr::from(array::<4>(entry, offset)?).into()),
                libc::AF_INET6 => Some(Ipv6Addr::from(array::<16>(entry, offset)?).to_canonical()),
                _ => None,
            }
        };
        let port = |offset: usize| array(entry, offset).map(u16::from_be_bytes);
        let number = |offset: usize| array(entry, offset).map(u32::from_ne_bytes);
        Some(Self {
            local: SocketAddr::new(address(8)?, port(4)?),
            remote: SocketAddr::new(address(24)?, port(6)?),
            state: *entry.get(1)?,
            interface: number(40)?,
            cookie: u64::from(number(44)?) | u64::from(number(48)?) << 32,
            inode: number(68)?,
        })
    }

    fn identity(&self) -> [u8; 48] {
        identity(self.local, self.remote, self.interface, self.cookie)
    }
}

const fn family_of(addr: SocketAddr) -> u8 {
    match addr {
        SocketAddr::V4(_) => libc::AF_INET as u8,
        SocketAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

/// `inet_diag_sockid`, as in [`TcpSocket::parse`].
fn identity(local: SocketAddr, remote: SocketAddr, interface: u32, cookie: u64) -> [u8; 48] {
    let mut bytes = [0; 48];
    bytes[0..2].copy_from_slice(&local.port().to_be_bytes());
    bytes[2..4].copy_from_slice(&remote.port().to_be_bytes());
    for (offset, address) in [(4, local.ip()), (20, remote.ip())] {
        match address {
            IpAddr::V4(address) => bytes[offset..offset + 4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => bytes[offset..offset + 16].copy_from_slice(&address.octets()),
        }
    }
    bytes[36..40].copy_from_slice(&interface.to_ne_bytes());
    bytes[40..44].copy_from_slice(&(cookie as u32).to_ne_bytes());
    bytes[44..48].copy_from_slice(&((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(family: i32, source: [u8; 16], destination: [u8; 16]) -> Vec<u8> {
        let mut bytes = vec![family as u8, state::ESTABLISHED, 0, 0];
        bytes.extend(80u16.to_be_bytes());
        bytes.extend(40_000u16.to_be_bytes());
        bytes.extend(source);
        bytes.extend(destination);
        for number in [3u32, 0x1111, 0x2222, 0, 0, 0, 1000, 4711] {
            bytes.extend(number.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn a_mapped_address_is_told_as_ipv4() {
        let mapped = |last| Ipv4Addr::new(198, 18, 0, last).to_ipv6_mapped().octets();
        let socket = TcpSocket::parse(&entry(libc::AF_INET6, mapped(1), mapped(2))).unwrap();
        assert_eq!(socket.local, "198.18.0.1:80".parse().unwrap());
        assert_eq!(socket.remote, "198.18.0.2:40000".parse().unwrap());
        assert_eq!(
            (socket.inode, socket.cookie, socket.interface),
            (4711, 0x2222_0000_1111, 3)
        );
    }

    #[test]
    fn a_socket_is_named_to_the_kernel_as_the_kernel_named_it() {
        let (source, destination) = ([0xfd; 16], [0xfe; 16]);
        let bytes = entry(libc::AF_INET6, source, destination);
        assert_eq!(TcpSocket::parse(&bytes).unwrap().identity(), bytes[4..52]);
    }

    #[test]
    fn a_short_or_foreign_entry_is_no_socket() {
        let whole = entry(libc::AF_INET, [0; 16], [0; 16]);
        for length in 0..whole.len() {
            assert_eq!(TcpSocket::parse(&whole[..length]), None, "{length} bytes");
        }
        assert_eq!(TcpSocket::parse(&entry(libc::AF_UNIX, [0; 16], [0; 16])), None);
    }
}
