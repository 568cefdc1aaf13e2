//! The commanded end: takes requests of other nodes.
//!
//! Owns the limits (who may connect, how many at once, how long until a request is there), the counters of what was
//! refused and the one line a minute about it. What a request does is the route table's business ([`crate::control`]); the
//! audit names the node and the user who asked.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use farm_core::wire::command::{Frame, FrameError, MAX_PIECE, Request, Session, Side};
use hyper::{Method, StatusCode};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tracing::{debug, warn};

use super::{ALIVE_INTERVAL, Channel, ChannelError, Count, Counters, Peers, new_opening, read_opening};
use crate::control::{Answered, Caller, Lines, MAX_BODY, Refusal, admit, perform, short};
use crate::event::EventSender;

/// Connections that have not yet shown that they have the key.
const MAX_OPENING: usize = 16;
/// How long they have for it.
const OPENING_LIMIT: Duration = Duration::from_secs(5);
/// Commands of other nodes at a time; a drain may take minutes.
const MAX_RUNNING: usize = 64;
/// Time between two log lines about what was refused.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Pause after a failed `accept`, so that a lack of file descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Everything that a connection needs.
#[derive(Debug)]
pub struct Server {
    peers: Arc<Peers>,
    events: EventSender,
    counters: Arc<Counters>,
    opening: Arc<Semaphore>,
    running: Semaphore,
    log: Mutex<RefusalLog>,
}

#[derive(Debug, Default)]
struct RefusalLog {
    last: Option<Instant>,
    untold: u64,
}

impl Server {
    /// A server that hands requests to `events`.
    pub fn new(peers: Arc<Peers>, events: EventSender, counters: Arc<Counters>) -> Self {
        Self {
            peers,
            events,
            counters,
            opening: Arc::new(Semaphore::new(MAX_OPENING)),
            running: Semaphore::new(MAX_RUNNING),
            log: Mutex::default(),
        }
    }

    /// Counts what is refused; the log has one line a minute, with the number of those that had none.
    fn refuse(&self, from: SocketAddr, count: Count, why: &str) {
        self.counters.add(count);
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.untold += 1;
        if log.last.is_none_or(|last| last.elapsed() >= REFUSAL_LOG_INTERVAL) {
            log.last = Some(Instant::now());
            let refused = std::mem::take(&mut log.untold);
            warn!(%from, refused, "a command from another node is refused: {why}");
        }
    }
}

/// Takes connections of the lan at position `lan` until the task is aborted.
pub async fn serve(listener: TcpListener, lan: usize, server: Arc<Server>) {
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "commands of other nodes cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if !server.peers.is_peer(lan, from.ip()) {
            server.refuse(from, Count::RefusedAddress, "the address is no other node's");
            continue;
        }
        let Ok(permit) = Arc::clone(&server.opening).try_acquire_owned() else {
            server.refuse(from, Count::RefusedBusy, "too many connections at once");
            continue;
        };
        let server = Arc::clone(&server);
        tokio::spawn(async move {
            let begun = tokio::time::timeout(OPENING_LIMIT, begin(stream, lan, from.ip(), &server.peers)).await;
            drop(permit);
            match begun {
                Ok(Ok((channel, node, request))) => {
                    server.counters.add(Count::Accepted);
                    if let Err(error) = converse(channel, node, request, &server).await {
                        debug!(%from, %error, "a command's answer was not taken");
                    }
                }
                Ok(Err(error)) => server.refuse(from, kind(&error), &error.to_string()),
                Err(_) => server.refuse(from, Count::RefusedSlow, "no request came in time"),
            }
        });
    }
}

fn kind(error: &ChannelError) -> Count {
    match error {
        ChannelError::Frame(FrameError::Authentication) | ChannelError::Name => Count::RefusedAuthentication,
        ChannelError::Io(_) | ChannelError::Slow(_) => Count::RefusedSlow,
        ChannelError::Frame(
            FrameError::Magic | FrameError::Version(_) | FrameError::TooLong(_) | FrameError::Malformed(_),
        ) => Count::RefusedMalformed,
    }
}

/// Up to the request, which shows that the other side has the key and has read this side's nonce.
async fn begin(
    mut stream: TcpStream,
    lan: usize,
    from: IpAddr,
    peers: &Peers,
) -> Result<(Channel, String, Request), ChannelError> {
    stream.set_nodelay(true)?;
    let own = new_opening(peers.this)?;
    stream.write_all(&own.emit()).await?;
    let theirs = read_opening(&mut stream).await?;
    if peers.addr(lan, theirs.node) != Some(from) {
        return Err(ChannelError::Name);
    }
    let session = Session::new(&peers.key, Side::Server, &own, &theirs);
    let mut channel = Channel { stream, session };
    match channel.receive().await? {
        Frame::Request(request) if request.body.len() <= MAX_BODY => {
            Ok((channel, peers.cluster.name(theirs.node).to_owned(), request))
        }
        Frame::Request(_) => Err(FrameError::Malformed("body").into()),
        Frame::Head(_) | Frame::Body(_) | Frame::Alive | Frame::End => Err(FrameError::Malformed("request").into()),
    }
}

async fn converse(mut channel: Channel, node: String, request: Request, server: &Server) -> Result<(), ChannelError> {
    let answered = match server.running.try_acquire() {
        Err(_) => Err(Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            format!("{MAX_RUNNING} commands of other nodes are under way here already"),
        )),
        Ok(permit) => {
            let result = answer(&request, node, server).await;
            return send(&mut channel, result, Some(permit)).await;
        }
    };
    send(&mut channel, answered, None).await
}

async fn answer(request: &Request, node: String, server: &Server) -> Result<Answered, Refusal> {
    let method = Method::from_bytes(request.method.as_bytes());
    let method = method.map_err(|_| Refusal::new(StatusCode::BAD_REQUEST, "the method is none"))?;
    let caller = Caller {
        user: short("by", &request.by)?,
        node: Some(node),
    };
    perform(admit(&method, &request.path)?, &request.body, &caller, &server.events).await
}

async fn send(
    channel: &mut Channel,
    result: Result<Answered, Refusal>,
    _permit: Option<tokio::sync::SemaphorePermit<'_>>,
) -> Result<(), ChannelError> {
    match result.unwrap_or_else(Refusal::into_answer) {
        Answered::Whole(status, json) => {
            channel.send(&Frame::Head(status.as_u16())).await?;
            for piece in json.chunks(MAX_PIECE) {
                channel.send(&Frame::Body(piece.to_vec())).await?;
            }
        }
        Answered::Lines(lines) => send_pieces(channel, Pieces::Lines(lines)).await?,
        Answered::Pieces(pieces) => send_pieces(channel, Pieces::Whole(pieces)).await?,
    }
    channel.send(&Frame::End).await
}

/// An answer that comes in time.
enum Pieces {
    Lines(Lines),
    Whole(mpsc::Receiver<Vec<u8>>),
}

impl Pieces {
    async fn next(&mut self) -> Option<Vec<u8>> {
        match self {
            Self::Lines(lines) => lines.next().await,
            Self::Whole(pieces) => pieces.recv().await,
        }
    }
}

/// Sends what comes until there is no more; in between, that this node is there.
async fn send_pieces(channel: &mut Channel, mut pieces: Pieces) -> Result<(), ChannelError> {
    channel.send(&Frame::Head(StatusCode::OK.as_u16())).await?;
    loop {
        match tokio::time::timeout(ALIVE_INTERVAL, pieces.next()).await {
            Ok(None) => return Ok(()),
            Ok(Some(lines)) => {
                for piece in lines.chunks(MAX_PIECE) {
                    channel.send(&Frame::Body(piece.to_vec())).await?;
                }
            }
            Err(_) => channel.send(&Frame::Alive).await?,
        }
    }
}
