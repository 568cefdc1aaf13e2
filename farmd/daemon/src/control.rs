//! The route table of [`farm_core::api`]: from a request to one [`Event`], and to the owner loop's answer.
//!
//! Keeps no state and never decides anything about a module: a request that is well formed goes to the owner loop,
//! every other one is answered here with `{"error": …}`. Requests come from this host by [`socket`] and from other nodes
//! by [`crate::remote`]; both ask `admit` and then `perform`.

mod listening;
mod looking;
mod question;
pub mod socket;

use std::task::{Context, Poll};
use std::time::Duration;

use farm_core::api::{CommandRequest, PrintRequest, Reply, ResourceRequest, exit};
use farm_core::id::ModuleName;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};

use crate::event::{Command, Event, EventSender, Query, ShareCommand, ShareVerb, Verb};

pub use socket::{bind, serve};

/// Largest request body: a command is a few hundred bytes, a printed line some thousand.
pub(crate) const MAX_BODY: usize = 64 * 1024;
/// The owner loop answers a question between two events; longer than this means that it hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Who makes a request.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Caller {
    /// A user, as the node where they are names them.
    pub user: String,
    /// That node, if it is another one.
    pub node: Option<String>,
}

impl Caller {
    /// Who is told to have asked: `name` if one was given, else the user; and from which node.
    fn by(&self, name: Option<&str>) -> String {
        let name = name.unwrap_or(&self.user);
        match &self.node {
            Some(node) => format!("{name} on {node}"),
            None => name.to_owned(),
        }
    }
}

/// What a request is answered with.
pub(crate) enum Answered {
    /// Known now: one JSON document.
    Whole(StatusCode, Vec<u8>),
    /// Comes line by line.
    Lines(Lines),
    /// Comes in pieces of one or more lines.
    Pieces(mpsc::Receiver<Vec<u8>>),
}

/// The replies to a command, one JSON document per line; the last one is `done` or `failed`.
pub(crate) struct Lines {
    replies: mpsc::UnboundedReceiver<Reply>,
    ended: bool,
}

impl Lines {
    /// The next line; `None` after the last one.
    pub(crate) async fn next(&mut self) -> Option<Vec<u8>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Vec<u8>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        self.replies.poll_recv(cx).map(|reply| {
            // A sender that is dropped early still owes the client a last line.
            let reply = reply.unwrap_or_else(|| Reply::Failed {
                error: "farmd ended before the command did".to_owned(),
                code: exit::FAILED,
            });
            self.ended = matches!(reply, Reply::Done { .. } | Reply::Failed { .. });
            Some(line(&reply))
        })
    }
}

/// A reply as it is sent.
pub(crate) fn line(reply: &Reply) -> Vec<u8> {
    let mut line = serde_json::to_vec(reply).unwrap_or_default();
    line.push(b'\n');
    line
}

/// A request that goes no further.
pub(crate) struct Refusal {
    status: StatusCode,
    error: String,
    allow: Option<&'static str>,
}

impl Refusal {
    pub(crate) fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self {
            status,
            error: error.into(),
            allow: None,
        }
    }

    fn bad(error: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, error)
    }

    /// The same as an answer, for whoever has no headers.
    pub(crate) fn into_answer(self) -> Answered {
        whole(self.status, &serde_json::json!({ "error": self.error }))
    }
}

/// What a path asks for.
pub(crate) enum Route<'a> {
    Status,
    Cluster,
    /// With what stands behind the question mark.
    History {
        words: &'a str,
    },
    /// With what stands behind the question mark.
    Why {
        words: &'a str,
    },
    /// With what stands behind the question mark.
    Map {
        words: &'a str,
    },
    /// With what stands behind the question mark.
    Flows {
        words: &'a str,
    },
    Has,
    Metrics,
    Plan,
    Shutdown,
    Reload,
    Deaf,
    Trace,
    TraceStop,
    Share(ShareWord),
    Module {
        name: &'a str,
        verb: ModuleVerb,
    },
}

/// What a path asks of the node's shares.
#[derive(Clone, Copy)]
pub(crate) enum ShareWord {
    Drain,
    Undrain,
    Weight,
}

/// The last part of a module's path.
#[derive(Clone, Copy)]
pub(crate) enum ModuleVerb {
    Command(fn(CommandRequest) -> Verb),
    Print,
    Resource,
}

/// The route of `path`, or `None` if there is none.
fn route(path: &str) -> Option<Route<'_>> {
    let (path, words) = path.split_once('?').unwrap_or((path, ""));
    let rest = path.strip_prefix("/v1/")?;
    let route = match rest {
        "status" => Route::Status,
        "cluster" => Route::Cluster,
        "history" => Route::History { words },
        "why" => Route::Why { words },
        "map" => Route::Map { words },
        "flows" => Route::Flows { words },
        "has" => Route::Has,
        "metrics" => Route::Metrics,
        "plan" => Route::Plan,
        "shutdown" => Route::Shutdown,
        "reload" => Route::Reload,
        "deaf" => Route::Deaf,
        "trace" => Route::Trace,
        "trace/stop" => Route::TraceStop,
        "drain" => Route::Share(ShareWord::Drain),
        "undrain" => Route::Share(ShareWord::Undrain),
        "weight" => Route::Share(ShareWord::Weight),
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

/// The route of a request that may be made.
///
/// # Errors
/// 404 for an unknown path, 405 for a method that it does not take.
pub(crate) fn admit<'a>(method: &Method, path: &'a str) -> Result<Route<'a>, Refusal> {
    let Some(route) = route(path) else {
        return Err(Refusal::new(
            StatusCode::NOT_FOUND,
            format!("there is no `{path}` here"),
        ));
    };
    let (wanted, allow) = match route {
        Route::Shutdown
        | Route::Reload
        | Route::Deaf
        | Route::Trace
        | Route::TraceStop
        | Route::Share(_)
        | Route::Module { .. } => (Method::POST, "POST"),
        Route::Status
        | Route::Cluster
        | Route::History { .. }
        | Route::Why { .. }
        | Route::Map { .. }
        | Route::Flows { .. }
        | Route::Has
        | Route::Metrics
        | Route::Plan => (Method::GET, "GET"),
    };
    if *method != wanted {
        let error = format!("`{path}` takes {allow}, not {method}");
        return Err(Refusal {
            allow: Some(allow),
            ..Refusal::new(StatusCode::METHOD_NOT_ALLOWED, error)
        });
    }
    Ok(route)
}

/// Checks the body of an admitted request, hands it to the owner loop, and gives back its answer.
pub(crate) async fn perform(
    route: Route<'_>,
    body: &[u8],
    caller: &Caller,
    events: &EventSender,
) -> Result<Answered, Refusal> {
    let (replies, receiver) = mpsc::unbounded_channel();
    match route {
        Route::Status => return told(events, Query::Status).await,
        Route::Cluster => return told(events, Query::Cluster).await,
        Route::History { words } => {
            let filter = question::history(words)?;
            return told(events, |answer| Query::History(filter, answer)).await;
        }
        Route::Why { words } => return looking::why(events, question::why(words)?).await,
        Route::Map { words } => return looking::map(events, &question::map(words)?).await,
        Route::Flows { words } => return looking::flows(events, question::flows(words)?).await,
        Route::Has => return looking::has(parse(body)?).await,
        Route::Metrics => return told(events, Query::Metrics).await,
        Route::Plan => return told(events, Query::Plan).await,
        Route::Trace => return listening::start(events, caller, optional(body)?).await,
        Route::TraceStop => {
            let text = listening::stop(events, parse(body)?).await?;
            let _ = replies.send(Reply::Done { text });
        }
        Route::Shutdown => {
            events.send(Event::Shutdown { by: caller.by(None) });
            // The owner loop has no way back for a shutdown: the socket that goes away is the end of it.
            let _ = replies.send(Reply::Done {
                text: "farmd stops all modules and then ends".to_owned(),
            });
        }
        Route::Reload => events.send(Event::Reload {
            by: caller.by(None),
            replies,
        }),
        Route::Deaf => {
            events.send(Event::ToldDeaf { by: caller.by(None) });
            let _ = replies.send(Reply::Done { text: String::new() });
        }
        Route::Share(word) => {
            let verb = match word {
                ShareWord::Drain => ShareVerb::Drain(parse(body)?),
                ShareWord::Undrain => ShareVerb::Undrain(parse(body)?),
                ShareWord::Weight => ShareVerb::Weight(parse(body)?),
            };
            let by = caller.by(None);
            events.send(Event::Share(ShareCommand { verb, by, replies }));
        }
        Route::Module { name, verb } => {
            let module: ModuleName = name.parse().map_err(|e| Refusal::bad(format!("{e}")))?;
            let verb = verb_of(verb, body, caller)?;
            events.send(Event::Command(Command { module, verb, replies }));
        }
    }
    Ok(Answered::Lines(Lines {
        replies: receiver,
        ended: false,
    }))
}

/// Puts a question to the owner loop; its answer is the answer to the request.
async fn told<T: serde::Serialize>(
    events: &EventSender,
    query: impl FnOnce(oneshot::Sender<T>) -> Query,
) -> Result<Answered, Refusal> {
    Ok(whole(StatusCode::OK, &ask(events, query).await?))
}

/// Puts a question to the owner loop and waits for its answer.
async fn ask<T>(events: &EventSender, query: impl FnOnce(oneshot::Sender<T>) -> Query) -> Result<T, Refusal> {
    let (sender, receiver) = oneshot::channel();
    events.send(Event::Query(query(sender)));
    match tokio::time::timeout(ANSWER_LIMIT, receiver).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(_)) => Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "farmd is ending")),
        Err(_) => {
            let error = format!("farmd's owner loop gave no answer within {} s", ANSWER_LIMIT.as_secs());
            Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, error))
        }
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
fn verb_of(verb: ModuleVerb, body: &[u8], caller: &Caller) -> Result<Verb, Refusal> {
    match verb {
        ModuleVerb::Command(make) => {
            let body: CommandBody = optional(body)?;
            let identity = body.identity.map(|i| short("identity", &i)).transpose()?;
            let by = match body.by.as_str() {
                "" => caller.by(identity.as_deref()),
                by => caller.by(Some(&short("by", by)?)),
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

/// As [`parse`]; no body stands for what is usual.
fn optional<T: DeserializeOwned + Default>(body: &[u8]) -> Result<T, Refusal> {
    if body.is_empty() { Ok(T::default()) } else { parse(body) }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body)
        .map_err(|e| Refusal::bad(format!("the body is not the JSON that is expected here: {e}")))
}

/// A text for one field of a log line: 1 to 256 bytes, nothing that ends or hides part of a line.
pub(crate) fn short(field: &str, text: &str) -> Result<String, Refusal> {
    if text.is_empty() || text.len() > 256 || text.chars().any(char::is_control) {
        let error = format!("`{field}` must be 1 to 256 bytes of text without control characters");
        return Err(Refusal::bad(error));
    }
    Ok(text.to_owned())
}

/// An answer that is complete.
fn whole(status: StatusCode, value: &impl serde::Serialize) -> Answered {
    match serde_json::to_vec(value) {
        Ok(json) => Answered::Whole(status, json),
        Err(e) => {
            tracing::error!(error = %e, "an answer could not be written as JSON");
            let json = br#"{"error":"the answer could not be written as JSON"}"#.to_vec();
            Answered::Whole(StatusCode::INTERNAL_SERVER_ERROR, json)
        }
    }
}
