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
    /// Its Ethernet address.
    pub mac: String,
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
    /// From when on others may have what its node had.
    ///
    /// They give a node up a detection time after its last heartbeat, which is up to a pulse old when the node stops, and on a busy machine two.
    fn taken_over(&self, profile: Profile) -> Instant {
        self.before + profile.detection() - pulse(profile) * 2
    }

    /// True if the node at `port` had answered in time, at `own`, what its heir answered at `heir`.
    ///
    /// A SYN-ACK in time was sent before the lease ended. The heir cannot know what the node did after its last heartbeat, and replays it.
    fn replays(&self, port: &str, own: Instant, heir: Instant, profile: Profile) -> bool {
        let in_time = own + profile.detection() >= self.before && own <= self.begun + profile.detection();
        self.port == port && in_time && (self.taken_over(profile)..=self.over).contains(&heir)
    }

    /// True if buckets may have changed hands because of it at some time from `from` to `to`.
    fn moves(&self, from: Instant, to: Instant, profile: Profile) -> bool {
        self.taken_over(profile) <= to && self.over >= from
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

fn pulse(profile: Profile) -> Duration {
    Duration::from_millis(profile.pulse_ms)
}

/// What SYN-ACKs of several nodes for one request mean, the better explained the smaller.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Class {
    Behind,
    Replayed,
    AskedAgain,
    Unexplained,
}

/// Judges a request that was sent at `asked` and answered at `ports`: each node's answer by the one before it, and by every round.
fn classify(asked: &[Instant], ports: &Times, rounds: &[Round], profile: Profile) -> Class {
    let hidden = |port: &str, at: Instant| rounds.iter().any(|round| round.hides(port, at));
    // What a port sends again is its kernel's repetition: the first one counts.
    let mut answers: Vec<(Instant, &str)> = ports
        .iter()
        .filter(|(port, times)| !times.iter().all(|at| hidden(port, *at)))
        .filter_map(|(port, times)| Some((*times.first()?, port.as_str())))
        .collect();
    answers.sort_unstable();
    let steps = answers.windows(2).map(|pair| {
        let ((own, port), (heir, _)) = (pair[0], pair[1]);
        // A client that has had an answer does not ask again. One that it gets while it asks is on its way for less than a pulse.
        let lost = || asked.iter().any(|at| *at >= own + pulse(profile) && *at <= heir);
        let moved = || rounds.iter().any(|round| round.moves(own, heir, profile));
        if rounds.iter().any(|round| round.replays(port, own, heir, profile)) {
            Class::Replayed
        } else if lost() && moved() {
            Class::AskedAgain
        } else {
            Class::Unexplained
        }
    });
    steps.max().unwrap_or(Class::Behind)
}

/// Requests that had SYN-ACKs of two nodes.
#[derive(Clone, Debug, Default)]
pub(super) struct TwoOwners {
    /// All but one of the nodes sent theirs where nothing came out: no client saw them.
    pub behind: usize,
    /// One node answered in time, and its heir after it.
    pub replayed: usize,
    /// The client asked again after the first answer, which it had not got, and another node had the bucket by then.
    pub asked_again: usize,
    /// None of these, by the moments that are certain.
    pub unexplained: usize,
    /// All moments of the first of these.
    pub example: String,
}

impl TwoOwners {
    /// Sorts all that the watcher saw.
    pub(super) fn of(evidence: &Evidence, rounds: &[Round], profile: Profile) -> Self {
        let mut two = Self::default();
        for (attempt, ports) in evidence.two_owners() {
            let asked = evidence.syns.get(attempt).map(Vec::as_slice).unwrap_or_default();
            match classify(asked, ports, rounds, profile) {
                Class::Behind => two.behind += 1,
                Class::Replayed => two.replayed += 1,
                Class::AskedAgain => two.asked_again += 1,
                Class::Unexplained => {
                    if two.unexplained == 0 {
                        let all = describe(asked, ports, rounds, profile);
                        two.example = format!("{} to {}: {all}", attempt.client, attempt.vip);
                    }
                    two.unexplained += 1;
                }
            }
        }
        two
    }
}

/// When a request was sent and who answered it when, and the rounds around it, all counted from the first of its moments.
fn describe(asked: &[Instant], ports: &Times, rounds: &[Round], profile: Profile) -> String {
    let all = || asked.iter().chain(ports.values().flatten()).copied();
    let (Some(zero), Some(last)) = (all().min(), all().max()) else {
        return String::new();
    };
    let after = |at: Instant| {
        let since = ms(at.saturating_duration_since(zero)) - ms(zero.saturating_duration_since(at));
        format!("{since:.1}")
    };
    let list = |times: &[Instant]| times.iter().map(|at| after(*at)).collect::<Vec<_>>().join(", ");
    let mut said = vec![format!("asked at {} ms", list(asked))];
    said.extend(
        ports
            .iter()
            .map(|(port, times)| format!("{port} answered at {} ms", list(times))),
    );
    let near = rounds
        .iter()
        .filter(|round| round.before <= last && round.over + profile.detection() >= zero);
    said.extend(near.map(|round| {
        format!(
            "{} was stopped from {} to {} ms, and all served before {} ms",
            round.port,
            after(round.begun),
            after(round.ending),
            after(round.over)
        )
    }));
    said.join("; ")
}

/// The port of the node that has this Ethernet address, if it stood still at some time.
fn named(mac: &str, rounds: &[Round]) -> String {
    let round = rounds.iter().find(|round| round.mac == mac);
    round.map_or(mac, |round| round.port.as_str()).to_owned()
}

/// When `asked` and its repetitions went out, who answered and who reset it, and the rounds around it.
pub(super) fn story(asked: &Asked, evidence: &Evidence, rounds: &[Round], profile: Profile) -> String {
    let within = |at: &Instant| *at + SLACK >= asked.begun && *at <= asked.ended + SLACK;
    let attempts = evidence
        .syns
        .iter()
        .filter(|(attempt, times)| Some(attempt.client) == asked.local && times.iter().any(within));
    let told = attempts.map(|(attempt, times)| {
        let answers = evidence.syn_acks.get(attempt).cloned().unwrap_or_default();
        let entries = evidence.entries.get(attempt).into_iter().flatten();
        let entries: Vec<String> = entries.map(|mac| named(&mac.to_string(), rounds)).collect();
        let all = describe(times, &answers, rounds, profile);
        let resets = evidence.resets.iter().chain(&evidence.client_resets);
        let resets =
            resets.filter(|reset| (reset.vip, reset.client) == (attempt.vip, attempt.client) && within(&reset.at));
        let resets = resets.map(|reset| {
            let since = times
                .first()
                .map_or(Duration::ZERO, |asked| reset.at.saturating_duration_since(*asked));
            format!("; {} reset it at {:.1} ms", reset.port, ms(since))
        });
        let resets: String = resets.collect();
        format!("to {} by {}: {all}{resets}", attempt.vip, entries.join(", "))
    });
    told.collect::<Vec<_>>().join("; ")
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

/// How much earlier than it was the watcher may have a moment: it reads two clocks, one after the other.
const SLACK: Duration = Duration::from_millis(20);

impl<'a> Fates<'a> {
    /// Sorts `all`.
    pub(super) fn of(all: &'a [Asked], evidence: &Evidence, rounds: &[Round]) -> Self {
        let mut takers: BTreeMap<SocketAddr, Vec<(Instant, &str)>> = BTreeMap::new();
        for (attempt, ports) in &evidence.syn_acks {
            let firsts = ports
                .iter()
                .filter_map(|(port, times)| Some((*times.first()?, port.as_str())));
            takers.entry(attempt.client).or_default().extend(firsts);
        }
        let mut fates = Self::default();
        for asked in all {
            let answers = asked.local.and_then(|local| takers.get(&local));
            // A client uses a port again: what was answered before or after is another connection's.
            let ports: BTreeSet<&str> = answers
                .into_iter()
                .flatten()
                .filter(|(at, _)| *at + SLACK >= asked.begun && *at <= asked.ended)
                .map(|(_, port)| *port)
                .collect();
            let mut own = rounds.iter().filter(|round| ports.contains(round.port.as_str()));
            let stopped = own.any(|round| round.meets(asked));
            match &asked.outcome {
                Ok(_) => fates.answered += 1,
                Err(Failure::BadAnswer(_)) => fates.wrong.push(asked),
                Err(Failure::ConnectTimeout | Failure::Io(_)) if ports.is_empty() => fates.nobody.push(asked),
                Err(_) if stopped => fates.there += 1,
                Err(_) => fates.elsewhere.push(asked),
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
    use farm_core::id::MacAddr;

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
            mac: String::new(),
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
        asked_class(cut_off, &[], sent)
    }

    fn asked_class(cut_off: bool, asked: &[u64], sent: &[(&str, u64)]) -> Class {
        let zero = Instant::now();
        let asked: Vec<Instant> = asked.iter().map(|at| after(zero, *at)).collect();
        classify(&asked, &times(zero, sent), &round(zero, cut_off), PROFILE)
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
        assert_eq!(
            class(false, &[("p1", 1240), ("p2", 1200)]),
            Class::Unexplained,
            "the heir was first"
        );
        let three = [("p1", 1100), ("p2", 1300), ("p3", 1300)];
        assert_eq!(class(false, &three), Class::Unexplained, "two heirs");
    }

    #[test]
    fn a_client_that_asks_again_has_not_had_the_first_answer() {
        let sent = [("p1", 600), ("p2", 1601)];
        assert_eq!(asked_class(false, &[599, 1600], &sent), Class::AskedAgain);
        let repeated = [("p1", 600), ("p1", 1602), ("p2", 1601)];
        assert_eq!(asked_class(false, &[599, 1600], &repeated), Class::AskedAgain);
        for (asked, why) in [
            (&[599][..], "it asked once"),
            (&[599, 1700][..], "it asked again after both"),
            (&[599, 620][..], "the first answer was still on its way"),
        ] {
            assert_eq!(asked_class(false, asked, &sent), Class::Unexplained, "{why}");
        }
        let both = [("p1", 600), ("p2", 1601), ("p3", 1602)];
        assert_eq!(
            asked_class(false, &[599, 1600], &both),
            Class::Unexplained,
            "two answered the second one"
        );
        // Before the first and after the last bucket has moved.
        assert_eq!(
            asked_class(false, &[9, 1009], &[("p1", 10), ("p2", 1010)]),
            Class::Unexplained
        );
        assert_eq!(
            asked_class(false, &[2999, 4000], &[("p1", 3000), ("p2", 4001)]),
            Class::Unexplained
        );
    }

    #[test]
    fn every_round_counts_for_each_of_several_answers() {
        let zero = Instant::now();
        let [first] = round(zero, true);
        let second = Round {
            port: "p2".to_owned(),
            mac: String::new(),
            before: after(zero, 3990),
            begun: after(zero, 4000),
            ending: after(zero, 5000),
            over: after(zero, 5600),
            cut_off: true,
        };
        let rounds = [first, second];
        let class = |asked: &[u64], sent: &[(&str, u64)]| {
            let asked: Vec<Instant> = asked.iter().map(|at| after(zero, *at)).collect();
            classify(&asked, &times(zero, sent), &rounds, PROFILE)
        };
        let behind_the_first = [("p1", 1300), ("p2", 3950), ("p3", 4300)];
        assert_eq!(class(&[], &behind_the_first), Class::Replayed);
        let twice = [("p1", 980), ("p2", 1300), ("p3", 4300)];
        assert_eq!(class(&[979], &twice), Class::Unexplained);
        assert_eq!(class(&[979, 4299], &twice), Class::AskedAgain);
        // Each was in time and behind its own cut.
        assert_eq!(class(&[], &[("p1", 1100), ("p2", 4100)]), Class::Behind);
    }

    #[test]
    fn requests_are_counted_and_the_first_that_nothing_explains_is_told_whole() {
        let zero = Instant::now();
        let attempt = |port| Attempt {
            client: SocketAddr::from(([198, 18, 0, 100], port)),
            vip: SocketAddr::from(([198, 18, 0, 20], 80)),
            sequence: 7,
        };
        let mut evidence = Evidence::default();
        let mut add = |attempt, asked: u64, sent: &[(&str, u64)]| {
            evidence.syns.insert(attempt, vec![after(zero, asked)]);
            evidence.syn_acks.insert(attempt, times(zero, sent));
        };
        add(attempt(1), 1010, &[("p2", 1011), ("p2", 2011)]);
        add(attempt(2), 1100, &[("p1", 1101), ("p3", 1300)]);
        let count = |evidence: &Evidence| {
            let two = TwoOwners::of(evidence, &round(zero, false), PROFILE);
            (
                [two.behind, two.replayed, two.asked_again, two.unexplained],
                two.example,
            )
        };
        assert_eq!(count(&evidence), ([0, 1, 0, 0], String::new()));
        let stolen = attempt(3);
        evidence.syns.insert(stolen, vec![after(zero, 1500)]);
        let answers = times(zero, &[("p2", 1501), ("p2", 2501), ("p3", 1502)]);
        evidence.syn_acks.insert(stolen, answers);
        let told = "198.18.0.100:3 to 198.18.0.20:80: asked at 0.0 ms; p2 answered at 1.0, 1001.0 ms; p3 answered at 2.0 ms; \
                    p1 was stopped from -500.0 to 500.0 ms, and all served before 1100.0 ms";
        assert_eq!(count(&evidence), ([0, 1, 0, 1], told.to_owned()));
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
            // From a port that was used before, and that is used again.
            ask(2, 1150, Err(Failure::ConnectTimeout)),
            ask(2, 950, Err(Failure::ConnectTimeout)),
        ];
        let rounds = round(zero, false);
        let fates = Fates::of(&all, &evidence, &rounds);
        assert_eq!((fates.answered, fates.there, fates.failed()), (1, 1, 7));
        assert_eq!(
            (fates.elsewhere.len(), fates.nobody.len(), fates.wrong.len()),
            (3, 3, 1)
        );
    }

    #[test]
    fn the_story_of_a_request_has_its_own_repetitions_and_the_rounds_around_them() {
        let zero = Instant::now();
        let client = SocketAddr::from(([198, 18, 0, 100], 1));
        let attempt = |sequence| Attempt {
            client,
            vip: SocketAddr::from(([198, 18, 0, 20], 80)),
            sequence,
        };
        let mut evidence = Evidence::default();
        let tries = [1010, 2010, 4010].map(|at| after(zero, at)).to_vec();
        evidence.syns.insert(attempt(7), tries);
        let entries = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2], [2, 0, 0, 0, 0, 1]].map(MacAddr);
        evidence.entries.insert(attempt(7), entries.to_vec());
        evidence.syns.insert(attempt(8), vec![after(zero, 9000)]);
        let asked = Asked {
            local: Some(client),
            begun: after(zero, 1010),
            ended: after(zero, 6010),
            outcome: Err(Failure::ConnectTimeout),
        };
        let mut rounds = round(zero, false);
        rounds[0].mac = "02:00:00:00:00:01".to_owned();
        assert_eq!(
            story(&asked, &evidence, &rounds, PROFILE),
            "to 198.18.0.20:80 by p1, 02:00:00:00:00:02, p1: asked at 0.0, 1000.0, 3000.0 ms; \
             p1 was stopped from -10.0 to 990.0 ms, and all served before 1590.0 ms"
        );
    }
}
