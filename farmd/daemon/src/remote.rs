//! Commands from node to node, over TCP on every lan, at the port of the heartbeats.
//!
//! Owns the connections and their limits on both ends: [`server`] takes requests of other nodes to the same route table
//! as the control socket, [`client`] passes requests of this host's users on. The frames, and why nobody without the cluster
//! key can make one, are in [`farm_core::wire::command`]. Nothing is encrypted.

pub mod client;
pub mod server;

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use farm_core::config::ClusterConfig;
use farm_core::id::NodeId;
use farm_core::wire::auth::ClusterKey;
use farm_core::wire::command::{Frame, FrameError, HEADER_LEN, NONCE_LEN, OPENING_LEN, Opening, Session};
use hyper::StatusCode;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::control::Refusal;

/// A side that does not take what is sent to it is given up after this time.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
/// While a command goes on and nothing is to be said, the server says that it is alive.
const ALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// The nodes of the cluster, as the two ends of a command need them.
#[derive(Clone, Debug)]
pub struct Peers {
    cluster: ClusterConfig,
    key: ClusterKey,
    this: NodeId,
}

impl Peers {
    /// The cluster as node `this` sees it.
    pub fn new(cluster: ClusterConfig, key: ClusterKey, this: NodeId) -> Self {
        Self { cluster, key, this }
    }

    /// The node called `name`; `None` for this one.
    ///
    /// # Errors
    /// 404 with the names there are.
    pub(crate) fn named(&self, name: &str) -> Result<Option<NodeId>, Refusal> {
        let Some(node) = self.cluster.node_by_name(name) else {
            let known = self.cluster.nodes.join(", ");
            let error = format!("there is no node {name}; cluster.xml has {known}");
            return Err(Refusal::new(StatusCode::NOT_FOUND, error));
        };
        Ok((node != self.this).then_some(node))
    }

    /// The address of `node` on the lan at this position.
    fn addr(&self, lan: usize, node: NodeId) -> Option<IpAddr> {
        let lan = self.cluster.lans.get(lan)?;
        lan.nodes.iter().find(|(n, _)| *n == node).map(|(_, addr)| *addr)
    }

    /// True if `addr` is another node's on that lan.
    fn is_peer(&self, lan: usize, addr: IpAddr) -> bool {
        let nodes = self.cluster.lans.get(lan).map_or(&[][..], |lan| &lan.nodes);
        nodes.iter().any(|(node, own)| *own == addr && *node != self.this)
    }
}

/// What happened to commands of other nodes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Count {
    /// Authentic and handed on.
    Accepted,
    /// From an address that is no other node's.
    RefusedAddress,
    /// Too many at once.
    RefusedBusy,
    /// Nothing whole came in time.
    RefusedSlow,
    /// Not authentic.
    RefusedAuthentication,
    /// Not in the format, or of another version.
    RefusedMalformed,
}

impl Count {
    const ALL: [Self; 6] = [
        Self::Accepted,
        Self::RefusedAddress,
        Self::RefusedBusy,
        Self::RefusedSlow,
        Self::RefusedAuthentication,
        Self::RefusedMalformed,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Accepted => "commands_accepted",
            Self::RefusedAddress => "commands_refused_address",
            Self::RefusedBusy => "commands_refused_busy",
            Self::RefusedSlow => "commands_refused_slow",
            Self::RefusedAuthentication => "commands_refused_authentication",
            Self::RefusedMalformed => "commands_refused_malformed",
        }
    }
}

/// Counters of the server's end.
#[derive(Debug, Default)]
pub struct Counters([AtomicU64; Count::ALL.len()]);

impl Counters {
    fn add(&self, count: Count) {
        self.0[count as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// All of them, by name.
    pub fn read(&self) -> BTreeMap<String, u64> {
        let all = Count::ALL.iter();
        all.map(|c| (c.name().to_owned(), self.0[*c as usize].load(Ordering::Relaxed)))
            .collect()
    }
}

/// Why a conversation cannot go on.
#[derive(Debug)]
pub enum ChannelError {
    /// The connection.
    Io(io::Error),
    /// What came is no frame of this conversation.
    Frame(FrameError),
    /// The other side gives itself the name of a node that has another address.
    Name,
    /// Nothing came, or nothing was taken, for this time.
    Slow(Duration),
}

impl fmt::Display for ChannelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => f.write_str("it closed the connection"),
            Self::Io(error) => error.fmt(f),
            Self::Frame(error) => error.fmt(f),
            Self::Name => f.write_str("it gives itself the name of another node"),
            Self::Slow(limit) => write!(f, "nothing happened for {} s", limit.as_secs()),
        }
    }
}

impl std::error::Error for ChannelError {}

impl From<io::Error> for ChannelError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<FrameError> for ChannelError {
    fn from(error: FrameError) -> Self {
        Self::Frame(error)
    }
}

/// What this node says first, with a nonce that was never used.
fn new_opening(node: NodeId) -> io::Result<Opening> {
    let mut nonce = [0; NONCE_LEN];
    File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    Ok(Opening { node, nonce })
}

async fn read_opening(stream: &mut TcpStream) -> Result<Opening, ChannelError> {
    let mut bytes = [0; OPENING_LEN];
    stream.read_exact(&mut bytes).await?;
    Ok(Opening::parse(&bytes)?)
}

/// A connection after both openings.
#[derive(Debug)]
struct Channel {
    stream: TcpStream,
    session: Session,
}

impl Channel {
    async fn send(&mut self, frame: &Frame) -> Result<(), ChannelError> {
        let bytes = self.session.seal(frame)?;
        match tokio::time::timeout(WRITE_LIMIT, self.stream.write_all(&bytes)).await {
            Ok(written) => Ok(written?),
            Err(_) => Err(ChannelError::Slow(WRITE_LIMIT)),
        }
    }

    async fn receive(&mut self) -> Result<Frame, ChannelError> {
        let mut header = [0; HEADER_LEN];
        self.stream.read_exact(&mut header).await?;
        let mut rest = vec![0; Session::rest_len(&header)?];
        self.stream.read_exact(&mut rest).await?;
        Ok(self.session.open(&header, &rest)?)
    }
}

#[cfg(test)]
mod tests;
