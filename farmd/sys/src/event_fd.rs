//! A wake-up counter that one thread raises and another waits for.
//!
//! Owns one `eventfd(2)`. It carries no data: whoever raises it has put the data somewhere else first. The owner loop, the
//! data planes and the heartbeat thread use it together with [`crate::poll::wait_readable`].

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

/// A non-blocking `eventfd`, readable from the first [`notify`](Self::notify) until the next [`drain`](Self::drain).
///
/// Any number of notifications between two drains count as one, so a slow reader is never overrun.
#[derive(Debug)]
pub struct EventFd {
    // `File` gives safe read and write on the descriptor, through a shared reference.
    file: File,
}

impl EventFd {
    /// Opens a counter at zero. Fails when the process or the system is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        // SAFETY: eventfd takes two integers and touches no memory of ours.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just returned by eventfd, is open, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { file: File::from(fd) })
    }

    /// Makes the descriptor readable. Never blocks and cannot fail in a way that loses the wake-up.
    pub fn notify(&self) {
        // The only error of a valid eventfd is a full counter, and a full counter is readable already.
        let _ = (&self.file).write(&1u64.to_ne_bytes());
    }

    /// Takes the descriptor back to "not readable". Returns whether it had been notified.
    ///
    /// Drain first and look at the shared data afterwards: a notification that arrives in between then costs one idle
    /// turn and never a missed one.
    pub fn drain(&self) -> bool {
        let mut count = [0u8; 8];
        (&self.file).read(&mut count).is_ok()
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::poll::wait_readable;
    use std::time::Duration;

    #[test]
    fn many_notifications_are_one_wake_up() {
        let event = EventFd::new().unwrap();
        assert!(!event.drain(), "a fresh counter is not notified");
        event.notify();
        event.notify();
        assert_eq!(wait_readable(&[event.as_fd()], Some(Duration::ZERO)).unwrap(), 1);
        assert!(event.drain());
        assert!(!event.drain());
        assert_eq!(wait_readable(&[event.as_fd()], Some(Duration::ZERO)).unwrap(), 0);
    }

    #[test]
    fn a_notification_from_another_thread_wakes_a_waiter() {
        let event = EventFd::new().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| event.notify());
            let ready = wait_readable(&[event.as_fd()], Some(Duration::from_secs(5))).unwrap();
            assert_eq!(ready, 1);
        });
    }

    #[test]
    fn it_is_shared_between_threads() {
        fn shared<T: Send + Sync>() {}
        shared::<EventFd>();
    }
}
