//! Who has asked for a VIP's Ethernet address.
//!
//! In `vmac_directed` these are told when their entry node changes. Every node hears the broadcast requests; a few
//! entries go round in each heartbeat, so that a node that starts later learns them too. Bounded: the oldest entry goes first.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;

use crate::id::MacAddr;
use crate::wire::heartbeat::Requester;

/// Most requesters remembered.
pub const CAPACITY: usize = 4096;

/// Bounded table of requesters.
#[derive(Clone, Debug, Default)]
pub struct Requesters {
    macs: BTreeMap<(IpAddr, IpAddr), MacAddr>,
    order: VecDeque<(IpAddr, IpAddr)>,
    turn: usize,
}

impl Requesters {
    /// Notes a requester that was heard here; true if it is new or has moved to another Ethernet address.
    pub fn learn(&mut self, requester: Requester) -> bool {
        let key = (requester.vip, requester.addr);
        match self.macs.insert(key, requester.mac) {
            Some(old) => old != requester.mac,
            None => {
                self.append(key);
                true
            }
        }
    }

    /// Notes a requester that another node tells of; true if it was not known. What was heard here counts more than what is told: a stale address
    /// would go round for ever.
    pub fn learn_told(&mut self, requester: Requester) -> bool {
        let key = (requester.vip, requester.addr);
        let new = !self.macs.contains_key(&key);
        if new {
            self.macs.insert(key, requester.mac);
            self.append(key);
        }
        new
    }

    fn append(&mut self, key: (IpAddr, IpAddr)) {
        self.order.push_back(key);
        if self.order.len() > CAPACITY
            && let Some(oldest) = self.order.pop_front()
        {
            self.macs.remove(&oldest);
        }
    }

    /// Up to `n` of them, another lot at each call.
    pub fn next(&mut self, n: usize) -> Vec<Requester> {
        let len = self.order.len();
        let lot = (0..n.min(len)).filter_map(|i| {
            let (vip, addr) = *self.order.get((self.turn + i) % len)?;
            self.macs
                .get(&(vip, addr))
                .map(|mac| Requester { vip, addr, mac: *mac })
        });
        let lot: Vec<Requester> = lot.collect();
        self.turn = if len == 0 { 0 } else { (self.turn + lot.len()) % len };
        lot
    }

    /// All of them, in order of VIP and address.
    pub fn iter(&self) -> impl Iterator<Item = Requester> {
        self.macs.iter().map(|((vip, addr), mac)| Requester {
            vip: *vip,
            addr: *addr,
            mac: *mac,
        })
    }

    /// Number of requesters.
    pub fn len(&self) -> usize {
        self.macs.len()
    }

    /// True if there is none.
    pub fn is_empty(&self) -> bool {
        self.macs.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requester(i: u32) -> Requester {
        Requester {
            vip: IpAddr::from([198, 18, 0, 20]),
            addr: IpAddr::V4((0xc612_0000 + i).into()),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
        }
    }

    #[test]
    fn it_is_bounded_and_all_take_their_turn() {
        let mut table = Requesters::default();
        assert!(table.learn(requester(0)));
        assert!(!table.learn(requester(0)));
        for i in 1..=CAPACITY as u32 {
            table.learn(requester(i));
        }
        assert_eq!(table.len(), CAPACITY);
        assert!(!table.iter().any(|r| r == requester(0)), "the oldest is gone");
        let mut seen: Vec<Requester> = (0..CAPACITY / 8).flat_map(|_| table.next(8)).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), CAPACITY);
    }
}
