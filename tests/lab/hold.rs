//! Long-lived connections that are kept busy and checked byte by byte.
//!
//! Owns N keep-alive connections, each of which sends a text of its own every little while and expects exactly
//! that text back from exactly the node that answered first. Never reopens a connection: one that breaks stays broken and is reported.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::client::{Client, Running};
use crate::http::{Connection, Failure};
use crate::process::wait_until;

/// What to hold.
#[derive(Clone, Debug)]
pub struct HoldConfig {
    /// Where to; the server must have `/echo/TEXT`.
    pub to: SocketAddr,
    /// Number of connections.
    pub count: usize,
    /// Pause between an answer and the next request of one connection.
    pub pause: Duration,
    /// A connection is broken if an answer takes longer.
    pub limit: Duration,
}

impl HoldConfig {
    /// `count` connections that speak every 100 ms and may wait 5 s for an answer.
    pub fn new(to: impl Into<SocketAddr>, count: usize) -> Self {
        Self {
            to: to.into(),
            count,
            pause: Duration::from_millis(100),
            limit: Duration::from_secs(5),
        }
    }
}

/// One connection that was held.
#[derive(Clone, Debug)]
pub struct Held {
    /// The client's end; `None` if it was never connected.
    pub client: Option<SocketAddr>,
    /// The node it was on; empty if it never got an answer.
    pub node: String,
    /// Right answers it had.
    pub answers: usize,
    /// The longest that it waited for one.
    pub slowest: Duration,
    /// When and how it broke.
    pub broken: Option<(Instant, Failure)>,
}

/// What became of all.
#[derive(Clone, Debug, Default)]
pub struct HoldReport {
    /// One per connection.
    pub held: Vec<Held>,
}

impl HoldReport {
    /// Connections per node.
    pub fn per_node(&self) -> BTreeMap<String, usize> {
        count(self.held.iter())
    }

    /// Broken connections per node.
    pub fn broken_per_node(&self) -> BTreeMap<String, usize> {
        count(self.held.iter().filter(|held| held.broken.is_some()))
    }

    /// The broken ones.
    pub fn broken(&self) -> Vec<&Held> {
        self.held.iter().filter(|held| held.broken.is_some()).collect()
    }
}

fn count<'a>(held: impl Iterator<Item = &'a Held>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for one in held {
        *counts.entry(one.node.clone()).or_default() += 1;
    }
    counts
}

/// Connections being held.
#[derive(Debug)]
pub struct Holder {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicUsize>,
    count: usize,
    thread: Running<HoldReport>,
}

impl Holder {
    /// Opens the connections from the client's addresses in turn; an error if one gets no first answer.
    pub fn start(client: &Client, config: HoldConfig) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let opened = Arc::new(AtomicUsize::new(0));
        let rounds = Arc::new(AtomicUsize::new(0));
        let addrs = client.sources(config.to);
        let count = config.count;
        let limit = config.limit;
        let (stopped, begun, counted) = (Arc::clone(&stop), Arc::clone(&opened), Arc::clone(&rounds));
        let thread = client.start(async move || {
            let mut running = tokio::task::JoinSet::new();
            for index in 0..config.count {
                let source = addrs[index % addrs.len()];
                // Opened one after the other: a burst of SYNs is another test.
                let connection = Connection::open(source, config.to, config.limit).await;
                running.spawn(keep_talking(
                    connection,
                    index,
                    config.clone(),
                    Arc::clone(&stopped),
                    Arc::clone(&begun),
                    Arc::clone(&counted),
                ));
            }
            HoldReport {
                held: running.join_all().await,
            }
        })?;
        let holder = Self {
            stop,
            rounds,
            count,
            thread,
        };
        let all = wait_until(
            limit * 2 + Duration::from_millis(10) * count as u32,
            "every connection's first answer",
            || (opened.load(Ordering::Relaxed) == count).then_some(()),
        );
        if let Err(error) = all {
            let report = holder.stop()?;
            let first = report.broken().first().map(|held| format!("{:?}", held.broken));
            bail!(
                "{error}: {} of {count}; {}",
                opened.load(Ordering::Relaxed),
                first.unwrap_or_default()
            );
        }
        Ok(holder)
    }

    /// Waits until the connections together had `more` further answers per connection, or `limit` passes.
    pub fn wait_rounds(&self, more: usize, limit: Duration) -> Result<()> {
        let goal = self.rounds.load(Ordering::Relaxed) + more * self.count;
        wait_until(limit, "the held connections to go on", || {
            (self.rounds.load(Ordering::Relaxed) >= goal).then_some(())
        })
    }

    /// Ends all connections and tells what became of them.
    pub fn stop(self) -> Result<HoldReport> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.wait()
    }
}

async fn keep_talking(
    connection: Result<Connection, Failure>,
    index: usize,
    config: HoldConfig,
    stop: Arc<AtomicBool>,
    opened: Arc<AtomicUsize>,
    rounds: Arc<AtomicUsize>,
) -> Held {
    let mut held = Held {
        client: None,
        node: String::new(),
        answers: 0,
        slowest: Duration::ZERO,
        broken: None,
    };
    let mut connection = match connection {
        Ok(connection) => connection,
        Err(failure) => {
            return Held {
                broken: Some((Instant::now(), failure)),
                ..held
            };
        }
    };
    held.client = connection.local();
    while !stop.load(Ordering::Relaxed) || held.answers == 0 {
        // A text that no other connection and no other round has: an answer that went astray is seen.
        let path = format!("/echo/{index}-{}-{}", held.answers, "x".repeat(held.answers % 512));
        let asked = Instant::now();
        let answer = match connection.get(&path, config.limit).await {
            Ok(answer) => answer,
            Err(failure) => {
                held.broken = Some((Instant::now(), failure));
                return held;
            }
        };
        match answer.trim_end().split_once(' ') {
            Some((node, text)) if text == path && (held.answers == 0 || node == held.node) => {
                node.clone_into(&mut held.node)
            }
            _ => {
                held.broken = Some((Instant::now(), Failure::BadAnswer(answer)));
                return held;
            }
        }
        if held.answers == 0 {
            opened.fetch_add(1, Ordering::Relaxed);
        }
        held.answers += 1;
        held.slowest = held.slowest.max(asked.elapsed());
        rounds.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(config.pause).await;
    }
    held
}
