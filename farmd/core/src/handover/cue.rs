//! Reads the surroundings: what do they call for? Changes nothing but the cache of the wanted map.

use std::collections::BTreeMap;

use crate::balance::assign::{BucketMap, assign};
use crate::id::{Epoch, NodeId, NodeSet};
use crate::wire::heartbeat::MapReport;

use super::step::Cue;
use super::{Closed, Handover, PeerGroup, Surroundings};

impl Handover {
    /// Every number used so far anywhere, so that the next one is new.
    pub(super) fn note_epochs(&mut self, around: &Surroundings<'_>) {
        let reports = around.peers.values().map(|p| p.report);
        let seen = reports.flat_map(|r| {
            let map = r.map.as_ref().map_or(Epoch::default(), |m| m.epoch);
            [r.promised, r.committed, map]
        });
        self.highest = seen.fold(self.highest, Epoch::max);
        if around.coordinator != Some(self.this)
            && let Some(pending) = &mut self.pending
        {
            pending.weights = None;
        }
    }

    /// See [`Cue`].
    pub(super) fn cue(&mut self, around: &Surroundings<'_>) -> Cue {
        if around.closed != Closed::No && self.closed != around.closed {
            return Cue::Close;
        }
        if let Some(map) = self.newer_map(around) {
            return Cue::Newer(map.clone());
        }
        if self.closed != Closed::No {
            return match around.closed {
                Closed::No => Cue::Reopen,
                _ if self.committed > Epoch::default() => Cue::Outdated,
                Closed::Draining | Closed::Unserved | Closed::Shut => Cue::Quiet,
            };
        }
        if self.committed < self.known && self.has_open_all_of(&self.map) {
            return Cue::NothingToOpen;
        }
        // A commit and the next proposal may come in one report.
        if self.is_committed_by_another(around) {
            return Cue::Agreed;
        }
        if let Some((coordinator, proposal)) = self.proposal(around) {
            return Cue::Proposal(coordinator, proposal.clone());
        }
        if around.coordinator == Some(self.this) {
            return self.coordinators_cue(around);
        }
        Cue::Quiet
    }

    /// A committed map that this node has not taken part in. Maps that it has agreed on alone, before it closed everything, are not newer than one by which
    /// others serve.
    fn newer_map<'a>(&self, around: &Surroundings<'a>) -> Option<&'a MapReport> {
        let starts_anew = self.closed == Closed::No
            && self.committed == Epoch::default()
            && self.closing.is_none()
            && around.coordinator != Some(self.this);
        let newest = around
            .peers
            .values()
            .filter(|p| p.eligible)
            .filter_map(|p| {
                let map = p.report.map.as_ref().filter(|m| m.epoch == p.report.committed)?;
                Some((p, map))
            })
            .max_by_key(|(_, map)| map.epoch)
            .filter(|(p, map)| map.epoch > self.known || starts_anew && map.epoch < self.known && p.report.open > 0)?
            .1;
        // This one comes by commit, and is opened then.
        let followed = self.pending.as_ref().is_some_and(|p| p.epoch == newest.epoch);
        (!followed).then_some(newest)
    }

    fn is_committed_by_another(&self, around: &Surroundings<'_>) -> bool {
        self.pending.as_ref().is_some_and(|pending| {
            pending.epoch > self.committed.max(self.known)
                && around.peers.values().any(|p| p.report.committed == pending.epoch)
        })
    }

    /// What the coordinator proposes, if it is new and this node may follow.
    fn proposal<'a>(&self, around: &Surroundings<'a>) -> Option<(NodeId, &'a MapReport)> {
        let coordinator = around.coordinator.filter(|c| *c != self.this)?;
        let report = around.peers.get(&coordinator)?.report;
        let proposal = report.map.as_ref()?;
        let is_new = proposal.epoch > self.promised
            && proposal.epoch > report.committed
            && self.pending.as_ref().is_none_or(|p| p.epoch < proposal.epoch);
        let may_follow = proposal.view.contains(self.this) && Self::covers_all_that_serve(around, proposal.view);
        (is_new && may_follow).then_some((coordinator, proposal))
    }

    fn coordinators_cue(&mut self, around: &Surroundings<'_>) -> Cue {
        let members: BTreeMap<NodeId, PeerGroup<'_>> = around
            .peers
            .iter()
            .filter(|(n, p)| around.view.contains(**n) && p.eligible)
            .map(|(n, p)| (*n, *p))
            .collect();
        // Whoever knows a newer map sends it; deciding on an older one would move buckets for nothing.
        if members.values().any(|p| p.report.committed > self.known)
            || !Self::covers_all_that_serve(around, around.view)
        {
            return Cue::Quiet;
        }
        let mut weights: BTreeMap<NodeId, u16> = members.iter().map(|(n, p)| (*n, p.report.weight)).collect();
        weights.insert(self.this, around.weight);
        weights.retain(|_, w| *w > 0);
        let outstanding = self
            .pending
            .as_ref()
            .filter(|p| p.weights.is_some() && p.epoch > self.committed);
        let (propose, agreed) = match outstanding {
            Some(p) => (
                p.weights.as_ref() != Some(&weights)
                    || p.view != around.view
                    || p.epoch < self.highest
                    || p.base < self.known,
                self.promised == p.epoch && members.values().all(|peer| peer.report.promised == p.epoch),
            ),
            None => (self.is_unbalanced(&members, &weights), false),
        };
        match (propose, agreed) {
            (true, _) => Cue::Unbalanced(weights),
            (false, true) => Cue::Agreed,
            (false, false) => Cue::Quiet,
        }
    }

    fn is_unbalanced(&mut self, members: &BTreeMap<NodeId, PeerGroup<'_>>, weights: &BTreeMap<NodeId, u16>) -> bool {
        self.find_wanted(weights);
        let fits = self.wanted.as_ref().is_some_and(|(.., wanted)| *wanted == self.map);
        let behind = |p: &PeerGroup<'_>| p.report.committed != self.committed && p.report.promised != self.committed;
        // It has closed buckets for a proposal that came to nothing, because its coordinator no longer is one.
        let promised_more = |p: &PeerGroup<'_>| p.report.promised > self.committed;
        let lagging = members.values().any(|p| behind(p) || promised_more(p)) && {
            let shares = self.map.counts();
            members.iter().any(|(n, p)| {
                let share = shares.get(n).copied().unwrap_or(0);
                (behind(p) && share > 0) || (promised_more(p) && u32::from(p.report.open) < share)
            })
        };
        let self_lagging = !self.has_open_all_of(&self.map);
        !fits || lagging || self_lagging || (self.committed == Epoch::default() && !weights.is_empty())
    }

    /// The best map for `weights`, computed once per change.
    pub(super) fn find_wanted(&mut self, weights: &BTreeMap<NodeId, u16>) -> &BucketMap {
        let fresh = self.wanted.take().filter(|(w, e, _)| w == weights && *e == self.known);
        let known = self.known;
        let map = &self.map;
        let entry = fresh.unwrap_or_else(|| (weights.clone(), known, assign(map, weights)));
        &self.wanted.insert(entry).2
    }

    /// True if every node with which this one talks both ways and that may have buckets open is in `view`, and promises what is agreed there.
    pub(super) fn covers_all_that_serve(around: &Surroundings<'_>, view: NodeSet) -> bool {
        around.peers.iter().all(|(n, p)| {
            view.contains(*n) && p.eligible || p.fenced || !p.hears_us || p.report.committed == Epoch::default()
        })
    }

    /// True if every bucket that `map` gives this node is open here.
    pub(super) fn has_open_all_of(&self, map: &BucketMap) -> bool {
        let (owners, _) = map.as_bytes().as_chunks();
        let this = self.this.as_u8();
        let mut owners = owners.iter().zip(self.open.as_bytes());
        owners.all(|(owners, open)| which_are(this, *owners) & !open == 0)
    }
}

/// Bit by bit, which of `bytes` are `wanted`: eight at a time, because a coordinator asks this of a whole map at every heartbeat.
fn which_are(wanted: u8, bytes: [u8; 8]) -> u8 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    let differs = u64::from_le_bytes(bytes) ^ u64::from_le_bytes([wanted; 8]);
    // The highest bit of each byte that is zero, and of no other (Warren, Hacker's Delight, section 6-1).
    let zero = !(((differs & LOW) + LOW) | differs | LOW);
    // The product moves bit 8 i to bit 56 + i.
    ((zero >> 7).wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
}

#[cfg(test)]
mod tests {
    use super::which_are;

    #[test]
    fn eight_owners_at_once_are_told_as_one_by_one() {
        let values = [0, 1, 2, 63, 0x7f, 0x80, 0x81, 0xfe, 0xff];
        for wanted in values {
            for pattern in 0..=255_u8 {
                for other in values.into_iter().filter(|other| *other != wanted) {
                    let is_in = |i: usize| pattern & (1 << i) != 0;
                    let bytes = std::array::from_fn(|i| if is_in(i) { wanted } else { other });
                    assert_eq!(which_are(wanted, bytes), pattern, "{wanted} in {bytes:?}");
                }
            }
        }
    }
}
