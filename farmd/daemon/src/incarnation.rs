//! The number by which other nodes tell this run of farmd from the runs before.
//!
//! Owns `VAR/incarnation`. The number is the wall clock in microseconds, but never less than one more than the last: a clock that was set back would otherwise
//! make every heartbeat look like a replay of an older run. Called once at start, before anything is sent.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use farm_core::id::Incarnation;

/// File in VAR with the last number, decimal.
const FILE: &str = "incarnation";

/// The number of this run, noted for the next; `now` is the wall clock in microseconds since 1970.
///
/// A note that cannot be read or written is no reason not to serve: the number is then as good as the clock, and the warnings say so.
pub fn next(var: &Path, now: u64) -> (Incarnation, Vec<String>) {
    let path = var.join(FILE);
    let mut warnings = Vec::new();
    let advice = "other nodes refuse this one if the clock was set back since its last start";
    let after = read(&path).unwrap_or_else(|error| {
        warnings.push(format!("{}: {error}; {advice}", path.display()));
        0
    });
    let new = now.max(after).max(1);
    if let Err(error) = write(&path, new) {
        let text = format!(
            "{} cannot be written: {error}; at the next start {advice}",
            path.display()
        );
        warnings.push(text);
    }
    (Incarnation(new), warnings)
}

/// The least number that may come next; 0 without a note.
fn read(path: &Path) -> Result<u64, String> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error.to_string()),
    };
    let last: Option<u64> = text.trim().parse().ok();
    let next = last.and_then(|last| last.checked_add(1));
    next.ok_or_else(|| "expected one decimal number".to_owned())
}

/// Whole or not at all, and on the disk when it returns.
fn write(path: &Path, number: u64) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(format!("{number}\n").as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn numbers_follow_the_clock_and_never_go_back() {
        let var = Scratch::new("incarnation");
        let next = |now| next(var.path(), now);
        assert_eq!(next(1000), (Incarnation(1000), vec![]));
        assert_eq!(next(2000), (Incarnation(2000), vec![]));
        assert_eq!(next(5), (Incarnation(2001), vec![]), "the clock was set back");
        assert_eq!(next(2001), (Incarnation(2002), vec![]), "the same moment");
        assert_eq!(next(3000), (Incarnation(3000), vec![]));
        assert_eq!(fs::read_to_string(var.path().join(FILE)).unwrap(), "3000\n");
    }

    #[test]
    fn a_broken_note_is_told_and_replaced() {
        for broken in [&b""[..], b"-7", b"12 13", b"\xff\xfe", b"18446744073709551615"] {
            let var = Scratch::new("incarnation");
            fs::write(var.path().join(FILE), broken).unwrap();
            let (number, warnings) = next(var.path(), 1000);
            assert_eq!(number, Incarnation(1000), "{broken:?}");
            assert!(warnings.len() == 1 && warnings[0].contains(FILE), "{warnings:?}");
            assert_eq!(next(var.path(), 500), (Incarnation(1001), vec![]), "{broken:?}");
        }
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_told() {
        let var = Scratch::new("incarnation");
        let (number, warnings) = next(&var.path().join("missing"), 1000);
        assert_eq!(number, Incarnation(1000));
        assert!(
            warnings.len() == 1 && warnings[0].contains("cannot be written"),
            "{warnings:?}"
        );
    }
}
