//! The way of farmd's own output (`tracing`) to standard error, without anybody waiting for who reads it.
//!
//! Owns a bounded queue and the thread that empties it. The owner loop and the data plane log from threads of real-time priority: a pipe
//! that nobody reads would stop heartbeats and packets. A line that finds the queue full is dropped and counted; as soon as there is room again the number
//! is told. `main` calls [`start`] once; everybody else logs through `tracing` and knows nothing of this.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// Lines that may wait for the reader: more than farmd says in an hour, and a second or two of its debug output.
const QUEUE: usize = 8192;

/// How long the end of farmd waits for a slow reader.
pub const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// The writer of this process: logging is global, as `tracing`'s dispatcher is.
static WRITER: OnceLock<LogWriter> = OnceLock::new();

enum Order {
    Line(Vec<u8>),
    Flush(SyncSender<()>),
}

/// Takes lines and never waits. Cheap to clone; all clones write through one thread, in order.
#[derive(Clone, Debug)]
pub struct LogWriter {
    queue: SyncSender<Order>,
    dropped: Arc<AtomicU64>,
}

/// Starts the thread that writes to `out`, and makes it the writer that [`flush`] and [`dropped`] mean.
///
/// # Errors
/// If the thread cannot be started.
pub fn start(out: impl Write + Send + 'static) -> io::Result<LogWriter> {
    let writer = LogWriter::start(out, QUEUE)?;
    // A second call would be a second log; the first one stays the process's.
    Ok(WRITER.get_or_init(|| writer).clone())
}

/// Waits until all that was logged so far is written, at most `limit`. True if it is, or if nothing was started.
pub fn flush(limit: Duration) -> bool {
    WRITER.get().is_none_or(|writer| writer.flush(limit))
}

/// Lines dropped so far because nobody took them.
pub fn dropped() -> u64 {
    WRITER.get().map_or(0, |writer| writer.dropped.load(Ordering::Relaxed))
}

/// From now on a panic of any thread is logged like everything else, waits at most [`FLUSH_LIMIT`] for the reader, and ends the process: a daemon of which
/// one thread is missing must not go on. What the standard library does instead, writing to standard error at once, would leave one hanging that has to end.
pub fn end_at_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = thread::current();
        let backtrace = Backtrace::capture();
        let backtrace = match backtrace.status() {
            BacktraceStatus::Captured => format!("\n{backtrace}"),
            _ => String::new(),
        };
        let name = thread.name().unwrap_or("?");
        tracing::error!("thread {name} ends with a panic, which is a bug: {panic}{backtrace}");
        flush(FLUSH_LIMIT);
        std::process::abort();
    }));
}

impl LogWriter {
    fn start(out: impl Write + Send + 'static, queue: usize) -> io::Result<Self> {
        let (queue, orders) = mpsc::sync_channel(queue);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&dropped);
        thread::Builder::new()
            .name("log".to_owned())
            .spawn(move || write_all(out, &orders, &counter))?;
        Ok(Self { queue, dropped })
    }

    fn flush(&self, limit: Duration) -> bool {
        let since = std::time::Instant::now();
        let (done, wait) = mpsc::sync_channel(1);
        let mut order = Order::Flush(done);
        // A full queue may empty within the limit; there is no `send_timeout`.
        while let Err(mpsc::TrySendError::Full(back)) = self.queue.try_send(order) {
            if since.elapsed() >= limit {
                return false;
            }
            order = back;
            thread::sleep(Duration::from_millis(5));
        }
        wait.recv_timeout(limit.saturating_sub(since.elapsed())).is_ok()
    }
}

impl Write for LogWriter {
    /// `tracing` hands over one whole event a call.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.queue.try_send(Order::Line(line.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogWriter {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

/// The thread: ends with the last [`LogWriter`].
fn write_all(mut out: impl Write, orders: &Receiver<Order>, dropped: &AtomicU64) {
    let mut told = 0;
    for order in orders {
        // Nobody is left to tell if the log itself cannot be written.
        match order {
            Order::Line(line) => drop(out.write_all(&line)),
            Order::Flush(done) => drop(done.try_send(())),
        }
        let lost = dropped.load(Ordering::Relaxed);
        if lost > told {
            let text = format!("farmd: {} log lines were lost: nobody read them in time\n", lost - told);
            drop(out.write_all(text.as_bytes()));
            told = lost;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};
    use std::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(20);

    /// A pipe that nobody reads until it is opened.
    #[derive(Clone, Default)]
    struct Blocked(Arc<Gate>);

    #[derive(Default)]
    struct Gate {
        state: Mutex<(bool, Vec<u8>)>,
        opened: Condvar,
    }

    impl Blocked {
        fn open(&self) {
            self.0.state.lock().unwrap().0 = true;
            self.0.opened.notify_all();
        }

        fn text(&self) -> String {
            String::from_utf8(self.0.state.lock().unwrap().1.clone()).unwrap()
        }
    }

    impl Write for Blocked {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            let mut state = self.0.state.lock().unwrap();
            while !state.0 {
                state = self.0.opened.wait(state).unwrap();
            }
            state.1.extend_from_slice(line);
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_blocks_stops_nobody_and_learns_how_much_it_missed() {
        let pipe = Blocked::default();
        let writer = LogWriter::start(pipe.clone(), 10).unwrap();
        let started = Instant::now();
        for i in 0..1000 {
            writer.clone().write_all(format!("line {i}\n").as_bytes()).unwrap();
        }
        assert!(
            !writer.flush(Duration::from_millis(50)),
            "nothing can have been written"
        );
        assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
        // One line is in the thread's hands at most, ten are in the queue.
        let dropped = writer.dropped.load(Ordering::Relaxed);
        assert!((989..=990).contains(&dropped), "{dropped}");

        pipe.open();
        assert!(writer.flush(LIMIT));
        writer.clone().write_all(b"after\n").unwrap();
        assert!(writer.flush(LIMIT));
        let text = pipe.text();
        assert!(text.starts_with("line 0\n"), "{text}");
        assert!(
            text.contains(&format!("farmd: {dropped} log lines were lost")),
            "{text}"
        );
        assert_eq!(text.matches("were lost").count(), 1, "{text}");
        assert!(text.ends_with("after\n"), "{text}");
    }

    #[test]
    fn lines_of_tracing_arrive_whole_and_in_order() {
        let pipe = Blocked::default();
        pipe.open();
        let writer = LogWriter::start(pipe.clone(), 1000).unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(writer.clone())
            .with_ansi(false)
            .without_time()
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            for i in 0..100 {
                tracing::info!(i, "something");
            }
        });
        assert!(writer.flush(LIMIT));
        let text = pipe.text();
        assert_eq!(text.lines().count(), 100);
        assert!(
            text.lines()
                .enumerate()
                .all(|(i, line)| line.ends_with(&format!("something i={i}"))),
            "{text}"
        );
    }
}
