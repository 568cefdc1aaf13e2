//! farmd is restarted in place, on every node, while clients are connected and connect: nobody notices.

use std::fs;
use std::net::SocketAddrV4;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use farm_core::api::exit;
use farm_lab::client::Batch;
use farm_lab::hold::{HoldConfig, Holder};
use farm_lab::process::spawn_kept;
use farm_lab::space::Space;
use farm_lab::wire::Watcher;
use farm_lab::{Lab, LabConfig, MODULE, Mode, Node, VIP, VIP2, Vip, wait_until};
use farm_sys::bpf::ACCEPTED_MARK;

use crate::common::{counter, farm_of, install, mentions, own_row, patient_clients, program, shell_ok, start};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

fn incarnation(node: &Node) -> u64 {
    node.status().expect("the node answers").cluster.incarnation
}

fn nobody_notices(mode: Mode) {
    let lab = Lab::serve(LabConfig::with_mode(mode)).expect("the farm comes up");
    let holder = Holder::start(&lab.client, HoldConfig::new(WEB, 60)).expect("connections can be held");
    holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    let prober = patient_clients(&lab, WEB);
    let before: Vec<u64> = lab.nodes.iter().map(incarnation).collect();
    for node in &lab.nodes {
        let told = node.farm(&["reload"]).expect("farm runs");
        assert!(told.ok(), "{told:?}");
        mentions(&told.stdout, &["restarted in place and serves"]);
        lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
            .expect("all serve");
        holder.wait_rounds(1, Duration::from_secs(30)).expect("they go on");
    }
    let told = lab.nodes[0].farm(&["rolling-restart", "--daemon"]).expect("farm runs");
    assert!(told.ok(), "{told:?}");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
    holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
    let (held, probe) = (
        holder.stop().expect("the holder ends"),
        prober.stop().expect("the prober ends"),
    );
    for (node, before) in lab.nodes.iter().zip(before) {
        assert!(incarnation(node) > before, "{} runs another farmd", node.name());
        let output = node.farm_ok(&["log", MODULE]).expect("a log");
        mentions(&output, &["farmd has been restarted in place; the application goes on"]);
        assert_eq!(
            output.matches("Script start_both").count(),
            1,
            "the application was not started again: {output}"
        );
        assert!(!output.contains("Script stop_both"), "{output}");
        assert_eq!(counter(node, "dataplane_hold_expired"), 0);
    }
    println!(
        "{mode:?}: {} connections held, {} requests, slowest {:?}",
        60,
        probe.report.records.len(),
        probe.report.latency(1.0)
    );
    assert!(held.broken_per_node().is_empty(), "{:?}", held.broken_per_node());
    assert_eq!(probe.report.lost(), 0, "{:?}", probe.report.failures());
    let evidence = watcher.stop().expect("the watcher ends");
    assert!(evidence.two_owners().is_empty(), "{:?}", evidence.two_owners());
    assert!(evidence.vmac_sources.is_empty(), "{:?}", evidence.vmac_sources);
}

#[test]
fn reload_of_every_farmd_ends_no_connection_and_loses_no_request_in_directed_mode() {
    nobody_notices(Mode::Directed);
}

#[test]
fn reload_of_every_farmd_ends_no_connection_and_loses_no_request_in_invisible_mode() {
    nobody_notices(Mode::Invisible);
}

#[test]
fn reload_is_refused_while_a_module_is_on_its_way_and_a_stopped_one_stays_stopped() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let node = &lab.nodes[1];
    node.farm_ok(&["stop", MODULE]).expect("the module stops");
    let before = incarnation(node);
    node.farm_ok(&["start", MODULE, "--no-wait"]).expect("it starts");
    let told = node.farm(&["reload"]).expect("farm runs");
    // The start may be over by then.
    if told.code == Some(i32::from(exit::REFUSED)) {
        mentions(&told.stderr, &["not at rest"]);
        assert_eq!(incarnation(node), before);
    }
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
    node.farm_ok(&["stop", MODULE]).expect("the module stops");
    let told = node.farm(&["reload"]).expect("farm runs");
    assert!(told.ok(), "{told:?}");
    assert!(incarnation(node) > before);
    node.farm_ok(&["waitstop", MODULE]).expect("it stays stopped");
    mentions(&own_row(node, MODULE).why, &["stopped by root"]);
    let told = node.farm_ok(&["history"]).expect("a history");
    mentions(&told, &["to be restarted in place (reload by root)"]);
    mentions(&told, &["restarted in place (reload by root)"]);

    // A file with which no farmd would start changes nothing.
    let (before, file) = (incarnation(node), node.dirs().etc.join("cluster.xml"));
    let good = std::fs::read_to_string(&file).expect("cluster.xml");
    std::fs::write(&file, good.replace("</cluster>", "")).expect("a broken file");
    let told = node.farm(&["reload"]).expect("farm runs");
    assert_eq!(told.code, Some(i32::from(exit::REFUSED)), "{told:?}");
    mentions(&told.stderr, &["another farmd would not start", "cluster.xml"]);
    assert_eq!(incarnation(node), before);
}

/// The deadline of a drain is kept through the restart: what is left then is reset, and nothing before.
#[test]
fn reload_during_a_drain_keeps_its_connections_and_its_deadline() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let holder = Holder::start(&lab.client, HoldConfig::new(WEB, 30)).expect("connections can be held");
    holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
    let node = &lab.nodes[1];
    node.farm_ok(&["drain", "node2", "--timeout", "12s", "--no-wait"])
        .expect("a drain");
    let held = || {
        own_row(node, MODULE)
            .shares
            .iter()
            .map(|share| share.draining)
            .sum::<u32>()
    };
    let wait = |what: &str, check: &dyn Fn(u32) -> bool| {
        wait_until(Duration::from_secs(30), what, || check(held()).then_some(()))
            .unwrap_or_else(|e| panic!("{e}: {}", held()));
    };
    wait("connections that are left", &|held| held > 0);
    let told = node.farm(&["reload"]).expect("farm runs");
    assert!(told.ok(), "{told:?}");
    mentions(&own_row(node, MODULE).why, &["drained by root"]);
    wait("the connections to be found again", &|held| held > 0);
    holder.wait_rounds(1, Duration::from_secs(30)).expect("they go on");
    wait("the deadline", &|held| held == 0);
    // Those that were reset see it when they next ask.
    holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
    let broken = holder.stop().expect("the holder ends").broken_per_node();
    assert!(broken.len() == 1 && broken.contains_key("node2"), "{broken:?}");
    let log = node.farm_ok(&["log", MODULE]).expect("a log");
    mentions(&log, &["the time is over", "connections were reset"]);
}

/// What keeps the next farmd from serving is told at once, and that it serves beside the others is no success.
#[test]
fn reload_with_files_that_differ_fails_with_the_reason() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let node = &lab.nodes[1];
    let file = node.dirs().etc.join("cluster.xml");
    let good = std::fs::read_to_string(&file).expect("cluster.xml");
    std::fs::write(&file, good.replace("node3", "node33")).expect("another file");
    let begun = std::time::Instant::now();
    let told = node.farm(&["reload"]).expect("farm runs");
    assert_eq!(told.code, Some(i32::from(exit::FAILED)), "{told:?}");
    mentions(&told.stderr, &["stepped out: cluster.xml differs"]);
    println!("told after {:?}", begun.elapsed());
    std::fs::write(&file, good).expect("the file");
    let told = node.farm(&["reload"]).expect("farm runs");
    assert!(told.ok(), "{told:?}");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");

    let key = node.dirs().etc.join("cluster.key");
    let text = std::fs::read_to_string(&key).expect("cluster.key");
    let turned: String = text.chars().rev().collect();
    std::fs::write(&key, turned.trim()).expect("another key");
    let told = node.farm(&["reload"]).expect("farm runs");
    assert_eq!(told.code, Some(i32::from(exit::FAILED)), "{told:?}");
    mentions(&told.stderr, &["are not authentic"]);
}

/// A node more in `cluster.xml`: those of the old file and those of the new one are never one farm, and some of them serve all the time.
#[test]
fn reload_of_all_nodes_takes_another_cluster_file_into_use() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    for node in &lab.nodes {
        let file = node.dirs().etc.join("cluster.xml");
        let old = std::fs::read_to_string(&file).expect("cluster.xml");
        let line = "<node name=\"node4\" addr=\"198.18.0.14\"/>\n    </lan>";
        std::fs::write(&file, old.replace("</lan>", line)).expect("another file");
    }
    let first = &lab.nodes[0];
    let told = first.farm(&["-H", "*", "reload"]).expect("farm runs");
    assert_eq!(
        told.code,
        Some(i32::from(exit::FAILED)),
        "the first one steps out: {told:?}"
    );
    mentions(&told.stdout, &["node3:\n"]);
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .unwrap_or_else(|e| panic!("{e}: {told:?}"));
    let names: Vec<String> = first
        .status()
        .expect("the node answers")
        .cluster
        .nodes
        .into_iter()
        .map(|n| n.name)
        .collect();
    assert!(names.contains(&"node4".to_owned()), "{names:?}");
}

/// Segments that the stack of a namespace has sent again.
fn sent_again(space: &Space) -> u64 {
    let shown = space.command("cat").arg("/proc/net/snmp").output().expect("cat runs");
    let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
    let mut tcp = shown.lines().filter_map(|line| line.strip_prefix("Tcp:"));
    let (names, values) = (tcp.next().expect("names"), tcp.next().expect("values"));
    let mut both = names.split_whitespace().zip(values.split_whitespace());
    let (_, count) = both.find(|(name, _)| *name == "RetransSegs").expect("a counter");
    count.parse().expect("a number")
}

/// Frames for the VIP that came by the place of the program, at tc ingress, and were neither taken nor marked there.
fn let_by(node: &Node) -> u64 {
    let shown = shell_ok(node, "nft list table netdev watch");
    let words: Vec<&str> = shown.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "packets").expect("a counter");
    words[at + 1].parse().expect("a number")
}

/// Connections to one node, each of which speaks fifty times a second, over a reload of its farmd.
fn no_frame_is_lost(nodes: usize, mode: Mode, attach: &'static str) {
    let lab = Lab::serve(LabConfig {
        plane: "bpf",
        attach,
        ..LabConfig {
            vips: LabConfig::with_mode(mode).vips,
            ..farm_of(nodes)
        }
    });
    let lab = lab.expect("the farm comes up");
    let node = &lab.nodes[nodes - 1];
    let hold = HoldConfig {
        pause: Duration::from_millis(20),
        ..HoldConfig::new(WEB, 40)
    };
    let holder = Holder::start(&lab.client, hold).expect("connections can be held");
    holder.wait_rounds(5, Duration::from_secs(30)).expect("they go on");
    shell_ok(
        node,
        &format!(
            "nft 'table netdev watch {{ chain c {{ type filter hook ingress device eth0 priority -510; ip daddr {VIP} tcp dport 80 meta mark != {ACCEPTED_MARK} counter; }}; }}'"
        ),
    );
    let again = || sent_again(lab.client.space()) + lab.nodes.iter().map(|node| sent_again(node.space())).sum::<u64>();
    let before = again();
    for reloads in 1..=3 {
        let told = node.farm(&["reload"]).expect("farm runs");
        assert!(told.ok(), "{told:?}");
        lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
            .expect("all serve");
        wait_until(Duration::from_secs(5), "the program of before to be off", || {
            let off = node.log_text().matches("that of the one before is off").count();
            (off == reloads).then_some(())
        })
        .unwrap_or_else(|e| panic!("{e}\n{}", node.log_tail(40)));
    }
    holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
    let (again, let_by) = (again() - before, let_by(node));
    let report = holder.stop().expect("the holder ends");
    let on_node = report.held.iter().filter(|held| held.node == node.name());
    let slowest = on_node.clone().map(|held| held.slowest).max().unwrap_or_default();
    println!(
        "{nodes} nodes, {mode:?}, {attach}: {} connections, slowest answer {slowest:?}, {again} segments sent again",
        on_node.count()
    );
    assert!(report.broken().is_empty(), "{:?}", report.broken());
    assert_eq!(
        let_by,
        0,
        "frames that neither program has judged\n{}",
        node.log_tail(40)
    );
    for other in &lab.nodes {
        assert_eq!(counter(other, "dataplane_forward_unknown"), 0, "{}", other.name());
    }
    // Where frames are lost each connection of the node repeats some; a busy machine makes one late now and then.
    assert!(again < 10, "{again} segments were sent again");
}

#[test]
fn reload_of_a_farmd_loses_no_frame_of_a_connection_of_its_node() {
    for attach in ["tcx", "clsact"] {
        no_frame_is_lost(1, Mode::Directed, attach);
        no_frame_is_lost(3, Mode::Directed, attach);
    }
    no_frame_is_lost(3, Mode::Invisible, "tcx");
}

/// A node on which a program that hangs takes farmd's place at a reload.
struct Hanging<'a> {
    node: &'a Node,
    outer: Child,
    asking: Option<Child>,
}

impl<'a> Hanging<'a> {
    /// Starts a farmd on `node` of which the file can be replaced.
    fn start(node: &'a Node) -> Self {
        let bin = node.dirs().base.join("bin");
        fs::create_dir(&bin).expect("a folder");
        for name in ["farmd", "farm"] {
            fs::copy(program(name), bin.join(name)).expect("a program");
        }
        let log = fs::File::create(node.dirs().base.join("farmd.log")).expect("a file");
        let mut command = node.command(&bin.join("farmd")).expect("the node has power");
        command.stderr(log).process_group(0);
        let outer = spawn_kept(command).expect("farmd starts");
        node.wait_farmd(Duration::from_secs(10)).expect("it answers");
        Self {
            node,
            outer,
            asking: None,
        }
    }

    /// Replaces the file, and farmd; returns when that has ended.
    fn reload(&mut self) {
        let bin = self.node.dirs().base.join("bin");
        fs::write(bin.join("hung"), "#!/bin/sh\nexec sleep 60\n").expect("a script");
        let runnable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(bin.join("hung"), runnable).expect("a mode");
        fs::rename(bin.join("hung"), bin.join("farmd")).expect("it takes farmd's place");
        let mut command = self.node.command(&bin.join("farm")).expect("the node has power");
        // Waits for a farmd that never answers.
        command.arg("reload").stdout(Stdio::null()).process_group(0);
        self.asking = Some(spawn_kept(command).expect("farm runs"));
        wait_until(Duration::from_secs(10), "farmd to be away", || {
            self.node.log_text().contains("farmd has ended").then_some(())
        })
        .expect("it restarts");
    }
}

impl Drop for Hanging<'_> {
    fn drop(&mut self) {
        // These wait outside; what they wait for ends with the node's power.
        for child in self.asking.iter_mut().chain([&mut self.outer]) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Requests for both virtual addresses are answered, and not by `hung`.
fn are_answered_by_others(lab: &Lab, hung: &Node) {
    for vip in [VIP, VIP2] {
        let report = lab.client.batch(Batch::new((vip, 80), 80)).expect("a batch");
        assert_eq!(report.lost(), 0, "{vip}: {:?}", report.failures());
        let served = report.per_node();
        assert!(
            served.len() == 2 && !served.contains_key(hung.name()),
            "{vip}: {served:?}"
        );
    }
}

/// What takes the last node's farmd's place never judges anything: what was left in the kernel accepts what its connections send until its lease ends, and
/// nothing from then on. The other nodes, if there are any, have all the while what is new.
fn a_successor_hangs(nodes: usize) {
    let lab = Lab::new(LabConfig {
        plane: "bpf",
        attach: "tcx",
        vips: vec![Vip::new(VIP, Mode::Directed), Vip::new(VIP2, Mode::Invisible)],
        ..farm_of(nodes)
    });
    let lab = lab.expect("a lab can be built");
    let (node, others) = (&lab.nodes[nodes - 1], lab.others(nodes - 1));
    let mut hanging = Hanging::start(node);
    for other in &others {
        other.start_farmd().expect("farmd starts");
        other.wait_farmd(Duration::from_secs(10)).expect("it answers");
    }
    for node in &lab.nodes {
        install(&lab, node, &|_, module| module);
    }
    start(&lab, MODULE);
    let hold = HoldConfig {
        limit: Duration::from_secs(2),
        ..HoldConfig::new(WEB, 20 * nodes)
    };
    let holder = Holder::start(&lab.client, hold).expect("connections can be held");
    holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");

    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    let left = Instant::now();
    hanging.reload();
    let away = Instant::now();
    if !others.is_empty() {
        lab.wait_ready(MODULE, &others, Duration::from_secs(5))
            .expect("the others have all");
        let told = others[0].farm(&["reload"]).expect("farm runs");
        assert_eq!(told.code, Some(i32::from(exit::REFUSED)), "{told:?}");
        mentions(&told.stderr, &["restarts its farmd: wait until it is back"]);
    }
    holder
        .wait_rounds(10, Duration::from_secs(7))
        .expect("connections go on without a farmd");
    if !others.is_empty() {
        are_answered_by_others(&lab, node);
    }
    wait_until(Duration::from_secs(20), "the lease to end", || {
        (away.elapsed() > Duration::from_secs(13)).then_some(())
    })
    .expect("time passes");
    // Nobody has its connections any more.
    for other in &others {
        let log = other.farm_ok(&["log", MODULE]).expect("a log");
        mentions(&log, &["is not back; the connections it had are given up"]);
    }
    if !others.is_empty() {
        are_answered_by_others(&lab, node);
    }
    let report = holder.stop().expect("the holder ends");
    let broken = report.broken_per_node();
    assert_eq!(broken.keys().collect::<Vec<_>>(), [node.name()], "{broken:?}");
    assert_eq!(
        broken.get(node.name()),
        report.per_node().get(node.name()),
        "{:?}",
        report.held
    );
    for held in report.broken() {
        let after = held.broken.as_ref().expect("it is broken").0 - left;
        assert!(after > Duration::from_secs(8), "{after:?}");
    }
    let evidence = watcher.stop().expect("the watcher ends");
    assert_eq!(evidence.missed, 0, "the watcher sees all");
    assert!(evidence.two_owners().is_empty(), "{:?}", evidence.two_owners());
    let after = |times: &[Instant]| times.iter().all(|at| *at > away);
    let new = evidence.syns.iter().filter(|(_, times)| after(times));
    let accepts = new.filter_map(|(attempt, _)| evidence.syn_acks.get(attempt)?.get_key_value(node.port()));
    assert_eq!(accepts.collect::<Vec<_>>(), [], "{} opens connections", node.name());
}

#[test]
fn reload_into_a_program_that_hangs_ends_in_closed_beside_those_that_took_over_and_alone() {
    // Both wait for a lease to end.
    std::thread::scope(|scope| {
        scope.spawn(|| a_successor_hangs(1));
        scope.spawn(|| a_successor_hangs(3));
    });
}
