//! The port rules of the virtual addresses as plans have them: worked out when a configuration comes into force, and shared by all plans until the next.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use farm_core::balance::plan::{Plan, RulePlan, VipPlan};
use farm_core::config::ModuleConfig;
use farm_core::id::ModuleName;

/// See the module doc.
#[derive(Debug, Default)]
pub(super) struct Rules {
    known: BTreeMap<(ModuleName, IpAddr), Known>,
}

#[derive(Debug)]
struct Known {
    config: Arc<ModuleConfig>,
    base: usize,
    rules: Arc<[RulePlan]>,
}

impl Rules {
    /// Rules of `addr` in `module`, whose first group is number `base` of the plan; none if it has no addresses. Addresses with equal rules share them.
    pub(super) fn of(
        &mut self,
        module: &ModuleName,
        config: &Arc<ModuleConfig>,
        base: usize,
        addr: IpAddr,
    ) -> Arc<[RulePlan]> {
        let key = (module.clone(), addr);
        let is_same = |known: &Known| Arc::ptr_eq(&known.config, config) && known.base == base;
        if let Some(known) = self.known.get(&key).filter(|known| is_same(known)) {
            return Arc::clone(&known.rules);
        }
        let own = config.vip.as_ref().map(|vip| VipPlan::rules_of(vip, addr, base));
        let own = own.unwrap_or_else(|| [].into());
        let of_others = self
            .known
            .iter()
            .filter(|((of, _), known)| of == module && is_same(known));
        let mut of_others = of_others.map(|(_, known)| &known.rules);
        let rules = of_others.find(|rules| **rules == own).cloned().unwrap_or(own);
        let config = Arc::clone(config);
        self.known.insert(
            key,
            Known {
                config,
                base,
                rules: Arc::clone(&rules),
            },
        );
        rules
    }

    /// Forgets the rules of addresses that `plan` does not have.
    pub(super) fn forget_others(&mut self, plan: &Plan) {
        if self.known.len() > plan.vips.len() {
            self.known.retain(|(_, addr), _| plan.vip(*addr).is_some());
        }
    }
}
