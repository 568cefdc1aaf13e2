//! Names of things, as types that cannot be mixed up.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Number of buckets in the hash space of one group.
pub const BUCKETS: usize = 4096;

/// Largest number of nodes in one farm.
pub const MAX_NODES: usize = 64;

/// A configured machine: its position in `cluster.xml`, `0..=63`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(u8);

impl NodeId {
    /// The node at `index` of `cluster.xml`, or `None` past [`MAX_NODES`].
    pub const fn new(index: usize) -> Option<Self> {
        if index < MAX_NODES {
            Some(Self(index as u8))
        } else {
            None
        }
    }

    /// Position in `cluster.xml`.
    pub const fn index(self) -> usize {
        self.0 as usize
    }

    /// The byte that stands for this node on the wire.
    pub const fn as_u8(self) -> u8 {
        self.0
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "n{}", self.0)
    }
}

/// A set of nodes, one bit each. Iterates in ascending order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct NodeSet(u64);

impl NodeSet {
    /// The set of no node.
    pub const EMPTY: Self = Self(0);

    /// The set whose members are the set bits of `bits`.
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }

    /// One bit per member.
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// True if `node` is in the set.
    pub const fn contains(self, node: NodeId) -> bool {
        self.0 & (1 << node.0) != 0
    }

    /// Adds `node`.
    pub const fn insert(&mut self, node: NodeId) {
        self.0 |= 1 << node.0;
    }

    /// Removes `node`.
    pub const fn remove(&mut self, node: NodeId) {
        self.0 &= !(1 << node.0);
    }

    /// Number of members.
    pub const fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// True if there is no member.
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Lowest member.
    pub fn first(self) -> Option<NodeId> {
        self.iter().next()
    }

    /// Members in ascending order.
    pub fn iter(self) -> impl Iterator<Item = NodeId> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            let lowest = (left != 0).then(|| left.trailing_zeros() as u8)?;
            left &= left - 1;
            Some(NodeId(lowest))
        })
    }
}

impl FromIterator<NodeId> for NodeSet {
    fn from_iter<T: IntoIterator<Item = NodeId>>(iter: T) -> Self {
        let mut set = Self::EMPTY;
        for node in iter {
            set.insert(node);
        }
        set
    }
}

impl fmt::Debug for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}

/// Start number of a daemon: larger at each start, so that a late packet of the run before is told
/// from one of this run. Microseconds of wall-clock time at start.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct Incarnation(pub u64);

/// Version of a bucket map: a counter in the upper 56 bits and the proposing node in the lowest 8,
/// so that two coordinators never make the same one. Zero is "no map yet".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Largest counter that is believed: a thousand changes a second reach it in nine thousand years.
    pub const MAX_COUNTER: u64 = 1 << 48;

    /// The first epoch of `coordinator` above `self`.
    pub const fn next(self, coordinator: NodeId) -> Self {
        Self((((self.0 >> 8) + 1) << 8) | coordinator.0 as u64)
    }

    /// The counter without the proposer.
    pub const fn counter(self) -> u64 {
        self.0 >> 8
    }
}

/// One slice of the hash space, `0..4096`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Bucket(u16);

impl Bucket {
    /// The bucket of a 32-bit hash: its highest 12 bits.
    pub const fn of_hash(hash: u32) -> Self {
        Self((hash >> 20) as u16)
    }

    /// Position in a bucket map.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

/// A module's name: 1 to 32 letters, digits, `_`, `-` or `.`, starting with a letter or digit.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ModuleName(String);

/// Why a text is no module name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InvalidModuleName(pub String);

impl fmt::Display for InvalidModuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is no module name: 1 to 32 letters, digits, `_`, `-` or `.` are expected, starting with a letter or digit",
            self.0
        )
    }
}

impl std::error::Error for InvalidModuleName {}

impl ModuleName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for ModuleName {
    type Error = InvalidModuleName;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let fits = (1..=32).contains(&text.len())
            && text.starts_with(|c: char| c.is_ascii_alphanumeric())
            && text
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'));
        if fits {
            Ok(Self(text))
        } else {
            Err(InvalidModuleName(text))
        }
    }
}

impl std::str::FromStr for ModuleName {
    type Err = InvalidModuleName;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::try_from(text.to_owned())
    }
}

impl From<ModuleName> for String {
    fn from(name: ModuleName) -> Self {
        name.0
    }
}

impl fmt::Display for ModuleName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// ff:ff:ff:ff:ff:ff.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// True if the group bit is set (multicast and broadcast).
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for MacAddr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut mac = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut mac {
            let part = parts.next().filter(|p| p.len() == 2);
            *byte = part.and_then(|p| u8::from_str_radix(p, 16).ok()).ok_or_else(|| {
                format!("`{text}` is no Ethernet address, six bytes such as 5a:fe:0a:00:00:14 are expected")
            })?;
        }
        match parts.next() {
            None => Ok(Self(mac)),
            Some(_) => Err(format!("`{text}` is no Ethernet address, it has more than six bytes")),
        }
    }
}

impl TryFrom<String> for MacAddr {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> Self {
        mac.to_string()
    }
}
