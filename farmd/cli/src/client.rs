//! The other end of the control socket: one request per connection.
//!
//! Knows HTTP and the socket's name, nothing of what is asked. Every verb that needs the daemon uses [`Client`].

use std::fmt;
use std::future::Future;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use farm_core::api::{ClusterStatus, FarmStatus, Reply, exit};
use farm_core::id::ModuleName;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::Instant;

use crate::failure::Failure;
use crate::folders::Context;

/// The daemon answers questions at once; it needs longer only if it hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
/// Time that an answer has for its last lines after its end was asked for.
const END_LIMIT: Duration = Duration::from_secs(3);
/// Largest answer taken: 64 nodes with many modules and a full plan stay far below.
const MAX_ANSWER: usize = 32 * 1024 * 1024;

/// Why the daemon could not be asked, or did not do it.
#[derive(Debug)]
pub enum ClientError {
    /// Nobody listens on the socket.
    NotRunning { socket: PathBuf },
    /// The system or the daemon refuses this user.
    Denied { text: String },
    /// The daemon refuses the request.
    Refused { status: StatusCode, text: String },
    /// The daemon accepted and then gave no whole answer.
    NoAnswer { socket: PathBuf, text: String },
}

impl ClientError {
    /// The exit code that says the same.
    fn code(&self) -> u8 {
        match self {
            Self::NotRunning { .. } | Self::NoAnswer { .. } => exit::NO_DAEMON,
            Self::Denied { .. } => exit::DENIED,
            Self::Refused { status, .. } => match *status {
                StatusCode::NOT_FOUND => exit::NOT_FOUND,
                StatusCode::CONFLICT => exit::REFUSED,
                StatusCode::BAD_REQUEST | StatusCode::PAYLOAD_TOO_LARGE => exit::USAGE,
                StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY => exit::NO_DAEMON,
                _ => exit::FAILED,
            },
        }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotRunning { socket } => write!(
                f,
                "farmd is not running (no answer on {}); start it with: systemctl start farmd",
                socket.display()
            ),
            Self::Denied { text } | Self::Refused { text, .. } => f.write_str(text),
            Self::NoAnswer { socket, text } => write!(f, "farmd does not answer on {}: {text}", socket.display()),
        }
    }
}

impl std::error::Error for ClientError {}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

/// Asks one daemon.
pub struct Client {
    socket: PathBuf,
    /// Who is to answer, if another than the daemon on the socket.
    node: Option<String>,
    runtime: Runtime,
}

impl Client {
    /// A client of the daemon that serves `context`'s run folder. Nothing is sent yet.
    ///
    /// # Errors
    /// If the system refuses what waiting needs (file descriptors).
    pub fn new(context: &Context) -> Result<Self, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| Failure::new(exit::FAILED, format!("cannot wait for events: {e}")))?;
        Ok(Self {
            socket: context.socket(),
            node: context.node.clone(),
            runtime,
        })
    }

    /// The whole farm.
    pub fn status(&self) -> Result<FarmStatus, ClientError> {
        self.get("/v1/status")
    }

    /// The cluster.
    pub fn cluster(&self) -> Result<ClusterStatus, ClientError> {
        self.get("/v1/cluster")
    }

    /// True if a daemon answers, whatever it answers.
    pub fn answers(&self) -> bool {
        !matches!(
            self.get::<serde_json::Value>("/v1/cluster"),
            Err(ClientError::NotRunning { .. })
        )
    }

    /// The answer to `GET path`.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let bytes = self.within_limit(async {
            let response = self.send(Method::GET, path, Bytes::new()).await?;
            self.collect(response).await
        })?;
        serde_json::from_slice(&bytes)
            .map_err(|e| self.no_answer(format!("the answer to {path} is not understood: {e}")))
    }

    /// Sends a module command and waits for its last reply, giving each earlier one to `progress`.
    pub fn command(
        &self,
        module: &ModuleName,
        verb: &str,
        body: &impl Serialize,
        progress: impl FnMut(&str),
    ) -> Result<Reply, ClientError> {
        self.post(&format!("/v1/modules/{module}/{verb}"), body, progress)
    }

    /// As [`Self::command`] for any path. Waits as long as the daemon does.
    pub fn post(&self, path: &str, body: &impl Serialize, progress: impl FnMut(&str)) -> Result<Reply, ClientError> {
        let body =
            serde_json::to_vec(body).map_err(|e| self.no_answer(format!("the request cannot be written: {e}")))?;
        self.runtime.block_on(async {
            let response = self.send(Method::POST, path, body.into()).await?;
            self.read_replies(response, progress).await
        })
    }

    fn within_limit<T>(&self, work: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
        self.runtime.block_on(async {
            match tokio::time::timeout(ANSWER_LIMIT, work).await {
                Ok(result) => result,
                Err(_) => Err(self.no_answer(format!("nothing came within {} s", ANSWER_LIMIT.as_secs()))),
            }
        })
    }

    /// Sends one request and returns the head of a good response.
    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|e| connect_error(&self.socket, &e))?;
        let broken = |e: hyper::Error| self.no_answer(e.to_string());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(broken)?;
        let path = &match &self.node {
            Some(node) => format!("/v1/on/{node}/{}", path.strip_prefix("/v1/").unwrap_or(path)),
            None => path.to_owned(),
        };
        // The connection has to be driven while the answer is read; it ends with the answer.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "farm")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| self.no_answer(e.to_string()))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = self.collect(response).await?;
        let text = serde_json::from_slice::<serde_json::Value>(&body)
            .ok()
            .and_then(|json| json["error"].as_str().map(str::to_owned))
            .unwrap_or_else(|| format!("farmd answers {status} to {path}"));
        Err(match status {
            StatusCode::FORBIDDEN => ClientError::Denied { text },
            _ => ClientError::Refused { status, text },
        })
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let body = http_body_util::Limited::new(response.into_body(), MAX_ANSWER);
        Ok(body
            .collect()
            .await
            .map_err(|e| self.no_answer(e.to_string()))?
            .to_bytes())
    }

    async fn read_replies(
        &self,
        response: Response<Incoming>,
        mut progress: impl FnMut(&str),
    ) -> Result<Reply, ClientError> {
        let mut lines = Lines::of(response);
        while let Some(batch) = self.batch(&mut lines).await? {
            for line in batch {
                match self.understood(&line)? {
                    Reply::Progress { text } => progress(&text),
                    last => return Ok(last),
                }
            }
        }
        Err(self.no_answer("the connection ended before the command did".to_owned()))
    }

    /// As [`Self::post`] for an answer of any length: `take` gets its lines as they come, those that come together at once, until it says that one was the last. When the
    /// process is interrupted, or told to end, what `stop` makes is sent, and the answer has a moment for its end.
    pub fn follow<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        stop: impl Fn() -> Option<(&'static str, Vec<u8>)>,
        mut take: impl FnMut(Vec<T>) -> Result<ControlFlow<()>, Failure>,
    ) -> Result<(), Failure> {
        let body =
            serde_json::to_vec(body).map_err(|e| self.no_answer(format!("the request cannot be written: {e}")))?;
        self.runtime.block_on(async {
            let no_signals = |e| Failure::new(exit::FAILED, format!("cannot wait for signals: {e}"));
            let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
            let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
            let mut lines = Lines::of(self.send(Method::POST, path, body.into()).await?);
            let mut deadline = None;
            loop {
                let batch = tokio::select! {
                    biased;
                    batch = self.batch(&mut lines) => batch?,
                    () = at(deadline) => None,
                    _ = interrupt.recv(), if deadline.is_none() => {
                        deadline = Some(self.stop(stop()).await);
                        continue;
                    }
                    _ = terminate.recv(), if deadline.is_none() => {
                        deadline = Some(self.stop(stop()).await);
                        continue;
                    }
                };
                let Some(batch) = batch else {
                    let text = "the connection ended before the answer did: farmd has ended, or was restarted";
                    return Err(self.no_answer(text.to_owned()).into());
                };
                let batch: Result<Vec<T>, ClientError> = batch.iter().map(|line| self.understood(line)).collect();
                if take(batch?)?.is_break() {
                    return Ok(());
                }
            }
        })
    }

    /// Asks for the end of an answer, and says how long to wait for it.
    async fn stop(&self, request: Option<(&'static str, Vec<u8>)>) -> Instant {
        let deadline = Instant::now() + END_LIMIT;
        if let Some((path, body)) = request {
            // Without an answer the other end finds out by the connection's end.
            let _ = tokio::time::timeout_at(deadline, self.send(Method::POST, path, body.into())).await;
        }
        deadline
    }

    /// Lines that have come; `None` after the last one.
    async fn batch(&self, lines: &mut Lines) -> Result<Option<Vec<Vec<u8>>>, ClientError> {
        lines
            .next()
            .await
            .map_err(|text| self.no_answer(format!("the connection ended before the answer did: {text}")))
    }

    fn understood<T: DeserializeOwned>(&self, line: &[u8]) -> Result<T, ClientError> {
        serde_json::from_slice(line).map_err(|e| self.no_answer(format!("a reply is not understood: {e}")))
    }

    fn no_answer(&self, text: String) -> ClientError {
        ClientError::NoAnswer {
            socket: self.socket.clone(),
            text,
        }
    }
}

/// Ends at `deadline`; never without one.
async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The lines of an answer, as they come.
struct Lines {
    body: Incoming,
    pending: Vec<u8>,
}

impl Lines {
    fn of(response: Response<Incoming>) -> Self {
        Self {
            body: response.into_body(),
            pending: Vec::new(),
        }
    }

    /// One line or more; `None` after the last one. Nothing is lost if it is not waited for to the end.
    async fn next(&mut self) -> Result<Option<Vec<Vec<u8>>>, String> {
        loop {
            if let Some(end) = self.pending.iter().rposition(|b| *b == b'\n') {
                let whole: Vec<u8> = self.pending.drain(..=end).collect();
                let lines = whole
                    .split(|b| *b == b'\n')
                    .filter(|line| !line.trim_ascii().is_empty());
                let lines: Vec<Vec<u8>> = lines.map(<[u8]>::to_vec).collect();
                if !lines.is_empty() {
                    return Ok(Some(lines));
                }
            }
            if self.pending.len() > MAX_ANSWER {
                return Err("a reply has no end".to_owned());
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Ok(frame)) => self
                    .pending
                    .extend_from_slice(frame.data_ref().map_or(&[][..], |data| data)),
                Some(Err(error)) => return Err(error.to_string()),
            }
        }
    }
}

fn connect_error(socket: &Path, error: &io::Error) -> ClientError {
    match error.kind() {
        io::ErrorKind::PermissionDenied => ClientError::Denied {
            text: format!("not allowed to talk to farmd on {}: be root", socket.display()),
        },
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning {
            socket: socket.to_owned(),
        },
        _ => ClientError::NoAnswer {
            socket: socket.to_owned(),
            text: error.to_string(),
        },
    }
}

#[cfg(test)]
mod tests;
