//! The other end of the control socket: one request per connection.
//!
//! Knows HTTP and the socket's name, nothing of what is asked. Every verb that needs the daemon uses [`Client`].

use std::fmt;
use std::future::Future;
use std::io;
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

use crate::failure::Failure;
use crate::folders::Context;

/// The daemon answers questions at once; it needs longer only if it hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
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
        let mut body = response.into_body();
        let mut pending = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame =
                frame.map_err(|e| self.no_answer(format!("the connection ended before the command did: {e}")))?;
            pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            while let Some(end) = pending.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                if line.trim_ascii().is_empty() {
                    continue;
                }
                let reply = serde_json::from_slice(&line)
                    .map_err(|e| self.no_answer(format!("a reply is not understood: {e}")))?;
                match reply {
                    Reply::Progress { text } => progress(&text),
                    last => return Ok(last),
                }
            }
            if pending.len() > MAX_ANSWER {
                return Err(self.no_answer("a reply has no end".to_owned()));
            }
        }
        Err(self.no_answer("the connection ended before the command did".to_owned()))
    }

    fn no_answer(&self, text: String) -> ClientError {
        ClientError::NoAnswer {
            socket: self.socket.clone(),
            text,
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
