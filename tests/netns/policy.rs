//! A divided farm: which part serves, what becomes of the connections of the part that does not, and what it says.

use std::collections::BTreeSet;
use std::net::SocketAddrV4;
use std::time::Duration;

use farm_core::api::exit;
use farm_core::api::history::Happening;
use farm_lab::client::Batch;
use farm_lab::config::ROUTER;
use farm_lab::hold::{HoldConfig, Holder};
use farm_lab::http::Failure;
use farm_lab::wire::Watcher;
use farm_lab::{Client, Lab, LabConfig, MODULE, Node, ROUTER_PORT, VIP, add_client, client_port, wait_until};

use crate::common::{counter, flooded_farm, history, mentions, own_row};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
const LIMIT: Duration = Duration::from_secs(20);

/// Waits until `node` has `buckets` of the 4096 by its own word, and returns what it says of itself.
fn wait_share(node: &Node, buckets: u32) -> String {
    let shown = || {
        let row = own_row(node, MODULE);
        let share: u32 = row.shares.iter().map(|share| share.buckets).sum();
        (share, row.why)
    };
    let what = format!("{} to have {buckets} buckets", node.name());
    wait_until(LIMIT, &what, || {
        let (share, why) = shown();
        (share == buckets).then_some(why)
    })
    .unwrap_or_else(|e| panic!("{e}: {:?}", shown()))
}

/// Waits until `node` says why it serves nothing, with all of `words` in it.
fn wait_withheld(node: &Node, words: &[&str]) {
    wait_until(LIMIT, "the reason", || {
        let why = wait_share(node, 0);
        words.iter().all(|word| why.contains(word)).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e} {words:?}: {:?}", own_row(node, MODULE)));
    let status = node.farm(&["status"]).expect("farm runs");
    assert_eq!(status.code, Some(i32::from(exit::DEGRADED)), "{status:?}");
    mentions(&status.stdout, &["does not serve"]);
}

/// Waits until `node` remembers that its part of the farm serves by the policy, or does not.
fn wait_policy(node: &Node, policy: &str, serves: bool) {
    let said = |what: &Happening| matches!(what, Happening::Policy { policy: p, serves: s, .. } if p == policy && *s == serves);
    wait_until(LIMIT, "the policy's entry in the history", || {
        history(node).iter().any(|entry| said(&entry.what)).then_some(())
    })
    .unwrap_or_else(|e| panic!("{e} of {}: {:#?}", node.name(), history(node)));
}

/// The nodes that take new connections, as the wire shows it, and how many of 60 got no answer.
fn answering(lab: &Lab, client: &Client) -> (BTreeSet<String>, usize) {
    let watcher = Watcher::start(lab).expect("the wire can be watched");
    let report = client.batch(Batch {
        limit: Duration::from_millis(1500),
        ..Batch::new(WEB, 60)
    });
    let evidence = watcher.stop().expect("the watcher ends");
    let sources = client.sources(WEB.into());
    let own = evidence
        .syn_acks
        .iter()
        .filter(|(attempt, _)| sources.contains(&attempt.client.ip()));
    let ports = own.flat_map(|(_, ports)| ports.keys().cloned()).collect();
    (ports, report.expect("a batch").lost())
}

fn ports(numbers: &[usize]) -> BTreeSet<String> {
    numbers.iter().map(|number| format!("p{number}")).collect()
}

fn all_serve(lab: &Lab) {
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), LIMIT)
        .expect("all serve");
}

fn hold(client: &Client) -> Holder {
    let holder = Holder::start(client, HoldConfig::new(WEB, 60)).expect("connections can be held");
    holder.wait_rounds(2, LIMIT).expect("they go on");
    holder
}

/// The first node alone on one side with a client of its own: even the coordinator yields to the majority.
#[test]
fn the_smaller_part_takes_nobody_new_and_keeps_its_connections() {
    let lab = flooded_farm(LabConfig {
        partition: "majority",
        ..LabConfig::default()
    });
    let lone = &lab.nodes[0];
    let beside = add_client(&lab, 1, 20).expect("a second client");
    let (whole, lonely) = (hold(&lab.client), hold(&beside));

    let mut cut = Lab::split_by(&[0, 1, 1]);
    cut.push((farm_lab::CLIENT_PORT.to_owned(), "p1".to_owned()));
    cut.extend(["p2", "p3"].map(|port| (client_port(1), port.to_owned())));
    lab.cut_between(&cut).expect("a split");
    wait_withheld(lone, &["partition=\"majority\"", "only 1 of 3 nodes"]);
    lab.wait_ready(MODULE, &lab.others(0), LIMIT)
        .expect("the others have all");
    wait_policy(lone, "majority", false);

    assert_eq!(answering(&lab, &lab.client), (ports(&[2, 3]), 0));
    assert_eq!(answering(&lab, &beside), (ports(&[]), 60));
    let draining: u32 = own_row(lone, MODULE).shares.iter().map(|share| share.draining).sum();
    assert!(draining > 0, "its clients are still there: {:?}", own_row(lone, MODULE));

    lonely.wait_rounds(10, LIMIT).expect("its connections go on");
    none_broken(lonely, &["node1"]);

    lab.cut_between(&[]).expect("mended");
    all_serve(&lab);
    wait_policy(lone, "majority", true);
    assert_eq!(answering(&lab, &beside), (ports(&[1, 2, 3]), 0));
    none_broken(whole, &["node2", "node3"]);
}

/// A switch opens one way after the other: the node that was alone hears one of the others already, and clients of both, and the other one not yet. Those whom it does not
/// hear may have connections all the same.
#[test]
fn a_merge_by_one_way_after_the_other_breaks_nothing() {
    let lab = flooded_farm(LabConfig {
        partition: "majority",
        ..LabConfig::default()
    });
    let lone = &lab.nodes[0];
    // Without clients of its own it would take itself for cut off.
    let beside = add_client(&lab, 1, 20).expect("a second client");
    let (whole, lonely) = (hold(&lab.client), hold(&beside));
    let from_client = (farm_lab::CLIENT_PORT.to_owned(), "p1".to_owned());
    let way = |to: &str| ("p1".to_owned(), to.to_owned());
    let apart = ["p2", "p3"].map(|port| (client_port(1), port.to_owned()));

    for (first, last) in [("p2", "p3"), ("p3", "p2")] {
        let cut = [vec![from_client.clone(), way(first), way(last)], apart.to_vec()];
        lab.cut_between(&cut.concat()).expect("a split");
        wait_withheld(lone, &["partition=\"majority\"", "only 1 of 3 nodes"]);
        lab.wait_ready(MODULE, &lab.others(0), LIMIT)
            .expect("the others have all");
        whole.wait_rounds(5, LIMIT).expect("their connections go on");

        let cut = [vec![way(last)], apart.to_vec()];
        lab.cut_between(&cut.concat()).expect("one way opens, and the clients'");
        whole.wait_rounds(2, LIMIT).expect("they send while it does not");
        lab.cut_between(&[]).expect("mended");
        all_serve(&lab);
    }
    none_broken(whole, &["node2", "node3"]);
    none_broken(lonely, &["node1"]);
}

/// Both parts serve on, each for clients of its own, as with two switches whose link fails. When it is back every node has the frames of all clients before it hears the
/// other part's nodes, whose buckets it has taken over: it must not reset what is theirs.
fn a_merge_of_two_parts_that_serve_breaks_nothing(plane: &'static str) {
    let lab = flooded_farm(LabConfig {
        plane,
        ..LabConfig::default()
    });
    let beside = add_client(&lab, 1, 20).expect("a second client");
    let of_first = [(client_port(1), "p2".to_owned()), (client_port(1), "p3".to_owned())];
    let of_others = [(farm_lab::CLIENT_PORT.to_owned(), "p1".to_owned())];
    let cut = [&of_first[..], &of_others, &Lab::split_by(&[0, 1, 1])].concat();
    for _ in 0..3 {
        lab.cut_between(&cut).expect("a split");
        wait_share(&lab.nodes[0], 4096);
        lab.wait_ready(MODULE, &lab.others(0), LIMIT)
            .expect("the others have all");
        // At each moment some of them speak.
        let busy = |client| {
            let config = HoldConfig {
                pause: Duration::from_millis(5),
                ..HoldConfig::new(WEB, 60)
            };
            let holder = Holder::start(client, config).expect("connections can be held");
            holder.wait_rounds(2, LIMIT).expect("they go on");
            holder
        };
        let (lonely, whole) = (busy(&beside), busy(&lab.client));
        lab.cut_between(&[]).expect("mended");
        all_serve(&lab);
        for holder in [&lonely, &whole] {
            holder.wait_rounds(5, LIMIT).expect("they go on");
        }
        none_broken(lonely, &["node1"]);
        none_broken(whole, &["node2", "node3"]);
    }
    let withdrawn = lab.nodes.iter().map(|node| counter(node, "dataplane_reset_withdrawn"));
    assert!(withdrawn.sum::<u64>() > 0, "{plane}: some were about to be reset");
}

#[test]
fn a_merge_of_two_parts_that_serve_breaks_nothing_in_the_kernel() {
    a_merge_of_two_parts_that_serve_breaks_nothing("bpf");
}

#[test]
fn a_merge_of_two_parts_that_serve_breaks_nothing_in_user_space() {
    a_merge_of_two_parts_that_serve_breaks_nothing("raw");
}

/// Ends `holder`: it has had connections with each of `nodes`, and none of these broke.
fn none_broken(holder: Holder, nodes: &[&str]) {
    let report = holder.stop().expect("the holder ends");
    for node in nodes {
        assert!(report.per_node().contains_key(*node), "{node}: {:?}", report.per_node());
        let broken: Vec<_> = report.broken().into_iter().filter(|held| held.node == *node).collect();
        assert!(broken.is_empty(), "of {:?} these broke: {broken:?}", report.per_node());
    }
}

#[test]
fn of_two_halves_the_one_with_the_first_node_serves() {
    let lab = flooded_farm(LabConfig {
        nodes: 4,
        partition: "majority",
        ..LabConfig::default()
    });
    lab.cut_between(&Lab::split_by(&[0, 1, 1, 0])).expect("a split");
    for node in [&lab.nodes[1], &lab.nodes[2]] {
        wait_withheld(node, &["partition=\"majority\"", "only 2 of 4 nodes"]);
        wait_policy(node, "majority", false);
    }
    let serving = [&lab.nodes[0], &lab.nodes[3]];
    lab.wait_ready(MODULE, &serving, LIMIT).expect("the first half has all");
    assert_eq!(answering(&lab, &lab.client), (ports(&[1, 4]), 0));
    lab.cut_between(&[]).expect("mended");
    all_serve(&lab);
    assert_eq!(answering(&lab, &lab.client), (ports(&[1, 2, 3, 4]), 0));
}

#[test]
fn a_part_serves_while_its_witness_answers() {
    let lab = flooded_farm(LabConfig {
        nodes: 2,
        routed: true,
        partition: "witness",
        witness: Some(ROUTER),
        ..LabConfig::default()
    });
    let [first, second] = &lab.nodes[..] else {
        panic!("two nodes")
    };
    let split = ("p1".to_owned(), "p2".to_owned());
    let unseen_by = |port: &str| (port.to_owned(), ROUTER_PORT.to_owned());
    let why = [
        "partition=\"witness\"",
        "only 1 of 2 nodes",
        "the witness does not answer",
    ];

    lab.cut_between(&[split.clone(), unseen_by("p2")]).expect("a split");
    wait_withheld(second, &why);
    wait_share(first, 4096);
    assert_eq!(answering(&lab, &lab.client), (ports(&[1]), 0));
    wait_policy(second, "witness", false);

    lab.cut_between(&[split.clone(), unseen_by("p1"), unseen_by("p2")])
        .expect("the witness is gone for both");
    wait_withheld(first, &why);
    wait_withheld(second, &why);
    assert_eq!(answering(&lab, &lab.client), (ports(&[]), 60));

    // A witness that both reach keeps neither from serving.
    lab.cut_between(&[split]).expect("the witness is back for both");
    for node in [first, second] {
        assert_eq!(wait_share(node, 4096), "", "{} alone", node.name());
    }
    assert_eq!(answering(&lab, &lab.client).0, ports(&[1, 2]));

    lab.cut_between(&[]).expect("mended");
    all_serve(&lab);
    assert_eq!(answering(&lab, &lab.client), (ports(&[1, 2]), 0));
    let log = second.farm_ok(&["log", MODULE, "-n", "200"]).expect("a log");
    mentions(&log, &["The witness does not answer"]);
}

/// Nobody is asked for a failure that this part does not have: all 60 tries end by their time, none by a refusal.
#[test]
fn a_part_that_does_not_serve_is_silent() {
    let lab = flooded_farm(LabConfig {
        nodes: 2,
        partition: "majority",
        ..LabConfig::default()
    });
    lab.nodes[0].power_off().expect("power goes");
    wait_withheld(&lab.nodes[1], &["only 1 of 2 nodes"]);
    let report = lab.client.batch(Batch {
        limit: Duration::from_millis(500),
        ..Batch::new(WEB, 20)
    });
    let failures = report.expect("a batch").failures();
    assert_eq!(failures.get(&Failure::ConnectTimeout), Some(&20), "{failures:?}");
    lab.rejoin(0, MODULE).expect("the node comes back");
}
