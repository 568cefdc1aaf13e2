//! What the farm knows, for who drives it and for status. Changes nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::balance::assign::{BucketMap, assign};
use crate::balance::plan::GroupPlan;
use crate::handover::Handover;
use crate::id::{Epoch, MacAddr, ModuleName, NodeId, NodeSet};
use crate::membership::Membership;
use crate::requesters::Requesters;
use crate::wire::heartbeat::ModuleReport;

use super::Farm;

impl Farm {
    /// Number of the plan that [`Self::group_plan`] now describes; it rises whenever a bucket's state
    /// differs.
    pub fn plan_version(&self) -> u64 {
        self.plan_version
    }

    /// Bucket states of one group.
    pub fn group_plan(&self, module: &ModuleName, group: usize) -> Option<GroupPlan> {
        self.modules
            .get(module)?
            .groups
            .get(group)
            .map(|g| g.plan(format!("{module}/{group}")))
    }

    /// True if no bucket of the module is open here.
    pub fn is_released(&self, module: &ModuleName) -> bool {
        self.modules
            .get(module)
            .is_none_or(|m| m.groups.iter().all(Handover::is_released))
    }

    /// True if no bucket of any module is open here.
    pub(super) fn has_closed_all(&self) -> bool {
        self.modules.keys().all(|module| self.is_released(module))
    }

    /// True once buckets this node gave up are open elsewhere, or nobody is there to open them: the committed
    /// map gives it nothing, nor does one that is under way, and none is under way that this node has proposed.
    pub fn is_handed_over(&self, module: &ModuleName) -> bool {
        let groups = self.modules.get(module).map_or(0, |m| m.groups.len());
        (0..groups).all(|group| self.is_group_handed_over(module, group))
    }

    /// As [`Self::is_handed_over`], of one group.
    pub fn is_group_handed_over(&self, module: &ModuleName, group: usize) -> bool {
        self.group(module, group).is_none_or(|g| {
            let given_up = || {
                let owners = g.map().owners();
                !owners.contains(self.this) && self.have_committed(module, group, g.committed(), owners)
            };
            let waits = g.is_to_gain() || g.is_proposing();
            g.is_released() && !waits && g.has_left() && (g.committed() == Epoch::default() || given_up())
        })
    }

    /// True if all members among `owners` work with the map `epoch` of a group, or a newer one. What a stopped module says is not heard, so a
    /// coordinator that stopped before would leave them without the commit.
    fn have_committed(&self, name: &ModuleName, index: usize, epoch: Epoch, owners: NodeSet) -> bool {
        let view = self.membership.view();
        let members = self
            .reports
            .keys()
            .filter(|n| view.contains(**n) && owners.contains(**n));
        let mut reports = members.filter_map(|n| self.report(*n, name).filter(|r| r.active())?.groups.get(index));
        reports.all(|g| g.committed >= epoch)
    }

    /// True if the committed map is the one that the weights told by the members of the view lead to, and this node has
    /// open what it gives: no bucket is about to move.
    pub fn is_settled(&self, module: &ModuleName, group: usize) -> bool {
        let Some(local) = self.modules.get(module) else {
            return true;
        };
        let Some(handover) = local.groups.get(group) else {
            return true;
        };
        let out = self.membership.fenced().is_some() || local.kept_out.is_some() || local.withheld.is_some();
        if out || self.membership.waits() || local.joining {
            return false;
        }
        let view = self.membership.view();
        let peers = self
            .reports
            .iter()
            .filter(|(peer, _)| view.contains(**peer))
            .filter_map(|(peer, modules)| {
                let report = modules.iter().find(|r| r.name == *module)?;
                let eligible = report.active() && report.digest == local.local.digest;
                Some((*peer, report.groups.get(group).filter(|_| eligible)?.weight))
            });
        let own = if local.local.ready {
            local.local.weights[group]
        } else {
            0
        };
        let weights: BTreeMap<NodeId, u16> = peers.chain([(self.this, own)]).filter(|(_, w)| *w > 0).collect();
        if weights.is_empty() {
            return handover.open_count() == 0;
        }
        let map = handover.map();
        let mine = map.counts().get(&self.this).copied().unwrap_or(0) as usize;
        handover.open_count() == mine && assign(map, &weights) == *map
    }

    /// The hand-over of one group, for status.
    pub fn group(&self, module: &ModuleName, group: usize) -> Option<&Handover> {
        self.modules.get(module)?.groups.get(group)
    }

    /// Why this node's module is kept out of the farm, if it is.
    pub fn kept_out(&self, module: &ModuleName) -> Option<&str> {
        self.modules.get(module)?.kept_out.as_deref()
    }

    /// Why this node does not serve its module although it could: the partition policy forbids it.
    pub fn withheld(&self, module: &ModuleName) -> Option<&str> {
        self.modules.get(module)?.withheld.as_deref()
    }

    /// Ethernet addresses of the service interfaces of `module` at each node in the view that runs it.
    pub fn macs(&self, module: &ModuleName) -> impl Iterator<Item = (NodeId, &[MacAddr])> {
        let of = move |macs: &'_ [(ModuleName, Vec<MacAddr>)]| macs.iter().position(|(name, _)| name == module);
        self.macs
            .iter()
            .filter_map(move |(node, macs)| Some((*node, macs[of(macs)?].1.as_slice())))
    }

    /// Nodes that have left to be back at once, and have not yet told anew what they hold.
    pub fn away(&self) -> impl Iterator<Item = NodeId> {
        self.away.nodes()
    }

    /// Who is alive.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// Latest reports of the peers, by node.
    pub fn reports(&self) -> &BTreeMap<NodeId, Vec<ModuleReport>> {
        &self.reports
    }

    /// The report of `peer` on `module`, if it is heard, or what it says is passed on, and has it.
    pub fn report(&self, peer: NodeId, module: &ModuleName) -> Option<&ModuleReport> {
        self.reports.get(&peer)?.iter().find(|r| r.name == *module)
    }

    /// When the newest word of `peer` was passed on to this node, if it is not heard here.
    pub fn told_at(&self, peer: NodeId) -> Option<Duration> {
        self.relays.taken_at(peer)
    }

    /// Who passed that on.
    pub fn told_by(&self, peer: NodeId) -> Option<NodeId> {
        self.relays.taken_from(peer)
    }

    /// True if a member that runs a module of this node, or may run it, is not heard here, and nobody has passed on what it says.
    pub fn lacks_word(&self) -> bool {
        self.modules.keys().any(|module| self.electorate(module).unheard)
    }

    /// Requesters known here.
    pub fn requesters(&self) -> &Requesters {
        &self.requesters
    }

    /// The node that proposes maps of `module`.
    pub fn coordinator(&self, module: &ModuleName) -> Option<NodeId> {
        self.electorate(module).coordinator
    }

    /// The map of one group that this node works with.
    pub fn map(&self, module: &ModuleName, group: usize) -> Option<&BucketMap> {
        self.group(module, group).map(Handover::map)
    }

    /// Nodes that this one should tell that they do not hear it: see [`Membership::deaf`]. Not one whose module nobody else could serve.
    pub fn deaf(&self, now: Duration) -> NodeSet {
        let deaf = self.membership.deaf(now).iter().filter(|node| {
            let modules = self.reports.get(node).into_iter().flatten();
            modules
                .filter(|report| report.active())
                .all(|report| self.is_served_without(*node, &report.name))
        });
        deaf.collect()
    }

    /// A member of the view other than `node` serves the module, or could.
    fn is_served_without(&self, node: NodeId, name: &ModuleName) -> bool {
        let view = self.membership.view();
        let here = self.modules.get(name).is_some_and(|module| {
            let able = module.local.ready && module.withheld.is_none() && module.kept_out.is_none();
            able && view.contains(self.this) && module.local.weights.iter().any(|weight| *weight > 0)
        });
        let peers = self
            .reports
            .iter()
            .filter(|(peer, _)| **peer != node && view.contains(**peer));
        let able = |report: &ModuleReport| report.name == *name && report.active() && !report.withheld;
        let mut able = peers.flat_map(|(_, modules)| modules).filter(|report| able(report));
        here || able.any(|report| report.groups.iter().any(|group| group.weight > 0))
    }
}
