//! What goes wrong says so: one fault per test, and the rest of the farm goes on.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use farm_core::api::{ModuleState, Quality, exit};
use farm_lab::module::write_file;
use farm_lab::process::run_limited;
use farm_lab::{Lab, LabConfig, MODULE, ModuleText, Node, wait_until};

/// A farm of two nodes whose daemons run and whose module is installed, not yet configured.
fn installed(config: LabConfig, change: impl Fn(&Node, ModuleText) -> ModuleText) -> Lab {
    let lab = Lab::new(LabConfig { nodes: 2, ..config }).expect("a lab can be built");
    lab.start_daemons().expect("the daemons start");
    for node in &lab.nodes {
        let module = change(node, lab.module_text(node, Some("1s")));
        node.install_text(MODULE, &module, &["80".to_owned()])
            .expect("the module can be installed");
        node.farm_ok(&["config", MODULE]).expect("its configuration is right");
    }
    lab
}

/// Starts the module on the second node and returns what the command line said and ended with.
fn start_second(lab: &Lab) -> (Option<i32>, String) {
    let finished = lab.nodes[1].farm(&["start", MODULE]).expect("farm runs");
    assert!(!finished.timed_out, "farm start hangs: {finished:?}");
    (finished.code, format!("{}{}", finished.stdout, finished.stderr))
}

/// The first node serves alone, and the second one has no bucket and is not Ready; returns why.
fn first_serves_alone(lab: &Lab) -> String {
    lab.wait_ready(MODULE, &[&lab.nodes[0]], Duration::from_secs(20))
        .expect("the first node serves alone");
    let status = lab.nodes[1].status().expect("the second node answers");
    let module = status
        .modules
        .iter()
        .find(|m| m.name == MODULE)
        .expect("the module is known");
    let row = module
        .nodes
        .iter()
        .find(|row| row.node == "node2")
        .expect("a row for itself");
    let ready = row.state == Some(ModuleState::Up) && row.quality == Some(Quality::Ready);
    assert!(row.shares.iter().all(|share| share.buckets == 0), "{row:?}");
    assert!(
        !ready || !row.why.is_empty(),
        "UP Ready with nothing to do and no reason: {row:?}"
    );
    row.why.clone()
}

fn mentions(text: &str, words: &[&str]) {
    let lower = text.to_lowercase();
    assert!(
        words.iter().any(|word| lower.contains(&word.to_lowercase())),
        "none of {words:?} in: {text}"
    );
}

#[test]
fn a_failing_start_script_never_takes_traffic() {
    let lab = installed(LabConfig::default(), |node, module| match node.name() {
        "node2" => module.with_script("start_both", "#!/bin/sh\necho no licence found >&2\nexit 3\n"),
        _ => module,
    });
    lab.nodes[0].farm_ok(&["start", MODULE]).expect("the first node starts");
    let (code, said) = start_second(&lab);
    assert_eq!(code, Some(i32::from(exit::FAILED)), "{said}");
    mentions(&said, &["start_both failed: exit code 3: no licence found"]);
    mentions(&first_serves_alone(&lab), &["no licence found"]);
    let output = lab.nodes[1]
        .farm_ok(&["log", MODULE, "--script", "start_both"])
        .expect("script output");
    mentions(&output, &["no licence found"]);
}

#[test]
fn a_hung_start_script_is_ended_with_all_its_children() {
    let config = LabConfig {
        user: "starttimeout=\"2s\"".into(),
        ..LabConfig::default()
    };
    let lab = installed(config, |node, module| match node.name() {
        // The odd length makes the process easy to find.
        "node2" => module.with_script("start_both", "#!/bin/sh\n(sleep 7654.25) &\nsleep 7654.25\n"),
        _ => module,
    });
    lab.nodes[0].farm_ok(&["start", MODULE]).expect("the first node starts");
    let (code, said) = start_second(&lab);
    assert_eq!(code, Some(i32::from(exit::FAILED)), "{said}");
    mentions(&said, &["start_both"]);
    first_serves_alone(&lab);
    let left = wait_until(Duration::from_secs(15), "the script's processes to be gone", || {
        let mut search = lab.nodes[1].command(Path::new("sh")).ok()?;
        search.args([
            "-c",
            "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 7654[.]25' || :",
        ]);
        let found = run_limited(search, Duration::from_secs(5)).ok()?;
        (found.stdout.trim() == "0").then_some(())
    });
    left.expect("nothing of the script is left");
}

#[test]
fn a_dead_service_is_started_again_by_its_checker() {
    let lab = Lab::serve(LabConfig {
        nodes: 2,
        ..LabConfig::default()
    })
    .expect("the farm comes up");
    let node = &lab.nodes[1];
    let pid_file = node.nginx_dir().join("nginx.pid");
    let before = std::fs::read_to_string(&pid_file).expect("nginx runs");
    let mut kill = node.command(Path::new("sh")).expect("the node has power");
    kill.args(["-c", "kill -KILL $(cat \"$1\") ; for p in $(cat /proc/[0-9]*/stat | awk '$2 ~ /nginx/ { print $1 }'); do kill -KILL $p; done", "kill"]);
    kill.arg(&pid_file);
    run_limited(kill, Duration::from_secs(5)).expect("kill runs");
    let again = wait_until(Duration::from_secs(20), "another nginx", || {
        let now = std::fs::read_to_string(&pid_file).ok()?;
        (!now.trim().is_empty() && now != before).then_some(())
    });
    again.expect("the application is restarted");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("both serve");
    mentions(
        &node.farm_ok(&["log", MODULE, "-n", "200"]).expect("a log"),
        &["tcp.web"],
    );
}

#[test]
fn a_node_with_another_key_stays_outside_and_says_why() {
    let lab = Lab::new(LabConfig {
        nodes: 2,
        ..LabConfig::default()
    })
    .expect("a lab can be built");
    write_file(
        &lab.nodes[1].dirs().etc.join("cluster.key"),
        &format!("{}\n", "5a".repeat(32)),
        0o600,
    )
    .expect("a file");
    lab.start_daemons().expect("the daemons start");
    let why = wait_until(Duration::from_secs(10), "the first node to notice", || {
        let cluster = lab.nodes[0].status().ok()?.cluster;
        let peer = cluster.nodes.into_iter().find(|peer| peer.name == "node2")?;
        (peer.state != "alive" && !peer.why.is_empty()).then_some(peer.why)
    });
    mentions(&why.expect("a reason"), &["key", "authentic"]);
}

#[test]
fn a_node_with_another_configuration_stays_outside_and_says_why() {
    let lab = installed(LabConfig::default(), |node, mut module| {
        if node.name() == "node2" {
            module.userconfig = module.userconfig.replace("on_addr", "on_port");
        }
        module
    });
    lab.nodes[0].farm_ok(&["start", MODULE]).expect("the first node starts");
    let (code, said) = start_second(&lab);
    assert_eq!(code, Some(i32::from(exit::FAILED)), "it has no share: {said}");
    mentions(
        &said,
        &["kept out: the active userconfig.xml (farm config) differs from that of node1"],
    );
    mentions(&first_serves_alone(&lab), &["differs from that of node1"]);
}

#[test]
fn a_port_in_use_is_named_in_the_script_output() {
    let lab = installed(LabConfig::default(), |_, module| module);
    let taken = lab.nodes[1]
        .space()
        .run(|| TcpListener::bind("0.0.0.0:80"))
        .expect("the port is free");
    lab.nodes[0].farm_ok(&["start", MODULE]).expect("the first node starts");
    let (code, said) = start_second(&lab);
    assert_eq!(code, Some(i32::from(exit::FAILED)), "{said}");
    let output = lab.nodes[1]
        .farm_ok(&["log", MODULE, "--script", "start_both"])
        .expect("script output");
    mentions(&output, &["in use"]);
    first_serves_alone(&lab);
    drop(taken);
}

#[test]
fn a_daemon_without_privilege_ends_with_one_clear_message() {
    let lab = Lab::new(LabConfig {
        nodes: 1,
        ..LabConfig::default()
    })
    .expect("a lab can be built");
    let farmd = farm_lab::binaries().expect("farmd is built").join("farmd");
    let mut command = lab.nodes[0].command(Path::new("setpriv")).expect("the node has power");
    command
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
        .arg(farmd);
    let finished = run_limited(command, Duration::from_secs(10)).expect("setpriv runs");
    assert_eq!(finished.code, Some(i32::from(exit::DENIED)), "{finished:?}");
    mentions(
        &finished.stderr,
        &["root", "CAP_NET_ADMIN", "privilege", "not permitted", "permission"],
    );
}

#[test]
fn a_missing_tun_device_is_named() {
    let lab = Lab::new(LabConfig {
        nodes: 2,
        ..LabConfig::default()
    })
    .expect("a lab can be built");
    let mut hide = lab.nodes[1].command(Path::new("mount")).expect("the node has power");
    hide.args(["-t", "tmpfs", "tmpfs", "/dev/net"]);
    assert!(run_limited(hide, Duration::from_secs(5)).expect("mount runs").ok());
    lab.start_daemons().expect("the daemons start");
    for node in &lab.nodes {
        node.install_text(MODULE, &lab.module_text(node, Some("1s")), &["80".to_owned()])
            .expect("installed");
        node.farm_ok(&["config", MODULE]).expect("its configuration is right");
    }
    lab.nodes[0].farm_ok(&["start", MODULE]).expect("the first node starts");
    let (code, said) = start_second(&lab);
    assert_ne!(code, Some(0), "{said}");
    let why = first_serves_alone(&lab);
    mentions(&format!("{said} {why} {}", lab.nodes[1].log_text()), &["/dev/net/tun"]);
}

#[test]
fn a_daemon_that_is_not_running_is_one_clear_line() {
    let lab = Lab::new(LabConfig {
        nodes: 1,
        ..LabConfig::default()
    })
    .expect("a lab can be built");
    let finished = lab.nodes[0].farm(&["status"]).expect("farm runs");
    assert_eq!(finished.code, Some(i32::from(exit::NO_DAEMON)));
    assert_eq!(finished.stderr.trim_end().lines().count(), 1, "{}", finished.stderr);
    mentions(&finished.stderr, &["not running", "does not answer"]);
}
