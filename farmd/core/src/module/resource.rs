//! Resources: what checkers found, what scripts have set, and what follows from it.
//!
//! Part of [`ModuleMachine`]: the transition table in [`super::state`] calls it. Every checker reacts with its own
//! configured action; values set by hand are kept and shown.

use std::time::Duration;

use super::command::Caller;
use super::phase::{Aim, Phase};
use super::state::{MAX_RESOURCES, ModuleAction, ModuleMachine};
use crate::config::CheckerAction;

/// One configured checker and its verdict since it was last started.
#[derive(Clone, Debug)]
pub(super) struct CheckerState {
    /// `tcp.<ident>`.
    pub(super) resource: String,
    pub(super) action: CheckerAction,
    pub(super) up: Option<bool>,
}

impl ModuleMachine {
    pub(super) fn why_checking(&self) -> String {
        let waiting: Vec<String> = self
            .checkers
            .iter()
            .filter(|checker| checker.action != CheckerAction::NoAction && checker.up != Some(true))
            .map(|checker| checker.resource.clone())
            .collect();
        format!("start_both succeeded, {} has not passed yet", waiting.join(", "))
    }

    pub(super) fn checked(&mut self, now: Duration, resource: &str, up: bool, detail: String) {
        let Some(checker) = self.checkers.iter_mut().find(|c| c.resource == resource) else {
            self.log(
                'D',
                format!("Resource {resource} has no checker, its verdict is ignored"),
            );
            return;
        };
        if checker.up == Some(up) {
            return;
        }
        let action = checker.action;
        checker.up = Some(up);
        let value = if up { "up" } else { "down" };
        self.resources.insert(resource.to_owned(), value.to_owned());
        let level = if up { 'I' } else { 'E' };
        self.log(
            level,
            format!("Resource {resource} set to {value} by tcpcheck: {detail}"),
        );
        if up {
            if self.phase == Phase::Checking {
                self.serve_if_passed();
            }
            return;
        }
        let cause = format!("{resource} is down: {detail}");
        let caller = Caller {
            by: "tcpcheck".to_owned(),
            identity: Some("tcpcheck".to_owned()),
        };
        match action {
            CheckerAction::NoAction => {}
            CheckerAction::Restart => self.react(now, "restart", Aim::Restart, caller, Some(cause)),
            CheckerAction::StopStart => self.react(now, "stopstart", Aim::StopStart, caller, Some(cause)),
            CheckerAction::Stop => {
                self.failure = Some(cause);
                self.stop(now, "stop", false, caller);
            }
        }
    }

    pub(super) fn set_resource(&mut self, name: String, value: String, by: &str) {
        if self.checkers.iter().any(|checker| checker.resource == name) {
            self.log(
                'E',
                format!("Resource {name} not set to {value} by {by}: only its checker sets it"),
            );
        } else if self.resources.len() >= MAX_RESOURCES && !self.resources.contains_key(&name) {
            self.log(
                'E',
                format!("Resource {name} not set by {by}: there are {MAX_RESOURCES} already"),
            );
        } else {
            self.log('I', format!("Resource {name} set to {value} by {by}"));
            self.resources.insert(name, value);
        }
    }

    pub(super) fn stop_checkers(&mut self) {
        if !self.checkers.is_empty() {
            self.out.push(ModuleAction::StopCheckers);
        }
        self.reset_checkers();
    }

    pub(super) fn reset_checkers(&mut self) {
        for checker in &mut self.checkers {
            checker.up = None;
            self.resources.insert(checker.resource.clone(), "init".to_owned());
        }
    }
}
