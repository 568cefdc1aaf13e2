//! Where first fragments went, so that the later ones follow.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::balance::decide::Decision;
use crate::wire::packet::Packet;

/// Most datagrams remembered; the oldest goes first.
const CAPACITY: usize = 1024;
/// How long: the reassembly time of Linux (`ipfrag_time`), after which the kernel gives up too.
const LIFETIME: Duration = Duration::from_secs(30);

type Key = (IpAddr, IpAddr, u8, u32);

/// Bounded memory of decisions on first fragments.
#[derive(Debug, Default)]
pub struct FragmentTable {
    decisions: BTreeMap<Key, Decision>,
    order: VecDeque<(Duration, Key)>,
}

fn key(packet: &Packet) -> Key {
    (
        packet.source,
        packet.destination,
        packet.protocol,
        packet.identification,
    )
}

impl FragmentTable {
    /// Notes what happened to a first fragment.
    pub fn remember(&mut self, now: Duration, packet: &Packet, decision: Decision) {
        self.expire(now);
        if self.order.len() >= CAPACITY
            && let Some((_, oldest)) = self.order.pop_front()
        {
            self.decisions.remove(&oldest);
        }
        if self.decisions.insert(key(packet), decision).is_none() {
            self.order.push_back((now, key(packet)));
        }
    }

    /// What happened to the first fragment of `packet`'s datagram.
    pub fn recall(&mut self, now: Duration, packet: &Packet) -> Option<Decision> {
        self.expire(now);
        self.decisions.get(&key(packet)).copied()
    }

    /// Forgets everything: after a change of the plan old decisions no longer bind.
    pub fn clear(&mut self) {
        self.decisions.clear();
        self.order.clear();
    }

    fn expire(&mut self, now: Duration) {
        while let Some((seen, oldest)) = self.order.front()
            && *seen + LIFETIME < now
        {
            self.decisions.remove(oldest);
            self.order.pop_front();
        }
    }
}
