//! `farm trace`: what the data plane tells of frames, as lines for one reader.
//!
//! Owns one task per trace, from the request to its last line. It waits for its reader as long as that takes; the data plane does not wait for it
//! ([`crate::dataplane::trace`]). The trace ends when the reader goes away, and with its time.

use std::sync::Arc;
use std::time::Duration;

use farm_core::api::trace::{
    MAX_SNAP, MIN_SNAP, TraceEnd, TraceEnding, TraceFrame, TraceLine, TraceRequest, TraceStart, TraceStop,
};
use farm_core::id::NodeId;
use farm_core::trace::filter::Filter;
use farm_core::trace::to_hex;
use hyper::StatusCode;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{info, warn};

use super::{ANSWER_LIMIT, Answered, Caller, Refusal, ask};
use crate::dataplane::trace::{Record, Running};
use crate::event::{EventSender, Query};

/// Frames that are written at once, so that many frames do not cost a system call each.
const BATCH: usize = 64;
/// Batches that wait for the reader, beside the frames that wait in the queue.
const PIECES: usize = 4;
/// A trace without an end has one all the same, beyond anybody's patience: a year.
const FOREVER: Duration = Duration::from_secs(365 * 86_400);
/// Time that the reader of a trace that has ended has for the last line.
const LAST_LINE: Duration = Duration::from_secs(5);

/// Begins a trace; its lines are the answer.
pub(super) async fn start(events: &EventSender, caller: &Caller, request: TraceRequest) -> Result<Answered, Refusal> {
    let filter: Filter = request.filter.parse().map_err(|e| Refusal::bad(format!("{e}")))?;
    if !(MIN_SNAP..=MAX_SNAP).contains(&request.snap) {
        return Err(Refusal::bad(format!(
            "`snap` is {}, {MIN_SNAP} to {MAX_SNAP} bytes are expected",
            request.snap
        )));
    }
    let sight = ask(events, |answer| Query::Sight(None, answer)).await?;
    let tracer = ask(events, Query::Tracer).await?;
    let told = filter.to_string();
    let running = tracer.start(filter, request.snap);
    let mut running = running.map_err(|e| Refusal::new(StatusCode::CONFLICT, e.to_string()))?;
    let problem = match tokio::time::timeout(ANSWER_LIMIT, &mut running.begun).await {
        Ok(Ok(problem)) => problem,
        Ok(Err(_)) => return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "farmd is ending")),
        Err(_) => {
            let error = format!("farmd's data plane gave no answer within {} s", ANSWER_LIMIT.as_secs());
            return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, error));
        }
    };
    let by = caller.by(None);
    info!(by, filter = told, id = running.id, "a trace begins");
    if let Some(problem) = &problem {
        warn!(problem, "the trace does not see what is judged in the kernel");
    }
    let first = TraceLine::Start(TraceStart {
        node: sight.name(sight.this),
        id: running.id,
        filter: told,
        snap: request.snap,
        interfaces: tracer.interfaces(),
        problem,
    });
    let (lines, receiver) = mpsc::channel(PIECES);
    let time = match request.seconds {
        0 => FOREVER,
        seconds => Duration::from_secs(seconds).min(FOREVER),
    };
    let stream = Stream {
        lines,
        running,
        names: sight.nodes.into(),
        deadline: Instant::now() + time,
        left: request.count.unwrap_or(u64::MAX),
        shown: 0,
    };
    tokio::spawn(async move {
        let (id, tally) = (stream.running.id, Arc::clone(&stream.running.tally));
        let shown = stream.run(first).await;
        info!(id, seen = tally.seen(), shown, lost = tally.lost(), "a trace has ended");
    });
    Ok(Answered::Pieces(receiver))
}

/// Ends the trace of that number.
pub(super) async fn stop(events: &EventSender, request: TraceStop) -> Result<String, Refusal> {
    let id = request.id;
    match ask(events, Query::Tracer).await?.stop(id) {
        true => Ok(format!("trace {id} ends")),
        false => Err(Refusal::new(
            StatusCode::NOT_FOUND,
            format!("there is no trace {id} here"),
        )),
    }
}

struct Stream {
    lines: mpsc::Sender<Vec<u8>>,
    running: Running,
    /// Of the nodes, by [`NodeId`].
    names: Arc<[String]>,
    deadline: Instant,
    /// Frames that may still be shown.
    left: u64,
    shown: u64,
}

impl Stream {
    /// Until its end; returns how many frames were shown.
    async fn run(mut self, first: TraceLine) -> u64 {
        let Some(why) = self.frames(first).await else {
            return self.shown;
        };
        let last = TraceLine::End(TraceEnd {
            seen: self.running.tally.seen(),
            shown: self.shown,
            lost: self.running.tally.lost(),
            why,
        });
        let mut piece = Vec::new();
        push(&mut piece, &last);
        // If the reader does not take it, it has gone.
        let _ = tokio::time::timeout(LAST_LINE, self.lines.send(piece)).await;
        self.shown
    }

    /// Why it ends; `None` if the reader has gone.
    async fn frames(&mut self, first: TraceLine) -> Option<TraceEnding> {
        let mut records: Vec<Record> = Vec::with_capacity(BATCH);
        let mut piece = Vec::new();
        push(&mut piece, &first);
        self.lines.send(piece).await.ok()?;
        loop {
            if self.left == 0 {
                return Some(TraceEnding::Count);
            }
            let most = usize::try_from(self.left).unwrap_or(BATCH).min(BATCH);
            tokio::select! {
                biased;
                () = self.lines.closed() => return None,
                () = tokio::time::sleep_until(self.deadline) => return Some(TraceEnding::Time),
                _ = self.running.records.recv_many(&mut records, most) => {}
            }
            if records.is_empty() {
                return Some(TraceEnding::Asked);
            }
            let mut piece = Vec::new();
            let frames = records.len() as u64;
            for record in records.drain(..) {
                push(&mut piece, &TraceLine::Frame(Box::new(frame(&record, &self.names))));
            }
            match tokio::time::timeout_at(self.deadline, self.lines.send(piece)).await {
                Ok(sent) => sent.ok()?,
                Err(_) => return Some(TraceEnding::Time),
            }
            self.shown += frames;
            self.left -= frames;
        }
    }
}

fn push(piece: &mut Vec<u8>, line: &TraceLine) {
    match serde_json::to_vec(line) {
        Ok(json) => {
            piece.extend(json);
            piece.push(b'\n');
        }
        Err(error) => tracing::error!(%error, "a line could not be written as JSON"),
    }
}

fn frame(record: &Record, names: &[String]) -> TraceFrame {
    let name = |node: NodeId| names.get(node.index()).map_or("?", String::as_str).to_owned();
    let view = &record.subject.view;
    TraceFrame {
        unix_us: record.unix_us,
        interface: record.interface.clone(),
        by: if record.by_kernel { "kernel" } else { "farmd" }.to_owned(),
        client: view.client,
        client_port: view.ports.map(|(client, _)| client),
        vip: view.vip,
        vip_port: view.ports.map(|(_, vip)| vip),
        protocol: view.protocol_name(),
        detail: view.detail(),
        length: record.length,
        verdict: record.subject.outcome.name().to_owned(),
        reason: record.subject.cause.name().to_owned(),
        sent_on: record.sent_on.iter().map(name).collect(),
        group: record.place.as_ref().map(|(group, _)| group.clone()),
        bucket: record.place.as_ref().map(|(_, bucket)| *bucket),
        owner: record.owner.map(name),
        bytes: to_hex(&record.bytes),
    }
}
