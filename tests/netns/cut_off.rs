//! Nodes to which nothing comes in: a dead receiver, a port of the switch that lets nothing out. Their own heartbeats go on.

use std::time::{Duration, Instant};

use farm_lab::client::Batch;
use farm_lab::probe::{ProbeConfig, Prober};
use farm_lab::{Lab, LabConfig, MODULE, Node, VIP, wait_until};

use crate::common::{counter, metrics};

/// The reason that such a node gives.
const WHY: &str = "nothing at all comes in";

/// farmd counts clients' frames once a second, and misses them where there were [`LIVELY`] in one of these seconds. Any such time has a whole one in it.
const COUNTED: Duration = Duration::from_millis(2250);
const LIVELY: u64 = 50;

/// A farm of two, and clients that ask all the time and would be missed by both nodes.
fn busy() -> (Lab, Prober) {
    let lab = quiet();
    let prober = Prober::start(&lab.client, ProbeConfig::new((VIP, 80))).expect("probing");
    let count = |node| -> u64 {
        let counters = metrics(node).into_iter();
        counters
            .filter(|(name, _)| name.starts_with("frames_"))
            .map(|(_, count)| count)
            .sum()
    };
    let counts = || lab.nodes.iter().map(count).collect::<Vec<u64>>();
    let (mut since, mut last, mut at) = (Instant::now(), counts(), Instant::now());
    // In each quarter of a second as many as are missed in a whole one.
    wait_until(Duration::from_secs(20), "clients that would be missed", || {
        if at.elapsed() < Duration::from_millis(250) {
            return None;
        }
        let before = std::mem::replace(&mut last, counts());
        at = Instant::now();
        if before
            .iter()
            .zip(&last)
            .any(|(before, now)| now.saturating_sub(*before) < LIVELY)
        {
            since = at;
        }
        (since.elapsed() >= COUNTED).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e}: {last:?}"));
    (lab, prober)
}

fn quiet() -> Lab {
    let lab = Lab::serve(LabConfig {
        nodes: 2,
        ..LabConfig::default()
    });
    lab.expect("the farm comes up")
}

/// The node has nothing open and says why.
fn is_out(node: &Node) -> Option<()> {
    let status = node.status().ok()?;
    let shares = status.modules.iter().flat_map(|m| &m.nodes);
    let mut shares = shares.filter(|n| n.node == node.name()).flat_map(|n| &n.shares);
    (shares.all(|share| share.buckets == 0) && format!("{status:?}").contains(WHY)).then_some(())
}

/// The other one is not heard by it, which would put it out if the cut-off one did not say that it serves nobody.
#[test]
fn of_two_nodes_the_one_that_still_receives_serves_all() {
    let (lab, prober) = busy();
    let (cut_off, others) = (&lab.nodes[0], lab.others(0));
    cut_off.cut(false).expect("nothing comes in");
    lab.wait_ready(MODULE, &others, Duration::from_secs(5))
        .expect("the other one has all");
    wait_until(Duration::from_secs(1), "the cut-off node to be out", || is_out(cut_off)).expect("it says so");
    let asked = lab.client.batch(Batch::new((VIP, 80), 100));
    let asked = asked.expect("requests are sent");
    assert_eq!((asked.answered(), asked.lost()), (100, 0), "{:?}", asked.failures());
    assert_eq!(
        asked.per_node().keys().collect::<Vec<_>>(),
        [lab.nodes[1].name()],
        "only the other one answers"
    );
    cut_off.heal().expect("it comes in again");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(5))
        .expect("both serve");
    prober.stop().expect("the prober ends");
}

#[test]
fn a_silent_switch_puts_all_out_and_brings_all_back() {
    let (lab, prober) = busy();
    for node in &lab.nodes {
        node.cut(false).expect("nothing comes in");
    }
    for node in &lab.nodes {
        wait_until(Duration::from_secs(5), "all to be out", || is_out(node)).expect("it says so");
    }
    for node in &lab.nodes {
        node.heal().expect("it comes in again");
    }
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(5))
        .expect("both serve");
    prober.stop().expect("the prober ends");
}

/// The clients fall silent in the moment in which the other node dies; those that are known are asked, and their answers show that things come in.
#[test]
fn who_survives_while_clients_pause_serves_at_once() {
    let (lab, prober) = busy();
    prober.stop().expect("the prober ends");
    lab.nodes[1].crash().expect("power goes");
    lab.wait_ready(MODULE, &lab.others(1), Duration::from_secs(5))
        .expect("the other one has all");
    let log = lab.nodes[0].log_text();
    assert!(!log.contains(WHY), "{log}");
    assert!(counter(&lab.nodes[0], "dataplane_arp_asked") > 0, "no client was asked");
}

#[test]
fn where_nobody_but_the_nodes_speaks_silence_means_nothing() {
    let lab = quiet();
    // The time itself: there is nothing to be seen in it.
    std::thread::sleep(COUNTED);
    lab.nodes[1].crash().expect("power goes");
    lab.wait_ready(MODULE, &lab.others(1), Duration::from_secs(5))
        .expect("the other one has all");
    let log = lab.nodes[0].log_text();
    assert!(!log.contains(WHY), "{log}");
    assert_eq!(counter(&lab.nodes[0], "dataplane_arp_asked"), 0);
}
