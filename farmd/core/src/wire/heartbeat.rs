//! The one datagram of the protocol: a node's state, in full, authenticated.
//!
//! A node says in each heartbeat all the others need to know: whom it hears, what it has promised and committed for
//! each group, and, while somebody lacks it, the bucket map itself. Losing a heartbeat therefore loses nothing but time; a
//! change is sent at once and repeated at every pulse.
//!
//! ```text
//! magic "FARM" (4), version = 6 (1), sender (1), lan (1), flags (1), beat (2),
//! incarnation (8), sequence number (8), digest of cluster.xml (8),
//! hears: node set (8), and for each node in it, ascending: ack (3),
//! with X: excludes: node set (8),
//! with E: echo { node (1), ack (3), kept for microseconds (3) },
//! with H: n (1), n x hearsay { node (1), flags (1), incarnation (8), sequence number (8),
//!   age in microseconds (4), hears: node set (8) },
//! with P: n (1), n x relayed { node (1), incarnation (8), sequence number (8), n (1), n x module },
//! n (1), n x module { name: text, configuration digest (8), state (1), quality (1), flags (1),
//!   with S: runs: node set (8),
//!   why: text, n (1), n x Ethernet address (6),
//!   n (1), n x group { weight (2), committed (8), open buckets (2), flags (1),
//!     with P: promised (8),
//!     with B: held buckets (512), connections in them (4),
//!     with M: epoch (8), view: node set (8), map } },
//! n (1), n x requester { vip: address, address, Ethernet address (6) },
//! tag (16): first half of HMAC-SHA-256 over "farm datagram 1" and all of the above
//!
//! flags, bit 0 the least significant  0         1          2          3       4          5                    6           7
//!   of the heartbeat                  F fenced  L leaving  J joining  E echo  H hearsay  R leaving to return  X excludes  P relayed
//!   of a hearsay                      J joining  L leaving
//!   of a module                       J joining  S sets     W withheld
//!   of a group                        B held     M map      D behind   P promised
//! ```
//!
//! Numbers are big endian; *beat* counts the datagrams that went to everybody; a *sequence number* begins at a number that follows from the incarnation, and an
//! *ack* is the low 24 bits of one. A text is its length (1) and UTF-8; an address is 4 or 6 (1) and 4 or 16 bytes. A bucket map is a count of runs (2) and these,
//! `{ owner (1), length - 1 (2) }`, or, if they were no shorter, a count of 0 and an owner for each bucket (4096). `farmd/docs/PROTOCOL.md`, "One datagram", has
//! the codes, units and limits; a test compares all of it byte by byte. Parsing never panics; what it refuses stands there too.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::api::{ModuleState, Quality};
use crate::balance::assign::BucketMap;
use crate::config::MAX_MODULES;
use crate::id::{BUCKETS, Epoch, Incarnation, MAX_NODES, MacAddr, ModuleName, NodeId, NodeSet};
use crate::wire::auth::ClusterKey;
use crate::wire::codec::{Reader, Writer};

/// First bytes of every datagram.
const MAGIC: &[u8; 4] = b"FARM";
/// Version of this format; another one is refused and counted.
const VERSION: u8 = 6;
/// Longest datagram, in bytes: what UDP over IPv4 can carry.
pub const MAX_DATAGRAM: usize = 65_507;
/// Most requesters that one heartbeat carries.
pub const MAX_REQUESTERS: usize = 8;

/// A set of buckets.
#[derive(Clone, PartialEq, Eq)]
pub struct BucketSet(Box<[u8; BUCKETS / 8]>);

impl Default for BucketSet {
    fn default() -> Self {
        Self(Box::new([0; BUCKETS / 8]))
    }
}

impl fmt::Debug for BucketSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BucketSet({})", self.len())
    }
}

impl BucketSet {
    /// A set from one bit per bucket, the lowest first.
    pub fn from_bytes(bytes: [u8; BUCKETS / 8]) -> Self {
        Self(Box::new(bytes))
    }

    /// One bit per bucket.
    pub fn as_bytes(&self) -> &[u8; BUCKETS / 8] {
        &self.0
    }

    /// True if the bucket at `index` is in the set.
    pub fn contains(&self, index: usize) -> bool {
        self.0[index / 8] & (1 << (index % 8)) != 0
    }

    /// Adds the bucket at `index`.
    pub fn insert(&mut self, index: usize) {
        self.0[index / 8] |= 1 << (index % 8);
    }

    /// Number of buckets in the set.
    pub fn len(&self) -> usize {
        self.0.iter().map(|b| b.count_ones() as usize).sum()
    }

    /// True if all of these are in `one` or `other`.
    pub fn is_within(&self, one: &Self, other: &Self) -> bool {
        let sets = self.0.iter().zip(one.0.iter().zip(other.0.iter()));
        sets.fold(0, |outside, (bits, (one, other))| outside | bits & !one & !other) == 0
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        *self.0 == [0; BUCKETS / 8]
    }

    /// Those that are in `other` too.
    pub fn and(&self, other: &Self) -> Self {
        let mut both = self.clone();
        both.0
            .iter_mut()
            .zip(other.0.iter())
            .for_each(|(bits, other)| *bits &= other);
        both
    }

    /// Members in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = usize> {
        let bytes = self.0.iter().enumerate().filter(|(_, byte)| **byte != 0);
        bytes.flat_map(|(i, byte)| {
            (0..8)
                .filter(move |bit| byte & (1 << bit) != 0)
                .map(move |bit| i * 8 + bit)
        })
    }
}

impl FromIterator<usize> for BucketSet {
    fn from_iter<T: IntoIterator<Item = usize>>(iter: T) -> Self {
        let mut set = Self::default();
        for index in iter {
            set.insert(index);
        }
        set
    }
}

/// Somebody who asked for a VIP's Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Requester {
    /// The VIP asked for.
    pub vip: IpAddr,
    /// Who asked.
    pub addr: IpAddr,
    /// From which Ethernet address.
    pub mac: MacAddr,
}

/// A bucket map that the sender proposes, or has committed.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct MapReport {
    /// Version of the map.
    pub epoch: Epoch,
    /// The view it is made for.
    pub view: NodeSet,
    /// Owners.
    pub map: BucketMap,
}

/// What a node says of one group.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct GroupReport {
    /// Share it should take; 0 while it is not ready.
    pub weight: u16,
    /// Highest epoch for which it has released what it loses; as a rule that of `committed`, and above it where a promise was withdrawn.
    pub promised: Epoch,
    /// Epoch of the map it works with.
    pub committed: Epoch,
    /// Its data plane does not yet work with that map.
    pub behind: bool,
    /// Buckets it has open.
    pub open: u16,
    /// Buckets it does not own but has connections in.
    pub held: BucketSet,
    /// Connections in those buckets.
    pub held_connections: u32,
    /// The map with epoch `promised` or `committed`, while a peer lacks it.
    pub map: Option<MapReport>,
}

/// What a node says of one module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ModuleReport {
    /// The module.
    pub name: ModuleName,
    /// Digest of the configuration all nodes must share.
    pub digest: u64,
    /// State of its machine.
    pub state: ModuleState,
    /// And how far it is.
    pub quality: Quality,
    /// It has just left STOP and cannot know yet on which other nodes it runs.
    pub joining: bool,
    /// By its partition policy it does not serve: it takes nothing, and no part in what the others agree on.
    pub withheld: bool,
    /// Nodes on which it is not in STOP, as far as the sender hears them; told while two nodes of its view do not hear each other.
    pub runs: NodeSet,
    /// Why it is not UP Ready.
    pub why: String,
    /// Ethernet address of each of its service interfaces, in file order.
    pub macs: Vec<MacAddr>,
    /// One report per group, in file order.
    pub groups: Vec<GroupReport>,
}

impl ModuleReport {
    /// True if the module may hold buckets: it is not in STOP.
    pub fn active(&self) -> bool {
        self.state != ModuleState::Stop
    }
}

/// Names a heartbeat of one node: the low 24 bits of its sequence number.
///
/// Sequence numbers of different incarnations begin at unrelated numbers, so that the acknowledgement of one is not taken for that of
/// another; what was sent a while ago is not remembered, so that a recording acknowledges nothing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Ack(u32);

impl Ack {
    /// The one of `seq`.
    pub const fn of(seq: u64) -> Self {
        Self(seq as u32 & 0xff_ffff)
    }

    /// Its 24 bits.
    pub const fn bits(self) -> u32 {
        self.0
    }
}

/// Tells one peer how long its heartbeat was kept until this datagram left, so that it can take its round trip.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Echo {
    /// Whom.
    pub node: NodeId,
    /// The newest heartbeat of it that came in on this lan.
    pub ack: Ack,
    /// Time since then in microseconds, 16.7 s at most.
    pub kept_us: u32,
}

impl Echo {
    /// Bytes of it in a datagram.
    pub const LENGTH: usize = 7;
}

/// What a node has said of itself, passed on by another one for those that do not hear it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hearsay {
    /// Who has said it.
    pub node: NodeId,
    /// Its start number then.
    pub incarnation: Incarnation,
    /// The number of its heartbeat.
    pub seq: u64,
    /// Microseconds since the first that passes it on has heard it, the ways between not counted.
    pub age_us: u32,
    /// It had just started.
    pub joining: bool,
    /// It was about to end.
    pub leaving: bool,
    /// Whom it heard.
    pub hears: NodeSet,
}

/// What a node has said of its modules, passed on by another one for a node that does not hear it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Relayed {
    /// Who has said it.
    pub node: NodeId,
    /// Its start number then.
    pub incarnation: Incarnation,
    /// The number of its heartbeat.
    pub seq: u64,
    /// What it has said.
    pub modules: Vec<ModuleReport>,
}

impl Relayed {
    /// Bytes of it in a datagram.
    pub fn length(&self) -> usize {
        let mut w = Writer(Vec::new());
        w.relayed(self);
        w.0.len()
    }
}

/// A node's state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Heartbeat {
    /// Who sends.
    pub sender: NodeId,
    /// On which lan (position in `cluster.xml`).
    pub lan: u8,
    /// It has stepped out and accepts nothing.
    pub fenced: bool,
    /// It is about to end; nothing is open any more.
    pub leaving: bool,
    /// It is leaving to be back at once, with its connections: farmd is restarted in place.
    pub returning: bool,
    /// It has just started and does not yet know who else is there.
    pub joining: bool,
    /// Start number of the sender.
    pub incarnation: Incarnation,
    /// Rises with each datagram of this incarnation.
    pub seq: u64,
    /// Rises with each datagram that goes to every peer; what is missing was lost.
    pub beat: u16,
    /// Digest of its `cluster.xml`.
    pub cluster_digest: u64,
    /// Whom it hears now, with the newest heartbeat of each. A node that finds one of its own here that it sent lately knows that it is
    /// heard, and that this datagram is not a recording.
    pub hears: Vec<(NodeId, Ack)>,
    /// Nodes it would have in its view if only all could hear them: these have to step out.
    pub excludes: NodeSet,
    /// To one peer on this lan, in turn.
    pub echo: Option<Echo>,
    /// What it knows of the others, while some node of which it knows does not hear another.
    pub hearsay: Vec<Hearsay>,
    /// What others say of their modules, for those that do not hear them.
    pub relayed: Vec<Relayed>,
    /// Its modules.
    pub modules: Vec<ModuleReport>,
    /// Some requesters it knows, in turn.
    pub requesters: Vec<Requester>,
}

impl Heartbeat {
    /// The nodes the sender hears.
    pub fn hears_set(&self) -> NodeSet {
        self.hears.iter().map(|(node, _)| *node).collect()
    }

    /// The newest heartbeat of `node` that the sender has heard, if it hears it.
    pub fn acks(&self, node: NodeId) -> Option<Ack> {
        self.hears.iter().find(|(n, _)| *n == node).map(|(_, ack)| *ack)
    }
}

/// Why a datagram is no heartbeat of this cluster.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ParseError {
    /// The tag is wrong: another key, or not from a farm.
    Authentication,
    /// Authentic, but of another version of the format.
    Version(u8),
    /// Authentic, but not in the format; a bug on the other side.
    Malformed(&'static str),
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Authentication => f.write_str("not authentic: the sender has another cluster key"),
            Self::Version(v) => write!(f, "format version {v}, this node speaks version {VERSION}"),
            Self::Malformed(what) => write!(f, "malformed {what}"),
        }
    }
}

impl std::error::Error for ParseError {}

impl Heartbeat {
    /// The sealed datagram.
    pub fn emit(&self, key: &ClusterKey) -> Vec<u8> {
        let mut w = Writer(Vec::with_capacity(512));
        w.bytes(MAGIC);
        w.u8(VERSION);
        w.u8(self.sender.as_u8());
        w.u8(self.lan);
        w.u8(u8::from(self.fenced)
            | u8::from(self.leaving) << 1
            | u8::from(self.joining) << 2
            | u8::from(self.echo.is_some()) << 3
            | u8::from(!self.hearsay.is_empty()) << 4
            | u8::from(self.returning) << 5
            | u8::from(!self.excludes.is_empty()) << 6
            | u8::from(!self.relayed.is_empty()) << 7);
        w.u16(self.beat);
        w.u64(self.incarnation.0);
        w.u64(self.seq);
        w.u64(self.cluster_digest);
        w.hears(&self.hears);
        if !self.excludes.is_empty() {
            w.u64(self.excludes.bits());
        }
        if let Some(echo) = self.echo {
            w.u8(echo.node.as_u8());
            w.u24(echo.ack.bits());
            w.u24(echo.kept_us.min(0xff_ffff));
        }
        if !self.hearsay.is_empty() {
            w.list(&self.hearsay, MAX_NODES, Writer::hearsay);
        }
        if !self.relayed.is_empty() {
            w.list(&self.relayed, MAX_NODES, Writer::relayed);
        }
        w.list(&self.modules, MAX_MODULES, Writer::module);
        w.list(&self.requesters, MAX_REQUESTERS, |w, r| {
            w.addr(r.vip);
            w.addr(r.addr);
            w.bytes(&r.mac.0);
        });
        key.seal(&mut w.0);
        w.0
    }

    /// Checks the tag and reads the datagram.
    pub fn parse(key: &ClusterKey, sealed: &[u8]) -> Result<Self, ParseError> {
        let mut r = Reader(key.open(sealed).ok_or(ParseError::Authentication)?);
        if r.take(4)? != MAGIC {
            return Err(ParseError::Malformed("magic"));
        }
        match r.u8()? {
            VERSION => {}
            other => return Err(ParseError::Version(other)),
        }
        let sender = r.node()?;
        let lan = r.u8()?;
        let flags = r.u8()?;
        let beat = r.u16()?;
        let heartbeat = Self {
            sender,
            lan,
            fenced: flags & 1 != 0,
            leaving: flags & 2 != 0,
            returning: flags & 32 != 0,
            joining: flags & 4 != 0,
            incarnation: Incarnation(r.u64()?),
            seq: r.u64()?,
            beat,
            cluster_digest: r.u64()?,
            hears: r.hears()?,
            excludes: match flags & 64 {
                0 => NodeSet::EMPTY,
                _ => NodeSet::from_bits(r.u64()?),
            },
            echo: match flags & 8 {
                0 => None,
                _ => Some(Echo {
                    node: r.node()?,
                    ack: r.ack()?,
                    kept_us: r.u24()?,
                }),
            },
            hearsay: match flags & 16 {
                0 => Vec::new(),
                _ => r.list(MAX_NODES, Reader::hearsay)?,
            },
            relayed: match flags & 128 {
                0 => Vec::new(),
                _ => r.list(MAX_NODES, Reader::relayed)?,
            },
            modules: r.list(MAX_MODULES, Reader::module)?,
            requesters: r.list(MAX_REQUESTERS, |r| {
                Ok(Requester {
                    vip: r.addr()?,
                    addr: r.addr()?,
                    mac: r.mac()?,
                })
            })?,
        };
        if r.0.is_empty() {
            Ok(heartbeat)
        } else {
            Err(ParseError::Malformed("length"))
        }
    }
}

#[cfg(test)]
mod tests;
