//! The steps of a module's life: what each one asks for and which one follows.
//!
//! Part of [`ModuleMachine`]: the transition table in [`super::state`] calls it, and the drawing there shows the
//! order. A step that does not apply (no `<vip>`, no `<user>`) calls the next one itself.

use std::time::Duration;

use super::phase::{Aim, Phase};
use super::state::{HANDOVER_LIMIT, ModuleAction, ModuleMachine, Script, ScriptOutcome};
use crate::config::CheckerAction;

impl ModuleMachine {
    pub(super) fn begin(&mut self, identity: Option<String>) {
        self.aim = Aim::Stay;
        self.force = false;
        self.stop_wanted = false;
        self.action = "start";
        self.identity = identity;
        self.failure = None;
        self.problems.clear();
        self.enter(Phase::Prestarting);
        if !self.run(Script::Prestart) {
            self.raise_vip();
        }
    }

    pub(super) fn raise_vip(&mut self) {
        if self.has_vip {
            self.enter(Phase::RaisingVip);
            self.out.push(ModuleAction::SetUpVip);
        } else {
            self.start_application();
        }
    }

    pub(super) fn start_application(&mut self) {
        self.enter(Phase::Starting);
        if !self.run(Script::StartBoth) {
            self.start_checkers();
        }
    }

    pub(super) fn start_checkers(&mut self) {
        self.enter(Phase::Checking);
        self.reset_checkers();
        if !self.checkers.is_empty() {
            self.out.push(ModuleAction::StartCheckers);
        }
        self.serve_if_passed();
    }

    /// A checker with `noaction` is only shown: it does not hold the traffic back either.
    pub(super) fn serve_if_passed(&mut self) {
        let passed = self
            .checkers
            .iter()
            .all(|checker| checker.action == CheckerAction::NoAction || checker.up == Some(true));
        if passed {
            self.aim = Aim::Stay;
            self.identity = None;
            self.problems.clear();
            self.enter(Phase::Serving);
            self.out.push(ModuleAction::OpenTraffic);
            self.finish(Ok("UP Ready".to_owned()));
        }
    }

    /// A step on the way up did not work: cleans up and rests, with the reason.
    pub(super) fn fail(&mut self, why: String) {
        self.failure = Some(why);
        self.aim = Aim::Stop;
        self.action = "stop";
        match self.phase {
            Phase::Prestarting => self.run_poststop(),
            Phase::RaisingVip => self.lower_vip(),
            Phase::Starting => self.stop_application(),
            Phase::Stopped
            | Phase::Checking
            | Phase::Serving
            | Phase::Leaving { .. }
            | Phase::AbandoningVip
            | Phase::Cancelling(_)
            | Phase::StoppingNicely
            | Phase::StoppingByForce
            | Phase::LoweringVip
            | Phase::Poststopping => {}
        }
    }

    /// Turns towards rest from wherever the module is; what is under way already goes on.
    pub(super) fn go_down(&mut self, now: Duration, action: &'static str, aim: Aim) {
        self.aim = aim;
        self.action = action;
        match self.phase {
            Phase::Prestarting => self.cancel(Script::Prestart),
            Phase::Starting => self.cancel(Script::StartBoth),
            Phase::RaisingVip if self.force => self.lower_vip(),
            Phase::RaisingVip => self.enter(Phase::AbandoningVip),
            Phase::Checking => {
                self.stop_checkers();
                self.stop_application();
            }
            Phase::Serving => {
                self.stop_checkers();
                self.out.push(ModuleAction::CloseTraffic);
                if self.force || !self.has_vip {
                    self.stop_application();
                } else {
                    self.enter(Phase::Leaving {
                        deadline: now + HANDOVER_LIMIT,
                    });
                }
            }
            Phase::Leaving { .. } if self.force => self.stop_application(),
            Phase::AbandoningVip if self.force => self.lower_vip(),
            Phase::StoppingNicely if self.force => self.cancel(Script::StopBoth),
            Phase::Stopped
            | Phase::Leaving { .. }
            | Phase::AbandoningVip
            | Phase::Cancelling(_)
            | Phase::StoppingNicely
            | Phase::StoppingByForce
            | Phase::LoweringVip
            | Phase::Poststopping => {}
        }
        self.show();
    }

    /// A repeated forcestop does not wait for the last scripts either.
    pub(super) fn end_last_scripts(&mut self) {
        match self.phase {
            Phase::StoppingByForce => self.cancel(Script::StopBothForce),
            Phase::Poststopping => self.cancel(Script::Poststop),
            Phase::Stopped
            | Phase::Prestarting
            | Phase::RaisingVip
            | Phase::Starting
            | Phase::Checking
            | Phase::Serving
            | Phase::Leaving { .. }
            | Phase::AbandoningVip
            | Phase::Cancelling(_)
            | Phase::StoppingNicely
            | Phase::LoweringVip => {}
        }
    }

    pub(super) fn cancel(&mut self, script: Script) {
        self.enter(Phase::Cancelling(script));
        self.out.push(ModuleAction::KillScript);
    }

    pub(super) fn cancelled(&mut self, script: Script) {
        self.running = None;
        self.log('I', format!("Script {script} was ended"));
        match script {
            Script::Prestart => self.run_poststop(),
            Script::StartBoth => self.stop_application(),
            Script::StopBoth => self.stop_by_force(),
            Script::StopBothForce => {
                self.problems.push(format!("{script} was ended before its time"));
                self.leave_application();
            }
            Script::Poststop => {
                self.problems.push(format!("{script} was ended before its time"));
                self.rest();
            }
        }
    }

    pub(super) fn stop_application(&mut self) {
        if self.force {
            self.stop_by_force();
            return;
        }
        self.enter(Phase::StoppingNicely);
        if !self.run(Script::StopBoth) {
            self.stop_by_force();
        }
    }

    pub(super) fn stop_by_force(&mut self) {
        self.enter(Phase::StoppingByForce);
        if !self.run(Script::StopBothForce) {
            self.leave_application();
        }
    }

    pub(super) fn leave_application(&mut self) {
        match self.aim {
            Aim::Restart => self.start_application(),
            Aim::Stay | Aim::StopStart | Aim::Stop => self.lower_vip(),
        }
    }

    pub(super) fn lower_vip(&mut self) {
        if !self.has_vip {
            self.run_poststop();
            return;
        }
        self.enter(Phase::LoweringVip);
        if self.tcp_reset {
            self.out.push(ModuleAction::ResetConnections);
        }
        self.out.push(ModuleAction::TearDownVip);
    }

    pub(super) fn run_poststop(&mut self) {
        self.enter(Phase::Poststopping);
        if !self.run(Script::Poststop) {
            self.rest();
        }
    }

    pub(super) fn rest(&mut self) {
        if self.aim == Aim::StopStart {
            let identity = self.identity.take();
            self.log('E', "Action start called automatically".to_owned());
            self.begin(identity);
            return;
        }
        self.aim = Aim::Stay;
        self.identity = None;
        let result = match (&self.failure, self.problems.is_empty()) {
            (Some(failure), _) if !self.stop_wanted => Err(failure.clone()),
            (_, false) => Err(format!("the module is in STOP, but {}", self.problems.join("; "))),
            (_, true) => Ok("STOP".to_owned()),
        };
        if let Some(failure) = self.failure.take() {
            self.rested = failure;
        }
        self.problems.clear();
        self.enter(Phase::Stopped);
        self.finish(result);
    }

    /// Asks for a script; false if the module has no `<user>` and so runs none.
    pub(super) fn run(&mut self, script: Script) -> bool {
        let Some(user) = &self.user else { return false };
        let timeout = match script {
            Script::Prestart | Script::StartBoth | Script::Poststop => user.start_timeout,
            Script::StopBoth => user.nice_stop_timeout,
            Script::StopBothForce => user.force_stop_timeout,
        };
        let (now, next) = match (script, self.aim) {
            (Script::Prestart, _) => ("STOP", "WAIT"),
            (Script::StartBoth | Script::StopBoth | Script::StopBothForce, Aim::Restart) => ("UP", "UP"),
            (Script::StartBoth, Aim::Stay | Aim::StopStart | Aim::Stop) => ("WAIT", "UP"),
            (Script::StopBoth, Aim::Stay | Aim::StopStart | Aim::Stop) => ("UP", "WAIT"),
            (Script::StopBothForce, Aim::Stay | Aim::StopStart | Aim::Stop) | (Script::Poststop, _) => ("WAIT", "STOP"),
        };
        let force = (script == Script::StopBothForce).then_some("force");
        self.running = Some(script);
        self.out.push(ModuleAction::RunScript {
            script,
            args: force
                .into_iter()
                .chain([now, next, self.action])
                .map(str::to_owned)
                .collect(),
            timeout,
            identity: self.identity.clone(),
        });
        true
    }

    /// Takes note of a script's end; a failure is logged and given back as the reason.
    pub(super) fn script_ended(&mut self, script: Script, outcome: &ScriptOutcome) -> Result<(), String> {
        self.running = None;
        match outcome {
            ScriptOutcome::Exited(0) => Ok(()),
            ScriptOutcome::Missing if !script.is_required() => Ok(()),
            ScriptOutcome::Exited(_)
            | ScriptOutcome::ExitedSaying(..)
            | ScriptOutcome::Signaled(_)
            | ScriptOutcome::TimedOut
            | ScriptOutcome::Missing
            | ScriptOutcome::NotStarted(_) => {
                self.log('E', format!("Script {script} failed: {outcome}"));
                Err(format!("{script} failed: {outcome}"))
            }
        }
    }

    pub(super) fn note_problem(&mut self, script: Script, outcome: &ScriptOutcome) {
        if let Err(why) = self.script_ended(script, outcome) {
            self.problems.push(why);
        }
    }

    pub(super) fn problem(&mut self, text: String) {
        self.log('E', text.clone());
        self.problems.push(text);
    }
}
