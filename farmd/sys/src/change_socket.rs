//! Hears that something on the host has changed, from the kernel itself: interfaces and their addresses, or nf_tables rules.
//!
//! Owns one netlink socket that is a member of multicast groups. It tells that there is news, not what: whoever is told looks for itself, so a message that
//! was lost, or one about somebody else's change, does no harm.

use std::io;

use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::sockopt;

/// linux/rtnetlink.h: RTNLGRP_LINK, RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR.
const LINK_GROUPS: [u32; 3] = [1, 5, 9];
/// linux/netfilter/nfnetlink.h: NFNLGRP_NFTABLES.
const TABLE_GROUPS: [u32; 1] = [7];
/// Most messages taken at once: while others change thousands of rules, whoever is told looks meanwhile.
const BUDGET: usize = 1024;

/// See the module doc. It hears the network namespace of the thread that opened it, within a tokio runtime.
#[derive(Debug)]
pub struct ChangeSocket {
    socket: AsyncFd<Socket>,
}

impl ChangeSocket {
    /// For changes of interfaces, up and down among them, and of their addresses.
    ///
    /// # Errors
    /// What the kernel reports.
    pub fn links() -> io::Result<Self> {
        Self::open(NETLINK_ROUTE, &LINK_GROUPS).map_err(|error| sockopt::context(&error, "changes of interfaces"))
    }

    /// For changes of nf_tables, this process's own among them.
    ///
    /// # Errors
    /// `PermissionDenied` without CAP_NET_ADMIN; what the kernel reports if it lacks nf_tables.
    pub fn tables() -> io::Result<Self> {
        Self::open(NETLINK_NETFILTER, &TABLE_GROUPS).map_err(|error| sockopt::context(&error, "changes of nf_tables"))
    }

    fn open(protocol: isize, groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(protocol)?;
        socket.bind_auto()?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        socket.set_non_blocking(true)?;
        // SAFETY: `Socket` owns its descriptor, names no other one and closes it when it is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Self { socket })
    }

    /// Waits until something has changed since the last time that this was done. Nothing is lost if it is dropped before.
    pub async fn changed(&self) {
        loop {
            let Ok(mut ready) = self.socket.readable().await else {
                // The runtime ends, and with it whoever waits.
                return std::future::pending().await;
            };
            let any = drain(self.socket.get_ref());
            ready.clear_ready();
            if any {
                return;
            }
        }
    }
}

/// Takes what has come in; true if that was anything.
fn drain(socket: &Socket) -> bool {
    // What a message says does not matter, nor whether it fits.
    let mut buffer = Vec::with_capacity(64);
    for taken in 0..BUDGET {
        buffer.clear();
        match socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return taken > 0,
            // ENOBUFS: there was more than the socket has room for. Until all that it has is taken the kernel gives it nothing more.
            Err(_) => {}
        }
    }
    true
}
