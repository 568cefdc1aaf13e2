//! What the owner loop hands to whoever answers a question about single buckets and connections ([`crate::look`]): shared and small, so that a
//! question costs it no more than a status does.

use farm_core::balance::explain::Inquiry;
use farm_core::handover::Handover;
use farm_core::id::{ModuleName, NodeId};

use super::Node;
use super::module::LocalModule;
use crate::look::{GroupSight, ModuleSight, Sight};

impl Node {
    /// What is known now; of `inquiry`'s bucket also the entry of the history that brought it.
    pub(super) fn sight(&self, inquiry: Option<&Inquiry>) -> Sight {
        let (plan, groups) = self.published.newest();
        let place = inquiry.and_then(|inquiry| inquiry.place(&plan).ok());
        let since = place.and_then(|place| {
            let key = groups.get(place.rule.group)?;
            self.chronicle.entry_of(key, place.bucket)
        });
        Sight {
            this: self.this,
            nodes: self.cluster.nodes.clone(),
            groups,
            modules: self
                .modules
                .iter()
                .map(|(name, m)| self.module_sight(name, m))
                .collect(),
            plan,
            since,
        }
    }

    fn module_sight(&self, name: &ModuleName, module: &LocalModule) -> ModuleSight {
        let view = self.farm.membership().view();
        let groups = module.config.vip.as_ref().map_or(&[][..], |vip| &vip.groups);
        let group = |index: usize| GroupSight {
            map: self
                .farm
                .group(name, index)
                .map_or(0, |g: &Handover| g.committed().counter()),
            weights: self.weights(&(name.clone(), index), view),
        };
        let nodes = (0..self.cluster.nodes.len()).filter_map(NodeId::new);
        ModuleSight {
            name: name.clone(),
            config: module.config.clone(),
            nodes: nodes.map(|node| self.node_status(name, node, groups)).collect(),
            groups: (0..groups.len()).map(group).collect(),
        }
    }
}
