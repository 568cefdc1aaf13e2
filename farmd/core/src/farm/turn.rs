//! What follows from what has come in, and from the time: one turn lets each group of each module draw its conclusions.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::api::ModuleState;
use crate::handover::{Closed, PeerGroup, Surroundings};
use crate::id::{ModuleName, NodeId, NodeSet};
use crate::membership::{self, Peer};
use crate::wire::heartbeat::ModuleReport;

use super::{Event, Farm, Module};

impl Farm {
    pub(super) fn turn(&mut self, now: Duration) {
        self.turns += 1;
        // Whom this node hears depends on the time: the view must be of the same moment.
        self.membership.handle_timeout(now);
        while let Some(event) = self.membership.poll_event() {
            if matches!(
                event,
                membership::Event::PeerDown { .. }
                    | membership::Event::PeerAlive { .. }
                    | membership::Event::ViewChanged { .. }
                    | membership::Event::Joined
            ) {
                self.next_heartbeat = now;
            }
            self.events.push_back(Event::Membership(event));
        }
        if std::mem::replace(&mut self.waited, self.membership.waits()) && !self.waited {
            self.next_heartbeat = now;
        }
        let heard = self.membership.heard(now);
        self.forget_relayed(now);
        self.reports
            .retain(|peer, _| heard.contains(*peer) || self.relays.has(*peer));
        // Who has left to be back at once goes on to have its connections, and gets their frames.
        let away: NodeSet = self.away.nodes().collect();
        let known = NodeSet::from_bits(heard.bits() | self.membership.view().bits() | away.bits());
        self.macs.retain(|peer, _| known.contains(*peer));
        for node in self.away.update(now, &self.reports) {
            self.events.push_back(Event::NotBack(node));
        }
        let names: Vec<ModuleName> = self.modules.keys().cloned().collect();
        let mut plan_changed = false;
        for name in names {
            plan_changed |= self.turn_module(now, &name);
        }
        self.at_rest = !plan_changed
            && !self.leaving
            && !self.paused
            && away.is_empty()
            && self.modules.values().all(Module::is_at_rest);
        if plan_changed {
            self.plan_version += 1;
            let version = self.plan_version;
            self.modules
                .values_mut()
                .flat_map(|m| &mut m.groups)
                .for_each(|g| g.planned(version));
        }
        let is_out = self.paused || self.membership.fenced().is_some();
        if is_out && (plan_changed || !self.has_closed_all()) {
            self.closed_by = Some(self.plan_version);
        }
        self.transmit(now);
    }

    /// Lets every group of a module draw its conclusions.
    fn turn_module(&mut self, now: Duration, name: &ModuleName) -> bool {
        let joining = self.modules.get(name).filter(|module| module.joining);
        let has_joined = joining.is_some_and(|module| now >= module.join_until + self.late_words());
        if let Some(module) = self.modules.get_mut(name)
            && has_joined
        {
            module.joining = false;
            self.next_heartbeat = now;
        }
        if let Some(module) = self.modules.get_mut(name) {
            module.note_promises(now);
            module.note_committed(now);
        }
        let electorate = self.electorate(name);
        let Some(module) = self.modules.get(name) else {
            return false;
        };
        let active = module.local.state != ModuleState::Stop;
        let kept_out = match electorate.reference {
            Some((node, digest)) if active && digest != module.local.digest => Some(format!(
                "the active userconfig.xml (farm config) differs from that of {} (digest {:016x}, here {:016x})",
                self.name(node),
                digest,
                module.local.digest
            )),
            _ => None,
        };
        if kept_out != module.kept_out {
            self.events.push_back(Event::KeptOut {
                module: name.clone(),
                why: kept_out.clone(),
            });
            self.next_heartbeat = now;
        }
        let withheld = electorate.withheld;
        // Who is told goes on changing with the view; that is worth no line each.
        if withheld.is_some() != module.withheld.is_some() {
            self.events.push_back(Event::Withheld {
                module: name.clone(),
                why: withheld.clone(),
            });
            self.next_heartbeat = now;
        }
        let shut =
            self.membership.fenced().is_some() || self.paused || kept_out.is_some() || !active || module.local.shut;
        let closed = match (shut, &withheld) {
            (true, _) => Closed::Shut,
            (false, Some(_)) => Closed::Draining,
            (false, None) => Closed::No,
        };
        // Who is withheld serves nobody, whatever it knows of this node.
        let alone = !self.reports.iter().any(|(node, modules)| {
            let same =
                |r: &ModuleReport| r.name == *name && r.active() && !r.withheld && r.digest == module.local.digest;
            self.membership.view().contains(*node) && modules.iter().any(same)
        });
        let reports = &self.reports;
        let membership = &self.membership;
        let relays = &self.relays;
        let away = &self.away;
        let Some(module) = self.modules.get_mut(name) else {
            return false;
        };
        module.kept_out = kept_out;
        if withheld.is_some() || module.withheld.is_some() {
            module.since = now;
        }
        module.withheld = withheld;
        let since = module.since;
        let mut plan_changed = false;
        let mut send = false;
        for (i, group) in module.groups.iter_mut().enumerate() {
            let peers = reports.iter().filter_map(|(peer, modules)| {
                let report = modules.iter().find(|r| r.name == *name).filter(|r| r.active())?;
                let is_relayed = relays.has(*peer);
                let fenced = !is_relayed && membership.peer(*peer).is_some_and(|p| p.fenced());
                // Who is withheld has no part in what the others agree on. If it knew what this node has done last when it said so: two that serve again at the
                // same time must not each take the other to be out. Who does not hear this node has been told of it by then, or counts on it no more.
                let told_by = since + membership.told_time();
                let knows = |p: &Peer| match relays.taken_at(*peer) {
                    Some(at) => at > told_by,
                    None if p.hears_us() => p.acked_at().is_some_and(|at| at > since),
                    None => p.acked_at().is_some_and(|at| at > since) || p.heard_at().is_some_and(|at| at > told_by),
                };
                let is_out = report.withheld && membership.peer(*peer).is_some_and(knows);
                let eligible = report.digest == module.local.digest && !is_out;
                let hears_us = is_relayed || membership.may_count_on_us(now, *peer);
                Some((
                    *peer,
                    PeerGroup {
                        eligible,
                        fenced,
                        hears_us,
                        report: report.groups.get(i)?,
                    },
                ))
            });
            let peers: BTreeMap<NodeId, PeerGroup<'_>> = peers.collect();
            let weight = if module.local.ready && closed == Closed::No && !membership.waits() {
                module.local.weights[i]
            } else {
                0
            };
            let unserved = closed == Closed::No && weight == 0 && alone;
            let around = Surroundings {
                view: membership.view(),
                coordinator: electorate.coordinator,
                weight,
                closed: if unserved { Closed::Unserved } else { closed },
                unheard: electorate.unheard,
                peers: &peers,
                away: &away.held(name, i),
            };
            let outcome = group.advance(&around);
            plan_changed |= outcome.plan_changed;
            send |= outcome.send;
            let events = outcome.events.into_iter();
            self.events.extend(events.map(|event| Event::Handover {
                module: name.clone(),
                group: i,
                event,
            }));
        }
        module.note_promises(now);
        if send {
            self.next_heartbeat = now;
        }
        plan_changed
    }
}
