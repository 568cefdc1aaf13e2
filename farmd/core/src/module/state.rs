//! The life of one module on one node: which step is under way and what an event makes of it.
//!
//! Owns the step, the direction (towards UP or towards rest), the resources and the `maxloop` count. Never runs
//! anything: it asks by [`ModuleAction`] and hears by [`ModuleEvent`]. The owner loop of the daemon calls it.
//!
//! ```text
//!                  Start                     prestart ok                 VipReady
//!   Stopped ───────────────► Prestarting ───────────────► RaisingVip ───────────────► Starting ◄────────────┐
//!  (STOP NotReady)          (WAIT Transient)             (WAIT Transient)            (UP Transient)         │
//!      ▲                         │ stop: killed              │ stop                       │ start_both ok   │
//!      │                         ▼                           ▼                            ▼                 │
//!      │                     Cancelling                 AbandoningVip                  Checking             │
//!      │                         │                           │ VipReady              (UP Transient)         │
//!      │                         │                           │                            │ all passed      │
//!      │                         │                           │                            ▼                 │
//!      │                         │                           │                         Serving              │
//!      │                         │                           │                        (UP Ready)            │
//!      │                         │                           │                            │ stop, restart,  │
//!      │                         │                           │                            ▼ checker down    │
//!      │                         │                           │      HandoverDone or    Leaving              │
//!      │                         │                           │            2 s       (UP Transient)          │
//!      │                         │                           │                            ▼                 │
//!      │                         │                           │                      StoppingNicely          │
//!      │                         │                           │                       (UP Transient)         │
//!      │                         ▼                           ▼                            ▼        restart  │
//!      └──── poststop ───── Poststopping ◄─── VipGone ─ LoweringVip ◄───────────── StoppingByForce ─────────┘
//!                         (WAIT Transient)           (WAIT Transient)          (WAIT, on restart UP, Transient)
//! ```
//! A failing step goes down the same way and never up: a failed `start_both` enters at StoppingNicely, a failed
//! `SetUpVip` at LoweringVip, a failed prestart at Poststopping. A step that does not apply (no `<vip>`, no `<user>`,
//! no checker) is passed through at once.
//!
//! Commands in the middle: `Start` while starting or restarting joins; while stopping it makes the module start
//! again afterwards. `Stop` always wins, and only an administrator's command can revive a module that is stopping.

use std::collections::BTreeMap;
use std::mem;
use std::time::Duration;

use super::command::Caller;
use super::phase::{Aim, Phase};
use super::resource::CheckerState;
use crate::api::{ModuleState, Quality};
use crate::config::{ModuleConfig, UserConfig};
use crate::supervise::policy::LoopGuard;

pub use super::event::{ModuleAction, ModuleEvent};
pub use super::script::{Script, ScriptOutcome};

/// Longest time that `stop_both` waits for the other nodes to take over. A hand-over takes a few round trips; past this
/// the others will learn of it by the membership, and an administrator's stop is not held up.
pub const HANDOVER_LIMIT: Duration = Duration::from_secs(2);

/// Most resources a module may have; `set -r` with one more name is refused, so that a script cannot fill the memory.
pub const MAX_RESOURCES: usize = 256;

/// The machine of one module on one node. A new configuration, which is accepted in STOP only, makes a new machine.
#[derive(Clone, Debug)]
pub struct ModuleMachine {
    pub(super) has_vip: bool,
    pub(super) tcp_reset: bool,
    pub(super) user: Option<UserConfig>,
    pub(super) phase: Phase,
    pub(super) aim: Aim,
    /// Forcestop was called on the way down.
    pub(super) force: bool,
    /// The third argument of scripts.
    pub(super) action: &'static str,
    /// Identity behind the way under way.
    pub(super) identity: Option<String>,
    pub(super) running: Option<Script>,
    pub(super) loops: LoopGuard,
    pub(super) checkers: Vec<CheckerState>,
    pub(super) resources: BTreeMap<String, String>,
    /// Why the module goes to STOP although nobody with a say wanted it.
    pub(super) failure: Option<String>,
    /// What did not work on the way down.
    pub(super) problems: Vec<String>,
    /// An administrator asked for the stop under way.
    pub(super) stop_wanted: bool,
    /// The command that was followed last, with who gave it.
    pub(super) asked: String,
    /// Why it is in STOP.
    pub(super) rested: String,
    shown: (ModuleState, Quality),
    pub(super) out: Vec<ModuleAction>,
}

impl ModuleMachine {
    /// A stopped module with this configuration.
    pub fn new(config: &ModuleConfig) -> Self {
        let checkers: Vec<CheckerState> = config
            .tcp_checkers
            .iter()
            .map(|checker| CheckerState {
                resource: format!("tcp.{}", checker.ident),
                action: checker.action,
                up: None,
            })
            .collect();
        let resources = checkers
            .iter()
            .map(|c| (c.resource.clone(), "init".to_owned()))
            .collect();
        Self {
            has_vip: config.vip.is_some(),
            tcp_reset: config.vip.as_ref().is_some_and(|vip| vip.tcp_reset),
            user: config.user.clone(),
            phase: Phase::Stopped,
            aim: Aim::Stay,
            force: false,
            action: "start",
            identity: None,
            running: None,
            loops: LoopGuard::new(config.service.maxloop, config.service.loop_interval),
            checkers,
            resources,
            failure: None,
            problems: Vec::new(),
            stop_wanted: false,
            asked: String::new(),
            rested: "not started".to_owned(),
            shown: (ModuleState::Stop, Quality::NotReady),
            out: Vec::new(),
        }
    }

    /// Goes on where a farmd that has been restarted in place has left the module: its application runs. `vip` is whether the host carries its
    /// virtual addresses, `resources` are those of before.
    pub fn resume(&mut self, vip: Result<(), String>, resources: BTreeMap<String, String>) -> Vec<ModuleAction> {
        for (name, value) in resources {
            // Those of checkers are found anew.
            self.resources.entry(name).or_insert(value);
        }
        self.log(
            'E',
            "farmd has been restarted in place; the application goes on".to_owned(),
        );
        match vip {
            Ok(()) => self.start_checkers(),
            Err(why) => {
                self.enter(Phase::Starting);
                self.fail(format!("the virtual addresses could not be set up: {why}"));
            }
        }
        self.drain()
    }

    /// Has the module, which has never run here, rest for the reason that a farmd that was restarted in place has left.
    pub fn rest_because(&mut self, why: String) {
        self.rested = why;
    }

    /// State of the machine.
    pub fn state(&self) -> ModuleState {
        self.phase.state(self.aim)
    }

    /// How far it is within the state.
    pub fn quality(&self) -> Quality {
        self.phase.quality()
    }

    /// Why it is not UP Ready, for a person; empty if it is.
    pub fn why(&self) -> String {
        let step = match self.phase {
            Phase::Serving => return String::new(),
            Phase::Stopped => return self.rested.clone(),
            Phase::Prestarting => "prestart runs".to_owned(),
            Phase::RaisingVip => "the virtual addresses are being set up".to_owned(),
            Phase::Starting => "start_both runs".to_owned(),
            Phase::Checking => self.why_checking(),
            Phase::Leaving { .. } if !self.asked.is_empty() => {
                format!("{}: the other nodes are taking over", self.asked)
            }
            Phase::Leaving { .. } => "the other nodes are taking over".to_owned(),
            Phase::Cancelling(script) => format!("{script} is being ended"),
            Phase::StoppingNicely => "stop_both runs".to_owned(),
            Phase::StoppingByForce => "stop_both force runs".to_owned(),
            Phase::AbandoningVip | Phase::LoweringVip => "the virtual addresses are being removed".to_owned(),
            Phase::Poststopping => "poststop runs".to_owned(),
        };
        match &self.failure {
            Some(failure) => format!("{step}, because {failure}"),
            None => step,
        }
    }

    /// True if the module may own buckets: between `OpenTraffic` and `CloseTraffic`.
    pub fn ready(&self) -> bool {
        self.phase == Phase::Serving
    }

    /// True if the module is not in STOP.
    pub fn active(&self) -> bool {
        self.phase != Phase::Stopped
    }

    /// Resources with their values.
    pub fn resources(&self) -> BTreeMap<String, String> {
        self.resources.clone()
    }

    /// When [`Self::handle_timeout`] must be called next. Changes with each `handle` and `handle_timeout`.
    pub fn poll_timeout(&self) -> Option<Duration> {
        match self.phase {
            Phase::Leaving { deadline } => Some(deadline),
            Phase::Stopped
            | Phase::Prestarting
            | Phase::RaisingVip
            | Phase::Starting
            | Phase::Checking
            | Phase::Serving
            | Phase::AbandoningVip
            | Phase::Cancelling(_)
            | Phase::StoppingNicely
            | Phase::StoppingByForce
            | Phase::LoweringVip
            | Phase::Poststopping => None,
        }
    }

    /// Goes on if a deadline has passed at `now`; too early a call does nothing.
    pub fn handle_timeout(&mut self, now: Duration) -> Vec<ModuleAction> {
        if self.poll_timeout().is_some_and(|deadline| now >= deadline) {
            let limit = HANDOVER_LIMIT.as_secs();
            self.log(
                'E',
                format!("Hand-over not confirmed within {limit} s, stop goes on without it"),
            );
            self.stop_application();
        }
        self.drain()
    }

    /// Takes one event; `now` never goes back. Returns what is to be done, in this order.
    pub fn handle(&mut self, now: Duration, event: ModuleEvent) -> Vec<ModuleAction> {
        self.dispatch(now, event);
        self.drain()
    }

    /// The transition table. Commands depend only on the direction, answers on the very step that waits for them.
    fn dispatch(&mut self, now: Duration, event: ModuleEvent) {
        use ModuleEvent as E;
        use Phase as P;
        macro_rules! starting {
            () => {
                P::Prestarting | P::RaisingVip | P::Starting
            };
        }
        macro_rules! stopping {
            () => {
                P::Leaving { .. }
                    | P::AbandoningVip
                    | P::Cancelling(_)
                    | P::StoppingNicely
                    | P::StoppingByForce
                    | P::LoweringVip
                    | P::Poststopping
            };
        }
        match (self.phase, event) {
            (P::Stopped, E::Start { by, identity }) => self.start_from_rest(now, "start", Caller { by, identity }),
            (P::Stopped, E::StopStart { by, identity }) => match identity {
                None => self.start_from_rest(now, "stopstart", Caller { by, identity }),
                Some(_) => self.refuse("stopstart", &by),
            },
            (P::Stopped, E::Restart { by, identity: _ }) => self.refuse("restart", &by),
            (P::Stopped, E::Stop { by, identity }) => self.stay_stopped("stop", Caller { by, identity }),
            (P::Stopped, E::ForceStop { by, identity }) => self.stay_stopped("forcestop", Caller { by, identity }),

            (starting!() | P::Checking, E::Start { by, identity }) => {
                self.announce("start", &Caller { by, identity }, "the module is starting already");
            }
            (starting!(), E::Restart { by, identity }) => {
                self.announce(
                    "restart",
                    &Caller { by, identity },
                    "the application is starting already",
                );
            }
            (P::Serving, E::Start { by, identity }) => {
                self.announce("start", &Caller { by, identity }, "the module is UP already");
                self.finish(Ok("already UP".to_owned()));
            }
            (P::Checking | P::Serving, E::Restart { by, identity }) => {
                self.react(now, "restart", Aim::Restart, Caller { by, identity }, None);
            }
            (starting!() | P::Checking | P::Serving, E::StopStart { by, identity }) => {
                self.react(now, "stopstart", Aim::StopStart, Caller { by, identity }, None);
            }

            (stopping!(), E::Start { by, identity }) => {
                self.turn(now, "start", Aim::StopStart, Caller { by, identity });
            }
            (stopping!(), E::Restart { by, identity }) => {
                self.turn(now, "restart", Aim::Restart, Caller { by, identity });
            }
            (stopping!(), E::StopStart { by, identity }) => {
                self.turn(now, "stopstart", Aim::StopStart, Caller { by, identity });
            }
            (starting!() | P::Checking | P::Serving | stopping!(), E::Stop { by, identity }) => {
                self.stop(now, "stop", false, Caller { by, identity });
            }
            (starting!() | P::Checking | P::Serving | stopping!(), E::ForceStop { by, identity }) => {
                self.stop(now, "forcestop", true, Caller { by, identity });
            }

            (_, E::ScriptExited { script, outcome }) if self.running != Some(script) => {
                self.log('D', format!("Script {script}: {outcome}, not waited for"));
            }
            (P::Prestarting, E::ScriptExited { script, outcome }) => match self.script_ended(script, &outcome) {
                Ok(()) => self.raise_vip(),
                Err(why) => self.fail(why),
            },
            (P::Starting, E::ScriptExited { script, outcome }) => match self.script_ended(script, &outcome) {
                Ok(()) => self.start_checkers(),
                Err(why) => self.fail(why),
            },
            (P::StoppingNicely, E::ScriptExited { script, outcome }) => {
                // The force pass comes in any case and decides whether the stop was good.
                let _logged = self.script_ended(script, &outcome);
                self.stop_by_force();
            }
            (P::StoppingByForce, E::ScriptExited { script, outcome }) => {
                self.note_problem(script, &outcome);
                self.leave_application();
            }
            (P::Poststopping, E::ScriptExited { script, outcome }) => {
                self.note_problem(script, &outcome);
                self.rest();
            }
            (P::Cancelling(cancelled), E::ScriptExited { .. }) => self.cancelled(cancelled),
            // No script is under way in these: the guard above has caught the event.
            (
                P::Stopped
                | P::RaisingVip
                | P::Checking
                | P::Serving
                | P::Leaving { .. }
                | P::AbandoningVip
                | P::LoweringVip,
                E::ScriptExited { .. },
            ) => {}

            (P::RaisingVip, E::VipReady(Ok(()))) => self.start_application(),
            (P::RaisingVip, E::VipReady(Err(why))) => {
                self.fail(format!("the virtual addresses could not be set up: {why}"));
            }
            (P::AbandoningVip, E::VipReady(_)) => self.lower_vip(),
            (
                P::Stopped
                | P::Prestarting
                | P::Starting
                | P::Checking
                | P::Serving
                | P::Leaving { .. }
                | P::Cancelling(_)
                | P::StoppingNicely
                | P::StoppingByForce
                | P::LoweringVip
                | P::Poststopping,
                E::VipReady(_),
            ) => {}

            (P::LoweringVip, E::VipGone(problems)) => {
                for problem in problems {
                    self.problem(format!("the virtual addresses were not wholly removed: {problem}"));
                }
                self.run_poststop();
            }
            (P::Stopped | P::Checking | P::Serving | starting!(), E::VipGone(_))
            | (
                P::Leaving { .. }
                | P::AbandoningVip
                | P::Cancelling(_)
                | P::StoppingNicely
                | P::StoppingByForce
                | P::Poststopping,
                E::VipGone(_),
            ) => {}

            (P::Leaving { .. }, E::HandoverDone) => self.stop_application(),
            (P::Stopped | P::Checking | P::Serving | starting!(), E::HandoverDone)
            | (
                P::AbandoningVip
                | P::Cancelling(_)
                | P::StoppingNicely
                | P::StoppingByForce
                | P::LoweringVip
                | P::Poststopping,
                E::HandoverDone,
            ) => {}

            (P::Checking | P::Serving, E::Checked { resource, up, detail }) => {
                self.checked(now, &resource, up, detail);
            }
            // A verdict that was under way when the checkers were stopped.
            (P::Stopped | starting!() | stopping!(), E::Checked { .. }) => {}

            (P::Stopped | starting!() | P::Checking | P::Serving | stopping!(), E::Resource { name, value, by }) => {
                self.set_resource(name, value, &by)
            }
        }
    }
    pub(super) fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        self.show();
    }

    /// Logs state and quality if they have changed.
    pub(super) fn show(&mut self) {
        let shown = (self.state(), self.quality());
        if shown != self.shown {
            self.shown = shown;
            self.log('E', format!("Local state {} {}", shown.0, shown.1));
        }
    }

    pub(super) fn finish(&mut self, result: Result<String, String>) {
        self.out.push(ModuleAction::Finished { result });
    }

    pub(super) fn log(&mut self, level: char, text: String) {
        self.out.push(ModuleAction::Log { level, text });
    }

    fn drain(&mut self) -> Vec<ModuleAction> {
        mem::take(&mut self.out)
    }
}
