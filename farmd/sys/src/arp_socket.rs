//! Hears and sends ARP frames on one interface, through pnet's data-link channel.
//!
//! Owns the socket and its filter; pnet drives it. The channel is prepared here rather than opened by pnet, because pnet can
//! neither set a filter nor ignore the host's own frames, and turns the interface promiscuous unless told otherwise.
//! The ARP responder calls it; it never builds or reads an ARP packet.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, IntoRawFd, OwnedFd};
use std::time::Duration;

use pnet_datalink::{Channel, DataLinkReceiver, DataLinkSender};

use crate::packet_socket::{BpfInsn, attach_filter, ignore_outgoing};
use crate::sockopt;

/// `ldh [12]; jeq #0x0806, 0, 1; ret #65535; ret #0`: frames whose Ethernet type is ARP, whole.
const ARP_ONLY: [BpfInsn; 4] = [
    BpfInsn {
        code: 0x28,
        jt: 0,
        jf: 0,
        k: 12,
    },
    BpfInsn {
        code: 0x15,
        jt: 0,
        jf: 1,
        k: 0x0806,
    },
    BpfInsn {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: 65_535,
    },
    BpfInsn {
        code: 0x06,
        jt: 0,
        jf: 0,
        k: 0,
    },
];

/// A raw channel that carries nothing but ARP and does not hear what this host sends.
///
/// It hears requests ahead of any ingress rule of the firewall, so it works with [`crate::nft`] dropping ARP for a VIP.
pub struct ArpSocket {
    /// A second handle on pnet's socket, to wait for.
    socket: OwnedFd,
    sender: Box<dyn DataLinkSender>,
    receiver: Box<dyn DataLinkReceiver>,
}

impl ArpSocket {
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
        let context = |error: io::Error| sockopt::context(&error, format_args!("ARP on {}", interface.name));
        // Protocol 0 keeps the socket deaf until pnet binds it, when the filter stands.
        let prepared = sockopt::socket(libc::AF_PACKET, libc::SOCK_RAW, 0).map_err(context)?;
        ignore_outgoing(&prepared).map_err(context)?;
        attach_filter(&prepared, &ARP_ONLY).map_err(context)?;
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

    /// The next waiting ARP frame, Ethernet header first; `None` if there is none. Never blocks.
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

    /// Sends one frame, Ethernet header first. Never blocks: `TimedOut` or `WouldBlock` when the interface takes no more.
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        // pnet answers `None` only for channels that cannot send at all.
        self.sender
            .send_to(frame, None)
            .unwrap_or_else(|| Err(io::ErrorKind::Unsupported.into()))
    }
}

impl AsFd for ArpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl std::fmt::Debug for ArpSocket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ArpSocket")
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}
