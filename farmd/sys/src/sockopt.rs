//! Setting socket options and making sockets: the two calls that several files of this crate share.
//!
//! Private to the crate, because the option's type is the caller's promise.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Plain C data that a socket option may carry: every byte of it is initialised.
///
/// # Safety
/// The type has no padding that the kernel would read and no pointer other than one that is valid during the call.
pub(crate) unsafe trait OptionValue {}

// SAFETY: an integer is plain data.
unsafe impl OptionValue for libc::c_int {}
// SAFETY: integers and a byte array without padding between them.
unsafe impl OptionValue for libc::packet_mreq {}
// SAFETY: sixteen bytes and an integer without padding between them.
unsafe impl OptionValue for libc::ipv6_mreq {}
// SAFETY: four integers of one size.
unsafe impl OptionValue for libc::tpacket_req {}
// SAFETY: a length and a pointer; users of this crate-private impl keep the program alive over the call.
unsafe impl OptionValue for libc::sock_fprog {}

/// `setsockopt(2)` with a value of the option's own type.
pub(crate) fn set<T: OptionValue>(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    let length = size_of::<T>() as libc::socklen_t;
    let pointer = std::ptr::from_ref(value).cast::<libc::c_void>();
    // SAFETY: `pointer` is valid for `length` bytes of plain data, which the kernel only reads.
    let result = unsafe { libc::setsockopt(fd, level, option, pointer, length) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// `socket(2)`, always close-on-exec and non-blocking.
pub(crate) fn socket(domain: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: socket takes three integers and touches no memory of ours.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just returned by socket, is open, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks for a receive buffer of `bytes`, past the system's limit where the process may, else up to the limit.
pub(crate) fn set_receive_buffer(socket: impl AsFd, bytes: libc::c_int) -> io::Result<()> {
    let socket = socket.as_fd();
    set(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &bytes)
        .or_else(|_| set(socket, libc::SOL_SOCKET, libc::SO_RCVBUF, &bytes))
}

/// Takes the socket's pending error, if there is one: until then it keeps the descriptor "readable".
pub(crate) fn take_error(socket: impl AsFd) -> io::Result<()> {
    let mut code: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    let (fd, target) = (socket.as_fd().as_raw_fd(), (&raw mut code).cast::<libc::c_void>());
    // SAFETY: `target` is valid for writes of `length` bytes, and both outlive the call.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_ERROR, target, &raw mut length) };
    match (result, code) {
        (0, 0) => Ok(()),
        (0, code) => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The same error with "what on what" in front, and its kind kept.
pub(crate) fn context(error: &io::Error, what: impl std::fmt::Display) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}
