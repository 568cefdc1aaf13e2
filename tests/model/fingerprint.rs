//! When two states of the model are one.
//!
//! [`Farm`] is compared by its debug text, which the compiler derives from all of its fields: whatever is added to the core becomes part of
//! the state without a word here, and what this file does not know how to make relative keeps states apart. That costs time, never a
//! counterexample. What is put in other words, so that a farm at rest comes back to the state it was in one pulse before:
//!
//! - *times* are counted from now. One further back than [`Scale::memory`] is just long ago: no rule of the core looks back further than
//!   twice the detection time, or than a node believes that it is deaf, and no promise further than the farm may need to recover. The model's clock begins at [`START`], so that a time is told from a length of time.
//! - *epochs* are counted from the lowest one in the world: the core compares them and makes the next one, nothing else.
//! - *versions of plans* are counted from the farm's newest one.
//! - *sequence numbers* stand for the moment at which their heartbeat was sent ([`Seqs`]): the core compares those of one sender, and what
//!   it remembers of its own is when each was sent. Which is the newest one that each node has accepted of each peer is known to the world.
//!
//! Maps and sets of buckets print as counts; the plan, which has the state and owner of each bucket, and the maps in reports are hashed
//! beside the text. Left out are counts that only a status shows (losses, round trips), and what is in a cache of a pure function.

use std::fmt::Debug;
use std::hash::{Hash, Hasher};
use std::time::Duration;

use farm_core::wire::heartbeat::{Ack, ModuleReport};

/// Where the model's clock begins: above every length of time in the core's fields.
pub const START: Duration = Duration::from_secs(1_000_000);

/// Fields that are told in another way (sequence numbers, the plan's version), or that decide nothing (the beat and the echo serve the
/// statistics of a link; `since` and `was_alive_as` a log line; `turns` tells that there was one; `wanted` is a cache).
const SKIPPED: [&str; 13] = [
    "seq",
    "sent",
    "lans",
    "beat",
    "echo",
    "since",
    "was_alive_as",
    "plan_version",
    "turns",
    "wanted",
    "events",
    "incarnations",
    "requesters",
];

/// A digest of 64 bits, the same in every run: each word is multiplied into what was before, and the halves of the product are folded. Most
/// of a walk goes into digests, and nobody makes up states so that theirs are equal.
#[derive(Clone, Copy, Debug)]
pub struct Digest(u64);

impl Digest {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;

    fn mix(&mut self, word: u64) {
        // A word that takes the state to 0 does not keep it there.
        let product = u128::from(self.0 ^ word) * u128::from(Self::ODD);
        self.0 = ((product >> 64) as u64 ^ product as u64).wrapping_add(Self::ODD);
    }
}

impl Hasher for Digest {
    fn write(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks();
        words.iter().for_each(|word| self.mix(u64::from_le_bytes(*word)));
        if !rest.is_empty() {
            let mut last = [0; 8];
            last[..rest.len()].copy_from_slice(rest);
            last[7] = rest.len() as u8;
            self.mix(u64::from_le_bytes(last));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.mix(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.mix(value);
    }

    fn write_i64(&mut self, value: i64) {
        self.mix(value as u64);
    }

    fn write_usize(&mut self, value: usize) {
        self.mix(value as u64);
    }

    fn finish(&self) -> u64 {
        let mut last = *self;
        last.mix(0);
        last.0
    }
}

/// An empty one.
pub fn hasher() -> Digest {
    Digest(0)
}

/// A piece of a state.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Token {
    /// Stands for itself.
    Same(u64),
    /// A moment.
    Time(Duration),
    /// A counter of maps, and who made it.
    Epoch(u64),
}

/// By what tokens are made relative.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// The present.
    pub now: Duration,
    /// Further back is long ago.
    pub memory: Duration,
    /// The lowest counter of an epoch.
    pub epoch: u64,
}

impl Scale {
    /// Adds `token` to `digest`.
    pub fn add(&self, token: Token, digest: &mut impl Hasher) {
        match token {
            Token::Same(value) => (0_u8, value).hash(digest),
            Token::Time(at) => (1_u8, self.time(at)).hash(digest),
            Token::Epoch(0) => 2_u8.hash(digest),
            Token::Epoch(epoch) => (3_u8, (epoch >> 8) - self.epoch, epoch & 0xff).hash(digest),
        }
    }

    /// Microseconds from now, negative if it is past.
    pub fn time(&self, at: Duration) -> i64 {
        match at.checked_sub(self.now) {
            Some(ahead) => ahead.as_micros() as i64,
            None => -((self.now - at).min(self.memory).as_micros() as i64),
        }
    }
}

/// The sequence numbers of one sender, with the moment at which each was sent, the newest last.
#[derive(Clone, Debug, Default)]
pub struct Seqs(Vec<(u64, Duration)>);

impl Seqs {
    /// `seq` was sent at `now`; what is older than `memory` is forgotten.
    pub fn push(&mut self, now: Duration, seq: u64, memory: Duration) {
        self.0.retain(|(_, at)| *at + memory >= now);
        self.0.push((seq, now));
    }

    /// When the one was sent that `ack` names; `None` if that is long ago.
    pub fn sent_at(&self, ack: Ack) -> Option<Duration> {
        let sent = self.0.iter().rev().find(|(seq, _)| Ack::of(*seq) == ack);
        sent.map(|(_, at)| *at)
    }

    /// The last one used.
    pub fn newest(&self) -> u64 {
        self.0.last().map_or(0, |(seq, _)| *seq)
    }

    /// What `seq` means: when it was sent, and how many were sent in that moment after it.
    pub fn mean(&self, seq: u64) -> [Token; 2] {
        match self.0.iter().find(|(s, _)| *s == seq) {
            Some((_, at)) => {
                let later = self.0.iter().filter(|(s, t)| t == at && *s > seq).count();
                [Token::Time(*at), Token::Same(later as u64)]
            }
            None => [Token::Time(Duration::ZERO), Token::Same(u64::from(seq != 0))],
        }
    }
}

/// Tokens of the debug text of `value`; numbers of plans count from `plan_version`.
pub fn tokens(value: &impl Debug, plan_version: u64) -> Vec<Token> {
    let text = format!("{value:?}");
    let mut reader = Reader {
        text: text.as_bytes(),
        at: 0,
        tokens: Vec::with_capacity(64),
        literal: hasher(),
    };
    reader.read(plan_version);
    reader.flush();
    reader.tokens
}

/// Tokens of what the debug text of reports does not show: maps and held buckets.
pub fn report_tokens(modules: &[ModuleReport], tokens: &mut Vec<Token>) {
    let mut digest = hasher();
    for group in modules.iter().flat_map(|m| &m.groups) {
        group.map.as_ref().map(|m| &m.map).hash(&mut digest);
        if !group.held.is_empty() {
            group.held.iter().for_each(|i| i.hash(&mut digest));
        }
    }
    tokens.push(Token::Same(digest.finish()));
}

struct Reader<'a> {
    text: &'a [u8],
    at: usize,
    tokens: Vec<Token>,
    literal: Digest,
}

impl<'a> Reader<'a> {
    fn read(&mut self, plan_version: u64) {
        let mut field: &[u8] = b"";
        let mut word: &[u8] = b"";
        while let Some(&byte) = self.text.get(self.at) {
            if byte.is_ascii_alphabetic() || byte == b'_' {
                word = self.take(|b| b.is_ascii_alphanumeric() || b == b'_');
                if self.text[self.at..].starts_with(b": ") {
                    field = word;
                }
                word.hash(&mut self.literal);
                if self.text[self.at..].starts_with(b": ") && SKIPPED.iter().any(|s| s.as_bytes() == word) {
                    self.at += 2;
                    self.skip_value();
                }
            } else if byte.is_ascii_digit() {
                let number = self.take(|b| b.is_ascii_digit() || b == b'.');
                let unit = self.take(|b| b.is_ascii_alphabetic() || b >= 0x80);
                match duration(number, unit) {
                    Some(at) if at >= START => self.push(Token::Time(at)),
                    _ if word == b"Epoch" => self.push(Token::Epoch(integer(number))),
                    _ if matches!(field, b"closing" | b"closed_by") => {
                        (plan_version - integer(number)).hash(&mut self.literal)
                    }
                    _ => (number, unit).hash(&mut self.literal),
                }
            } else if byte == b'"' {
                // A text says what other fields say, and may have numbers in it.
                self.at += 1;
                self.take(|b| b != b'"');
                self.at += 1;
                0xfe_u8.hash(&mut self.literal);
            } else {
                let marks = self.take(|b| !b.is_ascii_alphanumeric() && b != b'_' && b != b'"');
                self.literal.write(marks);
            }
        }
    }

    fn take(&mut self, fits: impl Fn(u8) -> bool) -> &'a [u8] {
        let rest = &self.text[self.at..];
        let length = rest.iter().position(|b| !fits(*b)).unwrap_or(rest.len());
        self.at += length;
        &rest[..length]
    }

    /// Up to the comma or bracket that ends the value.
    fn skip_value(&mut self) {
        let mut depth = 0;
        while let Some(&byte) = self.text.get(self.at) {
            match byte {
                b'{' | b'[' | b'(' => depth += 1,
                b'}' | b']' | b')' | b',' if depth == 0 => return,
                b'}' | b']' | b')' => depth -= 1,
                _ => {}
            }
            self.at += 1;
        }
    }

    fn push(&mut self, token: Token) {
        self.flush();
        self.tokens.push(token);
    }

    fn flush(&mut self) {
        let literal = std::mem::replace(&mut self.literal, hasher());
        self.tokens.push(Token::Same(literal.finish()));
    }
}

fn integer(number: &[u8]) -> u64 {
    let digits = number.iter().filter(|b| b.is_ascii_digit());
    digits.fold(0, |n: u64, b| n.wrapping_mul(10).wrapping_add(u64::from(b - b'0')))
}

fn duration(number: &[u8], unit: &[u8]) -> Option<Duration> {
    let unit: u64 = match unit {
        b"s" => 1_000_000_000,
        b"ms" => 1_000_000,
        b"ns" => 1,
        _ if unit == "µs".as_bytes() => 1_000,
        _ => return None,
    };
    let mut parts = number.split(|b| *b == b'.');
    let whole = integer(parts.next()?) as u128 * u128::from(unit);
    let part = parts.next().unwrap_or_default();
    let part = integer(part) as u128 * u128::from(unit) / 10_u128.pow(part.len() as u32);
    Some(Duration::from_nanos_u128(whole + part))
}

#[test]
fn states_that_differ_in_when_and_how_often_only_are_one() {
    #[derive(Debug)]
    #[allow(dead_code)]
    struct State {
        interval: Duration,
        heard_at: Option<Duration>,
        seq: u64,
        epoch: farm_core::id::Epoch,
        closing: Option<Option<u64>>,
        n: u8,
    }
    let state = |pulses: u64, n| State {
        interval: Duration::from_millis(50),
        heard_at: Some(START + Duration::from_micros(50_250 * pulses)),
        seq: pulses,
        epoch: farm_core::id::Epoch((pulses << 8) | 2),
        closing: Some(Some(pulses)),
        n,
    };
    let digest = |pulses: u64, n| {
        let scale = Scale {
            now: START + Duration::from_micros(50_250 * pulses + 20),
            memory: Duration::from_secs(1),
            epoch: pulses,
        };
        let mut digest = hasher();
        for token in tokens(&state(pulses, n), pulses + 3) {
            scale.add(token, &mut digest);
        }
        digest.finish()
    };
    assert_eq!(digest(1, 1), digest(7, 1));
    assert_ne!(digest(1, 1), digest(7, 2));
}
