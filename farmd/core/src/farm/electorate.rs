//! Who has a say in one module: who runs it, whose configuration counts, who proposes maps, and whether this node may serve.
//!
//! Decides from the reports of the peers and the view; it changes nothing. Called by [`super::Farm`] only.

use crate::api::ModuleState;
use crate::config::PartitionPolicy;
use crate::handover::Handover;
use crate::id::{Epoch, ModuleName, NodeId, NodeSet};
use crate::membership::Peer;
use crate::wire::heartbeat::ModuleReport;

use super::{Farm, Module};

/// What [`Farm::electorate`] finds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Electorate {
    /// Whose configuration counts, and its digest.
    pub reference: Option<(NodeId, u64)>,
    /// Who proposes maps.
    pub coordinator: Option<NodeId>,
    /// All that run the module.
    pub runs: NodeSet,
    /// Why this node must not serve although it could; see [`Farm::withheld_by`].
    pub withheld: Option<String>,
    /// A node that runs the module, or may run it, is a member although this node neither hears it nor is told what it says.
    pub unheard: bool,
}

struct Candidate {
    node: NodeId,
    digest: u64,
    committed: Epoch,
    /// It may propose.
    able: bool,
}

impl Farm {
    /// Whose configuration counts for `module` in this view, and who proposes maps.
    ///
    /// The configuration that counts is that of the member with the newest committed map: a newcomer never
    /// displaces those that serve. If nobody serves yet it is that of the lowest active member. Maps are proposed by the lowest that has that
    /// configuration, has joined, is not withheld, and talks both ways with all that run the module; where none of these may, by the lowest of those that
    /// do not talk with one other, once it is told what that one says. Where two members do not talk, there is a third that talks with both.
    pub(super) fn electorate(&self, name: &ModuleName) -> Electorate {
        let view = self.membership.view();
        let reports = || self.reports.iter().filter(|(peer, _)| view.contains(**peer));
        let mut active: Vec<Candidate> = reports()
            .filter_map(|(peer, modules)| {
                let report = modules.iter().find(|r| r.name == *name).filter(|r| r.active())?;
                // What is passed on is of nodes that have joined and have not stepped out.
                let direct = self.membership.peer(*peer).filter(|_| !self.relays.has(*peer));
                let peer_joining = direct.is_some_and(|p| p.joining() || p.fenced());
                Some(Candidate {
                    node: *peer,
                    digest: report.digest,
                    committed: report.groups.iter().map(|g| g.committed).max().unwrap_or_default(),
                    able: !peer_joining && !report.joining && !report.withheld,
                })
            })
            .collect();
        if let Some(module) = self.modules.get(name)
            && module.local.state != ModuleState::Stop
            && view.contains(self.this)
        {
            active.push(Candidate {
                node: self.this,
                digest: module.local.digest,
                committed: module.groups.iter().map(Handover::committed).max().unwrap_or_default(),
                able: !self.membership.waits() && !module.joining,
            });
        }
        active.sort_by_key(|c| c.node);
        let newest = active.iter().map(|c| c.committed).max();
        let reference = active
            .iter()
            .find(|c| Some(c.committed) == newest)
            .map(|c| (c.node, c.digest));
        let unheard = self.may_run(name, view).iter();
        let unheard = unheard.filter(|n| *n != self.this && !self.reports.contains_key(n));
        let outdated = view.iter().filter(|n| self.says_outdated(name, *n));
        let unheard: NodeSet = unheard.chain(outdated).collect();
        let runs: NodeSet = active.iter().map(|c| c.node).chain(unheard.iter()).collect();
        let hubs = self.membership.links().hubs(runs);
        let module = self.modules.get(name).filter(|m| m.local.state != ModuleState::Stop);
        let withheld = module.and_then(|m| self.withheld_by(m));
        let eligible = |c: &&Candidate| {
            let able = c.able && (c.node != self.this || withheld.is_none());
            able && reference.is_some_and(|(_, digest)| digest == c.digest)
        };
        let lowest = |of: NodeSet| active.iter().filter(|c| of.contains(c.node)).find(eligible);
        let coordinator = lowest(hubs).or_else(|| lowest(runs));
        // Nothing is agreed on without the word of all that may have something open.
        let unheard = !unheard.is_empty();
        let coordinator = coordinator.map(|c| c.node).filter(|c| *c != self.this || !unheard);
        Electorate {
            reference,
            coordinator,
            withheld,
            runs,
            unheard,
        }
    }

    /// True if the last that is known of `node`, that it does not run `module`, is older than a map by which it has buckets: what it said since, when it promised that
    /// map, has not come here.
    fn says_outdated(&self, module: &ModuleName, node: NodeId) -> bool {
        let says_active = |reports: &Vec<ModuleReport>| reports.iter().any(|r| r.name == *module && r.active());
        let said_at = match self.relays.taken_at(node) {
            Some(at) => Some(at),
            None => self.membership.peer(node).and_then(Peer::heard_at),
        };
        let of = self.modules.get(module);
        node != self.this
            && !self.reports.get(&node).is_some_and(says_active)
            && of.is_some_and(|m| m.has_since(node, said_at.unwrap_or_default()))
    }

    /// Members that run `module`, or may do so, as far as the others tell. Of one that is not heard here those know that hear it and have it in their view; where
    /// none of them says, it may run it: they may only not have come to say so yet, or it is joining, so that the broken way counts against it.
    fn may_run(&self, module: &ModuleName, view: NodeSet) -> NodeSet {
        // Of a node that is not heard here it is not known whom it hears by now.
        let reports = self.reports.iter();
        let reports = reports.filter(|(peer, _)| view.contains(**peer) && !self.relays.has(**peer));
        let words = reports.filter_map(|(peer, modules)| {
            let report = modules.iter().find(|r| r.name == *module)?;
            let peer = self.membership.peer(*peer)?;
            // Who tells nothing knows of no broken way.
            let tells = report.runs != NodeSet::EMPTY;
            tells.then(|| (peer.hears().bits() & !peer.excludes().bits(), report.runs.bits()))
        });
        let (told, known) = words.fold((0, 0), |(told, known), (hears, runs)| (told | runs, known | hears));
        NodeSet::from_bits((told | !known) & view.bits())
    }

    /// Why this node must not serve `module` although it could: its part of the farm is not the one that serves.
    fn withheld_by(&self, module: &Module) -> Option<String> {
        let (here, all) = (self.membership.view(), self.names.len());
        if here.is_empty() || here.len() == all {
            return None;
        }
        match module.local.partition {
            PartitionPolicy::Serve => None,
            // Of two equal halves the one with the first node of cluster.xml serves.
            PartitionPolicy::Majority => {
                let whole = 2 * here.len() > all || (2 * here.len() == all && here.first() == NodeId::new(0));
                (!whole).then(|| {
                    format!(
                        "partition=\"majority\" and only {} of {all} nodes are together here",
                        here.len()
                    )
                })
            }
            PartitionPolicy::Witness => (!module.local.witness_answers).then(|| {
                format!(
                    "partition=\"witness\", only {} of {all} nodes are together here and the witness does not answer",
                    here.len()
                )
            }),
        }
    }
}
