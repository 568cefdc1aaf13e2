//! `farm trace`: frames of virtual IPs as they come in, with what becomes of each, and why.
//!
//! Asks farmd, which tells of them until it is asked to stop; here they are laid out, or written to a file for other tools. What is said about the trace itself goes to
//! standard error, as tcpdump does it.

mod line;
mod pcapng;

use std::cell::Cell;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use chrono::{Local, TimeZone};
use farm_core::api::exit;
use farm_core::api::trace::{TraceEnd, TraceEnding, TraceFrame, TraceLine, TraceRequest, TraceStart, TraceStop};
use farm_core::module::logline::escape;
use farm_core::trace::filter::Filter;
use farm_core::trace::from_hex;

use self::line::Page;
use self::pcapng::Writer;
use crate::args::look::TraceArgs;
use crate::client::Client;
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{Style, show};

/// Runs `farm trace`.
pub fn run(context: &Context, args: &TraceArgs) -> Result<u8, Failure> {
    let text = args.filter.join(" ");
    // Said here, because here it can be shown where.
    if let Err(error) = text.parse::<Filter>() {
        return Err(Failure::usage(format!("{error}\n{}", indented(&error.marked()))));
    }
    let mut sink = match &args.write {
        None if context.json => Sink::Json,
        None => Sink::Text(Page::new(Style::of_stdout())),
        Some(path) => Sink::File(Writer::new(open(path)?, args.snaplen).map_err(|e| not_written(path, &e))?),
    };
    let request = TraceRequest {
        filter: text,
        snap: args.snaplen,
        count: args.count,
        seconds: args.seconds,
    };
    let id = Cell::new(None);
    let stop = || {
        let body = serde_json::to_vec(&TraceStop { id: id.get()? }).ok()?;
        Some(("/v1/trace/stop", body))
    };
    let take = |lines: Vec<TraceLine>| {
        let mut text = String::new();
        let mut ended = ControlFlow::Continue(());
        for line in &lines {
            if matches!(sink, Sink::Json) && !matches!(line, TraceLine::Failed { .. }) {
                text.push_str(&json(line)?);
            }
            match line {
                TraceLine::Start(start) => {
                    id.set(Some(start.id));
                    begins(start, args);
                }
                TraceLine::Frame(frame) => sink.frame(frame, args, &mut text)?,
                TraceLine::End(end) => {
                    ended = ControlFlow::Break(());
                    show(&std::mem::take(&mut text))?;
                    ends(end, args);
                }
                TraceLine::Failed { error, code } => return Err(Failure::new(*code, format!("trace: {error}"))),
            }
        }
        if !text.is_empty() {
            show(&text)?;
        }
        sink.flush(args)?;
        Ok(ended)
    };
    Client::new(context)?.follow("/v1/trace", &request, stop, take)?;
    Ok(exit::OK)
}

fn indented(text: &str) -> String {
    text.lines()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Where frames go.
enum Sink {
    Text(Page),
    Json,
    File(Writer<io::BufWriter<Box<dyn Write>>>),
}

impl Sink {
    fn frame(&mut self, frame: &TraceFrame, args: &TraceArgs, text: &mut String) -> Result<(), Failure> {
        match self {
            Self::Text(page) => text.push_str(&page.line(frame, &moment(frame.unix_us))),
            Self::Json => {}
            Self::File(writer) => {
                let bytes = from_hex(&frame.bytes)
                    .ok_or_else(|| Failure::new(exit::NO_DAEMON, "farmd tells of a frame that has no bytes"))?;
                let written = writer.frame(frame, &bytes);
                written.map_err(|e| not_written(args.write.as_deref().unwrap_or(Path::new("-")), &e))?;
            }
        }
        Ok(())
    }

    fn flush(&mut self, args: &TraceArgs) -> Result<(), Failure> {
        match self {
            Self::File(writer) => writer
                .flush()
                .map_err(|e| not_written(args.write.as_deref().unwrap_or(Path::new("-")), &e)),
            Self::Text(_) | Self::Json => Ok(()),
        }
    }
}

/// The file, empty; frames may hold what is nobody else's business.
fn open(path: &Path) -> Result<io::BufWriter<Box<dyn Write>>, Failure> {
    let out: Box<dyn Write> = if path == Path::new("-") {
        Box::new(io::stdout())
    } else {
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(path);
        Box::new(file.map_err(|e| Failure::file("written", path, &e))?)
    };
    Ok(io::BufWriter::new(out))
}

fn not_written(path: &Path, error: &io::Error) -> Failure {
    match error.kind() {
        // The reader of `-w -` has gone.
        io::ErrorKind::BrokenPipe => io::Error::from(error.kind()).into(),
        _ => Failure::file("written", path, error),
    }
}

fn json(line: &TraceLine) -> io::Result<String> {
    let text = serde_json::to_string(line).map_err(io::Error::other)?;
    Ok(format!("{text}\n"))
}

/// Time of day here, with microseconds.
fn moment(unix_us: u64) -> String {
    let time = i64::try_from(unix_us)
        .ok()
        .and_then(|us| Local.timestamp_micros(us).single());
    time.map_or_else(|| "?".to_owned(), |time| time.format("%H:%M:%S%.6f").to_string())
}

fn begins(start: &TraceStart, args: &TraceArgs) {
    let filter = match start.filter.as_str() {
        "" => "all frames of virtual IPs".to_owned(),
        filter => format!("`{filter}`"),
    };
    let interfaces = match start.interfaces.as_slice() {
        [] => "no service interface yet".to_owned(),
        names => names.join(", "),
    };
    let end = match (args.count, args.seconds) {
        (Some(count), _) => format!("after {count}, or with Ctrl-C"),
        (None, 0) => "with Ctrl-C".to_owned(),
        (None, seconds) => format!("with Ctrl-C, or after {seconds} s"),
    };
    let node = &start.node;
    eprintln!(
        "farm: {filter} on {node} ({}), {} bytes of each; ends {end}",
        escape(&interfaces),
        start.snap
    );
    if let Some(problem) = &start.problem {
        eprintln!(
            "farm: frames that are judged in the kernel are not seen: {}",
            escape(problem)
        );
    }
}

fn ends(end: &TraceEnd, args: &TraceArgs) {
    let shown = match &args.write {
        Some(path) => format!("written to {}", path.display()),
        None => "shown".to_owned(),
    };
    if end.why == TraceEnding::Time {
        eprintln!("farm: {} s are over (--seconds N, 0 for no end)", args.seconds);
    }
    let frames = |n: u64| {
        if n == 1 {
            "1 frame".to_owned()
        } else {
            format!("{n} frames")
        }
    };
    let why = match end.lost {
        0 => "",
        _ => ", because they came faster than they could be shown",
    };
    eprintln!(
        "{} {shown}\n{} seen\n{} lost{why}",
        frames(end.shown),
        frames(end.seen),
        frames(end.lost)
    );
}
