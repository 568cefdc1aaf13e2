//! The steady prober: new connections at a fixed rate from a few source addresses, and the longest silence each saw.
//!
//! Owns the schedule (a try is begun when it is due, however many others are still open) and the definition of a gap. Never
//! drops a try from its record.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::time::MissedTickBehavior;

use crate::client::{Client, Record, Report, Running, ask};

/// How to probe.
#[derive(Clone, Debug)]
pub struct ProbeConfig {
    /// Where to.
    pub to: SocketAddr,
    /// Source addresses used in turn; at most as many as the client has.
    pub sources: usize,
    /// Tries per second over all sources. A gap cannot be told finer than `sources / rate` seconds.
    pub rate: u32,
    /// A try without an answer is given up after this.
    pub limit: Duration,
}

impl ProbeConfig {
    /// 20 sources, each every 40 ms, given up after a second.
    pub fn new(to: impl Into<SocketAddr>) -> Self {
        Self {
            to: to.into(),
            sources: 20,
            rate: 500,
            limit: Duration::from_secs(1),
        }
    }

    /// Time between two tries of one source, if the client has as many addresses.
    pub fn turn(&self) -> Duration {
        Duration::from_secs(1) * self.sources.max(1) as u32 / self.rate.max(1)
    }
}

/// A prober at work.
#[derive(Debug)]
pub struct Prober {
    stop: Arc<AtomicBool>,
    records: Arc<Mutex<Vec<Record>>>,
    thread: Running<()>,
}

impl Prober {
    /// Begins to probe from `client`.
    pub fn start(client: &Client, config: ProbeConfig) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let records: Arc<Mutex<Vec<Record>>> = Arc::default();
        let sources: Vec<IpAddr> = client
            .sources(config.to)
            .into_iter()
            .take(config.sources.max(1))
            .collect();
        let (stopped, kept) = (Arc::clone(&stop), Arc::clone(&records));
        let thread = client.start(async move || {
            let mut running = tokio::task::JoinSet::new();
            let mut due = tokio::time::interval(Duration::from_secs(1) / config.rate.max(1));
            due.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut turn = sources.iter().cycle();
            while !stopped.load(Ordering::Relaxed) {
                tokio::select! {
                    _ = due.tick() => {
                        if let Some(source) = turn.next() {
                            running.spawn(ask(*source, config.to, "/who".into(), config.limit));
                        }
                    }
                    Some(ended) = running.join_next() => keep(&kept, ended),
                }
            }
            while let Some(ended) = running.join_next().await {
                keep(&kept, ended);
            }
        })?;
        Ok(Self { stop, records, thread })
    }

    /// What ended so far.
    pub fn so_far(&self) -> Report {
        Report {
            records: self.records.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// Ends the probing, waits for the open tries, and returns everything.
    pub fn stop(self) -> Result<ProbeReport> {
        self.stop.store(true, Ordering::Relaxed);
        let ended = Instant::now();
        self.thread.wait()?;
        let records = std::mem::take(&mut *self.records.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(ProbeReport {
            report: Report { records },
            ended,
        })
    }
}

fn keep(records: &Mutex<Vec<Record>>, ended: Result<Record, tokio::task::JoinError>) {
    if let Ok(record) = ended {
        records.lock().unwrap_or_else(PoisonError::into_inner).push(record);
    }
}

/// Everything a prober saw.
#[derive(Clone, Debug)]
pub struct ProbeReport {
    /// All tries.
    pub report: Report,
    /// When the last try was begun, about.
    pub ended: Instant,
}

/// A silence that one source address saw.
#[derive(Clone, PartialEq, Debug)]
pub struct Gap {
    /// The client address.
    pub source: IpAddr,
    /// From the start of one answered connection to the start of the next answered one.
    pub by_start: Duration,
    /// From one answer to the next, whichever connection it belongs to. Larger than `by_start` where connections that were begun
    /// in the silence were answered after it.
    pub by_answer: Duration,
    /// Who answered before it.
    pub before: String,
    /// Who answered after it; `None` if nobody did until the end.
    pub after: Option<String>,
}

impl Gap {
    /// The silence as the stricter of the two measures has it.
    pub fn length(&self) -> Duration {
        self.by_start.max(self.by_answer)
    }
}

impl ProbeReport {
    /// The longest silence of each source that had an answer, longest first.
    pub fn gaps(&self) -> Vec<Gap> {
        let mut sources: Vec<IpAddr> = self.report.records.iter().map(|record| record.source).collect();
        sources.sort_unstable();
        sources.dedup();
        let mut gaps: Vec<Gap> = sources.into_iter().filter_map(|source| self.gap_of(source)).collect();
        gaps.sort_by_key(|gap| std::cmp::Reverse(gap.length()));
        gaps
    }

    /// The longest silence any source saw; `None` if nothing was answered at all.
    pub fn longest_gap(&self) -> Option<Gap> {
        self.gaps().into_iter().next()
    }

    fn gap_of(&self, source: IpAddr) -> Option<Gap> {
        let answered: Vec<(&Record, &String)> = self
            .report
            .records
            .iter()
            .filter(|record| record.source == source)
            .filter_map(|record| Some((record, record.outcome.as_ref().ok()?)))
            .collect();
        let (by_start, _, _) = widest(&answered, |record| record.started, self.ended)?;
        let (by_answer, before, after) = widest(&answered, Record::ended, self.ended)?;
        Some(Gap {
            source,
            by_start,
            by_answer,
            before,
            after,
        })
    }
}

/// The widest distance between neighbours in the order of `at`, the last one reaching to `end`.
fn widest(
    answered: &[(&Record, &String)],
    at: impl Fn(&Record) -> Instant,
    end: Instant,
) -> Option<(Duration, String, Option<String>)> {
    let mut points: Vec<(Instant, &String)> = answered.iter().map(|(record, node)| (at(record), *node)).collect();
    points.sort();
    let last = points.last()?;
    let tail = (end.saturating_duration_since(last.0), last.1.clone(), None);
    let inner = points
        .windows(2)
        .map(|pair| (pair[1].0 - pair[0].0, pair[0].1.clone(), Some(pair[1].1.clone())));
    inner.chain(std::iter::once(tail)).max_by_key(|(length, _, _)| *length)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::Failure;

    fn at(zero: Instant, start: u64, latency: u64, node: Option<&str>) -> Record {
        Record {
            source: IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
            local: None,
            started: zero + Duration::from_millis(start),
            latency: Duration::from_millis(latency),
            outcome: node.map(str::to_owned).ok_or(Failure::ConnectTimeout),
        }
    }

    #[test]
    fn a_gap_lies_between_answered_connections_and_ignores_failed_ones() {
        let zero = Instant::now();
        let records = vec![
            at(zero, 0, 1, Some("a")),
            at(zero, 40, 1000, None),
            at(zero, 300, 2, Some("b")),
            at(zero, 340, 1, Some("b")),
        ];
        let report = ProbeReport {
            report: Report { records },
            ended: zero + Duration::from_millis(350),
        };
        let gap = report.longest_gap().unwrap();
        assert_eq!(
            (gap.by_start, gap.by_answer),
            (Duration::from_millis(300), Duration::from_millis(301))
        );
        assert_eq!((gap.before.as_str(), gap.after.as_deref()), ("a", Some("b")));
    }

    #[test]
    fn connections_that_wait_through_the_silence_do_not_hide_it() {
        let zero = Instant::now();
        let records = vec![
            at(zero, 0, 1, Some("a")),
            at(zero, 40, 261, Some("b")),
            at(zero, 80, 221, Some("b")),
        ];
        let report = ProbeReport {
            report: Report { records },
            ended: zero + Duration::from_millis(310),
        };
        let gap = report.longest_gap().unwrap();
        assert_eq!(gap.length(), Duration::from_millis(300));
    }

    #[test]
    fn a_silence_that_never_ends_reaches_to_the_end() {
        let zero = Instant::now();
        let report = ProbeReport {
            report: Report {
                records: vec![at(zero, 0, 1, Some("a")), at(zero, 40, 1000, None)],
            },
            ended: zero + Duration::from_millis(900),
        };
        let gap = report.longest_gap().unwrap();
        assert_eq!((gap.length(), gap.after), (Duration::from_millis(900), None));
    }
}
