//! Process groups, orphans and locks: what running scripts safely needs beyond `std::process`.
//!
//! Owns nothing but the lock files it hands out. A script is a process group, led by the process that was started: signals go
//! to the whole group, so nothing that a script left running survives it. When to signal is the script runner's decision.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use crate::{signal_fd, sockopt};

/// The signals that the farm sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Please end (15).
    Term,
    /// End now; cannot be caught (9).
    Kill,
    /// The terminal is gone; for many daemons: read the configuration again (1).
    Hup,
    /// Interrupt, as from a keyboard (2).
    Int,
    /// Dump core and end (6): for hung programs that are to be looked at.
    Abort,
    /// Free for the program's own use (10).
    Usr1,
    /// Free for the program's own use (12).
    Usr2,
    /// Stand still; cannot be caught (19).
    Stop,
    /// Go on (18).
    Cont,
}

impl Signal {
    pub(crate) fn number(self) -> libc::c_int {
        match self {
            Self::Term => libc::SIGTERM,
            Self::Kill => libc::SIGKILL,
            Self::Hup => libc::SIGHUP,
            Self::Int => libc::SIGINT,
            Self::Abort => libc::SIGABRT,
            Self::Usr1 => libc::SIGUSR1,
            Self::Usr2 => libc::SIGUSR2,
            Self::Stop => libc::SIGSTOP,
            Self::Cont => libc::SIGCONT,
        }
    }
}

/// Sends `signal` to every process of the group led by `pid`. Success if the group is gone already.
///
/// # Errors
/// `InvalidInput` for 0 and 1, which would mean this process's own group and every process of the system.
pub fn kill_group(pid: u32, signal: Signal) -> io::Result<()> {
    match kill(group(pid)?, signal.number()) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        result => result,
    }
}

/// Whether a process of the group led by `pid` still exists, be it a dead one that nobody has waited for yet.
pub fn group_alive(pid: u32) -> bool {
    // EPERM: there is one, of another user.
    group(pid).is_ok_and(|group| match kill(group, 0) {
        Ok(()) => true,
        Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
    })
}

/// Makes this process the new parent of its descendants whose own parent has died, in place of the system's first process.
///
/// So nothing that a script started gets out of sight; [`reap_orphans`] must then be called for each ended script.
pub fn set_child_subreaper() -> io::Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1)
}

/// Clears away dead processes of the group led by `pid` that have become children of this process; returns how many.
///
/// To be called after the leader itself was waited for: its exit code is lost otherwise. Never blocks.
pub fn reap_orphans(pid: u32) -> io::Result<usize> {
    let group = group(pid)?;
    let mut reaped = 0;
    loop {
        // SAFETY: a null status pointer is allowed; no memory of ours is touched.
        match unsafe { libc::waitpid(group, std::ptr::null_mut(), libc::WNOHANG) } {
            0 => return Ok(reaped),
            found if found > 0 => reaped += 1,
            _ => {
                let error = io::Error::last_os_error();
                match error.raw_os_error() {
                    Some(libc::ECHILD) => return Ok(reaped),
                    Some(libc::EINTR) => {}
                    _ => return Err(error),
                }
            }
        }
    }
}

/// Makes the process that `cmd` starts be killed when the *thread* that starts it ends: for helpers, never for applications.
///
/// Start such a process from a thread that lives as long as the daemon.
pub fn die_with_parent(cmd: &mut Command) {
    let parent = std::process::id();
    let prepare = move || {
        prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong)?;
        // The parent may have died before the request above was made.
        if std::os::unix::process::parent_id() != parent {
            return Err(io::Error::from_raw_os_error(libc::ESRCH));
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls and allocates nothing.
    unsafe { cmd.pre_exec(prepare) };
}

/// Makes the process that `cmd` starts begin with no signal blocked, whatever the calling thread blocks: masks are inherited, and an
/// application with SIGTERM blocked cannot be asked to end.
pub fn unblock_signals(cmd: &mut Command) {
    let none = signal_fd::set_of(&[]);
    let prepare = move || {
        // SAFETY: `none` is an initialised signal set that is only read; a null old mask is allowed.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()) };
        match result {
            0 => Ok(()),
            code => Err(io::Error::from_raw_os_error(code)),
        }
    };
    // SAFETY: between fork and exec the closure makes one system call, which signal-safety(7) allows, and allocates nothing.
    unsafe { cmd.pre_exec(prepare) };
}

/// The user whose rights this process has; 0 is root.
pub fn effective_uid() -> u32 {
    // SAFETY: geteuid has no arguments and cannot fail.
    unsafe { libc::geteuid() }
}

/// Locks the file at `path`, made if need be (readable by its owner only), until the returned handle is dropped or the process ends.
///
/// `None` if another process, or another handle of this one, holds the lock.
pub fn lock_file(path: &Path) -> io::Result<Option<File>> {
    let context = |error: io::Error| sockopt::context(&error, format_args!("lock file {}", path.display()));
    // Not truncated: the holder may have written its process number there.
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(path).map_err(context)?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(context(error)),
    }
}

/// The number that means "all of the group" to the kernel.
fn group(pid: u32) -> io::Result<libc::pid_t> {
    match libc::pid_t::try_from(pid) {
        Ok(pid) if pid > 1 => Ok(-pid),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{pid} leads no process group of ours"),
        )),
    }
}

fn kill(target: libc::pid_t, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: kill takes two integers and touches no memory of ours.
    let result = unsafe { libc::kill(target, signal) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the options used here take one integer and touch no memory of ours.
    let result = unsafe { libc::prctl(option, value) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::time::{Duration, Instant};

    fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
        let begin = Instant::now();
        while !condition() {
            assert!(
                begin.elapsed() < Duration::from_secs(5),
                "{what} did not happen within 5 s"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn a_signal_reaches_the_whole_group_and_nothing_of_it_stays() {
        set_child_subreaper().unwrap();
        // The shell's child would outlive a kill of the shell alone.
        let mut child = Command::new("sh")
            .args(["-c", "sleep 600 & wait"])
            .process_group(0)
            .spawn()
            .unwrap();
        let pid = child.id();
        let children = format!("/proc/{pid}/task/{pid}/children");
        wait_until("the shell's child", || {
            std::fs::read_to_string(&children).is_ok_and(|list| !list.trim().is_empty())
        });
        assert!(group_alive(pid));
        kill_group(pid, Signal::Kill).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        let mut orphans = 0;
        wait_until("the end of the group", || {
            orphans += reap_orphans(pid).unwrap();
            !group_alive(pid)
        });
        assert_eq!(orphans, 1);
        kill_group(pid, Signal::Term).expect("a group that is gone is no error");
    }

    #[test]
    fn nobody_can_signal_the_whole_system_by_mistake() {
        for pid in [0, 1, u32::MAX] {
            assert_eq!(
                kill_group(pid, Signal::Cont).unwrap_err().kind(),
                io::ErrorKind::InvalidInput,
                "{pid}"
            );
            assert!(!group_alive(pid));
        }
    }

    #[test]
    fn a_helper_dies_with_the_thread_that_started_it() {
        let mut child = std::thread::spawn(|| {
            let mut cmd = Command::new("sleep");
            die_with_parent(cmd.arg("600"));
            cmd.spawn().unwrap()
        })
        .join()
        .unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn what_is_started_has_no_signal_blocked() {
        let blocked = |free: bool| {
            let mut cmd = Command::new("grep");
            cmd.args(["SigBlk:", "/proc/self/status"]);
            if free {
                unblock_signals(&mut cmd);
            }
            let output = String::from_utf8(cmd.output().unwrap().stdout).unwrap();
            let mask = output.split_whitespace().last().unwrap();
            u64::from_str_radix(mask, 16).unwrap()
        };
        let masks = std::thread::spawn(move || {
            let _signals = signal_fd::SignalFd::block(&[Signal::Term, Signal::Int]).unwrap();
            (blocked(false), blocked(true))
        });
        let ours = 1 << (libc::SIGTERM - 1) | 1 << (libc::SIGINT - 1);
        assert_eq!(masks.join().unwrap(), (ours, 0));
    }

    #[test]
    fn a_lock_has_one_holder() {
        let path = std::env::temp_dir().join(format!("farm-sys-lock-{}", std::process::id()));
        let first = lock_file(&path).unwrap();
        assert!(first.is_some());
        assert!(lock_file(&path).unwrap().is_none(), "held");
        drop(first);
        // A program that another test starts at this moment holds it until it runs.
        let free = (0..1000).any(|_| {
            let taken = lock_file(&path).unwrap().is_some();
            if !taken {
                std::thread::sleep(Duration::from_millis(5));
            }
            taken
        });
        assert!(free, "free again");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(
            lock_file(Path::new("/no-such-folder/lock")).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }
}
