//! What kind of device an interface is, and how much has come in on it.
//!
//! Owns nothing and changes nothing: each call is a fresh look at the calling thread's network namespace. Asked where it matters whether an
//! interface is a card with a driver or something that the kernel makes up (a veth, a bridge, a VLAN). It never looks into `/sys`, which may be
//! another namespace's.

use std::io;
use std::os::fd::AsRawFd;

use crate::interface;
use crate::netlink_message::{Batch, Channel, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, array, attribute};
use crate::sockopt;

/// `linux/netlink.h`, `linux/rtnetlink.h`, `linux/if_link.h`
const NETLINK_ROUTE: isize = 0;
const RTM_GETLINK: u16 = 18;
/// `struct ifinfomsg`: its length, and the flags in it.
const IFINFO: usize = 16;
const FLAGS_AT: usize = 8;
const UP: u32 = (libc::IFF_UP | libc::IFF_RUNNING) as u32;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_STATS64: u16 = 23;
const IFLA_PARENT_DEV_NAME: u16 = 56;
const IFLA_INFO_KIND: u16 = 1;
/// `linux/sockios.h`, `linux/ethtool.h`
const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GFLAGS: u32 = 0x25;
const ETH_FLAG_RXVLAN: u32 = 1 << 8;

/// A network device at the moment of the call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// What makes it, where that is the kernel itself: `veth`, `bridge`, `bond`, `macvlan`, `vlan`, `tun`.
    pub kind: Option<String>,
    /// Its driver, such as `ixgbe` or `virtio_net`; many of the kernel's own devices tell one as well.
    pub driver: Option<String>,
    /// The device on a bus that it is, such as `0000:03:00.0`; absent where there is none. Kernels before 5.14 do not tell.
    pub on_bus: Option<String>,
    /// VLAN tags are taken off before anything in the kernel sees the frame.
    pub strips_tags: bool,
    /// A VLAN device of this network namespace sits on it.
    pub has_vlans: bool,
}

/// What has come in on an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Frames, as the driver counts them.
    pub frames: u64,
    /// It is administratively up and has a carrier.
    pub up: bool,
}

/// The device that interface number `index` is.
///
/// # Errors
/// `NotFound` if there is none, else what the kernel says.
pub fn look(index: u32) -> io::Result<Nic> {
    let mut nic = link(index, |_, attributes| {
        let name = text(attributes, IFLA_IFNAME).unwrap_or_default();
        Nic {
            kind: kind(attributes),
            driver: driver(&name),
            on_bus: text(attributes, IFLA_PARENT_DEV_NAME),
            strips_tags: strips_tags(&name),
            has_vlans: false,
        }
    })?;
    each_link(None, |_, attributes| {
        let lower = attribute(attributes, IFLA_LINK).and_then(|value| array(value, 0));
        let is_vlan = kind(attributes).is_some_and(|kind| kind == "vlan");
        nic.has_vlans |= is_vlan && lower.map(u32::from_ne_bytes) == Some(index);
    })?;
    Ok(nic)
}

/// What has come in on interface number `index`.
///
/// # Errors
/// As [`look`].
pub fn received(index: u32) -> io::Result<Received> {
    link(index, |flags, attributes| {
        let frames = attribute(attributes, IFLA_STATS64).and_then(|value| array(value, 0));
        Received {
            frames: frames.map_or(0, u64::from_ne_bytes),
            up: flags & UP == UP,
        }
    })
}

/// What `read` makes of the flags and attributes of one link.
fn link<T>(index: u32, read: impl Fn(u32, &[u8]) -> T) -> io::Result<T> {
    let absent = || io::Error::new(io::ErrorKind::NotFound, format!("no interface has the number {index}"));
    let mut found = None;
    match each_link(Some(index), |flags, attributes| found = Some(read(flags, attributes))) {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Err(absent()),
        Err(error) => Err(sockopt::context(&error, format_args!("interface number {index}"))),
        Ok(()) => found.ok_or_else(absent),
    }
}

/// Hands flags and attributes of one link, or of all, to `f`.
fn each_link(index: Option<u32>, mut f: impl FnMut(u32, &[u8])) -> io::Result<()> {
    let mut channel = Channel::open(NETLINK_ROUTE)?;
    let sequence = channel.next_sequence();
    let mut request = Batch::default();
    let how = if index.is_some() { NLM_F_ACK } else { NLM_F_DUMP };
    request.message(RTM_GETLINK, NLM_F_REQUEST | how, sequence, |body| {
        body.put(&[0; 4]).put(&index.unwrap_or(0).to_ne_bytes()).put(&[0; 8]);
    });
    channel.dump(&request, sequence, |answer| {
        if let (Some(flags), Some(attributes)) = (array(answer, FLAGS_AT), answer.get(IFINFO..)) {
            f(u32::from_ne_bytes(flags), attributes);
        }
    })?;
    Ok(())
}

fn text(attributes: &[u8], kind: u16) -> Option<String> {
    let bytes = attribute(attributes, kind)?;
    let text = bytes.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned()).filter(|text| !text.is_empty())
}

fn kind(attributes: &[u8]) -> Option<String> {
    text(attribute(attributes, IFLA_LINKINFO)?, IFLA_INFO_KIND)
}

fn driver(name: &str) -> Option<String> {
    let mut info = DriverInfo {
        command: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        rest: [0; 160],
    };
    ethtool(name, &mut info).ok()?;
    let text = info.driver.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(text).into_owned()).filter(|text| !text.is_empty())
}

fn strips_tags(name: &str) -> bool {
    let mut value = Value {
        command: ETHTOOL_GFLAGS,
        data: 0,
    };
    ethtool(name, &mut value).is_ok() && value.data & ETH_FLAG_RXVLAN != 0
}

/// What an ethtool request reads and writes.
///
/// # Safety
/// Plain data without padding, laid out and as long as the kernel's type for the command that it begins with.
unsafe trait Request {}

/// `struct ethtool_drvinfo`
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    /// Four more texts of 32 bytes, 12 bytes in reserve, and five numbers.
    rest: [u8; 160],
}

// SAFETY: 196 bytes, as `struct ethtool_drvinfo` of ETHTOOL_GDRVINFO has.
unsafe impl Request for DriverInfo {}

/// `struct ethtool_value`
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

// SAFETY: two words, as `struct ethtool_value` of ETHTOOL_GFLAGS has.
unsafe impl Request for Value {}

fn ethtool<T: Request>(name: &str, value: &mut T) -> io::Result<()> {
    let mut request = interface::request(name)?;
    request.ifr_ifru.ifru_data = std::ptr::from_mut(value).cast();
    let socket = sockopt::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: SIOCETHTOOL reads an `ifreq` whose data points to a value of the length that its command stands for, alive over the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_is_on_no_bus() {
        let index = interface::index("lo").unwrap();
        let nic = look(index).unwrap();
        assert_eq!((nic.kind, nic.on_bus, nic.has_vlans), (None, None, false));
        let before = received(index).unwrap().frames;
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"x", socket.local_addr().unwrap()).unwrap();
        assert!(received(index).unwrap().frames > before);
    }

    #[test]
    fn no_interface_is_no_device() {
        let index = u32::MAX >> 1;
        assert_eq!(look(index).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(received(index).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
