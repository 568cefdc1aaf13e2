//! The kernel programs that drop every frame at once: what any program costs at the same place, to be taken off what ours cost; and one that reads
//! the clock first.
//!
//! For measurements only; farmd never loads them.

use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, Xdp};
use aya::{Ebpf, EbpfLoader};

use super::{BpfError, OBJECT, dry_run, failed};

/// Their names in the object: at tc, at tc with the clock, and at XDP.
const PROGRAM: &str = "farm_nothing";
const CLOCK: &str = "farm_clock";
const EARLY: &str = "farm_nothing_early";

/// The programs in the kernel; they leave with the value.
pub struct Nothing(Ebpf);

impl std::fmt::Debug for Nothing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nothing(..)")
    }
}

impl Nothing {
    /// Loads them.
    ///
    /// # Errors
    /// As [`super::Filter::load`].
    pub fn load() -> Result<Self, BpfError> {
        let object = OBJECT.ok_or_else(BpfError::missing)?;
        let ebpf = EbpfLoader::new()
            .load(object)
            .map_err(|e| failed("the kernel does not take the program's tables", &e))?;
        let mut nothing = Self(ebpf);
        let refused = |e| failed("the kernel does not take the program", &e);
        nothing.program(PROGRAM)?.load().map_err(refused)?;
        nothing.program(CLOCK)?.load().map_err(refused)?;
        nothing.early()?.load().map_err(refused)?;
        Ok(nothing)
    }

    /// Puts the one at tc in the way of what comes in on the interface called `name`, as a tcx link.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach(&mut self, name: &str) -> Result<(), BpfError> {
        let order = TcAttachOptions::TcxOrder(LinkOrder::default());
        let attached = self
            .program(PROGRAM)?
            .attach_with_options(name, TcAttachType::Ingress, order);
        attached.map_err(|e| failed(&format!("the program cannot be attached to {name}"), &e))?;
        Ok(())
    }

    /// Nanoseconds that the one at tc takes for `frame`, the mean of `repeat` dry runs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn dry_run(&mut self, frame: &[u8], repeat: u32) -> Result<u64, BpfError> {
        Ok(dry_run(self.program(PROGRAM)?, frame, repeat)?.nanos)
    }

    /// The same for the one at tc that reads the clock.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn dry_run_clock(&mut self, frame: &[u8], repeat: u32) -> Result<u64, BpfError> {
        Ok(dry_run(self.program(CLOCK)?, frame, repeat)?.nanos)
    }

    /// The same for the one at XDP.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn dry_run_xdp(&mut self, frame: &[u8], repeat: u32) -> Result<u64, BpfError> {
        Ok(dry_run(self.early()?, frame, repeat)?.nanos)
    }

    fn program(&mut self, name: &str) -> Result<&mut SchedClassifier, BpfError> {
        let program = self.0.program_mut(name);
        program
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| BpfError::new(format!("there is no {name} in the object")))
    }

    fn early(&mut self) -> Result<&mut Xdp, BpfError> {
        let program = self.0.program_mut(EARLY);
        program
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| BpfError::new(format!("there is no {EARLY} in the object")))
    }
}
