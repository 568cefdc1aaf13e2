//! Who has which connections: what `GET /v1/flows` answers.
//!
//! Owns the form of the answer. The daemon makes it of the kernel's tables at the moment of the question; nothing keeps connections.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::why::BucketWord;

/// Connections, and clients, shown if no number is named.
pub const DEFAULT_FLOWS: usize = 20;
/// Most that one answer has.
pub const MAX_FLOWS: usize = 1000;

/// Answer to `GET /v1/flows`: the TCP connections to the VIPs that one host has.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Flows {
    /// The node that answers.
    pub node: String,
    /// Connections that were asked for.
    pub connections: u32,
    /// Those of them in buckets that are another node's, or nobody's, by now.
    pub elsewhere: u32,
    /// Connections to a VIP that no rule covers, or that come from this host itself; counted in nothing else.
    pub unshared: u32,
    /// By group, in the order of the modules.
    pub groups: Vec<FlowGroup>,
    /// By owner of their buckets.
    pub owners: Vec<FlowOwner>,
    /// The clients with the most, those first.
    pub clients: Vec<FlowClient>,
    /// Clients there are.
    pub clients_of: u32,
    /// Single connections: those in buckets of other nodes first, then by client.
    pub flows: Vec<Flow>,
}

/// Most connections of one `GET /v1/has`.
pub const MAX_SOME: usize = 1024;

/// Body of `GET /v1/has`, and its answer: of the connections that are asked for, those that this host has.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct SomeFlows {
    /// The client's end and the VIP's.
    pub flows: Vec<(SocketAddr, SocketAddr)>,
}

/// Connections of one group.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FlowGroup {
    /// The module.
    pub module: String,
    /// The group.
    pub group: String,
    /// Connections.
    pub connections: u32,
    /// Those in this node's own buckets in which other nodes have connections, too.
    pub guarded: u32,
    /// Those in buckets that are another node's, or nobody's, by now.
    pub elsewhere: u32,
    /// Clients that have them.
    pub clients: u32,
}

/// Connections in one node's buckets.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FlowOwner {
    /// The node; absent for nobody.
    pub node: Option<String>,
    /// How many.
    pub connections: u32,
}

/// Connections of one client address.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FlowClient {
    /// The client.
    pub addr: IpAddr,
    /// How many.
    pub connections: u32,
    /// Those of them in buckets that are another node's, or nobody's, by now.
    pub elsewhere: u32,
}

/// One connection.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Flow {
    /// The client's end.
    pub client: SocketAddr,
    /// The end that it speaks to.
    pub vip: SocketAddr,
    /// The module.
    pub module: String,
    /// The group.
    pub group: String,
    /// Its bucket.
    pub bucket: u16,
    /// Who owns that; absent if nobody.
    pub owner: Option<String>,
    /// What it is to the node that answers.
    pub state: BucketWord,
}

impl BucketWord {
    /// True if the node that says so does not own the bucket.
    pub const fn is_elsewhere(self) -> bool {
        match self {
            Self::Own | Self::Guarded => false,
            Self::Draining | Self::Foreign => true,
        }
    }
}
