//! Clients of the farm: connections from many source addresses, each with a record of how it went.
//!
//! Owns a client namespace and the asynchronous runtime that makes its connections; [`crate::probe`] and [`crate::hold`] build on
//! it. Never decides what is good enough: it reports.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::http::{Connection, Failure};
use crate::space::Space;

/// What became of one connection.
#[derive(Clone, Debug)]
pub struct Record {
    /// Client address.
    pub source: IpAddr,
    /// Its end of the connection, if there was one.
    pub local: Option<SocketAddr>,
    /// When it was begun.
    pub started: Instant,
    /// How long until it was answered or given up.
    pub latency: Duration,
    /// The node that answered, or how it failed.
    pub outcome: Result<String, Failure>,
}

impl Record {
    /// When it was answered or given up.
    pub fn ended(&self) -> Instant {
        self.started + self.latency
    }
}

/// Many connections and what became of them.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// One per connection.
    pub records: Vec<Record>,
}

impl Report {
    /// Connections that were answered.
    pub fn answered(&self) -> usize {
        self.records.iter().filter(|record| record.outcome.is_ok()).count()
    }

    /// Connections that were not.
    pub fn lost(&self) -> usize {
        self.records.len() - self.answered()
    }

    /// Answers per node.
    pub fn per_node(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for node in self.records.iter().filter_map(|record| record.outcome.as_ref().ok()) {
            *counts.entry(node.clone()).or_default() += 1;
        }
        counts
    }

    /// Failures by kind.
    pub fn failures(&self) -> BTreeMap<Failure, usize> {
        let mut counts = BTreeMap::new();
        for failure in self.records.iter().filter_map(|record| record.outcome.as_ref().err()) {
            *counts.entry(failure.clone()).or_default() += 1;
        }
        counts
    }

    /// Nodes that answered each source address.
    pub fn nodes_by_source(&self) -> BTreeMap<IpAddr, Vec<String>> {
        let mut seen: BTreeMap<IpAddr, Vec<String>> = BTreeMap::new();
        for record in &self.records {
            if let Ok(node) = &record.outcome {
                let nodes = seen.entry(record.source).or_default();
                if !nodes.contains(node) {
                    nodes.push(node.clone());
                }
            }
        }
        seen
    }

    /// The latency below which `share` (0 to 1) of the answered connections stayed; zero if none was answered.
    pub fn latency(&self, share: f64) -> Duration {
        let mut all: Vec<Duration> = self
            .records
            .iter()
            .filter(|r| r.outcome.is_ok())
            .map(|r| r.latency)
            .collect();
        all.sort_unstable();
        let at = ((all.len() as f64 * share) as usize).min(all.len().saturating_sub(1));
        all.get(at).copied().unwrap_or_default()
    }
}

/// How a batch of connections is made.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Where to.
    pub to: SocketAddr,
    /// What to ask for.
    pub path: String,
    /// How many connections.
    pub count: usize,
    /// Which of the client's addresses are used in turn; clipped to those there are.
    pub sources: Range<usize>,
    /// How many at a time.
    pub at_once: usize,
    /// Limit of each connection, from SYN to its end.
    pub limit: Duration,
}

impl Batch {
    /// `count` connections to `to`, 16 at a time, each within 5 s.
    pub fn new(to: impl Into<SocketAddr>, count: usize) -> Self {
        Self {
            to: to.into(),
            path: "/who".into(),
            count,
            sources: 0..usize::MAX,
            at_once: 16,
            limit: Duration::from_secs(5),
        }
    }
}

/// A client of the farm.
#[derive(Debug)]
pub struct Client {
    space: Arc<Space>,
    addrs: Arc<[Ipv4Addr]>,
    addrs6: Arc<[Ipv6Addr]>,
}

impl Client {
    /// A client in `space`, which has `addrs`.
    pub(crate) fn new(space: Space, addrs: Vec<Ipv4Addr>) -> Self {
        Self {
            space: Arc::new(space),
            addrs: addrs.into(),
            addrs6: Arc::default(),
        }
    }

    /// The same client, which has these addresses too.
    pub(crate) fn with_ipv6(self, addrs: Vec<Ipv6Addr>) -> Self {
        Self {
            addrs6: addrs.into(),
            ..self
        }
    }

    /// Its namespace.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Its IPv4 addresses.
    pub fn addrs(&self) -> &[Ipv4Addr] {
        &self.addrs
    }

    /// Its IPv6 addresses, as many, in a lab with an IPv6 VIP.
    pub fn addrs6(&self) -> &[Ipv6Addr] {
        &self.addrs6
    }

    /// Its addresses of the family of `to`.
    pub fn sources(&self, to: SocketAddr) -> Vec<IpAddr> {
        match to {
            SocketAddr::V4(_) => self.addrs.iter().copied().map(IpAddr::V4).collect(),
            SocketAddr::V6(_) => self.addrs6.iter().copied().map(IpAddr::V6).collect(),
        }
    }

    /// Makes new connections, one request each, from the batch's source addresses in turn; returns when all have ended.
    pub fn batch(&self, batch: Batch) -> Result<Report> {
        let all = self.sources(batch.to);
        let range = batch.sources.start..batch.sources.end.min(all.len());
        let addrs = all.get(range).filter(|addrs| !addrs.is_empty());
        let addrs = addrs
            .with_context(|| format!("the client has no addresses {:?}", batch.sources))?
            .to_vec();
        self.start(async move || {
            let mut report = Report::default();
            let mut running = tokio::task::JoinSet::new();
            for index in 0..batch.count {
                while running.len() >= batch.at_once {
                    keep(&mut report, running.join_next().await);
                }
                running.spawn(ask(
                    addrs[index % addrs.len()],
                    batch.to,
                    batch.path.clone(),
                    batch.limit,
                ));
            }
            while !running.is_empty() {
                keep(&mut report, running.join_next().await);
            }
            report
        })?
        .wait()
    }

    /// One new connection from `source`.
    pub fn ask(&self, source: impl Into<IpAddr>, to: impl Into<SocketAddr>, limit: Duration) -> Result<Record> {
        let (source, to) = (source.into(), to.into());
        self.start(async move || ask(source, to, "/who".into(), limit).await)?
            .wait()
    }

    /// How many connection requests its kernel has sent again since the client was made.
    pub fn requests_sent_again(&self) -> Result<u64> {
        let text = self
            .space
            .run(|| std::fs::read_to_string("/proc/thread-self/net/netstat"))
            .context("the kernel's counters")?;
        let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
        let (names, values) = lines.next().zip(lines.next()).context("no TcpExt in netstat")?;
        let mut pairs = names.split_whitespace().zip(values.split_whitespace());
        let (_, value) = pairs
            .find(|(name, _)| *name == "TCPSynRetrans")
            .context("no TCPSynRetrans in netstat")?;
        value.parse().with_context(|| format!("TCPSynRetrans is {value:?}"))
    }

    /// Runs `work` on a thread of its own inside the client's namespace.
    pub fn start<T, F, Fut>(&self, work: F) -> Result<Running<T>>
    where
        T: Send + 'static,
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = T>,
    {
        let space = Arc::clone(&self.space);
        let thread = std::thread::Builder::new()
            .name(format!("lab-{}", space.name()))
            .spawn(move || {
                space.run(move || {
                    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                    Ok(runtime.block_on(work()))
                })
            })
            .context("cannot start a thread")?;
        Ok(Running(thread))
    }
}

/// Work that goes on in a client's namespace.
#[derive(Debug)]
pub struct Running<T>(JoinHandle<Result<T>>);

impl<T> Running<T> {
    /// Waits for its end.
    pub fn wait(self) -> Result<T> {
        match self.0.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

fn keep(report: &mut Report, ended: Option<Result<Record, tokio::task::JoinError>>) {
    if let Some(Ok(record)) = ended {
        report.records.push(record);
    }
}

/// One new connection with one request.
pub async fn ask(source: IpAddr, to: SocketAddr, path: String, limit: Duration) -> Record {
    let started = Instant::now();
    let mut local = None;
    let outcome = match Connection::open(source, to, limit).await {
        Ok(connection) => {
            let own = connection.local();
            local = own;
            let body = connection
                .get_last(&path, limit.saturating_sub(started.elapsed()))
                .await;
            body.and_then(|body| answering_node(&body, own))
        }
        Err(failure) => Err(failure),
    };
    Record {
        source,
        local,
        started,
        latency: started.elapsed(),
        outcome,
    }
}

/// The node that answered `/who`: `{"node": …, "client": …}`. A server that saw another client than `own` is no part of a farm,
/// whose promise is that servers see the client's real address.
fn answering_node(body: &str, own: Option<SocketAddr>) -> Result<String, Failure> {
    #[derive(serde::Deserialize)]
    struct Who {
        node: String,
        /// Without brackets around an IPv6 address.
        client: String,
    }
    let seen = |who: &Who| {
        let (addr, port) = who.client.rsplit_once(':')?;
        Some(SocketAddr::new(addr.parse().ok()?, port.parse().ok()?))
    };
    match serde_json::from_str::<Who>(body) {
        Ok(who) if own.is_some() && seen(&who) == own => Ok(who.node),
        _ => Err(Failure::BadAnswer(body.trim().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(node: Option<&str>, ms: u64) -> Record {
        Record {
            source: Ipv4Addr::LOCALHOST.into(),
            local: None,
            started: Instant::now(),
            latency: Duration::from_millis(ms),
            outcome: node.map(str::to_owned).ok_or(Failure::Reset),
        }
    }

    #[test]
    fn a_report_counts_answers_failures_and_nodes() {
        let report = Report {
            records: vec![
                record(Some("a"), 1),
                record(Some("b"), 3),
                record(Some("a"), 2),
                record(None, 9),
            ],
        };
        assert_eq!((report.answered(), report.lost()), (3, 1));
        assert_eq!(report.per_node(), BTreeMap::from([("a".into(), 2), ("b".into(), 1)]));
        assert_eq!(report.failures(), BTreeMap::from([(Failure::Reset, 1)]));
        assert_eq!(report.nodes_by_source()[&IpAddr::from(Ipv4Addr::LOCALHOST)], ["a", "b"]);
        assert_eq!(
            (report.latency(0.5), report.latency(1.0)),
            (Duration::from_millis(2), Duration::from_millis(3))
        );
    }

    #[test]
    fn an_answer_counts_only_if_the_server_saw_the_real_client() {
        let own = "198.18.0.100:4000".parse().ok();
        let body = "{\"node\":\"node1\",\"client\":\"198.18.0.100:4000\",\"count\":7}\n";
        assert_eq!(answering_node(body, own), Ok("node1".to_owned()));
        assert!(
            answering_node(&body.replace(".100", ".90"), own).is_err(),
            "a proxy's address"
        );
        assert!(answering_node("<html>", own).is_err());
        let own6 = "[2001:db8::100]:4000".parse().ok();
        assert_eq!(
            answering_node(&body.replace("198.18.0.100", "2001:db8::100"), own6),
            Ok("node1".to_owned())
        );
        assert!(answering_node(body, own6).is_err());
    }
}
