//! Keeps the heartbeat thread running when the machine is busy or short of memory, and a measurement on one processor.
//!
//! Owns nothing: it changes the calling thread or the process once, at start. A farm whose heartbeats wait behind a backup
//! job fails over for nothing.

use std::io;

/// Gives the calling thread real-time priority (`SCHED_FIFO`): it runs before every ordinary thread, and only it, as children
/// start with ordinary priority.
///
/// `priority` is 1 (lowest) to 99. A few milliseconds of work per second is what such a thread may do.
///
/// # Errors
/// `InvalidInput` outside of 1 to 99; `PermissionDenied` without CAP_SYS_NICE or a limit (`RLIMIT_RTPRIO`) that allows it.
pub fn set_realtime(priority: u8) -> io::Result<()> {
    if !(1..=99).contains(&priority) {
        let text = format!("real-time priority {priority}, expected 1 to 99");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    let parameters = libc::sched_param {
        sched_priority: libc::c_int::from(priority),
    };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: the pointer leads to one `sched_param`, which is only read; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const parameters) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Gives the calling thread a larger share of the processors than ordinary threads have, without keeping them from running.
///
/// `nice` is -20 (most) to 19 (least).
///
/// # Errors
/// `PermissionDenied` for less than the present value without CAP_SYS_NICE or a limit (`RLIMIT_NICE`) that allows it.
pub fn set_nice(nice: i8) -> io::Result<()> {
    // SAFETY: setpriority takes three integers; on Linux 0 is the calling thread.
    let result = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice.into()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Keeps the process's memory from being swapped out: what is there now, and what is touched later.
///
/// Memory that was never touched (thread stacks above all) takes no room by this.
///
/// # Errors
/// `PermissionDenied` or out of memory without CAP_IPC_LOCK or a limit (`RLIMIT_MEMLOCK`) that allows it, also for what comes later.
pub fn lock_memory() -> io::Result<()> {
    // SAFETY: mlockall takes an integer and changes no memory's contents.
    let result = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    has_room_to_grow().inspect_err(|_| {
        // SAFETY: munlockall takes nothing and changes no memory's contents.
        unsafe { libc::munlockall() };
    })
}

/// Whether the limit of locked memory holds for this process: then what fits it now would fail to grow later, where nothing could be done about it.
fn has_room_to_grow() -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer leads to a valid place for the answer.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let Some(length) = usize::try_from(limit.rlim_cur)
        .ok()
        .and_then(|limit| limit.checked_add(4096))
    else {
        return Ok(());
    };
    if limit.rlim_cur == libc::RLIM_INFINITY {
        return Ok(());
    }
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping that nobody can touch; nothing that exists is overwritten.
    let probe = unsafe { libc::mmap(std::ptr::null_mut(), length, libc::PROT_NONE, flags, -1, 0) };
    if probe == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the very mapping that was just made.
    unsafe { libc::munmap(probe, length) };
    Ok(())
}

/// Gives memory that the heap holds free back to the kernel: after a start that needed more than what follows. Does nothing with another C library than
/// glibc. To be called before [`lock_memory`]: of locked memory nothing is given back.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes an integer and touches nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Keeps the calling thread on processor number `processor`.
///
/// # Errors
/// `InvalidInput` if this process may not run there, or there is none of that number.
pub fn stay_on(processor: usize) -> io::Result<()> {
    // SAFETY: a set of processors is plain bits, of which all zero is the empty one.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if processor >= 8 * size_of::<libc::cpu_set_t>() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the number is one of the set's bits, as just checked.
    unsafe { libc::CPU_SET(processor, &mut set) };
    // SAFETY: the pointer leads to a set of the size that is told, which is only read; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_out_of_range_is_refused() {
        assert_eq!(set_realtime(0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(set_realtime(100).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_processor_that_is_not_there_is_refused() {
        for number in [1023, 1 << 20] {
            let outcome = std::thread::spawn(move || stay_on(number)).join().unwrap();
            assert_eq!(outcome.unwrap_err().kind(), io::ErrorKind::InvalidInput, "{number}");
        }
    }

    #[test]
    fn a_thread_may_always_be_nicer() {
        let outcome = std::thread::spawn(|| set_nice(19)).join().unwrap();
        assert!(outcome.is_ok(), "{outcome:?}");
    }

    #[test]
    fn only_the_calling_thread_becomes_real_time() {
        // SAFETY: sched_getscheduler takes an integer; 0 is the calling thread.
        let policy = || unsafe { libc::sched_getscheduler(0) };
        let before = policy();
        let outcome = std::thread::spawn(move || set_realtime(1).map(|()| policy()))
            .join()
            .unwrap();
        match outcome {
            Ok(set) => assert_eq!(set, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{error}"),
        }
        assert_eq!(policy(), before);
    }
}
