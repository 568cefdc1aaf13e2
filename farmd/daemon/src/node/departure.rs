//! What is remembered of nodes that are out, for the entries of the history that tell of it: who does not talk with them, since when, and
//! which buckets are theirs.
//!
//! Owns what was noted last of each node that is out, and who has how many buckets by the maps this node works with. The farm cannot be asked
//! for that: it tells of a dead node at the end of a turn in which it may have committed the next map already. Called by the chronicle;
//! decides nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use farm_core::api::history::{Departure, DepartureCause, Happening, MapCause, Owned};
use farm_core::farm::Farm;
use farm_core::handover::Handover;
use farm_core::id::{Epoch, ModuleName, NodeId};
use farm_core::membership::{Cause, Testimony};

use super::Node;
use super::history::millis;
use super::module::LocalModule;

/// What was noted last of each node that is out, by its name.
#[derive(Debug, Default)]
pub(super) struct Departures(BTreeMap<String, Departure>);

impl Departures {
    pub(super) fn note(&mut self, out: &Departure) {
        self.0.insert(out.node.clone(), out.clone());
    }

    /// The node is back.
    pub(super) fn forget(&mut self, node: &str) {
        self.0.remove(node);
    }

    pub(super) fn of(&self, node: &str) -> Option<&Departure> {
        self.0.get(node)
    }

    /// Adds to `what` those who by now do not talk with the nodes either. Who came back meanwhile has nothing to do with why it went.
    pub(super) fn complete(&self, what: &mut Happening) {
        match what {
            Happening::NodeDown(out) => self.complete_one(out),
            Happening::ViewChanged { out, .. } => out.iter_mut().for_each(|out| self.complete_one(out)),
            Happening::MapChanged { causes, .. } | Happening::MapLearned { causes, .. } => {
                for cause in causes {
                    if let MapCause::NodeOut {
                        node, why, observers, ..
                    } = cause
                        && let Some(word) = self.word_on(node, *why, observers)
                    {
                        observers.clone_from(&word.observers);
                    }
                }
            }
            _ => {}
        }
    }

    fn complete_one(&self, out: &mut Departure) {
        if let Some(word) = self.word_on(&out.node, out.cause, &out.observers) {
            out.observers.clone_from(&word.observers);
            out.talk_with_it.clone_from(&word.talk_with_it);
        }
    }

    /// What is known of `node`, if that is not less than what `observers` say.
    fn word_on(&self, node: &str, cause: DepartureCause, observers: &[String]) -> Option<&Departure> {
        self.of(node)
            .filter(|out| out.cause == cause && out.observers.len() >= observers.len())
    }
}

/// Who has how many buckets by the maps that this node works with.
#[derive(Debug, Default)]
pub(super) struct Holdings(BTreeMap<ModuleName, Vec<Holding>>);

/// One group.
#[derive(Debug, Default)]
struct Holding {
    /// The map that counted at the end of the last turn; zero if none did.
    committed: Epoch,
    /// `None` while no map counts here.
    counts: Option<BTreeMap<NodeId, u32>>,
}

impl Holding {
    /// That a map known before counts again, or that none counts any longer, is no event of the farm.
    fn end_turn(&mut self, committed: Epoch, counts: impl FnOnce() -> BTreeMap<NodeId, u32>) {
        let none = Epoch::default();
        if committed == none && self.committed != none {
            self.counts = None;
        } else if committed != none && self.counts.is_none() {
            self.counts = Some(counts());
        }
        self.committed = committed;
    }
}

impl Holdings {
    /// This node works with another map.
    pub(super) fn note(&mut self, module: &ModuleName, group: usize, counts: &BTreeMap<NodeId, u32>) {
        let groups = self.0.entry(module.clone()).or_default();
        if groups.len() <= group {
            groups.resize_with(group + 1, Holding::default);
        }
        groups[group].counts = Some(counts.clone());
    }

    /// At the end of a turn, after its events.
    pub(super) fn follow(&mut self, farm: &Farm, modules: &BTreeMap<ModuleName, LocalModule>) {
        self.0
            .retain(|name, _| modules.get(name).is_some_and(|local| local.machine.active()));
        for (name, _) in modules.iter().filter(|(_, local)| local.machine.active()) {
            let groups: Vec<&Handover> = (0..).map_while(|group| farm.group(name, group)).collect();
            let holdings = self.0.entry(name.clone()).or_default();
            holdings.resize_with(groups.len(), Holding::default);
            for (holding, handover) in holdings.iter_mut().zip(groups) {
                holding.end_turn(handover.committed(), || handover.map().counts());
            }
        }
    }

    /// Module, group and number of the buckets that are `node`'s.
    fn of(&self, node: NodeId) -> impl Iterator<Item = (&ModuleName, usize, u32)> {
        let groups = self
            .0
            .iter()
            .flat_map(|(name, groups)| groups.iter().enumerate().map(move |(i, group)| (name, i, group)));
        groups.filter_map(move |(name, i, group)| Some((name, i, *group.counts.as_ref()?.get(&node)?)))
    }
}

const fn cause_of(cause: Cause) -> DepartureCause {
    match cause {
        Cause::Silent => DepartureCause::Silent,
        Cause::Left => DepartureCause::Left,
        Cause::OtherCluster => DepartureCause::OtherCluster,
        Cause::Deaf => DepartureCause::Deaf,
        Cause::CutOff => DepartureCause::CutOff,
        Cause::LeftOut => DepartureCause::LeftOut,
    }
}

impl Node {
    /// What `testimony` says, with the buckets that are the node's before the event it belongs to moves any.
    pub(super) fn departure(&self, testimony: &Testimony) -> Departure {
        let lan_name = |lan: usize| self.cluster.lans.get(lan).map_or_else(String::new, |l| l.name.clone());
        let lans = testimony.lans.iter();
        let owned = self.chronicle.holdings().of(testimony.node);
        Departure {
            node: self.cluster.name(testimony.node).to_owned(),
            cause: cause_of(testimony.cause),
            observers: self.name_list(testimony.observers),
            talk_with_it: self.name_list(testimony.talk_with_it),
            silent_ms: testimony.silent.map(millis),
            silent_ms_by_lan: lans
                .filter_map(|(lan, silent)| Some((lan_name(*lan), millis((*silent)?))))
                .collect(),
            owned: owned
                .map(|(module, group, buckets)| Owned {
                    module: module.to_string(),
                    group: self.group_name(module, group),
                    buckets,
                })
                .collect(),
        }
    }

    /// Brings `departures` up to what the others say by now.
    pub(super) fn hear_others_of(&self, now: Duration, departures: &mut Departures) {
        for out in departures.0.values_mut() {
            let Some(node) = self.cluster.node_by_name(&out.node) else {
                continue;
            };
            let word = self.farm.membership().testimony(now, node);
            if cause_of(word.cause) == out.cause && word.observers.len() >= out.observers.len() {
                out.observers = self.name_list(word.observers);
                out.talk_with_it = self.name_list(word.talk_with_it);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn silent(node: &str, observers: &[&str]) -> Departure {
        Departure {
            node: node.to_owned(),
            cause: DepartureCause::Silent,
            observers: names(observers),
            talk_with_it: Vec::new(),
            silent_ms: Some(251),
            silent_ms_by_lan: BTreeMap::new(),
            owned: Vec::new(),
        }
    }

    fn observers_of_the_map(what: &Happening) -> &[String] {
        match what {
            Happening::MapChanged { causes, .. } => match &causes[..] {
                [MapCause::NodeOut { observers, .. }] => observers.as_slice(),
                other => panic!("{other:?}"),
            },
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_waits_is_completed_by_those_who_say_the_same_later_and_by_nothing_else() {
        let map_for = |why: DepartureCause| Happening::MapChanged {
            group: "http".to_owned(),
            map: 1,
            proposer: "s1".to_owned(),
            view: names(&["s1", "s2"]),
            causes: vec![MapCause::NodeOut {
                node: "s3".to_owned(),
                why,
                observers: names(&["s1"]),
                silent_ms: Some(251),
            }],
            moved: Vec::new(),
            counts: BTreeMap::new(),
            took_us: 0,
            unserved_ms: None,
            follows: Vec::new(),
        };
        let mut departures = Departures::default();
        departures.note(&silent("s3", &["s1", "s2"]));

        let mut down = Happening::NodeDown(silent("s3", &["s1"]));
        departures.complete(&mut down);
        assert_eq!(down, Happening::NodeDown(silent("s3", &["s1", "s2"])));
        let mut map = map_for(DepartureCause::Silent);
        departures.complete(&mut map);
        assert_eq!(observers_of_the_map(&map), names(&["s1", "s2"]));

        let mut other_cause = map_for(DepartureCause::Deaf);
        departures.complete(&mut other_cause);
        assert_eq!(observers_of_the_map(&other_cause), names(&["s1"]));
        departures.forget("s3");
        let mut back = map_for(DepartureCause::Silent);
        departures.complete(&mut back);
        assert_eq!(observers_of_the_map(&back), names(&["s1"]), "it is back");
    }

    #[test]
    fn a_nodes_buckets_are_those_of_the_last_map_told_and_none_while_no_map_counts() {
        let node = |i: usize| NodeId::new(i).unwrap();
        let web: ModuleName = "web".parse().unwrap();
        let shares = |of_last: u32| BTreeMap::from([(node(0), 4096 - of_last), (node(2), of_last)]);
        let mut holdings = Holdings::default();
        let of_last = |holdings: &Holdings| -> Vec<(usize, u32)> {
            let owned = holdings.of(node(2));
            owned.map(|(_, group, buckets)| (group, buckets)).collect()
        };
        assert!(of_last(&holdings).is_empty());
        holdings.note(&web, 1, &shares(1365));
        assert_eq!(of_last(&holdings), [(1, 1365)], "of the other group nothing is known");
        assert_eq!(holdings.of(node(1)).count(), 0);

        let end_turn = |holdings: &mut Holdings, committed: u64, last: u32| {
            let groups = holdings.0.get_mut(&web).unwrap();
            groups[1].end_turn(Epoch(committed), || shares(last));
        };
        end_turn(&mut holdings, 256, 9);
        assert_eq!(
            of_last(&holdings),
            [(1, 1365)],
            "a map in force is counted once, when it is told"
        );
        end_turn(&mut holdings, 0, 9);
        assert!(of_last(&holdings).is_empty(), "everything was closed");
        end_turn(&mut holdings, 256, 1366);
        assert_eq!(of_last(&holdings), [(1, 1366)], "the map that was known counts again");

        end_turn(&mut holdings, 0, 9);
        holdings.note(&web, 1, &shares(2048));
        end_turn(&mut holdings, 0, 9);
        assert_eq!(
            of_last(&holdings),
            [(1, 2048)],
            "learned while everything is closed: the others work with it"
        );
    }
}
