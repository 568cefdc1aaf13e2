//! A module on this node: its machine, and what the loop does for it.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use farm_core::api::{ModuleState, Quality, Reply};
use farm_core::config::ModuleConfig;
use farm_core::farm;
use farm_core::handover::Handover;
use farm_core::id::ModuleName;
use farm_core::module::state::{ModuleAction, ModuleEvent, ModuleMachine, Script};
use tokio::sync::mpsc::UnboundedSender;

use super::Node;
use super::share::{ShareWaiting, StopDrain};
use crate::effect::Effect;
use crate::host::HostVip;
use crate::script::ScriptRequest;

/// How long a stop leaves the application to requests that were under way when the others took over, if it is given no time by `drain`.
const LAST_REQUESTS: Duration = Duration::from_millis(200);

/// Who waits for a module to come to rest.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) replies: UnboundedSender<Reply>,
    /// The state that was asked for.
    pub(super) wanted: ModuleState,
    /// For the audit.
    pub(super) by: String,
    pub(super) what: &'static str,
}

/// One module with an active copy.
#[derive(Debug)]
pub(super) struct LocalModule {
    pub(super) config: Arc<ModuleConfig>,
    pub(super) machine: ModuleMachine,
    /// Where its VIPs are, while the host carries them.
    pub(super) vips: Vec<HostVip>,
    /// The machine has opened traffic.
    pub(super) open: bool,
    /// It has closed traffic and waits until no bucket is left here.
    pub(super) leaving: bool,
    /// Since when no bucket is left here.
    pub(super) left_at: Option<Duration>,
    pub(super) waiting: Vec<Waiting>,
    /// The application is being stopped although buckets may still be open here.
    pub(super) shut: bool,
    /// Its configuration is being applied or removed.
    pub(super) busy: bool,
    /// A service interface is down: the module has no share until it is back.
    pub(super) link_problem: Option<String>,
    /// When it starts by itself.
    pub(super) boot_at: Option<Duration>,
    /// It stops when its connections have ended.
    pub(super) stop_drain: Option<StopDrain>,
    /// Who waits for the share that follows a start.
    pub(super) share_waiting: Vec<ShareWaiting>,
    /// The witness of its partition policy answers.
    pub(super) witness_answers: bool,
}

impl LocalModule {
    pub(super) fn new(config: ModuleConfig) -> Self {
        Self {
            machine: ModuleMachine::new(&config),
            config: Arc::new(config),
            vips: Vec::new(),
            open: false,
            leaving: false,
            left_at: None,
            waiting: Vec::new(),
            shut: false,
            busy: false,
            link_problem: None,
            boot_at: None,
            stop_drain: None,
            share_waiting: Vec::new(),
            witness_answers: false,
        }
    }

    fn addrs(&self) -> Vec<IpAddr> {
        self.config.vip.iter().flat_map(|v| v.addrs()).collect()
    }
}

impl Node {
    pub(super) fn handle_vip_ready(&mut self, module: &ModuleName, result: Result<Vec<HostVip>, String>) {
        if let Err(why) = &result {
            let text = format!("the virtual addresses could not be set up: {why}");
            self.journal.write(module, "vip", 'E', &text);
        }
        let result = result.map(|vips| {
            if let Some(local) = self.modules.get_mut(module) {
                local.vips = vips;
            }
            self.published.touch();
        });
        self.tell(module, ModuleEvent::VipReady(result));
    }

    /// Takes a configuration into force; the module is in STOP.
    pub(super) fn adopt(&mut self, name: ModuleName, config: ModuleConfig) {
        let boot_at = self.modules.get(&name).and_then(|m| m.boot_at);
        self.queue(Effect::WatchWitness {
            module: name.clone(),
            addr: config.witness,
        });
        self.modules.insert(
            name,
            LocalModule {
                boot_at,
                ..LocalModule::new(config)
            },
        );
        self.published.touch();
    }

    /// What the witness of a module's partition policy does.
    pub(super) fn handle_witness(&mut self, name: &ModuleName, answers: bool, detail: &str) {
        let Some(module) = self.modules.get_mut(name) else {
            return;
        };
        module.witness_answers = answers;
        let (level, text) = if answers {
            ('I', format!("The witness answers: {detail}"))
        } else {
            ('E', format!("The witness does not answer: {detail}"))
        };
        self.journal.write(name, "witness", level, &text);
    }

    /// Feeds a module's machine.
    pub(super) fn tell(&mut self, name: &ModuleName, event: ModuleEvent) {
        let now = self.now();
        let Some(module) = self.modules.get_mut(name) else {
            return;
        };
        let actions = module.machine.handle(now, event);
        self.carry_out(name, actions);
    }

    /// Does, or has done, what a machine wants.
    pub(super) fn carry_out(&mut self, name: &ModuleName, actions: Vec<ModuleAction>) {
        for action in actions {
            let Some(module) = self.modules.get_mut(name) else {
                return;
            };
            let config = Arc::clone(&module.config);
            let effect = match action {
                // The hand-over has had its time; new clients must not meet an application that is stopping.
                ModuleAction::RunScript {
                    script: Script::StopBoth | Script::StopBothForce,
                    ..
                } if module.leaving && !module.shut => {
                    module.shut = true;
                    tracing::warn!(module = %name, "the hand-over was not confirmed in time; all buckets are closed");
                    self.carry_out(name, vec![action]);
                    continue;
                }
                ModuleAction::RunScript {
                    script,
                    args,
                    timeout,
                    identity,
                } => Effect::RunScript {
                    request: ScriptRequest {
                        module: name.clone(),
                        script,
                        args,
                        timeout,
                        identity,
                    },
                    config,
                },
                ModuleAction::KillScript => Effect::KillScript(name.clone()),
                ModuleAction::SetUpVip => Effect::SetUpVip {
                    module: name.clone(),
                    config,
                },
                ModuleAction::TearDownVip => Effect::TearDownVip(name.clone()),
                ModuleAction::StartCheckers => Effect::StartCheckers {
                    module: name.clone(),
                    config,
                },
                ModuleAction::StopCheckers => Effect::StopCheckers(name.clone()),
                ModuleAction::ResetConnections => Effect::ResetConnections {
                    module: name.clone(),
                    vips: module.addrs(),
                },
                ModuleAction::OpenTraffic => {
                    module.open = true;
                    module.shut = false;
                    module.leaving = false;
                    continue;
                }
                ModuleAction::CloseTraffic => {
                    module.open = false;
                    module.leaving = true;
                    module.left_at = None;
                    continue;
                }
                ModuleAction::Log { level, text } => {
                    let progress = matches!(level, 'C' | 'E' | 'U' | 'S');
                    if progress {
                        for waiting in &module.waiting {
                            let _ = waiting.replies.send(Reply::Progress { text: text.clone() });
                        }
                    }
                    self.journal.write(name, "heart", level, &text);
                    continue;
                }
                ModuleAction::Finished { result } => {
                    self.finish(name, &result);
                    continue;
                }
            };
            if self.effects.send(effect).is_err() {
                tracing::warn!(module = %name, "the executor has ended; a step is left undone");
            }
        }
    }

    /// A module that clients cannot reach gives its share away, and takes it back with the link.
    pub(super) fn handle_link(&mut self, name: &ModuleName, problem: Option<String>) {
        let Some(module) = self.modules.get_mut(name) else {
            return;
        };
        let text = match (&problem, &module.link_problem) {
            (Some(problem), _) => format!("No share while {problem}"),
            (None, Some(was)) => format!("No longer: {was}"),
            (None, None) => return,
        };
        let changed = problem.as_ref().is_some_and(|p| p.contains("has changed"));
        module.link_problem = problem;
        self.journal.write(name, "intfcheck", 'E', &text);
        if changed {
            let identity = Some("intfcheck".to_owned());
            self.tell(
                name,
                ModuleEvent::StopStart {
                    by: "intfcheck".to_owned(),
                    identity,
                },
            );
        }
    }

    /// Answers whoever waits for the module.
    fn finish(&mut self, name: &ModuleName, result: &Result<String, String>) {
        let Some(module) = self.modules.get_mut(name) else {
            return;
        };
        let state = module.machine.state();
        let waiting: Vec<Waiting> = module.waiting.drain(..).collect();
        for waiting in waiting {
            let reply = match result {
                Ok(text) if state == waiting.wanted && state == ModuleState::Up => {
                    self.wait_for_share(name, waiting, text.clone());
                    continue;
                }
                Ok(text) if state == waiting.wanted => Ok(text.clone()),
                Ok(text) => Err(format!("overtaken by another command: {text}")),
                Err(error) if error.contains("start_both") => {
                    Err(format!("{error}; see: farm log {name} --script=start_both"))
                }
                Err(error) => Err(error.clone()),
            };
            self.answer(name, &waiting, reply);
        }
    }

    /// The last reply to a command, and its line in the audit.
    pub(super) fn answer(&self, name: &ModuleName, waiting: &Waiting, reply: Result<String, String>) {
        let audit = reply.as_ref().map(String::as_str).map_err(String::as_str);
        self.journal
            .audit(&waiting.by, &format!("{} {name}", waiting.what), audit);
        let _ = waiting.replies.send(match reply {
            Ok(text) => Reply::Done { text },
            Err(error) => Reply::Failed {
                error,
                code: farm_core::api::exit::FAILED,
            },
        });
    }

    /// Tells machines that wait for it that their last bucket has gone.
    pub(super) fn notice_handed_over(&mut self) {
        let names: Vec<ModuleName> = self
            .modules
            .iter()
            .filter(|(_, m)| m.leaving)
            .map(|(n, _)| n.clone())
            .collect();
        if names.is_empty() {
            return;
        }
        // The farm must have heard of the leave before it can have happened.
        let now = self.now();
        self.report_modules(now);
        for name in names {
            let Some(module) = self.modules.get_mut(&name) else {
                continue;
            };
            if module.machine.ready() || !self.farm.is_handed_over(&name) {
                continue;
            }
            let groups = module.config.vip.as_ref().map_or(0, |v| v.groups.len());
            let held = |group| self.farm.group(&name, group).map_or(0, Handover::held_connections);
            let left_at = *module.left_at.get_or_insert(now);
            if now < left_at + LAST_REQUESTS && (0..groups).any(|group| held(group) > 0) {
                continue;
            }
            module.leaving = false;
            self.tell(&name, ModuleEvent::HandoverDone);
        }
    }

    /// Tells the farm how the modules are.
    pub(super) fn report_modules(&mut self, now: Duration) {
        let mut reports = Vec::new();
        for (name, module) in &self.modules {
            let machine = &module.machine;
            let groups = module.config.vip.iter().flat_map(|v| &v.groups);
            let macs = module.config.vip.iter().flat_map(|v| &v.interfaces).map(|i| {
                let addr = i
                    .virtual_interfaces
                    .iter()
                    .flat_map(|v| &v.addrs)
                    .map(|a| a.addr)
                    .next();
                let vip = module.vips.iter().find(|v| Some(v.addr) == addr);
                vip.map_or_else(Default::default, |v| v.own_mac)
            });
            let local = farm::LocalModule {
                digest: module.config.digest,
                state: machine.state(),
                quality: machine.quality(),
                why: self.why_of(name, module),
                ready: module.open
                    && self.reloading.is_none()
                    && module.link_problem.is_none()
                    && machine.state() == ModuleState::Up
                    && machine.quality() == Quality::Ready,
                shut: module.shut,
                macs: macs.collect(),
                weights: groups.map(|g| self.share_weight(name, module, g)).collect(),
                partition: module.config.partition,
                witness_answers: module.witness_answers,
            };
            reports.push((name.clone(), local));
        }
        for (name, local) in reports {
            self.farm.set_module(now, name, local);
        }
    }

    /// Why a module does not serve its share, of what the module itself and what was set for its shares say.
    pub(super) fn why_of(&self, name: &ModuleName, module: &LocalModule) -> String {
        let why = module.link_problem.clone().unwrap_or_else(|| module.machine.why());
        if why.is_empty() && module.machine.ready() {
            return self.share_why(name, module);
        }
        why
    }
}
