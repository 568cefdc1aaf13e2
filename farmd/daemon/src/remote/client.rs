//! The commanding end: passes a request of this host's user on to another node, and farmd's own: which of some connections other nodes have (`GET /v1/has`), and that
//! one is deaf.
//!
//! Owns one connection per request. It tries the lans in the order of `cluster.xml`; once a request has been sent it
//! is never sent again, because nobody could tell whether it was carried out. The control socket and the
//! effects of the owner loop call it.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use farm_core::api::flows::SomeFlows;
use farm_core::api::{Reply, exit};
use farm_core::balance::flow::{FlowKey, TCP};
use farm_core::id::{NodeId, NodeSet};
use farm_core::wire::command::{Frame, FrameError, Request, Session, Side};
use hyper::{Method, StatusCode};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::{ALIVE_INTERVAL, Channel, ChannelError, Peers, new_opening, read_opening};
use crate::control::{Refusal, line};

/// How long one address of the node is tried.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// How long the other node has for its opening.
const OPENING_LIMIT: Duration = Duration::from_secs(5);
/// A server that says nothing for so long is taken to be gone; it says every [`ALIVE_INTERVAL`] that it is there.
const SILENCE_LIMIT: Duration = Duration::from_secs(4 * ALIVE_INTERVAL.as_secs());
/// Largest answer to a question.
const MAX_ANSWER: usize = 32 << 20;
/// Pieces of an answer that wait for a slow reader.
const PIECES: usize = 16;

/// Why a node could not be asked.
#[derive(Debug)]
pub(crate) struct RelayError {
    node: String,
    why: String,
}

impl fmt::Display for RelayError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {} cannot be commanded: {}", self.node, self.why)
    }
}

impl std::error::Error for RelayError {}

impl From<RelayError> for Refusal {
    fn from(error: RelayError) -> Self {
        Self::new(StatusCode::BAD_GATEWAY, error.to_string())
    }
}

/// What the other node answers.
pub(crate) enum Relayed {
    /// Complete.
    Whole(StatusCode, Vec<u8>),
    /// Lines of replies as they come, in pieces; if the connection breaks, the last line says so.
    Pieces(mpsc::Receiver<Vec<u8>>),
}

/// Has `node` do what `request` asks.
///
/// # Errors
/// If it cannot be reached, does not have the key, or breaks off before its answer begins.
pub(crate) async fn relay(peers: &Peers, node: NodeId, request: Request) -> Result<Relayed, RelayError> {
    let name = peers.cluster.name(node).to_owned();
    let failed = |why: String| RelayError {
        node: name.clone(),
        why,
    };
    let question = request.method == Method::GET.as_str();
    let mut channel = open(peers, node).await.map_err(failed)?;
    let sent = channel.send(&Frame::Request(request)).await;
    sent.map_err(|error| failed(error.to_string()))?;
    let status = match next(&mut channel).await {
        Ok(Frame::Head(status)) => StatusCode::from_u16(status).map_err(|e| failed(e.to_string()))?,
        Ok(_) => return Err(failed(FrameError::Malformed("answer").to_string())),
        Err(error) => {
            let hint = "most likely its cluster.key differs; its log says why";
            return Err(failed(format!("{error}; {hint}")));
        }
    };
    if question || status != StatusCode::OK {
        let whole = collect(&mut channel).await.map_err(|error| failed(error.to_string()))?;
        return Ok(Relayed::Whole(status, whole));
    }
    let (pieces, receiver) = mpsc::channel(PIECES);
    tokio::spawn(pass_on(channel, name, pieces));
    Ok(Relayed::Pieces(receiver))
}

/// Which of `flows` one or more of `nodes` have.
///
/// # Errors
/// Of the first node that cannot be asked, or does not say it.
pub(crate) async fn has(
    peers: &Arc<Peers>,
    nodes: NodeSet,
    flows: &[FlowKey],
) -> Result<BTreeSet<FlowKey>, RelayError> {
    let ends = |flow: &FlowKey| -> (SocketAddr, SocketAddr) {
        ((flow.client, flow.client_port).into(), (flow.vip, flow.vip_port).into())
    };
    let asked = SomeFlows {
        flows: flows.iter().map(ends).collect(),
    };
    let mut questions = JoinSet::new();
    for node in nodes.iter() {
        let (peers, asked) = (Arc::clone(peers), asked.clone());
        questions.spawn(async move { has_one(&peers, node, &asked).await });
    }
    let mut theirs = BTreeSet::new();
    while let Some(told) = questions.join_next().await {
        theirs.extend(told.unwrap_or_else(|error| {
            Err(RelayError {
                node: "(unknown)".to_owned(),
                why: error.to_string(),
            })
        })?);
    }
    Ok(theirs)
}

async fn has_one(peers: &Peers, node: NodeId, asked: &SomeFlows) -> Result<Vec<FlowKey>, RelayError> {
    let failed = |why: String| RelayError {
        node: peers.cluster.name(node).to_owned(),
        why,
    };
    let request = Request {
        method: Method::GET.to_string(),
        path: "/v1/has".to_owned(),
        by: "farmd".to_owned(),
        body: serde_json::to_vec(asked).map_err(|error| failed(error.to_string()))?,
    };
    let Relayed::Whole(status, body) = relay(peers, node, request).await? else {
        return Err(failed(FrameError::Malformed("answer").to_string()));
    };
    if status != StatusCode::OK {
        return Err(failed(String::from_utf8_lossy(&body).trim().to_owned()));
    }
    let told: SomeFlows = serde_json::from_slice(&body).map_err(|error| failed(error.to_string()))?;
    let flow = |(client, vip): (SocketAddr, SocketAddr)| FlowKey {
        protocol: TCP,
        vip: vip.ip(),
        vip_port: vip.port(),
        client: client.ip(),
        client_port: client.port(),
    };
    Ok(told.flows.into_iter().map(flow).collect())
}

async fn collect(channel: &mut Channel) -> Result<Vec<u8>, ChannelError> {
    let mut whole = Vec::new();
    loop {
        match next(channel).await? {
            Frame::Body(piece) if whole.len() + piece.len() <= MAX_ANSWER => whole.extend(piece),
            Frame::Alive => {}
            Frame::End => return Ok(whole),
            Frame::Body(_) | Frame::Head(_) | Frame::Request(_) => return Err(FrameError::Malformed("answer").into()),
        }
    }
}

/// Passes replies on until the last one. If the reader has gone the command goes on without one.
async fn pass_on(mut channel: Channel, node: String, pieces: mpsc::Sender<Vec<u8>>) {
    let broken = loop {
        let frame = tokio::select! {
            biased;
            () = pieces.closed() => return,
            frame = next(&mut channel) => frame,
        };
        match frame {
            Ok(Frame::Body(piece)) => {
                if pieces.send(piece).await.is_err() {
                    return;
                }
            }
            Ok(Frame::Alive) => {}
            Ok(Frame::End) => return,
            Ok(Frame::Head(_) | Frame::Request(_)) => break ChannelError::Frame(FrameError::Malformed("answer")),
            Err(error) => break error,
        }
    };
    // On a line of its own, whatever came before.
    let mut last = b"\n".to_vec();
    last.extend(line(&Reply::Failed {
        error: format!("node {node} was lost before it had answered, and may still carry the command out: {broken}"),
        code: exit::NO_DAEMON,
    }));
    let _ = pieces.send(last).await;
}

async fn next(channel: &mut Channel) -> Result<Frame, ChannelError> {
    match tokio::time::timeout(SILENCE_LIMIT, channel.receive()).await {
        Ok(frame) => frame,
        Err(_) => Err(ChannelError::Slow(SILENCE_LIMIT)),
    }
}

/// A connection to `node` over the first lan that works.
async fn open(peers: &Peers, node: NodeId) -> Result<Channel, String> {
    let mut failures = Vec::new();
    for lan in 0..peers.cluster.lans.len() {
        let (Some(own), Some(addr)) = (peers.addr(lan, peers.this), peers.addr(lan, node)) else {
            continue;
        };
        let to = SocketAddr::new(addr, peers.cluster.port);
        match open_over(peers, node, SocketAddr::new(own, 0), to).await {
            Ok(channel) => return Ok(channel),
            Err(error) => failures.push(format!("{to}: {error}")),
        }
    }
    if failures.is_empty() {
        failures.push("it shares no lan with this one".to_owned());
    }
    Err(failures.join("; "))
}

async fn open_over(peers: &Peers, node: NodeId, own: SocketAddr, to: SocketAddr) -> Result<Channel, ChannelError> {
    let connect = async {
        let socket = if to.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        }?;
        // From the address that the other node knows, whatever else this host has.
        socket.bind(own)?;
        socket.connect(to).await
    };
    let connected = tokio::time::timeout(CONNECT_LIMIT, connect).await;
    let mut stream: TcpStream = connected.map_err(|_| ChannelError::Slow(CONNECT_LIMIT))??;
    stream.set_nodelay(true)?;
    let greet = async {
        let theirs = read_opening(&mut stream).await?;
        let own = new_opening(peers.this)?;
        stream.write_all(&own.emit()).await?;
        Ok::<_, ChannelError>((theirs, own))
    };
    let greeted = tokio::time::timeout(OPENING_LIMIT, greet).await;
    let (theirs, own) = greeted.map_err(|_| ChannelError::Slow(OPENING_LIMIT))??;
    if theirs.node != node {
        return Err(ChannelError::Name);
    }
    let session = Session::new(&peers.key, Side::Client, &theirs, &own);
    Ok(Channel { stream, session })
}
