//! Waiting for several descriptors with a time-out finer than a millisecond.
//!
//! Owns nothing: it borrows descriptors for one `ppoll(2)`. The plain threads (owner loop, data planes, heartbeats) wait
//! here; tokio tasks do not.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Most descriptors one call can wait for: one bit each in the answer.
pub const MAX_FDS: usize = 64;

/// Waits until at least one of `fds` is readable, or `timeout` has passed (`None` waits without end).
///
/// Bit `i` of the answer stands for `fds[i]`: there is something to read, or an error or hang-up that the next read will
/// report. The answer is 0 after a time-out and after an interruption by a signal, so callers loop on their own deadline.
///
/// # Errors
/// `InvalidInput` for more than [`MAX_FDS`] descriptors or for one that is closed; otherwise what the kernel reports.
pub fn wait_readable(fds: &[BorrowedFd<'_>], timeout: Option<Duration>) -> io::Result<u64> {
    if fds.len() > MAX_FDS {
        let text = format!("cannot wait for {} descriptors at once, at most {MAX_FDS}", fds.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let mut polled = [libc::pollfd {
        fd: -1,
        events: 0,
        revents: 0,
    }; MAX_FDS];
    for (slot, fd) in polled.iter_mut().zip(fds) {
        slot.fd = fd.as_raw_fd();
        slot.events = libc::POLLIN;
    }
    let limit = timeout.map(|limit| libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(limit.subsec_nanos()),
    });
    let limit_ptr = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    let count = fds.len() as libc::nfds_t;
    // SAFETY: `polled` holds at least `count` entries and outlives the call; `limit_ptr` is null or points to `limit`, which
    // lives until the end of this function; a null signal mask leaves the mask alone.
    let ready = unsafe { libc::ppoll(polled.as_mut_ptr(), count, limit_ptr, std::ptr::null()) };
    if ready < 0 {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::Interrupted {
            Ok(0)
        } else {
            Err(error)
        };
    }
    let mut mask = 0;
    for (index, slot) in polled.iter().take(fds.len()).enumerate() {
        if slot.revents & libc::POLLNVAL != 0 {
            let text = format!("descriptor {} is not open", slot.fd);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        if slot.revents != 0 {
            mask |= 1 << index;
        }
    }
    Ok(mask)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::Instant;

    #[test]
    fn the_mask_names_the_readable_descriptors() {
        let (mut quiet_peer, quiet) = UnixStream::pair().unwrap();
        let (mut busy_peer, busy) = UnixStream::pair().unwrap();
        busy_peer.write_all(b"x").unwrap();
        let fds = [quiet.as_fd(), busy.as_fd()];
        assert_eq!(wait_readable(&fds, None).unwrap(), 0b10);
        quiet_peer.write_all(b"x").unwrap();
        assert_eq!(wait_readable(&fds, None).unwrap(), 0b11);
    }

    #[test]
    fn a_time_out_below_a_millisecond_is_neither_zero_nor_a_millisecond_poll() {
        let (_peer, quiet) = UnixStream::pair().unwrap();
        let limit = Duration::from_micros(300);
        let begin = Instant::now();
        assert_eq!(wait_readable(&[quiet.as_fd()], Some(limit)).unwrap(), 0);
        assert!(begin.elapsed() >= limit);
    }

    #[test]
    fn a_closed_peer_counts_as_readable() {
        let (peer, end) = UnixStream::pair().unwrap();
        drop(peer);
        assert_eq!(wait_readable(&[end.as_fd()], Some(Duration::from_secs(5))).unwrap(), 1);
    }

    #[test]
    fn more_descriptors_than_bits_are_refused() {
        let (_peer, end) = UnixStream::pair().unwrap();
        let fds = vec![end.as_fd(); MAX_FDS + 1];
        assert_eq!(
            wait_readable(&fds, None).unwrap_err().kind(),
            io::ErrorKind::InvalidInput
        );
    }
}
