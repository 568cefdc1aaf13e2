//! The steps of a module's life, and where it is going.

use std::time::Duration;

use super::script::Script;
use crate::api::{ModuleState, Quality};

/// One step of a module's life; see the drawing in [`super::state`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Stopped,
    Prestarting,
    RaisingVip,
    Starting,
    Checking,
    Serving,
    /// The map is being left.
    Leaving {
        deadline: Duration,
    },
    /// Stop came while the VIP was being set up: waits for the answer, to tear down what there is.
    AbandoningVip,
    /// A kill was asked for; waits for the script's end.
    Cancelling(Script),
    StoppingNicely,
    StoppingByForce,
    LoweringVip,
    Poststopping,
}

/// Where the module is going.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Aim {
    /// UP Ready, or STOP if that is where it is.
    Stay,
    /// Down to the application only, and up again.
    Restart,
    /// Down to STOP and up again.
    StopStart,
    /// Down to STOP.
    Stop,
}

impl Phase {
    /// What is shown for it.
    pub(super) fn state(self, aim: Aim) -> ModuleState {
        match self {
            Phase::Stopped => ModuleState::Stop,
            Phase::Starting | Phase::Checking | Phase::Serving | Phase::Leaving { .. } | Phase::StoppingNicely => {
                ModuleState::Up
            }
            Phase::Cancelling(Script::StartBoth | Script::StopBoth) => ModuleState::Up,
            Phase::StoppingByForce | Phase::Cancelling(Script::StopBothForce) => match aim {
                Aim::Restart => ModuleState::Up,
                Aim::Stay | Aim::StopStart | Aim::Stop => ModuleState::Wait,
            },
            Phase::Prestarting
            | Phase::RaisingVip
            | Phase::AbandoningVip
            | Phase::LoweringVip
            | Phase::Poststopping
            | Phase::Cancelling(Script::Prestart | Script::Poststop) => ModuleState::Wait,
        }
    }

    /// How far it is within the state.
    pub(super) fn quality(self) -> Quality {
        match self {
            Phase::Stopped => Quality::NotReady,
            Phase::Serving => Quality::Ready,
            Phase::Prestarting
            | Phase::RaisingVip
            | Phase::Starting
            | Phase::Checking
            | Phase::Leaving { .. }
            | Phase::AbandoningVip
            | Phase::Cancelling(_)
            | Phase::StoppingNicely
            | Phase::StoppingByForce
            | Phase::LoweringVip
            | Phase::Poststopping => Quality::Transient,
        }
    }
}
