//! Everything that can happen, as one enum, and the way to tell the owner loop.
//!
//! Edges (scripts, checkers, control socket, data plane, host set-up) hold an [`EventSender`]; only
//! the owner loop in [`crate::node`] receives. The queue is unbounded because each edge has at most a few
//! events under way: one per running script, checker, command or applied plan, and 64 requesters per turn
//! of the data plane. The loop takes a bounded number per turn.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::mpsc;

use farm_core::api::history::HistoryFilter;
use farm_core::api::{
    ClientConnections, ClusterStatus, CommandRequest, DrainRequest, FarmStatus, PrintRequest, Reply, ResourceRequest,
    UndrainRequest, WeightRequest,
};
use farm_core::balance::flow::FlowKey;
use farm_core::id::{ModuleName, NodeSet};
use farm_core::module::state::{Script, ScriptOutcome};
use farm_sys::event_fd::EventFd;

use crate::history::Selection;

/// One thing that happened.
#[derive(Debug)]
pub enum Event {
    /// A command from the control socket.
    Command(Command),
    /// A question from the control socket.
    Query(Query),
    /// A module's script ended.
    ScriptExited {
        /// Whose script.
        module: ModuleName,
        /// Which script.
        script: Script,
        /// How it ended.
        outcome: ScriptOutcome,
    },
    /// A checker has a new verdict.
    Checked {
        /// Whose checker.
        module: ModuleName,
        /// `tcp.<ident>`.
        resource: String,
        /// True if up.
        up: bool,
        /// What the probe saw, for the log.
        detail: String,
    },
    /// The host carries the module's VIPs, or could not be made to.
    VipReady {
        /// Whose VIPs.
        module: ModuleName,
        /// Where each VIP is, or why not.
        result: Result<Vec<crate::host::HostVip>, String>,
    },
    /// A service interface of the module has gone down, or is back.
    Link {
        /// Whose interface.
        module: ModuleName,
        /// Why the module cannot be reached; `None` if it can.
        problem: Option<String>,
    },
    /// The host no longer carries the module's VIPs.
    VipGone {
        /// Whose VIPs.
        module: ModuleName,
        /// Steps that failed, if any.
        problems: Vec<String>,
    },
    /// Every data-plane thread works with this plan.
    PlanApplied {
        /// The plan's number.
        version: u64,
        /// What this host has of each group (position in the plan) in buckets that it does not own.
        held: Vec<HeldGroup>,
    },
    /// Connections that the data plane does not know, in buckets in which peers have some: these are to be asked.
    Unknown(Vec<FlowKey>),
    /// Peers have been asked which of these connections they have.
    PeersTold {
        /// What was asked for.
        asked: Vec<FlowKey>,
        /// Whom.
        nodes: NodeSet,
        /// What one or more of them have; an error if one has not answered.
        theirs: Result<BTreeSet<FlowKey>, String>,
    },
    /// The witness of a module's partition policy answers, or no longer.
    Witness {
        /// Whose.
        module: ModuleName,
        /// It answers.
        answers: bool,
        /// What was seen.
        detail: String,
    },
    /// A requester of a VIP's address was seen.
    Requester(farm_core::wire::heartbeat::Requester),
    /// `ETC/modules/AM` was checked and made the active copy, or not.
    Configured {
        /// Which module.
        module: ModuleName,
        /// Who asked.
        by: String,
        /// The new configuration with its warnings; or the exit code, and every mistake.
        result: Result<(Box<farm_core::config::ModuleConfig>, Vec<String>), (u8, String)>,
        /// Who waits for it.
        replies: tokio::sync::mpsc::UnboundedSender<Reply>,
    },
    /// The active copy is gone, or not.
    Deconfigured {
        /// Which module.
        module: ModuleName,
        /// Who asked.
        by: String,
        /// Why it could not be removed.
        result: Result<(), String>,
        /// Who waits for it.
        replies: tokio::sync::mpsc::UnboundedSender<Reply>,
    },
    /// A command about this node's shares.
    Share(ShareCommand),
    /// What was set for the shares is on the disk, or not.
    SharesKept {
        /// The command that made it so.
        job: u64,
        /// Why it will not outlast a restart.
        result: Result<(), String>,
    },
    /// The answer to [`Effect::ResetHeld`](crate::effect::Effect::ResetHeld).
    HeldReset {
        /// The drain that asked.
        job: u64,
        /// Connections that were reset, or why not all were.
        result: Result<u32, String>,
    },
    /// farmd is to be restarted in place.
    Reload {
        /// Who asks.
        by: String,
        /// Who waits.
        replies: tokio::sync::mpsc::UnboundedSender<Reply>,
    },
    /// Whether another farmd would start with the files there are now.
    ReloadChecked {
        /// Who asks for it.
        by: String,
        /// Who waits.
        replies: tokio::sync::mpsc::UnboundedSender<Reply>,
        /// Why not.
        result: Result<(), String>,
    },
    /// A node that hears this one says so by a command: if this one hears nobody it is cut off.
    ToldDeaf {
        /// Who says so.
        by: String,
    },
    /// SIGTERM or SIGINT.
    Shutdown {
        /// Which signal or command.
        by: String,
    },
}

/// Connections of one group in buckets that this host does not own.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HeldGroup {
    /// The buckets.
    pub buckets: Vec<u16>,
    /// Connections in them.
    pub connections: u32,
    /// Whose they are: those with the most, at most [`farm_core::api::MAX_CLIENTS`].
    pub clients: Vec<ClientConnections>,
}

/// A command and where its replies go.
#[derive(Debug)]
pub struct Command {
    /// The module.
    pub module: ModuleName,
    /// What to do.
    pub verb: Verb,
    /// Replies; the last one is `Done` or `Failed`. Dropped replies are not missed.
    pub replies: tokio::sync::mpsc::UnboundedSender<Reply>,
}

/// A command about this node's shares, and where its replies go.
#[derive(Debug)]
pub struct ShareCommand {
    /// What to do.
    pub verb: ShareVerb,
    /// Who asks, for the log and the status.
    pub by: String,
    /// As in [`Command`].
    pub replies: tokio::sync::mpsc::UnboundedSender<Reply>,
}

/// What a command about shares asks for.
#[derive(Debug)]
pub enum ShareVerb {
    /// Take no new connections, and end those that are left at a deadline.
    Drain(DrainRequest),
    /// Take new connections again.
    Undrain(UndrainRequest),
    /// Take another share.
    Weight(WeightRequest),
}

/// What a command asks for.
#[derive(Debug)]
pub enum Verb {
    /// Start the module.
    Start(CommandRequest),
    /// Stop it.
    Stop(CommandRequest),
    /// Stop and start the application only.
    Restart(CommandRequest),
    /// Stop and start the module.
    StopStart(CommandRequest),
    /// Stop without the graceful pass and without waiting.
    ForceStop(CommandRequest),
    /// Check `ETC/modules/AM` and make it the active copy.
    Config(CommandRequest),
    /// Remove the active copy.
    Deconfig(CommandRequest),
    /// Write a line into the module log.
    Print(PrintRequest),
    /// Set a resource.
    Resource(ResourceRequest),
}

/// A question and where its answer goes.
#[derive(Debug)]
pub enum Query {
    /// [`FarmStatus`].
    Status(tokio::sync::oneshot::Sender<FarmStatus>),
    /// [`ClusterStatus`].
    Cluster(tokio::sync::oneshot::Sender<ClusterStatus>),
    /// What has happened.
    History(HistoryFilter, tokio::sync::oneshot::Sender<Selection>),
    /// What is known of buckets and maps, and of one bucket whence it came.
    Sight(
        Option<farm_core::balance::explain::Inquiry>,
        tokio::sync::oneshot::Sender<crate::look::Sight>,
    ),
    /// Who may listen to what becomes of each frame.
    Tracer(tokio::sync::oneshot::Sender<crate::dataplane::trace::Tracer>),
    /// Counters, by name.
    Metrics(tokio::sync::oneshot::Sender<std::collections::BTreeMap<String, u64>>),
    /// The present plan as JSON, for support.
    Plan(tokio::sync::oneshot::Sender<serde_json::Value>),
}

/// Hands events to the owner loop and wakes it.
#[derive(Clone, Debug)]
pub struct EventSender {
    queue: mpsc::Sender<Event>,
    wake: Arc<EventFd>,
}

impl EventSender {
    /// The queue's two ends; the loop polls `wake` and then drains the receiver.
    pub fn channel(wake: Arc<EventFd>) -> (Self, mpsc::Receiver<Event>) {
        let (queue, events) = mpsc::channel();
        (Self { queue, wake }, events)
    }

    /// Queues `event`. After the loop has ended events are dropped: nobody is left to act on them.
    pub fn send(&self, event: Event) {
        if self.queue.send(event).is_ok() {
            self.wake.notify();
        }
    }
}
