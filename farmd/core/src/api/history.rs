//! What has happened to the farm, as one node saw it: the entries of `farm history`.
//!
//! Owns the form in which an event is kept (one JSON object per line of `VAR/history.jsonl`), answered (`GET /v1/history`) and told in
//! words ([`super::history_text`]). The daemon makes entries out of the core's events; nothing here judges.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Most entries a node keeps in memory, and most that one answer has.
pub const HISTORY_LIMIT: usize = 10_000;

/// Answer to `GET /v1/history`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct History {
    /// The node that answers.
    pub node: String,
    /// Number of its newest entry, 0 if there is none; also if the filter leaves that one out.
    pub newest: u64,
    /// Oldest first.
    pub entries: Vec<HistoryEntry>,
}

/// One event.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct HistoryEntry {
    /// Rises by one with each entry of this node, across restarts of farmd.
    pub seq: u64,
    /// Local time of the node, `2026-11-21 05:31:00.123456`, as in the module log.
    pub time: String,
    /// The same in microseconds since 1970, UTC.
    pub unix_us: u64,
    /// The module it is about; absent if it is about nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// What happened.
    #[serde(flatten)]
    pub what: Happening,
}

/// What happened. Durations are milliseconds or, where the name says so, microseconds.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Happening {
    /// farmd has started.
    Started {
        /// Its version.
        version: String,
        /// Its start number.
        incarnation: u64,
        /// How the run before ended: true if as asked, false if it was killed or crashed; absent if there was none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        last_ended_in_order: Option<bool>,
        /// Who had it restarted in place (`farm reload`); absent if that is not how it started.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reloaded_by: Option<String>,
    },
    /// farmd ends as asked.
    Stopped {
        /// By whom: a signal, or a user.
        by: String,
        /// It ends to be restarted in place (`farm reload`).
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        reload: bool,
    },
    /// A peer is heard and hears this node.
    NodeAlive {
        /// Which.
        node: String,
        /// It has restarted since it was last alive.
        restarted: bool,
    },
    /// A peer is no longer alive.
    NodeDown(Departure),
    /// The agreed set of nodes is another one.
    ViewChanged {
        /// Before.
        before: Vec<String>,
        /// After; empty if this node has stepped out.
        after: Vec<String>,
        /// For how long the set before was in force here; absent if that is not known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stood_ms: Option<u64>,
        /// What is known of those that are out.
        out: Vec<Departure>,
    },
    /// Buckets have changed owner.
    MapChanged {
        /// Group of the module.
        group: String,
        /// Number of the map.
        map: u64,
        /// The node that proposed it.
        proposer: String,
        /// The nodes that agreed on it.
        view: Vec<String>,
        /// Why it was made.
        causes: Vec<MapCause>,
        /// What moved, against the map before; empty if this node does not know the map before.
        moved: Vec<Move>,
        /// Buckets of each owner now.
        counts: BTreeMap<String, u32>,
        /// From the proposal's arrival here to the commit here, microseconds.
        took_us: u64,
        /// From the last sign of life of a node that went silent to the commit here, milliseconds: for so long at most its buckets
        /// were unserved. Absent if every giver handed over itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unserved_ms: Option<u64>,
        /// Numbers of the [`Happening::ViewChanged`] entries by which the nodes that `causes` names came or went.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        follows: Vec<u64>,
    },
    /// This node has taken over a map that was agreed without it.
    MapLearned {
        /// Group of the module.
        group: String,
        /// Number of the map.
        map: u64,
        /// The node that proposed it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        proposer: Option<String>,
        /// Why it is another one than this node knew.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        causes: Vec<MapCause>,
        /// What has moved, against the map that this node knew; empty if it knew none, or had closed everything.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        moved: Vec<Move>,
        /// Buckets of each owner.
        counts: BTreeMap<String, u32>,
        /// Buckets that this node had open and gives up for it.
        gave_up: u32,
        /// Since this node took over the map it knew, or closed everything, milliseconds; absent if it knew none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after_ms: Option<u64>,
        /// As in [`Happening::MapChanged`], until this node knew of it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        unserved_ms: Option<u64>,
        /// Numbers of the [`Happening::ViewChanged`] entries by which the nodes that `causes` names came or went.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        follows: Vec<u64>,
    },
    /// This node has closed every bucket of a group at once.
    Closed {
        /// Group of the module.
        group: String,
        /// How many it had.
        buckets: u32,
        /// Why.
        why: String,
    },
    /// This node has stepped out: it accepts nothing.
    Fenced {
        /// Why.
        why: String,
        /// Peers that do not talk with it both ways.
        observers: Vec<String>,
    },
    /// It is back.
    Unfenced {
        /// For how long it was out; absent if that is not known.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        after_ms: Option<u64>,
    },
    /// This node's module takes no part.
    KeptOut {
        /// Why.
        why: String,
    },
    /// It may take part again.
    Readmitted,
    /// This node did not run, closed everything and joined anew.
    Paused {
        /// For how long.
        for_ms: u64,
    },
    /// Somebody gave a command that changes who serves.
    Asked {
        /// Who.
        by: String,
        /// What, e.g. `stop`, `drain s2`, `weight s2 0`.
        what: String,
    },
    /// The partition policy has decided.
    Policy {
        /// `serve`, `majority` or `witness`.
        policy: String,
        /// True if this side goes on serving.
        serves: bool,
        /// Why.
        why: String,
    },
    /// Something that a newer farmd has written and this one does not know.
    #[serde(other)]
    Unknown,
}

/// What is known of a node that is out, as this node saw it at that moment.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Departure {
    /// Which.
    pub node: String,
    /// What is wrong with it.
    pub cause: DepartureCause,
    /// Nodes that do not talk with it both ways.
    pub observers: Vec<String>,
    /// Nodes that do.
    pub talk_with_it: Vec<String>,
    /// Since it was last heard here on any lan; absent if never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silent_ms: Option<u64>,
    /// The same by lan.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub silent_ms_by_lan: BTreeMap<String, u64>,
    /// Its buckets, by the maps that this node worked with at that moment: where it is out of the view, these have to move. Empty if it
    /// had none, or this node worked with no map.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub owned: Vec<Owned>,
}

/// How many buckets of one group are a node's.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Owned {
    /// The module.
    pub module: String,
    /// Its group.
    pub group: String,
    /// How many.
    pub buckets: u32,
}

/// What is wrong with a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DepartureCause {
    /// Nothing of it was heard for the detection time.
    Silent,
    /// It has said goodbye.
    Left,
    /// Its `cluster.xml` is another one.
    OtherCluster,
    /// It is heard, and does not hear this node; of this node: others hear it, and it hears nobody.
    Deaf,
    /// It hears nobody, and nothing at all comes in there; said of this node only.
    CutOff,
    /// This node talks with it both ways; others do not.
    LeftOut,
    /// A cause that a newer farmd has written.
    #[serde(other)]
    Unknown,
}

/// One reason for a new map.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "snake_case")]
pub enum MapCause {
    /// The first map since this node's module started.
    First,
    /// This node had closed everything and takes part again; the others may have agreed on maps meanwhile.
    Returned,
    /// A node that had a share is out.
    NodeOut {
        /// Which.
        node: String,
        /// `silent`, `left` or another [`DepartureCause`].
        why: DepartureCause,
        /// Nodes that do not talk with it both ways.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        observers: Vec<String>,
        /// For how long it had not been heard here when this node noted that it is out; absent if it never was.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        silent_ms: Option<u64>,
    },
    /// A node that was not in the view takes a share.
    NodeIn {
        /// Which.
        node: String,
    },
    /// A node of the view has another weight; 0 is none.
    Weight {
        /// Which.
        node: String,
        /// Before.
        from: u16,
        /// After.
        to: u16,
        /// What it says of itself.
        why: String,
    },
    /// Nodes that served the same buckets apart have met again.
    Merge {
        /// What each gives up.
        yields: BTreeMap<String, u32>,
    },
    /// Shares were not what the weights ask for.
    Evened,
    /// A cause that a newer farmd has written.
    #[serde(other)]
    Unknown,
}

/// Buckets that go from one owner to another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Move {
    /// Who had them; absent if nobody.
    pub from: Option<String>,
    /// Who has them; absent if nobody.
    pub to: Option<String>,
    /// How many.
    pub buckets: u32,
}

/// Which entries are asked for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HistoryFilter {
    /// Only those about this module, and those about nodes.
    pub module: Option<String>,
    /// Only those from this moment on, microseconds since 1970.
    pub since_us: Option<u64>,
    /// Only those above this number.
    pub after: Option<u64>,
    /// Only this many of the newest; [`HISTORY_LIMIT`] without.
    pub last: Option<usize>,
}

impl HistoryFilter {
    /// Those of `entries` (oldest first) that are asked for, oldest first.
    pub fn select<'a, T: AsRef<HistoryEntry>>(&self, entries: impl DoubleEndedIterator<Item = &'a T>) -> Vec<&'a T> {
        let of_module =
            |entry: &HistoryEntry| self.module.is_none() || entry.module.is_none() || entry.module == self.module;
        let wanted = |entry: &HistoryEntry| {
            of_module(entry)
                && self.since_us.is_none_or(|since| entry.unix_us >= since)
                && self.after.is_none_or(|after| entry.seq > after)
        };
        let mut newest: Vec<&T> = entries
            .rev()
            .filter(|entry| wanted((*entry).as_ref()))
            .take(self.last.unwrap_or(HISTORY_LIMIT))
            .collect();
        newest.reverse();
        newest
    }
}

impl AsRef<Self> for HistoryEntry {
    fn as_ref(&self) -> &Self {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(seq: u64, module: Option<&str>) -> HistoryEntry {
        HistoryEntry {
            seq,
            time: "2026-11-21 05:31:00.123456".to_owned(),
            unix_us: seq * 10,
            module: module.map(str::to_owned),
            what: Happening::Readmitted,
        }
    }

    #[test]
    fn a_filter_takes_the_newest_of_what_is_asked_for() {
        let all = [
            entry(1, None),
            entry(2, Some("a")),
            entry(3, Some("b")),
            entry(4, Some("a")),
        ];
        let seqs = |filter: HistoryFilter| filter.select(all.iter()).iter().map(|e| e.seq).collect::<Vec<_>>();
        let all_of = HistoryFilter::default;
        assert_eq!(seqs(all_of()), [1, 2, 3, 4]);
        let module = Some("a".to_owned());
        assert_eq!(seqs(HistoryFilter { module, ..all_of() }), [1, 2, 4]);
        let since_us = Some(30);
        assert_eq!(seqs(HistoryFilter { since_us, ..all_of() }), [3, 4]);
        assert_eq!(
            seqs(HistoryFilter {
                after: Some(3),
                ..all_of()
            }),
            [4]
        );
        assert_eq!(
            seqs(HistoryFilter {
                last: Some(2),
                ..all_of()
            }),
            [3, 4]
        );
        assert!(
            seqs(HistoryFilter {
                last: Some(0),
                ..all_of()
            })
            .is_empty()
        );
    }
}
