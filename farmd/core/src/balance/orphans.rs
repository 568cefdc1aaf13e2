//! Segments that may be nobody's: of connections whose node has died, in buckets in which live nodes have connections too.
//!
//! A node that takes over a dead one's bucket has its stack reset what it does not know. Where a peer has connections in the same bucket (Guarded) it cannot
//! tell whose such a segment is, so it keeps the segment and asks all peers whether they have the connection. Owns what is kept, what was answered, and the
//! questions that are to be put. A client sends a segment only after its server has the connection: who has it had it before the question. It
//! asks nobody and reads no clock.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::balance::flow::FlowKey;

/// Most connections that are asked for or answered for at a time; while there are more, further ones are not asked for.
pub const MAX_ASKED: usize = 16_384;
/// Most connections in one question.
pub const MAX_QUESTION: usize = 256;
/// A question that has no answer after this time is put again with the next segment.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it counts that a peer has the connection. It may die with the peer; then all is asked anew.
const LIVES: Duration = Duration::from_secs(30);
/// How long it counts that nobody has it.
const DEAD: Duration = Duration::from_secs(1);

#[derive(Clone, PartialEq, Eq, Debug)]
enum Word {
    /// Asked for at this time, on account of this frame.
    Asked(Duration, Vec<u8>),
    /// Until then a peer has it.
    Peers(Duration),
    /// Until then nobody has.
    Nobodys(Duration),
}

/// What is known of a segment that this host does not know.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Nobody has its connection.
    Nobodys,
    /// A peer has, or may have.
    Silence,
    /// The same, and for want of room it is not even asked.
    NoRoom,
}

/// See the module doc.
#[derive(Clone, Debug, Default)]
pub struct Orphans {
    words: BTreeMap<FlowKey, Word>,
    questions: Vec<FlowKey>,
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

    /// A segment of `flow` has come, which this host does not know, in a bucket that is its own; `frame` copies it.
    pub fn ask(&mut self, now: Duration, flow: &FlowKey, frame: impl FnOnce() -> Vec<u8>) -> Answer {
        if self.until.is_none() {
            return Answer::Silence;
        }
        match self.words.get(flow) {
            Some(Word::Nobodys(until)) if now < *until => return Answer::Nobodys,
            Some(Word::Peers(until)) if now < *until => return Answer::Silence,
            Some(Word::Asked(at, _)) if now < *at + PATIENCE => return Answer::Silence,
            Some(_) => {}
            None if self.words.len() < MAX_ASKED => {}
            None => {
                self.words.retain(|_, word| match word {
                    Word::Asked(at, _) => now < *at + PATIENCE,
                    Word::Peers(until) | Word::Nobodys(until) => now < *until,
                });
                if self.words.len() >= MAX_ASKED {
                    return Answer::NoRoom;
                }
            }
        }
        self.words.insert(*flow, Word::Asked(now, frame()));
        self.questions.push(*flow);
        Answer::Silence
    }

    /// The next question: all peers are to be asked which of these connections they have.
    pub fn next_question(&mut self) -> Option<Vec<FlowKey>> {
        let count = self.questions.len().min(MAX_QUESTION);
        (count > 0).then(|| self.questions.drain(..count).collect())
    }

    /// All peers have answered: of the connections that were `asked` for, they have `theirs`. Returns the segments that are nobody's.
    pub fn handle_answer(&mut self, now: Duration, asked: &[FlowKey], theirs: &BTreeSet<FlowKey>) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        for flow in asked {
            let Some(word) = self.words.get_mut(flow) else {
                continue;
            };
            let known = match theirs.contains(flow) {
                true => Word::Peers(now + LIVES),
                false => Word::Nobodys(now + DEAD),
            };
            let is_nobodys = matches!(known, Word::Nobodys(_));
            if let Word::Asked(_, frame) = std::mem::replace(word, known)
                && is_nobodys
            {
                frames.push(frame);
            }
        }
        frames
    }

    /// Somebody could not be asked: the next segment of each asks again.
    pub fn handle_failure(&mut self, asked: &[FlowKey]) {
        for flow in asked {
            self.words.remove(flow);
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
        orphans.ask(now, &flow(i), || vec![i as u8])
    }

    #[test]
    fn nothing_is_asked_unless_a_node_has_died() {
        let mut orphans = Orphans::default();
        assert_eq!(ask(&mut orphans, MS, 1), Answer::Silence);
        assert_eq!(orphans.next_question(), None);
        let mut orphans = watching();
        ask(&mut orphans, MS, 1);
        assert!(!orphans.handle_timeout(99_999 * MS) && orphans.is_watching());
        assert!(orphans.handle_timeout(100_000 * MS) && !orphans.is_watching());
        assert_eq!(orphans.next_question(), None, "and nothing is left of it");
    }

    #[test]
    fn what_nobody_has_is_told_apart_from_what_a_peer_has() {
        let mut orphans = watching();
        for i in [1, 2, 1] {
            assert_eq!(ask(&mut orphans, MS, i), Answer::Silence);
        }
        let asked = orphans.next_question().unwrap();
        assert_eq!(asked, [flow(1), flow(2)], "each once");
        assert_eq!(orphans.next_question(), None);
        let frames = orphans.handle_answer(2 * MS, &asked, &[flow(2)].into());
        assert_eq!(frames, [vec![1]]);
        assert_eq!(ask(&mut orphans, 3 * MS, 1), Answer::Nobodys);
        assert_eq!(ask(&mut orphans, 3 * MS, 2), Answer::Silence);
        assert_eq!(orphans.next_question(), None);
        // Neither counts for long.
        assert_eq!(ask(&mut orphans, 2 * MS + DEAD, 1), Answer::Silence);
        assert_eq!(ask(&mut orphans, 2 * MS + LIVES, 2), Answer::Silence);
        assert_eq!(orphans.next_question().unwrap(), [flow(1), flow(2)]);
    }

    #[test]
    fn who_cannot_be_asked_keeps_it_silent_until_the_next_segment() {
        let mut orphans = watching();
        ask(&mut orphans, MS, 1);
        let asked = orphans.next_question().unwrap();
        orphans.handle_failure(&asked);
        assert_eq!(ask(&mut orphans, 2 * MS, 1), Answer::Silence);
        assert_eq!(orphans.next_question().unwrap(), asked);
        // An answer that never comes is given up; one that comes late counts for nothing that was given up.
        assert_eq!(ask(&mut orphans, 2 * MS + PATIENCE, 1), Answer::Silence);
        assert_eq!(orphans.next_question().unwrap(), asked);
        orphans.watch(100_000 * MS);
        assert!(orphans.handle_answer(3 * MS, &asked, &BTreeSet::new()).is_empty());
        assert_eq!(
            ask(&mut orphans, 4 * MS, 1),
            Answer::Silence,
            "another node has died meanwhile"
        );
    }

    #[test]
    fn the_number_of_questions_is_bounded() {
        let mut orphans = watching();
        let most = MAX_ASKED as u32;
        assert!((0..most).all(|i| ask(&mut orphans, MS, i) == Answer::Silence));
        assert_eq!(ask(&mut orphans, MS, most), Answer::NoRoom);
        let mut asked = 0;
        while let Some(question) = orphans.next_question() {
            assert!(question.len() <= MAX_QUESTION);
            asked += question.len();
        }
        assert_eq!(asked, MAX_ASKED);
        assert_eq!(
            ask(&mut orphans, MS + PATIENCE, most),
            Answer::Silence,
            "the old ones are given up"
        );
    }
}
