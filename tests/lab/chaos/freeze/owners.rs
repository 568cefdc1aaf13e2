//! Whose a request was: what SYN-ACKs of two nodes for it mean, and which failures are those of the node that stood still.
//!
//! Judges by what the watcher saw at the switch ports, which is before any cut, and by when nodes were stopped. Never decides what is a broken promise.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::requests::Asked;
use crate::chaos::{Profile, ms};
use crate::http::Failure;
use crate::wire::{Evidence, Times};

/// One time that a node stood still or was cut off.
#[derive(Clone, Debug)]
pub(super) struct Round {
    /// Its switch port.
    pub port: String,
    /// Shortly before it began.
    pub before: Instant,
    /// When it had surely begun.
    pub begun: Instant,
    /// Shortly before it ended.
    pub ending: Instant,
    /// When all served again and everybody knew.
    pub over: Instant,
    /// True if nothing that the node sent came out of it.
    pub cut_off: bool,
}

impl Round {
    /// True if this node had answered in time what its heir then answered too.
    ///
    /// A SYN-ACK in time was sent before the lease ended, and a node is given up a detection time after its last heartbeat. The heir cannot know what the node
    /// did after that one, and replays it. What a port sends again is its kernel's repetition: the first one counts.
    fn explains(&self, ports: &Times, profile: Profile) -> bool {
        let (detection, pulse) = (profile.detection(), Duration::from_millis(profile.pulse_ms));
        let Some(own) = ports.get(&self.port).and_then(|times| times.first()) else {
            return false;
        };
        let mut heirs = ports.iter().filter(|(port, _)| **port != self.port);
        let (Some((_, heir)), None) = (heirs.next(), heirs.next()) else {
            return false;
        };
        // The last heartbeat is up to a pulse old when the node stops, and on a busy machine two.
        let taken_over = self.before + detection - pulse * 2;
        let in_time = *own + detection >= self.before && *own <= self.begun + detection;
        in_time && heir.first().is_some_and(|heir| (taken_over..=self.over).contains(heir))
    }

    /// True if nothing that this port sent at `at` reached anybody.
    fn hides(&self, port: &str, at: Instant) -> bool {
        self.cut_off && self.port == port && (self.begun..=self.ending).contains(&at)
    }

    /// True if the request was open at some time of the round.
    fn meets(&self, asked: &Asked) -> bool {
        asked.begun <= self.over && asked.ended >= self.before
    }
}

/// What SYN-ACKs of two nodes for one request mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Behind,
    Replayed,
    Unexplained,
}

fn classify(ports: &Times, rounds: &[Round], profile: Profile) -> Class {
    let hidden = |port: &str, at: Instant| rounds.iter().any(|round| round.hides(port, at));
    let seen = ports
        .iter()
        .filter(|(port, times)| !times.iter().all(|at| hidden(port, *at)));
    if seen.count() < 2 {
        Class::Behind
    } else if rounds.iter().any(|round| round.explains(ports, profile)) {
        Class::Replayed
    } else {
        Class::Unexplained
    }
}

/// Requests that had SYN-ACKs of two nodes.
#[derive(Clone, Debug, Default)]
pub(super) struct TwoOwners {
    /// All but one of the nodes sent theirs where nothing came out: no client saw them.
    pub behind: usize,
    /// One node answered in time, and its heir after it.
    pub replayed: usize,
    /// Neither, by the moments that are certain.
    pub unexplained: usize,
    /// The first of these.
    pub example: String,
}

impl TwoOwners {
    /// Sorts all that the watcher saw.
    pub(super) fn of(evidence: &Evidence, rounds: &[Round], profile: Profile) -> Self {
        let mut two = Self::default();
        for (attempt, ports) in evidence.two_owners() {
            match classify(ports, rounds, profile) {
                Class::Behind => two.behind += 1,
                Class::Replayed => two.replayed += 1,
                Class::Unexplained => {
                    if two.unexplained == 0 {
                        two.example = format!("{} by {}", attempt.client, describe(ports, rounds));
                    }
                    two.unexplained += 1;
                }
            }
        }
        two
    }
}

/// Who answered when, counted from the beginning of the last round that had begun then.
fn describe(ports: &Times, rounds: &[Round]) -> String {
    let firsts = || ports.iter().filter_map(|(port, times)| Some((port, *times.first()?)));
    let last = firsts().map(|(_, at)| at).max();
    let Some(round) = rounds
        .iter()
        .rfind(|round| last.is_some_and(|last| round.before <= last))
    else {
        return "two before any node was stopped".to_owned();
    };
    let said: Vec<String> = firsts()
        .map(|(port, at)| {
            let since = ms(at.saturating_duration_since(round.begun)) - ms(round.begun.saturating_duration_since(at));
            format!("{port} at {since:.0} ms")
        })
        .collect();
    format!("{} of the stop of {}", said.join(" and "), round.port)
}

/// How the requests of the clients ended.
#[derive(Debug, Default)]
pub(super) struct Fates<'a> {
    /// Answered to the byte.
    pub answered: usize,
    /// Failed, of those that the stopped node had accepted.
    pub there: usize,
    /// Failed, of those that only other nodes had accepted, or refused.
    pub elsewhere: Vec<&'a Asked>,
    /// Given up, of those that no node had accepted.
    pub nobody: Vec<&'a Asked>,
    /// Got bytes that are no answer to them.
    pub wrong: Vec<&'a Asked>,
}

impl<'a> Fates<'a> {
    /// Sorts `all`.
    pub(super) fn of(all: &'a [Asked], evidence: &Evidence, rounds: &[Round]) -> Self {
        let mut takers: BTreeMap<SocketAddr, BTreeSet<&str>> = BTreeMap::new();
        for (attempt, ports) in &evidence.syn_acks {
            let own = takers.entry(attempt.client).or_default();
            own.extend(ports.keys().map(String::as_str));
        }
        let mut fates = Self::default();
        for asked in all {
            let ports = asked.local.and_then(|local| takers.get(&local));
            let stopped = |ports: &BTreeSet<&str>| {
                let mut own = rounds.iter().filter(|round| ports.contains(round.port.as_str()));
                own.any(|round| round.meets(asked))
            };
            match (&asked.outcome, ports) {
                (Ok(_), _) => fates.answered += 1,
                (Err(Failure::BadAnswer(_)), _) => fates.wrong.push(asked),
                (Err(Failure::ConnectTimeout | Failure::Io(_)), None) => fates.nobody.push(asked),
                (Err(_), Some(ports)) if stopped(ports) => fates.there += 1,
                (Err(_), _) => fates.elsewhere.push(asked),
            }
        }
        fates
    }

    /// All that failed, wrong bytes apart.
    pub(super) fn failed(&self) -> usize {
        self.there + self.elsewhere.len() + self.nobody.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::PROFILES;
    use crate::wire::Attempt;

    /// Heartbeats every 50 ms, five of them are the detection time.
    const PROFILE: Profile = PROFILES[0];

    fn after(zero: Instant, millis: u64) -> Instant {
        zero + Duration::from_millis(millis)
    }

    /// Node 1 is stopped from 1000 ms to 2000 ms.
    fn round(zero: Instant, cut_off: bool) -> [Round; 1] {
        [Round {
            port: "p1".to_owned(),
            before: after(zero, 990),
            begun: after(zero, 1000),
            ending: after(zero, 2000),
            over: after(zero, 2600),
            cut_off,
        }]
    }

    fn times(zero: Instant, sent: &[(&str, u64)]) -> Times {
        let mut times = Times::new();
        for (port, at) in sent {
            times.entry((*port).to_owned()).or_default().push(after(zero, *at));
        }
        times
    }

    fn class(cut_off: bool, sent: &[(&str, u64)]) -> Class {
        let zero = Instant::now();
        classify(&times(zero, sent), &round(zero, cut_off), PROFILE)
    }

    #[test]
    fn an_heir_may_repeat_what_was_answered_within_the_lease() {
        assert_eq!(class(false, &[("p1", 980), ("p2", 1260)]), Class::Replayed);
        assert_eq!(class(false, &[("p1", 1190), ("p3", 1300)]), Class::Replayed);
        let repeated = [("p1", 1190), ("p2", 1300), ("p1", 2190)];
        assert_eq!(class(false, &repeated), Class::Replayed, "the kernel sends again");
    }

    #[test]
    fn two_nodes_that_both_might_be_seen_are_two_owners() {
        assert_eq!(
            class(false, &[("p1", 1300), ("p2", 1290)]),
            Class::Unexplained,
            "after the lease"
        );
        assert_eq!(
            class(false, &[("p1", 2100), ("p2", 1300)]),
            Class::Unexplained,
            "woken up"
        );
        assert_eq!(
            class(false, &[("p1", 1010), ("p2", 1020)]),
            Class::Unexplained,
            "no heir yet"
        );
        assert_eq!(
            class(false, &[("p1", 600), ("p2", 1300)]),
            Class::Unexplained,
            "heartbeats told it"
        );
        assert_eq!(
            class(false, &[("p2", 1100), ("p3", 1300)]),
            Class::Unexplained,
            "both are well"
        );
        let three = [("p1", 1100), ("p2", 1300), ("p3", 1300)];
        assert_eq!(class(false, &three), Class::Unexplained, "two heirs");
    }

    #[test]
    fn what_nothing_gets_out_of_is_not_seen() {
        assert_eq!(class(true, &[("p1", 1100), ("p2", 1300)]), Class::Behind);
        assert_eq!(class(true, &[("p1", 1600), ("p2", 1600)]), Class::Behind);
        assert_eq!(
            class(true, &[("p1", 1100), ("p1", 2100), ("p2", 1300)]),
            Class::Replayed
        );
        assert_eq!(
            class(true, &[("p1", 1600), ("p1", 2600), ("p2", 1300)]),
            Class::Unexplained
        );
        assert_eq!(class(true, &[("p2", 1600), ("p3", 1600)]), Class::Unexplained);
    }

    #[test]
    fn a_failure_is_explained_by_the_stop_of_its_own_node_only() {
        let zero = Instant::now();
        let end = |port| SocketAddr::from(([198, 18, 0, 100], port));
        let mut evidence = Evidence::default();
        for (port, taker) in [(1, "p1"), (2, "p2")] {
            let attempt = Attempt {
                client: end(port),
                vip: end(80),
                sequence: 7,
            };
            evidence.syn_acks.insert(attempt, times(zero, &[(taker, 1100)]));
        }
        let ask = |port, begun, outcome| Asked {
            local: Some(end(port)),
            begun: after(zero, begun),
            ended: after(zero, begun + 100),
            outcome,
        };
        let wrong = Failure::BadAnswer("x".to_owned());
        let all = [
            ask(1, 1050, Ok(1)),
            ask(1, 1050, Err(Failure::Reset)),
            ask(1, 3000, Err(Failure::Reset)),
            ask(2, 1050, Err(Failure::AnswerTimeout)),
            ask(3, 1050, Err(Failure::ConnectTimeout)),
            ask(3, 1050, Err(Failure::Refused)),
            ask(1, 1050, Err(wrong)),
        ];
        let rounds = round(zero, false);
        let fates = Fates::of(&all, &evidence, &rounds);
        assert_eq!((fates.answered, fates.there, fates.failed()), (1, 1, 5));
        assert_eq!(
            (fates.elsewhere.len(), fates.nobody.len(), fates.wrong.len()),
            (3, 1, 1)
        );
    }
}
