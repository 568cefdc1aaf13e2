//! The part of the data plane's thread that gives service interfaces the kernel's program at XDP, and takes it back where it does not prove itself. What is
//! right for which interface says [`crate::dataplane::early`].
//!
//! An interface that has it is worked as before: what XDP passes up meets the program at tc, and without XDP that one judges every frame.

use std::collections::BTreeMap;
use std::time::Instant;

use farm_core::balance::plan::Plan;
use farm_core::config::XdpChoice;
use farm_sys::nic::{self, Received};
use tracing::{error, info, warn};

use super::Worker;
use super::in_place::all_are_cards;
use crate::dataplane::early::{Finding, LOOK, Probation, SAMPLE, can_send, objection, wish};
use crate::dataplane::kernel::Kernel;

/// Interfaces by their numbers, as far as frames are judged in the kernel there.
pub(super) type Earlies = BTreeMap<u32, Early>;

/// What has become of XDP on one interface.
#[derive(Debug)]
pub(super) struct Early {
    name: String,
    wish: XdpChoice,
    state: State,
}

#[derive(Debug)]
enum State {
    New,
    /// Frames are counted before anything is changed.
    Sampling {
        since: Instant,
        first: Received,
    },
    /// The program is there; when the next look is due.
    Proving {
        probation: Probation,
        due: Instant,
        what: String,
    },
    /// It is there for good.
    AtWork(String),
    /// It is not, and why.
    Without(String),
}

impl Early {
    /// As `farm status -v` says it.
    fn tell(&self) -> String {
        let name = &self.name;
        match &self.state {
            State::New | State::Sampling { .. } => format!("XDP on {name} is to be tried"),
            State::Proving { what, .. } => format!("{what}, on probation"),
            State::AtWork(what) => what.clone(),
            State::Without(why) => format!("no XDP on {name}: {why}"),
        }
    }

    fn next_at(&self) -> Option<Instant> {
        match &self.state {
            State::Sampling { since, .. } => Some(*since + SAMPLE),
            State::Proving { due, .. } => Some(*due),
            State::New | State::AtWork(_) | State::Without(_) => None,
        }
    }

    /// One step on; each state leads to a later one.
    fn step(&mut self, kernel: &mut Kernel, index: u32) {
        let now = Instant::now();
        match (self.wish, &mut self.state) {
            (XdpChoice::Off, State::New) => {
                kernel.detach_early(index);
                self.state = State::Without("as configured".to_owned());
            }
            (XdpChoice::On, State::New) => match attach(kernel, index, &self.name) {
                Ok(what) => {
                    info!(interface = self.name, "{what}");
                    self.state = State::AtWork(what);
                }
                Err(why) => {
                    kernel.detach_early(index);
                    error!(
                        interface = self.name,
                        "xdp=\"on\" cannot be: {why}; frames are judged at tc ingress alone"
                    );
                    self.state = State::Without(why);
                }
            },
            (XdpChoice::Auto, State::New) => match nic::look(index).and_then(|nic| Ok((nic, nic::received(index)?))) {
                Ok((nic, first)) => match objection(&nic).filter(|_| !all_are_cards()) {
                    Some(why) => self.go_without(kernel, index, why),
                    None => self.state = State::Sampling { since: now, first },
                },
                Err(error) => self.go_without(kernel, index, error.to_string()),
            },
            (_, State::Sampling { since, first }) if now >= *since + SAMPLE => {
                let first = *first;
                let last = nic::received(index).map_err(|error| error.to_string());
                match last.and_then(|last| Ok((last, attach(kernel, index, &self.name)?))) {
                    Ok((last, what)) => {
                        info!(interface = self.name, "{what}, on probation");
                        let now = Instant::now();
                        let probation = Probation::new(now, first, last);
                        let due = now + LOOK;
                        self.state = State::Proving { probation, due, what };
                    }
                    Err(why) => self.go_without(kernel, index, why),
                }
            }
            (_, State::Proving { probation, due, what }) if now >= *due => {
                *due = now + LOOK;
                let finding = nic::received(index).map(|received| probation.look(now, received));
                match finding.unwrap_or_else(|error| Finding::Fails(error.to_string())) {
                    Finding::Wait => {}
                    Finding::Works => {
                        info!(interface = self.name, "XDP has proved itself: frames go on coming in");
                        self.state = State::AtWork(std::mem::take(what));
                    }
                    Finding::Fails(why) => {
                        kernel.detach_early(index);
                        warn!(
                            interface = self.name,
                            "XDP has not proved itself: {why}; frames are judged at tc ingress alone"
                        );
                        self.state = State::Without(why);
                    }
                }
            }
            _ => {}
        }
    }

    /// Also takes off what the farmd before has left there.
    fn go_without(&mut self, kernel: &mut Kernel, index: u32, why: String) {
        kernel.detach_early(index);
        info!(interface = self.name, "no XDP: {why}");
        self.state = State::Without(why);
    }
}

/// Attaches the program; what there is then, or why not.
fn attach(kernel: &mut Kernel, index: u32, name: &str) -> Result<String, String> {
    let nic = nic::look(index).map_err(|error| error.to_string())?;
    let sends = can_send(&nic);
    kernel
        .attach_early(index, name, sends)
        .map_err(|error| error.to_string())?;
    let driver = nic.driver.as_deref().or(nic.kind.as_deref()).unwrap_or("its driver");
    let sent = if sends {
        ""
    } else {
        ", which leaves to tc what goes on to members"
    };
    Ok(format!("XDP on {name} ({driver}){sent}"))
}

impl Worker {
    /// Does what is due for each interface, of which `plan` says what is wanted there.
    pub(super) fn steer_early(&mut self, plan: &Plan) {
        let Some(kernel) = &mut self.judge.kernel else { return };
        let mut told = BTreeMap::new();
        for interface in &self.interfaces {
            let index = interface.index;
            let here = plan.vips.iter().filter(|vip| vip.interface == index);
            let taken: Vec<_> = here.map(|vip| vip.addr).filter(|addr| kernel.takes(*addr)).collect();
            let wish = wish(plan, index).filter(|_| !taken.is_empty());
            let known = self.early.get(&index).map(|early| early.wish);
            // What the farmd before has left there is for the first wish; there is none before its addresses are in the plan.
            let is_over = match known {
                Some(_) => known != wish,
                None => wish.is_none() && !kernel.follows(),
            };
            if is_over {
                kernel.detach_early(index);
                self.early.remove(&index);
            }
            let Some(wish) = wish else { continue };
            let early = self.early.entry(index).or_insert_with(|| Early {
                name: interface.name.clone(),
                wish,
                state: State::New,
            });
            early.step(kernel, index);
            told.extend(taken.into_iter().map(|addr| (addr, early.tell())));
        }
        let interfaces = &self.interfaces;
        self.early
            .retain(|index, _| interfaces.iter().any(|interface| interface.index == *index));
        self.early_at = self.early.values().filter_map(Early::next_at).min();
        self.stand(|standing| standing.early = told);
    }
}
