//! From the farm's events to entries of the history: what happened, who says so, why, and how long it took.
//!
//! Owns what has to be remembered between two events for that: proposals under way, the weights and the view of the last map, and entries
//! about nodes that wait a moment for the other nodes' word. Called by the owner loop for each event; changes nothing of the farm.

mod maps;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use farm_core::api::history::{Departure, Happening, HistoryEntry, MapCause};
use farm_core::handover::{self, Moves};
use farm_core::id::{Bucket, Epoch, ModuleName, NodeId, NodeSet};
use farm_core::membership;

use super::Node;
use super::departure::{Departures, Holdings};
use super::origin::Origins;
use super::share::lasting;
use crate::history::History;

/// How many pulses an entry about a node waits for what the others say of it: they judge within one pulse of each other, and their next
/// heartbeats tell.
const WORD_OF_OTHERS: u32 = 3;

/// Module and position of a group.
type GroupKey = (ModuleName, usize);

/// See the module doc.
#[derive(Debug)]
pub(super) struct Chronicle {
    history: History,
    /// Entries that are not numbered yet, oldest first, because the first of them waits until the time beside it.
    waiting: VecDeque<(Duration, HistoryEntry)>,
    under_way: BTreeMap<GroupKey, Proposal>,
    agreed: BTreeMap<GroupKey, Agreed>,
    /// What this node has closed last, and for which map.
    released: BTreeMap<GroupKey, (Epoch, u32)>,
    fenced_at: Option<Duration>,
    /// Since when the view is what it is.
    view_since: Duration,
    /// Which entry tells how each node came into the view last, or went out of it.
    turned: BTreeMap<String, u64>,
    departures: Departures,
    holdings: Holdings,
    /// Which entry has brought each bucket.
    origins: Origins,
}

/// A map that is being handed over.
#[derive(Debug)]
struct Proposal {
    epoch: Epoch,
    by: NodeId,
    view: NodeSet,
    at: Duration,
    weights: BTreeMap<NodeId, (u16, String)>,
}

/// For whom the map in force was made.
#[derive(Debug, Default)]
struct Agreed {
    view: NodeSet,
    weights: BTreeMap<NodeId, u16>,
    /// When this node took it over, or closed everything.
    since: Duration,
    /// What it gives this node, unless that was closed since.
    mine: u32,
    /// This node has closed everything since: others may have agreed on maps without it.
    closed: bool,
    /// Most buckets each node had open when nodes met again; empty unless they did since the last map.
    met: BTreeMap<NodeId, u32>,
}

impl Chronicle {
    /// Of a farmd that starts at `now`.
    pub(super) fn new(history: History, now: Duration) -> Self {
        Self {
            history,
            waiting: VecDeque::new(),
            under_way: BTreeMap::new(),
            agreed: BTreeMap::new(),
            released: BTreeMap::new(),
            fenced_at: None,
            view_since: now,
            turned: BTreeMap::new(),
            departures: Departures::default(),
            holdings: Holdings::default(),
            origins: Origins::default(),
        }
    }

    /// The entries on record.
    pub(super) fn history(&self) -> &History {
        &self.history
    }

    /// Who has how many buckets.
    pub(super) fn holdings(&self) -> &Holdings {
        &self.holdings
    }

    /// The entry that has brought a bucket to its owner, while it is in memory.
    pub(super) fn entry_of(&self, key: &GroupKey, bucket: Bucket) -> Option<Arc<HistoryEntry>> {
        let seq = self.origins.of(key, bucket)?;
        let settled = self.history.newest();
        let waiting = seq.checked_sub(settled + 1).and_then(|at| usize::try_from(at).ok());
        match waiting {
            None => self.history.entry(seq),
            Some(at) => self
                .waiting
                .get(at)
                .map(|(_, entry)| Arc::new(HistoryEntry { seq, ..entry.clone() })),
        }
    }

    /// Adds what happened now; it becomes visible no earlier than `until`. Returns the number that it will have.
    fn add(&mut self, module: Option<&ModuleName>, what: Happening, until: Duration) -> u64 {
        let entry = HistoryEntry {
            seq: 0,
            time: chrono::Local::now().format("%Y-%m-%d %H:%M:%S%.6f").to_string(),
            unix_us: unix_us(),
            module: module.map(ToString::to_string),
            what,
        };
        self.waiting.push_back((until, entry));
        self.history.newest() + self.waiting.len() as u64
    }

    /// Numbers and keeps what has waited long enough.
    fn settle(&mut self, now: Duration) {
        while let Some((_, entry)) = self.waiting.pop_front_if(|(until, _)| *until <= now) {
            self.history.push(entry);
        }
    }
}

fn unix_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl Node {
    /// Adds an entry about `module`, or about nodes. For whatever changes who serves and is no event of the farm: commands, policies.
    pub(super) fn record(&mut self, module: Option<&ModuleName>, what: Happening) {
        let now = self.now();
        self.chronicle.add(module, what, now);
    }

    /// Adds the entry of this farmd's start; `reloaded` if it was restarted in place.
    pub(super) fn record_start(&mut self, reloaded: bool) {
        let before = &self.chronicle.history;
        let what = Happening::Started {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            incarnation: self.incarnation.0,
            last_ended_in_order: before.last_ended_in_order(),
            reloaded_by: before.last_reload_by().filter(|_| reloaded),
        };
        self.orphans.are_own = before.last_ended_in_order() == Some(false);
        self.record(None, what);
    }

    /// Once a turn: entries that waited are completed by what the others say by then.
    pub(super) fn settle_history(&mut self) {
        let now = self.now();
        self.chronicle.holdings.follow(&self.farm, &self.modules);
        if !self.chronicle.waiting.is_empty() {
            let mut departures = std::mem::take(&mut self.chronicle.departures);
            self.hear_others_of(now, &mut departures);
            for (_, entry) in &mut self.chronicle.waiting {
                departures.complete(&mut entry.what);
            }
            self.chronicle.departures = departures;
        }
        self.chronicle.settle(now);
    }

    /// At the end of the loop: nothing waits any longer.
    pub(super) fn close_history(&mut self) {
        self.chronicle.settle(Duration::MAX);
    }

    pub(super) fn record_membership(&mut self, event: &membership::Event) {
        let now = self.now();
        let mut until = now;
        let what = match event {
            membership::Event::PeerAlive { peer, restarted } => {
                self.note_meeting();
                let node = self.cluster.name(*peer).to_owned();
                self.chronicle.departures.forget(&node);
                Happening::NodeAlive {
                    node,
                    restarted: *restarted,
                }
            }
            membership::Event::PeerDown { testimony, .. } => {
                until += self.cluster.heartbeat_interval * WORD_OF_OTHERS;
                let out = self.departure(testimony);
                self.chronicle.departures.note(&out);
                Happening::NodeDown(out)
            }
            membership::Event::ViewChanged { old, new, out } => {
                if new.iter().any(|n| !old.contains(n)) {
                    self.note_meeting();
                }
                if !out.is_empty() {
                    until += self.cluster.heartbeat_interval * WORD_OF_OTHERS;
                }
                for node in new.iter().filter(|n| !old.contains(*n)) {
                    self.chronicle.departures.forget(self.cluster.name(node));
                }
                let out: Vec<Departure> = out.iter().map(|t| self.departure(t)).collect();
                out.iter().for_each(|out| self.chronicle.departures.note(out));
                let since = std::mem::replace(&mut self.chronicle.view_since, now);
                Happening::ViewChanged {
                    before: self.name_list(*old),
                    after: self.name_list(*new),
                    stood_ms: Some(millis(now.saturating_sub(since))),
                    out,
                }
            }
            membership::Event::Fenced(Some(why)) => {
                self.chronicle.fenced_at = Some(now);
                let word = self.farm.membership().testimony(now, self.this);
                Happening::Fenced {
                    why: why.clone(),
                    observers: self.name_list(word.observers),
                }
            }
            membership::Event::Fenced(None) => Happening::Unfenced {
                after_ms: self.chronicle.fenced_at.take().map(|at| millis(now.saturating_sub(at))),
            },
            membership::Event::Joined => return,
        };
        let seq = self.chronicle.add(None, what, until);
        if let membership::Event::ViewChanged { old, new, .. } = event {
            self.note_view(seq, *old, *new);
        }
    }

    pub(super) fn record_handover(&mut self, module: &ModuleName, group: usize, event: &handover::Event) {
        let now = self.now();
        let key = (module.clone(), group);
        let what = match event {
            handover::Event::Proposed { epoch, view, .. } => {
                return self.note_proposal(now, key, *epoch, self.this, *view);
            }
            handover::Event::Accepted { epoch, by, view } => return self.note_proposal(now, key, *epoch, *by, *view),
            handover::Event::Released { epoch, lost, .. } => {
                self.chronicle.released.insert(key, (*epoch, *lost as u32));
                return;
            }
            handover::Event::Committed {
                epoch, counts, moved, ..
            } => self.map_changed(now, key, *epoch, counts, moved),
            handover::Event::Adopted { epoch, counts, moved } => self.map_learned(now, &key, *epoch, counts, moved),
            handover::Event::Shut => {
                self.chronicle.under_way.remove(&key);
                let agreed = self.chronicle.agreed.get_mut(&key);
                let buckets = agreed.map_or(0, |agreed| {
                    (agreed.closed, agreed.since) = (true, now);
                    std::mem::take(&mut agreed.mine)
                });
                Happening::Closed {
                    buckets,
                    group: self.group_name(module, group),
                    why: self.why_shut(module),
                }
            }
        };
        if let handover::Event::Committed { counts, .. } | handover::Event::Adopted { counts, .. } = event {
            self.chronicle.holdings.note(module, group, counts);
        }
        self.log_merge(module, &what);
        let seq = self.chronicle.add(Some(module), what, now);
        let key = (module.clone(), group);
        match self.farm.map(module, group) {
            Some(_) if *event == handover::Event::Shut => self.chronicle.origins.close(&key, seq, self.this),
            Some(map) => self.chronicle.origins.note(&key, seq, map, self.this),
            None => {}
        }
    }

    /// In the module's log too, which otherwise has only what this node itself gives up.
    fn log_merge(&self, module: &ModuleName, what: &Happening) {
        let (Happening::MapChanged { group, map, causes, .. } | Happening::MapLearned { group, map, causes, .. }) =
            what
        else {
            return;
        };
        for merge in causes.iter().filter(|cause| matches!(cause, MapCause::Merge { .. })) {
            let text = format!("map {map}: {merge} (group {group})");
            self.journal.write(module, "farm", 'E', &text);
        }
    }

    fn note_proposal(&mut self, now: Duration, key: GroupKey, epoch: Epoch, by: NodeId, view: NodeSet) {
        let proposal = Proposal {
            epoch,
            by,
            view,
            at: now,
            weights: self.weights(&key, view),
        };
        self.chronicle.under_way.insert(key, proposal);
    }

    fn map_changed(
        &mut self,
        now: Duration,
        key: GroupKey,
        epoch: Epoch,
        counts: &BTreeMap<NodeId, u32>,
        moved: &Moves,
    ) -> Happening {
        let proposal = self.chronicle.under_way.remove(&key).filter(|p| p.epoch == epoch);
        let proposal = proposal.unwrap_or_else(|| Proposal {
            epoch,
            by: self.this,
            view: self.farm.membership().view(),
            at: now,
            weights: self.weights(&key, self.farm.membership().view()),
        });
        self.chronicle.released.remove(&key);
        let before = self.chronicle.agreed.remove(&key);
        // What moved against a map that has long been another one elsewhere says nothing.
        let was_away = before.as_ref().is_some_and(|b| b.closed);
        let mut causes = self.causes(now, before.as_ref(), &proposal, counts);
        if causes.is_empty() {
            causes.push(if before.is_none() {
                MapCause::First
            } else {
                MapCause::Evened
            });
        }
        let unserved_ms = self.unserved(now, moved).filter(|_| !was_away);
        self.chronicle.agreed.insert(
            key.clone(),
            Agreed {
                view: proposal.view,
                weights: proposal.weights.iter().map(|(n, (w, _))| (*n, *w)).collect(),
                mine: counts.get(&self.this).copied().unwrap_or(0),
                since: now,
                closed: false,
                met: BTreeMap::new(),
            },
        );
        Happening::MapChanged {
            group: self.group_name(&key.0, key.1),
            map: epoch.counter(),
            proposer: self.cluster.name(proposal.by).to_owned(),
            view: self.name_list(proposal.view),
            follows: self.views_behind(&causes),
            causes,
            moved: if was_away { Vec::new() } else { self.move_list(moved) },
            counts: self.by_name(counts),
            took_us: u64::try_from(now.saturating_sub(proposal.at).as_micros()).unwrap_or(u64::MAX),
            unserved_ms,
        }
    }

    /// Why the map is another one: what differs from that for which the last one was made.
    fn causes(
        &self,
        now: Duration,
        before: Option<&Agreed>,
        proposal: &Proposal,
        counts: &BTreeMap<NodeId, u32>,
    ) -> Vec<MapCause> {
        let Some(before) = before else { return Vec::new() };
        let name = |n: NodeId| self.cluster.name(n).to_owned();
        let mut causes = Vec::new();
        if before.closed {
            causes.push(MapCause::Returned);
        }
        let met = &before.met;
        if met.values().sum::<u32>() > farm_core::id::BUCKETS as u32 {
            let yields = met.iter().filter_map(|(node, open)| {
                let left = open.saturating_sub(counts.get(node).copied().unwrap_or(0));
                (left > 0).then(|| (name(*node), left))
            });
            causes.push(MapCause::Merge {
                yields: yields.collect(),
            });
        }
        for (node, _) in before
            .weights
            .iter()
            .filter(|(n, w)| **w > 0 && !proposal.view.contains(**n))
        {
            let noted = self.chronicle.departures.of(self.cluster.name(*node)).cloned();
            let out = noted.unwrap_or_else(|| self.departure(&self.farm.membership().testimony(now, *node)));
            causes.push(MapCause::NodeOut {
                node: out.node,
                why: out.cause,
                observers: out.observers,
                silent_ms: out.silent_ms,
            });
        }
        for (node, (weight, why)) in &proposal.weights {
            let was = before.weights.get(node).copied().unwrap_or(0);
            if was == 0 && *weight > 0 && !before.view.contains(*node) {
                causes.push(MapCause::NodeIn { node: name(*node) });
            } else if was != *weight {
                causes.push(MapCause::Weight {
                    node: name(*node),
                    from: was,
                    to: *weight,
                    why: why.clone(),
                });
            }
        }
        // Nodes whose module runs nowhere in the last map any more, with nothing said: their share simply went.
        for (node, was) in before
            .weights
            .iter()
            .filter(|(n, w)| **w > 0 && proposal.view.contains(**n) && !proposal.weights.contains_key(n))
        {
            causes.push(MapCause::Weight {
                node: name(*node),
                from: *was,
                to: 0,
                why: String::new(),
            });
        }
        causes
    }

    /// Weight of each member that runs the module, with what it says of itself.
    pub(super) fn weights(&self, key: &GroupKey, view: NodeSet) -> BTreeMap<NodeId, (u16, String)> {
        let (module, group) = key;
        let mut weights = BTreeMap::new();
        for (peer, modules) in self.farm.reports().iter().filter(|(n, _)| view.contains(**n)) {
            let report = modules.iter().find(|r| r.name == *module).filter(|r| r.active());
            if let Some(report) = report
                && let Some(group) = report.groups.get(*group)
            {
                weights.insert(*peer, (group.weight, lasting(&report.why).to_owned()));
            }
        }
        if view.contains(self.this)
            && let Some(local) = self.modules.get(module)
            && local.machine.active()
        {
            let groups = local.config.vip.as_ref().map_or(&[][..], |v| &v.groups);
            let ready = local.open && local.machine.ready() && local.link_problem.is_none();
            let weight = groups
                .get(*group)
                .filter(|_| ready)
                .map_or(0, |g| self.share_weight(module, local, g));
            let why = self.why_of(module, local);
            weights.insert(self.this, (weight, lasting(&why).to_owned()));
        }
        weights
    }

    /// Nodes may have met that both served: what each says it has open is noted before it gives anything up.
    fn note_meeting(&mut self) {
        for (key, agreed) in &mut self.chronicle.agreed {
            let (module, group) = key;
            let mine = agreed.mine;
            let mut note = |node: NodeId, open: u32| {
                let most = agreed.met.entry(node).or_insert(0);
                *most = (*most).max(open);
            };
            for peer in self.farm.reports().keys() {
                let report = self.farm.report(*peer, module).filter(|r| r.active());
                if let Some(group) = report.and_then(|r| r.groups.get(*group)) {
                    note(*peer, group.open.into());
                }
            }
            // The farm may have closed here already what this event is about.
            note(self.this, mine);
        }
    }

    /// Why everything of a module is closed here.
    fn why_shut(&self, module: &ModuleName) -> String {
        if let Some(why) = self.farm.membership().fenced() {
            return format!("stepped out: {why}");
        }
        if let Some(why) = self.farm.kept_out(module) {
            return format!("kept out: {why}");
        }
        match self.modules.get(module) {
            Some(local) if local.shut => "the application is being stopped before the others confirmed".to_owned(),
            Some(local) if self.farm.membership().joining() && local.machine.active() => {
                "this node did not run for a while and joins anew".to_owned()
            }
            Some(local) => local.machine.why(),
            None => "the module is no longer configured".to_owned(),
        }
    }

    pub(super) fn name_list(&self, set: NodeSet) -> Vec<String> {
        set.iter().map(|n| self.cluster.name(n).to_owned()).collect()
    }

    fn by_name(&self, counts: &BTreeMap<NodeId, u32>) -> BTreeMap<String, u32> {
        counts
            .iter()
            .map(|(n, count)| (self.cluster.name(*n).to_owned(), *count))
            .collect()
    }

    /// Name of a group of a module; its position if the module is not configured here.
    pub(super) fn group_name(&self, module: &ModuleName, group: usize) -> String {
        let groups = self.modules.get(module).and_then(|m| m.config.vip.as_ref());
        groups
            .and_then(|vip| vip.groups.get(group))
            .map_or_else(|| group.to_string(), |g| g.name.clone())
    }
}

#[cfg(test)]
mod tests {
    use farm_core::api::history::HistoryFilter;

    use super::*;
    use crate::journal::Journal;
    use crate::scratch::Scratch;

    #[test]
    fn entries_keep_their_order_although_the_first_waits_for_the_word_of_others() {
        let var = Scratch::new("chronicle");
        let journal = Journal::start(var.path()).unwrap();
        let (history, _) = History::load(var.path(), journal);
        let mut chronicle = Chronicle::new(history, Duration::ZERO);
        let ms = Duration::from_millis;
        let stopped = |by: &str| Happening::Stopped {
            by: by.to_owned(),
            reload: false,
        };
        let shown = |chronicle: &Chronicle| {
            let answer = chronicle.history().select("s1", &HistoryFilter::default());
            let json = serde_json::to_value(answer).unwrap();
            let entries = json["entries"].as_array().unwrap().clone();
            entries
                .iter()
                .map(|e| format!("{} {}", e["seq"], e["by"].as_str().unwrap()))
                .collect::<Vec<_>>()
        };
        chronicle.add(None, stopped("first"), ms(150));
        chronicle.add(None, stopped("second"), ms(10));
        chronicle.settle(ms(149));
        assert_eq!(
            shown(&chronicle),
            Vec::<String>::new(),
            "the second must not overtake the first"
        );
        chronicle.settle(ms(150));
        assert_eq!(shown(&chronicle), ["1 first", "2 second"]);
    }
}
