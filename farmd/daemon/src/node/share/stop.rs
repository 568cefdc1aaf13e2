//! The drain before a stop (`drain` of `<vip>`): new connections go elsewhere, those that are here may end first.
//!
//! Part of the owner loop. The module's machine knows nothing of it: it hears of the stop when the drain is over.

use std::time::Duration;

use farm_core::api::{ModuleState, Quality, Reply};
use farm_core::id::ModuleName;
use farm_core::module::state::ModuleEvent;

use super::text;
use crate::node::Node;

/// A stop that lets connections end first.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(in crate::node) struct StopDrain {
    /// The stop.
    event: ModuleEvent,
    /// When it comes in any case.
    pub(in crate::node) until: Duration,
}

impl Node {
    /// Stops a module: at once, or after its connections have had their time. A second stop does not wait.
    pub(in crate::node) fn stop_module(&mut self, name: &ModuleName, by: String, identity: Option<String>) {
        let now = self.now();
        let by_person = identity.is_none();
        let event = ModuleEvent::Stop {
            by: by.clone(),
            identity,
        };
        let Some(module) = self.modules.get_mut(name) else {
            return;
        };
        let time = module.config.vip.as_ref().map_or(Duration::ZERO, |vip| vip.drain);
        let serves = module.open && module.machine.ready();
        if time.is_zero() || !serves || !by_person || module.stop_drain.is_some() {
            self.cut_stop_drain_short(name);
            return self.tell(name, event);
        }
        module.stop_drain = Some(StopDrain {
            event,
            until: now + time,
        });
        let text = format!(
            "Action stop called by {by}: its connections have {} s to end",
            time.as_secs()
        );
        self.tell_waiting(name, &text);
        self.journal.write(name, "farm", 'U', &text);
    }

    /// Another command does not wait for the drain either: the stop comes now.
    pub(in crate::node) fn cut_stop_drain_short(&mut self, name: &ModuleName) {
        let stop = self.modules.get_mut(name).and_then(|module| module.stop_drain.take());
        if let Some(stop) = stop {
            self.tell(name, stop.event);
        }
    }

    /// Stops modules whose connections have ended, or had their time.
    pub(super) fn watch_stop_drains(&mut self, now: Duration) {
        let stopping = self.modules.iter().filter(|(_, m)| m.stop_drain.is_some());
        let names: Vec<ModuleName> = stopping.map(|(name, _)| name.clone()).collect();
        for name in names {
            let Some(module) = self.modules.get(&name) else {
                continue;
            };
            let Some(stop) = &module.stop_drain else { continue };
            let groups = module.config.vip.as_ref().map_or(0, |v| v.groups.len());
            let held = |i: usize| self.farm.group(&name, i).map_or(0, |g| g.held_connections());
            let connections: u32 = (0..groups).map(held).sum();
            let serves =
                (module.machine.state(), module.machine.quality()) == (ModuleState::Up, Quality::Ready) && module.open;
            if serves && now < stop.until && !(self.farm.is_handed_over(&name) && connections == 0) {
                continue;
            }
            let text = format!("Drained before the stop, {}", text::left(connections));
            self.journal.write(&name, "farm", 'E', &text);
            self.tell_waiting(&name, &text);
            self.cut_stop_drain_short(&name);
        }
    }

    fn tell_waiting(&self, name: &ModuleName, text: &str) {
        for waiting in self.modules.get(name).iter().flat_map(|m| &m.waiting) {
            let _ = waiting.replies.send(Reply::Progress { text: text.to_owned() });
        }
    }
}
