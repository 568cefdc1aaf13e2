//! `farm log`: the module log and the scripts' output, read from the files so that it works when farmd is dead.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use farm_core::api::exit;
use farm_core::module::logline::{LogLine, escape, parse_line};
use serde_json::{Value, json};

use crate::args::LogArgs;
use crate::failure::Failure;
use crate::folders::Context;
use crate::terminal::{Paint, Style, Table, show, show_json};

/// Time between two looks at a followed file.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A file is read backwards in pieces of this size until enough lines are there.
const PIECE: u64 = 64 * 1024;

/// Runs `farm log`.
pub fn run(context: &Context, args: &LogArgs) -> Result<u8, Failure> {
    let module = context.module(args.module.as_deref())?;
    let folder = context.kept(&module);
    if !folder.is_dir() {
        return Err(Failure::new(
            exit::NOT_FOUND,
            format!("{module} has never been configured here: no {}", folder.display()),
        ));
    }
    let style = Style::of_stdout();
    let all = args.list.then(String::new);
    let Some(script) = args.script.as_ref().or(all.as_ref()) else {
        let show_line = |line: &str| module_line(line, style, args.verbose, context.json);
        return show_file(&folder.join("module.log"), args, context.json, show_line);
    };
    let mut outputs = script_outputs(&folder).map_err(|e| Failure::file("read", &folder, &e))?;
    outputs.retain(|output| script.is_empty() || output.script == *script);
    if args.list {
        return list(&outputs, context.json, style);
    }
    let Some(newest) = outputs.last() else {
        let which = if script.is_empty() {
            "a script".to_owned()
        } else {
            format!("`{script}`")
        };
        return Err(Failure::new(
            exit::NOT_FOUND,
            format!("no output of {which} is kept in {}", folder.display()),
        ));
    };
    if !context.json {
        show(&style.paint(Paint::Dim, &format!("==> {} <==", newest.path.display())))?;
        show("\n")?;
    }
    let show_line = |line: &str| {
        Some(if context.json {
            json!(line).to_string()
        } else {
            visible(line)
        })
    };
    show_file(&newest.path, args, context.json, show_line)
}

/// Shows the last lines of `path`, then with `-f` what is added, until interrupted.
///
/// As JSON the lines are one array; with `-f` one document per line, because an array would never end.
fn show_file(
    path: &Path,
    args: &LogArgs,
    json: bool,
    show_line: impl Fn(&str) -> Option<String>,
) -> Result<u8, Failure> {
    let read = |e: io::Error| Failure::file("read", path, &e);
    let mut tail = match Tail::open(path) {
        Ok(tail) => tail,
        Err(e) if e.kind() == io::ErrorKind::NotFound && args.follow => Tail::missing(path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(Failure::new(
                exit::NOT_FOUND,
                format!("nothing has been logged yet: no {}", path.display()),
            ));
        }
        Err(e) => return Err(read(e)),
    };
    let shown = |text: &str| text.lines().filter_map(&show_line).collect::<Vec<_>>();
    let mut text = tail
        .last_lines(args.lines, &|line| show_line(line).is_some())
        .map_err(read)?;
    if !args.follow {
        text.push_str(&String::from_utf8_lossy(&tail.begun));
    }
    let mut lines = shown(&text);
    lines.drain(..lines.len().saturating_sub(args.lines));
    if json && !args.follow {
        show(&format!("[{}]\n", lines.join(",")))?;
    } else {
        show_lines(&lines)?;
    }
    if !args.follow {
        return Ok(exit::OK);
    }
    loop {
        std::thread::sleep(LOOK_EVERY);
        show_lines(&shown(&tail.added().map_err(read)?))?;
    }
}

fn show_lines(lines: &[String]) -> io::Result<()> {
    if lines.is_empty() {
        Ok(())
    } else {
        show(&(lines.join("\n") + "\n"))
    }
}

/// A file that grows, may be cut, and may be replaced by a new one of the same name.
struct Tail {
    path: PathBuf,
    file: Option<File>,
    at: u64,
    /// The beginning of a line whose end is not written yet.
    begun: Vec<u8>,
}

impl Tail {
    fn open(path: &Path) -> io::Result<Self> {
        Ok(Self {
            file: Some(File::open(path)?),
            ..Self::missing(path)
        })
    }

    fn missing(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            file: None,
            at: 0,
            begun: Vec::new(),
        }
    }

    /// The end of the file, from so far back that it holds at least `count` lines that `counts` accepts.
    fn last_lines(&mut self, count: usize, counts: &dyn Fn(&str) -> bool) -> io::Result<String> {
        let Some(file) = &mut self.file else {
            return Ok(String::new());
        };
        let end = file.metadata()?.len();
        let mut from = end;
        let mut bytes = Vec::new();
        loop {
            let start = from.saturating_sub(PIECE);
            let mut piece = vec![0; usize::try_from(from - start).unwrap_or_default()];
            file.seek(SeekFrom::Start(start))?;
            file.read_exact(&mut piece)?;
            piece.extend_from_slice(&bytes);
            (bytes, from) = (piece, start);
            // The first line may have begun before the piece, so it is counted only at the beginning of the file.
            let whole = if from == 0 {
                0
            } else {
                bytes.iter().position(|b| *b == b'\n').map_or(bytes.len(), |at| at + 1)
            };
            let text = String::from_utf8_lossy(&bytes[whole..]);
            if from == 0 || text.lines().filter(|line| counts(line)).count() >= count {
                let text = text.into_owned();
                self.at = end;
                return Ok(self.complete(text.as_bytes()));
            }
        }
    }

    /// What was added since the last look, up to the last line end.
    fn added(&mut self) -> io::Result<String> {
        let present = match std::fs::metadata(&self.path) {
            Ok(present) => Some(present),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        let mut bytes = Vec::new();
        if let Some(file) = &mut self.file {
            let open = file.metadata()?;
            if open.len() < self.at {
                (self.at, self.begun) = (0, Vec::new());
            }
            self.at += read_from(file, self.at, &mut bytes)?;
            // What the old file still got is read above, then the new one follows.
            if present
                .as_ref()
                .is_some_and(|p| (p.dev(), p.ino()) != (open.dev(), open.ino()))
            {
                self.file = None;
                bytes.push(b'\n');
            }
        }
        if self.file.is_none() && present.is_some() {
            let mut file = File::open(&self.path)?;
            self.at = read_from(&mut file, 0, &mut bytes)?;
            self.file = Some(file);
        }
        Ok(self.complete(&bytes))
    }

    /// `bytes` after what was begun, without the line that is not complete yet.
    fn complete(&mut self, bytes: &[u8]) -> String {
        self.begun.extend_from_slice(bytes);
        let end = self.begun.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        let rest = self.begun.split_off(end);
        let lines = std::mem::replace(&mut self.begun, rest);
        String::from_utf8_lossy(&lines).into_owned()
    }
}

fn read_from(file: &mut File, at: u64, bytes: &mut Vec<u8>) -> io::Result<u64> {
    file.seek(SeekFrom::Start(at))?;
    Ok(file.read_to_end(bytes)? as u64)
}

/// One line of a module log as it is shown; `None` for an empty line, and for a debug line unless `verbose`.
fn module_line(line: &str, style: Style, verbose: bool, json: bool) -> Option<String> {
    if line.is_empty() {
        return None;
    }
    let parsed = parse_line(line);
    if parsed.as_ref().is_ok_and(|line| line.level == 'D') && !verbose {
        return None;
    }
    Some(match (parsed, json) {
        (Ok(line), true) => line_json(&line).to_string(),
        (Err(_), true) => json!({ "text": line }).to_string(),
        (Ok(parsed), false) => style.paint(paint_of(parsed.level), &visible(line)),
        (Err(_), false) => visible(line),
    })
}

fn line_json(line: &LogLine) -> Value {
    json!({ "time": line.time, "origin": line.origin, "level": line.level, "text": line.text })
}

fn paint_of(level: char) -> Paint {
    match level {
        'C' => Paint::Bad,
        'E' => Paint::Bold,
        'U' => Paint::Moving,
        'S' => Paint::Notice,
        'D' => Paint::Dim,
        _ => Paint::Plain,
    }
}

/// `line` without what would act on a terminal; tabs stay.
fn visible(line: &str) -> String {
    line.split('\t').map(escape).collect::<Vec<_>>().join("\t")
}

/// One file of script output.
#[derive(Debug, PartialEq)]
struct ScriptOutput {
    changed: SystemTime,
    path: PathBuf,
    script: String,
    bytes: u64,
}

/// Files `userlog_<time>_<script>.ulog` in `folder`, oldest first.
fn script_outputs(folder: &Path) -> io::Result<Vec<ScriptOutput>> {
    let mut outputs = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(script) = name.to_str().and_then(script_of) else {
            continue;
        };
        let data = entry.metadata()?;
        if data.is_file() {
            outputs.push(ScriptOutput {
                changed: data.modified()?,
                path: entry.path(),
                script: script.to_owned(),
                bytes: data.len(),
            });
        }
    }
    outputs.sort_by(|a, b| (a.changed, &a.path).cmp(&(b.changed, &b.path)));
    Ok(outputs)
}

/// The script's name in `userlog_2026_11_21T053100_start_both.ulog`, or in `…_start_both_2.ulog` for a second run in one second.
fn script_of(name: &str) -> Option<&str> {
    let (_, rest) = name.strip_prefix("userlog_")?.strip_suffix(".ulog")?.split_once('T')?;
    let (_, script) = rest.split_once('_')?;
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    Some(
        script
            .rsplit_once('_')
            .filter(|(_, end)| number(end))
            .map_or(script, |(script, _)| script),
    )
}

fn list(outputs: &[ScriptOutput], json: bool, style: Style) -> Result<u8, Failure> {
    if json {
        let files: Vec<Value> = outputs
            .iter()
            .map(|o| json!({ "file": o.path.display().to_string(), "script": o.script, "bytes": o.bytes }))
            .collect();
        show_json(&files)?;
        return Ok(exit::OK);
    }
    let mut table = Table::new(["SCRIPT", "BYTES", "FILE"]);
    for output in outputs {
        table.row([
            output.script.as_str().into(),
            output.bytes.to_string().into(),
            output.path.display().to_string().into(),
        ]);
    }
    show(&table.render(style, ""))?;
    Ok(exit::OK)
}

#[cfg(test)]
mod tests;
