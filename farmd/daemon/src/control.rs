//! The control socket: HTTP/1.1 over `RUN/farmd.sock`, for the command line and for scripts.
//!
//! Owns the listening socket and its connections. Turns each request of the route table in [`farm_core::api`] into
//! one [`Event`] and the owner loop's answer into a response. Keeps no state of its own and never decides anything
//! about a module: a request that is well formed goes to the owner loop, every other one is answered here with
//! `{"error": …}`. Only root and the daemon's own user are heard. `main` binds the socket with [`bind`] and spawns [`serve`].
//!
//! Connections are not limited in number: whoever may open one may also end the daemon.

use std::convert::Infallible;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use farm_core::api::history::{HISTORY_LIMIT, HistoryFilter};
use farm_core::api::{CommandRequest, PrintRequest, Reply, ResourceRequest, exit};
use farm_core::id::ModuleName;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Bytes, Frame, Incoming, SizeHint};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::event::{Command, Event, EventSender, Query, Verb};

/// Largest request body: a command is a few hundred bytes, a printed line some thousand.
const MAX_BODY: usize = 64 * 1024;
/// A client that has connected must have sent its request line, headers and body within this time each.
const READ_LIMIT: Duration = Duration::from_secs(5);
/// The owner loop answers a question between two events; longer than this means that it hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
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
pub async fn serve(listener: UnixListener, events: EventSender) {
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
                tokio::spawn(converse(stream, caller, events.clone()));
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
async fn converse(stream: UnixStream, caller: Option<String>, events: EventSender) {
    let service = service_fn(|request| {
        let (caller, events) = (caller.clone(), events.clone());
        async move {
            let result = match caller {
                Some(caller) => answer(request, &caller, &events).await,
                None => Err(Refusal::new(
                    StatusCode::FORBIDDEN,
                    "only root and the daemon's own user may talk to farmd",
                )),
            };
            Ok::<_, Infallible>(result.unwrap_or_else(Refusal::into_response))
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

/// A request that goes no further.
struct Refusal {
    status: StatusCode,
    error: String,
    allow: Option<&'static str>,
}

impl Refusal {
    fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self {
            status,
            error: error.into(),
            allow: None,
        }
    }

    fn bad(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    fn into_response(self) -> Response<Answer> {
        let mut response = whole(self.status, &serde_json::json!({ "error": self.error }));
        if let Some(allow) = self.allow {
            response.headers_mut().insert(ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

/// What a path asks for.
enum Route<'a> {
    Status,
    Cluster,
    History,
    Metrics,
    Plan,
    Shutdown,
    Module { name: &'a str, verb: ModuleVerb },
}

/// The last part of a module's path.
#[derive(Clone, Copy)]
enum ModuleVerb {
    Command(fn(CommandRequest) -> Verb),
    Print,
    Resource,
}

/// The route of `path`, or `None` if there is none.
fn route(path: &str) -> Option<Route<'_>> {
    let rest = path.strip_prefix("/v1/")?;
    let route = match rest {
        "status" => Route::Status,
        "cluster" => Route::Cluster,
        "history" => Route::History,
        "metrics" => Route::Metrics,
        "plan" => Route::Plan,
        "shutdown" => Route::Shutdown,
        _ => {
            let (name, verb) = rest.strip_prefix("modules/")?.split_once('/')?;
            let verb = match verb {
                "start" => ModuleVerb::Command(Verb::Start),
                "stop" => ModuleVerb::Command(Verb::Stop),
                "restart" => ModuleVerb::Command(Verb::Restart),
                "stopstart" => ModuleVerb::Command(Verb::StopStart),
                "forcestop" => ModuleVerb::Command(Verb::ForceStop),
                "config" => ModuleVerb::Command(Verb::Config),
                "deconfig" => ModuleVerb::Command(Verb::Deconfig),
                "print" => ModuleVerb::Print,
                "resource" => ModuleVerb::Resource,
                _ => return None,
            };
            Route::Module { name, verb }
        }
    };
    Some(route)
}

/// Checks one request, hands it to the owner loop, and makes the response.
async fn answer(request: Request<Incoming>, caller: &str, events: &EventSender) -> Result<Response<Answer>, Refusal> {
    let path = request.uri().path().to_owned();
    let Some(route) = route(&path) else {
        return Err(Refusal::new(
            StatusCode::NOT_FOUND,
            format!("there is no `{path}` here"),
        ));
    };
    let (method, allow) = match route {
        Route::Shutdown | Route::Module { .. } => (Method::POST, "POST"),
        Route::Status | Route::Cluster | Route::History | Route::Metrics | Route::Plan => (Method::GET, "GET"),
    };
    if request.method() != method {
        let error = format!("`{path}` takes {allow}, not {}", request.method());
        return Err(Refusal {
            allow: Some(allow),
            ..Refusal::new(StatusCode::METHOD_NOT_ALLOWED, error)
        });
    }
    match route {
        Route::Status => ask(events, Query::Status).await,
        Route::Cluster => ask(events, Query::Cluster).await,
        Route::History => {
            let filter = filter_of(request.uri().query().unwrap_or_default())?;
            ask(events, |answer| Query::History(filter, answer)).await
        }
        Route::Metrics => ask(events, Query::Metrics).await,
        Route::Plan => ask(events, Query::Plan).await,
        Route::Shutdown => {
            events.send(Event::Shutdown { by: caller.to_owned() });
            let (replies, receiver) = mpsc::unbounded_channel();
            // The owner loop has no way back for a shutdown: the socket that goes away is the end of it.
            let _ = replies.send(Reply::Done {
                text: "farmd stops all modules and then ends".to_owned(),
            });
            Ok(stream(receiver))
        }
        Route::Module { name, verb } => {
            let module: ModuleName = name.parse().map_err(|e| Refusal::bad(format!("{e}")))?;
            let body = read_body(request.into_body()).await?;
            let verb = verb_of(verb, &body, caller)?;
            let (replies, receiver) = mpsc::unbounded_channel();
            events.send(Event::Command(Command { module, verb, replies }));
            Ok(stream(receiver))
        }
    }
}

/// Puts a question to the owner loop and waits for its answer.
async fn ask<T: serde::Serialize>(
    events: &EventSender,
    query: impl FnOnce(oneshot::Sender<T>) -> Query,
) -> Result<Response<Answer>, Refusal> {
    let (sender, receiver) = oneshot::channel();
    events.send(Event::Query(query(sender)));
    match tokio::time::timeout(ANSWER_LIMIT, receiver).await {
        Ok(Ok(answer)) => Ok(whole(StatusCode::OK, &answer)),
        Ok(Err(_)) => Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "farmd is ending")),
        Err(_) => {
            let error = format!("farmd's owner loop gave no answer within {} s", ANSWER_LIMIT.as_secs());
            Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, error))
        }
    }
}

/// What the words behind `/v1/history?` ask for: `n`, `since`, `after` and `module`, each at most once.
fn filter_of(words: &str) -> Result<HistoryFilter, Refusal> {
    fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<T, Refusal> {
        let error = || Refusal::bad(format!("`{name}` is `{value}`, a whole number is expected"));
        value.parse().map_err(|_| error())
    }
    let mut filter = HistoryFilter::default();
    for word in words.split('&').filter(|word| !word.is_empty()) {
        let (name, value) = word.split_once('=').unwrap_or((word, ""));
        match name {
            "n" => filter.last = Some(number(name, value)?),
            "since" => filter.since_us = Some(number(name, value)?),
            "after" => filter.after = Some(number(name, value)?),
            "module" => {
                let module: ModuleName = value.parse().map_err(|e| Refusal::bad(format!("{e}")))?;
                filter.module = Some(module.to_string());
            }
            _ => {
                let error = format!("`{name}` is not known here: n, since, after or module is expected");
                return Err(Refusal::bad(error));
            }
        }
    }
    filter.last = filter.last.map(|n| n.min(HISTORY_LIMIT));
    Ok(filter)
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

/// [`CommandRequest`] with every field optional, so that an empty body is a plain command.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct CommandBody {
    by: String,
    identity: Option<String>,
    wait: bool,
}

/// The owner loop's verb for a module request, after its texts were checked.
fn verb_of(verb: ModuleVerb, body: &[u8], caller: &str) -> Result<Verb, Refusal> {
    match verb {
        ModuleVerb::Command(make) => {
            let body: CommandBody = if body.is_empty() {
                CommandBody::default()
            } else {
                parse(body)?
            };
            let identity = body.identity.map(|i| short("identity", &i)).transpose()?;
            let by = match body.by.as_str() {
                "" => identity.clone().unwrap_or_else(|| caller.to_owned()),
                by => short("by", by)?,
            };
            Ok(make(CommandRequest {
                by,
                identity,
                wait: body.wait,
            }))
        }
        ModuleVerb::Print => {
            let body: PrintRequest = parse(body)?;
            if !matches!(body.level, 'I' | 'E') {
                return Err(Refusal::bad(format!(
                    "level is `{}`, `I` or `E` is expected",
                    body.level
                )));
            }
            let origin = body.origin.map(|o| short("origin", &o)).transpose()?;
            Ok(Verb::Print(PrintRequest {
                text: body.text.trim_end().to_owned(),
                origin,
                ..body
            }))
        }
        ModuleVerb::Resource => {
            let body: ResourceRequest = parse(body)?;
            let resource = short("resource", &body.resource)?;
            if !resource
                .split_once('.')
                .is_some_and(|(class, ident)| !class.is_empty() && !ident.is_empty())
            {
                return Err(Refusal::bad(format!(
                    "`{resource}` is no resource, `class.ident` is expected"
                )));
            }
            let value = short("value", &body.value)?;
            let identity = body.identity.map(|i| short("identity", &i)).transpose()?;
            Ok(Verb::Resource(ResourceRequest {
                resource,
                value,
                identity,
            }))
        }
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body)
        .map_err(|e| Refusal::bad(format!("the body is not the JSON that is expected here: {e}")))
}

/// A text for one field of a log line: 1 to 256 bytes, nothing that ends or hides part of a line.
fn short(field: &str, text: &str) -> Result<String, Refusal> {
    if text.is_empty() || text.len() > 256 || text.chars().any(char::is_control) {
        let error = format!("`{field}` must be 1 to 256 bytes of text without control characters");
        return Err(Refusal::bad(error));
    }
    Ok(text.to_owned())
}

/// A response that is complete: one JSON document.
fn whole(status: StatusCode, value: &impl serde::Serialize) -> Response<Answer> {
    let (status, json) = match serde_json::to_vec(value) {
        Ok(json) => (status, json),
        Err(e) => {
            tracing::error!(error = %e, "an answer could not be written as JSON");
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                br#"{"error":"the answer could not be written as JSON"}"#.to_vec(),
            )
        }
    };
    response(status, "application/json", Answer::Whole(Full::from(json)))
}

/// A response that goes on until the command ends: one JSON document per line.
fn stream(replies: mpsc::UnboundedReceiver<Reply>) -> Response<Answer> {
    response(
        StatusCode::OK,
        "application/x-ndjson",
        Answer::Replies { replies, ended: false },
    )
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
    /// Comes line by line; ends after `Done` or `Failed`.
    Replies {
        replies: mpsc::UnboundedReceiver<Reply>,
        ended: bool,
    },
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Whole(full) => Pin::new(full).poll_frame(cx),
            Self::Replies { ended: true, .. } => Poll::Ready(None),
            Self::Replies { replies, ended } => replies.poll_recv(cx).map(|reply| {
                // A sender that is dropped early still owes the client a last line.
                let reply = reply.unwrap_or_else(|| Reply::Failed {
                    error: "farmd ended before the command did".to_owned(),
                    code: exit::FAILED,
                });
                *ended = matches!(reply, Reply::Done { .. } | Reply::Failed { .. });
                let mut line = serde_json::to_vec(&reply).unwrap_or_default();
                line.push(b'\n');
                Some(Ok(Frame::data(line.into())))
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(full) => full.is_end_stream(),
            Self::Replies { ended, .. } => *ended,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole(full) => full.size_hint(),
            Self::Replies { .. } => SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests;
