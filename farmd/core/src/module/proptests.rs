//! Random commands, answers and delays against the promises the rest of the daemon relies on.

use std::collections::VecDeque;
use std::time::Duration;

use proptest::prelude::*;

use super::state::{ModuleAction, ModuleEvent, ModuleMachine, Script, ScriptOutcome};
use super::tests::config;
use crate::api::ModuleState;
use crate::config::CheckerAction;

/// One random act of the outside world.
#[derive(Clone, Debug)]
enum Act {
    Command {
        verb: u8,
        counted: bool,
    },
    /// The oldest thing asked for is answered.
    Answer {
        good: bool,
    },
    /// A checker that runs gives a verdict.
    Verdict {
        checker: usize,
        up: bool,
    },
    /// An answer to nothing.
    Stray {
        which: u8,
    },
    Wait {
        millis: u64,
    },
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => (0..5_u8, any::<bool>()).prop_map(|(verb, counted)| Act::Command { verb, counted }),
        8 => prop::bool::weighted(0.85).prop_map(|good| Act::Answer { good }),
        4 => (0..2_usize, prop::bool::weighted(0.7)).prop_map(|(checker, up)| Act::Verdict { checker, up }),
        1 => (0..9_u8).prop_map(|which| Act::Stray { which }),
        1 => (0..3000_u64).prop_map(|millis| Act::Wait { millis }),
    ]
}

/// What the machine waits for.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Owed {
    Script(Script),
    VipUp,
    VipGone,
    Handover,
}

/// The outside world, and the machine's promises to it.
struct World {
    machine: ModuleMachine,
    now: Duration,
    owed: VecDeque<Owed>,
    checkers: bool,
    passed: [bool; 2],
    open: bool,
    started: bool,
    vip: bool,
    /// Commands that nobody has answered yet.
    waiting: usize,
}

impl World {
    fn new() -> Self {
        Self {
            machine: ModuleMachine::new(&config(&[CheckerAction::Restart, CheckerAction::StopStart])),
            now: Duration::ZERO,
            owed: VecDeque::new(),
            checkers: false,
            passed: [false; 2],
            open: false,
            started: false,
            vip: false,
            waiting: 0,
        }
    }

    fn feed(&mut self, event: ModuleEvent) -> Result<(), TestCaseError> {
        let actions = self.machine.handle(self.now, event);
        self.obey(actions)
    }

    fn obey(&mut self, actions: Vec<ModuleAction>) -> Result<(), TestCaseError> {
        for action in actions {
            match action {
                ModuleAction::RunScript { script, .. } => {
                    let busy = self.owed.iter().any(|owed| matches!(owed, Owed::Script(_)));
                    prop_assert!(!busy, "{script} asked for while another script runs: {:?}", self.owed);
                    prop_assert!(!self.open, "{script} runs while traffic is open");
                    self.started = false;
                    self.owed.push_back(Owed::Script(script));
                }
                ModuleAction::KillScript => {
                    prop_assert!(
                        self.owed.iter().any(|owed| matches!(owed, Owed::Script(_))),
                        "nothing to kill"
                    );
                }
                ModuleAction::SetUpVip => {
                    prop_assert!(!self.vip, "set up twice");
                    self.vip = true;
                    self.owed.push_back(Owed::VipUp);
                }
                ModuleAction::TearDownVip => {
                    prop_assert!(self.vip, "nothing to tear down");
                    self.vip = false;
                    self.owed.push_back(Owed::VipGone);
                }
                ModuleAction::OpenTraffic => {
                    prop_assert!(!self.open && self.started && self.vip && self.passed == [true; 2]);
                    prop_assert!(self.machine.ready());
                    self.open = true;
                }
                ModuleAction::CloseTraffic => {
                    prop_assert!(self.open);
                    self.open = false;
                    self.owed.push_back(Owed::Handover);
                }
                ModuleAction::StartCheckers => {
                    prop_assert!(!self.checkers && self.started);
                    self.checkers = true;
                    self.passed = [false; 2];
                }
                ModuleAction::StopCheckers => {
                    prop_assert!(self.checkers);
                    self.checkers = false;
                }
                ModuleAction::ResetConnections => prop_assert!(!self.open),
                ModuleAction::Log { text, .. } => prop_assert!(!text.is_empty()),
                ModuleAction::Finished { .. } => self.waiting = 0,
            }
        }
        prop_assert_eq!(self.machine.ready(), self.open);
        prop_assert_eq!(self.machine.why().is_empty(), self.machine.ready());
        if !self.machine.active() {
            prop_assert!(!self.vip && !self.checkers, "something is left in STOP");
            prop_assert!(
                self.owed
                    .iter()
                    .all(|owed| *owed == Owed::Handover || *owed == Owed::VipUp),
                "{:?}",
                self.owed
            );
        }
        Ok(())
    }

    fn answer(&mut self, good: bool) -> Result<(), TestCaseError> {
        let Some(owed) = self.owed.pop_front() else {
            return Ok(());
        };
        match owed {
            Owed::Script(script) => {
                if script == Script::StartBoth {
                    self.started = good;
                }
                let outcome = if good {
                    ScriptOutcome::Exited(0)
                } else {
                    ScriptOutcome::TimedOut
                };
                self.feed(ModuleEvent::ScriptExited { script, outcome })
            }
            Owed::VipUp => self.feed(ModuleEvent::VipReady(if good { Ok(()) } else { Err("no".into()) })),
            Owed::VipGone => self.feed(ModuleEvent::VipGone(if good { vec![] } else { vec!["no".into()] })),
            Owed::Handover => self.feed(ModuleEvent::HandoverDone),
        }
    }

    fn play(&mut self, act: &Act) -> Result<(), TestCaseError> {
        match *act {
            Act::Command { verb, counted } => {
                let by = "x".to_owned();
                let identity = counted.then(|| by.clone());
                self.waiting += 1;
                self.feed(match verb {
                    0 => ModuleEvent::Start { by, identity },
                    1 => ModuleEvent::Stop { by, identity },
                    2 => ModuleEvent::Restart { by, identity },
                    3 => ModuleEvent::StopStart { by, identity },
                    _ => ModuleEvent::ForceStop { by, identity },
                })
            }
            Act::Answer { good } => self.answer(good),
            Act::Verdict { checker, up } if self.checkers => {
                self.passed[checker] = up;
                self.feed(ModuleEvent::Checked {
                    resource: format!("tcp.c{checker}"),
                    up,
                    detail: "probe".into(),
                })
            }
            Act::Verdict { .. } => Ok(()),
            Act::Stray { which } => {
                let owes = |owed: Owed| self.owed.contains(&owed);
                let stray = |script| (!owes(Owed::Script(script))).then_some(script);
                let event = match which {
                    0 if !owes(Owed::VipUp) => Some(ModuleEvent::VipReady(Ok(()))),
                    1 if !owes(Owed::VipGone) => Some(ModuleEvent::VipGone(vec![])),
                    2 if !owes(Owed::Handover) => Some(ModuleEvent::HandoverDone),
                    3 => Some(ModuleEvent::Checked {
                        resource: "tcp.zz".into(),
                        up: false,
                        detail: "x".into(),
                    }),
                    _ => Script::ALL
                        .get(usize::from(which).saturating_sub(4))
                        .and_then(|s| stray(*s))
                        .map(|script| ModuleEvent::ScriptExited {
                            script,
                            outcome: ScriptOutcome::Exited(0),
                        }),
                };
                event.map_or(Ok(()), |event| self.feed(event))
            }
            Act::Wait { millis } => {
                self.now += Duration::from_millis(millis);
                let actions = self.machine.handle_timeout(self.now);
                self.obey(actions)
            }
        }
    }

    /// Answers everything until nothing is asked any more.
    fn settle(&mut self) -> Result<(), TestCaseError> {
        for _ in 0..40 {
            if self.owed.is_empty() {
                break;
            }
            self.answer(true)?;
        }
        prop_assert!(self.owed.is_empty(), "the machine never comes to rest: {:?}", self.owed);
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn the_promises_hold_whatever_happens_and_stop_always_reaches_stop(
        acts in proptest::collection::vec(act(), 0..120),
    ) {
        let mut world = World::new();
        for act in &acts {
            world.play(act)?;
        }
        world.play(&Act::Command { verb: 1, counted: false })?;
        world.settle()?;
        prop_assert_eq!(world.machine.state(), ModuleState::Stop);
        prop_assert_eq!(world.waiting, 0, "a command was left without an answer");
    }

    #[test]
    fn a_module_whose_world_is_well_comes_up_after_start(acts in proptest::collection::vec(act(), 0..120)) {
        let mut world = World::new();
        for act in &acts {
            world.play(act)?;
        }
        world.play(&Act::Command { verb: 0, counted: false })?;
        world.settle()?;
        for checker in 0..2 {
            world.play(&Act::Verdict { checker, up: true })?;
        }
        prop_assert!(world.machine.ready(), "{}", world.machine.why());
        prop_assert_eq!(world.waiting, 0, "a command was left without an answer");
    }
}
