//! One command that restarts the module on all nodes, one at a time.

use std::collections::BTreeSet;
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use farm_core::api::{ModuleState, NodeModuleStatus, Quality, exit};
use farm_lab::client::Batch;
use farm_lab::probe::{ProbeConfig, Prober};
use farm_lab::process::Finished;
use farm_lab::{Lab, MODULE, Node, VIP};

use crate::common::{changed, configured, farm_of, mentions, module_of, own_row, start};
use crate::drain::{farm, wait_buckets};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

/// Restarts the module on all nodes in turn, asked of the second one. Returns what that said, and who was out whenever the first node was asked, before
/// and after it too: not ready, or without a share. Never were two.
fn roll(lab: &Lab) -> (Finished, Vec<(Instant, BTreeSet<String>)>) {
    let out = |row: &NodeModuleStatus| {
        let ready = (row.state, row.quality) == (Some(ModuleState::Up), Some(Quality::Ready));
        !ready || row.shares.iter().all(|share| share.buckets == 0)
    };
    let look = || {
        let rows = module_of(&lab.nodes[0], MODULE).nodes;
        let names: BTreeSet<String> = rows.into_iter().filter(out).map(|row| row.node).collect();
        (Instant::now(), names)
    };
    let mut looks = vec![look()];
    let restarted = std::thread::scope(|scope| {
        let roll = scope.spawn(|| farm(&lab.nodes[1], &["rolling-restart", MODULE, "--timeout", "30s"]));
        while !roll.is_finished() {
            looks.push(look());
            std::thread::sleep(Duration::from_millis(20));
        }
        roll.join().expect("it ends")
    });
    assert!(restarted.ok(), "{restarted:?}");
    mentions(&restarted.stdout, &["restarted: node1, node3, node2"]);
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
    looks.push(look());
    let most = looks.iter().map(|(_, out)| out.len()).max();
    assert_eq!(most, Some(1), "at a time: {}", restarted.stdout);
    (restarted, looks)
}

#[test]
fn rolling_restart_loses_no_request_and_takes_one_node_out_at_a_time() {
    let lab = Lab::serve(farm_of(3)).expect("the farm comes up");
    let pid = |node: &Node| std::fs::read_to_string(node.nginx_dir().join("nginx.pid")).expect("nginx runs");
    let before: Vec<String> = lab.nodes.iter().map(pid).collect();
    // A try that waits for a node that is out would take until its own retransmission; one that is lost is never answered.
    let prober = Prober::start(
        &lab.client,
        ProbeConfig {
            sources: 40,
            rate: 200,
            limit: Duration::from_secs(20),
            ..ProbeConfig::new(WEB)
        },
    )
    .expect("requests can be made");
    let (restarted, _) = roll(&lab);
    let report = prober.stop().expect("the prober ends").report;
    for (node, before) in lab.nodes.iter().zip(before) {
        assert_ne!(pid(node), before, "{} has a new nginx", node.name());
        assert_eq!(own_row(node, MODULE).why, "");
    }
    assert_eq!(report.lost(), 0, "of {}: {:?}", report.records.len(), report.failures());
    eprintln!(
        "rolling restart: {} requests, none lost, p99 {:?}, longest {:?}, took {:?}",
        report.records.len(),
        report.latency(0.99),
        report.latency(1.0),
        restarted.took
    );
}

#[test]
fn rolling_restart_waits_for_a_node_that_takes_long_to_be_ready() {
    const START: Duration = Duration::from_secs(2);
    let lab = configured(farm_of(3), |_, module| {
        let script = module.scripts.iter().find(|(name, _)| name == "start_both");
        let slow = changed(&script.expect("a script").1, "exec nginx", "sleep 2\nexec nginx");
        module.with_script("start_both", &slow)
    });
    start(&lab, MODULE);
    let (_, looks) = roll(&lab);
    for node in &lab.nodes {
        let is_out = |(_, out): &(Instant, BTreeSet<String>)| out.contains(node.name());
        let first = looks.iter().position(is_out).expect("it was out");
        let last = looks.iter().rposition(is_out).expect("it was out");
        assert!(looks[first..=last].iter().all(is_out), "{} was out twice", node.name());
        let time = looks[last + 1].0 - looks[first - 1].0;
        assert!(time >= START, "{} was out for {time:?} at most", node.name());
    }
}

#[test]
fn rolling_restart_stops_at_the_first_failure_and_leaves_the_rest_serving() {
    let lab = Lab::serve(farm_of(3)).expect("the farm comes up");
    // node1 restarts; node3's application does not come up again.
    let active = lab.nodes[2]
        .dirs()
        .var
        .join("modules")
        .join(MODULE)
        .join("active/bin/start_both");
    std::fs::write(&active, "#!/bin/sh\nexit 7\n").expect("a script can be written");
    let ended = farm(&lab.nodes[1], &["rolling-restart", "--timeout", "30s"]);
    assert_eq!(ended.code, Some(i32::from(exit::FAILED)), "{ended:?}");
    mentions(&ended.stderr, &["stopped at node3"]);
    mentions(&ended.stderr, &["start_both"]);
    mentions(&ended.stderr, &["restarted: node1; not touched: node2"]);
    let batch = lab.client.batch(Batch::new(WEB, 200)).expect("connections can be made");
    assert_eq!(batch.lost(), 0, "{:?}", batch.failures());
    assert_eq!(batch.per_node().keys().collect::<Vec<_>>(), ["node1", "node2"]);
    // It does not begin anew while a node is missing for it to be safe.
    wait_buckets(&lab.nodes[0], &[("node1", 2048), ("node2", 2048), ("node3", 0)]);
}
