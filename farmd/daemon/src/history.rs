//! The history of this node: its newest entries in memory, and `VAR/history.jsonl` on the disk.
//!
//! Owns the numbers of the entries and the ring that questions are answered from; both belong to the owner loop. The file is
//! written by the journal's thread ([`Journal::record`]) and read once, at start. It decides nothing about what is worth an entry: `node/history.rs` does.

use std::collections::VecDeque;
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;

use farm_core::api::history::{HISTORY_LIMIT, Happening, HistoryEntry, HistoryFilter};

use serde::{Serialize, Serializer};

use crate::journal::{self, Journal};

/// File in VAR, one JSON object per line; with `.1` behind it the one before.
pub const FILE: &str = "history.jsonl";

/// The file becomes `….1` at this size: with entries of some 400 bytes, two hold more than the ring does.
pub const MAX_FILE: u64 = 4 << 20;

/// See the module doc.
#[derive(Debug)]
pub struct History {
    entries: VecDeque<Arc<HistoryEntry>>,
    newest: u64,
    journal: Journal,
}

impl History {
    /// Goes on where the files under `var` end. Lines that are no entries (one torn by a power cut) are left out; their number, and what
    /// could not be read, is told in the second value.
    pub fn load(var: &Path, journal: Journal) -> (Self, Vec<String>) {
        let path = var.join(FILE);
        let mut entries = VecDeque::new();
        let mut problems = Vec::new();
        for path in [journal::older(&path), path.clone()] {
            let text = match fs::read(&path) {
                Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    problems.push(format!("{}: {error}", path.display()));
                    continue;
                }
            };
            let mut broken = 0_usize;
            for line in text.lines().filter(|line| !line.is_empty()) {
                match serde_json::from_str(line) {
                    Ok(entry) => entries.push_back(Arc::new(entry)),
                    Err(_) => broken += 1,
                }
            }
            if broken > 0 {
                problems.push(format!("{}: {broken} lines are no entries", path.display()));
            }
        }
        if let Err(error) = end_torn_line(&path) {
            problems.push(format!("{}: {error}", path.display()));
        }
        entries.drain(..entries.len().saturating_sub(HISTORY_LIMIT));
        let newest = entries.iter().map(|entry: &Arc<HistoryEntry>| entry.seq).max();
        let history = Self {
            entries,
            newest: newest.unwrap_or(0),
            journal,
        };
        (history, problems)
    }

    /// True if the run before ended as asked, false if not; `None` if there was none.
    pub fn last_ended_in_order(&self) -> Option<bool> {
        let newest = self.entries.back()?;
        Some(matches!(newest.what, Happening::Stopped { .. }))
    }

    /// Who had farmd restarted in place, if the run before ended so.
    pub fn last_reload_by(&self) -> Option<String> {
        match &self.entries.back()?.what {
            Happening::Stopped { by, reload: true } => Some(by.clone()),
            _ => None,
        }
    }

    /// Adds an entry with the next number.
    pub fn push(&mut self, mut entry: HistoryEntry) {
        self.newest += 1;
        entry.seq = self.newest;
        let entry = Arc::new(entry);
        self.journal.record(Arc::clone(&entry));
        if self.entries.len() == HISTORY_LIMIT {
            self.entries.pop_front();
        }
        self.entries.push_back(entry);
    }

    /// Number of the newest entry, 0 if there is none.
    pub fn newest(&self) -> u64 {
        self.newest
    }

    /// The entry with number `seq`, while it is in memory.
    pub fn entry(&self, seq: u64) -> Option<Arc<HistoryEntry>> {
        let position = self.entries.partition_point(|entry| entry.seq < seq);
        self.entries
            .get(position)
            .filter(|entry| entry.seq == seq)
            .map(Arc::clone)
    }

    /// The entries that `filter` asks for, as an answer of node `node`.
    pub fn select(&self, node: &str, filter: &HistoryFilter) -> Selection {
        Selection {
            node: node.to_owned(),
            newest: self.newest,
            entries: filter.select(self.entries.iter()).into_iter().map(Arc::clone).collect(),
        }
    }
}

/// What [`farm_core::api::history::History`] is made of, with shared entries: they become text in the task that answers, not in the owner
/// loop.
#[derive(Debug, Serialize)]
pub struct Selection {
    node: String,
    newest: u64,
    #[serde(serialize_with = "unshared")]
    entries: Vec<Arc<HistoryEntry>>,
}

fn unshared<S: Serializer>(entries: &[Arc<HistoryEntry>], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(entries.iter().map(Arc::as_ref))
}

/// Adds `entry` to the file at `path`. Called by the journal's thread.
pub(crate) fn append(path: &Path, entry: &HistoryEntry, limit: u64) -> io::Result<()> {
    let line = serde_json::to_string(entry).map_err(io::Error::other)?;
    journal::append_text(path, line + "\n", limit)
}

/// A line that a power cut has left without its end must not swallow the next one.
fn end_torn_line(path: &Path) -> io::Result<()> {
    let torn = match fs::read(path) {
        Ok(bytes) => bytes.last().is_some_and(|last| *last != b'\n'),
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => return Err(error),
    };
    if torn {
        OpenOptions::new().append(true).open(path)?.write_all(b"\n")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::scratch::Scratch;

    const LIMIT: Duration = Duration::from_secs(10);

    fn entry(text: &str) -> HistoryEntry {
        HistoryEntry {
            seq: 0,
            time: "2026-11-21 05:31:00.123456".to_owned(),
            unix_us: 5,
            module: None,
            what: Happening::Stopped {
                by: text.to_owned(),
                reload: false,
            },
        }
    }

    fn all(history: &History) -> Vec<(u64, String)> {
        let told = |e: &Arc<HistoryEntry>| match &e.what {
            Happening::Stopped { by, .. } => (e.seq, by.clone()),
            other => panic!("{other:?}"),
        };
        let selection = history.select("s1", &HistoryFilter::default());
        assert_eq!(selection.newest, history.newest);
        selection.entries.iter().map(told).collect()
    }

    #[test]
    fn a_restart_goes_on_with_the_entries_and_the_numbers() {
        let var = Scratch::new("history");
        let journal = Journal::start(var.path()).unwrap();
        let (mut history, problems) = History::load(var.path(), journal.clone());
        assert_eq!(
            (history.newest, history.last_ended_in_order(), problems),
            (0, None, vec![])
        );
        for i in 0..5 {
            history.push(entry(&i.to_string()));
        }
        assert!(journal.flush(LIMIT));
        let (mut again, problems) = History::load(var.path(), journal);
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!(all(&again), all(&history));
        assert_eq!(again.last_ended_in_order(), Some(true));
        again.push(entry("5"));
        assert_eq!(all(&again).last(), Some(&(6, "5".to_owned())));
    }

    #[test]
    fn a_torn_last_line_costs_that_entry_only() {
        let var = Scratch::new("history-torn");
        let path = var.path().join(FILE);
        append(&path, &entry("whole"), MAX_FILE).unwrap();
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"seq\":1,\"ti")
            .unwrap();
        let journal = Journal::start(var.path()).unwrap();
        let (mut history, problems) = History::load(var.path(), journal.clone());
        assert_eq!(all(&history).len(), 1);
        assert_eq!(problems.len(), 1, "{problems:?}");
        history.push(entry("next"));
        assert!(journal.flush(LIMIT));
        let (again, _) = History::load(var.path(), journal);
        let texts: Vec<String> = all(&again).into_iter().map(|(_, text)| text).collect();
        assert_eq!(texts, ["whole", "next"]);
    }

    #[test]
    fn the_disk_and_the_memory_are_bounded() {
        let var = Scratch::new("history-bound");
        let path = var.path().join(FILE);
        for i in 0..100 {
            append(&path, &entry(&i.to_string()), 1000).unwrap();
        }
        let sizes: Vec<u64> = fs::read_dir(var.path())
            .unwrap()
            .map(|f| f.unwrap().metadata().unwrap().len())
            .collect();
        assert!(sizes.len() == 2 && sizes.iter().all(|s| *s < 1200), "{sizes:?}");

        let journal = Journal::start(var.path()).unwrap();
        let (mut history, _) = History::load(var.path(), journal);
        for i in 0..HISTORY_LIMIT + 10 {
            history.push(entry(&i.to_string()));
        }
        assert_eq!(all(&history).len(), HISTORY_LIMIT);
    }
}
