//! `farm reload`: farmd is restarted in place, and nobody's connections end.
//!
//! The share goes to the others as in a drain of no time; then the node says that it will be back at once, so that nobody resets the
//! connections it has, and another farmd takes the place of this process: with the same number, over the same devices and addresses, and with
//! the modules as they are.

use std::collections::BTreeMap;
use std::time::Duration;

use farm_core::api::history::Happening;
use farm_core::api::{ModuleState, Reply, exit};
use farm_core::farm::away;
use farm_core::id::{ModuleName, NodeId};
use farm_core::module::state::HANDOVER_LIMIT;
use tokio::sync::mpsc::UnboundedSender;
use tracing::{info, warn};

use super::{Node, Resumed};
use crate::reload::Legacy;

/// A restart that waits for the others to take over.
#[derive(Debug)]
pub(super) struct Reloading {
    by: String,
    replies: UnboundedSender<Reply>,
    deadline: Duration,
}

impl Node {
    /// Begins, or says why not; `checked` is whether another farmd would start.
    pub(super) fn reload(&mut self, by: String, replies: UnboundedSender<Reply>, checked: Result<(), String>) {
        let not_startable = |why: String| format!("another farmd would not start: {why}");
        if let Some(why) = checked.err().map(not_startable).or_else(|| self.why_no_reload()) {
            self.journal.audit(&by, "reload", Err(&why));
            let _ = replies.send(Reply::Failed {
                error: why,
                code: exit::REFUSED,
            });
            return;
        }
        info!(
            by,
            "farmd will be restarted in place; the others take the share over first"
        );
        let _ = replies.send(Reply::Progress {
            text: "the other nodes take the share over".to_owned(),
        });
        let deadline = self.now() + HANDOVER_LIMIT;
        self.reloading = Some(Reloading { by, replies, deadline });
    }

    fn why_no_reload(&self) -> Option<String> {
        if self.ending {
            return Some("farmd is shutting down".to_owned());
        }
        if self.reloading.is_some() {
            return Some("farmd is being restarted already".to_owned());
        }
        // Who is back with another cluster.xml answers for nothing here, and waits for this node to have it too.
        let is_back = |node: &NodeId| self.farm.membership().peer(*node).is_some_and(|p| !p.same_cluster());
        if let Some(node) = self.farm.away().find(|node| !is_back(node)) {
            let name = self.cluster.name(node);
            return Some(format!("{name} restarts its farmd: wait until it is back"));
        }
        let unsettled = |m: &super::LocalModule| m.busy || (m.machine.active() && !m.machine.ready());
        let (name, module) = self.modules.iter().find(|(_, m)| unsettled(m))?;
        let state = module.machine.state();
        Some(format!(
            "module {name} is {state} and not at rest ({}): wait until it is UP Ready or STOP",
            self.why_of(name, module)
        ))
    }

    /// When the others have had their time.
    pub(super) fn reload_timeout(&self) -> Option<Duration> {
        self.reloading
            .as_ref()
            .filter(|_| self.left.is_none())
            .map(|r| r.deadline)
    }

    /// Leaves once nothing is open here any more.
    pub(super) fn watch_reload(&mut self, now: Duration) {
        if self.left.is_some() {
            return;
        }
        let Some(reloading) = &self.reloading else { return };
        let mut active = self.modules.iter().filter(|(_, m)| m.machine.active());
        let error = if self.is_disturbed() {
            "a module has begun to stop or to restart, or farmd ends: farmd is not restarted".to_owned()
        } else if active.all(|(name, _)| self.farm.is_handed_over(name)) {
            let by = reloading.by.clone();
            let _ = reloading.replies.send(Reply::Done {
                text: "farmd restarts in place".to_owned(),
            });
            self.journal.audit(&by, "reload", Ok("farmd restarts in place"));
            self.record(None, Happening::Stopped { by, reload: true });
            info!("the others have the share; farmd restarts in place");
            return self.say_goodbye(now, true);
        } else if now >= reloading.deadline {
            format!(
                "the other nodes have not taken the share over within {} s; farmd goes on as before",
                HANDOVER_LIMIT.as_secs()
            )
        } else {
            return;
        };
        warn!("{error}");
        self.journal.audit(&reloading.by, "reload", Err(&error));
        let code = exit::FAILED;
        let _ = reloading.replies.send(Reply::Failed { error, code });
        self.reloading = None;
    }

    /// A module has begun to stop or to restart meanwhile.
    fn is_disturbed(&self) -> bool {
        self.ending || self.modules.values().any(|m| m.machine.active() && !m.machine.ready())
    }

    /// Leaves what is in the kernel at work for the connections of this host, until the next farmd judges by a plan of its own; as long as the others
    /// take them for this host's, and a pulse less. The plan in force has nothing open: PROTOCOL.md says why nobody else answers for what it accepts.
    pub(super) fn leave_plane(&self) {
        let goodbye = self.left.unwrap_or_else(|| self.now());
        let time = away::LIMIT.saturating_sub(self.cluster.heartbeat_interval);
        self.plane.leave(self.start + goodbye + time);
    }

    /// What the next farmd is to know; `None` if there is to be none.
    pub(super) fn legacy(&self) -> Option<Legacy> {
        self.reloading.as_ref().filter(|_| !self.ending)?;
        let up = self
            .modules
            .iter()
            .filter(|(_, m)| m.machine.state() == ModuleState::Up);
        let modules: BTreeMap<ModuleName, BTreeMap<String, String>> =
            up.map(|(name, m)| (name.clone(), m.machine.resources())).collect();
        let stopped = self.modules.iter().filter(|(_, m)| !m.machine.active());
        let rested = stopped.map(|(name, m)| (name.clone(), m.machine.why())).collect();
        Some(Legacy::new(modules, rested))
    }

    /// Goes on where the farmd before has left: modules that are in STOP say why, as they did there.
    pub(super) fn go_on(&mut self, resumed: Vec<Resumed>, rested: BTreeMap<ModuleName, String>) {
        for (name, why) in rested {
            if let Some(module) = self.modules.get_mut(&name) {
                module.machine.rest_because(why);
            }
        }
        for module in resumed {
            self.resume(module);
        }
    }

    /// Goes on with a module whose application has been running all the time.
    fn resume(&mut self, resumed: Resumed) {
        let Resumed { name, vips, resources } = resumed;
        let Some(module) = self.modules.get_mut(&name) else {
            return;
        };
        module.boot_at = None;
        let vips = vips.map(|vips| module.vips = vips);
        let actions = module.machine.resume(vips, resources);
        self.published.touch();
        self.carry_out(&name, actions);
    }
}
