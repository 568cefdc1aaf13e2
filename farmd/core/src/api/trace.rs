//! Live frames of virtual addresses: what `POST /v1/trace` takes and answers.
//!
//! Owns the form of the request and of the answer's lines. The words of verdicts and reasons, and the language of filters, are [`crate::trace`]'s.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Bytes of each frame, if no number is named: all headers, and the first words of what they carry.
pub const DEFAULT_SNAP: u32 = 128;
/// Fewest bytes of a frame: Ethernet, IPv6 and TCP headers without options.
pub const MIN_SNAP: u32 = 74;
/// Most bytes of a frame: more than an Ethernet frame has; those that the kernel has merged are cut there.
pub const MAX_SNAP: u32 = 2048;
/// When a trace ends by itself, if no time is named, in seconds.
pub const DEFAULT_SECONDS: u64 = 600;

/// Body of `trace`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TraceRequest {
    /// Which frames, as [`crate::trace::filter`] reads it; all if empty.
    pub filter: String,
    /// Bytes of each frame, [`MIN_SNAP`] to [`MAX_SNAP`].
    pub snap: u32,
    /// End after so many frames.
    pub count: Option<u64>,
    /// End after so many seconds; 0 for never.
    pub seconds: u64,
}

impl Default for TraceRequest {
    fn default() -> Self {
        Self {
            filter: String::new(),
            snap: DEFAULT_SNAP,
            count: None,
            seconds: DEFAULT_SECONDS,
        }
    }
}

/// Body of `trace/stop`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceStop {
    /// [`TraceStart::id`].
    pub id: u64,
}

/// One line of the answer.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum TraceLine {
    /// The first: frames are seen from now on.
    Start(TraceStart),
    /// One frame.
    Frame(Box<TraceFrame>),
    /// The last.
    End(TraceEnd),
    /// The last, if the daemon or the way to it was lost.
    Failed {
        /// Why.
        error: String,
        /// The exit code the command line ends with.
        code: u8,
    },
}

/// What is traced.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TraceStart {
    /// The node.
    pub node: String,
    /// The name of this trace for whoever ends it.
    pub id: u64,
    /// The filter, as it was understood.
    pub filter: String,
    /// Bytes of each frame.
    pub snap: u32,
    /// Service interfaces.
    pub interfaces: Vec<String>,
    /// Why frames that are judged in the kernel are not seen, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// One frame, and what became of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TraceFrame {
    /// When it was judged: microseconds since 1970.
    pub unix_us: u64,
    /// Interface it came in on.
    pub interface: String,
    /// `kernel` or `farmd`: who judged it. What the kernel leaves to farmd is `punted` by the one, and something else by the other.
    pub by: String,
    /// The sender.
    pub client: IpAddr,
    /// Its port, where the frame has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_port: Option<u16>,
    /// The virtual address.
    pub vip: IpAddr,
    /// The port there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vip_port: Option<u16>,
    /// `tcp`, `udp`, `icmp`, `icmp6`, or `ip` and a number.
    pub protocol: String,
    /// TCP flags as tcpdump writes them, what an ICMP message is, or which fragment; empty for what has nothing of that.
    pub detail: String,
    /// Length of the whole frame.
    pub length: u32,
    /// A word of [`crate::trace::Outcome`].
    pub verdict: String,
    /// A word of [`crate::trace::Cause`].
    pub reason: String,
    /// Nodes that it was sent on to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sent_on: Vec<String>,
    /// `module/group` of the rule that fits; absent if none was looked up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// Its bucket there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bucket: Option<u16>,
    /// Who owns that; absent if nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// Its first bytes, from the Ethernet header on, as hexadecimal digits.
    pub bytes: String,
}

/// How a trace ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TraceEnd {
    /// Frames of virtual addresses that came in.
    pub seen: u64,
    /// Lines that were sent.
    pub shown: u64,
    /// Frames that were lost because the reader was slower than they came.
    pub lost: u64,
    /// Why it ended.
    pub why: TraceEnding,
}

/// Why a trace ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TraceEnding {
    /// [`TraceRequest::count`] frames were shown.
    Count,
    /// [`TraceRequest::seconds`] are over.
    Time,
    /// Somebody has ended it, or the daemon ends.
    Asked,
}
