//! Commands from the control socket.

use farm_core::api::{CommandRequest, ModuleState, Reply, exit};
use farm_core::config::{MAX_GROUPS, MAX_MODULES, ModuleConfig};
use farm_core::id::ModuleName;
use farm_core::module::state::ModuleEvent;
use tokio::sync::mpsc::UnboundedSender;

use super::Node;
use super::module::Waiting;
use crate::effect::Effect;
use crate::event::{Command, Verb};

fn fail(replies: &UnboundedSender<Reply>, code: u8, error: impl Into<String>) {
    // Whoever asked may have gone.
    let _ = replies.send(Reply::Failed {
        error: error.into(),
        code,
    });
}

impl Node {
    pub(super) fn handle_command(&mut self, command: Command) {
        let Command { module, verb, replies } = command;
        if self.ending {
            return fail(&replies, exit::REFUSED, "farmd is shutting down");
        }
        if let Verb::Config(_) = &verb {
            return match self.modules.get(&module).map(|m| m.machine.state()) {
                Some(state) if state != ModuleState::Stop => fail(
                    &replies,
                    exit::REFUSED,
                    format!("module {module} is {state}; a configuration is applied in STOP: farm stop {module}"),
                ),
                _ => self.queue(Effect::Configure { module, replies }),
            };
        }
        let Some(local) = self.modules.get(&module) else {
            return fail(
                &replies,
                exit::NOT_FOUND,
                format!(
                    "module {module} is not configured on this node; farm module list shows what is installed, farm config {module} configures it"
                ),
            );
        };
        let state = local.machine.state();
        type Make = fn(String, Option<String>) -> ModuleEvent;
        let (request, what, wanted, make): (CommandRequest, _, _, Make) = match verb {
            Verb::Start(r) => (r, "start", ModuleState::Up, |by, identity| ModuleEvent::Start {
                by,
                identity,
            }),
            Verb::Stop(r) => (r, "stop", ModuleState::Stop, |by, identity| ModuleEvent::Stop {
                by,
                identity,
            }),
            Verb::Restart(r) => (r, "restart", ModuleState::Up, |by, identity| ModuleEvent::Restart {
                by,
                identity,
            }),
            Verb::StopStart(r) => (r, "stopstart", ModuleState::Up, |by, identity| ModuleEvent::StopStart {
                by,
                identity,
            }),
            Verb::ForceStop(r) => (r, "forcestop", ModuleState::Stop, |by, identity| {
                ModuleEvent::ForceStop { by, identity }
            }),
            Verb::Deconfig(_) if state == ModuleState::Stop => {
                return self.queue(Effect::Deconfigure { module, replies });
            }
            Verb::Deconfig(_) => {
                return fail(
                    &replies,
                    exit::REFUSED,
                    format!("module {module} is {state}; stop it first"),
                );
            }
            Verb::Print(print) => {
                let level = if print.level == 'E' { 'E' } else { 'I' };
                self.journal
                    .write(&module, print.origin.as_deref().unwrap_or("user"), level, &print.text);
                let _ = replies.send(Reply::Done { text: String::new() });
                return;
            }
            Verb::Resource(resource) => {
                let by = resource.identity.unwrap_or_else(|| "user".to_owned());
                self.tell(
                    &module,
                    ModuleEvent::Resource {
                        name: resource.resource,
                        value: resource.value,
                        by,
                    },
                );
                let _ = replies.send(Reply::Done { text: String::new() });
                return;
            }
            // Handled above.
            Verb::Config(_) => return,
        };
        if request.identity.is_none() && matches!(what, "start" | "stop" | "forcestop") {
            self.queue(Effect::Remember {
                module: module.clone(),
                started: what == "start",
            });
        }
        // A script that stops its own module must not wait for a stop that waits for the script.
        if request.wait && request.identity.is_none() {
            if let Some(local) = self.modules.get_mut(&module) {
                local.waiting.push(Waiting {
                    replies,
                    wanted,
                    by: request.by.clone(),
                    what,
                });
            }
        } else {
            self.journal
                .audit(&request.by, &format!("{what} {module}"), Ok("accepted"));
            let _ = replies.send(Reply::Done {
                text: format!("{what} {module} accepted"),
            });
        }
        self.tell(&module, make(request.by, request.identity));
    }

    fn queue(&mut self, effect: Effect) {
        if self.effects.send(effect).is_err() {
            tracing::warn!("the executor has ended; a command is left undone");
        }
    }

    pub(super) fn handle_configured(
        &mut self,
        module: ModuleName,
        result: Result<(Box<ModuleConfig>, Vec<String>), String>,
        replies: &UnboundedSender<Reply>,
    ) {
        let (config, warnings) = match result {
            Ok(accepted) => accepted,
            Err(error) => {
                self.journal
                    .audit("config", &format!("config {module}"), Err("refused"));
                return fail(replies, exit::DATA, error);
            }
        };
        if self
            .modules
            .get(&module)
            .is_some_and(|m| m.machine.state() != ModuleState::Stop)
        {
            return fail(
                replies,
                exit::REFUSED,
                format!(
                    "module {module} was started meanwhile; the new configuration counts from its next stop and config"
                ),
            );
        }
        if let Some(vip) = config.vip.as_ref().and_then(|v| self.vip_in_use(&module, v)) {
            return fail(replies, exit::REFUSED, vip);
        }
        if let Some(error) = self.too_many(&module, &config) {
            return fail(replies, exit::REFUSED, error);
        }
        for warning in &warnings {
            self.journal.write(&module, "config", 'E', warning);
            let _ = replies.send(Reply::Progress { text: warning.clone() });
        }
        let text = format!("module {module} is configured (digest {:016x})", config.digest);
        self.journal.write(&module, "config", 'U', &text);
        self.journal
            .audit("config", &format!("config {module}"), Ok("accepted"));
        self.adopt(module, *config);
        let _ = replies.send(Reply::Done { text });
    }

    /// A sentence if a heartbeat would not hold this module beside the others.
    fn too_many(&self, module: &ModuleName, config: &ModuleConfig) -> Option<String> {
        let groups = |config: &ModuleConfig| config.vip.as_ref().map_or(0, |v| v.groups.len());
        let others = self.modules.iter().filter(|(name, _)| *name != module);
        let (modules, others) = others.fold((1, 0), |(n, sum), (_, m)| (n + 1, sum + groups(&m.config)));
        if modules > MAX_MODULES {
            return Some(format!(
                "this node has {MAX_MODULES} modules already, which is the limit"
            ));
        }
        let all = others + groups(config);
        (all > 2 * MAX_GROUPS).then(|| {
            format!(
                "the modules of this node would have {all} groups together, at most {} are possible",
                2 * MAX_GROUPS
            )
        })
    }

    /// A sentence if another module has one of these VIPs.
    fn vip_in_use(&self, module: &ModuleName, vip: &farm_core::config::VipConfig) -> Option<String> {
        let others = self.modules.iter().filter(|(name, _)| *name != module);
        for (name, other) in others {
            let theirs: Vec<_> = other.config.vip.iter().flat_map(|v| v.addrs()).collect();
            if let Some(addr) = vip.addrs().find(|a| theirs.contains(a)) {
                return Some(format!(
                    "{addr} belongs to module {name} already; each module needs its own virtual address"
                ));
            }
        }
        None
    }

    pub(super) fn handle_deconfigured(
        &mut self,
        module: &ModuleName,
        result: Result<(), String>,
        replies: &UnboundedSender<Reply>,
    ) {
        match result {
            Ok(()) => {
                let now = self.now();
                self.modules.remove(module);
                self.farm.remove_module(now, module);
                self.published.touch();
                self.journal.audit("config", &format!("deconfig {module}"), Ok("done"));
                let _ = replies.send(Reply::Done {
                    text: format!("module {module} is no longer configured"),
                });
            }
            Err(error) => fail(replies, exit::IO, error),
        }
    }
}
