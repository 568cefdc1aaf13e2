//! The part of the data plane's thread that keeps the program in the way of the service interfaces: loading and attaching it, and noticing that somebody has taken it off.
//!
//! Without the program nothing reaches the stack (the nf_tables chain drops everything), so what was taken off is put back, and where that fails the interface's
//! frames are captured until it works. Who has what is told in [`Standing`].
//!
//! Over a restart of farmd in place the program of the old one goes on with the old plan; that of the new one is attached ahead of it, lets everything by, and gets its first
//! plan when that accepts what this host has connections of. Then the old one goes. So each frame is judged by one of the two, and none by neither.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use farm_core::balance::plan::{BucketState, GroupPlan, Plan};
use farm_sys::bpf::{Attachment, BpfError, Filter};
use farm_sys::{clock, interface};
use tracing::{debug, info, warn};

use super::Worker;
use crate::dataplane::kernel::Kernel;
use crate::dataplane::{Count, Counters, Interface, Lease, Standing};

/// The loopback interface of every network namespace.
const LOOPBACK: u32 = 1;
/// Says how the program is attached, for tests: `tcx`, `clsact`, `none` for a host that does not take it, or [`CARD`].
const ATTACHMENT: &str = "FARM_ATTACH";
/// XDP is tried on every interface as on a network card.
const CARD: &str = "card";

/// The program in the kernel, with what it shares with this process.
pub(super) fn kernel(plan: &Plan, lease: &Lease, counters: &Counters) -> Result<Kernel, BpfError> {
    let wanted = std::env::var(ATTACHMENT).unwrap_or_default();
    if wanted == "none" {
        return Err(BpfError::new(format!(
            "{ATTACHMENT} says that this host takes no program"
        )));
    }
    let ahead = clock::ahead_of_kernel();
    if ahead != 0 {
        // The lease would end at another time than it says, or never.
        return Err(BpfError::new(format!(
            "farmd runs in a time namespace whose clock is {ahead} s off the kernel's"
        )));
    }
    let mut filter = Filter::load()?;
    match wanted.as_str() {
        "clsact" => filter.set_attachment(Attachment::Clsact),
        "tcx" => probe(&mut filter)?,
        _ => {
            if !wanted.is_empty() && wanted != CARD {
                warn!(
                    wanted,
                    "{ATTACHMENT} is none of tcx, clsact, card and none; the kernel decides"
                );
            }
            // Before anybody relies on it: whether the kernel has such links at all.
            if let Err(error) = probe(&mut filter) {
                info!(%error, "no tcx links here (Linux 6.6 has them): the program is attached as a filter at clsact");
                filter.set_attachment(Attachment::Clsact);
            }
        }
    }
    counters.include(filter.counters());
    let kernel = Kernel::new(filter, plan);
    lease.extend_to(kernel.lease());
    Ok(kernel)
}

/// True if a test wants every interface to be taken for a network card.
pub(super) fn all_are_cards() -> bool {
    std::env::var_os(ATTACHMENT).is_some_and(|wanted| wanted == CARD)
}

/// Whether the kernel has tcx links.
fn probe(filter: &mut Filter) -> Result<(), BpfError> {
    filter.attach(LOOPBACK, "lo")?;
    filter.detach(LOOPBACK);
    Ok(())
}

impl Worker {
    /// Changes what is told of where frames are judged.
    pub(super) fn stand(&self, change: impl FnOnce(&mut Standing)) {
        change(&mut self.standing.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Puts the program in the way of a service interface. Where that fails, whoever asks is told why its frames are captured; false then, and where there is no program.
    pub(super) fn attach_program(&mut self, interface: &Interface) -> bool {
        let Some(kernel) = &mut self.judge.kernel else {
            return false;
        };
        let (attachment, result) = (kernel.attachment(), kernel.attach(interface.index, &interface.name));
        let problem = result.err().map(|error| error.to_string());
        if let Some(problem) = &problem {
            warn!(
                interface = interface.name,
                problem, "frames are captured and judged in user space; a module with dataplane=\"bpf\" does not start"
            );
        }
        let is_attached = problem.is_none();
        self.stand(|standing| {
            standing.attachment = Some(attachment);
            standing
                .captured
                .extend(problem.map(|problem| (interface.name.clone(), problem)));
        });
        is_attached
    }

    /// True while the program that the farmd before has left is to go on judging: by `plan` connections of this host would be dropped, which it has not
    /// counted yet.
    pub(super) fn follows(&self, plan: &Plan) -> bool {
        let is_followed = self.judge.kernel.as_ref().is_some_and(Kernel::follows);
        let drops =
            |group: &GroupPlan, bucket: &u16| group.states.get(usize::from(*bucket)) == Some(&BucketState::Foreign);
        let mut groups = plan.groups.iter().zip(&self.found);
        let knows = self.counted && groups.all(|(group, found)| !found.buckets.iter().any(|b| drops(group, b)));
        is_followed && Instant::now() < self.follows_until && !knows
    }

    /// Judges in the place of the program that the farmd before has left, if it is time for that.
    pub(super) fn succeed(&mut self) {
        let plan = Arc::clone(&self.judge.plan);
        if self.judge.kernel.as_ref().is_some_and(Kernel::follows) && !self.follows(&plan) {
            self.install_anew();
        }
    }

    /// Leaves the program, if that is wanted, to the farmd that takes this process's place.
    pub(super) fn leave_program(&mut self) {
        if let Some(kernel) = self.judge.kernel.as_mut().filter(|_| self.leaves)
            && let Err(error) = kernel.leave()
        {
            warn!(%error, "frames are lost until the next farmd judges them");
        }
    }

    /// Takes the program off an interface that is no longer served.
    pub(super) fn detach_program(&mut self, index: u32, name: Option<&str>) {
        if let Some(kernel) = &mut self.judge.kernel {
            kernel.detach(index);
        }
        self.stand(|standing| standing.captured.retain(|captured, _| Some(captured.as_str()) != name));
    }

    /// Looks whether the program is still where it was put, and puts it where it should be and is not; and which way what it accepts is to go.
    pub(super) fn watch_program(&mut self) {
        let served: Vec<(u32, String)> = self.interfaces.iter().map(|i| (i.index, i.name.clone())).collect();
        if let Some(kernel) = &mut self.judge.kernel {
            kernel.choose_way();
        }
        let mut changed = false;
        for (index, name) in served {
            changed |= self.watch_program_on(index, &name);
        }
        if changed {
            self.install_anew();
        }
    }

    /// Returns whether its frames are judged elsewhere from now on.
    fn watch_program_on(&mut self, index: u32, name: &str) -> bool {
        let Some(kernel) = &mut self.judge.kernel else {
            return false;
        };
        if !kernel.is_attached(index) {
            let error = match kernel.attach(index, name) {
                Ok(()) => None,
                Err(error) => Some(error.to_string()),
            };
            let judged = error.is_none();
            self.stand(|standing| match error {
                Some(error) => drop(standing.captured.insert(name.to_owned(), error)),
                None => drop(standing.captured.remove(name)),
            });
            return judged;
        }
        match kernel.is_in_place(index) {
            Ok(true) => return false,
            // It went with its interface, which is looked after elsewhere.
            Ok(false) if interface::index(name).ok() != Some(index) => return false,
            Ok(false) => {}
            Err(error) => {
                debug!(%error, interface = name, "where the program is");
                return false;
            }
        }
        self.judge.counters.add(Count::ProgramLost, 1);
        match kernel.put_back(index, name) {
            Ok(()) => {
                warn!(
                    interface = name,
                    "another program has taken the eBPF program off the interface; it was put back"
                );
                false
            }
            Err(error) => {
                warn!(%error, interface = name, "another program has taken the eBPF program off the interface, and it cannot be put back: frames are captured and judged in user space");
                self.stand(|standing| drop(standing.captured.insert(name.to_owned(), error.to_string())));
                true
            }
        }
    }
}
