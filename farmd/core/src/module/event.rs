//! What a module's machine hears and what it wants done.

use std::time::Duration;

use super::script::{Script, ScriptOutcome};

/// One thing that happened to a module.
///
/// Commands carry `by`, the name shown in the log, and `identity`: set when a checker or a script asks
/// (`-i NAME`), absent when an administrator does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ModuleEvent {
    /// Start the module.
    Start {
        /// Who asks.
        by: String,
        /// Set if no administrator asks.
        identity: Option<String>,
    },
    /// Stop it.
    Stop {
        /// Who asks.
        by: String,
        /// Set if no administrator asks.
        identity: Option<String>,
    },
    /// Stop and start the application; the module keeps its addresses.
    Restart {
        /// Who asks.
        by: String,
        /// Set if no administrator asks.
        identity: Option<String>,
    },
    /// Stop the module, then start it.
    StopStart {
        /// Who asks.
        by: String,
        /// Set if no administrator asks.
        identity: Option<String>,
    },
    /// Stop at once: no hand-over is awaited and the graceful pass of `stop_both` is left out.
    ForceStop {
        /// Who asks.
        by: String,
        /// Set if no administrator asks.
        identity: Option<String>,
    },
    /// The answer to [`ModuleAction::RunScript`], also after [`ModuleAction::KillScript`].
    ScriptExited {
        /// Which run.
        script: Script,
        /// How it ended.
        outcome: ScriptOutcome,
    },
    /// The answer to [`ModuleAction::SetUpVip`].
    VipReady(Result<(), String>),
    /// The answer to [`ModuleAction::TearDownVip`]: the steps that failed, if any.
    VipGone(Vec<String>),
    /// The answer to [`ModuleAction::CloseTraffic`]: this node owns no bucket of the module any more.
    HandoverDone,
    /// A resource was set by hand or by a script.
    Resource {
        /// `class.ident`.
        name: String,
        /// `up`, `down`, `init` or any text.
        value: String,
        /// Who set it.
        by: String,
    },
    /// A checker has a new verdict.
    Checked {
        /// `tcp.<ident>`.
        resource: String,
        /// True if up.
        up: bool,
        /// What the probe saw.
        detail: String,
    },
}

/// One thing the daemon is to do for a module, in the order given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ModuleAction {
    /// Run a script; [`ModuleEvent::ScriptExited`] answers. Never asked for while another one runs.
    RunScript {
        /// Which one.
        script: Script,
        /// Its arguments: state now, next state, action; `force` stands before them in the second pass of `stop_both`.
        args: Vec<String>,
        /// Past this it is ended with its process group.
        timeout: Duration,
        /// Who made the module act, if it was no administrator.
        identity: Option<String>,
    },
    /// End the running script with its process group; [`ModuleEvent::ScriptExited`] still answers.
    KillScript,
    /// Make the host carry the module's addresses; [`ModuleEvent::VipReady`] answers.
    SetUpVip,
    /// Undo that, also if it was done in part only; [`ModuleEvent::VipGone`] answers. Comes after `VipReady`, but for [`ModuleEvent::ForceStop`].
    TearDownVip,
    /// The module is ready: it may own buckets.
    OpenTraffic,
    /// It must not own buckets any more; [`ModuleEvent::HandoverDone`] answers.
    CloseTraffic,
    /// Begin to probe; each checker reports its first verdict.
    StartCheckers,
    /// End all probes.
    StopCheckers,
    /// Reset the TCP connections whose local address is one of the module's VIPs.
    ResetConnections,
    /// A line for the module log.
    Log {
        /// `E` event, `U` user action, `S` script, `I` information, `C` critical, `D` debug.
        level: char,
        /// The line.
        text: String,
    },
    /// The module is at rest or serving: answers every waiting command. A command that a later one overtook is
    /// answered with the later one's result; whoever asked for UP compares with the state.
    Finished {
        /// What was reached, or why it was not.
        result: Result<String, String>,
    },
}
