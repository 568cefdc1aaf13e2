//! farmd is restarted in place, on every node, while clients are connected and connect: nobody notices.

use std::net::SocketAddrV4;
use std::time::Duration;

use farm_core::api::exit;
use farm_lab::hold::{HoldConfig, Holder};
use farm_lab::{Lab, LabConfig, MODULE, Mode, Node, VIP, wait_until};

use crate::common::{counter, mentions, own_row, patient_clients};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

fn incarnation(node: &Node) -> u64 {
    node.status().expect("the node answers").cluster.incarnation
}

fn nobody_notices(mode: Mode) {
    let lab = Lab::serve(LabConfig::with_mode(mode)).expect("the farm comes up");
    let holder = Holder::start(&lab.client, HoldConfig::new(WEB, 60)).expect("connections can be held");
    holder.wait_rounds(2, Duration::from_secs(30)).expect("they go on");
    let watcher = farm_lab::wire::Watcher::start(&lab).expect("the wire can be watched");
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
