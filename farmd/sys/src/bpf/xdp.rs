//! The programs at XDP: loading them when they are wanted, attaching them to a driver, and dry runs.
//!
//! They are ahead of the program at tc and share its tables, so they never stand alone: [`Filter`] has them. Native mode only: generic XDP
//! costs more than tc ingress and saves nothing. Whether an interface should have one is the daemon's business.

use std::io;

use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, Xdp, XdpMode};

use super::{BpfError, DryRun, Filter, dry_run, failed};

/// The program that sends on, and the one that leaves that to tc.
const PROGRAMS: [&str; 2] = ["farm_early", "farm_early_drop"];

/// A program at XDP on an interface.
#[derive(Debug)]
pub(super) struct Early {
    // Detaches when it is dropped.
    link: XdpLink,
    sends: bool,
}

impl Filter {
    /// Puts the program at XDP ahead of the one at tc on this interface, in the driver, until it is detached, dropped, or the process ends. If it `sends`, what
    /// goes on to another member leaves from the driver too; else the program at tc sends it.
    ///
    /// Many drivers set up their queues anew for it, and some lose the carrier meanwhile.
    ///
    /// # Errors
    /// That the driver has no native XDP, that another program is there, or what else the kernel says.
    pub fn attach_xdp(&mut self, ifindex: u32, name: &str, sends: bool) -> Result<(), BpfError> {
        if self.early.get(&ifindex).is_some_and(|early| early.sends == sends) {
            return Ok(());
        }
        let fail = |error: &ProgramError| {
            let mut failed = failed(&format!("the driver of {name} does not take the program at XDP"), error);
            if let Some(hint) = hint(error) {
                failed.text.push_str(&format!(" ({hint})"));
            }
            failed
        };
        let before = self.early.remove(&ifindex);
        let program = self.early_program(sends)?;
        let id = match before {
            // In one step, and without a word to the driver.
            Some(early) => program.attach_to_link(early.link),
            None => program.attach_to_if_index(ifindex, XdpMode::Driver),
        };
        let id = id.map_err(|e| fail(&e))?;
        let link = program.take_link(id).map_err(|e| fail(&e))?;
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
fn hint(error: &ProgramError) -> Option<&'static str> {
    let mut source: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return match io.raw_os_error()? {
                libc::EOPNOTSUPP => Some("it has no native XDP"),
                libc::EBUSY | libc::EEXIST => Some("another program is there"),
                libc::EINVAL | libc::ERANGE => Some("its MTU is too large for it, or an offload such as LRO is on"),
                libc::ENOMEM | libc::ENOSPC => Some("it has not enough queues or memory"),
                _ => None,
            };
        }
        source = error.source();
    }
    None
}
