//! Changes links and addresses over rtnetlink.
//!
//! Owns one netlink connection and the task that serves it. One method per intent; "is there already" and "is gone already"
//! are success, so that setting up and tearing down can be repeated. It keeps no record of what it changed: the VIP code does.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, CacheInfo};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{AddressMessageBuilder, Handle, LinkUnspec};
use tokio::task::JoinHandle;

/// Why a change of links or addresses failed.
#[derive(Debug)]
pub enum NetlinkError {
    /// There is no netlink socket to be had: no descriptor left, or forbidden by a sandbox.
    Open {
        /// What the system said.
        source: io::Error,
    },
    /// There is no link of this name.
    NoLink {
        /// The name asked for.
        name: String,
    },
    /// The prefix length does not fit the address.
    Prefix {
        /// The address.
        addr: IpAddr,
        /// Its impossible prefix length.
        prefix: u8,
    },
    /// The kernel refused a request.
    Request {
        /// What was attempted, with the link or address: "set the MAC of link 7".
        what: String,
        /// Why not.
        source: io::Error,
    },
}

impl fmt::Display for NetlinkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Open { source } => write!(f, "cannot open netlink: {source}"),
            Self::NoLink { name } => write!(f, "there is no interface {name}"),
            Self::Prefix { addr, prefix } => {
                let limit = if addr.is_ipv4() { 32 } else { 128 };
                write!(f, "prefix length {prefix} of address {addr}, expected 0 to {limit}")
            }
            Self::Request { what, source } => write!(f, "cannot {what}: {source}"),
        }
    }
}

impl std::error::Error for NetlinkError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Open { source } | Self::Request { source, .. } => Some(source),
            Self::NoLink { .. } | Self::Prefix { .. } => None,
        }
    }
}

/// One address of one link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct LinkAddr {
    /// Number of the link.
    pub index: u32,
    /// The address.
    pub addr: IpAddr,
    /// Its prefix length.
    pub prefix: u8,
}

/// A connection to the kernel's routing tables, in the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    connection: JoinHandle<()>,
}

impl Netlink {
    /// Opens the connection and serves it on the current tokio runtime (which must have its I/O enabled) until dropped.
    // Async although nothing is awaited: it can only be called where there is a runtime.
    #[allow(clippy::unused_async)]
    pub async fn open() -> Result<Self, NetlinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|source| NetlinkError::Open { source })?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// The number of the link called `name`.
    pub async fn link_index(&self, name: &str) -> Result<u32, NetlinkError> {
        let mut links = self.handle.link().get().match_name(name.to_owned()).execute();
        match links.try_next().await.map_err(io_error) {
            Ok(Some(link)) => Ok(link.header.index),
            Ok(None) => Err(NetlinkError::NoLink { name: name.to_owned() }),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                Err(NetlinkError::NoLink { name: name.to_owned() })
            }
            Err(source) => Err(NetlinkError::Request {
                what: format!("look for link {name}"),
                source,
            }),
        }
    }

    /// Brings a link up.
    pub async fn link_up(&self, index: u32) -> Result<(), NetlinkError> {
        self.set_flag(index, LinkFlags::Up, true, "bring up").await
    }

    /// Brings an interface down.
    pub async fn link_down(&self, index: u32) -> Result<(), NetlinkError> {
        self.set_flag(index, LinkFlags::Up, false, "bring down").await
    }

    /// Gives a link its hardware address. Some drivers want the link down for that.
    pub async fn set_mac(&self, index: u32, mac: [u8; 6]) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).address(mac.to_vec()).build();
        self.set_link(message, || format!("set the MAC of link {index}")).await
    }

    /// Lets a link resolve addresses (ARP and neighbour discovery), or not.
    pub async fn set_arp(&self, index: u32, on: bool) -> Result<(), NetlinkError> {
        self.set_flag(index, LinkFlags::Noarp, !on, "set ARP of").await
    }

    /// Lets a link carry multicast, or not.
    pub async fn set_multicast(&self, index: u32, on: bool) -> Result<(), NetlinkError> {
        self.set_flag(index, LinkFlags::Multicast, on, "set multicast of").await
    }

    /// Sets a link's MTU in bytes, without the Ethernet header.
    pub async fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        self.set_link(message, || format!("set the MTU of link {index} to {mtu}"))
            .await
    }

    /// Sets how many frames may wait to be sent on a link; on a TAP, to be read by its process.
    pub async fn set_queue_length(&self, index: u32, frames: u32) -> Result<(), NetlinkError> {
        let message = LinkUnspec::new_with_index(index)
            .append_extra_attribute(LinkAttribute::TxQueueLen(frames))
            .build();
        self.set_link(message, || {
            format!("set the transmit queue of link {index} to {frames} frames")
        })
        .await
    }

    /// Removes a link; success if it is gone already.
    pub async fn link_del(&self, name: &str) -> Result<(), NetlinkError> {
        let index = match self.link_index(name).await {
            Ok(index) => index,
            Err(NetlinkError::NoLink { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        let result = self.handle.link().del(index).execute().await;
        accept(result, &[libc::ENODEV], || format!("remove link {name}"))
    }

    /// Gives a link an address; success if it has it already.
    ///
    /// IPv6 addresses are usable at once: no duplicate address detection, which would ask the network about a VIP that is
    /// meant to be on several hosts.
    pub async fn addr_add(&self, index: u32, addr: IpAddr, prefix: u8) -> Result<(), NetlinkError> {
        self.add_addr(index, addr, prefix, false).await
    }

    /// As [`Self::addr_add`], but an IPv6 address is deprecated from the start (RFC 4862, 5.5.4): the host answers from it, and has it as source of what it
    /// begins itself only where it has no other.
    pub async fn addr_add_passive(&self, index: u32, addr: IpAddr, prefix: u8) -> Result<(), NetlinkError> {
        self.add_addr(index, addr, prefix, true).await
    }

    async fn add_addr(&self, index: u32, addr: IpAddr, prefix: u8, passive: bool) -> Result<(), NetlinkError> {
        check_prefix(addr, prefix)?;
        let mut request = self.handle.address().add(index, addr, prefix);
        if addr.is_ipv6() {
            request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
        }
        if addr.is_ipv6() && passive {
            let mut times = CacheInfo::default();
            times.ifa_valid = u32::MAX;
            times.ifa_preferred = 0;
            request
                .message_mut()
                .attributes
                .push(AddressAttribute::CacheInfo(times));
        }
        accept(request.execute().await, &[libc::EEXIST], || {
            format!("add address {addr}/{prefix} to link {index}")
        })
    }

    /// Takes an address from a link; success if the address or the link is gone already.
    pub async fn addr_del(&self, index: u32, addr: IpAddr, prefix: u8) -> Result<(), NetlinkError> {
        check_prefix(addr, prefix)?;
        let message = match addr {
            IpAddr::V4(addr) => AddressMessageBuilder::<Ipv4Addr>::new()
                .index(index)
                .address(addr, prefix)
                .build(),
            IpAddr::V6(addr) => AddressMessageBuilder::<Ipv6Addr>::new()
                .index(index)
                .address(addr, prefix)
                .build(),
        };
        let result = self.handle.address().del(message).execute().await;
        accept(result, &[libc::EADDRNOTAVAIL, libc::ENODEV], || {
            format!("remove address {addr}/{prefix} from link {index}")
        })
    }

    /// All addresses of all links, in order of link number and address.
    pub async fn addrs(&self) -> Result<Vec<LinkAddr>, NetlinkError> {
        let found: Result<Vec<AddressMessage>, _> = self.handle.address().get().execute().try_collect().await;
        let found = found.map_err(|error| NetlinkError::Request {
            what: "list addresses".into(),
            source: io_error(error),
        })?;
        let mut addrs: Vec<LinkAddr> = found.iter().filter_map(link_addr).collect();
        addrs.sort_unstable();
        Ok(addrs)
    }

    /// Sets one flag and leaves the others as they are.
    async fn set_flag(&self, index: u32, flag: LinkFlags, on: bool, action: &str) -> Result<(), NetlinkError> {
        let mut message = LinkUnspec::new_with_index(index).build();
        // The builder's own methods forget the mask for some flags, and a mask of 0 means "all of them" to Linux.
        message.header.change_mask = flag;
        message.header.flags = if on { flag } else { LinkFlags::empty() };
        self.set_link(message, || format!("{action} link {index}")).await
    }

    async fn set_link(&self, message: LinkMessage, what: impl FnOnce() -> String) -> Result<(), NetlinkError> {
        accept(self.handle.link().set(message).execute().await, &[], what)
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Turns the error numbers in `harmless` into success.
fn accept(
    result: Result<(), rtnetlink::Error>,
    harmless: &[i32],
    what: impl FnOnce() -> String,
) -> Result<(), NetlinkError> {
    match result.map_err(io_error) {
        Err(error) if error.raw_os_error().is_some_and(|code| harmless.contains(&code)) => Ok(()),
        Err(source) => Err(NetlinkError::Request { what: what(), source }),
        Ok(()) => Ok(()),
    }
}

fn io_error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other),
    }
}

fn check_prefix(addr: IpAddr, prefix: u8) -> Result<(), NetlinkError> {
    let limit = if addr.is_ipv4() { 32 } else { 128 };
    if prefix > limit {
        Err(NetlinkError::Prefix { addr, prefix })
    } else {
        Ok(())
    }
}

fn link_addr(message: &AddressMessage) -> Option<LinkAddr> {
    if !matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6) {
        return None;
    }
    // On a point-to-point link "address" is the peer's and "local" ours; IPv6 mostly tells no "local".
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(addr) => Some(*addr),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(addr) => Some(*addr),
        _ => None,
    });
    Some(LinkAddr {
        index: message.header.index,
        addr: local.or(address)?,
        prefix: message.header.prefix_len,
    })
}
