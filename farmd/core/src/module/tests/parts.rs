//! What a module may have or lack: scripts, virtual addresses, checkers, resources.

use super::*;
use crate::module::state::MAX_RESOURCES;

#[test]
fn steps_that_do_not_apply_are_passed_through() {
    let mut bare = config(&[]);
    bare.vip = None;
    bare.user = None;
    let mut run = Run::new(&bare);
    assert_eq!(brief(&run.play("start")), "open OK");
    assert_eq!(run.shown(), "UP Ready");
    assert_eq!(brief(&run.play("restart")), "close open OK");
    assert_eq!(brief(&run.play("stop")), "close OK");
    assert_eq!(run.shown(), "STOP NotReady");
}

#[test]
fn tcpreset_off_resets_nothing() {
    let mut quiet = config(&[]);
    if let Some(vip) = &mut quiet.vip {
        vip.tcp_reset = false;
    }
    let mut run = Run::new(&quiet);
    run.play("start, prestart 0, vip up, start_both 0");
    run.play(DOWN_TO_STOP);
    assert_eq!(
        brief(&run.actions),
        "prestart vip+ start_both open OK close stop_both stop_both force vip- poststop OK"
    );
}

#[test]
fn all_checkers_must_pass_but_those_that_only_show() {
    let mut run = Run::new(&config(&[
        CheckerAction::Restart,
        CheckerAction::NoAction,
        CheckerAction::Stop,
    ]));
    run.play("start, prestart 0, vip up, start_both 0, up");
    assert_eq!(run.shown(), "UP Transient");
    assert!(
        run.machine.why().contains("tcp.c2 has not passed yet"),
        "{}",
        run.machine.why()
    );
    let third = |up| ModuleEvent::Checked {
        resource: "tcp.c2".into(),
        up,
        detail: "x".into(),
    };
    assert_eq!(brief(&run.machine.handle(Duration::ZERO, third(true))), "open OK");
    assert_eq!(
        brief(&run.machine.handle(Duration::ZERO, third(true))),
        "",
        "traffic is opened once"
    );
    assert_eq!(
        brief(&run.machine.handle(Duration::ZERO, third(false))),
        "unprobe close"
    );
    run.play("handed over, stop_both 0, force 0, vip gone, poststop 0");
    assert_eq!(
        run.result(),
        Some(&Err("tcp.c2 is down: x".into())),
        "its action is stop"
    );
}

#[test]
fn resources_are_kept_and_a_checkers_own_cannot_be_forged() {
    let mut run = Run::after(UP);
    let set = |name: &str| ModuleEvent::Resource {
        name: name.into(),
        value: "down".into(),
        by: "probe".into(),
    };
    let actions = run.machine.handle(Duration::ZERO, set("custom.db"));
    assert_eq!(logs(&actions), ["I Resource custom.db set to down by probe"]);
    run.machine.handle(Duration::ZERO, set("tcp.c0"));
    assert_eq!(
        run.machine.resources(),
        BTreeMap::from([("custom.db".into(), "down".into()), ("tcp.c0".into(), "up".into())])
    );
    for i in 0..2 * MAX_RESOURCES {
        run.machine.handle(Duration::ZERO, set(&format!("custom.{i}")));
    }
    assert_eq!(run.machine.resources().len(), MAX_RESOURCES);
    assert_eq!(run.machine.quality(), Quality::Ready);
}
