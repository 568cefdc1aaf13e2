use std::os::unix::process::CommandExt;
use std::process::Command;

use farm_sys::interface;
use farm_sys::netns::{self, NetNs};

use crate::lab;

/// What the kernel calls the namespace that a path leads to.
fn identity(path: &str) -> String {
    std::fs::read_link(path).unwrap().to_str().unwrap().to_owned()
}

const OWN: &str = "/proc/thread-self/ns/net";

#[test]
fn a_new_namespace_has_loopback_up_and_nothing_else() {
    if !lab::privileged() {
        return;
    }
    let before = identity(OWN);
    let ns = NetNs::create().unwrap();
    assert_eq!(identity(OWN), before, "the creator stays where it is");
    let (inside, list) = ns.run(|| (identity(OWN), interface::interfaces()));
    assert_ne!(inside, before);
    assert!(matches!(&list[..], [lo] if lo.name == "lo" && lo.up), "{list:?}");
}

#[test]
fn a_guard_brings_the_thread_back() {
    if !lab::privileged() {
        return;
    }
    let before = identity(OWN);
    let (outer, inner) = (NetNs::create().unwrap(), NetNs::create().unwrap());
    let inside = |ns: &NetNs| ns.run(|| identity(OWN));
    let first = outer.enter().unwrap();
    assert_eq!(identity(OWN), inside(&outer));
    let second = inner.enter().unwrap();
    assert_eq!(identity(OWN), inside(&inner));
    drop(second);
    assert_eq!(identity(OWN), inside(&outer));
    drop(first);
    assert_eq!(identity(OWN), before);
}

#[test]
fn a_command_starts_inside_and_the_path_leads_there() {
    if !lab::privileged() {
        return;
    }
    let ns = NetNs::create().unwrap();
    let mut command = Command::new("readlink");
    ns.command(command.arg("/proc/self/ns/net"));
    let output = String::from_utf8(command.output().unwrap().stdout).unwrap();
    assert_eq!(output.trim(), ns.run(|| identity(OWN)));
    assert_eq!(output.trim(), identity(ns.path().to_str().unwrap()));
    assert_ne!(output.trim(), identity(OWN));
}

#[test]
#[should_panic(expected = "from inside")]
fn a_panic_inside_is_the_callers() {
    if !lab::privileged() {
        panic!("skipped, so nothing panics from inside");
    }
    NetNs::create().unwrap().run(|| panic!("from inside"));
}

#[test]
fn a_user_namespace_makes_its_own_root() {
    if !lab::privileged() {
        return;
    }
    let mut command = Command::new("sh");
    command.args(["-c", "id -u; cat /proc/self/uid_map; cat /proc/net/dev"]);
    // SAFETY: the child is single-threaded; the C library keeps its allocator usable after a fork.
    unsafe { command.pre_exec(netns::enter_user_namespace) };
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("0"), "{text}");
    let map: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
    assert_eq!(map[2], "1", "one user only: {text}");
    assert!(text.contains("lo:") && !text.contains("eth0:"), "{text}");
}
