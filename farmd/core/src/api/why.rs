//! Who answers a client, and why: what `GET /v1/why` answers.
//!
//! Owns the form of the answer; the words of a verdict are [`super::why_text`]'s. The decision itself is [`crate::balance::explain`]'s.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::history::HistoryEntry;
use super::{ModuleState, Quality};

/// Answer to `GET /v1/why`: one client's place in the farm, as one node sees it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Why {
    /// The node that answers.
    pub node: String,
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The client.
    pub client: IpAddr,
    /// Its port, if one was named.
    pub client_port: Option<u16>,
    /// The virtual address.
    pub vip: IpAddr,
    /// The service's port.
    pub port: u16,
    /// The module whose VIP it is.
    pub module: String,
    /// State of that module on the node that answers.
    pub state: ModuleState,
    /// And its quality.
    pub quality: Quality,
    /// Why that node does not serve its share; empty if it does.
    pub no_share: String,
    /// Nodes that serve their share of the module, as far as this node knows.
    pub serving: Vec<String>,
    /// The rule that fits; absent if none does.
    pub rule: Option<WhyRule>,
    /// Where the rule puts the client; absent without a rule, and if each packet has a bucket of its own.
    pub bucket: Option<WhyBucket>,
    /// This host has that very connection; absent if no port was named, for UDP, and if it cannot be known.
    pub connection: Option<bool>,
    /// What a frame that starts something gets here now: a SYN, or a datagram.
    pub opening: WhyVerdict,
    /// What a segment of a connection gets here now; absent for UDP. If [`Self::connection`] is absent, of one that this host does not have.
    pub belonging: Option<WhyVerdict>,
    /// What a segment of a connection gets that this host has, where [`Self::connection`] is absent and that makes a difference.
    pub if_connected: Option<WhyVerdict>,
    /// What a node that serves the module says, where the node that answers does not and so knows no bucket: put in by `farm why`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub elsewhere: Option<Box<Why>>,
}

/// A port rule.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WhyRule {
    /// The group whose map it follows.
    pub group: String,
    /// First port of the rule.
    pub first_port: u16,
    /// Last one.
    pub last_port: u16,
    /// `on_addr`, `on_port`, `on_net` or `on_ipid`.
    pub filter: String,
}

/// A bucket as the node that answers knows it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct WhyBucket {
    /// Its number, below 4096.
    pub number: u16,
    /// Number of the map in force here.
    pub map: u64,
    /// Who owns it; absent if nobody.
    pub owner: Option<String>,
    /// What it is to this node.
    pub state: BucketWord,
    /// It is on its way from this node to its new owner: what comes is kept, and sent on.
    pub leaving: bool,
    /// Other nodes that still have connections in it.
    pub holders: Vec<String>,
    /// The node that answers the client's ARP requests for the VIP, if it is on the same network; absent if nobody does, and where every
    /// node gets every frame.
    pub entry: Option<String>,
    /// The entry of this node's history that moved it last; absent if that is no longer kept.
    pub since: Option<HistoryEntry>,
}

/// What a bucket is to a node: `farmd/docs/ARCHITECTURE.md`, "Buckets and verdicts".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BucketWord {
    /// Its own, and nobody else has connections in it.
    Own,
    /// Its own; another node still has connections in it.
    Guarded,
    /// No longer its own; its connections in it go on.
    Draining,
    /// Another node's, or nobody's.
    Foreign,
}

impl From<crate::balance::plan::BucketState> for BucketWord {
    fn from(state: crate::balance::plan::BucketState) -> Self {
        use crate::balance::plan::BucketState;
        match state {
            BucketState::Own => Self::Own,
            BucketState::Guarded => Self::Guarded,
            BucketState::Draining => Self::Draining,
            BucketState::Foreign => Self::Foreign,
        }
    }
}

impl BucketWord {
    /// The word, as in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Own => "own",
            Self::Guarded => "guarded",
            Self::Draining => "draining",
            Self::Foreign => "foreign",
        }
    }
}

/// What happens to a frame.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WhyVerdict {
    /// `accept`, `drop`, `hold` or `pass`.
    pub verdict: String,
    /// Name of the counter it is counted in.
    pub reason: String,
    /// Nodes that the frame is sent on to.
    pub sent_on: Vec<String>,
    /// Why, in words; and who gets a copy of what is accepted.
    pub text: String,
}
