//! The output of one run: from a pipe into a file of limited size.
//!
//! Owns the file and the pipe's reading end. A running script's job reads it, and goes on until the last process that
//! inherited the pipe has closed it. Never holds a script up: what does not fit is read and thrown away.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::SystemTime;

use farm_core::module::script::Script;
use tokio::net::unix::pipe;
use tokio::process::Command;

/// Output files kept per module.
pub const KEPT_LOGS: usize = 50;

/// Most that is read of the script's own output once it has ended: the pipe's content, and what a service adds meanwhile.
const LAST_READ: usize = 1 << 20;

/// Most bytes of the last line of output that are kept, and most characters of it that are told.
const LAST_LINE_BYTES: usize = 1024;
const LAST_LINE_CHARS: usize = 120;

/// Where one run's output goes.
pub(super) struct Output {
    /// None once it is full, cannot be written, or was not wanted.
    file: Option<File>,
    left: u64,
    limit: u64,
    pipe: Option<pipe::Receiver>,
    /// The newest bytes, also of what the file has no room for.
    tail: Vec<u8>,
}

impl Output {
    /// Output that goes to `file`, at most `limit_kb` of it, or nowhere.
    pub(super) fn new(file: Option<File>, limit_kb: u32) -> Self {
        let limit = u64::from(limit_kb) * 1024;
        Self {
            file,
            left: limit,
            limit,
            pipe: None,
            tail: Vec::new(),
        }
    }

    /// Makes standard output and error of `command` lead here. Must be called on a runtime.
    pub(super) fn attach(&mut self, command: &mut Command) -> io::Result<()> {
        if self.file.is_some() {
            let (reader, writer) = io::pipe()?;
            self.pipe = Some(pipe::Receiver::from_owned_fd(OwnedFd::from(reader))?);
            command.stdout(writer.try_clone()?).stderr(writer);
        } else {
            command.stdout(Stdio::null()).stderr(Stdio::null());
        }
        Ok(())
    }

    /// Copies what is there, waiting for it; for ever if the pipe is closed. May be cancelled at any time without loss.
    pub(super) async fn copy(&mut self) {
        let Some(pipe) = &mut self.pipe else {
            return std::future::pending().await;
        };
        if pipe.readable().await.is_err() {
            self.pipe = None;
        } else {
            self.read();
        }
    }

    /// Takes what the script had written before it ended, without waiting for more.
    pub(super) fn copy_rest(&mut self) {
        let mut taken = 0;
        while taken < LAST_READ {
            match self.read() {
                0 => return,
                n => taken += n,
            }
        }
    }

    /// The last line that is not empty, for a person: without control characters, and cut where it is long.
    pub(super) fn last_line(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.tail);
        let line = text.lines().map(str::trim).rfind(|line| !line.is_empty())?;
        let mut line: String = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        if let Some((end, _)) = line.char_indices().nth(LAST_LINE_CHARS) {
            line.truncate(end);
            line.push('…');
        }
        Some(line)
    }

    /// Reads for the services the script has left running, until the last one has closed the pipe.
    pub(super) async fn drain(mut self) {
        while self.pipe.is_some() {
            self.copy().await;
        }
    }

    /// One read without waiting; 0 if there was nothing. Lets go of the pipe at its end.
    fn read(&mut self) -> usize {
        let Some(pipe) = &mut self.pipe else { return 0 };
        let mut chunk = [0; 16 * 1024];
        match pipe.try_read(&mut chunk) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
            Ok(0) | Err(_) => {
                self.pipe = None;
                0
            }
            Ok(n) => {
                self.write(&chunk[..n]);
                n
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        self.tail.drain(..self.tail.len().saturating_sub(LAST_LINE_BYTES));
        let Some(file) = &mut self.file else { return };
        let fits = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
        self.left -= fits as u64;
        let full = fits < bytes.len();
        let mut result = file.write_all(&bytes[..fits]);
        if full {
            let limit = self.limit / 1024;
            let note = format!("\n[farm: the output is longer than {limit} KB, the rest is discarded]\n");
            result = result.and_then(|()| file.write_all(note.as_bytes()));
        }
        if let Err(error) = &result {
            tracing::warn!(%error, "script output cannot be written, the rest is discarded");
        }
        if full || result.is_err() {
            self.file = None;
        }
    }
}

/// `userlog_<yyyy_mm_dd>T<hhmmss>_<script>.ulog`, never one that exists: a second run in one second gets `_2` and so on.
pub(super) fn create_log(dir: &Path, script: Script) -> io::Result<(PathBuf, File)> {
    fs::create_dir_all(dir)?;
    let time = chrono::Local::now().format("%Y_%m_%dT%H%M%S");
    let stem = format!("userlog_{time}_{}", script.file_name());
    let mut number = 1;
    loop {
        let suffix = if number == 1 {
            String::new()
        } else {
            format!("_{number}")
        };
        let path = dir.join(format!("{stem}{suffix}.ulog"));
        match OpenOptions::new().append(true).create_new(true).mode(0o640).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && number < 10_000 => number += 1,
            Err(e) => return Err(e),
        }
    }
}

/// Removes the output files that were written to longest ago; problems are left to the next run.
pub(super) fn prune_logs(dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut logs: Vec<(Option<SystemTime>, OsString)> = entries
        .filter_map(Result::ok)
        .filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            name.starts_with("userlog_") && name.ends_with(".ulog")
        })
        .map(|entry| (entry.metadata().and_then(|m| m.modified()).ok(), entry.file_name()))
        .collect();
    logs.sort();
    for (_, name) in logs.iter().take(logs.len().saturating_sub(KEPT_LOGS)) {
        if let Err(error) = fs::remove_file(dir.join(name)) {
            tracing::debug!(file = %name.display(), %error, "old output not removed");
        }
    }
}
