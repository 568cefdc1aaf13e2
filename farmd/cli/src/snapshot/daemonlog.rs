//! The part of a snapshot that farmd itself has logged: under systemd that is in the journal.
//!
//! Runs `journalctl`, the one program a snapshot runs, and gives it some seconds; where it is not, or says nothing, a note says so.

use std::io;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::snapshot::bundle::Bundle;

/// Newest lines taken.
const LINES: &str = "5000";
/// How long the journal may take.
const LIMIT: Duration = Duration::from_secs(20);
/// Name of the entry.
const NAME: &str = "daemon/farmd.log";

/// Adds farmd's own log.
pub fn collect(bundle: &mut Bundle) {
    collect_from(bundle, "journalctl", LIMIT);
}

fn collect_from(bundle: &mut Bundle, program: &str, limit: Duration) {
    let mut command = Command::new(program);
    command.args([
        "--unit=farmd",
        "--lines",
        LINES,
        "--no-pager",
        "--output=short-iso-precise",
    ]);
    command.stdin(Stdio::null());
    let (sender, answer) = mpsc::channel();
    // One that hangs is left behind: this program ends soon.
    std::thread::spawn(move || sender.send(command.output()));
    match answer.recv_timeout(limit) {
        Ok(Ok(output)) if output.status.success() => bundle.add_text(NAME, &String::from_utf8_lossy(&output.stdout)),
        Ok(Ok(output)) => {
            let said = String::from_utf8_lossy(&output.stderr);
            bundle.note(NAME, &format!("{program} failed ({}): {}", output.status, said.trim()));
        }
        Ok(Err(error)) if error.kind() == io::ErrorKind::NotFound => {
            let note = format!("is left out: there is no {program} here; add what collects farmd's standard error");
            bundle.note(NAME, &note);
        }
        Ok(Err(error)) => bundle.note(NAME, &format!("{program} could not be run: {error}")),
        Err(_) => bundle.note(NAME, &format!("{program} did not answer within {} s", limit.as_secs())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::mask::Secrets;

    fn collected(program: &str, limit: Duration) -> (Option<String>, Vec<String>) {
        let mut bundle = Bundle::new(Secrets::default());
        collect_from(&mut bundle, program, limit);
        let (mut entries, notes) = bundle.finish();
        let log = entries.remove(NAME);
        (log.map(|log| String::from_utf8_lossy(&log).into_owned()), notes)
    }

    #[test]
    fn the_log_is_taken_and_what_is_not_there_is_noted() {
        let (log, notes) = collected("echo", LIMIT);
        assert!(log.is_some_and(|log| log.contains("--unit=farmd")) && notes.is_empty());
        let (log, notes) = collected("no-such-program-4711", LIMIT);
        assert!(
            log.is_none() && notes[0].contains("there is no no-such-program-4711"),
            "{notes:?}"
        );
        let (log, notes) = collected("false", LIMIT);
        assert!(log.is_none() && notes[0].contains("failed"), "{notes:?}");
    }
}
