//! Commands from the control socket.

use farm_core::api::history::Happening;
use farm_core::api::{CommandRequest, ModuleState, Reply, exit};
use farm_core::config::ModuleConfig;
use farm_core::id::ModuleName;
use farm_core::module::state::ModuleEvent;
use tokio::sync::mpsc::UnboundedSender;

use super::Node;
use super::module::Waiting;
use crate::admission::Other;
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
        // Scripts still report while their module is being stopped.
        if self.ending && !matches!(verb, Verb::Print(_) | Verb::Resource(_)) {
            return fail(&replies, exit::REFUSED, "farmd is shutting down");
        }
        if self.modules.get(&module).is_some_and(|m| m.busy) && !matches!(verb, Verb::Print(_) | Verb::Resource(_)) {
            return fail(
                &replies,
                exit::REFUSED,
                format!("the configuration of module {module} is being changed; try again"),
            );
        }
        if let Verb::Config(request) = &verb {
            return match self.modules.get(&module).map(|m| m.machine.state()) {
                Some(state) if state != ModuleState::Stop => fail(
                    &replies,
                    exit::REFUSED,
                    format!("module {module} is {state}; a configuration is applied in STOP: farm stop {module}"),
                ),
                _ => {
                    let by = request.by.clone();
                    let others = self.modules.iter().filter(|(name, _)| **name != module);
                    let others = others.map(|(name, m)| Other::new(name.clone(), &m.config)).collect();
                    self.set_busy(&module, true);
                    self.queue(Effect::Configure {
                        module,
                        others,
                        by,
                        replies,
                    });
                }
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
            Verb::Deconfig(request) if state == ModuleState::Stop => {
                self.set_busy(&module, true);
                return self.queue(Effect::Deconfigure {
                    module,
                    by: request.by,
                    replies,
                });
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
            if let Some(local) = self.modules.get_mut(&module) {
                local.boot_at = None;
            }
            self.queue(Effect::Remember {
                module: module.clone(),
                started: what == "start",
            });
        }
        self.record(
            Some(&module),
            Happening::Asked {
                by: request.by.clone(),
                what: what.to_owned(),
            },
        );
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
        if what == "stop" {
            return self.stop_module(&module, request.by, request.identity);
        }
        self.cut_stop_drain_short(&module);
        self.tell(&module, make(request.by, request.identity));
    }

    pub(super) fn queue(&self, effect: Effect) {
        if self.effects.send(effect).is_err() {
            tracing::warn!("the executor has ended; a command is left undone");
        }
    }

    pub(super) fn handle_configured(
        &mut self,
        module: ModuleName,
        by: &str,
        result: Result<(Box<ModuleConfig>, Vec<String>), (u8, String)>,
        replies: &UnboundedSender<Reply>,
    ) {
        let (config, warnings) = match result {
            Ok(accepted) => accepted,
            Err((code, error)) => {
                self.set_busy(&module, false);
                self.journal.audit(by, &format!("config {module}"), Err("refused"));
                return fail(replies, code, error);
            }
        };
        for warning in &warnings {
            self.journal.write(&module, "config", 'E', warning);
            let _ = replies.send(Reply::Progress { text: warning.clone() });
        }
        let text = format!("module {module} is configured (digest {:016x})", config.digest);
        self.journal.write(&module, "config", 'U', &text);
        self.journal.audit(by, &format!("config {module}"), Ok("accepted"));
        self.adopt(module, *config);
        let _ = replies.send(Reply::Done { text });
    }

    fn set_busy(&mut self, module: &ModuleName, busy: bool) {
        if let Some(local) = self.modules.get_mut(module) {
            local.busy = busy;
        }
    }

    pub(super) fn handle_deconfigured(
        &mut self,
        module: &ModuleName,
        by: &str,
        result: Result<(), String>,
        replies: &UnboundedSender<Reply>,
    ) {
        match result {
            Ok(()) => {
                let now = self.now();
                self.modules.remove(module);
                self.queue(Effect::WatchWitness {
                    module: module.clone(),
                    addr: None,
                });
                self.farm.remove_module(now, module);
                self.published.touch();
                self.journal.audit(by, &format!("deconfig {module}"), Ok("done"));
                let _ = replies.send(Reply::Done {
                    text: format!("module {module} is no longer configured"),
                });
            }
            Err(error) => {
                self.set_busy(module, false);
                fail(replies, exit::IO, error);
            }
        }
    }
}
