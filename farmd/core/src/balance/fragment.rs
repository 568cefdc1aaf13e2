//! What first fragments carried, so that the later ones are judged alike.
//!
//! The program in the kernel has such a table of its own (`FRAGMENTS` in `farmd/sys/bpf`), keyed alike.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::wire::packet::{L4, Packet};

/// Most datagrams remembered; the oldest goes first.
const CAPACITY: usize = 1024;
/// How long: the reassembly time of Linux (`ipfrag_time`), after which the kernel gives up too.
pub const LIFETIME: Duration = Duration::from_secs(30);

/// Source, destination, protocol, identification: what makes fragments one datagram (RFC 791 section 3.2). Fragments of IPv6 may name different
/// protocols (RFC 8200 section 4.5), so that theirs is always that of the fragment header.
pub type Key = (IpAddr, IpAddr, u8, u32);

/// Protocol number of the IPv6 fragment header.
const FRAGMENT_HEADER: u8 = 44;

/// Bounded memory of first fragments.
#[derive(Debug, Default)]
pub struct FragmentTable {
    firsts: BTreeMap<Key, L4>,
    order: VecDeque<(Duration, Key)>,
}

/// The datagram that a fragment belongs to.
pub fn key(packet: &Packet) -> Key {
    let protocol = match packet.destination {
        IpAddr::V4(_) => packet.protocol,
        IpAddr::V6(_) => FRAGMENT_HEADER,
    };
    (packet.source, packet.destination, protocol, packet.identification)
}

impl FragmentTable {
    /// Notes that the first fragment of `packet`'s datagram carries `l4`.
    pub fn remember(&mut self, now: Duration, packet: &Packet, l4: L4) {
        self.expire(now);
        if self.order.len() >= CAPACITY
            && let Some((_, oldest)) = self.order.pop_front()
        {
            self.firsts.remove(&oldest);
        }
        if self.firsts.insert(key(packet), l4).is_none() {
            self.order.push_back((now, key(packet)));
        }
    }

    /// What the first fragment of `packet`'s datagram carries.
    pub fn recall(&mut self, now: Duration, packet: &Packet) -> Option<L4> {
        self.expire(now);
        self.firsts.get(&key(packet)).copied()
    }

    fn expire(&mut self, now: Duration) {
        while let Some((seen, oldest)) = self.order.front()
            && *seen + LIFETIME < now
        {
            self.firsts.remove(oldest);
            self.order.pop_front();
        }
    }
}
