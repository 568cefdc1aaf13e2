//! Who has asked for a VIP's Ethernet address.
//!
//! In `vmac_directed` these are told when their entry node changes. Every node hears the broadcast requests; what a host asks its entry node alone the others learn
//! from that one's next heartbeats, before it can be gone. A few of all entries go round in each heartbeat, so that a node that starts later learns them too.
//! Bounded: the oldest entry goes first.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;

use crate::id::MacAddr;
use crate::wire::heartbeat::{MAX_REQUESTERS, Requester};

/// Most requesters remembered.
pub const CAPACITY: usize = 4096;
/// In how many heartbeats, one after the other, a requester is told that was not known: one of them may be lost, or two.
const TELLINGS: usize = 3;

/// Bounded table of requesters.
#[derive(Clone, Debug, Default)]
pub struct Requesters {
    macs: BTreeMap<(IpAddr, IpAddr), MacAddr>,
    order: VecDeque<(IpAddr, IpAddr)>,
    turn: usize,
    /// Not known before they were heard here, and how often each is still to be told.
    fresh: VecDeque<((IpAddr, IpAddr), usize)>,
}

impl Requesters {
    /// Notes a requester that was heard here; true if it is new or has moved to another Ethernet address.
    pub fn learn(&mut self, requester: Requester) -> bool {
        let key = (requester.vip, requester.addr);
        let old = self.macs.insert(key, requester.mac);
        let is_news = old != Some(requester.mac);
        if old.is_none() {
            self.append(key);
        }
        if is_news {
            self.fresh.retain(|(known, _)| *known != key);
            self.fresh.push_back((key, TELLINGS));
        }
        is_news
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
            self.fresh.retain(|(known, _)| *known != oldest);
        }
    }

    fn get(&self, key: (IpAddr, IpAddr)) -> Option<Requester> {
        let (vip, addr) = key;
        self.macs.get(&key).map(|mac| Requester { vip, addr, mac: *mac })
    }

    /// Those that are new, as many as a heartbeat has room for, and up to `n` with others, another lot at each call.
    pub fn next(&mut self, n: usize) -> Vec<Requester> {
        let told: Vec<_> = self.fresh.drain(..self.fresh.len().min(MAX_REQUESTERS)).collect();
        let mut lot: Vec<Requester> = told.iter().filter_map(|(key, _)| self.get(*key)).collect();
        let left = told.into_iter().map(|(key, times)| (key, times - 1));
        self.fresh.extend(left.filter(|(_, times)| *times > 0));
        let len = self.order.len();
        let more = n.saturating_sub(lot.len()).min(len);
        let keys = (0..more).filter_map(|i| self.order.get((self.turn + i) % len));
        lot.extend(keys.filter_map(|key| self.get(*key)));
        self.turn = (self.turn + more).checked_rem(len).unwrap_or(0);
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
    fn what_is_new_is_told_at_once_and_again_and_then_in_turn() {
        let mut table = Requesters::default();
        (0..1000).for_each(|i| assert!(table.learn_told(requester(i))));
        table.next(8);
        let (new, moved) = (
            requester(2000),
            Requester {
                mac: MacAddr([2; 6]),
                ..requester(500)
            },
        );
        assert!(table.learn(new) && table.learn(moved) && !table.learn(requester(3)));
        // Many nodes tell others only now and then.
        for n in [0, 8, 0] {
            let lot = table.next(n);
            assert_eq!((&lot[..2], lot.len()), (&[new, moved][..], n.max(2)));
        }
        assert_eq!(table.next(0), []);
        assert!(!table.next(8).contains(&new));
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
        while !table.next(0).is_empty() {}
        let mut seen: Vec<Requester> = (0..CAPACITY / 8).flat_map(|_| table.next(8)).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), CAPACITY);
    }
}
