//! The tables of the kernel program as `bpf/farm.h` lays them out. Whoever changes one changes the other.

use std::net::IpAddr;

/// Buckets of a group.
pub const BUCKETS: usize = 4096;
/// Plans that have a place at the same time.
pub const SLOTS: u32 = 4;
/// Most virtual addresses of a plan.
pub const MAX_VIPS: u32 = 64;
/// Most groups of a plan.
pub const MAX_GROUPS: u32 = 32;
/// Most pages of rules of a plan; the first is the empty one. Any one address needs 512 at most.
pub const MAX_PAGES: u32 = 1024;
/// Most nodes.
const MAX_NODES: usize = 64;
/// Most virtual addresses of a plan that are found without a hash.
pub const NEAR: usize = 4;
/// Sets of nodes that may have connections in the buckets of a group, and the empty one.
pub const HOLDER_SETS: usize = 256;

/// Stands in the mark of a frame that the program has accepted where it came in; [`crate::nft::install`]'s first rule lets it by and takes it off.
pub const ACCEPTED_MARK: u32 = 0x4641_524d;

pub(super) const CONTROL_LEN: usize = 64;
pub(super) const EPOCH_AT: usize = 0;
pub(super) const LEASE_AT: usize = 8;
pub(super) const SNAP_AT: usize = 40;
pub(super) const UNTOLD_AT: usize = 48;
pub(super) const KEY_LEN: usize = 20;
pub(super) const NEAR_LEN: usize = 104;
pub(super) const VIP_LEN: usize = 40;
pub(super) const PEERS_LEN: usize = 1 + 2 * MAX_NODES;
pub(super) const HOLDERS_LEN: usize = BUCKETS + 8 * HOLDER_SETS;
pub(super) const FRAGMENT_KEY_LEN: usize = 40;
pub(super) const FRAGMENT_LEN: usize = 16;

/// For each of 256 ports a [`rule`], or for each 256 ports the number of a page.
pub type Page = [u16; 256];

/// A counter of the program: its place in [`super::KernelCounters::read`]. The reasons of the core's decision come first, in the core's order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Count {
    /// Dropped, because the lease had ended.
    LeaseEnded = 15,
    /// Sent on to another member.
    Forwarded,
    /// Not sent on: the owner's Ethernet address is not known.
    ForwardUnknown,
    /// Not sent on: the kernel could not.
    ForwardFailed,
    /// Put to farmd.
    Punted,
    /// Dropped, because plans changed too fast under it.
    PlanChanged,
    /// Bytes of frames that were accepted.
    BytesAccepted,
    /// Accepted, but the kernel could not address it to the TAP, or to this host.
    TapFailed,
}

/// Number of counters.
pub const COUNTS: usize = 23;

/// Bits of a bucket.
pub mod bucket {
    /// Owned, nobody else has connections in it.
    pub const OWN: u16 = 0;
    /// Owned, others have connections in it.
    pub const GUARDED: u16 = 1;
    /// Not owned, this host has connections in it.
    pub const DRAINING: u16 = 2;
    /// Not owned.
    pub const FOREIGN: u16 = 3;
    /// Changes hands: what starts something in it is put to farmd.
    pub const LEAVING: u16 = 4;
    /// Has just opened, or is about to close: the same.
    pub const YOUNG: u16 = 8;
    /// Other members have connections in it.
    pub const HELD: u16 = 16;
    /// What this host does not have may be nobody's: farmd asks.
    pub const ASKS: u16 = 32;

    /// `bits` with the owner's number, 0xff for nobody.
    pub const fn owned_by(bits: u16, owner: u8) -> u16 {
        bits | (owner as u16) << 8
    }
}

/// Rules of ports.
pub mod rule {
    /// What the key is made of: the client's address, address and port, network, or the identification of the packet.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub enum Key {
        /// Address.
        Addr = 0,
        /// Address and port.
        Port = 1,
        /// Network.
        Net = 2,
        /// Identification.
        IpId = 3,
    }

    /// No rule.
    pub const NONE: u16 = 0;

    /// The rule that leads to `group` by `key`.
    pub const fn to(group: u16, key: Key) -> u16 {
        1 + (group << 2 | key as u16)
    }
}

/// What is the same in all plans.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Control {
    /// Seed of the flow hash.
    pub seed: (u32, u32),
    /// Index of the TAP.
    pub tap: u32,
    /// Its Ethernet address.
    pub tap_mac: [u8; 6],
    /// Connections may end in containers.
    pub tracked: bool,
    /// What is accepted goes on where it came in, and not through the TAP.
    pub passes_up: bool,
}

impl Control {
    /// Offsets and values.
    pub(super) fn words(&self) -> [(usize, u64); 3] {
        let pair = |low: u32, high: u32| {
            let ([a, b, c, d], [e, f, g, h]) = (low.to_ne_bytes(), high.to_ne_bytes());
            u64::from_ne_bytes([a, b, c, d, e, f, g, h])
        };
        let [a, b, c, d, e, f] = self.tap_mac;
        [
            (16, pair(self.seed.0, self.seed.1)),
            (24, pair(self.tap, self.tracked.into())),
            (32, u64::from_ne_bytes([a, b, c, d, e, f, self.passes_up.into(), 0])),
        ]
    }
}

/// One virtual address.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vip {
    /// Ethernet address to which its frames come.
    pub service_mac: [u8; 6],
    /// This host's own Ethernet address there.
    pub own_mac: [u8; 6],
    /// Frames go on to their owners from here.
    pub directed: bool,
    /// Group whose map places echoes.
    pub entry_group: u16,
    /// This node.
    pub this: u8,
    /// The [`rule`] for what has no ports to tell, of TCP and of UDP; [`rule::NONE`] if there is none.
    pub portless: [u16; 2],
}

impl Vip {
    pub(super) fn to_bytes(&self, epoch: u64) -> [u8; VIP_LEN] {
        let mut bytes = [0; VIP_LEN];
        bytes[0..8].copy_from_slice(&mac_word(self.service_mac).to_ne_bytes());
        bytes[8..16].copy_from_slice(&mac_word(self.own_mac).to_ne_bytes());
        bytes[16..24].copy_from_slice(&epoch.to_ne_bytes());
        bytes[24..26].copy_from_slice(&u16::from(self.directed).to_ne_bytes());
        bytes[26..28].copy_from_slice(&self.entry_group.to_ne_bytes());
        bytes[28..32].copy_from_slice(&u32::from(self.this).to_ne_bytes());
        bytes[32..34].copy_from_slice(&self.portless[0].to_ne_bytes());
        bytes[34..36].copy_from_slice(&self.portless[1].to_ne_bytes());
        bytes
    }
}

/// The other members on an interface: node number and Ethernet address.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Peers(pub Vec<(u8, [u8; 6])>);

impl Peers {
    pub(super) fn to_words(&self) -> [u64; PEERS_LEN] {
        let mut words = [0; PEERS_LEN];
        let known = || self.0.iter().take(MAX_NODES);
        words[0] = known().count() as u64;
        for (i, (node, mac)) in known().enumerate() {
            words[1 + i] = mac_word(*mac);
            if let Some(word) = words.get_mut(1 + MAX_NODES + usize::from(*node)) {
                *word = mac_word(*mac);
            }
        }
        words
    }
}

/// Who else has connections in the buckets of a group.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Holders {
    /// Of each bucket the number of its set, 0 if it is not here.
    pub numbers: Box<[u8; BUCKETS]>,
    /// The sets, a bit for each node; the first is none.
    pub sets: Vec<u64>,
}

impl Default for Holders {
    fn default() -> Self {
        Self {
            numbers: Box::new([0; BUCKETS]),
            sets: vec![0],
        }
    }
}

impl Holders {
    pub(super) fn to_bytes(&self) -> Box<[u8; HOLDERS_LEN]> {
        let mut bytes = Box::new([0; HOLDERS_LEN]);
        bytes[..BUCKETS].copy_from_slice(&self.numbers[..]);
        for (word, set) in bytes[BUCKETS..].chunks_exact_mut(8).zip(&self.sets) {
            word.copy_from_slice(&set.to_ne_bytes());
        }
        bytes
    }
}

/// What makes fragments one datagram: source, destination, protocol (of IPv6 always 44) and identification.
pub type Datagram = (IpAddr, IpAddr, u8, u32);

pub(super) fn fragment_key((source, destination, protocol, identification): Datagram) -> [u8; FRAGMENT_KEY_LEN] {
    let mut key = [0; FRAGMENT_KEY_LEN];
    // An IPv4 source stands alone in its last word.
    match source {
        IpAddr::V4(v4) => key[12..16].copy_from_slice(&v4.octets()),
        IpAddr::V6(v6) => key[..16].copy_from_slice(&v6.octets()),
    }
    key[16..32].copy_from_slice(&mapped(destination));
    key[32..36].copy_from_slice(&identification.to_ne_bytes());
    key[36..40].copy_from_slice(&u32::from(protocol).to_ne_bytes());
    key
}

/// What the first fragment of a datagram carried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FirstFragment {
    /// When the program saw it, in nanoseconds of [`BootInstant`](crate::clock::BootInstant).
    pub seen: u64,
    /// Protocol of what it carried.
    pub protocol: u8,
    /// Ports of TCP and UDP.
    pub source_port: u16,
    /// As above.
    pub destination_port: u16,
    /// It opens a TCP connection.
    pub opens: bool,
}

impl FirstFragment {
    pub(super) fn from_bytes(bytes: &[u8; FRAGMENT_LEN]) -> Self {
        /// As `bpf/frame.h` numbers it.
        const OPENING_TCP: u8 = 1;
        let [a, b, c, d, e, f, g, h, s0, s1, d0, d1, protocol, kind, _, _] = *bytes;
        Self {
            seen: u64::from_ne_bytes([a, b, c, d, e, f, g, h]),
            protocol,
            source_port: u16::from_ne_bytes([s0, s1]),
            destination_port: u16::from_ne_bytes([d0, d1]),
            opens: kind == OPENING_TCP,
        }
    }
}

/// Six bytes as a number, the first the lowest.
fn mac_word([a, b, c, d, e, f]: [u8; 6]) -> u64 {
    u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
}

/// IPv4 as mapped into IPv6.
fn mapped(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// The first virtual addresses of a plan: interface, address and number. `is_whole`: there are no others.
pub(super) fn near(vips: &[(u32, IpAddr, u32)], is_whole: bool) -> [u8; NEAR_LEN] {
    let mut bytes = [0; NEAR_LEN];
    let vips = &vips[..vips.len().min(NEAR)];
    bytes[..4].copy_from_slice(&(vips.len() as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&u32::from(is_whole).to_ne_bytes());
    let (numbers, keys) = bytes[8..].split_at_mut(4 * NEAR);
    let places = numbers.chunks_exact_mut(4).zip(keys.chunks_exact_mut(KEY_LEN));
    for ((number, key), (ifindex, addr, known)) in places.zip(vips) {
        number.copy_from_slice(&known.to_ne_bytes());
        key.copy_from_slice(&vip_key(*ifindex, *addr));
    }
    bytes
}

pub(super) fn vip_key(ifindex: u32, addr: IpAddr) -> [u8; KEY_LEN] {
    let mut key = [0; KEY_LEN];
    key[..4].copy_from_slice(&ifindex.to_ne_bytes());
    key[4..].copy_from_slice(&mapped(addr));
    key
}
