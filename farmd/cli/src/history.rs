//! `farm history`: what happened to the farm, as this node saw it.
//!
//! Asks farmd; when it is not running, reads the files it has left, so that the last thing before the end can be seen too. The words of an entry are
//! [`farm_core::api::history_text`]'s; here they are laid out.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use chrono::{DateTime, Local, NaiveDate, NaiveDateTime, NaiveTime, TimeZone};
use farm_core::api::exit;
use farm_core::api::history::{HISTORY_LIMIT, History, HistoryEntry, HistoryFilter};
use farm_core::api::history_text::Weight;
use farm_core::id::ModuleName;
use farm_core::module::logline::escape;

use crate::args::HistoryArgs;
use crate::client::{Client, ClientError};
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{Paint, Style, show, wrap};

/// Entries shown if neither a number nor a moment is named.
const LAST: usize = 100;
/// Time between two looks with `--follow`.
const LOOK_EVERY: Duration = Duration::from_millis(300);
/// Where the text of an entry begins: behind `03:12:07.412 FENCED `.
const HANG: usize = 20;

/// Runs `farm history`.
pub fn run(context: &Context, args: &HistoryArgs) -> Result<u8, Failure> {
    let module = match &args.module {
        Some(_) => context.module_if_any(args.module.as_deref())?,
        None => context.module.as_deref().map(crate::folders::module_name).transpose()?,
    };
    let since_us = match &args.since {
        Some(text) => Some(moment(text, &Local::now()).ok_or_else(|| {
            Failure::usage(format!(
                "`{text}` is no moment: 90s, 10m, 2h or 3d (ago), 03:10, 2026-11-21 or \"2026-11-21 03:10\" is expected"
            ))
        })?),
        None => None,
    };
    let last = args.lines.or_else(|| since_us.is_none().then_some(LAST));
    let mut filter = HistoryFilter {
        module: module.as_ref().map(ToString::to_string),
        since_us,
        after: None,
        last,
    };
    let client = Client::new(context)?;
    let history = match client.get(&path(&filter)) {
        Ok(history) => history,
        Err(ClientError::NotRunning { .. }) if !args.follow => {
            eprintln!("farm: farmd is not running; read from {}", context.var.display());
            of_files(&context.var, &filter)?
        }
        Err(error) => return Err(error.into()),
    };
    if let Some(module) = &module
        && !is_known(context, &client, module, &history)
    {
        let text = format!("no node has a module `{module}`, and nothing is known of one");
        return Err(Failure::new(exit::NOT_FOUND, text));
    }
    let mut page = Page::new(Style::of_stdout(), args.verbose);
    if context.json && !args.follow {
        show(&format!("{}\n", json(&history.entries)?))?;
        return Ok(exit::OK);
    }
    if history.entries.is_empty() && !args.follow {
        show(&nothing(module.as_ref(), args))?;
        return Ok(exit::OK);
    }
    let mut present = |entries: &[HistoryEntry]| -> Result<(), Failure> {
        for entry in entries {
            if context.json {
                show(&format!("{}\n", json(entry)?))?;
            } else {
                show(&page.entry(entry))?;
            }
        }
        Ok(())
    };
    present(&history.entries)?;
    if !args.follow {
        return Ok(exit::OK);
    }
    let mut newest = history.newest;
    (filter.since_us, filter.last) = (None, None);
    loop {
        std::thread::sleep(LOOK_EVERY);
        filter.after = Some(newest);
        match client.get::<History>(&path(&filter)) {
            Ok(more) => {
                present(&more.entries)?;
                // Lower if farmd was killed before its newest entries were on the disk.
                newest = more.newest;
            }
            // It may be restarting; its history goes on.
            Err(ClientError::NotRunning { .. } | ClientError::NoAnswer { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether there is, or was, such a module: something has happened to it, a node has it, or its folder is kept here.
fn is_known(context: &Context, client: &Client, module: &ModuleName, history: &History) -> bool {
    let kept = || context.node.is_none() && context.kept(module).is_dir();
    let told = || {
        client
            .status()
            .is_ok_and(|s| s.modules.iter().any(|m| m.name == module.as_str()))
    };
    let entries = &history.entries;
    entries.iter().any(|e| e.module.as_deref() == Some(module.as_str())) || kept() || told()
}

fn json(value: &(impl serde::Serialize + ?Sized)) -> io::Result<String> {
    serde_json::to_string(value).map_err(io::Error::other)
}

fn nothing(module: Option<&ModuleName>, args: &HistoryArgs) -> String {
    let about = module.map_or_else(String::new, |module| format!(" about {module} or nodes"));
    let since = args
        .since
        .as_ref()
        .map_or_else(String::new, |since| format!(" since {since}"));
    format!("nothing has happened{about}{since}\n")
}

/// The question to farmd.
fn path(filter: &HistoryFilter) -> String {
    let words = [
        filter.last.map(|n| format!("n={}", n.min(HISTORY_LIMIT))),
        filter.since_us.map(|us| format!("since={us}")),
        filter.after.map(|seq| format!("after={seq}")),
        filter.module.as_ref().map(|module| format!("module={module}")),
    ];
    format!(
        "/v1/history?{}",
        words.into_iter().flatten().collect::<Vec<_>>().join("&")
    )
}

/// What a farmd that is not running has left. Lines that are no entries, one torn by a power cut for instance, are left out.
fn of_files(var: &Path, filter: &HistoryFilter) -> Result<History, Failure> {
    let mut entries: Vec<HistoryEntry> = Vec::new();
    for name in ["history.jsonl.1", "history.jsonl"] {
        let path: PathBuf = var.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => {
                let text = String::from_utf8_lossy(&bytes);
                entries.extend(text.lines().filter_map(|line| serde_json::from_str(line).ok()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::file("read", &path, &error)),
        }
    }
    Ok(History {
        node: String::new(),
        newest: entries.last().map_or(0, |entry| entry.seq),
        entries: filter.select(entries.iter()).into_iter().cloned().collect(),
    })
}

/// A moment as people name it, in microseconds since 1970; `None` if it is none.
fn moment<Z: TimeZone>(text: &str, now: &DateTime<Z>) -> Option<u64> {
    let us = |at: DateTime<Z>| u64::try_from(at.timestamp_micros()).ok();
    let text = text.trim();
    if let Some(ago) = ago(text) {
        return us(now.clone()).map(|now| now.saturating_sub(ago));
    }
    let local = |at: NaiveDateTime| now.timezone().from_local_datetime(&at).earliest().and_then(us);
    if let Some(at) = ["%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M"]
        .iter()
        .find_map(|form| NaiveDateTime::parse_from_str(&text.replacen('T', " ", 1), form).ok())
    {
        return local(at);
    }
    if let Ok(date) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
        return local(date.and_time(NaiveTime::MIN));
    }
    let time = ["%H:%M:%S%.f", "%H:%M"]
        .iter()
        .find_map(|form| NaiveTime::parse_from_str(text, form).ok())?;
    // The last time the clock showed it.
    let today = now.naive_local();
    let date = if time <= today.time() {
        today.date()
    } else {
        today.date().pred_opt()?
    };
    local(date.and_time(time))
}

/// `90s`, `10m`, `2h`, `3d` in microseconds.
fn ago(text: &str) -> Option<u64> {
    let unit = match text.chars().last()? {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return None,
    };
    let number: u64 = text[..text.len() - 1].parse().ok()?;
    number.checked_mul(unit * 1_000_000)
}

/// Lays entries out one below the other, with a line for each new day.
struct Page {
    style: Style,
    verbose: bool,
    day: String,
}

impl Page {
    fn new(style: Style, verbose: bool) -> Self {
        Self {
            style,
            verbose,
            day: String::new(),
        }
    }

    /// The lines of one entry.
    fn entry(&mut self, entry: &HistoryEntry) -> String {
        let mut text = String::new();
        let (day, time) = entry.time.split_once(' ').unwrap_or(("", &entry.time));
        if day != self.day {
            day.clone_into(&mut self.day);
            text.push_str(&self.style.paint(Paint::Dim, &escape(day)));
            text.push('\n');
        }
        // Milliseconds: what is nearer belongs to one and the same event.
        let time: String = escape(time).chars().take(12).collect();
        let (tag, weight) = entry.tag();
        let paint = match weight {
            Weight::Notice => Paint::Notice,
            Weight::Good => Paint::Good,
            Weight::Change => Paint::Bold,
            Weight::Bad => Paint::Bad,
        };
        let tag = self.style.paint(paint, &format!("{tag:<6}"));
        let lines = self.lines(&entry.summary(), 0);
        text.push_str(&format!(
            "{time:<12} {tag} {}\n",
            lines.join(&format!("\n{}", " ".repeat(HANG)))
        ));
        if self.verbose {
            for detail in entry.details() {
                for line in self.lines(&detail, 2) {
                    let line = self.style.paint(Paint::Dim, &line);
                    text.push_str(&format!("{}{line}\n", " ".repeat(HANG + 2)));
                }
            }
        }
        text
    }

    fn lines(&self, text: &str, further: usize) -> Vec<String> {
        let text = escape(text);
        match self.style.width {
            Some(width) => wrap(&text, width.saturating_sub(HANG + further)),
            None => vec![text],
        }
    }
}

#[cfg(test)]
mod tests {
    use chrono::FixedOffset;
    use farm_core::api::history::Happening;

    use super::*;
    use crate::folders::test::Folder;

    fn entry(seq: u64, time: &str, what: Happening) -> HistoryEntry {
        HistoryEntry {
            seq,
            time: time.to_owned(),
            unix_us: seq,
            module: None,
            what,
        }
    }

    #[test]
    fn moments_are_named_as_people_do() {
        let now = DateTime::parse_from_rfc3339("2026-11-21T03:12:07+01:00").unwrap();
        let at = |text: &str| moment::<FixedOffset>(text, &now);
        let us = |text: &str| u64::try_from(DateTime::parse_from_rfc3339(text).unwrap().timestamp_micros()).unwrap();
        assert_eq!(at("90s"), Some(us("2026-11-21T03:10:37+01:00")));
        assert_eq!(at("2h"), Some(us("2026-11-21T01:12:07+01:00")));
        assert_eq!(at("03:10"), Some(us("2026-11-21T03:10:00+01:00")));
        assert_eq!(
            at("22:00:30"),
            Some(us("2026-11-20T22:00:30+01:00")),
            "yesterday evening"
        );
        assert_eq!(at("2026-11-20"), Some(us("2026-11-20T00:00:00+01:00")));
        assert_eq!(at("2026-11-20 04:05"), Some(us("2026-11-20T04:05:00+01:00")));
        assert_eq!(at("2026-11-20T04:05:06.5"), Some(us("2026-11-20T04:05:06.5+01:00")));
        for wrong in ["", "h", "-3h", "yesterday", "25:00", "3 d", "2026-13-01", "ä"] {
            assert_eq!(at(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn an_entry_is_one_line_with_the_day_above_and_hangs_where_it_wraps() {
        let style = Style {
            width: Some(44),
            ..Style::PLAIN
        };
        let mut page = Page::new(style, false);
        let why = "2 of the nodes it hears do not hear it".to_owned();
        let fenced = Happening::Fenced {
            why,
            observers: vec!["s1".into(), "s2".into()],
        };
        assert_eq!(
            page.entry(&entry(1, "2026-11-21 03:12:07.412345", fenced.clone())),
            "2026-11-21\n03:12:07.412 FENCED this node has stepped\n                    out: 2 of the nodes it\n                    hears do not hear it\n"
        );
        let back = Happening::Unfenced { after_ms: Some(480) };
        let shown = page.entry(&entry(2, "2026-11-21 03:12:08.000000", back));
        assert!(shown.starts_with("03:12:08.000 BACK   this node"), "{shown}");
        let mut page = Page::new(Style::PLAIN, true);
        let shown = page.entry(&entry(3, "2026-11-22 03:12:07.412345", fenced));
        assert!(
            shown.contains("\n                      not heard by: s1 s2\n"),
            "{shown}"
        );
    }

    #[test]
    fn text_from_a_file_cannot_act_on_the_terminal() {
        let what = Happening::Asked {
            by: "eve\x1b[2J".to_owned(),
            what: "stop\nroot: start".to_owned(),
        };
        let shown = Page::new(Style::PLAIN, true).entry(&entry(1, "2026-11-21 03:12:07.412345", what));
        assert!(!shown.contains('\x1b') && shown.lines().count() == 2, "{shown}");
    }

    #[test]
    fn without_a_daemon_the_files_are_read_and_what_is_no_entry_is_left_out() {
        let folder = Folder::new("history-files");
        let line =
            |seq| serde_json::to_string(&entry(seq, "2026-11-21 03:12:07.412345", Happening::Readmitted)).unwrap();
        std::fs::write(folder.0.join("history.jsonl.1"), format!("{}\n{}\n", line(1), line(2))).unwrap();
        std::fs::write(folder.0.join("history.jsonl"), format!("{}\n{{\"seq\":4,\"ti", line(3))).unwrap();
        let filter = HistoryFilter {
            last: Some(2),
            ..HistoryFilter::default()
        };
        let history = of_files(&folder.0, &filter).unwrap();
        assert_eq!(history.entries.iter().map(|e| e.seq).collect::<Vec<_>>(), [2, 3]);
        assert_eq!(history.newest, 3);
    }
}
