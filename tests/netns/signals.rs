//! SIGTERM ends farmd in order at every moment, also while one farmd takes the place of another; and nothing that farmd starts has it blocked.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use farm_lab::process::run_limited;
use farm_lab::random::Random;
use farm_lab::{Lab, MODULE, Node};

use crate::common::{configured, farm_of, shell_ok};

/// Each script tells its name, and which signals are blocked in it.
const TELL: &str = "#!/bin/sh\nwhile read -r name value; do\n  \
    [ \"$name\" = SigBlk: ] && echo \"${0##*/} $value\" >>\"$SAFEUSERVAR/told\"\ndone </proc/self/status\nexit 0\n";
/// SIGINT and SIGTERM in the kernel's mask.
const INT_AND_TERM: u64 = 1 << 1 | 1 << 14;
/// How long farmd may take to end, on a machine that is busy with another farm.
const END_LIMIT: Duration = Duration::from_secs(30);
/// A restart in place of an idle farm takes less than this.
const RELOAD_TIME: Duration = Duration::from_millis(80);

/// A farm whose module's scripts only tell; nothing listens behind the VIP.
fn telling_farm() -> Lab {
    configured(farm_of(2), |_, mut module| {
        let (from, to) = (
            module.userconfig.find("    <check>"),
            module.userconfig.find("</check>\n"),
        );
        let (from, to) = (from.expect("a checker"), to.expect("its end") + "</check>\n".len());
        module.userconfig.replace_range(from..to, "");
        let scripts = ["prestart", "start_both", "stop_both", "poststop"];
        scripts
            .into_iter()
            .fold(module, |module, name| module.with_script(name, TELL))
    })
}

/// What the module's scripts have told since they were last asked: name and blocked signals.
fn told(node: &Node) -> Vec<(String, u64)> {
    let file = node.dirs().var.join("modules").join(MODULE).join("told");
    let text = fs::read_to_string(&file).unwrap_or_default();
    let _ = fs::remove_file(&file);
    let word = |line: &str| {
        let (name, mask) = line.split_once(' ').expect("a name and a mask");
        (name.to_owned(), u64::from_str_radix(mask, 16).expect("a mask"))
    };
    text.lines().map(word).collect()
}

fn blocked_in(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("farmd runs");
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigBlk:"))
        .expect("a mask");
    u64::from_str_radix(mask.trim(), 16).expect("a mask")
}

/// Asks for a restart in place, as `farm reload` does, and does not wait for it. The answer comes as long as the socket is kept.
fn ask_reload(node: &Node) -> UnixStream {
    let mut socket = UnixStream::connect(node.dirs().run.join("farmd.sock")).expect("farmd answers");
    let request =
        "POST /v1/reload HTTP/1.1\r\nHost: farmd\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}";
    socket.write_all(request.as_bytes()).expect("a request");
    socket
}

/// The note of one farmd to the next: it is there from when the first has left the farm until the second begins.
fn note(node: &Node) -> PathBuf {
    node.dirs().var.join("reload.json")
}

/// Signals farmd as soon as it has left the farm for its successor. Whether that one had not yet begun.
fn signal_in_the_gap(node: &Node) -> bool {
    let mut sh = Command::new("sh");
    let script = "until [ -e \"$1\" ]; do :; done; kill -s TERM \"$2\"; [ -e \"$1\" ] && echo gap; exit 0";
    let pid = node.farmd_pid().expect("farmd runs");
    sh.args(["-c", script, "sh"]).arg(note(node)).arg(pid.to_string());
    let _socket = ask_reload(node);
    let finished = run_limited(sh, END_LIMIT).expect("sh runs");
    assert!(
        finished.ok(),
        "farmd has not left for a successor: {finished:?}\n{}",
        node.log_tail(20)
    );
    finished.stdout.trim() == "gap"
}

/// farmd has ended as asked and has left nothing, and its module's scripts have ended the application.
fn has_ended_in_order(node: &Node) {
    let code = node.wait_farmd_end(END_LIMIT);
    assert_eq!(code.expect("SIGTERM ends it"), Some(0), "{}", node.log_tail(20));
    let told = told(node);
    let names: Vec<&str> = told.iter().map(|(name, _)| name.as_str()).collect();
    assert!(names.starts_with(&["prestart", "start_both"]), "{names:?}");
    assert!(
        names.ends_with(&["stop_both", "stop_both", "poststop"]),
        "{names:?}\n{}",
        node.log_tail(20)
    );
    assert_eq!(
        names.iter().filter(|name| **name == "start_both").count(),
        1,
        "{names:?}"
    );
    assert!(told.iter().all(|(_, blocked)| *blocked == 0), "{told:?}");
    assert!(!note(node).exists(), "nothing is left to a successor");
    assert_eq!(shell_ok(node, "[ -e /sys/class/net/farm0 ] && echo there; :"), "");
}

#[test]
fn sigterm_during_a_reload_is_never_lost() {
    let lab = telling_farm();
    let node = &lab.nodes[1];
    let all: Vec<&Node> = lab.nodes.iter().collect();
    lab.nodes[0].farm_ok(&["start", MODULE]).expect("the module starts");
    let mut random = Random::new(20_804);
    let mut gaps = 0;
    for trial in 0..7 {
        if trial > 0 {
            node.start_farmd().expect("farmd starts");
            node.wait_farmd(END_LIMIT).expect("it answers");
        }
        node.farm_ok(&["start", MODULE]).expect("the module starts");
        lab.wait_ready(MODULE, &all, END_LIMIT).expect("both serve");
        let pid = node.farmd_pid().expect("farmd runs");
        assert_eq!(
            blocked_in(pid) & INT_AND_TERM,
            INT_AND_TERM,
            "farmd reads its signals from a descriptor"
        );
        // Half of them where a signal has no reader, the others somewhere before, there or after.
        if trial % 2 == 0 {
            gaps += usize::from(signal_in_the_gap(node));
        } else {
            let _socket = ask_reload(node);
            std::thread::sleep(random.up_to(RELOAD_TIME));
            node.signal_farmd("TERM").expect("farmd is signalled");
        }
        has_ended_in_order(node);
    }
    println!("{gaps} of 4 signals came when one farmd had left and the next had not begun");
}
