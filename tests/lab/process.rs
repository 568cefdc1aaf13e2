//! Starting and ending the lab's helper processes.
//!
//! Owns the rule that nothing outlives the lab: every long-lived child is started by one thread that lives as long as the
//! process, with a parent-death signal, so that even `kill -9` of the lab takes them along. (The signal is tied to the
//! *thread* that forked, which is why test threads never fork such children themselves.) Never touches a process it did not start.

use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

struct Job {
    command: Command,
    answer: mpsc::Sender<io::Result<Child>>,
}

/// Starts `command` from the keeper thread; pair it with [`with_parent_death`] so that it ends with this process.
pub fn spawn_kept(command: Command) -> io::Result<Child> {
    static KEEPER: OnceLock<Mutex<mpsc::Sender<Job>>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("lab-keeper".into())
            .spawn(move || {
                for mut job in queue {
                    // A caller that went away takes its child with it.
                    if let Err(mpsc::SendError(Ok(mut orphan))) = job.answer.send(job.command.spawn()) {
                        let _ = orphan.kill();
                        let _ = orphan.wait();
                    }
                }
            })
            .expect("a thread can be started");
        Mutex::new(jobs)
    });
    let (answer, result) = mpsc::channel();
    let gone = || io::Error::other("the lab's keeper thread has ended");
    keeper
        .lock()
        .map_err(|_| gone())?
        .send(Job { command, answer })
        .map_err(|_| gone())?;
    result.recv().map_err(|_| gone())?
}

/// A command that gets SIGKILL when the thread that starts it ends; util-linux's setpriv(1) arms it before `program` runs.
pub fn with_parent_death(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// What a command left behind.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Exit code; `None` if a signal or the time limit ended it.
    pub code: Option<i32>,
    /// Standard output, lossy UTF-8.
    pub stdout: String,
    /// Standard error, lossy UTF-8.
    pub stderr: String,
    /// How long it ran.
    pub took: Duration,
    /// True if it was ended because it ran past its limit.
    pub timed_out: bool,
}

impl Finished {
    /// True if it ended by itself with code 0.
    pub fn ok(&self) -> bool {
        self.code == Some(0)
    }
}

/// Runs `command` for at most `limit`; past it the process and its direct children are killed.
pub fn run_limited(mut command: Command, limit: Duration) -> Result<Finished> {
    let started = Instant::now();
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let stdout = drain(child.stdout.take());
    let stderr = drain(child.stderr.take());
    let (status, timed_out) = match wait_limited(&mut child, limit)? {
        Some(status) => (status, false),
        None => {
            for inner in children_of(child.id()) {
                signal(inner, "KILL")?;
            }
            let _ = child.kill();
            (child.wait()?, true)
        }
    };
    Ok(Finished {
        code: if timed_out { None } else { status.code() },
        stdout: stdout.recv_timeout(Duration::from_secs(2)).unwrap_or_default(),
        stderr: stderr.recv_timeout(Duration::from_secs(2)).unwrap_or_default(),
        took: started.elapsed(),
        timed_out,
    })
}

/// Waits for `child` for at most `limit`.
pub fn wait_limited(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Reads a pipe to its end on a thread of its own; a grandchild that keeps the pipe open cannot block the lab.
fn drain(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    if let Some(mut pipe) = pipe {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = pipe.read_to_end(&mut bytes);
            let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
        });
    }
    receiver
}

/// Runs a short command and insists on success; the error names the command and holds its standard error.
pub fn run(command: &mut Command) -> Result<String> {
    let Output { status, stdout, stderr } = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!(
            "{command:?} ended with {status}: {}",
            String::from_utf8_lossy(&stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// Sends the signal called `name` (`KILL`, `STOP`, `CONT`, `TERM`…) to a process the lab started. Already gone is no error.
pub fn signal(pid: u32, name: &str) -> Result<()> {
    // The shell's own kill: a minimal system has no kill(1).
    Command::new("sh")
        .args([
            "-c",
            "kill -s \"$1\" \"$2\" 2>/dev/null || :",
            "kill",
            name,
            &pid.to_string(),
        ])
        .status()
        .context("cannot start sh")?;
    Ok(())
}

/// Processes whose parent is `parent`, by number.
pub fn children_of(parent: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut found: Vec<u32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| parent_of(*pid) == Some(parent))
        .collect();
    found.sort_unstable();
    found
}

/// Field 4 of `/proc/PID/stat`; the name in field 2 may hold blanks and brackets, so counting starts after the last one.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Asks `done` every 10 ms until it gives a value; past `limit` the error says what was waited for.
pub fn wait_until<T>(limit: Duration, what: &str, mut done: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = done() {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("waited {limit:?} for {what}");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_past_its_limit_is_ended_and_says_so() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo begun; exec sleep 30"]);
        let finished = run_limited(command, Duration::from_millis(300)).unwrap();
        assert!(finished.timed_out && finished.took < Duration::from_secs(5));
        assert_eq!((finished.code, finished.stdout.as_str()), (None, "begun\n"));
    }

    #[test]
    fn a_kept_child_is_found_by_its_parent() {
        let mut command = with_parent_death("sleep");
        command.arg("30");
        let mut child = spawn_kept(command).unwrap();
        assert!(children_of(std::process::id()).contains(&child.id()));
        signal(child.id(), "KILL").unwrap();
        assert!(wait_limited(&mut child, Duration::from_secs(5)).unwrap().is_some());
    }

    #[test]
    fn a_wait_that_fails_names_what_it_waited_for() {
        let error = wait_until(Duration::from_millis(20), "the impossible", || None::<()>).unwrap_err();
        assert!(error.to_string().contains("the impossible"));
    }
}
