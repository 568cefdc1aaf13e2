//! The machine's transition table, and the stories an administrator knows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use super::state::{HANDOVER_LIMIT, ModuleAction, ModuleEvent, ModuleMachine, Script, ScriptOutcome};
use crate::api::{ModuleState, Quality};
use crate::config::{
    Boot, CheckerAction, ModuleConfig, PlaneChoice, ServiceConfig, TcpCheckerConfig, UserConfig, VipConfig, XdpChoice,
};

mod parts;

pub(super) fn config(actions: &[CheckerAction]) -> ModuleConfig {
    let tcp_checkers = actions.iter().enumerate().map(|(i, action)| TcpCheckerConfig {
        ident: format!("c{i}"),
        action: *action,
        addr: IpAddr::V4(Ipv4Addr::LOCALHOST),
        port: 80,
        interval: Duration::from_secs(10),
        timeout: Duration::from_secs(5),
        rise: 1,
        fall: 2,
    });
    ModuleConfig {
        macros: BTreeMap::new(),
        service: ServiceConfig {
            boot: Boot::Off,
            boot_delay: Duration::ZERO,
            maxloop: 3,
            loop_interval: Duration::from_secs(86_400),
        },
        lans: vec!["default".into()],
        partition: crate::config::PartitionPolicy::Serve,
        witness: None,
        vip: Some(VipConfig {
            tcp_reset: true,
            plane: PlaneChoice::Auto,
            xdp: XdpChoice::Auto,
            drain: Duration::ZERO,
            interfaces: Vec::new(),
            groups: Vec::new(),
        }),
        user: Some(UserConfig {
            start_timeout: Duration::from_secs(301),
            nice_stop_timeout: Duration::from_secs(302),
            force_stop_timeout: Duration::from_secs(303),
            logging: true,
            log_size_kb: 2048,
            vars: BTreeMap::new(),
        }),
        tcp_checkers: tcp_checkers.collect(),
        digest: 0,
    }
}

fn event(name: &str) -> ModuleEvent {
    let (by, identity) = match name.strip_suffix(" -i") {
        Some(_) => ("probe".to_owned(), Some("probe".to_owned())),
        None => ("admin".to_owned(), None),
    };
    let exited = |script, outcome| ModuleEvent::ScriptExited { script, outcome };
    let checked = |up| ModuleEvent::Checked {
        resource: "tcp.c0".into(),
        up,
        detail: if up { "connected" } else { "connection refused" }.into(),
    };
    match name.trim_end_matches(" -i") {
        "start" => ModuleEvent::Start { by, identity },
        "stop" => ModuleEvent::Stop { by, identity },
        "restart" => ModuleEvent::Restart { by, identity },
        "stopstart" => ModuleEvent::StopStart { by, identity },
        "forcestop" => ModuleEvent::ForceStop { by, identity },
        "prestart 0" => exited(Script::Prestart, ScriptOutcome::Exited(0)),
        "prestart 1" => exited(Script::Prestart, ScriptOutcome::Exited(1)),
        "prestart missing" => exited(Script::Prestart, ScriptOutcome::Missing),
        "start_both 0" => exited(Script::StartBoth, ScriptOutcome::Exited(0)),
        "start_both 3" => exited(Script::StartBoth, ScriptOutcome::Exited(3)),
        "start_both late" => exited(Script::StartBoth, ScriptOutcome::TimedOut),
        "start_both says" => exited(
            Script::StartBoth,
            ScriptOutcome::ExitedSaying(1, "no licence found".into()),
        ),
        "start_both 9" => exited(Script::StartBoth, ScriptOutcome::Signaled(9)),
        "start_both missing" => exited(Script::StartBoth, ScriptOutcome::Missing),
        "stop_both 0" => exited(Script::StopBoth, ScriptOutcome::Exited(0)),
        "stop_both 1" => exited(Script::StopBoth, ScriptOutcome::Exited(1)),
        "force 0" => exited(Script::StopBothForce, ScriptOutcome::Exited(0)),
        "force 1" => exited(Script::StopBothForce, ScriptOutcome::Exited(1)),
        "poststop 0" => exited(Script::Poststop, ScriptOutcome::Exited(0)),
        "poststop missing" => exited(Script::Poststop, ScriptOutcome::Missing),
        "vip up" => ModuleEvent::VipReady(Ok(())),
        "vip failed" => ModuleEvent::VipReady(Err("eth9 does not exist".into())),
        "vip gone" => ModuleEvent::VipGone(Vec::new()),
        "handed over" => ModuleEvent::HandoverDone,
        "up" => checked(true),
        "down" => checked(false),
        other => panic!("no event is called {other}"),
    }
}

const EVENTS: [&str; 30] = [
    "start",
    "start -i",
    "stop",
    "stop -i",
    "restart",
    "restart -i",
    "stopstart",
    "stopstart -i",
    "forcestop",
    "forcestop -i",
    "prestart 0",
    "prestart 1",
    "prestart missing",
    "start_both 0",
    "start_both 3",
    "start_both late",
    "start_both 9",
    "start_both missing",
    "stop_both 0",
    "stop_both 1",
    "force 0",
    "force 1",
    "poststop 0",
    "poststop missing",
    "vip up",
    "vip failed",
    "vip gone",
    "handed over",
    "up",
    "down",
];

/// Actions in short, without log lines.
fn brief(actions: &[ModuleAction]) -> String {
    let short: Vec<String> = actions
        .iter()
        .filter_map(|action| match action {
            ModuleAction::RunScript { script, .. } => Some(script.to_string()),
            ModuleAction::KillScript => Some("kill".into()),
            ModuleAction::SetUpVip => Some("vip+".into()),
            ModuleAction::TearDownVip => Some("vip-".into()),
            ModuleAction::OpenTraffic => Some("open".into()),
            ModuleAction::CloseTraffic => Some("close".into()),
            ModuleAction::StartCheckers => Some("probe".into()),
            ModuleAction::StopCheckers => Some("unprobe".into()),
            ModuleAction::ResetConnections => Some("reset".into()),
            ModuleAction::Log { .. } => None,
            ModuleAction::Finished { result: Ok(_) } => Some("OK".into()),
            ModuleAction::Finished { result: Err(_) } => Some("ERR".into()),
        })
        .collect();
    short.join(" ")
}

fn logs(actions: &[ModuleAction]) -> Vec<String> {
    actions
        .iter()
        .filter_map(|action| match action {
            ModuleAction::Log { level, text } => Some(format!("{level} {text}")),
            _ => None,
        })
        .collect()
}

/// A machine, and everything it asked for.
struct Run {
    machine: ModuleMachine,
    actions: Vec<ModuleAction>,
}

impl Run {
    fn new(config: &ModuleConfig) -> Self {
        Self {
            machine: ModuleMachine::new(config),
            actions: Vec::new(),
        }
    }

    fn after(path: &str) -> Self {
        let mut run = Self::new(&config(&[CheckerAction::Restart]));
        run.play(path);
        run
    }

    /// Plays the events of a comma-separated path; gives the actions of the last one.
    fn play(&mut self, path: &str) -> Vec<ModuleAction> {
        let mut last = Vec::new();
        for name in path.split(", ").filter(|name| !name.is_empty()) {
            last = self.machine.handle(Duration::ZERO, event(name));
            self.actions.extend(last.clone());
        }
        last
    }

    fn shown(&self) -> String {
        format!("{} {}", self.machine.state(), self.machine.quality())
    }

    fn result(&self) -> Option<&Result<String, String>> {
        self.actions.iter().rev().find_map(|action| match action {
            ModuleAction::Finished { result } => Some(result),
            _ => None,
        })
    }
}

const UP: &str = "start, prestart 0, vip up, start_both 0, up";
const DOWN_TO_STOP: &str = "stop, handed over, stop_both 0, force 0, vip gone, poststop 0";

/// Step, path that leads there, and cells: event, what it asks for, state after it.
type Row = (
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str, &'static str)],
);

/// Each step, how it is reached, and for each event that means something there: what is asked, and the state after it.
/// The same cell may also be reached with another aim; the stories below look at those.
#[rustfmt::skip]
const TABLE: &[Row] = &[
    ("Stopped", "", &[
        ("start", "prestart", "WAIT Transient"), ("start -i", "prestart", "WAIT Transient"),
        ("stop", "OK", "STOP NotReady"), ("stop -i", "OK", "STOP NotReady"),
        ("forcestop", "OK", "STOP NotReady"), ("forcestop -i", "OK", "STOP NotReady"),
        ("restart", "ERR", "STOP NotReady"), ("restart -i", "ERR", "STOP NotReady"),
        ("stopstart", "prestart", "WAIT Transient"), ("stopstart -i", "ERR", "STOP NotReady"),
    ]),
    ("Prestarting", "start", &[
        ("stop", "kill", "WAIT Transient"), ("stop -i", "kill", "WAIT Transient"),
        ("stopstart", "kill", "WAIT Transient"), ("stopstart -i", "kill", "WAIT Transient"),
        ("forcestop", "kill", "WAIT Transient"), ("forcestop -i", "kill", "WAIT Transient"),
        ("prestart 0", "vip+", "WAIT Transient"), ("prestart missing", "vip+", "WAIT Transient"),
        ("prestart 1", "poststop", "WAIT Transient"),
    ]),
    ("RaisingVip", "start, prestart 0", &[
        ("vip up", "start_both", "UP Transient"), ("vip failed", "reset vip-", "WAIT Transient"),
        ("forcestop", "reset vip-", "WAIT Transient"), ("forcestop -i", "reset vip-", "WAIT Transient"),
    ]),
    ("Starting", "start, prestart 0, vip up", &[
        ("stop", "kill", "UP Transient"), ("stop -i", "kill", "UP Transient"),
        ("stopstart", "kill", "UP Transient"), ("stopstart -i", "kill", "UP Transient"),
        ("forcestop", "kill", "UP Transient"), ("forcestop -i", "kill", "UP Transient"),
        ("start_both 0", "probe", "UP Transient"),
        ("start_both 3", "stop_both", "UP Transient"), ("start_both late", "stop_both", "UP Transient"),
        ("start_both 9", "stop_both", "UP Transient"), ("start_both missing", "stop_both", "UP Transient"),
    ]),
    ("Checking", "start, prestart 0, vip up, start_both 0", &[
        ("stop", "unprobe stop_both", "UP Transient"), ("stop -i", "unprobe stop_both", "UP Transient"),
        ("restart", "unprobe stop_both", "UP Transient"), ("restart -i", "unprobe stop_both", "UP Transient"),
        ("stopstart", "unprobe stop_both", "UP Transient"), ("stopstart -i", "unprobe stop_both", "UP Transient"),
        ("forcestop", "unprobe stop_both force", "WAIT Transient"), ("forcestop -i", "unprobe stop_both force", "WAIT Transient"),
        ("up", "open OK", "UP Ready"), ("down", "unprobe stop_both", "UP Transient"),
    ]),
    ("Serving", UP, &[
        ("start", "OK", "UP Ready"), ("start -i", "OK", "UP Ready"),
        ("stop", "unprobe close", "UP Transient"), ("stop -i", "unprobe close", "UP Transient"),
        ("restart", "unprobe close", "UP Transient"), ("restart -i", "unprobe close", "UP Transient"),
        ("stopstart", "unprobe close", "UP Transient"), ("stopstart -i", "unprobe close", "UP Transient"),
        ("forcestop", "unprobe close stop_both force", "WAIT Transient"), ("forcestop -i", "unprobe close stop_both force", "WAIT Transient"),
        ("down", "unprobe close", "UP Transient"),
    ]),
    ("Leaving", "start, prestart 0, vip up, start_both 0, up, stop", &[
        ("handed over", "stop_both", "UP Transient"),
        ("forcestop", "stop_both force", "WAIT Transient"), ("forcestop -i", "stop_both force", "WAIT Transient"),
    ]),
    ("AbandoningVip", "start, prestart 0, stop", &[
        ("vip up", "reset vip-", "WAIT Transient"), ("vip failed", "reset vip-", "WAIT Transient"),
        ("forcestop", "reset vip-", "WAIT Transient"), ("forcestop -i", "reset vip-", "WAIT Transient"),
    ]),
    ("Cancelling prestart", "start, stop", &[
        ("prestart 0", "poststop", "WAIT Transient"), ("prestart 1", "poststop", "WAIT Transient"),
        ("prestart missing", "poststop", "WAIT Transient"),
    ]),
    ("Cancelling start_both", "start, prestart 0, vip up, stop", &[
        ("start_both 0", "stop_both", "UP Transient"), ("start_both 3", "stop_both", "UP Transient"),
        ("start_both late", "stop_both", "UP Transient"), ("start_both 9", "stop_both", "UP Transient"),
        ("start_both missing", "stop_both", "UP Transient"),
    ]),
    ("Cancelling stop_both", "start, prestart 0, vip up, start_both 0, stop, forcestop", &[
        ("stop_both 0", "stop_both force", "WAIT Transient"), ("stop_both 1", "stop_both force", "WAIT Transient"),
    ]),
    ("StoppingNicely", "start, prestart 0, vip up, start_both 0, stop", &[
        ("stop_both 0", "stop_both force", "WAIT Transient"), ("stop_both 1", "stop_both force", "WAIT Transient"),
        ("forcestop", "kill", "UP Transient"), ("forcestop -i", "kill", "UP Transient"),
    ]),
    ("StoppingByForce", "start, prestart 0, vip up, start_both 0, stop, stop_both 0", &[
        ("force 0", "reset vip-", "WAIT Transient"), ("force 1", "reset vip-", "WAIT Transient"),
    ]),
    ("StoppingByForce, restart", "start, prestart 0, vip up, start_both 0, restart, stop_both 0", &[
        ("force 0", "start_both", "UP Transient"), ("force 1", "start_both", "UP Transient"),
    ]),
    ("LoweringVip", "start, prestart 0, vip failed", &[
        ("vip gone", "poststop", "WAIT Transient"),
    ]),
    ("Poststopping", "start, prestart 1", &[
        ("poststop 0", "ERR", "STOP NotReady"), ("poststop missing", "ERR", "STOP NotReady"),
    ]),
    ("Poststopping, stopped by admin", "start, stop, prestart 0", &[
        ("poststop 0", "OK", "STOP NotReady"), ("poststop missing", "OK", "STOP NotReady"),
    ]),
];

#[test]
fn each_step_answers_each_event_as_the_table_says_and_no_other() {
    for (step, path, cells) in TABLE {
        let known: BTreeSet<&str> = cells.iter().map(|(event, _, _)| *event).collect();
        assert!(
            known.iter().all(|event| EVENTS.contains(event)),
            "{step}: unknown event in the table"
        );
        for event in EVENTS {
            let mut run = Run::after(path);
            let before = run.shown();
            let asked = brief(&run.play(event));
            match cells.iter().find(|(name, _, _)| *name == event) {
                Some((_, actions, shown)) => {
                    assert_eq!(
                        (asked.as_str(), run.shown().as_str()),
                        (*actions, *shown),
                        "{step}: {event}"
                    );
                }
                None => {
                    assert_eq!(asked, "", "{step}: {event} should ask for nothing");
                    // A stop may change WAIT to UP or back only where the application is restarted.
                    if *step != "StoppingByForce, restart" {
                        assert_eq!(run.shown(), before, "{step}: {event} should change nothing");
                    }
                }
            }
        }
    }
}

#[test]
fn a_start_runs_its_steps_in_order_and_opens_traffic_last() {
    let run = Run::after(UP);
    assert_eq!(brief(&run.actions), "prestart vip+ start_both probe open OK");
    assert_eq!((run.shown().as_str(), run.machine.why().as_str()), ("UP Ready", ""));
    assert!(run.machine.ready() && run.machine.active());
    assert_eq!(
        logs(&run.actions),
        [
            "U Action start called by admin",
            "E Local state WAIT Transient",
            "E Local state UP Transient",
            "I Resource tcp.c0 set to up by tcpcheck: connected",
            "E Local state UP Ready",
        ]
    );
}

#[test]
fn a_stop_runs_its_steps_in_order() {
    let mut run = Run::after(UP);
    run.actions.clear();
    run.play(DOWN_TO_STOP);
    assert_eq!(
        brief(&run.actions),
        "unprobe close stop_both stop_both force reset vip- poststop OK"
    );
    assert_eq!(run.shown(), "STOP NotReady");
    assert_eq!(run.machine.why(), "stopped by admin");
    assert!(!run.machine.active());
}

#[test]
fn a_restart_leaves_the_vip_alone_and_stays_up_throughout() {
    let mut run = Run::after(UP);
    run.actions.clear();
    for step in "restart, handed over, stop_both 0, force 0, start_both 0, up".split(", ") {
        run.play(step);
        assert_eq!(run.machine.state(), ModuleState::Up, "after {step}");
    }
    assert_eq!(
        brief(&run.actions),
        "unprobe close stop_both stop_both force start_both probe open OK"
    );
}

#[test]
fn a_stopstart_starts_again_by_itself() {
    let mut run = Run::after(UP);
    run.actions.clear();
    run.play("stopstart, handed over, stop_both 0, force 0, vip gone, poststop 0");
    assert_eq!(run.shown(), "WAIT Transient");
    assert!(logs(&run.actions).contains(&"E Action start called automatically".to_owned()));
    run.play("prestart 0, vip up, start_both 0, up");
    assert_eq!(run.result(), Some(&Ok("UP Ready".into())));
}

#[test]
fn scripts_get_state_next_state_and_action() {
    let mut run = Run::after(UP);
    run.play("restart -i, handed over, stop_both 0, force 0, start_both 0, up");
    run.play(DOWN_TO_STOP);
    let calls: Vec<String> = run
        .actions
        .iter()
        .filter_map(|action| match action {
            ModuleAction::RunScript {
                script,
                args,
                timeout,
                identity,
            } => Some(format!(
                "{} {} {} {}",
                script.file_name(),
                args.join(" "),
                timeout.as_secs(),
                identity.as_deref().unwrap_or("-")
            )),
            _ => None,
        })
        .collect();
    assert_eq!(
        calls,
        [
            "prestart STOP WAIT start 301 -",
            "start_both WAIT UP start 301 -",
            "stop_both UP UP restart 302 probe",
            "stop_both force UP UP restart 303 probe",
            "start_both UP UP restart 301 probe",
            "stop_both UP WAIT stop 302 -",
            "stop_both force WAIT STOP stop 303 -",
            "poststop WAIT STOP stop 301 -",
        ]
    );
}

#[test]
fn a_failing_start_both_never_takes_traffic_and_cleans_up_with_the_reason() {
    for (end, reason) in [
        ("start_both 3", "exit code 3"),
        ("start_both says", "exit code 1: no licence found"),
        ("start_both 9", "ended by signal 9"),
        (
            "start_both late",
            "did not end in time and was ended with its processes",
        ),
        ("start_both missing", "there is no such file in bin"),
    ] {
        let mut run = Run::after("start, prestart 0, vip up");
        run.actions.clear();
        run.play(end);
        assert!(run.machine.why().contains(reason), "{}", run.machine.why());
        run.play("stop_both 0, force 0, vip gone, poststop 0");
        assert_eq!(
            brief(&run.actions),
            "stop_both stop_both force reset vip- poststop ERR",
            "{end}"
        );
        assert_eq!(run.machine.why(), format!("start_both failed: {reason}"));
        assert_eq!(run.result(), Some(&Err(format!("start_both failed: {reason}"))));
        assert_eq!(run.shown(), "STOP NotReady");
        assert!(logs(&run.actions).contains(&format!("E Script start_both failed: {reason}")));
    }
}

#[test]
fn a_checker_that_never_passes_restarts_until_maxloop_and_then_the_module_stops() {
    let mut run = Run::after("start, prestart 0, vip up, start_both 0");
    for _ in 0..3 {
        run.play("down, stop_both 0, force 0, start_both 0");
        assert_eq!(run.shown(), "UP Transient");
    }
    run.play("down");
    assert!(logs(&run.actions).contains(&"C Action stop called by maxloop".to_owned()));
    run.play("stop_both 0, force 0, vip gone, poststop 0");
    assert_eq!(run.shown(), "STOP NotReady");
    assert!(!brief(&run.actions).contains("open"));
    let result = run.result().cloned();
    assert!(
        matches!(&result, Some(Err(why)) if why.contains("maxloop") && why.contains("connection refused")),
        "{result:?}"
    );
}

#[test]
fn an_administrators_command_resets_the_count_and_stop_with_identity_does_not_count() {
    let cycle = "down, handed over, stop_both 0, force 0, start_both 0, up";
    let mut run = Run::after(UP);
    for _ in 0..3 {
        run.play(cycle);
    }
    run.play("restart, handed over, stop_both 0, force 0, start_both 0, up");
    for _ in 0..3 {
        run.play(cycle);
        assert_eq!(run.shown(), "UP Ready");
    }
    for _ in 0..9 {
        run.play("stop -i");
    }
    assert!(!logs(&run.actions).contains(&"C Action stop called by maxloop".to_owned()));
}

#[test]
fn a_stop_that_did_not_do_all_says_so() {
    let mut run = Run::after(UP);
    run.play("stop, handed over, stop_both 1, force 1, vip gone, poststop 0");
    let expected = "the module is in STOP, but stop_both force failed: exit code 1";
    assert_eq!(run.result(), Some(&Err(expected.into())));
    let mut run = Run::after(UP);
    run.play("stop, handed over, stop_both 1, force 0, vip gone, poststop 0");
    assert_eq!(run.result(), Some(&Ok("STOP".into())), "the force pass made it good");
}

#[test]
fn a_hand_over_is_not_awaited_for_ever() {
    let mut run = Run::after(UP);
    let now = Duration::from_secs(50);
    run.machine.handle(now, event("stop"));
    assert_eq!(run.machine.poll_timeout(), Some(now + HANDOVER_LIMIT));
    assert_eq!(
        run.machine
            .handle_timeout(now + HANDOVER_LIMIT - Duration::from_nanos(1)),
        []
    );
    let actions = run.machine.handle_timeout(now + HANDOVER_LIMIT);
    assert_eq!(brief(&actions), "stop_both");
    assert_eq!(
        logs(&actions),
        ["E Hand-over not confirmed within 2 s, stop goes on without it"]
    );
    assert_eq!(run.machine.poll_timeout(), None);
}

#[test]
fn stop_wins_over_a_restart_under_way() {
    for path in ["restart", "restart, handed over", "restart, handed over, stop_both 0"] {
        let mut run = Run::after(UP);
        run.play(path);
        run.play("stop, handed over, stop_both 0, force 0");
        assert_eq!(run.shown(), "WAIT Transient", "{path}");
        run.play("vip gone, poststop 0");
        assert_eq!(run.shown(), "STOP NotReady", "{path}");
        assert_eq!(run.result(), Some(&Ok("STOP".into())));
    }
}

#[test]
fn only_an_administrator_revives_a_module_that_stops() {
    let stopping = "stop, handed over, stop_both 0";
    let end = "force 0, vip gone, poststop 0";
    for (command, shown) in [
        ("start", "WAIT Transient"),
        ("stopstart", "WAIT Transient"),
        ("start -i", "STOP NotReady"),
        ("stopstart -i", "STOP NotReady"),
        ("restart", "STOP NotReady"),
        ("restart -i", "STOP NotReady"),
    ] {
        let mut run = Run::after(UP);
        run.play(stopping);
        run.play(command);
        run.play(end);
        assert_eq!(run.shown(), shown, "{command}");
    }
}

#[test]
fn a_second_forcestop_ends_the_last_scripts_too() {
    let mut run = Run::after(UP);
    assert_eq!(brief(&run.play("forcestop, forcestop")), "kill");
    assert_eq!(brief(&run.play("force 0")), "reset vip-");
    assert_eq!(brief(&run.play("vip gone, forcestop")), "kill");
    assert_eq!(brief(&run.play("poststop 0")), "ERR");
    assert_eq!(run.shown(), "STOP NotReady");
}

#[test]
fn a_stop_called_by_a_script_fails_the_start_that_waits() {
    let mut run = Run::after("start, prestart 0, vip up, stop -i");
    run.play("start_both 9, stop_both 0, force 0, vip gone, poststop 0");
    assert_eq!(run.result(), Some(&Err("stop was called by probe".into())));
    assert_eq!(run.machine.why(), "stop was called by probe");
}
