//! Requests by new TCP connections at a steady rate, each with the client's end, by which the wire tells whose it was, and with its answer compared to the byte.
//!
//! [`crate::requester`] measures times: it knows no ends and takes any answer that ends as its own does. Never retries; never decides which failures are
//! allowed.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, timeout};

use crate::client::{Client, Running};
use crate::http::Failure;
use crate::pinger::NodeNumber;

/// How long each may take: a client that has no answer asks again after one and after three seconds.
const LIMIT: Duration = Duration::from_secs(5);

/// No node of a lab has a longer name.
const NAME: usize = 16;

/// One request.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// The client's end; none if it could not get one.
    pub local: Option<SocketAddr>,
    /// When it was begun.
    pub begun: Instant,
    /// When it was answered or given up.
    pub ended: Instant,
    /// The node that answered, or how it failed.
    pub outcome: Result<NodeNumber, Failure>,
}

impl Asked {
    /// Who asked, for how long, and how it failed.
    pub(super) fn describe(&self) -> String {
        let from = self
            .local
            .map_or_else(|| "no port".to_owned(), |local| local.to_string());
        let how = self.outcome.as_ref().err().map(ToString::to_string).unwrap_or_default();
        let after = self.ended.saturating_duration_since(self.begun);
        format!("from {from} after {} ms: {how}", after.as_millis())
    }
}

/// Requests being made from one client.
#[derive(Debug)]
pub(super) struct Stream {
    stop: Arc<AtomicBool>,
    thread: Running<Vec<Asked>>,
}

impl Stream {
    /// Begins `rate` requests a second from the client's addresses in turn to `targets` in turn.
    pub(super) fn start(client: &Client, targets: &[SocketAddrV4], rate: u32) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let ways: Vec<(Ipv4Addr, SocketAddrV4)> = client
            .addrs()
            .iter()
            .flat_map(|source| targets.iter().map(move |to| (*source, *to)))
            .collect();
        let thread = client.start(async move || {
            let mut all: Vec<Asked> = Vec::new();
            let mut running: JoinSet<Asked> = JoinSet::new();
            let mut due = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
            due.set_missed_tick_behavior(MissedTickBehavior::Burst);
            for (number, (source, to)) in ways.into_iter().cycle().enumerate() {
                due.tick().await;
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                while let Some(done) = running.try_join_next() {
                    all.extend(done);
                }
                running.spawn(ask(source, to, number));
            }
            while let Some(done) = running.join_next().await {
                all.extend(done);
            }
            all
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends the stream, waits for the open requests, and returns all of them.
    pub(super) fn stop(self) -> Result<Vec<Asked>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.wait()
    }
}

async fn ask(source: Ipv4Addr, to: SocketAddrV4, number: usize) -> Asked {
    let begun = Instant::now();
    let (mut local, mut connected) = (None, false);
    // No other request has this text, and none that is whole begins another one.
    let text = format!("{source}-{number};");
    let whole = timeout(LIMIT, exchange(source, to, &text, &mut local, &mut connected)).await;
    let late = if connected {
        Failure::AnswerTimeout
    } else {
        Failure::ConnectTimeout
    };
    Asked {
        local,
        begun,
        ended: Instant::now(),
        outcome: whole.unwrap_or(Err(late)),
    }
}

/// Connects, says `text` and wants it back from a node that gives its name.
async fn exchange(
    source: Ipv4Addr,
    to: SocketAddrV4,
    text: &str,
    local: &mut Option<SocketAddr>,
    connected: &mut bool,
) -> Result<NodeNumber, Failure> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(SocketAddr::from((source, 0)))?;
    *local = Some(socket.local_addr()?);
    let mut stream = socket.connect(SocketAddr::V4(to)).await?;
    *connected = true;
    stream.write_all(format!("T{text}").as_bytes()).await?;
    let mut answer = Vec::new();
    loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(Failure::Closed);
        }
        if let Some(judged) = judge(&answer, text.as_bytes()) {
            return judged;
        }
    }
}

/// The node whose answer to `text` these bytes are, or that they are wrong; `None` if more bytes may make an answer of them.
fn judge(answer: &[u8], text: &[u8]) -> Option<Result<NodeNumber, Failure>> {
    let wrong = || {
        let shown = String::from_utf8_lossy(answer).into_owned();
        Some(Err(Failure::BadAnswer(shown)))
    };
    let Some(end) = answer.iter().position(|byte| *byte == b'\n') else {
        return if answer.len() > NAME { wrong() } else { None };
    };
    let (name, rest) = (&answer[..end], &answer[end + 1..]);
    let number = std::str::from_utf8(name)
        .ok()
        .and_then(|name| name.strip_prefix("node"));
    let node: Option<NodeNumber> = number.and_then(|number| number.parse().ok());
    match node {
        Some(node) if rest == text => Some(Ok(node)),
        Some(_) if text.starts_with(rest) => None,
        _ => wrong(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_a_name_and_the_very_text() {
        let judged = |answer: &str| judge(answer.as_bytes(), b"198.18.0.100-7;");
        assert_eq!(judged("node3\n198.18.0.100-7;"), Some(Ok(3)));
        for part in ["", "node", "node3\n", "node3\n198.18.0.100-7"] {
            assert_eq!(judged(part), None, "{part:?} is not whole");
        }
        let wrong = [
            "node3\n198.18.0.101-7;",
            "node3\n198.18.0.100-7;;",
            "node3\n198.18.0.100-71;",
            "nobody\n198.18.0.100-7;",
            "\n",
            "a name that never ends",
        ];
        for answer in wrong {
            assert_eq!(judged(answer), Some(Err(Failure::BadAnswer(answer.to_owned()))));
        }
    }
}
