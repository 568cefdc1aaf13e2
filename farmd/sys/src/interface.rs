//! Lists the host's network interfaces with their addresses.
//!
//! Owns nothing and changes nothing: each call is a fresh look at the calling thread's network namespace. Used at start
//! (which interface is in the VIP's subnet, which node am I), by the interface checker and by `farm doctor`-like checks.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use crate::sockopt;

/// One network interface at the moment of the call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name, such as `eth0`.
    pub name: String,
    /// Number, unique in the network namespace and never 0.
    pub index: u32,
    /// Hardware address; absent on interfaces that have none.
    pub mac: Option<[u8; 6]>,
    /// Addresses with their prefix lengths, in the kernel's order.
    pub addrs: Vec<(IpAddr, u8)>,
    /// Administratively up and with a carrier.
    pub up: bool,
    /// Largest packet in bytes, without the Ethernet header; 0 if the interface vanished meanwhile.
    pub mtu: u32,
}

impl Interface {
    /// Whether `ip` lies in the subnet of one of this interface's addresses.
    pub fn has_subnet_of(&self, ip: IpAddr) -> bool {
        self.addrs.iter().any(|&(addr, prefix)| in_subnet(ip, addr, prefix))
    }
}

/// All interfaces, ordered by number.
pub fn interfaces() -> Vec<Interface> {
    let mut found: Vec<Interface> = Vec::new();
    for raw in pnet_datalink::interfaces() {
        let addrs = raw.ips.iter().map(|network| (network.ip(), network.prefix()));
        // Addresses with a label (`eth0:1`) come as interfaces of their own, with the number of the real one.
        if let Some(same) = found.iter_mut().find(|interface| interface.index == raw.index) {
            same.addrs.extend(addrs);
            continue;
        }
        found.push(Interface {
            index: raw.index,
            mac: raw.mac.map(|mac| mac.octets()).filter(|mac| *mac != [0; 6]),
            addrs: addrs.collect(),
            up: raw.is_up() && raw.is_running(),
            mtu: mtu(&raw.name).unwrap_or(0),
            name: raw.name,
        });
    }
    found.retain(|interface| interface.index != 0);
    found.sort_by_key(|interface| interface.index);
    found
}

/// The interface whose subnet `ip` is in; the one with the longest prefix if several are.
pub fn by_subnet(ip: IpAddr) -> Option<Interface> {
    let prefix = |interface: &Interface| {
        let matching = interface
            .addrs
            .iter()
            .filter(|(addr, prefix)| in_subnet(ip, *addr, *prefix));
        matching.map(|&(_, prefix)| prefix).max()
    };
    // `max_by_key` takes the last of equals; reversed, the lowest number wins.
    interfaces()
        .into_iter()
        .rev()
        .filter(|interface| interface.has_subnet_of(ip))
        .max_by_key(prefix)
}

/// The number of the interface called `name`.
///
/// # Errors
/// `InvalidInput` for a name that no interface may have, `NotFound` if there is none.
pub fn index(name: &str) -> io::Result<u32> {
    let request = ask(name, libc::SIOCGIFINDEX)?;
    // SAFETY: SIOCGIFINDEX fills the `ifru_ifindex` member.
    let index = unsafe { request.ifr_ifru.ifru_ifindex };
    u32::try_from(index).map_err(io::Error::other)
}

/// What changes about one interface while it is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Link {
    /// Number, unique in the network namespace and never 0.
    pub index: u32,
    /// Hardware address; absent on interfaces that have none.
    pub mac: Option<[u8; 6]>,
    /// Administratively up and with a carrier.
    pub up: bool,
}

/// A look at the interface called `name` alone, for those who look often: a few system calls, however many interfaces there are.
///
/// Errors as [`index`].
pub fn link(name: &str) -> io::Result<Link> {
    let flags = ask(name, libc::SIOCGIFFLAGS)?;
    let address = ask(name, libc::SIOCGIFHWADDR)?;
    // SAFETY: SIOCGIFFLAGS fills the `ifru_flags` member.
    let flags = libc::c_int::from(unsafe { flags.ifr_ifru.ifru_flags });
    // SAFETY: SIOCGIFHWADDR fills the `ifru_hwaddr` member.
    let address = unsafe { address.ifr_ifru.ifru_hwaddr }.sa_data;
    let mut mac = [0; 6];
    for (target, byte) in mac.iter_mut().zip(address) {
        *target = byte as u8;
    }
    Ok(Link {
        index: index(name)?,
        mac: Some(mac).filter(|mac| *mac != [0; 6]),
        up: flags & libc::IFF_UP != 0 && flags & libc::IFF_RUNNING != 0,
    })
}

/// How many frames the interface called `name` has dropped instead of sending them; on a TAP, because the queue to its process was full.
///
/// # Errors
/// `NotFound` if there is none, `InvalidData` if the kernel's list is not as expected.
pub fn dropped_on_send(name: &str) -> io::Result<u64> {
    // Of the calling thread's namespace, as `/proc/net` is not.
    dropped_in(&std::fs::read_to_string("/proc/thread-self/net/dev")?, name)
}

/// How many frames the interfaces with these numbers have received, all together; one that is not there has none. Unlike netlink, which
/// [`crate::nic::received`] asks, the list that this reads waits for no change of another interface.
///
/// # Errors
/// Those of reading the kernel's list, and `InvalidData` if it is not as expected.
pub fn frames_received(indices: &[u32]) -> io::Result<u64> {
    let list = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let names = indices.iter().filter_map(|index| name(*index));
    names.map(|name| received_in(&list, &name)).sum()
}

/// The name of the interface with number `index`; `None` if there is none.
pub fn name(index: u32) -> Option<String> {
    let mut name: [libc::c_char; libc::IFNAMSIZ] = [0; libc::IFNAMSIZ];
    // SAFETY: `if_indextoname` writes at most IF_NAMESIZE bytes, terminated, to the buffer, which has as many.
    let found = unsafe { libc::if_indextoname(index, name.as_mut_ptr()) };
    let bytes = name.iter().map(|byte| *byte as u8).take_while(|byte| *byte != 0);
    (!found.is_null()).then(|| String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned())
}

fn received_in(list: &str, name: &str) -> io::Result<u64> {
    let numbers = numbers_of(list, name)?;
    let received = numbers.split_whitespace().nth(1).and_then(|number| number.parse().ok());
    received.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no packets in {numbers:?}")))
}

fn dropped_in(list: &str, name: &str) -> io::Result<u64> {
    let numbers = numbers_of(list, name)?;
    let dropped = numbers
        .split_whitespace()
        .nth(11)
        .and_then(|number| number.parse().ok());
    dropped.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no drops in {numbers:?}")))
}

/// As `net/core/net-procfs.c` writes it: the name and a colon, eight numbers of what was received, then packets, bytes, errors, drops of what was sent.
fn numbers_of<'a>(list: &'a str, name: &str) -> io::Result<&'a str> {
    let mut lines = list.lines().filter_map(|line| line.split_once(':'));
    let (_, numbers) = lines
        .find(|(interface, _)| interface.trim() == name)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no interface {name}")))?;
    Ok(numbers)
}

/// The MTU in bytes of the interface called `name`. Errors as [`index`].
pub fn mtu(name: &str) -> io::Result<u32> {
    let request = ask(name, libc::SIOCGIFMTU)?;
    // SAFETY: SIOCGIFMTU fills the `ifru_mtu` member.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    u32::try_from(mtu).map_err(io::Error::other)
}

/// An interface request with nothing but a checked name: 1 to 15 bytes, no white space, `/` or `:`, not `.` or `..`.
pub(crate) fn request(name: &str) -> io::Result<libc::ifreq> {
    let fits = !name.is_empty() && name.len() < libc::IFNAMSIZ && name != "." && name != "..";
    let forbidden = |byte: u8| byte == b'/' || byte == b':' || byte == 0 || byte.is_ascii_whitespace() || byte == 0x0b;
    if !fits || name.bytes().any(forbidden) {
        let limit = libc::IFNAMSIZ - 1;
        let text = format!("interface name {name:?}: expected 1 to {limit} bytes without '/', ':' and white space");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    // SAFETY: `ifreq` is an array and a union of plain C data, for which all zero bytes are a value.
    let mut request = unsafe { std::mem::zeroed::<libc::ifreq>() };
    for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *target = byte as libc::c_char;
    }
    Ok(request)
}

/// One interface ioctl that answers in the request.
fn ask(name: &str, what: libc::Ioctl) -> io::Result<libc::ifreq> {
    let mut request = request(name)?;
    let socket = sockopt::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: interface ioctls read and write one `ifreq`, which `request` is, with a terminated name.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut request) };
    if result < 0 {
        let error = io::Error::last_os_error();
        let absent = error.raw_os_error() == Some(libc::ENODEV);
        let kind = if absent { io::ErrorKind::NotFound } else { error.kind() };
        return Err(io::Error::new(kind, format!("interface {name}: {error}")));
    }
    Ok(request)
}

fn in_subnet(ip: IpAddr, addr: IpAddr, prefix: u8) -> bool {
    // Shifting out all bits is the same as comparing none.
    match (ip, addr) {
        (IpAddr::V4(a), IpAddr::V4(b)) => {
            let rest = 32u32.saturating_sub(u32::from(prefix));
            (a.to_bits() ^ b.to_bits()).checked_shr(rest).unwrap_or(0) == 0
        }
        (IpAddr::V6(a), IpAddr::V6(b)) => {
            let rest = 128u32.saturating_sub(u32::from(prefix));
            (a.to_bits() ^ b.to_bits()).checked_shr(rest).unwrap_or(0) == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_is_the_prefix_and_nothing_more() {
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(in_subnet(ip("198.18.3.200"), ip("198.18.3.1"), 24));
        assert!(!in_subnet(ip("198.18.4.200"), ip("198.18.3.1"), 24));
        assert!(in_subnet(ip("203.0.113.1"), ip("198.18.3.1"), 0));
        assert!(!in_subnet(ip("198.18.3.2"), ip("198.18.3.1"), 32));
        assert!(in_subnet(ip("fd00::1:9"), ip("fd00::1:1"), 112));
        assert!(!in_subnet(ip("fd00::2:9"), ip("fd00::1:1"), 112));
        assert!(!in_subnet(ip("fd00::1"), ip("198.18.3.1"), 0));
    }

    #[test]
    fn names_no_interface_may_have_are_refused() {
        for name in ["", "sixteen-bytes-xx", "a/b", "eth0:1", "a b", ".", "..", "nul\0"] {
            assert_eq!(index(name).unwrap_err().kind(), io::ErrorKind::InvalidInput, "{name:?}");
        }
        assert_eq!(index("no-such-iface").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn what_was_received_and_dropped_is_read_by_name() {
        let list = "Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:  840      10    0    0    0     0          0         0      840      10    0    0    0     0       0          0
eth0.7: 1200      20    1    2    3     4          5         6     7000      70    8    9    0     0       0          0
";
        assert_eq!(received_in(list, "eth0.7").unwrap(), 20);
        assert_eq!(dropped_in(list, "eth0.7").unwrap(), 9);
        assert_eq!(received_in(list, "eth0").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(
            received_in("lo: 840", "lo").unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn loopback_is_listed_like_everything_else() {
        let all = interfaces();
        let lo = all.iter().find(|interface| interface.name == "lo").unwrap();
        assert_eq!(name(lo.index).as_deref(), Some("lo"));
        assert_eq!(name(u32::MAX), None);
        let before = frames_received(&[lo.index]).unwrap();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.send_to(b"one", socket.local_addr().unwrap()).unwrap();
        assert!(frames_received(&[lo.index]).unwrap() > before);
        assert_eq!(lo.index, index("lo").unwrap());
        assert_eq!(lo.mtu, mtu("lo").unwrap());
        assert_eq!(lo.mac, None);
        let link = link("lo").unwrap();
        assert_eq!((link.index, link.mac, link.up), (lo.index, lo.mac, lo.up));
    }
}
