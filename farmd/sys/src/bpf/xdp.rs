//! The programs at XDP: loading them when they are wanted, attaching them to a driver, and dry runs.
//!
//! They are ahead of the program at tc and share its tables, so they never stand alone: [`Filter`] has them. Native mode only: generic XDP
//! costs more than tc ingress and saves nothing. Whether an interface should have one is the daemon's business.

use std::io;
use std::os::fd::AsFd;

use aya::programs::Xdp;

use super::link::Link;
use super::{BpfError, DryRun, Filter, Predecessor, dry_run, failed};

/// The program that sends on, and the one that leaves that to tc.
const PROGRAMS: [&str; 2] = ["farm_early", "farm_early_drop"];

/// A program at XDP on an interface.
#[derive(Debug)]
pub(super) struct Early {
    // Detaches when it is dropped.
    link: Link,
    sends: bool,
}

impl Early {
    /// Leaves the program in the driver to the farmd that this process executes next.
    pub(super) fn leave(self) -> io::Result<()> {
        self.link.leave()
    }
}

impl Filter {
    /// Puts the program at XDP ahead of the one at tc on this interface, in the driver, until it is detached, dropped, or the process ends. If it `sends`, what
    /// goes on to another member leaves from the driver too; else the program at tc sends it.
    ///
    /// Many drivers set up their queues anew for it, and some lose the carrier meanwhile; where one program takes another's place they need not.
    ///
    /// # Errors
    /// That the driver has no native XDP, that another program is there, or what else the kernel says.
    pub fn attach_xdp(&mut self, ifindex: u32, name: &str, sends: bool) -> Result<(), BpfError> {
        if self.early.get(&ifindex).is_some_and(|early| early.sends == sends) {
            return Ok(());
        }
        let what = format!("the driver of {name} does not take the program at XDP");
        let before = self.early.remove(&ifindex);
        let program = self.early_program(sends)?.fd().map_err(|e| failed(&what, &e))?;
        let link = match before {
            Some(early) => early.link.exchange(program.as_fd()).map(|()| early.link),
            None => Link::xdp(program.as_fd(), ifindex),
        };
        let link = link.map_err(|error| {
            let mut failed = failed(&what, &error);
            if let Some(hint) = hint(&error) {
                failed.text.push_str(&format!(" ({hint})"));
            }
            failed
        })?;
        self.early.insert(ifindex, Early { link, sends });
        Ok(())
    }

    /// Takes over what the farmd before has left at XDP on the interface, with this farmd's program in its place. As long as no plan is in force that one passes
    /// everything up, so that the program at tc that was left judges it.
    ///
    /// # Errors
    /// What the kernel says; nothing is at XDP there then.
    pub fn take_over_xdp(&mut self, before: &mut Predecessor, ifindex: u32) -> Result<(), BpfError> {
        let Some(link) = before.take_early(ifindex) else {
            return Ok(());
        };
        let what = "the program at XDP that the farmd before has left cannot be exchanged";
        let sends = false;
        let program = self.early_program(sends)?.fd().map_err(|e| failed(what, &e))?;
        link.exchange(program.as_fd()).map_err(|e| failed(what, &e))?;
        self.early.insert(ifindex, Early { link, sends });
        Ok(())
    }

    /// Takes the program at XDP off the interface; the one at tc stays.
    pub fn detach_xdp(&mut self, ifindex: u32) {
        self.early.remove(&ifindex);
    }

    /// As [`Filter::dry_run`], with the program at XDP: what it returns is numbered as in `linux/bpf.h`.
    ///
    /// # Errors
    /// What the kernel says, also to a frame of fewer than 14 bytes.
    pub fn dry_run_xdp(&mut self, frame: &[u8], repeat: u32, sends: bool) -> Result<DryRun, BpfError> {
        dry_run(self.early_program(sends)?, frame, repeat)
    }

    /// The program, loaded.
    fn early_program(&mut self, sends: bool) -> Result<&mut Xdp, BpfError> {
        let name = PROGRAMS[usize::from(!sends)];
        let program: &mut Xdp = self
            .ebpf
            .program_mut(name)
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| BpfError::new(format!("there is no {name} in the object")))?;
        if program.fd().is_err() {
            program
                .load()
                .map_err(|e| failed("the kernel does not take the program for XDP (it needs Linux 5.18)", &e))?;
        }
        Ok(program)
    }
}

/// What an error number means here.
fn hint(error: &io::Error) -> Option<&'static str> {
    match error.raw_os_error()? {
        libc::EOPNOTSUPP => Some("it has no native XDP"),
        libc::EBUSY | libc::EEXIST => Some("another program is there"),
        libc::EINVAL | libc::ERANGE => Some("its MTU is too large for it, or an offload such as LRO is on"),
        libc::ENOMEM | libc::ENOSPC => Some("it has not enough queues or memory"),
        _ => None,
    }
}
