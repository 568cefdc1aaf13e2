//! The language that picks frames for `farm trace`: a small part of pcap's (pcap-filter(7)), with this program's verdicts added.
//!
//! ```text
//! filter    = [ condition { "and" condition } ]
//! condition = "host" ADDR | "net" ADDR "/" LENGTH | "vip" ADDR | "port" N | PROTOCOL [ "port" N ]
//!           | VERDICT | "reason" NAME
//! PROTOCOL  = "tcp" | "udp" | "icmp"
//! VERDICT   = "accepted" | "dropped" | "forwarded" | "held" | "punted"
//! ```
//! Pure. The command line reads a filter to say at once what is wrong with it, the daemon to apply it.

use std::fmt;
use std::net::IpAddr;
use std::ops::Range;
use std::str::FromStr;

use super::{Cause, Outcome, View};
use crate::balance::flow::{TCP, UDP};

/// What a frame must be to be shown: all conditions hold.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Filter {
    conditions: Vec<Condition>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Condition {
    /// Either end.
    Host(IpAddr),
    /// Either end is in the network.
    Net(IpAddr, u8),
    /// The end that is a virtual address.
    Vip(IpAddr),
    /// Either port.
    Port(u16),
    Protocol(Protocol),
    Outcome(Outcome),
    Cause(Cause),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Protocol {
    Tcp,
    Udp,
    /// Of either family.
    Icmp,
}

impl Protocol {
    const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

/// A frame, as far as a filter looks at it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subject {
    /// Who speaks to whom.
    pub view: View,
    /// What became of it.
    pub outcome: Outcome,
    /// Others got it, too.
    pub sent_on: bool,
    /// Why.
    pub cause: Cause,
}

/// What is wrong with a filter, where, and what was expected.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FilterError {
    text: String,
    at: Range<usize>,
    problem: String,
}

impl FilterError {
    /// Two lines: the filter, and signs under what is wrong in it.
    pub fn marked(&self) -> String {
        let count = |range: Range<usize>| self.text.get(range).map_or(0, |part| part.chars().count());
        let signs = "^".repeat(count(self.at.clone()).max(1));
        format!("{}\n{}{signs}", self.text, " ".repeat(count(0..self.at.start)))
    }
}

impl fmt::Display for FilterError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let before = self.text.get(..self.at.start).map_or(0, |part| part.chars().count());
        write!(f, "filter, character {}: {}", before + 1, self.problem)
    }
}

impl std::error::Error for FilterError {}

impl Filter {
    /// True if `subject` is to be shown.
    pub fn matches(&self, subject: &Subject) -> bool {
        self.conditions.iter().all(|condition| condition.holds(subject))
    }

    /// True if everything is shown.
    pub fn is_empty(&self) -> bool {
        self.conditions.is_empty()
    }
}

impl Condition {
    fn holds(&self, subject: &Subject) -> bool {
        let view = &subject.view;
        match self {
            Self::Host(addr) => view.client == *addr || view.vip == *addr,
            Self::Net(net, length) => [view.client, view.vip]
                .into_iter()
                .any(|addr| network(addr, *length) == Some(*net)),
            Self::Vip(addr) => view.vip == *addr,
            Self::Port(port) => view.ports.is_some_and(|(a, b)| a == *port || b == *port),
            Self::Protocol(Protocol::Tcp) => view.protocol == TCP,
            Self::Protocol(Protocol::Udp) => view.protocol == UDP,
            Self::Protocol(Protocol::Icmp) => view.is_icmp(),
            Self::Outcome(Outcome::Forwarded) => subject.sent_on || subject.outcome == Outcome::Forwarded,
            Self::Outcome(outcome) => subject.outcome == *outcome,
            Self::Cause(cause) => subject.cause == *cause,
        }
    }
}

/// `addr` without the bits after the first `length`; `None` if it has fewer.
fn network(addr: IpAddr, length: u8) -> Option<IpAddr> {
    let length = u32::from(length);
    match addr {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(32u32.checked_sub(length)?).unwrap_or(0);
            Some(IpAddr::V4((v4.to_bits() & mask).into()))
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(128u32.checked_sub(length)?).unwrap_or(0);
            Some(IpAddr::V6((v6.to_bits() & mask).into()))
        }
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(addr) => write!(f, "host {addr}"),
            Self::Net(net, length) => write!(f, "net {net}/{length}"),
            Self::Vip(addr) => write!(f, "vip {addr}"),
            Self::Port(port) => write!(f, "port {port}"),
            Self::Protocol(protocol) => f.write_str(protocol.name()),
            Self::Outcome(outcome) => f.write_str(outcome.name()),
            Self::Cause(cause) => write!(f, "reason {}", cause.name()),
        }
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, condition) in self.conditions.iter().enumerate() {
            let and = if i > 0 { " and " } else { "" };
            write!(f, "{and}{condition}")?;
        }
        Ok(())
    }
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Self, FilterError> {
        let mut words = Words { text, at: 0 };
        let mut filter = Self::default();
        if words.peek().is_none() {
            return Ok(filter);
        }
        loop {
            filter.conditions.push(condition(&mut words)?);
            if let Some(Condition::Protocol(Protocol::Tcp | Protocol::Udp)) = filter.conditions.last()
                && words.peek().is_some_and(|word| word.is("port"))
            {
                filter.conditions.push(condition(&mut words)?);
            }
            match words.next() {
                None => return Ok(filter),
                Some(word) if word.is("and") || word.is("&&") => {}
                Some(word) if word.is("or") || word.is("not") || word.is("||") || word.is("!") => {
                    let problem = format!("`{}` is not known here; conditions are joined by `and` only", word.text);
                    return Err(words.error(&word, problem));
                }
                Some(word) => {
                    let problem = format!("`{}`: `and` is expected before another condition", word.text);
                    return Err(words.error(&word, problem));
                }
            }
        }
    }
}

fn condition(words: &mut Words<'_>) -> Result<Condition, FilterError> {
    const EXPECTED: &str =
        "host, net, vip, port, tcp, udp, icmp, accepted, dropped, forwarded, held, punted or reason is expected";
    let word = words.next().ok_or_else(|| words.missing(EXPECTED))?;
    let lower = word.text.to_ascii_lowercase();
    let simple = match lower.as_str() {
        "tcp" => Some(Condition::Protocol(Protocol::Tcp)),
        "udp" => Some(Condition::Protocol(Protocol::Udp)),
        "icmp" | "icmp6" => Some(Condition::Protocol(Protocol::Icmp)),
        outcome => Outcome::named(outcome).map(Condition::Outcome),
    };
    if let Some(condition) = simple {
        return Ok(condition);
    }
    match lower.as_str() {
        "host" => Ok(Condition::Host(words.value("an address", address)?)),
        "vip" => Ok(Condition::Vip(words.value("an address", address)?)),
        "port" => Ok(Condition::Port(
            words.value("a port, 0 to 65535,", |text| text.parse().ok())?,
        )),
        "net" => {
            let wanted = "a network, such as 198.18.0.0/15 or 2001:db8::/32,";
            let named = words.peek();
            let (addr, length) = words.value(wanted, prefix)?;
            match network(addr, length) {
                Some(net) if net == addr => Ok(Condition::Net(net, length)),
                Some(net) => {
                    let problem = format!("{addr} has bits behind the first {length}; `net {net}/{length}` is meant?");
                    Err(words.error_at(named, problem))
                }
                None => Err(words.error_at(named, format!("{addr} has fewer than {length} bits"))),
            }
        }
        "reason" => {
            let named = words.peek();
            let name = words.value("a reason", |text| Some(text.to_ascii_lowercase()))?;
            Cause::named(&name).map(Condition::Cause).ok_or_else(|| {
                let all: Vec<&str> = Cause::all().map(Cause::name).collect();
                words.error_at(
                    named,
                    format!("`{name}` is no reason; expected is one of {}", all.join(", ")),
                )
            })
        }
        "and" | "&&" => Err(words.error(&word, format!("`{}` stands alone: {EXPECTED}", word.text))),
        _ => Err(words.error(&word, format!("`{}` is not known: {EXPECTED}", word.text))),
    }
}

fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok().map(|addr: IpAddr| addr.to_canonical())
}

fn prefix(text: &str) -> Option<(IpAddr, u8)> {
    let (addr, length) = text.split_once('/')?;
    Some((address(addr)?, length.parse().ok()?))
}

/// The words of a filter that are still to be read.
struct Words<'a> {
    text: &'a str,
    at: usize,
}

#[derive(Clone, Copy)]
struct Word<'a> {
    text: &'a str,
    at: usize,
}

impl Word<'_> {
    fn is(&self, word: &str) -> bool {
        self.text.eq_ignore_ascii_case(word)
    }
}

impl<'a> Words<'a> {
    fn peek(&self) -> Option<Word<'a>> {
        let rest = self.text.get(self.at..)?;
        let start = self.at + (rest.len() - rest.trim_start().len());
        let rest = self.text.get(start..)?;
        let text = rest.split_whitespace().next()?;
        Some(Word { text, at: start })
    }

    fn next(&mut self) -> Option<Word<'a>> {
        let word = self.peek()?;
        self.at = word.at + word.text.len();
        Some(word)
    }

    /// The next word as what `read` makes of it.
    fn value<T>(&mut self, wanted: &str, read: impl Fn(&str) -> Option<T>) -> Result<T, FilterError> {
        let word = self
            .next()
            .ok_or_else(|| self.missing(&format!("{wanted} is expected")))?;
        let problem = || format!("`{}`: {wanted} is expected", word.text);
        read(word.text).ok_or_else(|| self.error(&word, problem()))
    }

    fn error(&self, word: &Word<'_>, problem: String) -> FilterError {
        FilterError {
            text: self.text.to_owned(),
            at: word.at..word.at + word.text.len(),
            problem,
        }
    }

    fn error_at(&self, word: Option<Word<'_>>, problem: String) -> FilterError {
        let end = Word {
            text: "",
            at: self.text.len(),
        };
        self.error(&word.unwrap_or(end), problem)
    }

    fn missing(&self, expected: &str) -> FilterError {
        self.error_at(None, format!("the filter ends here: {expected}"))
    }
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
