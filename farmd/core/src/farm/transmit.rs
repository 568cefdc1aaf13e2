//! What this node says, when, and to whom.
//!
//! Called by [`super::Farm`] at the end of each turn.

use std::time::Duration;

use crate::handover::Handover;
use crate::id::{Incarnation, ModuleName, NodeId, NodeSet};
use crate::wire::heartbeat::{Echo, Heartbeat, MAX_DATAGRAM, MAX_REQUESTERS, ModuleReport, Relayed};

use super::electorate::Electorate;
use super::{Farm, Transmit};

/// Most bucket maps in one heartbeat: with the rest of a full report they fit into the largest UDP datagram.
const MAX_MAPS: usize = 4;
/// When the maps follow that found no place.
const MAPS_FOLLOW: Duration = Duration::from_millis(1);
/// While a node is missing, it is also sought by broadcast after each heartbeat of this number: at the defaults five times a second.
const SEEK: u16 = 4;
/// Nodes up to which each heartbeat carries requesters.
const FEW: usize = 8;
/// Bytes of a heartbeat that come after it is measured: the echo, and how many nodes' word is passed on.
const TRAILER: usize = Echo::LENGTH + 1;
/// Heartbeats per pulse to peers to or from which some have gone missing.
const NUDGES: u32 = 4;
/// Heartbeats that may go out before their time one after the other, with news or as answers.
const HURRIES: u32 = 16;

/// Where the sequence numbers of an incarnation begin: so that those of two incarnations are not taken for each other (Fibonacci hashing,
/// Knuth, The Art of Computer Programming, volume 3, section 6.4).
pub(super) const fn first_seq(incarnation: Incarnation) -> u64 {
    incarnation.0.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40
}

/// Who gets a heartbeat.
#[derive(Clone, Copy)]
enum To {
    /// All peers.
    All,
    /// These.
    Only(NodeSet),
    /// These, which are not heard, by broadcast.
    Missing(NodeSet),
}

impl Farm {
    /// A heartbeat of `peer` came in after some had gone missing: it is answered at once, or with the next nudge if much has been said lately.
    pub(super) fn answer(&mut self, now: Duration, peer: NodeId) {
        let waits = self.answer.contains(peer);
        self.answer.insert(peer);
        if !waits && now < self.next_nudge && self.may_hurry_at() <= now {
            self.hurry(now);
            self.next_nudge = now;
        }
    }

    /// From when on a heartbeat may go out before its time: at once for the first few, then one in the time of a nudge.
    fn may_hurry_at(&self) -> Duration {
        self.hurried.saturating_sub(self.interval / NUDGES * (HURRIES - 1))
    }

    fn hurry(&mut self, now: Duration) {
        self.hurried = self.hurried.max(now) + self.interval / NUDGES;
    }

    /// Sends what is due now, and notes when the next is.
    pub(super) fn transmit(&mut self, now: Duration) {
        let mut urgent = self.membership.endangered(now);
        urgent = NodeSet::from_bits(urgent.bits() | self.answer.bits());
        let nudge = self.interval / NUDGES;
        if now >= self.beat_at {
            if self.hurried <= now {
                self.hurried = Duration::ZERO;
            }
        } else if now >= self.next_heartbeat {
            // News. Much of it goes out together.
            let may = self.may_hurry_at();
            if may <= now {
                self.hurry(now);
            } else {
                self.next_heartbeat = may.min(self.beat_at);
            }
        }
        if now >= self.next_heartbeat {
            self.beat = self.beat.wrapping_add(1);
            let left_out = self.send(now, To::All);
            // Each map once; who still lacks one then gets it with the next pulse.
            self.follow_ups = match self.follow_ups {
                0 => left_out.div_ceil(MAX_MAPS),
                more => more - 1,
            };
            self.beat_at = now
                + if self.follow_ups > 0 {
                    MAPS_FOLLOW
                } else {
                    self.interval
                };
            self.next_heartbeat = self.beat_at;
            self.next_nudge = now + nudge;
            self.answer = NodeSet::EMPTY;
            if self.beat.is_multiple_of(SEEK) {
                self.seek(now);
            }
        } else if now >= self.next_nudge && !urgent.is_empty() {
            self.send(now, To::Only(urgent));
            self.next_nudge = now + nudge;
            self.answer = NodeSet::EMPTY;
        }
        self.nudge_at = if urgent.is_empty() {
            self.membership.endangered_at(now)
        } else {
            Some(self.next_nudge)
        };
    }

    /// Looks for nodes that are not heard by another heartbeat, with a number of its own, where no address has to be resolved.
    fn seek(&mut self, now: Duration) {
        let heard = self.membership.heard(now);
        let all = self.lans.iter().fold(0, |bits, lan| bits | lan.bits());
        let missing = NodeSet::from_bits(all & !heard.bits());
        if !missing.is_empty() {
            self.send(now, To::Missing(missing));
        }
    }

    /// Sends the node's state; returns how many maps found no place and should follow soon.
    fn send(&mut self, now: Duration, receivers: To) -> usize {
        let mut maps = 0;
        let mut left_out = 0;
        let mut modules: Vec<ModuleReport> = self.report_modules();
        // Groups whose maps found no place last time come first now.
        let groups: usize = modules.iter().map(|m| m.groups.len()).sum();
        let turn = self.map_turn;
        let mut last = turn;
        for step in 0..groups {
            let index = (turn + step) % groups;
            let group = modules.iter_mut().flat_map(|m| &mut m.groups).nth(index);
            let Some(group) = group.filter(|g| g.map.is_some()) else {
                continue;
            };
            if maps < MAX_MAPS {
                maps += 1;
                last = index + 1;
            } else {
                group.map = None;
                left_out += 1;
            }
        }
        // Only what all have got has had its turn.
        if matches!(receivers, To::All) {
            self.map_turn = last.checked_rem(groups).unwrap_or(0);
        }
        self.seq += 1;
        self.membership.note_sent(now, self.seq);
        // Many nodes tell the same; in turn they are as quick, and a heartbeat stays short.
        let requesters = match self.names.len() {
            0..=FEW => MAX_REQUESTERS,
            _ if self.beat.is_multiple_of(8) => MAX_REQUESTERS / 2,
            _ => 0,
        };
        let mut heartbeat = Heartbeat {
            sender: self.this,
            lan: 0,
            // "Accepts nothing" is true only once the data plane has closed too.
            fenced: self.membership.fenced().is_some() && self.has_closed_all(),
            leaving: self.leaving,
            returning: self.returning,
            joining: self.membership.joining(),
            incarnation: self.incarnation,
            seq: self.seq,
            beat: self.beat,
            cluster_digest: self.digest,
            hears: self.membership.hears(now),
            excludes: self.membership.excluded(),
            echo: None,
            hearsay: self.membership.hearsay(now),
            relayed: Vec::new(),
            modules,
            requesters: self.requesters.next(requesters),
        };
        let unsaid = self.add_relayed(&mut heartbeat);
        if matches!(receivers, To::All) {
            self.relays.turn = unsaid;
        }
        for (lan, all) in self.lans.iter().enumerate() {
            let to = match receivers {
                To::All => *all,
                To::Only(only) | To::Missing(only) => NodeSet::from_bits(all.bits() & only.bits()),
            };
            if to.is_empty() {
                continue;
            }
            heartbeat.lan = lan as u8;
            heartbeat.echo = self.membership.echo(now, lan, self.seq);
            self.transmits.push_back(Transmit {
                lan,
                to,
                broadcast: matches!(receivers, To::Missing(_)),
                nudge: matches!(receivers, To::Only(_)),
                payload: heartbeat.emit(&self.key),
            });
        }
        left_out
    }

    /// Adds what this node passes on, as far as there is room; returns the position of the first word that found none.
    fn add_relayed(&self, heartbeat: &mut Heartbeat) -> usize {
        let mut words = self.relayed();
        let count = words.len();
        if count == 0 {
            return 0;
        }
        let first = self.relays.turn % count;
        words.rotate_left(first);
        let mut room = MAX_DATAGRAM.saturating_sub(heartbeat.emit(&self.key).len() + TRAILER);
        let fits = |word: &Relayed| {
            let left = room.checked_sub(word.length());
            room = left.unwrap_or(room);
            left.is_some()
        };
        let said: Vec<bool> = words.iter().map(fits).collect();
        let unsaid = said.iter().position(|said| !said).unwrap_or(0);
        let mut said = said.into_iter();
        words.retain(|_| said.next() == Some(true));
        heartbeat.relayed = words;
        (first + unsaid) % count
    }

    /// What to say of each module.
    fn report_modules(&self) -> Vec<ModuleReport> {
        let reports = self.modules.iter().map(|(name, module)| {
            let held_back = module.kept_out.as_ref().or(module.withheld.as_ref());
            let groups = module.groups.iter().enumerate().map(|(i, group)| {
                let able = self.membership.fenced().is_none() && !self.membership.waits();
                let ready = module.local.ready && held_back.is_none() && able;
                let weight = if ready { module.local.weights[i] } else { 0 };
                group.report(weight, self.must_teach(name, i, group))
            });
            let electorate = if self.membership.links().is_broken(self.membership.view()) {
                self.electorate(name)
            } else {
                Electorate::default()
            };
            ModuleReport {
                name: name.clone(),
                digest: module.local.digest,
                state: module.local.state,
                quality: module.local.quality,
                joining: module.joining || self.membership.waits(),
                withheld: module.withheld.is_some(),
                runs: electorate.runs,
                why: held_back.unwrap_or(&module.local.why).clone(),
                macs: module.local.macs.clone(),
                groups: groups.collect(),
            }
        });
        reports.collect()
    }

    /// True if a member lacks this group's committed map, and no lower one that talks with that member has it.
    fn must_teach(&self, name: &ModuleName, index: usize, group: &Handover) -> bool {
        let mine = group.committed();
        let view = self.membership.view();
        let links = self.membership.links();
        let peers = || {
            self.reports
                .iter()
                .filter(|(n, _)| view.contains(**n))
                .filter_map(|(n, modules)| {
                    let report = modules.iter().find(|r| r.name == *name).filter(|r| r.active())?;
                    report.groups.get(index).map(|g| (*n, g))
                })
        };
        let taught_by_another =
            |n: NodeId| peers().any(|(m, g)| m < self.this && g.committed == mine && m != n && links.talk(m, n));
        peers()
            .filter(|(_, g)| g.committed < mine && g.promised != mine)
            .any(|(n, _)| !taught_by_another(n))
    }
}
