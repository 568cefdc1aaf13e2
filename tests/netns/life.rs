//! A module's life as its scripts and its users see it: arguments and environment, words of `safekit`, limits, boot, the last reset.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::time::{Duration, Instant};

use farm_core::api::{ModuleState, exit};
use farm_lab::client::Batch;
use farm_lab::module::{nginx_conf, nginx_scripts, write_file};
use farm_lab::{Group, Lab, LabConfig, MODULE, Mode, ModuleText, Node, VIP, VIP2, Vip, wait_until};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use crate::common::{
    changed, configured, farm_of, log_of, mentions, module_of, on_all, own_row, shell_ok, start, wait_state,
};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

/// Writes each run's name, arguments and environment to `SAFEUSERVAR/trace`.
const TRACE: &str =
    "#!/bin/sh\n{ echo \"run ${0##*/} $*\"; echo \"cwd $(pwd)\"; env | sed 's/^/env /'; } >>\"$SAFEUSERVAR/trace\"\n";

/// A module whose scripts only write a trace.
fn traced(mut module: ModuleText) -> ModuleText {
    for script in ["prestart", "start_both", "stop_both", "poststop"] {
        module = module.with_script(script, TRACE);
    }
    module
}

fn without_checker(module: ModuleText) -> ModuleText {
    let from = module.userconfig.find("    <check>").expect("a checker");
    let to = module.userconfig.find("</check>\n").expect("its end") + "</check>\n".len();
    let userconfig = format!("{}{}", &module.userconfig[..from], &module.userconfig[to..]);
    ModuleText { userconfig, ..module }
}

fn user_var(node: &Node) -> std::path::PathBuf {
    node.dirs().var.join("modules").join(MODULE)
}

/// The runs in a trace: name and arguments, and the variables of each.
fn runs(node: &Node) -> Vec<(String, BTreeMap<String, String>)> {
    let text = fs::read_to_string(user_var(node).join("trace")).unwrap_or_default();
    let mut runs: Vec<(String, BTreeMap<String, String>)> = Vec::new();
    for line in text.lines() {
        if let Some(run) = line.strip_prefix("run ") {
            runs.push((run.trim().to_owned(), BTreeMap::new()));
        } else if let (Some((_, vars)), Some((name, value))) = (
            runs.last_mut(),
            line.strip_prefix("env ").and_then(|line| line.split_once('=')),
        ) {
            vars.insert(name.to_owned(), value.to_owned());
        } else if let (Some((_, vars)), Some(folder)) = (runs.last_mut(), line.strip_prefix("cwd ")) {
            vars.insert("cwd".to_owned(), folder.to_owned());
        }
    }
    runs
}

fn names(runs: &[(String, BTreeMap<String, String>)]) -> Vec<&str> {
    runs.iter().map(|(run, _)| run.as_str()).collect()
}

#[test]
fn scripts_get_their_arguments_and_environment_in_the_order_of_a_life() {
    let lab = configured(farm_of(1), |_, module| {
        let mut module = traced(without_checker(module));
        module.userconfig = changed(&module.userconfig, "<user ", "<user starttimeout=\"20s\" ");
        let end = "/>\n  </service>";
        let vars = "><var name=\"SERVICES\" value=\"a, &quot;b&quot;\"/></user>\n  </service>";
        module.userconfig = changed(&module.userconfig, end, vars);
        module
    });
    let node = &lab.nodes[0];
    start(&lab, MODULE);
    node.farm_ok(&["restart", MODULE]).expect("the application restarts");
    node.farm_ok(&["stop", MODULE]).expect("the module stops");
    let runs = runs(node);
    assert_eq!(
        names(&runs),
        [
            "prestart STOP WAIT start",
            "start_both WAIT UP start",
            "stop_both UP UP restart",
            "stop_both force UP UP restart",
            "start_both UP UP restart",
            "stop_both UP WAIT stop",
            "stop_both force WAIT STOP stop",
            "poststop WAIT STOP stop",
        ]
    );
    let (_, vars) = &runs[1];
    let var = |name: &str| {
        vars.get(name)
            .map(String::as_str)
            .unwrap_or_else(|| panic!("no {name} in {vars:?}"))
    };
    assert_eq!(var("SERVICES"), "a, \"b\"");
    assert_eq!(var("SAFEMODULE"), MODULE);
    assert_eq!(var("FARM_NODE"), "node1");
    assert_eq!(var("FARM_IDENTITY"), "", "an administrator asked");
    assert_eq!(Path::new(var("SAFEVAR")), node.dirs().var);
    assert_eq!(Path::new(var("SAFEUSERVAR")), user_var(node));
    for program in ["safekit", "farm"] {
        assert!(Path::new(var("SAFE")).join(program).exists(), "{program} in SAFE");
        assert!(Path::new(var("SAFEBIN")).join(program).exists(), "{program} in SAFEBIN");
    }
    assert!(Path::new(var("SAFEUSERBIN")).join("start_both").exists());
    assert!(Path::new(var("SAFEUSERCONF")).join("userconfig.xml").exists());
    assert!(
        Path::new(var("SAFEUSERBIN")).starts_with(&node.dirs().var),
        "the active copy and not the one that is edited: {}",
        var("SAFEUSERBIN")
    );
    assert_eq!(var("cwd"), var("SAFEUSERBIN"));
}

#[test]
fn a_checker_that_always_fails_stops_the_module_at_maxloop() {
    let lab = configured(farm_of(1), |_, module| {
        let mut module = traced(module);
        module.userconfig = changed(
            &module.userconfig,
            "port=\"80\" interval",
            "port=\"81\" fall=\"1\" interval",
        );
        module.userconfig = changed(&module.userconfig, "maxloop=\"3\"", "maxloop=\"1\"");
        module
    });
    let node = &lab.nodes[0];
    let started = |since: usize| {
        let runs = runs(node);
        names(&runs)[since..]
            .iter()
            .filter(|run| run.starts_with("start_both"))
            .count()
    };
    let failed = node.farm(&["start", MODULE]).expect("farm runs");
    assert_eq!(failed.code, Some(i32::from(exit::FAILED)), "{failed:?}");
    mentions(&format!("{}{}", failed.stdout, failed.stderr), &["maxloop", "tcp.web"]);
    assert_eq!(own_row(node, MODULE).state, Some(ModuleState::Stop));
    assert_eq!(started(0), 2, "one start and one restart: {:?}", names(&runs(node)));
    assert_eq!(
        runs(node)[4].1.get("FARM_IDENTITY").map(String::is_empty),
        Some(false),
        "the restart knows who asked for it"
    );
    let log = log_of(node, MODULE);
    mentions(&log, &["Action stop called by maxloop"]);
    mentions(&own_row(node, MODULE).why, &["maxloop"]);
    assert!(
        !shell_ok(node, "ip -o -4 addr").contains(&VIP.to_string()),
        "the VIP has left"
    );

    // A command of the administrator resets the count: again one start and one restart.
    let before = runs(node).len();
    let failed = node.farm(&["start", MODULE]).expect("farm runs");
    assert_eq!(failed.code, Some(i32::from(exit::FAILED)), "{failed:?}");
    assert_eq!(started(before), 2, "{:?}", names(&runs(node)));
}

#[test]
fn the_words_of_safekit_work_inside_scripts() {
    let script = concat!(
        "#!/bin/sh\n\"$SAFE/safekit\" printi \"licence found\" && \"$SAFE/safekit\" printe 'two | words' || exit 9\n",
        "\"$SAFE/safekit\" set -r custom.licence -v up -i licence || exit 8\n",
        "\"$SAFE/safekit\" set -r custom.note -v 'some text' || exit 7\n",
        // Somebody who watches the application and stops the module when he is told to.
        "( while [ ! -e \"$SAFEUSERVAR/give-up\" ]; do sleep 0.1; done; \"$SAFE/safekit\" stop -i watcher ) >/dev/null 2>&1 &\n"
    );
    let lab = configured(farm_of(1), |_, module| {
        traced(without_checker(module)).with_script("start_both", script)
    });
    let node = &lab.nodes[0];
    start(&lab, MODULE);
    let log = log_of(node, MODULE);
    let line = |text: &str| {
        let found = log.lines().find(|line| line.contains(text));
        found.unwrap_or_else(|| panic!("{text} is not in {log}")).to_owned()
    };
    assert!(line("licence found").contains("| I |"), "{log}");
    assert!(line("words").contains("| E |"), "{log}");
    let resources = module_of(node, MODULE).resources;
    assert_eq!(resources.get("custom.licence").map(String::as_str), Some("up"));
    assert_eq!(resources.get("custom.note").map(String::as_str), Some("some text"));
    let got = node
        .farm_ok(&["-m", MODULE, "get", "-r", "custom.licence"])
        .expect("it is set");
    assert_eq!(got.trim(), "up");

    fs::write(user_var(node).join("give-up"), "").expect("a file");
    wait_state(node, MODULE, ModuleState::Stop, Duration::from_secs(5));
    mentions(&log_of(node, MODULE), &["Action stop called by watcher"]);
    let runs = runs(node);
    assert_eq!(
        names(&runs),
        [
            "prestart STOP WAIT start",
            "stop_both UP WAIT stop",
            "stop_both force WAIT STOP stop",
            "poststop WAIT STOP stop",
        ]
    );
    assert_eq!(runs[1].1.get("FARM_IDENTITY").map(String::as_str), Some("watcher"));
}

#[test]
fn a_start_script_that_stops_its_own_module_is_not_waited_for_in_vain() {
    let lab = configured(farm_of(1), |_, module| {
        traced(without_checker(module)).with_script(
            "start_both",
            "#!/bin/sh\n\"$SAFE/safekit\" stop -i start_both\nexit 0\n",
        )
    });
    let node = &lab.nodes[0];
    let ended = node.farm(&["start", MODULE]).expect("farm runs");
    assert_eq!(ended.code, Some(i32::from(exit::FAILED)), "{ended:?}");
    assert!(ended.took < Duration::from_secs(10), "{ended:?}");
    wait_state(node, MODULE, ModuleState::Stop, Duration::from_secs(5));
    mentions(&log_of(node, MODULE), &["Action stop called by start_both"]);
}

#[test]
fn a_hung_stop_script_is_ended_and_the_forced_pass_follows() {
    let stop = concat!(
        "#!/bin/sh\n{ echo \"run ${0##*/} $*\"; } >>\"$SAFEUSERVAR/trace\"\n",
        "[ \"$1\" = force ] || { sleep 7655.25 & wait; }\n"
    );
    let lab = configured(farm_of(1), |_, module| {
        let mut module = traced(without_checker(module)).with_script("stop_both", stop);
        module.userconfig = changed(&module.userconfig, "nicestoptimeout=\"20s\"", "nicestoptimeout=\"1s\"");
        module
    });
    let node = &lab.nodes[0];
    start(&lab, MODULE);
    let stopped = node.farm(&["stop", MODULE]).expect("farm runs");
    assert!(!stopped.timed_out, "{stopped:?}");
    assert_eq!(own_row(node, MODULE).state, Some(ModuleState::Stop));
    let runs = runs(node);
    assert_eq!(
        names(&runs)[2..],
        [
            "stop_both UP WAIT stop",
            "stop_both force WAIT STOP stop",
            "poststop WAIT STOP stop"
        ]
    );
    mentions(&log_of(node, MODULE), &["Script stop_both failed"]);
    let left = shell_ok(
        node,
        "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' | grep -c 'sleep 7655[.]25' || :",
    );
    assert_eq!(left.trim(), "0", "its child is still there");
}

#[test]
fn boot_on_starts_with_the_daemon_and_auto_as_it_was() {
    let lab = configured(farm_of(2), |node, mut module| {
        let boot = if node.name() == "node1" { "on" } else { "auto" };
        module.userconfig = changed(
            &module.userconfig,
            "mode=\"farm\"",
            &format!("mode=\"farm\" boot=\"{boot}\""),
        );
        module
    });
    let [on, auto] = &lab.nodes[..] else {
        panic!("two nodes")
    };
    let again = |node: &Node| {
        assert_eq!(node.stop_farmd().expect("farmd ends"), Some(0), "{}", node.log_tail(20));
        node.start_farmd().expect("farmd starts");
        node.wait_farmd(Duration::from_secs(10)).expect("it answers");
    };
    again(on);
    again(auto);
    lab.wait_ready(MODULE, &[on], Duration::from_secs(20))
        .expect("boot=on serves");
    mentions(
        &log_of(on, MODULE),
        &["Action start called at boot", "Action start called by boot"],
    );
    assert_eq!(
        own_row(auto, MODULE).state,
        Some(ModuleState::Stop),
        "auto was never started"
    );

    auto.farm_ok(&["start", MODULE]).expect("it starts");
    again(auto);
    lab.wait_ready(MODULE, &[on, auto], Duration::from_secs(20))
        .expect("boot=auto serves again");
    auto.farm_ok(&["stop", MODULE]).expect("it stops");
    again(auto);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(
        own_row(auto, MODULE).state,
        Some(ModuleState::Stop),
        "it was stopped by hand"
    );
}

/// An idle connection: connected, answered once, then silent.
struct Idle {
    node: String,
    /// How long after the order to stop it ended, and how; `None` if it did not.
    ended: Option<(Duration, String)>,
}

/// Opens one idle connection from each source, calls `act`, and watches the connections for `limit` after it began.
fn watch_idle(lab: &Lab, sources: Vec<Ipv4Addr>, limit: Duration, act: impl FnOnce()) -> Vec<Idle> {
    let (opened, wait_opened) = std::sync::mpsc::channel();
    let (begun, mut wait_begun) = tokio::sync::watch::channel(None::<Instant>);
    let running = lab
        .client
        .start(async move || {
            let mut streams = Vec::new();
            for source in sources {
                let socket = TcpSocket::new_v4().expect("a socket");
                socket.bind((source, 0).into()).expect("an address");
                let mut stream = socket.connect(WEB.into()).await.expect("a connection");
                let request = b"GET /echo/idle HTTP/1.1\r\nHost: farm\r\n\r\n";
                stream.write_all(request).await.expect("a request");
                let mut answer = [0; 1024];
                let length = stream.read(&mut answer).await.expect("an answer");
                let text = String::from_utf8_lossy(&answer[..length]).into_owned();
                let body = text.split("\r\n\r\n").nth(1).expect("a body in one piece");
                streams.push((body.split(' ').next().unwrap_or_default().to_owned(), stream));
            }
            let _ = opened.send(());
            let begin = wait_begun
                .wait_for(Option::is_some)
                .await
                .expect("a start")
                .expect("set");
            let mut watched = tokio::task::JoinSet::new();
            for (node, mut stream) in streams {
                watched.spawn(async move {
                    let mut more = [0; 64];
                    let left = (begin + limit).saturating_duration_since(Instant::now());
                    let ended = tokio::time::timeout(left, stream.read(&mut more))
                        .await
                        .ok()
                        .map(|read| {
                            let how = match read {
                                Ok(0) => "closed".to_owned(),
                                Ok(more) => format!("{more} bytes"),
                                Err(error) => format!("{:?}", error.kind()),
                            };
                            (begin.elapsed(), how)
                        });
                    Idle { node, ended }
                });
            }
            watched.join_all().await
        })
        .expect("the client runs");
    wait_opened
        .recv_timeout(Duration::from_secs(10))
        .expect("all are connected");
    begun.send(Some(Instant::now())).expect("the client waits");
    act();
    running.wait().expect("the client ends")
}

#[test]
fn clients_of_a_service_that_does_not_stop_are_reset_at_once() {
    let lab = configured(farm_of(2), |_, module| {
        module.with_script("stop_both", "#!/bin/sh\nexit 0\n")
    });
    start(&lab, MODULE);
    let node = &lab.nodes[0];
    let watched = watch_idle(&lab, lab.client.addrs()[..30].to_vec(), Duration::from_secs(2), || {
        node.farm_ok(&["stop", MODULE]).expect("the module stops");
    });
    let (here, there): (Vec<_>, Vec<_>) = watched.iter().partition(|idle| idle.node == node.name());
    assert!(here.len() > 4 && there.len() > 4, "{} and {}", here.len(), there.len());
    for idle in here {
        let (after, how) = idle.ended.as_ref().expect("a client is left with a dead connection");
        assert_eq!(how, "ConnectionReset");
        assert!(*after < Duration::from_secs(1), "reset after {after:?}");
    }
    assert!(there.iter().all(|idle| idle.ended.is_none()), "the other node's go on");
    mentions(
        &shell_ok(node, "ps -e -o comm= 2>/dev/null || cat /proc/[0-9]*/comm"),
        &["nginx"],
    );
}

#[test]
fn two_modules_serve_side_by_side_and_one_stops_alone() {
    let lab = configured(farm_of(2), |_, module| module);
    let second = LabConfig {
        vips: vec![Vip::new(VIP2, Mode::Invisible)],
        groups: vec![Group::tcp("web", 81, "on_port")],
        ..farm_of(2)
    };
    let taken = LabConfig { ..farm_of(2) };
    for node in &lab.nodes {
        let folder = node.dirs().base.join("nginx2");
        let conf = nginx_conf(&folder, node.name(), &["81".to_owned()]);
        write_file(&folder.join("nginx.conf"), &conf, 0o644).expect("a file");
        let module = |config: &LabConfig| ModuleText {
            userconfig: config.userconfig_xml(None),
            scripts: nginx_scripts(&folder),
        };
        let modules = node.dirs().etc.join("modules");
        module(&taken).write(&modules.join("shop")).expect("it is installed");
        let refused = node.farm(&["config", "shop"]).expect("farm runs");
        assert_ne!(refused.code, Some(0), "the VIP is the other module's");
        mentions(&refused.stderr, &["198.18.0.20 belongs to module web"]);
        module(&second).write(&modules.join("shop")).expect("it is installed");
        node.farm_ok(&["config", "shop"]).expect("it is right");
    }
    start(&lab, MODULE);
    start(&lab, "shop");
    let served = |to: SocketAddrV4| {
        let report = lab.client.batch(Batch::new(to, 200)).expect("a batch");
        assert_eq!(report.lost(), 0, "{to}: {:?}", report.failures());
        report.per_node()
    };
    let shop = SocketAddrV4::new(VIP2, 81);
    assert_eq!((served(WEB).len(), served(shop).len()), (2, 2));

    // One stops on all nodes; the other one's address, filter and share stay.
    on_all(&lab, &["stop", "shop"]);
    assert_eq!(served(WEB).len(), 2);
    let silent = lab.client.batch(Batch {
        limit: Duration::from_millis(400),
        ..Batch::new(shop, 2)
    });
    assert_eq!(silent.expect("a batch").answered(), 0);
    for node in &lab.nodes {
        let addrs = shell_ok(node, "ip -o -4 addr");
        assert!(
            addrs.contains("198.18.0.20/") && !addrs.contains("198.18.0.21/"),
            "{addrs}"
        );
    }
    // And on one node only: the rest of it is served by the other node.
    lab.nodes[0].farm_ok(&["stop", MODULE]).expect("it stops");
    lab.nodes[1].farm_ok(&["start", "shop"]).expect("it starts");
    wait_until(Duration::from_secs(5), "node2 to serve both alone", || {
        let web = lab.client.batch(Batch::new(WEB, 20)).ok()?;
        let shop = lab.client.batch(Batch::new(shop, 20)).ok()?;
        (web.per_node().get("node2") == Some(&20) && shop.per_node().get("node2") == Some(&20)).then_some(())
    })
    .expect("both are served");
}
