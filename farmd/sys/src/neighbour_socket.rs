//! Hears and sends ARP and IPv6 neighbour discovery on one interface, through pnet's data-link channel.
//!
//! Owns the socket, its filter and the groups in which it hears solicitations; pnet drives it. The channel is prepared here rather than opened by pnet, because pnet can
//! neither set a filter nor ignore the host's own frames, and turns the interface promiscuous unless told otherwise.
//! The responder calls it; it never builds or reads a message.

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use pnet_datalink::{Channel, DataLinkReceiver, DataLinkSender};

use crate::packet_socket::{BpfInsn, attach_filter, ignore_outgoing};
use crate::sockopt;

/// One instruction of [`FILTER`].
const fn insn(code: u16, jt: u8, jf: u8, k: u32) -> BpfInsn {
    BpfInsn { code, jt, jf, k }
}

/// Whole frames with ARP, or with ICMPv6 of type 135 (solicitation) or 136 (advertisement) right after the fixed IPv6 header: neighbour
/// discovery has no use for extension headers.
const FILTER: [BpfInsn; 10] = [
    insn(0x28, 0, 0, 12),
    insn(0x15, 6, 0, 0x0806),
    insn(0x15, 0, 6, 0x86dd),
    insn(0x30, 0, 0, 20),
    insn(0x15, 0, 4, 58),
    insn(0x30, 0, 0, 54),
    insn(0x15, 1, 0, 135),
    insn(0x15, 0, 1, 136),
    insn(0x06, 0, 0, 65_535),
    insn(0x06, 0, 0, 0),
];

/// A raw channel that hears nothing but ARP and neighbour discovery, and not what this host sends.
///
/// It hears requests ahead of any ingress rule of the firewall, so it works with [`crate::nft`] dropping those for a VIP.
pub struct NeighbourSocket {
    ifindex: u32,
    /// Member of the IPv6 groups, so that the kernel tells the switches about them; none before the first group.
    groups: Option<OwnedFd>,
    /// A second handle on pnet's socket, to wait for.
    socket: OwnedFd,
    sender: Box<dyn DataLinkSender>,
    receiver: Box<dyn DataLinkReceiver>,
}

impl NeighbourSocket {
    /// Opens the channel on interface number `ifindex`.
    ///
    /// # Errors
    /// `NotFound` if there is no such interface, `PermissionDenied` without CAP_NET_RAW.
    pub fn open(ifindex: u32) -> io::Result<Self> {
        let interface = pnet_datalink::interfaces()
            .into_iter()
            .find(|interface| interface.index == ifindex);
        let Some(interface) = interface else {
            let text = format!("no interface has the number {ifindex}");
            return Err(io::Error::new(io::ErrorKind::NotFound, text));
        };
        let context = |error: io::Error| sockopt::context(&error, format_args!("ARP and ND on {}", interface.name));
        // Protocol 0 keeps the socket deaf until pnet binds it, when the filter stands.
        let prepared = sockopt::socket(libc::AF_PACKET, libc::SOCK_RAW, 0).map_err(context)?;
        ignore_outgoing(&prepared).map_err(context)?;
        attach_filter(&prepared, &FILTER).map_err(context)?;
        let socket = prepared.try_clone().map_err(context)?;
        let config = pnet_datalink::linux::Config {
            // pnet owns the descriptor from here on: it closes it on its errors and when the channel is dropped.
            socket_fd: Some(prepared.into_raw_fd()),
            promiscuous: false,
            // Callers wait with `poll`; the channel itself only looks.
            read_timeout: Some(Duration::ZERO),
            write_timeout: Some(Duration::ZERO),
            ..pnet_datalink::linux::Config::default()
        };
        match pnet_datalink::linux::channel(&interface, config).map_err(context)? {
            Channel::Ethernet(sender, receiver) => Ok(Self {
                ifindex,
                groups: None,
                socket,
                sender,
                receiver,
            }),
            _ => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("{} is not Ethernet", interface.name),
            )),
        }
    }

    /// The next waiting frame, Ethernet header first; `None` if there is none. Never blocks.
    ///
    /// # Errors
    /// `NetworkDown` once each time the interface goes down or away; hearing goes on by itself when it comes up again.
    pub fn recv(&mut self) -> io::Result<Option<&[u8]>> {
        match self.receiver.next() {
            Ok(frame) => Ok(Some(frame)),
            Err(error) => match error.kind() {
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                // pnet reports a pending error of the socket without taking it, and so would for ever.
                _ => sockopt::take_error(&self.socket).and(Err(error)),
            },
        }
    }

    /// Hears from now on what is sent to `group`, as long as the socket lives.
    ///
    /// The interface takes the group's frames in any case. Switches that deal out groups learn of it by MLD, which the kernel sends from the interface's
    /// own addresses while IPv6 is on there; `false` if it refuses to.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn hear_group(&mut self, group: Ipv6Addr) -> io::Result<bool> {
        let [.., a, b, c, d] = group.octets();
        let mut request = libc::packet_mreq {
            // Interface numbers are positive `int`s in the kernel.
            mr_ifindex: self.ifindex as libc::c_int,
            mr_type: libc::PACKET_MR_MULTICAST as libc::c_ushort,
            mr_alen: 6,
            mr_address: [0; 8],
        };
        request.mr_address[..6].copy_from_slice(&[0x33, 0x33, a, b, c, d]);
        sockopt::set(&self.socket, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request)
            .map_err(|error| sockopt::context(&error, format_args!("frames to {group}")))?;
        Ok(self.tell_switches(group).is_ok())
    }

    fn tell_switches(&mut self, group: Ipv6Addr) -> io::Result<()> {
        let socket = match &self.groups {
            Some(socket) => socket,
            None => self
                .groups
                .insert(sockopt::socket(libc::AF_INET6, libc::SOCK_DGRAM, 0)?),
        };
        let request = libc::ipv6_mreq {
            ipv6mr_multiaddr: libc::in6_addr {
                s6_addr: group.octets(),
            },
            ipv6mr_interface: self.ifindex,
        };
        sockopt::set(socket, libc::IPPROTO_IPV6, libc::IPV6_ADD_MEMBERSHIP, &request)
    }

    /// Sends one frame, Ethernet header first. Never blocks: `TimedOut` or `WouldBlock` when the interface takes no more.
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        // pnet answers `None` only for channels that cannot send at all.
        self.sender
            .send_to(frame, None)
            .unwrap_or_else(|| Err(io::ErrorKind::Unsupported.into()))
    }
}

impl AsFd for NeighbourSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl std::fmt::Debug for NeighbourSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NeighbourSocket")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}
