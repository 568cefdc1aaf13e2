//! Signals as something to read, in place of an interruption.
//!
//! Owns one `signalfd(2)` and what must be true for it to work: the signals are blocked, so that none is acted on behind the
//! reader's back. The owner loop waits for it together with its sockets. It never decides what a signal means.
//!
//! A blocked signal waits in the process until somebody reads it, also over `execve(2)`, which keeps the mask and what waits. So one
//! that comes while a daemon is replaced in place is read by its successor and not lost. Everything else that the process
//! starts must be freed from the mask: [`crate::process::unblock_signals`].

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::process::Signal;

/// A non-blocking `signalfd`, readable while one of its signals waits.
#[derive(Debug)]
pub struct SignalFd {
    // `File` gives safe read on the descriptor, through a shared reference.
    file: File,
    signals: Vec<Signal>,
}

impl SignalFd {
    /// Blocks `signals` in the calling thread, and opens a descriptor from which they are read.
    ///
    /// To be called before other threads are started, because they inherit the mask: a thread without it would be interrupted
    /// in the reader's place. Signals that wait already are kept. A shell starts what runs in its background with SIGINT ignored;
    /// that ends too, for this process and for those that it starts.
    ///
    /// # Errors
    /// `InvalidInput` for signals that cannot be blocked (`Kill`, `Stop`); otherwise when file descriptors have run out.
    pub fn block(signals: &[Signal]) -> io::Result<Self> {
        if let Some(signal) = signals.iter().find(|s| matches!(s, Signal::Kill | Signal::Stop)) {
            let text = format!("{signal:?} cannot be blocked");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let set = set_of(signals);
        // SAFETY: `set` is an initialised signal set that is only read; a null old mask is allowed.
        let result = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        for signal in signals {
            // SAFETY: the default action is no code of ours; a blocked signal is not acted on.
            unsafe { libc::signal(signal.number(), libc::SIG_DFL) };
        }
        // SAFETY: -1 asks for a new descriptor; `set` is only read.
        let fd = unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just returned by signalfd, is open, and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            file: File::from(fd),
            signals: signals.to_vec(),
        })
    }

    /// Takes one signal that waits for the process, or for the calling thread; `None` if none does. Never blocks.
    ///
    /// The same signal sent several times between two reads is one.
    ///
    /// # Errors
    /// What the kernel reports; nothing is lost by it.
    pub fn take(&self) -> io::Result<Option<Signal>> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        match (&self.file).read(&mut info) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(error),
        }
        // The record begins with the signal's number.
        let number = info.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        let taken = self.signals.iter().find(|s| u32::try_from(s.number()) == Ok(number));
        Ok(taken.copied())
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The kernel's form of a set of signals.
pub(crate) fn set_of(signals: &[Signal]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set that it is given.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in signals {
        // SAFETY: the set is initialised by now, and the number is that of a signal.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal.number()) };
    }
    // SAFETY: initialised above.
    unsafe { set.assume_init() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::poll::wait_readable;
    use std::thread;
    use std::time::Duration;

    /// Sends a signal to the calling thread alone: the others of this process are not to be ended by it.
    fn raise(signal: Signal) {
        // SAFETY: raise takes an integer; the tests below block the signal first.
        assert_eq!(unsafe { libc::raise(signal.number()) }, 0);
    }

    #[test]
    fn a_blocked_signal_waits_until_it_is_read() {
        let reader = thread::spawn(|| {
            let signals = SignalFd::block(&[Signal::Term, Signal::Usr1]).unwrap();
            assert_eq!(signals.take().unwrap(), None);
            assert_eq!(wait_readable(&[signals.as_fd()], Some(Duration::ZERO)).unwrap(), 0);
            raise(Signal::Term);
            raise(Signal::Term);
            assert_eq!(wait_readable(&[signals.as_fd()], None).unwrap(), 1);
            assert_eq!(signals.take().unwrap(), Some(Signal::Term));
            assert_eq!(signals.take().unwrap(), None, "sent twice before it is read, it is one");
            raise(Signal::Usr1);
            assert_eq!(signals.take().unwrap(), Some(Signal::Usr1));
        });
        reader.join().unwrap();
    }

    /// As for a daemon that takes the place of another one.
    #[test]
    fn a_signal_that_came_before_the_descriptor_was_there_is_read() {
        let reader = thread::spawn(|| {
            drop(SignalFd::block(&[Signal::Term]).unwrap());
            raise(Signal::Term);
            let signals = SignalFd::block(&[Signal::Term]).unwrap();
            assert_eq!(signals.take().unwrap(), Some(Signal::Term));
        });
        reader.join().unwrap();
    }

    #[test]
    fn a_signal_that_was_ignored_is_so_no_more() {
        let reader = thread::spawn(|| {
            // SAFETY: to ignore a signal is no code of ours. No other test of this process uses this one.
            let before = unsafe { libc::signal(libc::SIGUSR2, libc::SIG_IGN) };
            assert_eq!(before, libc::SIG_DFL);
            let signals = SignalFd::block(&[Signal::Usr2]).unwrap();
            raise(Signal::Usr2);
            assert_eq!(signals.take().unwrap(), Some(Signal::Usr2));
            // SAFETY: as above.
            assert_eq!(unsafe { libc::signal(libc::SIGUSR2, libc::SIG_DFL) }, libc::SIG_DFL);
        });
        reader.join().unwrap();
    }

    #[test]
    fn what_cannot_be_blocked_is_refused() {
        let error = SignalFd::block(&[Signal::Term, Signal::Kill]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(error.to_string().contains("Kill"), "{error}");
    }
}
