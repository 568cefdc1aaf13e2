//! Network namespaces: stacks of their own for the lab, for tests, for several daemons on one machine, and for containers.
//!
//! Owns a namespace through a descriptor, so it has no name, no mount and no trace when its last user is gone. The daemon
//! is started in one; it enters others only for as long as it takes to open a socket there.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::interface;
use crate::sockopt;

/// The calling thread's own namespace; `self/ns/net` would be the main thread's.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace that lives as long as this handle, a process or a thread in it, or an interface's peer keeps it.
#[derive(Debug, Clone)]
pub struct NetNs {
    fd: Arc<OwnedFd>,
}

impl NetNs {
    /// Makes a network namespace in which only the loopback interface exists, and is up. The caller stays where it is.
    ///
    /// # Errors
    /// `PermissionDenied` without CAP_SYS_ADMIN.
    pub fn create() -> io::Result<Self> {
        on_fresh_thread(|| {
            unshare(libc::CLONE_NEWNET).map_err(|error| sockopt::context(&error, "cannot make a network namespace"))?;
            loopback_up()?;
            Self::current()
        })
        .flatten()
    }

    /// The network namespace that the calling thread is in.
    pub fn current() -> io::Result<Self> {
        let file = File::open(OWN).map_err(|error| sockopt::context(&error, OWN))?;
        Ok(Self {
            fd: Arc::new(file.into()),
        })
    }

    /// The namespaces of all processes but the calling thread's own, each once, and whether each process could be looked at. Processes outside the calling
    /// process's own PID namespace are not seen.
    ///
    /// # Errors
    /// If the own one or the list of processes cannot be read.
    pub fn of_others() -> io::Result<(Vec<Self>, bool)> {
        let identity = |path: &Path| fs::metadata(path).map(|it| (it.dev(), it.ino()));
        let mut seen = BTreeSet::from([identity(Path::new(OWN))?]);
        let (mut found, mut whole) = (Vec::new(), true);
        for process in fs::read_dir("/proc")? {
            let process = process?;
            if !process.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit) {
                continue;
            }
            let path = process.path().join("ns/net");
            let opened = identity(&path).and_then(|which| {
                if seen.contains(&which) {
                    return Ok(None);
                }
                let file = File::open(&path)?;
                // Not before: where this process has just ended another one of its namespace is to be asked.
                seen.insert(which);
                Ok(Some(file))
            });
            match opened {
                Ok(file) => found.extend(file.map(|file| Self {
                    fd: Arc::new(file.into()),
                })),
                // It has ended meanwhile, or is about to.
                Err(error) if error.kind() == io::ErrorKind::NotFound || !process.path().exists() => {}
                Err(_) => whole = false,
            }
        }
        Ok((found, whole))
    }

    /// Moves the calling thread into the namespace until the guard is dropped. Other threads stay where they are.
    pub fn enter(&self) -> io::Result<NetNsGuard> {
        let before = Self::current()?;
        setns(&self.fd)?;
        Ok(NetNsGuard {
            before,
            not_send: PhantomData,
        })
    }

    /// Runs `f` on a fresh thread inside the namespace and waits for its result. A panic in `f` goes on in the caller.
    ///
    /// # Panics
    /// If the thread cannot enter the namespace, which only a missing CAP_SYS_ADMIN can cause.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        match self.try_run(f) {
            Ok(value) => value,
            Err(error) => panic!("{error}"),
        }
    }

    /// As [`Self::run`], where entering may fail.
    ///
    /// # Errors
    /// `PermissionDenied` without CAP_SYS_ADMIN over the namespace; what the system says if it has no room for a thread.
    pub fn try_run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_fresh_thread(|| {
            setns(&self.fd).map_err(|error| sockopt::context(&error, "cannot enter the network namespace"))?;
            Ok(f())
        })
        .flatten()
    }

    /// Makes `cmd` start inside the namespace. Nothing is mounted: it sees the same files (`/sys` included) as its parent.
    pub fn command(&self, cmd: &mut Command) {
        let fd = Arc::clone(&self.fd);
        // SAFETY: between fork and exec the closure makes one system call and allocates nothing.
        unsafe { cmd.pre_exec(move || setns(&fd)) };
    }

    /// A path that leads to the namespace as long as this process lives, for `nsenter --net=PATH`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd()))
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Brings the thread back to the namespace it came from. Bound to its thread.
#[derive(Debug)]
pub struct NetNsGuard {
    before: NetNs,
    not_send: PhantomData<*const ()>,
}

impl Drop for NetNsGuard {
    fn drop(&mut self) {
        // A thread lost in a wrong namespace would silently change the wrong host.
        if let Err(error) = setns(&self.before.fd) {
            if std::thread::panicking() {
                return;
            }
            panic!("cannot go back to the network namespace of before: {error}");
        }
    }
}

/// Whether this process lives in a user namespace below the host's, where root has no power over the host.
pub fn in_user_namespace() -> bool {
    // The host's own map is one line: everybody is who they are.
    let host = ["0", "0", "4294967295"];
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !map.split_whitespace().eq(host))
}

/// Moves this process into a user namespace of its own in which it is root, with a network and a mount namespace of its own.
///
/// For tests and trials without root. Loopback is brought up.
///
/// # Errors
/// `InvalidInput` if the process has more than one thread; `PermissionDenied` where the system forbids it to ordinary users.
pub fn enter_user_namespace() -> io::Result<()> {
    // SAFETY: geteuid has no arguments and cannot fail.
    let uid = unsafe { libc::geteuid() };
    // SAFETY: getegid has no arguments and cannot fail.
    let gid = unsafe { libc::getegid() };
    unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET | libc::CLONE_NEWNS)
        .map_err(|error| sockopt::context(&error, "cannot make a user namespace"))?;
    let write = |path: &str, text: String| std::fs::write(path, text).map_err(|error| sockopt::context(&error, path));
    // user_namespaces(7): without privilege a group map needs setgroups switched off first.
    write("/proc/self/setgroups", "deny".to_owned())?;
    write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    loopback_up()
}

fn loopback_up() -> io::Result<()> {
    let mut request = interface::request("lo")?;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_LOOPBACK | libc::IFF_RUNNING) as libc::c_short;
    let socket = sockopt::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // SAFETY: SIOCSIFFLAGS reads one `ifreq`, which `request` is, with a terminated name.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    if result < 0 {
        return Err(sockopt::context(
            &io::Error::last_os_error(),
            "cannot bring loopback up",
        ));
    }
    Ok(())
}

fn unshare(flags: libc::c_int) -> io::Result<()> {
    // SAFETY: unshare takes an integer; it changes what the calling thread sees of the system, and no memory.
    let result = unsafe { libc::unshare(flags) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

fn setns(fd: &OwnedFd) -> io::Result<()> {
    // SAFETY: setns takes two integers; `fd` is open, and a descriptor that is no network namespace is refused.
    let result = unsafe { libc::setns(fd.as_raw_fd(), libc::CLONE_NEWNET) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Runs `f` on a thread that ends with it, so that what `f` does to its thread ends too.
fn on_fresh_thread<T: Send>(f: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, f)?;
        match thread.join() {
            Ok(value) => Ok(value),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
