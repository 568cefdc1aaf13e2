//! Runs a module's scripts.
//!
//! Owns the processes of running scripts until they end, and the file each one's output goes to. Never decides what to
//! run or what an exit code means: the module's machine does, through the owner loop, which calls
//! [`ScriptRunner::start`] and hears [`Event::ScriptExited`].
//!
//! - A script leads a process group of its own. When its time is over the *group* gets SIGTERM, and SIGKILL 5 s later. When it
//!   ends by itself the group is left alone: the services it has started go on.
//! - Output comes through a pipe, so that its size can be limited. Those services inherit the pipe and may write to it
//!   long after the script, so it is read until all of them have closed it; else their next line would kill them (SIGPIPE).
//!   The end of the script is told at once and does not wait for that.
//! - A script starts with no signal blocked: what it starts can be asked to end.
//! - As root, a script is refused that somebody else could have written.

mod output;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use farm_core::config::UserConfig;
use farm_core::id::ModuleName;
use farm_core::module::script::{Script, ScriptOutcome};
use farm_core::supervise::policy::{KILL_GRACE, TERM_GRACE};
use farm_sys::process::{self, Signal};
use tokio::process::{Child, Command};
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

pub use self::output::KEPT_LOGS;
use self::output::Output;
use crate::event::{Event, EventSender};
use crate::store;

/// How often the end of a process group is looked for.
const GROUP_POLL: Duration = Duration::from_millis(25);

/// How long a file that is "busy" is tried again: another thread was just forking while it was written.
const BUSY_RETRIES: u32 = 20;

/// Variables a service manager gives the daemon and that must not reach the applications.
const PRIVATE_VARS: [&str; 6] = [
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
];

/// The daemon's three folders.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Folders {
    /// `FARM_ETC`.
    pub etc: PathBuf,
    /// `FARM_VAR`.
    pub var: PathBuf,
    /// `FARM_RUN`.
    pub run: PathBuf,
    /// Name of this node, for scripts as `FARM_NODE`; empty before it is known.
    pub node: String,
}

impl Folders {
    /// What scripts call `SAFE`: holds the command line under both its names.
    pub fn safe(&self) -> PathBuf {
        self.run.join("safe")
    }
}

/// Makes `RUN/safe` with `safekit` and `farm`, both the program `farm`; what was there under these names is replaced.
///
/// # Errors
/// If the folder or a link cannot be made; the text names it.
pub fn prepare_safe(folders: &Folders, farm: &Path) -> io::Result<()> {
    let safe = folders.safe();
    let named = |what: &Path, e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", what.display()));
    fs::create_dir_all(&safe).map_err(|e| named(&safe, e))?;
    for name in ["safekit", "farm"] {
        let link = safe.join(name);
        match fs::remove_file(&link) {
            Ok(()) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(named(&link, e)),
        }
        symlink(farm, &link).map_err(|e| named(&link, e))?;
    }
    Ok(())
}

/// One run that is asked for.
#[derive(Clone, PartialEq, Debug)]
pub struct ScriptRequest {
    /// Whose script.
    pub module: ModuleName,
    /// Which one.
    pub script: Script,
    /// Its arguments.
    pub args: Vec<String>,
    /// Past this it is ended.
    pub timeout: Duration,
    /// Who made the module act, for the script as `FARM_IDENTITY`.
    pub identity: Option<String>,
}

/// Starts scripts. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ScriptRunner {
    runtime: Handle,
    folders: Folders,
    events: EventSender,
}

/// A run under way. Dropping it changes nothing: the run goes on and is reported.
#[derive(Debug)]
pub struct ScriptHandle {
    kill: Arc<Notify>,
    output: Option<PathBuf>,
}

impl ScriptHandle {
    /// Ends the run with its process group; it is then reported as [`ScriptOutcome::TimedOut`]. Does nothing if it has ended.
    pub fn kill(&self) {
        self.kill.notify_one();
    }

    /// The file that its output goes to; none with `logging="none"` or if the file could not be made.
    pub fn output(&self) -> Option<&Path> {
        self.output.as_deref()
    }
}

impl ScriptRunner {
    /// A runner whose processes live on `runtime` and which reports to `events`.
    pub fn new(runtime: Handle, folders: Folders, events: EventSender) -> Self {
        Self {
            runtime,
            folders,
            events,
        }
    }

    /// Starts one run. In every case exactly one [`Event::ScriptExited`] follows, also if nothing could be started.
    pub fn start(&self, request: ScriptRequest, user: &UserConfig) -> ScriptHandle {
        let kill = Arc::new(Notify::new());
        let handle = |output| ScriptHandle {
            kill: kill.clone(),
            output,
        };
        let active = store::active_dir(&self.folders.var, &request.module);
        let file = active.join("bin").join(request.script.file_name());
        if let Err(outcome) = judge_file(&file) {
            self.report(&request, outcome);
            return handle(None);
        }
        let log = self.output_log(&request, user);
        let output = log.as_ref().map(|(path, _)| path.clone());
        let command = match self.command(&request, user, &file) {
            Ok(command) => command,
            Err(e) => {
                self.report(&request, ScriptOutcome::NotStarted(format!("its folder: {e}")));
                return handle(output);
            }
        };
        let destination = Output::new(log.map(|(_, file)| file), user.log_size_kb);
        let (runner, cancel) = (self.clone(), kill.clone());
        self.runtime.spawn(async move {
            let mut job = Job { output: destination };
            let outcome = job.run(command, request.timeout, &cancel).await;
            runner.report(&request, outcome);
            output::prune_logs(&store::module_dir(&runner.folders.var, &request.module));
            job.output.drain().await;
        });
        handle(output)
    }

    fn report(&self, request: &ScriptRequest, outcome: ScriptOutcome) {
        tracing::debug!(module = %request.module, script = %request.script, ?outcome, "script ended");
        self.events.send(Event::ScriptExited {
            module: request.module.clone(),
            script: request.script,
            outcome,
        });
    }

    /// A new output file; a module must be stoppable with a full disk, so without one the run goes on unseen.
    fn output_log(&self, request: &ScriptRequest, user: &UserConfig) -> Option<(PathBuf, File)> {
        if !user.logging {
            return None;
        }
        let dir = store::module_dir(&self.folders.var, &request.module);
        match output::create_log(&dir, request.script) {
            Ok(log) => Some(log),
            Err(error) => {
                tracing::warn!(module = %request.module, script = %request.script, %error, "output of the script is not kept");
                None
            }
        }
    }

    fn command(&self, request: &ScriptRequest, user: &UserConfig, file: &Path) -> io::Result<Command> {
        // The script sees the very version it is of, even if another one becomes the active copy meanwhile.
        let bin = fs::canonicalize(file.parent().unwrap_or(file))?;
        let conf = bin.with_file_name("conf");
        let safe = self.folders.safe();
        let mut command = Command::new(bin.join(request.script.file_name()));
        command
            .args(&request.args)
            .current_dir(&bin)
            .process_group(0)
            .stdin(Stdio::null());
        for name in PRIVATE_VARS {
            command.env_remove(name);
        }
        if std::env::var_os("PATH").is_none() {
            command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        }
        // farmd reads its own signals from a descriptor, and blocks them for that.
        process::unblock_signals(command.as_std_mut());
        // The module's own variables first: they cannot hide those the scripts rely on.
        command.envs(&user.vars);
        let module_dir = store::module_dir(&self.folders.var, &request.module);
        let fixed: [(&str, &OsStr); 13] = [
            ("FARM_NODE", self.folders.node.as_ref()),
            ("SAFE", safe.as_os_str()),
            ("SAFEVAR", self.folders.var.as_os_str()),
            ("SAFEBIN", safe.as_os_str()),
            ("SAFEMODULE", request.module.as_str().as_ref()),
            ("SAFEUSERBIN", bin.as_os_str()),
            ("SAFEUSERCONF", conf.as_os_str()),
            ("SAFEUSERVAR", module_dir.as_os_str()),
            ("FARM_ETC", self.folders.etc.as_os_str()),
            ("FARM_VAR", self.folders.var.as_os_str()),
            ("FARM_RUN", self.folders.run.as_os_str()),
            ("FARM_MODULE", request.module.as_str().as_ref()),
            (
                "FARM_IDENTITY",
                request.identity.as_deref().unwrap_or_default().as_ref(),
            ),
        ];
        command.envs(fixed);
        Ok(command)
    }
}

/// Whether root may run a file or take a file over: nobody else can have written it.
///
/// # Errors
/// Why not, as the end of a sentence.
pub fn judge_owner(meta: &fs::Metadata) -> Result<(), String> {
    let me = process::effective_uid();
    if me != 0 {
        return Ok(());
    }
    if meta.uid() != 0 {
        return Err(format!("it belongs to user {}, root is expected", meta.uid()));
    }
    let writable_by = match (meta.mode() & 0o002 != 0, meta.mode() & 0o020 != 0 && meta.gid() != 0) {
        (true, _) => "every user".to_owned(),
        (false, true) => format!("group {}", meta.gid()),
        (false, false) => return Ok(()),
    };
    Err(format!("{writable_by} may write to it, only root is expected to"))
}

fn judge_file(file: &Path) -> Result<(), ScriptOutcome> {
    let meta = match fs::metadata(file) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(ScriptOutcome::Missing),
        Err(e) => return Err(ScriptOutcome::NotStarted(e.to_string())),
    };
    let refused = if !meta.is_file() {
        "it is no regular file".to_owned()
    } else if meta.mode() & 0o111 == 0 {
        "it is not executable".to_owned()
    } else {
        match judge_owner(&meta) {
            Ok(()) => return Ok(()),
            Err(why) => why,
        }
    };
    Err(ScriptOutcome::NotStarted(refused))
}

/// One run.
struct Job {
    output: Output,
}

impl Job {
    async fn run(&mut self, mut command: Command, limit: Duration, kill: &Notify) -> ScriptOutcome {
        let mut child = match self.spawn(&mut command).await {
            Ok(child) => child,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return ScriptOutcome::NotStarted("the program named in its first line does not exist".to_owned());
            }
            Err(e) => return ScriptOutcome::NotStarted(e.to_string()),
        };
        // Drops our copy of the pipe's writing end, so that its last user outside closes it.
        drop(command);
        let deadline = Instant::now() + limit;
        let group = child.id();
        loop {
            tokio::select! {
                biased;
                status = child.wait() => {
                    self.output.copy_rest();
                    return match status {
                        Ok(status) => outcome(status, &self.output),
                        Err(e) => ScriptOutcome::NotStarted(format!("its end could not be learnt: {e}")),
                    };
                }
                () = kill.notified() => break,
                () = sleep_until(deadline) => break,
                () = self.output.copy() => {}
            }
        }
        if let Some(group) = group {
            self.end_group(group, &mut child).await;
        }
        self.output.copy_rest();
        ScriptOutcome::TimedOut
    }

    async fn spawn(&mut self, command: &mut Command) -> io::Result<Child> {
        self.output.attach(command)?;
        let mut retries = BUSY_RETRIES;
        loop {
            match command.spawn() {
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && retries > 0 => {
                    retries -= 1;
                    sleep(Duration::from_millis(10)).await;
                }
                result => return result,
            }
        }
    }

    /// SIGTERM to the group, SIGKILL after the grace; returns when it is gone or cannot be got rid of.
    async fn end_group(&mut self, group: u32, child: &mut Child) {
        for (signal, grace) in [(Signal::Term, TERM_GRACE), (Signal::Kill, KILL_GRACE)] {
            if let Err(error) = process::kill_group(group, signal) {
                tracing::warn!(group, ?signal, %error, "script could not be signalled");
            }
            if self.await_group(group, child, Instant::now() + grace).await {
                return;
            }
        }
        tracing::error!(group, "processes of an ended script are still there after SIGKILL");
    }

    /// True as soon as nothing of the group is left.
    async fn await_group(&mut self, group: u32, child: &mut Child, deadline: Instant) -> bool {
        loop {
            tokio::select! {
                biased;
                result = timeout_at(deadline, child.wait()) => {
                    if result.is_err() {
                        return false;
                    }
                    break;
                }
                () = self.output.copy() => {}
            }
        }
        // The leader is waited for; what it left in its group may still run, or be dead and ours to clear away.
        loop {
            let _none_of_ours = process::reap_orphans(group);
            if !process::group_alive(group) {
                return true;
            }
            if Instant::now() >= deadline {
                return false;
            }
            tokio::select! {
                () = sleep(GROUP_POLL) => {}
                () = self.output.copy() => {}
            }
        }
    }
}

fn outcome(status: ExitStatus, output: &Output) -> ScriptOutcome {
    match (status.code(), status.signal()) {
        (Some(0), _) => ScriptOutcome::Exited(0),
        (Some(code), _) => match output.last_line() {
            Some(line) => ScriptOutcome::ExitedSaying(code, line),
            None => ScriptOutcome::Exited(code),
        },
        (None, Some(signal)) => ScriptOutcome::Signaled(signal),
        (None, None) => ScriptOutcome::NotStarted(format!("unknown end: {status}")),
    }
}

#[cfg(test)]
mod tests;
