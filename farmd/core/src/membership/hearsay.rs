//! What others tell of nodes that this one may not hear itself.
//!
//! Keeps the newest word of each node, however it came, and when that word was first heard by anybody: it ages like a heartbeat does, and
//! does not become younger by going round. Judges nothing. Called by [`super::Membership`] only.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::id::{Incarnation, NodeId, NodeSet};
use crate::membership::peer::{Peer, Timing};
use crate::wire::heartbeat::Hearsay;

/// See the module doc.
#[derive(Clone, Debug, Default)]
pub struct Told(BTreeMap<NodeId, (Hearsay, Duration)>);

impl Told {
    /// Takes a word that a peer passes on at `now`.
    pub fn learn(&mut self, now: Duration, word: &Hearsay) {
        let newest = |(known, _): &(Hearsay, Duration)| (known.incarnation, known.seq) >= (word.incarnation, word.seq);
        if self.0.get(&word.node).is_some_and(newest) {
            return;
        }
        let heard_at = now.saturating_sub(Duration::from_micros(word.age_us.into()));
        self.0.insert(word.node, (*word, heard_at));
    }

    /// Drops words twice as old as the detection time.
    pub fn forget(&mut self, now: Duration, timing: Timing) {
        self.0.retain(|_, (_, at)| now < *at + 2 * timing.detection_time);
    }

    /// Words not older than the detection time.
    fn lately(&self, now: Duration, timing: Timing) -> impl Iterator<Item = (&Hearsay, Duration)> {
        let lately = self.0.values().map(|(word, at)| (word, *at));
        lately.filter(move |(_, at)| now < *at + timing.detection_time)
    }

    /// Nodes that are not heard and have neither left nor just started, with those they hear; a word older than what the peer itself has said here
    /// does not count.
    pub fn fresh(&self, now: Duration, peers: &BTreeMap<NodeId, Peer>, timing: Timing) -> BTreeMap<NodeId, NodeSet> {
        let newer = |word: &Hearsay| {
            let peer = peers.get(&word.node);
            peer.is_some_and(|p| (word.incarnation, word.seq) >= p.newest() || !p.is_heard(now, timing.detection_time))
        };
        let fresh = self.lately(now, timing);
        let fresh = fresh.filter(|(word, _)| !word.leaving && !word.joining && newer(word));
        fresh.map(|(word, _)| (word.node, word.hears)).collect()
    }

    /// Nodes whose newest word is older than that, and newer than what the peer itself has said here last: others that hear it speak of it no more once all hear
    /// each other, so that what they said before is no sign of its silence.
    pub fn silent(&self, now: Duration, peers: &BTreeMap<NodeId, Peer>, timing: Timing) -> NodeSet {
        let newest = |word: &Hearsay| peers.get(&word.node).map(Peer::newest);
        let counts = |word: &Hearsay| newest(word).is_none_or(|newest| (word.incarnation, word.seq) > newest);
        let silent = self.0.values().filter(|(_, at)| now >= *at + timing.detection_time);
        silent
            .map(|(word, _)| word)
            .filter(|word| counts(word))
            .map(|word| word.node)
            .collect()
    }

    /// True if `node` has said goodbye since what it said here last, its `newest`.
    pub fn has_left(&self, now: Duration, node: NodeId, newest: (Incarnation, u64), timing: Timing) -> bool {
        let of = self.0.get(&node);
        of.is_some_and(|(word, at)| {
            word.leaving && (word.incarnation, word.seq) > newest && now < *at + timing.detection_time
        })
    }

    /// What can be passed on, each as old as it is by now.
    pub fn words(&self, now: Duration, timing: Timing) -> impl Iterator<Item = Hearsay> {
        self.lately(now, timing).map(move |(word, at)| Hearsay {
            age_us: u32::try_from(now.saturating_sub(at).as_micros()).unwrap_or(u32::MAX),
            ..*word
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: Timing = Timing {
        interval: Duration::from_millis(50),
        detection_time: Duration::from_millis(250),
    };

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    fn word(seq: u64, age_ms: u32) -> Hearsay {
        Hearsay {
            node: NodeId::new(1).unwrap(),
            incarnation: Incarnation(3),
            seq,
            age_us: age_ms * 1000,
            joining: false,
            leaving: false,
            hears: NodeSet::from_bits(5),
        }
    }

    #[test]
    fn a_word_does_not_become_younger_by_going_round() {
        let (mut a, mut b) = (Told::default(), Told::default());
        a.learn(ms(1000), &word(7, 40));
        for t in (1000..1300).step_by(10) {
            a.words(ms(t), TIMING).for_each(|word| b.learn(ms(t + 1), &word));
            b.words(ms(t), TIMING).for_each(|word| a.learn(ms(t + 1), &word));
        }
        for told in [&a, &b] {
            assert_eq!(told.words(ms(1209), TIMING).count(), 1);
            assert_eq!(
                told.words(ms(1211), TIMING).count(),
                0,
                "250 ms after 960 ms, and a way"
            );
        }
        assert_eq!(a.silent(ms(1211), &BTreeMap::new(), TIMING), NodeSet::from_bits(2));
        a.forget(ms(1460), TIMING);
        assert_eq!(a.silent(ms(1460), &BTreeMap::new(), TIMING), NodeSet::EMPTY);
    }

    #[test]
    fn the_newest_word_counts_and_a_goodbye_is_the_last() {
        let mut told = Told::default();
        told.learn(ms(1000), &word(7, 40));
        told.learn(ms(1000), &word(6, 0));
        assert_eq!(told.words(ms(1000), TIMING).next(), Some(word(7, 40)));
        let goodbye = Hearsay {
            leaving: true,
            ..word(8, 0)
        };
        told.learn(ms(1010), &goodbye);
        let node = goodbye.node;
        assert!(told.fresh(ms(1010), &BTreeMap::new(), TIMING).is_empty());
        assert!(told.has_left(ms(1010), node, (Incarnation(3), 7), TIMING));
        assert!(
            !told.has_left(ms(1010), node, (Incarnation(3), 9), TIMING),
            "it came back"
        );
        assert!(!told.has_left(ms(1260), node, (Incarnation(3), 7), TIMING));
    }
}
