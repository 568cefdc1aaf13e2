//! Segments that may be nobody's: of connections whose node has died, in buckets in which live nodes have connections too.
//!
//! A node that takes over a dead one's bucket has its stack reset what it does not know. Where a peer has connections in the same bucket (Guarded) it cannot
//! tell whose such a segment is, so it keeps the segment and asks all peers whether they have the connection. Owns what is kept, what was answered, and the
//! questions that are to be put. A client sends a segment only after its server has the connection: who has it had it before the question. It
//! asks nobody and reads no clock.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::balance::flow::FlowKey;

/// Most connections that are asked for or answered for at a time; while there are more, further ones are not asked for.
pub const MAX_ASKED: usize = 16_384;
/// Most connections in one question.
pub const MAX_QUESTION: usize = 256;
/// Most segments that are kept; of further connections it is the next segment that is answered.
pub const MAX_KEPT: usize = 2048;
/// Longest frame that is kept, with what stands before it in the ring.
pub const MAX_FRAME: usize = 2048;
/// A question that has no answer after this time is put again with the next segment, and an answer after it counts for nothing.
pub const PATIENCE: Duration = Duration::from_secs(4);
/// How often room is looked for while there is none.
const SWEEP_INTERVAL: Duration = Duration::from_millis(100);
/// How long it counts that a peer has the connection. It may die with the peer; then all is asked anew.
const LIVES: Duration = Duration::from_secs(30);
/// How long it counts that nobody has it.
const DEAD: Duration = Duration::from_millis(500);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Word {
    /// To be asked for, on account of this frame, if that was kept.
    Queued(Option<Vec<u8>>),
    /// Asked for at this time, on account of it.
    Asked(Duration, Option<Vec<u8>>),
    /// Until then a peer has it.
    Peer(Duration),
    /// Until then nobody has.
    Nobody(Duration),
}

/// What is known of a segment that this host does not know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Nobody has its connection.
    Nobody,
    /// A peer has, or may have.
    Silence,
    /// The same, and for want of room it is not even asked.
    NoRoom,
}

/// See the module doc.
#[derive(Clone, Debug, Default)]
pub struct Orphans {
    words: BTreeMap<FlowKey, Word>,
    /// Those of [`Word::Queued`], in the order in which they came.
    queue: VecDeque<FlowKey>,
    /// Frames in `words`.
    kept: usize,
    swept: Duration,
    until: Option<Duration>,
}

impl Orphans {
    /// Asks until `until`, and forgets what was answered before another node has died.
    pub fn watch(&mut self, until: Duration) {
        *self = Self {
            until: Some(until),
            ..Self::default()
        };
    }

    /// True while it asks.
    pub fn is_watching(&self) -> bool {
        self.until.is_some()
    }

    /// Ends that in time; true if it has ended just now.
    pub fn handle_timeout(&mut self, now: Duration) -> bool {
        let is_over = self.until.is_some_and(|until| until <= now);
        if is_over {
            *self = Self::default();
        }
        is_over
    }

    /// A segment of `flow` has come, which this host does not know, in a bucket that is its own, in `frame`.
    pub fn ask(&mut self, now: Duration, flow: &FlowKey, frame: &[u8]) -> Answer {
        if self.until.is_none() {
            return Answer::Silence;
        }
        match self.words.get(flow) {
            Some(Word::Nobody(until)) if now < *until => return Answer::Nobody,
            Some(Word::Peer(until)) if now < *until => return Answer::Silence,
            Some(Word::Asked(at, _)) if now < *at + PATIENCE => return Answer::Silence,
            Some(Word::Queued(_)) => return Answer::Silence,
            Some(_) => self.forget(flow),
            None => {}
        }
        if self.words.len() >= MAX_ASKED && now >= self.swept + SWEEP_INTERVAL {
            self.swept = now;
            self.sweep(now);
        }
        if self.words.len() >= MAX_ASKED {
            return Answer::NoRoom;
        }
        let keeps = self.kept < MAX_KEPT && frame.len() <= MAX_FRAME;
        self.kept += usize::from(keeps);
        self.words.insert(*flow, Word::Queued(keeps.then(|| frame.to_vec())));
        self.queue.push_back(*flow);
        Answer::Silence
    }

    /// Forgets what counts no longer.
    fn sweep(&mut self, now: Duration) {
        self.words.retain(|_, word| match word {
            Word::Queued(_) => true,
            Word::Asked(at, _) => now < *at + PATIENCE,
            Word::Peer(until) | Word::Nobody(until) => now < *until,
        });
        let is_kept = |word: &&Word| matches!(word, Word::Queued(Some(_)) | Word::Asked(_, Some(_)));
        self.kept = self.words.values().filter(is_kept).count();
    }

    fn forget(&mut self, flow: &FlowKey) {
        if let Some(Word::Queued(Some(_)) | Word::Asked(_, Some(_))) = self.words.remove(flow) {
            self.kept = self.kept.saturating_sub(1);
        }
    }

    /// True if there is something to be asked.
    pub fn has_questions(&self) -> bool {
        !self.queue.is_empty()
    }

    /// The next question: all peers are to be asked which of these connections they have.
    pub fn next_question(&mut self, now: Duration) -> Option<Vec<FlowKey>> {
        let count = self.queue.len().min(MAX_QUESTION);
        let flows: Vec<FlowKey> = self.queue.drain(..count).collect();
        for flow in &flows {
            if let Some(word) = self.words.get_mut(flow)
                && let Word::Queued(frame) = word
            {
                *word = Word::Asked(now, frame.take());
            }
        }
        (!flows.is_empty()).then_some(flows)
    }

    /// All peers have answered: of the connections that were `asked` for, they have `theirs`. Returns the segments that are nobody's.
    pub fn handle_answer(&mut self, now: Duration, asked: &[FlowKey], theirs: &BTreeSet<FlowKey>) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for flow in asked {
            let Some(word) = self.words.get_mut(flow) else {
                continue;
            };
            let Word::Asked(at, frame) = word else { continue };
            if now >= *at + PATIENCE {
                // This host may have stood still since, and the connection have come to be.
                self.forget(flow);
                continue;
            }
            self.kept -= usize::from(frame.is_some());
            let is_theirs = theirs.contains(flow);
            frames.extend(frame.take().filter(|_| !is_theirs));
            *word = match is_theirs {
                true => Word::Peer(now + LIVES),
                false => Word::Nobody(now + DEAD),
            };
        }
        frames
    }

    /// Somebody could not be asked: the next segment of each asks again.
    pub fn handle_failure(&mut self, asked: &[FlowKey]) {
        for flow in asked
            .iter()
            .filter(|flow| matches!(self.words.get(flow), Some(Word::Asked(..))))
            .copied()
            .collect::<Vec<_>>()
        {
            self.forget(&flow);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balance::flow::TCP;
    use crate::balance::test_frames::{client, vip};

    const MS: Duration = Duration::from_millis(1);

    fn flow(i: u32) -> FlowKey {
        FlowKey {
            protocol: TCP,
            vip: vip(),
            vip_port: 80,
            client: client(i >> 10),
            client_port: 2000 + (i & 1023) as u16,
        }
    }

    fn watching() -> Orphans {
        let mut orphans = Orphans::default();
        orphans.watch(100 * Duration::from_secs(1));
        orphans
    }

    fn ask(orphans: &mut Orphans, now: Duration, i: u32) -> Answer {
        orphans.ask(now, &flow(i), &[i as u8])
    }

    #[test]
    fn nothing_is_asked_unless_a_node_has_died() {
        let mut orphans = Orphans::default();
        assert_eq!(ask(&mut orphans, MS, 1), Answer::Silence);
        assert_eq!(orphans.next_question(MS), None);
        let mut orphans = watching();
        ask(&mut orphans, MS, 1);
        assert!(!orphans.handle_timeout(99_999 * MS) && orphans.is_watching());
        assert!(orphans.handle_timeout(100_000 * MS) && !orphans.is_watching());
        assert_eq!(orphans.next_question(MS), None, "and nothing is left of it");
    }

    #[test]
    fn what_nobody_has_is_told_apart_from_what_a_peer_has() {
        let mut orphans = watching();
        for i in [1, 2, 1] {
            assert_eq!(ask(&mut orphans, MS, i), Answer::Silence);
        }
        let asked = orphans.next_question(MS).unwrap();
        assert_eq!(asked, [flow(1), flow(2)], "each once");
        assert_eq!(orphans.next_question(MS), None);
        let frames = orphans.handle_answer(2 * MS, &asked, &[flow(2)].into());
        assert_eq!(frames, [vec![1]]);
        assert_eq!(ask(&mut orphans, 3 * MS, 1), Answer::Nobody);
        assert_eq!(ask(&mut orphans, 3 * MS, 2), Answer::Silence);
        assert_eq!(orphans.next_question(3 * MS), None);
        // Neither counts for long.
        assert_eq!(ask(&mut orphans, 2 * MS + DEAD, 1), Answer::Silence);
        assert_eq!(ask(&mut orphans, 2 * MS + LIVES, 2), Answer::Silence);
        assert_eq!(orphans.next_question(2 * MS + LIVES).unwrap(), [flow(1), flow(2)]);
    }

    #[test]
    fn who_cannot_be_asked_keeps_it_silent_until_the_next_segment() {
        let mut orphans = watching();
        ask(&mut orphans, MS, 1);
        let asked = orphans.next_question(MS).unwrap();
        orphans.handle_failure(&asked);
        assert_eq!(ask(&mut orphans, 2 * MS, 1), Answer::Silence);
        assert_eq!(orphans.next_question(2 * MS).unwrap(), asked);
        // An answer that comes too late is none, and neither is one that never comes.
        let late = 2 * MS + PATIENCE;
        assert!(orphans.handle_answer(late, &asked, &BTreeSet::new()).is_empty());
        for now in [late, late + PATIENCE] {
            assert_eq!(ask(&mut orphans, now, 1), Answer::Silence);
            assert_eq!(orphans.next_question(now).unwrap(), asked);
        }
        orphans.watch(100_000 * MS);
        assert!(
            orphans
                .handle_answer(late + PATIENCE, &asked, &BTreeSet::new())
                .is_empty()
        );
        let again = ask(&mut orphans, late + PATIENCE, 1);
        assert_eq!(again, Answer::Silence, "another node has died meanwhile");
    }

    #[test]
    fn what_is_not_kept_is_answered_for_with_the_next_segment() {
        let mut orphans = watching();
        let long = vec![0; MAX_FRAME + 1];
        assert_eq!(orphans.ask(MS, &flow(1), &long), Answer::Silence);
        let asked = orphans.next_question(MS).unwrap();
        assert!(orphans.handle_answer(2 * MS, &asked, &BTreeSet::new()).is_empty());
        assert_eq!(orphans.ask(3 * MS, &flow(1), &long), Answer::Nobody);
        // As many as there is room for, over and over again.
        for round in 1..4 {
            let now = round * 2 * DEAD;
            assert!((0..2 * MAX_KEPT as u32).all(|i| ask(&mut orphans, now, i) == Answer::Silence));
            let mut kept = 0;
            while let Some(asked) = orphans.next_question(now) {
                kept += orphans.handle_answer(now, &asked, &BTreeSet::new()).len();
            }
            assert_eq!(kept, MAX_KEPT, "round {round}");
        }
    }

    #[test]
    fn the_number_of_questions_is_bounded() {
        let mut orphans = watching();
        let most = MAX_ASKED as u32;
        assert!((0..most).all(|i| ask(&mut orphans, MS, i) == Answer::Silence));
        assert_eq!(ask(&mut orphans, MS, most), Answer::NoRoom);
        assert!((0..most).all(|i| ask(&mut orphans, 2 * MS + PATIENCE, i) == Answer::Silence));
        let mut asked = 0;
        while let Some(question) = orphans.next_question(2 * MS + PATIENCE) {
            assert!(question.len() <= MAX_QUESTION);
            asked += question.len();
        }
        assert_eq!(asked, MAX_ASKED, "none is put twice");
        assert!(!orphans.has_questions());
        let late = 3 * MS + 2 * PATIENCE;
        assert_eq!(
            ask(&mut orphans, late, most),
            Answer::Silence,
            "the old ones are given up"
        );
    }
}
