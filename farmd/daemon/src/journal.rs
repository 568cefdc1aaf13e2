//! The module log, the audit of commands, and the history on the disk.
//!
//! Owns `VAR/modules/AM/module.log` and `VAR/audit.log`, both in the form of [`farm_core::module::logline`], and the one
//! thread that writes them and [`history`]. The owner loop calls it for every line and never waits: lines are stamped at once, queued and
//! written by the thread. If the disk is so slow that the queue is full, lines are dropped and their number is written
//! as soon as there is room. A file that has reached its size becomes `….log.1`, in place of the one before.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use farm_core::api::history::HistoryEntry;
use farm_core::id::ModuleName;
use farm_core::module::logline::LogLine;

use crate::{history, store};

/// A log file of this size is put aside.
pub const MAX_LOG: u64 = 2 << 20;

/// Lines that may wait for the disk: some seconds of the busiest module.
const QUEUE: usize = 4096;

enum Order {
    Line { path: PathBuf, line: LogLine },
    History(Arc<HistoryEntry>),
    Flush(SyncSender<()>),
}

/// Writes log lines. Cheap to clone; all clones write through one thread, in order.
#[derive(Clone, Debug)]
pub struct Journal {
    var: PathBuf,
    queue: SyncSender<Order>,
    dropped: Arc<AtomicU64>,
}

impl Journal {
    /// Starts the writer for the logs under `var`.
    ///
    /// # Errors
    /// If the thread cannot be started. That a file cannot be written is found out later and told by `tracing`.
    pub fn start(var: &Path) -> io::Result<Self> {
        let (queue, orders) = mpsc::sync_channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let counter = dropped.clone();
        thread::Builder::new().name("journal".to_owned()).spawn({
            let history = var.join(history::FILE);
            move || write_all(&orders, &counter, &history)
        })?;
        Ok(Self {
            var: var.to_owned(),
            queue,
            dropped,
        })
    }

    /// Adds a line to the log of `module`. `level` is one of [`farm_core::module::logline::LEVELS`].
    pub fn write(&self, module: &ModuleName, origin: &str, level: char, text: &str) {
        emit(module, origin, level, text);
        self.push(Order::Line {
            path: log_path(&self.var, module),
            line: line(origin, level, text),
        });
    }

    /// Adds an entry to the history on the disk.
    pub fn record(&self, entry: Arc<HistoryEntry>) {
        self.push(Order::History(entry));
    }

    /// Adds a line to the audit: `who` asked for `what`, and how it ended.
    pub fn audit(&self, who: &str, what: &str, result: Result<&str, &str>) {
        let text = match result {
            Ok(reached) => format!("{what}: {reached}"),
            Err(error) => format!("{what}: failed: {error}"),
        };
        tracing::info!(target: "audit", who, "{text}");
        self.push(Order::Line {
            path: self.var.join("audit.log"),
            line: line(who, 'U', &text),
        });
    }

    /// Waits until all lines so far are in their files, at most `limit`. True if they are.
    pub fn flush(&self, limit: Duration) -> bool {
        let (done, wait) = mpsc::sync_channel(1);
        self.queue.try_send(Order::Flush(done)).is_ok() && wait.recv_timeout(limit).is_ok()
    }

    /// Lines dropped so far because the disk was too slow.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn push(&self, order: Order) {
        match self.queue.try_send(order) {
            Ok(()) => {}
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Where the log of `module` is.
pub fn log_path(var: &Path, module: &ModuleName) -> PathBuf {
    store::module_dir(var, module).join("module.log")
}

fn line(origin: &str, level: char, text: &str) -> LogLine {
    LogLine {
        time: chrono::Local::now().format("%Y-%m-%d %H:%M:%S%.6f").to_string(),
        origin: origin.to_owned(),
        level,
        text: text.to_owned(),
    }
}

fn emit(module: &ModuleName, origin: &str, level: char, text: &str) {
    match level {
        'C' => tracing::error!(target: "module", %module, origin, "{text}"),
        'D' => tracing::debug!(target: "module", %module, origin, "{text}"),
        _ => tracing::info!(target: "module", %module, origin, "{text}"),
    }
}

/// The thread: ends when the last [`Journal`] is gone.
fn write_all(orders: &Receiver<Order>, dropped: &AtomicU64, history: &Path) {
    let mut told = 0;
    let mut failing = false;
    for order in orders {
        match order {
            Order::Line { path, line: entry } => {
                let lost = dropped.load(Ordering::Relaxed);
                let result = append(&path, &entry, MAX_LOG).and_then(|()| {
                    if lost == told {
                        return Ok(());
                    }
                    let text = format!("{} lines were lost, the disk was too slow", lost - told);
                    append(&path, &line("journal", 'E', &text), MAX_LOG)
                });
                match result {
                    Ok(()) => (told, failing) = (lost, false),
                    // Once, not for every line: the lines themselves are in the trace.
                    Err(error) if !failing => {
                        tracing::error!(path = %path.display(), %error, "log cannot be written");
                        failing = true;
                    }
                    Err(_) => {}
                }
            }
            Order::History(entry) => {
                if let Err(error) = history::append(history, &entry, history::MAX_FILE) {
                    // One entry a change of the farm, so this cannot flood.
                    tracing::error!(path = %history.display(), %error, "the history cannot be written");
                }
            }
            // Who asked may have stopped waiting.
            Order::Flush(done) => drop(done.try_send(())),
        }
    }
}

fn append(path: &Path, line: &LogLine, limit: u64) -> io::Result<()> {
    append_text(path, format!("{line}\n"), limit)
}

/// Adds `text`, whole lines, to `path`; a file that has `limit` bytes becomes `….1` first.
pub(crate) fn append_text(path: &Path, text: String, limit: u64) -> io::Result<()> {
    let mut file = open(path)?;
    if file.metadata()?.len() >= limit {
        fs::rename(path, older(path))?;
        file = open(path)?;
    }
    // One write, so that a reader never sees half a line.
    file.write_all(text.as_bytes())
}

/// The name of the file before `path`.
pub(crate) fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Opened anew for each line: a module may be uninstalled and installed again, and a log may be moved away by hand.
fn open(path: &Path) -> io::Result<File> {
    let open = || OpenOptions::new().append(true).create(true).mode(0o640).open(path);
    match open() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            open()
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use farm_core::module::logline::parse_line;

    use super::*;
    use crate::scratch::Scratch;

    const LIMIT: Duration = Duration::from_secs(10);

    fn module() -> ModuleName {
        "web".parse().unwrap()
    }

    fn read(path: &Path) -> Vec<LogLine> {
        let text = fs::read_to_string(path).unwrap();
        text.lines().map(|line| parse_line(line).unwrap()).collect()
    }

    #[test]
    fn lines_are_kept_in_order_and_read_back() {
        let scratch = Scratch::new("journal");
        let journal = Journal::start(scratch.path()).unwrap();
        for i in 0..100 {
            journal.write(&module(), "farmd", 'E', &format!("line {i}\nwith two\x1b lines"));
        }
        assert!(journal.flush(LIMIT));
        let lines = read(&log_path(scratch.path(), &module()));
        assert_eq!(lines.len(), 100);
        assert_eq!(lines[99].text, "line 99\\nwith two\\u{1b} lines");
        assert_eq!((lines[0].origin.as_str(), lines[0].level), ("farmd", 'E'));
        assert!(lines.windows(2).all(|pair| pair[0].time <= pair[1].time));
        assert_eq!(journal.dropped(), 0);
    }

    #[test]
    fn commands_are_audited_with_who_what_and_result() {
        let scratch = Scratch::new("audit");
        let journal = Journal::start(scratch.path()).unwrap();
        journal.audit("admin", "web start", Ok("UP Ready"));
        journal.audit("eve|x", "web stop", Err("no"));
        assert!(journal.flush(LIMIT));
        let lines = read(&scratch.path().join("audit.log"));
        let shown: Vec<String> = lines
            .iter()
            .map(|l| format!("{} {} {}", l.origin, l.level, l.text))
            .collect();
        assert_eq!(shown, ["admin U web start: UP Ready", "eve/x U web stop: failed: no"]);
    }

    #[test]
    fn a_full_file_is_put_aside_and_one_older_is_kept() {
        let scratch = Scratch::new("rotate");
        let path = scratch.path().join("deep/module.log");
        for i in 0..30 {
            append(&path, &line("farmd", 'I', &format!("line {i:02}")), 300).unwrap();
        }
        let older = super::older(&path);
        let files = fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(files, 2);
        assert!(fs::metadata(&path).unwrap().len() <= 400 && fs::metadata(&older).unwrap().len() <= 400);
        let texts: Vec<String> = read(&older).into_iter().chain(read(&path)).map(|l| l.text).collect();
        let first = 30 - texts.len();
        let expected: Vec<String> = (first..30).map(|i| format!("line {i:02}")).collect();
        assert_eq!(texts, expected, "nothing is missing at the seam");
    }

    #[test]
    fn a_log_that_cannot_be_written_stops_nobody() {
        let scratch = Scratch::new("unwritable");
        fs::write(scratch.path().join("modules"), "a file where a folder should be").unwrap();
        let journal = Journal::start(scratch.path()).unwrap();
        journal.write(&module(), "farmd", 'E', "lost");
        journal.audit("admin", "web start", Ok("UP Ready"));
        assert!(journal.flush(LIMIT));
        assert_eq!(
            read(&scratch.path().join("audit.log")).len(),
            1,
            "other files are still written"
        );
    }
}
