//! The bytes of a heartbeat's parts: [`Writer`] appends them, [`Reader`] takes them off with every length checked.
//!
//! Called by [`super::heartbeat`] only. Reading never panics.

use std::net::IpAddr;

use crate::api::{ModuleState, Quality};
use crate::balance::assign::BucketMap;
use crate::config::{MAX_GROUPS, MAX_MODULES};
use crate::id::{BUCKETS, Epoch, Incarnation, MacAddr, ModuleName, NodeId, NodeSet};
use crate::wire::heartbeat::{Ack, BucketSet, GroupReport, Hearsay, MapReport, ModuleReport, ParseError, Relayed};

/// Longest text in a report, in bytes; longer ones are cut.
pub(super) const MAX_TEXT: usize = 160;

pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn u8(&mut self, v: u8) {
        self.0.push(v);
    }

    pub(super) fn u16(&mut self, v: u16) {
        self.bytes(&v.to_be_bytes());
    }

    pub(super) fn u32(&mut self, v: u32) {
        self.bytes(&v.to_be_bytes());
    }

    pub(super) fn u24(&mut self, v: u32) {
        self.bytes(&v.to_be_bytes()[1..]);
    }

    pub(super) fn u64(&mut self, v: u64) {
        self.bytes(&v.to_be_bytes());
    }

    /// One bit per node, then what was heard of each of them, in ascending order.
    pub(super) fn hears(&mut self, hears: &[(NodeId, Ack)]) {
        let mut hears = hears.to_vec();
        hears.sort_unstable();
        hears.dedup_by_key(|(node, _)| *node);
        let set: NodeSet = hears.iter().map(|(node, _)| *node).collect();
        self.u64(set.bits());
        for (_, ack) in hears {
            self.u24(ack.bits());
        }
    }

    pub(super) fn text(&mut self, text: &str) {
        let mut end = text.len().min(MAX_TEXT);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.u8(end as u8);
        self.bytes(&text.as_bytes()[..end]);
    }

    pub(super) fn addr(&mut self, addr: IpAddr) {
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

    pub(super) fn list<T>(&mut self, items: &[T], most: usize, mut each: impl FnMut(&mut Self, &T)) {
        let n = items.len().min(most);
        self.u8(n as u8);
        for item in &items[..n] {
            each(self, item);
        }
    }

    pub(super) fn hearsay(&mut self, h: &Hearsay) {
        self.u8(h.node.as_u8());
        self.u8(u8::from(h.joining) | u8::from(h.leaving) << 1);
        self.u64(h.incarnation.0);
        self.u64(h.seq);
        self.u32(h.age_us);
        self.u64(h.hears.bits());
    }

    pub(super) fn relayed(&mut self, r: &Relayed) {
        self.u8(r.node.as_u8());
        self.u64(r.incarnation.0);
        self.u64(r.seq);
        self.list(&r.modules, MAX_MODULES, Self::module);
    }

    pub(super) fn module(&mut self, m: &ModuleReport) {
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
        let split = !m.runs.is_empty();
        self.u8(u8::from(m.joining) | u8::from(split) << 1 | u8::from(m.withheld) << 2);
        if split {
            self.u64(m.runs.bits());
        }
        self.text(&m.why);
        self.list(&m.macs, MAX_GROUPS, |w, mac| w.bytes(&mac.0));
        self.list(&m.groups, MAX_GROUPS, Self::group);
    }

    pub(super) fn group(&mut self, g: &GroupReport) {
        self.u16(g.weight);
        self.u64(g.committed.0);
        self.u16(g.open);
        let held = !g.held.is_empty();
        let promised = g.promised != g.committed;
        self.u8(u8::from(held) | u8::from(g.map.is_some()) << 1 | u8::from(g.behind) << 2 | u8::from(promised) << 3);
        if promised {
            self.u64(g.promised.0);
        }
        if held {
            self.bytes(g.held.as_bytes());
            self.u32(g.held_connections);
        }
        if let Some(map) = &g.map {
            self.u64(map.epoch.0);
            self.u64(map.view.bits());
            self.map(&map.map);
        }
    }

    pub(super) fn map(&mut self, map: &BucketMap) {
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

pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, n: usize) -> Result<&'a [u8], ParseError> {
        let (head, tail) = self.0.split_at_checked(n).ok_or(ParseError::Malformed("length"))?;
        self.0 = tail;
        Ok(head)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], ParseError> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(ParseError::Malformed("length"))?;
        self.0 = tail;
        Ok(*head)
    }

    pub(super) fn u8(&mut self) -> Result<u8, ParseError> {
        self.array::<1>().map(|[b]| b)
    }

    pub(super) fn u16(&mut self) -> Result<u16, ParseError> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, ParseError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u24(&mut self) -> Result<u32, ParseError> {
        let [a, b, c] = self.array()?;
        Ok(u32::from_be_bytes([0, a, b, c]))
    }

    pub(super) fn u64(&mut self) -> Result<u64, ParseError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn ack(&mut self) -> Result<Ack, ParseError> {
        self.u24().map(|bits| Ack::of(bits.into()))
    }

    pub(super) fn hears(&mut self) -> Result<Vec<(NodeId, Ack)>, ParseError> {
        let set = NodeSet::from_bits(self.u64()?);
        set.iter().map(|node| Ok((node, self.ack()?))).collect()
    }

    /// One past the limit would never be topped again by an honest node.
    pub(super) fn epoch(&mut self) -> Result<Epoch, ParseError> {
        let epoch = Epoch(self.u64()?);
        let proposer = usize::from(epoch.0 as u8);
        let fits = epoch.counter() < Epoch::MAX_COUNTER && proposer < crate::id::MAX_NODES;
        fits.then_some(epoch).ok_or(ParseError::Malformed("epoch"))
    }

    pub(super) fn node(&mut self) -> Result<NodeId, ParseError> {
        NodeId::new(self.u8()?.into()).ok_or(ParseError::Malformed("node"))
    }

    pub(super) fn mac(&mut self) -> Result<MacAddr, ParseError> {
        self.array().map(MacAddr)
    }

    pub(super) fn text(&mut self) -> Result<String, ParseError> {
        let n = self.u8()?;
        let bytes = self.take(n.into())?;
        std::str::from_utf8(bytes)
            .map(str::to_owned)
            .map_err(|_| ParseError::Malformed("text"))
    }

    pub(super) fn addr(&mut self) -> Result<IpAddr, ParseError> {
        match self.u8()? {
            4 => Ok(IpAddr::from(self.array::<4>()?)),
            6 => Ok(IpAddr::from(self.array::<16>()?)),
            _ => Err(ParseError::Malformed("address family")),
        }
    }

    pub(super) fn list<T>(
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

    pub(super) fn hearsay(&mut self) -> Result<Hearsay, ParseError> {
        let node = self.node()?;
        let flags = self.u8()?;
        Ok(Hearsay {
            node,
            incarnation: Incarnation(self.u64()?),
            seq: self.u64()?,
            age_us: self.u32()?,
            joining: flags & 1 != 0,
            leaving: flags & 2 != 0,
            hears: NodeSet::from_bits(self.u64()?),
        })
    }

    pub(super) fn relayed(&mut self) -> Result<Relayed, ParseError> {
        Ok(Relayed {
            node: self.node()?,
            incarnation: Incarnation(self.u64()?),
            seq: self.u64()?,
            modules: self.list(MAX_MODULES, Self::module)?,
        })
    }

    pub(super) fn module(&mut self) -> Result<ModuleReport, ParseError> {
        let name = ModuleName::try_from(self.text()?).map_err(|_| ParseError::Malformed("module name"))?;
        let digest = self.u64()?;
        let state = match self.u8()? {
            0 => ModuleState::Stop,
            1 => ModuleState::Wait,
            2 => ModuleState::Up,
            _ => return Err(ParseError::Malformed("module state")),
        };
        let quality = match self.u8()? {
            0 => Quality::NotReady,
            1 => Quality::Transient,
            2 => Quality::Ready,
            _ => return Err(ParseError::Malformed("quality")),
        };
        let flags = self.u8()?;
        if flags > 7 {
            return Err(ParseError::Malformed("module flags"));
        }
        let runs = if flags & 2 != 0 { self.u64()? } else { 0 };
        Ok(ModuleReport {
            name,
            digest,
            state,
            quality,
            joining: flags & 1 != 0,
            withheld: flags & 4 != 0,
            runs: NodeSet::from_bits(runs),
            why: self.text()?,
            macs: self.list(MAX_GROUPS, Self::mac)?,
            groups: self.list(MAX_GROUPS, Self::group)?,
        })
    }

    pub(super) fn group(&mut self) -> Result<GroupReport, ParseError> {
        let weight = self.u16()?;
        let committed = self.epoch()?;
        let open = self.u16()?;
        let flags = self.u8()?;
        let promised = if flags & 8 != 0 { self.epoch()? } else { committed };
        let (held, held_connections) = if flags & 1 != 0 {
            (BucketSet::from_bytes(self.array()?), self.u32()?)
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
            behind: flags & 4 != 0,
            open,
            held,
            held_connections,
            map,
        })
    }

    pub(super) fn map(&mut self) -> Result<BucketMap, ParseError> {
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
