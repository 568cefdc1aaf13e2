//! A steady stream of new TCP connections, one request each, with the time to connect kept apart from the time to the answer.
//!
//! Owns the schedule: a connection is begun when it is due, however many others are still open. Never retries: what the client's own
//! kernel sends again shows in the time to connect.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::time::{MissedTickBehavior, timeout};

use crate::client::{Client, Running};
use crate::http::Failure;

/// One connection.
#[derive(Clone, Debug)]
pub struct Request {
    /// Client address.
    pub source: Ipv4Addr,
    /// Where to.
    pub to: SocketAddrV4,
    /// When it was begun.
    pub begun: Instant,
    /// Time until it was connected.
    pub connected: Option<Duration>,
    /// Time until its answer was whole, or how it failed.
    pub outcome: Result<Duration, Failure>,
}

/// Connections being made from one client.
#[derive(Debug)]
pub struct Requester {
    stop: Arc<AtomicBool>,
    thread: Running<Vec<Request>>,
}

impl Requester {
    /// Begins `rate` connections a second from the client's addresses in turn to `targets` in turn; each may take `limit`.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn start(client: &Client, targets: &[SocketAddrV4], rate: u32, limit: Duration) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let ways: Vec<(Ipv4Addr, SocketAddrV4)> = client
            .addrs()
            .iter()
            .flat_map(|source| targets.iter().map(|to| (*source, *to)))
            .collect();
        let thread = client.start(async move || {
            let done: Arc<Mutex<Vec<Request>>> = Arc::default();
            let mut running = tokio::task::JoinSet::new();
            let mut due = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
            due.set_missed_tick_behavior(MissedTickBehavior::Burst);
            for (source, to) in ways.into_iter().cycle() {
                due.tick().await;
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                while running.try_join_next().is_some() {}
                let done = Arc::clone(&done);
                running.spawn(async move {
                    let request = request(source, to, limit).await;
                    done.lock().unwrap_or_else(PoisonError::into_inner).push(request);
                });
            }
            while running.join_next().await.is_some() {}
            std::mem::take(&mut *done.lock().unwrap_or_else(PoisonError::into_inner))
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends the stream, waits for the open connections, and returns all of them.
    ///
    /// # Errors
    /// The client's thread could not work.
    pub fn stop(self) -> Result<Vec<Request>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.wait()
    }
}

async fn request(source: Ipv4Addr, to: SocketAddrV4, limit: Duration) -> Request {
    let begun = Instant::now();
    let mut connected = None;
    let whole = timeout(limit, async {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from((source, 0)))?;
        let mut stream = socket.connect(SocketAddr::V4(to)).await?;
        connected = Some(begun.elapsed());
        stream.write_all(b"Tx").await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\nx") {
            if stream.read_buf(&mut answer).await? == 0 {
                return Err(Failure::Closed);
            }
        }
        Ok(begun.elapsed())
    })
    .await;
    let late = if connected.is_some() {
        Failure::AnswerTimeout
    } else {
        Failure::ConnectTimeout
    };
    Request {
        source,
        to,
        begun,
        connected,
        outcome: whole.unwrap_or(Err(late)),
    }
}
