//! What a command makes of the module, by the direction it is going.
//!
//! Part of [`ModuleMachine`]: the transition table in [`super::state`] calls it. Counts what checkers and scripts ask
//! for (`maxloop`) and decides whose wish wins; the steps themselves are [`super::steps`].

use std::time::Duration;

use super::phase::Aim;
use super::state::ModuleMachine;

/// Who makes the module act.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Caller {
    pub(super) by: String,
    /// Set if a checker or a script asks.
    pub(super) identity: Option<String>,
}

impl ModuleMachine {
    pub(super) fn start_from_rest(&mut self, now: Duration, verb: &'static str, caller: Caller) {
        self.announce(verb, &caller, "");
        self.failure = None;
        if self.admit(now, &caller, None) {
            self.begin(caller.identity);
        } else {
            let failure = self.failure.take().unwrap_or_default();
            self.rested = failure.clone();
            self.finish(Err(failure));
        }
    }

    pub(super) fn refuse(&mut self, verb: &'static str, by: &str) {
        self.log(
            'E',
            format!("Action {verb} called by {by} is refused: the module is in STOP"),
        );
        self.finish(Err(format!("{verb} is refused: the module is in STOP, start it first")));
    }

    pub(super) fn stay_stopped(&mut self, verb: &'static str, caller: Caller) {
        self.announce(verb, &caller, "the module is in STOP already");
        if caller.identity.is_none() {
            self.loops.reset();
        }
        self.finish(Ok("already STOP".to_owned()));
    }

    /// Restart or stopstart while UP or on the way there, by a command or (with `cause`) a checker.
    pub(super) fn react(&mut self, now: Duration, verb: &'static str, aim: Aim, caller: Caller, cause: Option<String>) {
        self.announce(verb, &caller, "");
        if let Some(cause) = &cause {
            self.asked = format!("{verb} because {cause}");
        }
        if self.admit(now, &caller, cause) {
            self.identity = caller.identity;
            self.go_down(now, verb, aim);
        } else {
            self.identity = caller.identity;
            self.go_down(now, "stop", Aim::Stop);
        }
    }

    /// A command that would have the module UP while it is going down.
    pub(super) fn turn(&mut self, now: Duration, verb: &'static str, wanted: Aim, caller: Caller) {
        let joins = match (self.aim, wanted) {
            // The application alone cannot be restarted when the whole module is on its way to STOP.
            (Aim::Stop | Aim::Stay, Aim::Restart) => {
                self.announce(verb, &caller, "ignored, the module is stopping");
                return;
            }
            (Aim::Stop | Aim::Stay, Aim::StopStart | Aim::Stay | Aim::Stop) if caller.identity.is_some() => {
                self.announce(verb, &caller, "ignored, the module is stopping");
                return;
            }
            (Aim::Stop | Aim::Stay, Aim::StopStart | Aim::Stay | Aim::Stop) => false,
            (Aim::Restart, Aim::StopStart) => verb == "start",
            (Aim::Restart, Aim::Restart | Aim::Stay | Aim::Stop) => true,
            (Aim::StopStart, Aim::Stay | Aim::Restart | Aim::StopStart | Aim::Stop) => true,
        };
        if joins {
            self.announce(verb, &caller, "the module will be started already");
            return;
        }
        self.announce(verb, &caller, "it follows the stop under way");
        if self.admit(now, &caller, None) {
            self.failure = None;
            self.stop_wanted = false;
            self.identity = caller.identity;
            self.aim = Aim::StopStart;
            self.action = "stopstart";
        } else {
            self.aim = Aim::Stop;
            self.action = "stop";
        }
    }

    pub(super) fn stop(&mut self, now: Duration, verb: &'static str, force: bool, caller: Caller) {
        self.announce(verb, &caller, "");
        match &caller.identity {
            // Whoever waits for UP must learn that this was not an administrator's wish.
            Some(_) => {
                self.failure
                    .get_or_insert_with(|| format!("{verb} was called by {}", caller.by));
            }
            None => {
                self.loops.reset();
                self.stop_wanted = true;
            }
        }
        if self.failure.is_none() {
            self.rested = format!("stopped by {}", caller.by);
        }
        self.identity = caller.identity;
        let insists = force && self.force;
        self.force |= force;
        if insists {
            self.end_last_scripts();
        }
        self.go_down(now, "stop", Aim::Stop);
    }

    /// Logs a command, and after a colon what becomes of it if that is not plain.
    pub(super) fn announce(&mut self, verb: &str, caller: &Caller, remark: &str) {
        let level = if caller.identity.is_none() { 'U' } else { 'E' };
        let by = &caller.by;
        let text = if remark.is_empty() {
            self.asked = format!("{verb} called by {by}");
            format!("Action {verb} called by {by}")
        } else {
            format!("Action {verb} called by {by}: {remark}")
        };
        self.log(level, text);
    }

    /// Counts a command. False if `maxloop` forbids it: then the failure is noted and logged.
    pub(super) fn admit(&mut self, now: Duration, caller: &Caller, cause: Option<String>) -> bool {
        if caller.identity.is_none() {
            self.loops.reset();
            return true;
        }
        if self.loops.allow(now) {
            return true;
        }
        let count = self.loops.count(now);
        self.log('C', "Action stop called by maxloop".to_owned());
        let cause = cause.unwrap_or_else(|| format!("called by {}", caller.by));
        self.failure = Some(format!(
            "stopped by maxloop: {count} automatic reactions were already made, the next would be for: {cause}"
        ));
        false
    }
}
