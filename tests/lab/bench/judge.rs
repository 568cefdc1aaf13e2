//! The program in the kernel on single frames, without any of them going anywhere (BPF_PROG_TEST_RUN), beside one that does nothing.
//!
//! Owns both programs and the network namespace they run in, where connections may be made for them to find.

use anyhow::{Result, bail};
use farm_core::balance::plan::Plan;
use farm_core::id::BUCKETS;
use farm_core::wire::heartbeat::BucketSet;
use farm_sys::bpf::nothing::Nothing;
use farm_sys::bpf::{COUNTS, Filter};
use farmd::dataplane::kernel::Kernel;

use super::frames::SERVICE_MAC;
use crate::space::Space;

/// Of the loopback interface, on which dry runs come in.
pub const LOOPBACK: u32 = 1;

/// See the module doc.
#[derive(Debug)]
pub struct Judge {
    kernel: Kernel,
    nothing: Nothing,
    // Goes last.
    space: Space,
}

impl Judge {
    /// Loads the programs into a namespace of their own, with `plan` in force; its interface is [`LOOPBACK`].
    ///
    /// # Errors
    /// The program is not built in, or the kernel does not take it.
    pub fn new(plan: &Plan) -> Result<Self> {
        let space = Space::create("judge")?;
        space.ip(&["link set lo up"])?;
        let loaded = space.run(|| -> Result<(Kernel, Nothing)> {
            let mut kernel = Kernel::new(Filter::load()?, plan);
            // The address that frames accepted through the TAP get: theirs, so that a frame is the same each time it is judged.
            kernel.set_tap(Some((LOOPBACK, SERVICE_MAC)));
            kernel.set_tracked(false);
            // It need not be there to be run, and would keep the namespace's own connections from their addresses.
            kernel.attach(LOOPBACK, "lo")?;
            kernel.filter().detach(LOOPBACK);
            kernel.lease().renew(u64::MAX);
            Ok((kernel, Nothing::load()?))
        });
        let (kernel, nothing) = loaded?;
        let mut judge = Self { kernel, nothing, space };
        judge.install(plan, false)?;
        Ok(judge)
    }

    /// Puts another plan in force, with all of its buckets just opened if `young`.
    ///
    /// # Errors
    /// The tables have no room for its addresses.
    pub fn install(&mut self, plan: &Plan, young: bool) -> Result<()> {
        let young: Vec<BucketSet> = plan
            .groups
            .iter()
            .filter(|_| young)
            .map(|_| (0..BUCKETS).collect())
            .collect();
        self.kernel.install(plan, &young);
        if let Some(vip) = plan.vips.iter().find(|vip| !self.kernel.takes(vip.addr)) {
            bail!("the tables of the kernel program have no room for {}", vip.addr);
        }
        Ok(())
    }

    /// Where connections of this host are found.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Nanoseconds for `frame` without those of a program that does nothing: the means of `repeat` runs each, one after the other.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn net_nanos(&mut self, frame: &[u8], repeat: u32) -> Result<f64> {
        let Self { kernel, nothing, space } = self;
        let (whole, idle) = space.run(|| -> Result<(u64, u64)> {
            let whole = kernel.filter().dry_run(frame, repeat)?.nanos;
            Ok((whole, nothing.dry_run(frame, repeat)?))
        })?;
        Ok(whole as f64 - idle as f64)
    }

    /// As [`Self::net_nanos`], at XDP: of the program there, without those of one that does nothing there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn net_nanos_early(&mut self, frame: &[u8], repeat: u32) -> Result<f64> {
        let Self { kernel, nothing, space } = self;
        let (whole, idle) = space.run(|| -> Result<(u64, u64)> {
            let whole = kernel.filter().dry_run_xdp(frame, repeat, false)?.nanos;
            Ok((whole, nothing.dry_run_xdp(frame, repeat)?))
        })?;
        Ok(whole as f64 - idle as f64)
    }

    /// As [`Self::net_nanos`], of a program that reads the clock and does nothing else.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn net_nanos_clock(&mut self, frame: &[u8], repeat: u32) -> Result<f64> {
        let Self { nothing, space, .. } = self;
        let (whole, idle) = space.run(|| -> Result<(u64, u64)> {
            let whole = nothing.dry_run_clock(frame, repeat)?;
            Ok((whole, nothing.dry_run(frame, repeat)?))
        })?;
        Ok(whole as f64 - idle as f64)
    }

    /// Nanoseconds of the program that does nothing.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn idle_nanos(&mut self, frame: &[u8], repeat: u32) -> Result<f64> {
        let Self { nothing, space, .. } = self;
        Ok(space.run(|| nothing.dry_run(frame, repeat))? as f64)
    }

    /// The counters that one run for `frame` raises, at tc or, if `early`, at XDP.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn counted(&mut self, frame: &[u8], early: bool) -> Result<Vec<usize>> {
        let Self { kernel, space, .. } = self;
        let before = kernel.filter().counters().read()?;
        space.run(|| match early {
            false => kernel.filter().dry_run(frame, 1),
            true => kernel.filter().dry_run_xdp(frame, 1, false),
        })?;
        let after = kernel.filter().counters().read()?;
        Ok((0..COUNTS).filter(|i| after[*i] > before[*i]).collect())
    }
}
