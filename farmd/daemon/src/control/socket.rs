//! The control socket: HTTP/1.1 over `RUN/farmd.sock`, for the command line and for scripts.
//!
//! Owns the listening socket and its connections, and passes requests that name another node on to it. Only root and the
//! daemon's own user are heard. `main` binds the socket with [`bind`] and spawns [`serve`]; what a request means is
//! [`super`]'s business.
//!
//! Connections are not limited in number: whoever may open one may also end the daemon.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use farm_core::wire::command;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;

use super::{Answered, Caller, Lines, MAX_BODY, Refusal, admit, perform};
use crate::event::EventSender;
use crate::remote::Peers;
use crate::remote::client::{Relayed, relay};

/// A client that has connected must have sent its request line, headers and body within this time each.
const READ_LIMIT: Duration = Duration::from_secs(5);
/// Pause after a failed `accept`, so that a lack of file descriptors does not become a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Opens the control socket at `path`, mode 0600. Needs a tokio runtime around it.
///
/// A socket left behind by a daemon that was killed is removed first: it is known by nobody answering on it.
///
/// # Errors
/// `AddrInUse` if another daemon answers there, `AlreadyExists` if something that is no socket has the name, else
/// what the system says; the text names the path.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("control socket {}: {e}", path.display()));
    remove_stale(path).map_err(named)?;
    let listener = UnixListener::bind(path).map_err(named)?;
    // Between the two calls the mode is the umask's; a stranger who connects in that moment is refused by `serve`.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(named)?;
    Ok(listener)
}

/// Removes a socket at `path` on which nobody listens.
fn remove_stale(path: &Path) -> io::Result<()> {
    let file = match std::fs::symlink_metadata(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    if !file.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "exists and is no socket"));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another farmd answers on it")),
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(e) => Err(e),
    }
}

/// Answers requests on `listener` until the task is aborted; open connections end with their client or with the runtime.
pub async fn serve(listener: UnixListener, events: EventSender, peers: Arc<Peers>) {
    let own_uid = own_uid();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let uid = stream.peer_cred().ok().map(|cred| cred.uid());
                let caller = caller(uid, own_uid);
                if caller.is_none() {
                    tracing::warn!(
                        ?uid,
                        "control socket: a user who may not command this daemon is refused"
                    );
                }
                tokio::spawn(converse(stream, caller, events.clone(), Arc::clone(&peers)));
            }
            Err(e) => {
                tracing::warn!(error = %e, "control socket cannot accept");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The user this process acts as, read the way a peer would see it.
fn own_uid() -> Option<u32> {
    let (_, other) = UnixStream::pair().ok()?;
    other.peer_cred().ok().map(|cred| cred.uid())
}

/// The name of the user `uid`, if that user may command this daemon: root, or the daemon's own user.
fn caller(uid: Option<u32>, own_uid: Option<u32>) -> Option<String> {
    let uid = uid.filter(|uid| *uid == 0 || Some(*uid) == own_uid)?;
    Some(user_name(uid))
}

/// One client from connect to disconnect. Without a `caller` every request is refused.
async fn converse(stream: UnixStream, caller: Option<String>, events: EventSender, peers: Arc<Peers>) {
    let service = service_fn(|request| {
        let (caller, events, peers) = (caller.clone(), events.clone(), Arc::clone(&peers));
        async move {
            let result = match caller {
                Some(user) => answer(request, Caller { user, node: None }, &events, &peers).await,
                None => Err(Refusal::new(
                    StatusCode::FORBIDDEN,
                    "only root and the daemon's own user may talk to farmd",
                )),
            };
            Ok::<_, Infallible>(result.unwrap_or_else(refused))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(READ_LIMIT)
        .serve_connection(TokioIo::new(stream), service);
    if let Err(e) = connection.await {
        tracing::debug!(error = %e, "control connection ended");
    }
}

/// The name of user `uid` from `/etc/passwd`, else `uid N`. Users known only to a directory service show as numbers.
fn user_name(uid: u32) -> String {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    passwd
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            let id = fields.nth(1)?;
            (id.parse() == Ok(uid)).then(|| name.to_owned())
        })
        .unwrap_or_else(|| format!("uid {uid}"))
}

/// Answers one request: here, or by the node that it names.
async fn answer(
    request: Request<Incoming>,
    caller: Caller,
    events: &EventSender,
    peers: &Peers,
) -> Result<Response<Answer>, Refusal> {
    let method = request.method().clone();
    let path = request
        .uri()
        .path_and_query()
        .map_or("", |path| path.as_str())
        .to_owned();
    let named = path.strip_prefix("/v1/on/").and_then(|rest| rest.split_once('/'));
    let (node, path) = match named {
        Some((node, rest)) => (peers.named(node)?, format!("/v1/{rest}")),
        None => (None, path.clone()),
    };
    if let Some(node) = node {
        let body = read_body(request.into_body()).await?.to_vec();
        let question = method == Method::GET;
        let request = command::Request {
            method: method.to_string(),
            path,
            by: caller.user,
            body,
        };
        return Ok(match relay(peers, node, request).await? {
            Relayed::Whole(status, json) => response(status, "application/json", Answer::Whole(Full::from(json))),
            Relayed::Pieces(pieces) => {
                let content_type = if question {
                    "application/json"
                } else {
                    "application/x-ndjson"
                };
                response(StatusCode::OK, content_type, Answer::Pieces(pieces))
            }
        });
    }
    let route = admit(&method, &path)?;
    let body = read_body(request.into_body()).await?;
    Ok(match perform(route, &body, &caller, events).await? {
        Answered::Whole(status, json) => response(status, "application/json", Answer::Whole(Full::from(json))),
        Answered::Lines(lines) => response(StatusCode::OK, "application/x-ndjson", Answer::Lines(lines)),
        Answered::Pieces(pieces) => response(StatusCode::OK, "application/x-ndjson", Answer::Pieces(pieces)),
    })
}

/// A refusal with its headers.
fn refused(refusal: Refusal) -> Response<Answer> {
    let allow = refusal.allow;
    let mut response = match refusal.into_answer() {
        Answered::Whole(status, json) => response(status, "application/json", Answer::Whole(Full::from(json))),
        Answered::Lines(lines) => response(StatusCode::OK, "application/x-ndjson", Answer::Lines(lines)),
        Answered::Pieces(pieces) => response(StatusCode::OK, "application/x-ndjson", Answer::Pieces(pieces)),
    };
    if let Some(allow) = allow {
        response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
    }
    response
}

/// The whole body, at most [`MAX_BODY`] bytes.
async fn read_body(body: Incoming) -> Result<Bytes, Refusal> {
    let too_large = || {
        Refusal::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("the body is larger than {MAX_BODY} bytes"),
        )
    };
    if body.size_hint().lower() > MAX_BODY as u64 {
        return Err(too_large());
    }
    match tokio::time::timeout(READ_LIMIT, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(e)) if e.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(e)) => Err(Refusal::bad(format!("the body could not be read: {e}"))),
        Err(_) => Err(Refusal::new(
            StatusCode::REQUEST_TIMEOUT,
            "the body did not arrive in time",
        )),
    }
}

fn response(status: StatusCode, content_type: &'static str, body: Answer) -> Response<Answer> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Body of a response.
enum Answer {
    /// Known now.
    Whole(Full<Bytes>),
    /// Comes line by line.
    Lines(Lines),
    /// Comes in pieces, here or from another node.
    Pieces(mpsc::Receiver<Vec<u8>>),
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let framed = |bytes: Option<Vec<u8>>| bytes.map(|bytes| Ok(Frame::data(bytes.into())));
        match self.get_mut() {
            Self::Whole(full) => Pin::new(full).poll_frame(cx),
            Self::Lines(lines) => lines.poll_next(cx).map(framed),
            Self::Pieces(pieces) => pieces.poll_recv(cx).map(framed),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(full) => full.is_end_stream(),
            Self::Lines(lines) => lines.ended,
            Self::Pieces(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(full) => full.size_hint(),
            Self::Lines(_) | Self::Pieces(_) => SizeHint::default(),
        }
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
