//! Connections whose request was accepted lately.
//!
//! The kernel may have no entry for one whose handshake is not over: it answers from memory only when requests come in faster than the
//! application takes them (SYN cookies, RFC 4987 section 3.6). What is remembered here stands in for that entry.

// Looked up by key only; never iterated.
#![allow(clippy::disallowed_types)]

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use farm_core::balance::flow::FlowKey;

/// How long a handshake may take before the kernel's own tables are believed.
const HANDSHAKE: Duration = Duration::from_secs(1);
/// Most handshakes remembered; the oldest goes first.
const MAX: usize = 1 << 16;

/// A frame that ends a handshake, or comes right after that, is at most so many bytes past its request: until it is answered a client sends no more than its
/// first window (RFC 6928).
const FIRST_WINDOW: u32 = 1 << 16;

/// See the module doc.
#[derive(Debug, Default)]
pub struct HalfOpen {
    order: VecDeque<(Instant, FlowKey)>,
    /// When the request of each was accepted last, and its sequence number.
    last: HashMap<FlowKey, (Instant, u32)>,
}

impl HalfOpen {
    /// The request of `flow`, with this sequence number, was accepted at `now`; what was over at `since` is forgotten.
    pub fn note(&mut self, now: Instant, since: Instant, flow: FlowKey, sequence: u32) {
        while let Some((at, oldest)) = self.order.front().copied() {
            if self.order.len() < MAX && at + HANDSHAKE >= since {
                break;
            }
            self.order.pop_front();
            if self.is_last(at, &oldest) {
                self.last.remove(&oldest);
            }
        }
        self.order.push_back((now, flow));
        self.last.insert(flow, (now, sequence));
    }

    /// True if its handshake may not be over at `now`, and `sequence`, where it is known, fits: another connection from the same addresses
    /// begins anywhere.
    pub fn contains(&self, now: Instant, flow: &FlowKey, sequence: Option<u32>) -> bool {
        self.last.get(flow).is_some_and(|(at, request)| {
            let fits = |sequence: u32| sequence.wrapping_sub(*request) <= FIRST_WINDOW;
            *at + HANDSHAKE >= now && sequence.is_none_or(fits)
        })
    }

    /// Those whose handshake may not have been over at `since`, each once.
    pub fn since(&self, since: Instant) -> impl Iterator<Item = &FlowKey> {
        let young = self.order.iter().filter(move |(at, _)| *at + HANDSHAKE >= since);
        let newest = young.filter(|(at, flow)| self.is_last(*at, flow));
        newest.map(|(_, flow)| flow)
    }

    /// Forgets those that are `lost`.
    pub fn forget(&mut self, mut lost: impl FnMut(&FlowKey) -> bool) {
        self.last.retain(|flow, _| !lost(flow));
    }

    fn is_last(&self, at: Instant, flow: &FlowKey) -> bool {
        self.last.get(flow).is_some_and(|(last, _)| *last == at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Close to the end of the numbers.
    const ISN: u32 = u32::MAX - 5;

    fn flow(client_port: u16) -> FlowKey {
        FlowKey {
            protocol: farm_core::balance::flow::TCP,
            vip: "198.18.0.99".parse().unwrap(),
            vip_port: 80,
            client: "198.18.0.2".parse().unwrap(),
            client_port,
        }
    }

    fn ports(half_open: &HalfOpen, since: Instant) -> Vec<u16> {
        half_open.since(since).map(|flow| flow.client_port).collect()
    }

    #[test]
    fn a_handshake_is_remembered_for_a_second_and_counts_once() {
        let mut half_open = HalfOpen::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        half_open.note(at(0), at(0), flow(1), ISN);
        half_open.note(at(10), at(10), flow(2), ISN);
        half_open.note(at(600), at(600), flow(1), ISN);
        assert_eq!(ports(&half_open, at(700)), [2, 1]);
        assert_eq!(ports(&half_open, at(1011)), [1]);
        let has = |ms, sequence| half_open.contains(at(ms), &flow(1), sequence);
        assert!(has(1600, None) && !has(1601, None));
        assert!(has(700, Some(ISN.wrapping_add(1))) && has(700, Some(ISN.wrapping_add(14_600))));
        assert!(!has(700, Some(ISN.wrapping_sub(1))) && !has(700, Some(ISN.wrapping_add(1 << 20))));
        half_open.note(at(3000), at(3000), flow(3), ISN);
        assert_eq!(
            (half_open.order.len(), half_open.last.len()),
            (1, 1),
            "what is over goes"
        );
    }

    #[test]
    fn a_look_up_under_way_keeps_what_was_young_when_it_began() {
        let mut half_open = HalfOpen::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        half_open.note(at(0), at(0), flow(1), ISN);
        half_open.note(at(1500), at(900), flow(2), ISN);
        assert_eq!(ports(&half_open, at(900)), [1, 2]);
    }

    #[test]
    fn what_is_lost_is_forgotten() {
        let mut half_open = HalfOpen::default();
        let now = Instant::now();
        for port in 1..=3 {
            half_open.note(now, now, flow(port), ISN);
        }
        half_open.forget(|flow| flow.client_port == 2);
        assert_eq!(ports(&half_open, now), [1, 3]);
        assert!(!half_open.contains(now, &flow(2), None));
    }

    #[test]
    fn the_oldest_goes_first() {
        let mut half_open = HalfOpen::default();
        let now = Instant::now();
        for i in 0..=MAX {
            half_open.note(now, now, flow(i as u16), ISN);
        }
        assert_eq!(half_open.order.len(), MAX);
        assert!(half_open.contains(now, &flow(1), None));
    }
}
