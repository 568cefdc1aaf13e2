//! A link of a program to a hook of an interface, as bpf(2) has them since Linux 6.6 (tcx) and 5.9 (XDP).
//!
//! Owns the descriptor: with the last one the program leaves the hook, however the process ends. Says where the link still is, which aya's own type does not, because
//! the kernel and administrators take links away (`bpftool link detach`, a deleted interface) and leave the descriptor; and outlives execve(2), if that is wanted.
//! Used by `attach` and `xdp` only.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

/// `linux/bpf.h`
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_XDP: u32 = 37;
const BPF_TCX_INGRESS: u32 = 46;
/// With no other program named: ahead of all.
const BPF_F_BEFORE: u32 = 1 << 3;
const BPF_LINK_TYPE_XDP: u32 = 6;
const BPF_LINK_TYPE_TCX: u32 = 11;
/// `linux/if_link.h`: in the driver or not at all.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

/// What BPF_LINK_CREATE reads of `union bpf_attr`.
#[repr(C)]
#[derive(Default)]
struct Create {
    program: u32,
    ifindex: u32,
    hook: u32,
    flags: u32,
    relative: u32,
    pad: u32,
    revision: u64,
}

/// What BPF_LINK_UPDATE reads of it.
#[repr(C)]
#[derive(Default)]
struct Update {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// What BPF_OBJ_GET_INFO_BY_FD reads of it.
#[repr(C)]
struct Ask {
    fd: u32,
    length: u32,
    info: u64,
}

/// The first part of `struct bpf_link_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    ifindex: u32,
    hook: u32,
}

/// What a link is at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hook {
    /// The driver.
    Xdp,
    /// tc ingress.
    Tcx,
}

/// See the module doc.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// Puts the program at the ingress of an interface, ahead of all that are there.
    ///
    /// # Errors
    /// `InvalidInput` from a kernel before 6.6, and what else it says.
    pub(super) fn tcx(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<Self> {
        Self::create(program, ifindex, BPF_TCX_INGRESS, BPF_F_BEFORE)
    }

    /// Puts the program into the driver of an interface.
    ///
    /// # Errors
    /// What the kernel says; EOPNOTSUPP stands for a driver without XDP, EBUSY for another program that is there.
    pub(super) fn xdp(program: BorrowedFd<'_>, ifindex: u32) -> io::Result<Self> {
        Self::create(program, ifindex, BPF_XDP, XDP_FLAGS_DRV_MODE)
    }

    fn create(program: BorrowedFd<'_>, ifindex: u32, hook: u32, flags: u32) -> io::Result<Self> {
        let mut wanted = Create {
            program: program.as_raw_fd().cast_unsigned(),
            ifindex,
            hook,
            flags,
            ..Create::default()
        };
        let fd = bpf(BPF_LINK_CREATE, &mut wanted)?;
        // SAFETY: BPF_LINK_CREATE has just made this descriptor, and nobody else knows it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Puts another program in the place of the one that the link is of.
    ///
    /// # Errors
    /// What the kernel says, also to a link that was taken away; the program stays then.
    pub(super) fn exchange(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        let mut wanted = Update {
            link: self.0.as_raw_fd().cast_unsigned(),
            program: program.as_raw_fd().cast_unsigned(),
            ..Update::default()
        };
        bpf(BPF_LINK_UPDATE, &mut wanted).map(drop)
    }

    /// What the link is at, and on which interface; 0 if it was taken away.
    ///
    /// # Errors
    /// What the kernel says, to a descriptor that is no link of these kinds too.
    pub(super) fn place(&self) -> io::Result<(Hook, u32)> {
        let mut info = Info::default();
        let mut ask = Ask {
            fd: self.0.as_raw_fd().cast_unsigned(),
            length: size_of::<Info>() as u32,
            info: (&raw mut info).addr() as u64,
        };
        bpf(BPF_OBJ_GET_INFO_BY_FD, &mut ask)?;
        match (info.kind, info.hook) {
            (BPF_LINK_TYPE_XDP, _) => Ok((Hook::Xdp, info.ifindex)),
            (BPF_LINK_TYPE_TCX, BPF_TCX_INGRESS) => Ok((Hook::Tcx, info.ifindex)),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no link at XDP or tc ingress",
            )),
        }
    }

    /// Keeps the link over the next execve(2), for [`Self::inherited`] there, instead of ending it here.
    ///
    /// # Errors
    /// What the kernel says; the link has ended then.
    pub(super) fn leave(self) -> io::Result<()> {
        set_close_on_exec(self.0.as_fd(), false)?;
        let _ = self.0.into_raw_fd();
        Ok(())
    }

    /// The links that this process was left before it executed the program it runs now, each only once.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub(super) fn inherited() -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc/self/fd")? {
            let path = entry?.path();
            let is_link = std::fs::read_link(&path).is_ok_and(|told| told.to_string_lossy().contains("bpf_link"));
            let number = path
                .file_name()
                .and_then(|name| name.to_str())
                .and_then(|name| name.parse().ok());
            let Some(fd) = number.filter(|fd| is_link && stays_open(*fd)) else {
                continue;
            };
            // SAFETY: the descriptor is open, and nobody owns it: every link that this process makes or has taken over is closed at execve.
            let link = Self(unsafe { OwnedFd::from_raw_fd(fd) });
            set_close_on_exec(link.0.as_fd(), true)?;
            found.push(link);
        }
        Ok(found)
    }
}

/// True if the descriptor would outlive the next execve(2).
fn stays_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD touches no memory of this process; a number that is no descriptor is answered with an error.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    flags != -1 && flags & libc::FD_CLOEXEC == 0
}

fn set_close_on_exec(fd: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let flags = if on { libc::FD_CLOEXEC } else { 0 };
    // SAFETY: F_SETFD takes a number and touches no memory of this process.
    match unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, flags) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// One command of bpf(2) that answers with a descriptor, or with 0.
fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<RawFd> {
    // SAFETY: `attributes` is the beginning of `union bpf_attr` as this command reads it, as long as is said; what it points to outlives the call. The
    // kernel takes the rest of the union for zero.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>()) };
    match result {
        -1 => Err(io::Error::last_os_error()),
        // A descriptor fits.
        fd => Ok(fd as RawFd),
    }
}
