//! Scripts that behave as badly as real ones.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Instant;

use farm_sys::event_fd::EventFd;
use farm_sys::signal_fd::SignalFd;

use super::*;
use crate::scratch::{Background, Scratch};

const LIMIT: Duration = Duration::from_secs(20);

struct Lab {
    scratch: Scratch,
    _runtime: Background,
    runner: ScriptRunner,
    events: Receiver<Event>,
    user: UserConfig,
}

impl Lab {
    fn new() -> Self {
        let scratch = Scratch::new("script");
        let runtime = Background::new();
        let (sender, events) = EventSender::channel(Arc::new(EventFd::new().unwrap()));
        let folders = Folders {
            etc: scratch.path().join("etc"),
            var: scratch.path().join("var"),
            run: scratch.path().join("run"),
            node: "s1".to_owned(),
        };
        let bin = store::active_dir(&folders.var, &module()).join("bin");
        fs::create_dir_all(&bin).unwrap();
        Self {
            runner: ScriptRunner::new(runtime.handle().clone(), folders, sender),
            scratch,
            _runtime: runtime,
            events,
            user: UserConfig {
                start_timeout: LIMIT,
                nice_stop_timeout: LIMIT,
                force_stop_timeout: LIMIT,
                logging: true,
                log_size_kb: 2048,
                vars: [("SERVICES", "nginx php"), ("SAFEMODULE", "forged")]
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .into(),
            },
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn bin(&self) -> PathBuf {
        store::active_dir(&self.path("var"), &module()).join("bin")
    }

    fn write(&self, script: Script, text: &str) -> PathBuf {
        let path = self.bin().join(script.file_name());
        fs::write(&path, text).unwrap();
        chmod(&path, 0o755);
        path
    }

    fn start(&self, script: Script, limit: Duration) -> ScriptHandle {
        let request = ScriptRequest {
            module: module(),
            script,
            args: ["force", "WAIT", "STOP", "stop"].map(str::to_owned).into(),
            timeout: limit,
            identity: Some("tcpcheck".into()),
        };
        self.runner.start(request, &self.user)
    }

    fn outcome(&self) -> ScriptOutcome {
        match self.events.recv_timeout(LIMIT).expect("the script's end in time") {
            Event::ScriptExited {
                module: whose, outcome, ..
            } => {
                assert_eq!(whose, module());
                outcome
            }
            other => panic!("unexpected {other:?}"),
        }
    }

    /// Runs `text` as start_both to its end; outcome and output.
    fn run(&self, text: &str) -> (ScriptOutcome, String) {
        self.write(Script::StartBoth, text);
        let handle = self.start(Script::StartBoth, LIMIT);
        let outcome = self.outcome();
        (outcome, fs::read_to_string(handle.output().unwrap()).unwrap())
    }
}

fn module() -> ModuleName {
    "web".parse().unwrap()
}

fn chmod(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < LIMIT, "{what} did not happen within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// True while a process has this number and is not dead already.
fn runs(pid: &str) -> bool {
    fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
        .is_ok_and(|stat| !stat.rsplit(')').next().unwrap().trim_start().starts_with('Z'))
}

#[test]
fn the_exit_code_and_all_output_up_to_the_end_are_reported() {
    let lab = Lab::new();
    let (outcome, output) = lab.run("#!/bin/sh\necho one\necho two >&2\nprintf three\nexit 3\n");
    assert_eq!(outcome, ScriptOutcome::ExitedSaying(3, "three".to_owned()));
    assert_eq!(output, "one\ntwo\nthree");
    let (silent, _) = lab.run("#!/bin/sh\nexit 3\n");
    assert_eq!(silent, ScriptOutcome::Exited(3));
    let (empty_end, _) = lab.run("#!/bin/sh\nprintf ' no \\033licence \\n\\n'\nexit 1\n");
    assert_eq!(empty_end, ScriptOutcome::ExitedSaying(1, "no  licence".to_owned()));
}

#[test]
fn a_script_that_ends_itself_by_a_signal_says_which() {
    let lab = Lab::new();
    assert_eq!(lab.run("#!/bin/sh\nkill -USR1 $$\n").0, ScriptOutcome::Signaled(10));
}

#[test]
fn it_gets_its_arguments_folder_and_environment() {
    let lab = Lab::new();
    let (outcome, output) = lab.run(
        "#!/bin/sh\necho \"$#:$*\"\npwd\nfor v in SAFE SAFEVAR SAFEBIN SAFEMODULE SAFEUSERBIN SAFEUSERCONF SAFEUSERVAR \
         SERVICES FARM_ETC FARM_VAR FARM_RUN FARM_MODULE FARM_IDENTITY; do eval echo \"$v=\\$$v\"; done\n\
         command -v sh >/dev/null && read nothing || echo stdin is empty\n",
    );
    assert_eq!(outcome, ScriptOutcome::Exited(0));
    let bin = fs::canonicalize(lab.bin()).unwrap();
    let (etc, var, run) = (lab.path("etc"), lab.path("var"), lab.path("run"));
    let expected = [
        "4:force WAIT STOP stop".to_owned(),
        bin.display().to_string(),
        format!("SAFE={}/safe", run.display()),
        format!("SAFEVAR={}", var.display()),
        format!("SAFEBIN={}/safe", run.display()),
        "SAFEMODULE=web".to_owned(),
        format!("SAFEUSERBIN={}", bin.display()),
        format!("SAFEUSERCONF={}", bin.with_file_name("conf").display()),
        format!("SAFEUSERVAR={}/modules/web", var.display()),
        "SERVICES=nginx php".to_owned(),
        format!("FARM_ETC={}", etc.display()),
        format!("FARM_VAR={}", var.display()),
        format!("FARM_RUN={}", run.display()),
        "FARM_MODULE=web".to_owned(),
        "FARM_IDENTITY=tcpcheck".to_owned(),
        "stdin is empty".to_owned(),
    ];
    assert_eq!(output.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn it_starts_with_no_signal_blocked_however_many_farmd_blocks() {
    // On a thread of its own: the others of this process keep theirs.
    let run = std::thread::spawn(|| {
        let _signals = SignalFd::block(&[Signal::Term, Signal::Int]).unwrap();
        Lab::new().run("#!/bin/sh\ngrep SigBlk: /proc/self/status\n")
    });
    let (outcome, output) = run.join().unwrap();
    assert_eq!(outcome, ScriptOutcome::Exited(0));
    assert_eq!(
        output.split_whitespace().collect::<Vec<_>>(),
        ["SigBlk:", "0000000000000000"]
    );
}

#[test]
fn a_hung_script_is_ended_with_a_grandchild_that_ignores_term() {
    let lab = Lab::new();
    let note = lab.path("grandchild");
    let text = format!(
        "#!/bin/sh\nsh -c 'trap \"\" TERM; echo $$ >{0}.new; mv {0}.new {0}; while :; do sleep 1; done' &\nwait\n",
        note.display()
    );
    lab.write(Script::StartBoth, &text);
    let begin = Instant::now();
    lab.start(Script::StartBoth, Duration::from_secs(1));
    assert_eq!(lab.outcome(), ScriptOutcome::TimedOut);
    let took = begin.elapsed();
    assert!((TERM_GRACE..TERM_GRACE + KILL_GRACE).contains(&took), "{took:?}");
    assert!(
        !runs(&fs::read_to_string(note).unwrap()),
        "the grandchild is still there"
    );
}

#[test]
fn a_killed_script_that_obeys_is_gone_at_once() {
    let lab = Lab::new();
    let note = lab.path("pid");
    lab.write(
        Script::StartBoth,
        &format!(
            "#!/bin/sh\necho $$ >{0}.new; mv {0}.new {0}\nexec sleep 600\n",
            note.display()
        ),
    );
    let handle = lab.start(Script::StartBoth, LIMIT);
    wait_until("the script's start", || note.exists());
    let begin = Instant::now();
    handle.kill();
    assert_eq!(lab.outcome(), ScriptOutcome::TimedOut);
    assert!(begin.elapsed() < Duration::from_secs(2), "{:?}", begin.elapsed());
    assert!(!runs(&fs::read_to_string(note).unwrap()));
}

#[test]
fn a_service_started_by_a_script_goes_on_and_may_go_on_writing() {
    let lab = Lab::new();
    let note = lab.path("service");
    let text = format!(
        "#!/bin/sh\n(echo $$ >/dev/null; exec sh -c 'echo $$ >{0}; while :; do echo alive || exit 1; sleep 0.05; done') &\necho started\n",
        note.display()
    );
    lab.write(Script::StartBoth, &text);
    let begin = Instant::now();
    let handle = lab.start(Script::StartBoth, LIMIT);
    assert_eq!(lab.outcome(), ScriptOutcome::Exited(0));
    assert!(
        begin.elapsed() < Duration::from_secs(3),
        "the open pipe held up the script's end"
    );
    let output = handle.output().unwrap().to_owned();
    handle.kill();
    let lines = || fs::read_to_string(&output).unwrap().matches("alive").count();
    wait_until("the service's output", || lines() > 0);
    let before = lines();
    wait_until("more of it", || lines() > before + 5);
    let pid = fs::read_to_string(note).unwrap();
    assert!(runs(&pid), "the service has died");
    let killed = std::process::Command::new("kill")
        .args(["-9", pid.trim()])
        .status()
        .unwrap();
    assert!(killed.success());
}

#[test]
fn megabytes_of_output_do_not_fill_the_disk_or_stop_the_script() {
    let mut lab = Lab::new();
    lab.user.log_size_kb = 64;
    let (outcome, output) = lab.run("#!/bin/sh\nhead -c 20000000 /dev/zero | tr '\\0' x\nexit 5\n");
    let said = "x".repeat(120) + "…";
    assert_eq!(outcome, ScriptOutcome::ExitedSaying(5, said), "the last line is cut");
    let note = "\n[farm: the output is longer than 64 KB, the rest is discarded]\n";
    assert_eq!(output.len(), 64 * 1024 + note.len());
    assert!(output.ends_with(note));
}

#[test]
fn what_cannot_be_run_says_why() {
    let lab = Lab::new();
    lab.start(Script::StartBoth, LIMIT);
    assert_eq!(lab.outcome(), ScriptOutcome::Missing);

    let path = lab.write(Script::StartBoth, "#!/no/such/shell\n");
    lab.start(Script::StartBoth, LIMIT);
    assert!(matches!(lab.outcome(), ScriptOutcome::NotStarted(why) if why.contains("first line")));

    chmod(&path, 0o644);
    lab.start(Script::StartBoth, LIMIT);
    assert_eq!(lab.outcome(), ScriptOutcome::NotStarted("it is not executable".into()));

    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    lab.start(Script::StartBoth, LIMIT);
    assert_eq!(lab.outcome(), ScriptOutcome::NotStarted("it is no regular file".into()));
}

#[test]
fn root_runs_no_script_that_others_can_write() {
    let lab = Lab::new();
    let path = lab.write(Script::StartBoth, "#!/bin/sh\n");
    chmod(&path, 0o757);
    lab.start(Script::StartBoth, LIMIT);
    let expected = if process::effective_uid() == 0 {
        ScriptOutcome::NotStarted("every user may write to it, only root is expected to".into())
    } else {
        ScriptOutcome::Exited(0)
    };
    assert_eq!(lab.outcome(), expected);
    if process::effective_uid() == 0 {
        chmod(&path, 0o755);
        std::os::unix::fs::chown(&path, Some(4242), None).unwrap();
        lab.start(Script::StartBoth, LIMIT);
        let expected = "it belongs to user 4242, root is expected";
        assert_eq!(lab.outcome(), ScriptOutcome::NotStarted(expected.into()));
    }
}

#[test]
fn a_script_that_removes_itself_is_still_waited_for() {
    let lab = Lab::new();
    let (outcome, output) = lab.run("#!/bin/sh\nrm -rf ../bin\nsleep 0.2\necho gone\n");
    assert_eq!((outcome, output.as_str()), (ScriptOutcome::Exited(0), "gone\n"));
}

#[test]
fn each_run_has_a_file_of_its_own_and_the_last_50_are_kept() {
    let lab = Lab::new();
    lab.write(Script::StopBoth, "#!/bin/sh\necho \"$1\"\n");
    let mut outputs = Vec::new();
    for _ in 0..KEPT_LOGS + 5 {
        let handle = lab.start(Script::StopBothForce, LIMIT);
        assert_eq!(lab.outcome(), ScriptOutcome::Exited(0));
        outputs.push(handle.output().unwrap().to_owned());
    }
    let name = outputs[0].file_name().unwrap().to_string_lossy().into_owned();
    assert!(
        name.starts_with("userlog_2") && name.ends_with("_stop_both.ulog"),
        "{name}"
    );
    // Past the kept ones a name of the same second may be free again.
    let distinct: std::collections::BTreeSet<_> = outputs[..KEPT_LOGS].iter().collect();
    assert_eq!(distinct.len(), KEPT_LOGS, "a file was used twice");
    wait_until("the removal of the oldest", || {
        fs::read_dir(store::module_dir(&lab.path("var"), &module()))
            .unwrap()
            .count()
            == KEPT_LOGS + 1
    });
    assert!(outputs.last().unwrap().exists());
}

#[test]
fn logging_none_keeps_no_output() {
    let mut lab = Lab::new();
    lab.user.logging = false;
    lab.write(Script::StartBoth, "#!/bin/sh\necho unseen\n");
    assert_eq!(lab.start(Script::StartBoth, LIMIT).output(), None);
    assert_eq!(lab.outcome(), ScriptOutcome::Exited(0));
}

#[test]
fn a_run_is_reported_once() {
    let lab = Lab::new();
    lab.write(Script::StartBoth, "#!/bin/sh\n");
    let handle = lab.start(Script::StartBoth, LIMIT);
    assert_eq!(lab.outcome(), ScriptOutcome::Exited(0));
    handle.kill();
    let more = lab.events.recv_timeout(Duration::from_millis(300));
    assert!(matches!(more, Err(RecvTimeoutError::Timeout)), "{more:?}");
}

#[test]
fn safe_holds_the_command_line_under_both_names() {
    let lab = Lab::new();
    let folders = Folders {
        etc: lab.path("etc"),
        var: lab.path("var"),
        run: lab.path("run"),
        node: "s1".to_owned(),
    };
    for farm in ["/usr/bin/old", "/usr/bin/farm"] {
        prepare_safe(&folders, Path::new(farm)).unwrap();
        for name in ["safekit", "farm"] {
            assert_eq!(fs::read_link(folders.safe().join(name)).unwrap(), Path::new(farm));
        }
    }
}
