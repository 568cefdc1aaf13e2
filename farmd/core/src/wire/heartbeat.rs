//! The one datagram of the protocol: a node's state, in full, authenticated.
//!
//! A node says in each heartbeat all the others need to know: whom it hears, what it has promised and committed for
//! each group, and, while somebody lacks it, the bucket map itself. Losing a heartbeat therefore loses nothing but time; a
//! change is sent at once and repeated at every pulse.
//!
//! ```text
//!  0                   1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-------+-------+-------+-------+---------------+---------------+
//! |  'F'     'A'     'R'     'M'  |  version = 1  |    sender     |
//! +---------------+---------------+---------------+---------------+
//! |      lan      | F L J 0 0 0 0 0 |  F fenced, L leaving, J joining
//! +---------------+---------------+-------------------------------+
//! | incarnation (8) | sequence (8) | cluster digest (8)           |
//! +---------------------------------------------------------------+
//! | excludes: one bit per node (8)                                |
//! +---------------------------------------------------------------+
//! | n | n x { node (1), incarnation heard, low 32 bits (4) }      |
//! +---------------------------------------------------------------+
//! | n | n x module report                                         |
//! +---------------------------------------------------------------+
//! | n | n x requester { vip, address, Ethernet address (6) }      |
//! +---------------------------------------------------------------+
//! | tag: first 16 bytes of HMAC-SHA-256 over all of the above     |
//! +---------------------------------------------------------------+
//! ```
//!
//! Numbers are big endian; a text is its length (1) and UTF-8; an address is 4 or 6 and 4 or 16 bytes. A bucket map travels as runs
//! `{ owner (1), length - 1 (2) }` or plainly, whichever is shorter. Parsing never panics and accepts nothing that
//! [`Heartbeat::emit`] could not have written, except for unknown flag bits.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::api::{ModuleState, Quality};
use crate::balance::assign::BucketMap;
use crate::id::{BUCKETS, Epoch, Incarnation, MacAddr, ModuleName, NodeId, NodeSet};
use crate::wire::auth::ClusterKey;

/// First bytes of every datagram.
const MAGIC: &[u8; 4] = b"FARM";
/// Version of this format; another one is refused and counted.
const VERSION: u8 = 1;
/// Longest text in a report, in bytes; longer ones are cut.
const MAX_TEXT: usize = 160;
/// Most modules, groups of a module, and requesters in a datagram.
use crate::config::{MAX_GROUPS, MAX_MODULES};
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
    /// True if the bucket at `index` is in the set.
    pub fn contains(&self, index: usize) -> bool {
        self.0[index / 8] & (1 << (index % 8)) != 0
    }

    /// Adds the bucket at `index`.
    pub fn insert(&mut self, index: usize) {
        self.0[index / 8] |= 1 << (index % 8);
    }

    /// One bit per bucket, the lowest first.
    pub fn as_bytes(&self) -> &[u8; BUCKETS / 8] {
        &self.0
    }

    /// Number of buckets in the set.
    pub fn len(&self) -> usize {
        self.0.iter().map(|b| b.count_ones() as usize).sum()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|&b| b == 0)
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
#[derive(Clone, PartialEq, Eq, Debug)]
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
    /// Highest epoch for which it has released what it loses.
    pub promised: Epoch,
    /// Epoch of the map it works with.
    pub committed: Epoch,
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
    /// It has just started and does not yet know who else is there.
    pub joining: bool,
    /// Start number of the sender.
    pub incarnation: Incarnation,
    /// Rises with each datagram of this incarnation.
    pub seq: u64,
    /// Digest of its `cluster.xml`.
    pub cluster_digest: u64,
    /// Whom it hears now, with the low half of the incarnation heard. A node that finds its own present incarnation here knows that it is
    /// heard, and that this datagram is not a recording.
    pub hears: Vec<(NodeId, u32)>,
    /// Nodes it would have in its view if only all could hear them: these have to step out.
    pub excludes: NodeSet,
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

    /// The incarnation of `node` that the sender hears, its low half.
    pub fn hears_incarnation(&self, node: NodeId) -> Option<u32> {
        self.hears.iter().find(|(n, _)| *n == node).map(|(_, i)| *i)
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
        w.u8(u8::from(self.fenced) | u8::from(self.leaving) << 1 | u8::from(self.joining) << 2);
        w.u64(self.incarnation.0);
        w.u64(self.seq);
        w.u64(self.cluster_digest);
        w.u64(self.excludes.bits());
        w.list(&self.hears, crate::id::MAX_NODES, |w, (node, incarnation)| {
            w.u8(node.as_u8());
            w.u32(*incarnation);
        });
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
        let heartbeat = Self {
            sender,
            lan,
            fenced: flags & 1 != 0,
            leaving: flags & 2 != 0,
            joining: flags & 4 != 0,
            incarnation: Incarnation(r.u64()?),
            seq: r.u64()?,
            cluster_digest: r.u64()?,
            excludes: NodeSet::from_bits(r.u64()?),
            hears: r.list(crate::id::MAX_NODES, |r| Ok((r.node()?, r.u32()?)))?,
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

struct Writer(Vec<u8>);

impl Writer {
    fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    fn u8(&mut self, v: u8) {
        self.0.push(v);
    }

    fn u16(&mut self, v: u16) {
        self.bytes(&v.to_be_bytes());
    }

    fn u32(&mut self, v: u32) {
        self.bytes(&v.to_be_bytes());
    }

    fn u64(&mut self, v: u64) {
        self.bytes(&v.to_be_bytes());
    }

    fn text(&mut self, text: &str) {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.u8(end as u8);
        self.bytes(&text.as_bytes()[..end]);
    }

    fn addr(&mut self, addr: IpAddr) {
        match addr {
            IpAddr::V4(v4) => {
                self.u8(4);
                self.bytes(&v4.octets());
            }
            IpAddr::V6(v6) => {
                self.u8(6);
                self.bytes(&v6.octets());
            }
        }
    }

    fn list<T>(&mut self, items: &[T], most: usize, mut each: impl FnMut(&mut Self, &T)) {
        let n = items.len().min(most);
        self.u8(n as u8);
        for item in &items[..n] {
            each(self, item);
        }
    }

    fn module(&mut self, m: &ModuleReport) {
        self.text(m.name.as_str());
        self.u64(m.digest);
        self.u8(match m.state {
            ModuleState::Stop => 0,
            ModuleState::Wait => 1,
            ModuleState::Up => 2,
        });
        self.u8(match m.quality {
            Quality::NotReady => 0,
            Quality::Transient => 1,
            Quality::Ready => 2,
        });
        self.u8(m.joining.into());
        self.text(&m.why);
        self.list(&m.macs, MAX_GROUPS, |w, mac| w.bytes(&mac.0));
        self.list(&m.groups, MAX_GROUPS, Self::group);
    }

    fn group(&mut self, g: &GroupReport) {
        self.u16(g.weight);
        self.u64(g.promised.0);
        self.u64(g.committed.0);
        self.u16(g.open);
        let held = !g.held.is_empty();
        self.u8(u8::from(held) | u8::from(g.map.is_some()) << 1);
        if held {
            self.bytes(&g.held.0[..]);
            self.u32(g.held_connections);
        }
        if let Some(map) = &g.map {
            self.u64(map.epoch.0);
            self.u64(map.view.bits());
            self.map(&map.map);
        }
    }

    fn map(&mut self, map: &BucketMap) {
        let mut runs: Vec<(u8, u16)> = Vec::new();
        for &owner in map.as_bytes() {
            match runs.last_mut() {
                Some((last, length)) if *last == owner => *length += 1,
                _ => runs.push((owner, 0)),
            }
        }
        if runs.len() * 3 < BUCKETS {
            self.u16(runs.len() as u16);
            for (owner, length) in runs {
                self.u8(owner);
                self.u16(length);
            }
        } else {
            self.u16(0);
            self.bytes(map.as_bytes());
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], ParseError> {
        let (head, tail) = self.0.split_at_checked(n).ok_or(ParseError::Malformed("length"))?;
        self.0 = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(ParseError::Malformed("length"))?;
        self.0 = tail;
        Ok(*head)
    }

    fn u8(&mut self) -> Result<u8, ParseError> {
        self.array::<1>().map(|[b]| b)
    }

    fn u16(&mut self) -> Result<u16, ParseError> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, ParseError> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, ParseError> {
        self.array().map(u64::from_be_bytes)
    }

    /// One past the limit would never be topped again by an honest node.
    fn epoch(&mut self) -> Result<Epoch, ParseError> {
        let epoch = Epoch(self.u64()?);
        let proposer = usize::from(epoch.0 as u8);
        let fits = epoch.counter() < Epoch::MAX_COUNTER && proposer < crate::id::MAX_NODES;
        fits.then_some(epoch).ok_or(ParseError::Malformed("epoch"))
    }

    fn node(&mut self) -> Result<NodeId, ParseError> {
        NodeId::new(self.u8()?.into()).ok_or(ParseError::Malformed("node"))
    }

    fn mac(&mut self) -> Result<MacAddr, ParseError> {
        self.array().map(MacAddr)
    }

    fn text(&mut self) -> Result<String, ParseError> {
        let n = self.u8()?;
        let bytes = self.take(n.into())?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| ParseError::Malformed("text"))
    }

    fn addr(&mut self) -> Result<IpAddr, ParseError> {
        match self.u8()? {
            4 => Ok(IpAddr::from(self.array::<4>()?)),
            6 => Ok(IpAddr::from(self.array::<16>()?)),
            _ => Err(ParseError::Malformed("address family")),
        }
    }

    fn list<T>(
        &mut self,
        most: usize,
        mut each: impl FnMut(&mut Self) -> Result<T, ParseError>,
    ) -> Result<Vec<T>, ParseError> {
        let n = usize::from(self.u8()?);
        if n > most {
            return Err(ParseError::Malformed("count"));
        }
        (0..n).map(|_| each(self)).collect()
    }

    fn module(&mut self) -> Result<ModuleReport, ParseError> {
        Ok(ModuleReport {
            name: ModuleName::try_from(self.text()?).map_err(|_| ParseError::Malformed("module name"))?,
            digest: self.u64()?,
            state: match self.u8()? {
                0 => ModuleState::Stop,
                1 => ModuleState::Wait,
                2 => ModuleState::Up,
                _ => return Err(ParseError::Malformed("module state")),
            },
            quality: match self.u8()? {
                0 => Quality::NotReady,
                1 => Quality::Transient,
                2 => Quality::Ready,
                _ => return Err(ParseError::Malformed("quality")),
            },
            joining: match self.u8()? {
                0 => false,
                1 => true,
                _ => return Err(ParseError::Malformed("module flag")),
            },
            why: self.text()?,
            macs: self.list(MAX_GROUPS, Self::mac)?,
            groups: self.list(MAX_GROUPS, Self::group)?,
        })
    }

    fn group(&mut self) -> Result<GroupReport, ParseError> {
        let weight = self.u16()?;
        let promised = self.epoch()?;
        let committed = self.epoch()?;
        let open = self.u16()?;
        let flags = self.u8()?;
        let (held, held_connections) = if flags & 1 != 0 {
            (BucketSet(Box::new(self.array()?)), self.u32()?)
        } else {
            (BucketSet::default(), 0)
        };
        let map = if flags & 2 != 0 {
            Some(MapReport {
                epoch: self.epoch()?,
                view: NodeSet::from_bits(self.u64()?),
                map: self.map()?,
            })
        } else {
            None
        };
        Ok(GroupReport {
            weight,
            promised,
            committed,
            open,
            held,
            held_connections,
            map,
        })
    }

    fn map(&mut self) -> Result<BucketMap, ParseError> {
        let runs = self.u16()?;
        let owners = if runs == 0 {
            Box::new(self.array::<BUCKETS>()?)
        } else {
            let mut owners = Vec::with_capacity(BUCKETS);
            for _ in 0..runs {
                let owner = self.u8()?;
                let length = usize::from(self.u16()?) + 1;
                if owners.len() + length > BUCKETS {
                    return Err(ParseError::Malformed("bucket map"));
                }
                owners.resize(owners.len() + length, owner);
            }
            owners
                .into_boxed_slice()
                .try_into()
                .map_err(|_| ParseError::Malformed("bucket map"))?
        };
        BucketMap::from_bytes(owners).ok_or(ParseError::Malformed("bucket map"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::balance::assign::assign;

    fn key() -> ClusterKey {
        ClusterKey::from_bytes([1; 32])
    }

    fn sample(nodes: usize, with_map: bool) -> Heartbeat {
        let ids: Vec<NodeId> = (0..nodes).filter_map(NodeId::new).collect();
        let weights: BTreeMap<_, _> = ids.iter().map(|n| (*n, 1)).collect();
        let map = assign(&BucketMap::default(), &weights);
        Heartbeat {
            sender: ids[0],
            lan: 0,
            fenced: false,
            leaving: false,
            joining: true,
            incarnation: Incarnation(77),
            seq: 5,
            cluster_digest: 0xdead,
            excludes: NodeSet::from_bits(4),
            hears: ids.iter().map(|n| (*n, 9)).collect(),
            modules: vec![ModuleReport {
                name: "web".parse().unwrap(),
                digest: 3,
                state: ModuleState::Up,
                quality: Quality::Ready,
                joining: true,
                why: "é".repeat(200),
                macs: vec![MacAddr([2; 6])],
                groups: vec![GroupReport {
                    weight: 1,
                    promised: Epoch(0x100),
                    committed: Epoch(0x100),
                    open: 77,
                    held: [1, 4095].into_iter().collect(),
                    held_connections: 2,
                    map: with_map.then(|| MapReport {
                        epoch: Epoch(0x100),
                        view: ids.iter().copied().collect(),
                        map,
                    }),
                }],
            }],
            requesters: vec![Requester {
                vip: "198.18.0.20".parse().unwrap(),
                addr: "2001:db8::1".parse().unwrap(),
                mac: MacAddr::BROADCAST,
            }],
        }
    }

    #[test]
    fn what_is_emitted_is_read_back() {
        for (nodes, with_map) in [(1, false), (3, true), (64, true)] {
            let sent = sample(nodes, with_map);
            let mut read = Heartbeat::parse(&key(), &sent.emit(&key())).unwrap();
            assert_eq!(read.modules[0].why, "é".repeat(MAX_TEXT / 2));
            read.modules[0].why.clone_from(&sent.modules[0].why);
            assert_eq!(read, sent);
        }
    }

    #[test]
    fn the_fullest_heartbeat_fits_into_a_udp_datagram() {
        // Every limit at once: all nodes, modules and groups, every group holding connections, four maps that do not shrink.
        let mut heartbeat = sample(64, false);
        let owners: Vec<u8> = (0..BUCKETS).map(|i| (i % 64) as u8).collect();
        let map = BucketMap::from_bytes(owners.into_boxed_slice().try_into().unwrap()).unwrap();
        let map = MapReport {
            epoch: Epoch(9),
            view: NodeSet::from_bits(u64::MAX),
            map,
        };
        let group = GroupReport {
            held: (0..BUCKETS).collect(),
            ..heartbeat.modules[0].groups[0].clone()
        };
        let module = ModuleReport {
            name: "a".repeat(32).parse().unwrap(),
            macs: vec![MacAddr::BROADCAST; crate::config::MAX_INTERFACES],
            groups: vec![group; 2],
            ..heartbeat.modules[0].clone()
        };
        heartbeat.modules = vec![module; MAX_MODULES];
        for group in heartbeat.modules.iter_mut().flat_map(|m| &mut m.groups).take(4) {
            group.map = Some(map.clone());
        }
        heartbeat.requesters = vec![heartbeat.requesters[0]; MAX_REQUESTERS];
        let datagram = heartbeat.emit(&key());
        assert!(datagram.len() <= 65_507, "{} bytes", datagram.len());
        assert_eq!(Heartbeat::parse(&key(), &datagram).unwrap().modules.len(), MAX_MODULES);
    }

    #[test]
    fn another_key_or_version_is_told_apart() {
        let datagram = sample(3, false).emit(&key());
        let other = ClusterKey::from_bytes([2; 32]);
        assert_eq!(Heartbeat::parse(&other, &datagram), Err(ParseError::Authentication));
        let mut body = key().open(&datagram).unwrap().to_vec();
        body[4] = 9;
        key().seal(&mut body);
        assert_eq!(Heartbeat::parse(&key(), &body), Err(ParseError::Version(9)));
    }

    proptest! {
        #[test]
        fn authentic_rubbish_never_panics(mut body in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..4000, at in 0usize..400, value: u8) {
            key().seal(&mut body);
            let _ = Heartbeat::parse(&key(), &body);
            let mut real = key().open(&sample(5, true).emit(&key())).unwrap().to_vec();
            let n = real.len();
            real[at % n] = value;
            real.truncate(cut.max(1));
            key().seal(&mut real);
            let _ = Heartbeat::parse(&key(), &real);
        }
    }
}
