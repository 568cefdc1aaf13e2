//! That a group is not left to nobody by mistake.
//!
//! A share is not given away, without `--force`, unless another node serves. What the others do is known from their last heartbeats; where two give theirs away
//! in the same moment, each takes the other to serve. So what is given away is watched for the detection time, and taken back if it turns out that nobody serves.

use std::time::Duration;

use farm_core::api::history::Happening;
use farm_core::api::{ShareSetting, exit};
use farm_core::id::NodeId;
use farm_core::wire::heartbeat::ModuleReport;

use super::{Goal, Job, Target};
use crate::effect::Effect;
use crate::node::Node;

/// That a command may have to be taken back.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Provisional {
    /// No longer than until then.
    pub until: Duration,
    /// The settings of its groups before it.
    pub before: Vec<(Target, ShareSetting)>,
    /// Which of them were served.
    pub served: Vec<Target>,
}

impl Node {
    /// True if this node takes clients of the group.
    pub(super) fn serves(&self, target: &Target) -> bool {
        let Some(module) = self.modules.get(&target.module) else {
            return false;
        };
        let own_name = self.cluster.name(self.this);
        let mut groups = module.config.vip.iter().flat_map(|v| &v.groups);
        let own = groups.find(|g| g.name == target.group);
        let setting = self.desk.setting(&target.module, &target.group);
        let weight = own.map_or(0, |g| setting.effective(g.weight(own_name)));
        module.open && module.link_problem.is_none() && weight > 0
    }

    /// True if a command under way has made it give the group away, and may be taken back.
    fn may_serve_again(&self, target: &Target) -> bool {
        let mut given = self.desk.jobs.iter().filter_map(|job| job.provisional.as_ref());
        given.any(|provisional| provisional.served.contains(target))
    }

    /// What a command without `--force` that gives the groups away is to leave behind: as [`Provisional`], if they were served.
    ///
    /// # Errors
    /// The group that no other node serves.
    pub(super) fn give_away(&self, now: Duration, targets: &[Target]) -> Result<Option<Provisional>, Target> {
        let served = targets.iter().filter(|t| self.serves(t) || self.may_serve_again(t));
        let served: Vec<Target> = served.cloned().collect();
        if let Some(target) = served.iter().find(|t| !self.is_served_elsewhere(t)) {
            return Err(target.clone());
        }
        let setting = |t: &Target| (t.clone(), self.desk.shares.get(&t.module, &t.group));
        Ok((!served.is_empty()).then(|| Provisional {
            until: now + self.cluster.detection_time(),
            before: targets.iter().map(setting).collect(),
            served,
        }))
    }

    /// Nothing of `targets` is taken back any more: a newer command counts.
    pub(super) fn keep_given(&mut self, targets: &[Target]) {
        for provisional in self.desk.jobs.iter_mut().filter_map(|job| job.provisional.as_mut()) {
            provisional.before.retain(|(target, _)| !targets.contains(target));
            provisional.served.retain(|target| !targets.contains(target));
        }
    }

    /// True if another node of the view does.
    pub(super) fn is_served_elsewhere(&self, target: &Target) -> bool {
        self.others(target).any(|(_, weight)| weight > 0)
    }

    /// The other nodes of the view that run the group's module with the same configuration, and their weights in the group.
    fn others(&self, target: &Target) -> impl Iterator<Item = (NodeId, u16)> {
        let view = self.farm.membership().view();
        let digest = self.modules.get(&target.module).map(|module| module.config.digest);
        let weight = move |modules: &Vec<ModuleReport>| {
            let same = modules
                .iter()
                .find(|m| m.name == target.module && Some(m.digest) == digest);
            Some(same?.groups.get(target.index)?.weight)
        };
        let reports = self
            .farm
            .reports()
            .iter()
            .filter(move |(node, _)| view.contains(**node));
        reports.filter_map(move |(node, modules)| Some((*node, weight(modules)?)))
    }

    /// Takes `job` back if nobody serves one of the groups since: of those that gave them away the node with the highest number does at once, the others when that
    /// has not helped. Returns how it ends.
    pub(super) fn take_back(&mut self, now: Duration, job: &mut Job) -> Option<(u8, String)> {
        let provisional = job.provisional.as_ref()?;
        let alone = provisional.served.iter().find(|target| {
            let open = self.modules.get(&target.module).is_some_and(|module| module.open);
            open && !self.serves(target) && !self.is_served_elsewhere(target)
        });
        let Some(target) = alone else {
            if now >= provisional.until {
                job.provisional = None;
            }
            return None;
        };
        let others: Vec<NodeId> = self.others(target).map(|(node, _)| node).collect();
        if now < provisional.until && others.iter().any(|other| *other > self.this) {
            return None;
        }
        let names: Vec<&str> = others.iter().map(|other| self.cluster.name(*other)).collect();
        let who = if names.is_empty() {
            "no other node runs it any more".to_owned()
        } else {
            format!("no share is left on {}", names.join(", "))
        };
        let Target { module, group, .. } = target;
        let why = format!("taken back, or nobody would serve group {group} of module {module}: {who}");
        let before = provisional.before.clone();
        // No more than the command has set.
        let drain = matches!(job.goal, Goal::Drained { .. });
        self.record(
            None,
            Happening::Asked {
                by: "farmd".to_owned(),
                what: format!("{} {why}", job.what),
            },
        );
        for (target, before) in before {
            let mut setting = self.desk.shares.get(&target.module, &target.group);
            if drain {
                setting.drained = before.drained;
            } else {
                (setting.weight, setting.weight_by) = (before.weight, before.weight_by);
            }
            self.desk.shares.set(&target.module, &target.group, setting);
            self.journal
                .write(&target.module, "farm", 'E', &format!("{}: {why}", job.what));
        }
        self.queue(Effect::KeepShares {
            job: job.id,
            shares: self.desk.shares.clone(),
        });
        Some((exit::REFUSED, why))
    }
}
