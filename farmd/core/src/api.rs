//! What the daemon, the command line and the tests tell each other, as JSON.
//!
//! The control socket `RUN/farmd.sock` speaks HTTP/1.1:
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `GET /v1/status` | – | [`FarmStatus`] |
//! | `GET /v1/cluster` | – | [`ClusterStatus`] |
//! | `GET /v1/history?n=&since=&after=&module=` | – | [`history::History`]: the newest `n` entries, from the moment `since` on (microseconds since 1970), above the number `after`, about `module` and about nodes |
//! | `GET /v1/why?protocol=&client=&port=&vip=&vip_port=` | – | [`why::Why`]: rule, bucket, owner and verdict for a client; `port`, the client's, may be absent, `protocol` too (`tcp`) |
//! | `GET /v1/map?module=&group=` | – | [`map::Maps`]: whose each bucket is |
//! | `GET /v1/flows?n=&client=&owner=&module=` | – | [`flows::Flows`]: connections that this host has; at most `n` are named, of `client`, in buckets of the node `owner` |
//! | `GET /v1/has` | [`flows::SomeFlows`] | [`flows::SomeFlows`]: those of these connections that this host has |
//! | `GET /v1/metrics` | – | `{name: count}` of every counter |
//! | `GET /v1/plan` | – | the data plane's present plan, for support |
//! | `POST /v1/modules/{am}/{verb}` | [`CommandRequest`] | lines of [`Reply`], the last one `done` or `failed`; verbs: `start stop restart stopstart forcestop config deconfig` |
//! | `POST /v1/modules/{am}/print` | [`PrintRequest`] | lines of [`Reply`] |
//! | `POST /v1/modules/{am}/resource` | [`ResourceRequest`] | lines of [`Reply`] |
//! | `POST /v1/drain` | [`DrainRequest`] | lines of [`Reply`]; ends when no connection is left, or were reset |
//! | `POST /v1/undrain` | [`UndrainRequest`] | lines of [`Reply`]; ends when the share is back |
//! | `POST /v1/weight` | [`WeightRequest`] | lines of [`Reply`] |
//! | `POST /v1/trace` | [`trace::TraceRequest`] | lines of [`trace::TraceLine`]: `start`, any number of `frame`, and `end` or `failed` |
//! | `POST /v1/trace/stop` | [`trace::TraceStop`] | lines of [`Reply`]; ends that trace |
//! | any `/v1/on/{node}/{rest}` | as `/v1/{rest}` | what that node answers to `/v1/{rest}` |
//! | `POST /v1/deaf` | – | lines of [`Reply`]; another node hears this one: if this one hears nobody it steps out |
//! | `POST /v1/reload` | – | lines of [`Reply`]; restarts the daemon in place |
//! | `POST /v1/shutdown` | – | lines of [`Reply`]; ends the daemon after all modules stopped |

pub mod flows;
pub mod history;
pub mod history_text;
pub mod map;
pub mod trace;
pub mod why;
pub mod why_text;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Version of this interface; a change that breaks a reader raises it.
pub const API_VERSION: u32 = 1;

/// State of a module's machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ModuleState {
    /// Stopped, ready to start.
    Stop,
    /// Starting, stopping, or blocked by a resource.
    Wait,
    /// The application runs or is being started.
    Up,
}

impl std::fmt::Display for ModuleState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Stop => "STOP",
            Self::Wait => "WAIT",
            Self::Up => "UP",
        })
    }
}

/// How far a module is within its state.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Quality {
    /// Nothing is served and nothing is on its way.
    NotReady,
    /// On its way.
    Transient,
    /// Serving.
    Ready,
}

impl std::fmt::Display for Quality {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::NotReady => "NotReady",
            Self::Transient => "Transient",
            Self::Ready => "Ready",
        })
    }
}

/// Whole farm as seen by one node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct FarmStatus {
    /// [`API_VERSION`].
    pub version: u32,
    /// The node that answers.
    pub node: String,
    /// Installed or active modules on any node, by name.
    pub modules: Vec<ModuleStatus>,
    /// Nodes and how they hear each other.
    pub cluster: ClusterStatus,
    /// Things the administrator should know now (real-time priority refused, a sysctl that could not be set…).
    pub warnings: Vec<String>,
}

/// One module on all nodes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ModuleStatus {
    /// Module name.
    pub name: String,
    /// Virtual addresses, as this node knows them.
    pub vips: Vec<String>,
    /// Where frames are judged here: `bpf`, `raw`, both, or nothing while the module serves nobody.
    pub dataplane: String,
    /// Why it is that one.
    #[serde(default)]
    pub dataplane_why: String,
    /// One row per node of the cluster.
    pub nodes: Vec<NodeModuleStatus>,
    /// Resources of this node, name to value.
    pub resources: BTreeMap<String, String>,
    /// True if `farm config` was done on this node.
    pub configured: bool,
}

/// One module on one node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct NodeModuleStatus {
    /// Node name.
    pub node: String,
    /// Absent if the node does not answer or does not have the module.
    pub state: Option<ModuleState>,
    /// Absent with `state`.
    pub quality: Option<Quality>,
    /// Share per group.
    pub shares: Vec<Share>,
    /// Why it is not UP Ready, or what is special; empty if all is well.
    pub why: String,
    /// Age of what is shown, in milliseconds; 0 for this node.
    pub age_ms: u64,
}

/// Part of one group's buckets.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Share {
    /// Group name.
    pub group: String,
    /// Buckets owned.
    pub buckets: u32,
    /// Buckets there are (4096).
    pub of: u32,
    /// Connections in buckets that are no longer owned.
    pub draining: u32,
    /// What was set for it at run time. Of another node than the one that answers only the weight it tells, where that is not the
    /// configured one and no drain's.
    #[serde(default, skip_serializing_if = "ShareSetting::is_default")]
    pub setting: ShareSetting,
    /// Whose connections `draining` are, those with the most first, at most [`MAX_CLIENTS`]; only of the node that answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clients: Vec<ClientConnections>,
}

/// Most clients named beside a number of connections.
pub const MAX_CLIENTS: usize = 8;

/// Connections of one client address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClientConnections {
    /// The client.
    pub addr: IpAddr,
    /// How many.
    pub connections: u32,
}

/// What an administrator has set for one node's share of one group, over what the configuration says. Kept over restarts.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareSetting {
    /// Weight instead of the configured one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u16>,
    /// Who set it: the user, with ` on NODE` after it if another node's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_by: Option<String>,
    /// The node takes no new connections of the group, whatever its weight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drained: Option<Drained>,
}

impl ShareSetting {
    /// True if nothing is set.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The weight in force where `configured` is what the configuration says.
    pub fn effective(&self, configured: u16) -> u16 {
        match self.drained {
            Some(_) => 0,
            None => self.weight.unwrap_or(configured),
        }
    }
}

/// Who drained, and when.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drained {
    /// The user, with ` on NODE` after it if another node's.
    pub by: String,
    /// Seconds since 1970.
    pub since: u64,
    /// When what is left of its connections is reset, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
}

/// The cluster as seen by one node.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// The node that answers.
    pub node: String,
    /// Digest of `cluster.xml`, hexadecimal.
    pub digest: String,
    /// Names of the nodes in the agreed view.
    pub view: Vec<String>,
    /// The node that proposes maps.
    pub coordinator: Option<String>,
    /// All configured nodes.
    pub nodes: Vec<PeerStatus>,
    /// Number of the newest plan of the data plane here.
    #[serde(default)]
    pub plan_version: u64,
    /// Start number of the daemon that answers; another one has a higher.
    #[serde(default)]
    pub incarnation: u64,
    /// What this node sends to stay alive for the others.
    #[serde(default)]
    pub heartbeat: HeartbeatStatus,
}

/// The heartbeats this node sends.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct HeartbeatStatus {
    /// Time between two, microseconds.
    pub interval_us: u64,
    /// A peer of which nothing was heard for so long is down, milliseconds.
    pub detection_ms: u64,
    /// Size of the newest one, bytes of UDP payload.
    pub bytes: u64,
    /// Bytes of UDP payload sent to all peers on all lans, per second, over the last seconds.
    pub bytes_per_s: u64,
    /// The thread that sends them has real-time priority.
    pub realtime: bool,
    /// How many went more than half an interval late, since start.
    #[serde(default)]
    pub late: u64,
    /// By how much one went late at most, microseconds.
    #[serde(default)]
    pub late_most_us: u64,
    /// Longest time from one wait of that thread to the next, microseconds.
    #[serde(default)]
    pub turn_longest_us: u64,
}

/// How a peer is heard on one lan.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct LinkStatus {
    /// Name of the lan.
    pub lan: String,
    /// The peer's address there.
    pub addr: String,
    /// Heartbeats heard since the peer's start, or this node's.
    pub received: u64,
    /// Heartbeats that must have been sent and were not heard.
    pub lost: u64,
    /// Of a thousand heartbeats of the last seconds so many were lost; absent before enough were heard.
    pub loss_permille: Option<u32>,
    /// Newest round trip, microseconds; absent before there was one.
    pub rtt_us: Option<u64>,
    /// Shortest one.
    pub rtt_min_us: Option<u64>,
    /// Their smoothed mean.
    pub rtt_avg_us: Option<u64>,
    /// Milliseconds since the last heartbeat was heard on this lan, if ever.
    pub heard_ms: Option<u64>,
}

/// One node as seen by another.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Node name.
    pub name: String,
    /// Addresses on each lan, `lan=address`.
    pub addrs: Vec<String>,
    /// `this`, `alive`, `suspect` or `down`.
    pub state: String,
    /// Since when it is so, in milliseconds.
    pub since_ms: u64,
    /// Milliseconds since the last heartbeat was heard, if ever.
    pub heard_ms: Option<u64>,
    /// Why it is not alive, or is kept out.
    pub why: String,
    /// Its start number, the newest seen; 0 if it was never heard.
    #[serde(default)]
    pub incarnation: u64,
    /// Since its farmd has started, by its clock and this node's, milliseconds.
    #[serde(default)]
    pub uptime_ms: Option<u64>,
    /// How it is heard on each lan that it shares with this node.
    #[serde(default)]
    pub links: Vec<LinkStatus>,
}

/// Body of a module command.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct CommandRequest {
    /// Who asks, for the log: a user name, or the identity given by a script.
    pub by: String,
    /// `-i NAME`: asked by a checker or script; counts towards `maxloop`. Without it an administrator asked and the count is reset.
    pub identity: Option<String>,
    /// Return only when the module has reached its new stable state.
    pub wait: bool,
}

/// Which shares of a node a command means.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ShareScope {
    /// Only of this module; of every configured one without it.
    pub module: Option<String>,
    /// Only of groups with this name; of all without it.
    pub group: Option<String>,
}

/// Body of `drain`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DrainRequest {
    /// What is drained.
    #[serde(flatten)]
    pub scope: ShareScope,
    /// When connections that are left are reset, in milliseconds from now.
    pub timeout_ms: u64,
    /// Drain although nobody else would serve.
    #[serde(default)]
    pub force: bool,
    /// Return when the connections have ended; else at once.
    #[serde(default)]
    pub wait: bool,
}

/// Body of `undrain`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct UndrainRequest {
    /// What gets its share back.
    #[serde(flatten)]
    pub scope: ShareScope,
}

/// Body of `weight`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct WeightRequest {
    /// Whose weight.
    #[serde(flatten)]
    pub scope: ShareScope,
    /// The weight; `None` for the configured one.
    pub weight: Option<u16>,
    /// Set it to 0 although nobody else would serve.
    #[serde(default)]
    pub force: bool,
}

/// Body of `print`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PrintRequest {
    /// `I` or `E`.
    pub level: char,
    /// The line.
    pub text: String,
    /// Origin shown in the log, default `user`.
    pub origin: Option<String>,
}

/// Body of `resource`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ResourceRequest {
    /// `class.ident`.
    pub resource: String,
    /// `up`, `down`, `init` or any text.
    pub value: String,
    /// `-i NAME`: who sets it.
    pub identity: Option<String>,
}

/// One line of the answer to a command.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Reply {
    /// Something happened on the way.
    Progress {
        /// What, for a person.
        text: String,
    },
    /// It is done.
    Done {
        /// What was reached, for a person.
        text: String,
    },
    /// It was not done, or not wholly.
    Failed {
        /// Why.
        error: String,
        /// The exit code the command line ends with.
        code: u8,
    },
}

/// Exit codes of `farm`, documented in farm(1).
pub mod exit {
    /// Done.
    pub const OK: u8 = 0;
    /// Asked for and not reached: a script failed, a time ran out.
    pub const FAILED: u8 = 1;
    /// `status`: not all nodes are UP Ready, though the service answers.
    pub const DEGRADED: u8 = 2;
    /// `status`: the module is stopped.
    pub const STOPPED: u8 = 3;
    /// The daemon is not running or does not answer.
    pub const NO_DAEMON: u8 = 4;
    /// No such module, group, node, virtual IP or file.
    pub const NOT_FOUND: u8 = 5;
    /// Refused in the present state.
    pub const REFUSED: u8 = 6;
    /// Wrong words on the command line (EX_USAGE).
    pub const USAGE: u8 = 64;
    /// A configuration or module file is wrong (EX_DATAERR).
    pub const DATA: u8 = 65;
    /// A file could not be read or written (EX_IOERR).
    pub const IO: u8 = 74;
    /// Not allowed (EX_NOPERM).
    pub const DENIED: u8 = 77;
}
