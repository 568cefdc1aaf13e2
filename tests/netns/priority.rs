//! The thread that sends the heartbeats: without permission for real-time priority, and when it is not run in time.

use std::net::SocketAddrV4;
use std::time::Duration;

use farm_lab::client::Batch;
use farm_lab::{LabConfig, MODULE, VIP, wait_until};

use crate::common::{configured, counter, farm_of, mentions, start};

const LIMIT: Duration = Duration::from_secs(10);
const WARNING: &str = "no real-time priority for heartbeats";
/// Neither the capability nor a limit allows it.
const WITHOUT_PRIORITY: [&str; 5] = [
    "setpriv",
    "--bounding-set=-sys_nice",
    "--inh-caps=-sys_nice",
    "prlimit",
    "--rtprio=0",
];

#[test]
fn without_permission_for_real_time_priority_farmd_says_so_once_with_what_to_do_and_serves() {
    let lab = configured(farm_of(2), |_, module| module);
    let [bare, other] = &lab.nodes[..] else {
        panic!("two nodes")
    };
    assert!(!bare.log_text().contains(WARNING), "{}", bare.log_text());
    assert_eq!(bare.stop_farmd().expect("farmd ends"), Some(0));
    bare.start_farmd_under(&WITHOUT_PRIORITY).expect("farmd starts");
    bare.wait_farmd(LIMIT).expect("farmd answers");
    start(&lab, MODULE);

    let batch = Batch::new(SocketAddrV4::new(VIP, 80), 400);
    let report = lab.client.batch(batch).expect("a batch");
    assert_eq!(report.lost(), 0, "{:?}", report.failures());
    let answered: Vec<String> = report.per_node().into_keys().collect();
    assert_eq!(answered, [bare.name(), other.name()]);

    let log = bare.log_text();
    assert_eq!(log.matches(WARNING).count(), 1, "{log}");
    mentions(&log, &["Operation not permitted"]);
    mentions(&log, &["grant CAP_SYS_NICE or LimitRTPRIO=20"]);
    for (node, allowed) in [(bare, false), (other, true)] {
        let status = node.status().expect("the node answers");
        let warned = status.warnings.iter().any(|warning| warning.contains(WARNING));
        assert_eq!(
            (status.cluster.heartbeat.realtime, warned),
            (allowed, !allowed),
            "{}: {:?}",
            node.name(),
            status.warnings
        );
    }
    let told = bare.farm_ok(&["status", "-v"]).expect("a status for people");
    mentions(&told, &["real-time priority: no"]);
    mentions(&told, &[WARNING]);
}

#[test]
fn a_heartbeat_that_goes_late_is_counted_and_logged_once_a_minute_with_the_cause() {
    // With such a pulse there is time between one that goes late and a node that did not run, also on a machine that is busy.
    let lab = configured(
        LabConfig {
            lans: "pulse=\"1s\"".to_owned(),
            ..farm_of(2)
        },
        |_, module| module,
    );
    let node = &lab.nodes[0];
    let logged = || node.log_text().matches(" ms late: ").count();
    for round in 1..=2 {
        let before = counter(node, "heartbeats_late");
        node.signal_farmd("STOP").expect("a signal");
        std::thread::sleep(Duration::from_millis(2500));
        node.signal_farmd("CONT").expect("a signal");
        wait_until(LIMIT, "the late heartbeat to be counted", || {
            (counter(node, "heartbeats_late") > before).then_some(())
        })
        .unwrap_or_else(|e| panic!("{e} in round {round}: {}", node.log_tail(20)));
        assert_eq!(counter(node, "pauses"), 0, "{}", node.log_tail(20));
        wait_until(LIMIT, "it to be in the log", || (logged() > 0).then_some(()))
            .unwrap_or_else(|e| panic!("{e}: {}", node.log_tail(20)));
    }
    let most = counter(node, "heartbeats_late_most_us");
    assert!(most > 1_000_000, "{most} microseconds");
    assert!(counter(node, "turn_longest_us") > 0);
    // No module is started, which its exit code says.
    let told = node.farm(&["status", "-v"]).expect("a status for people").stdout;
    mentions(&told, &[" late, by "]);
    let log = node.log_text();
    assert_eq!(logged(), 1, "{log}");
    mentions(&log, &["its thread was not run for"]);
}
