//! The kernel program that drops every frame at once: what any program costs at the same place, to be taken off what ours costs.
//!
//! For measurements only; farmd never loads it.

use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};

use super::{BpfError, OBJECT, failed};

/// Its name in the object.
const PROGRAM: &str = "farm_nothing";

/// The program in the kernel; it leaves with the value.
pub struct Nothing(Ebpf);

impl std::fmt::Debug for Nothing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nothing(..)")
    }
}

impl Nothing {
    /// Loads it.
    ///
    /// # Errors
    /// As [`super::Filter::load`].
    pub fn load() -> Result<Self, BpfError> {
        let object = OBJECT.ok_or_else(BpfError::missing)?;
        let ebpf = EbpfLoader::new()
            .load(object)
            .map_err(|e| failed("the kernel does not take the program's tables", &e))?;
        let mut nothing = Self(ebpf);
        nothing
            .program()?
            .load()
            .map_err(|e| failed("the kernel does not take the program", &e))?;
        Ok(nothing)
    }

    /// Puts it in the way of what comes in on the interface called `name`, as a tcx link.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn attach(&mut self, name: &str) -> Result<(), BpfError> {
        let order = TcAttachOptions::TcxOrder(LinkOrder::default());
        let attached = self.program()?.attach_with_options(name, TcAttachType::Ingress, order);
        attached.map_err(|e| failed(&format!("the program cannot be attached to {name}"), &e))?;
        Ok(())
    }

    /// Nanoseconds that it takes for `frame`, the mean of `repeat` dry runs.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn dry_run(&mut self, frame: &[u8], repeat: u32) -> Result<u64, BpfError> {
        let mut options = TestRunOptions::new();
        options.data_in = Some(frame);
        options.repeat = repeat;
        let result = self.program()?.test_run(options).map_err(|e| failed("a dry run", &e))?;
        Ok(u64::try_from(result.duration.as_nanos()).unwrap_or(u64::MAX))
    }

    fn program(&mut self) -> Result<&mut SchedClassifier, BpfError> {
        let program = self.0.program_mut(PROGRAM);
        program
            .and_then(|program| program.try_into().ok())
            .ok_or_else(|| BpfError::new(format!("there is no {PROGRAM} in the object")))
    }
}
