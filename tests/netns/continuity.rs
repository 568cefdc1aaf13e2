//! Established connections through changes of the farm: only those of a node that died may end.

use std::collections::BTreeSet;
use std::net::{SocketAddr, SocketAddrV4};
use std::time::Duration;

use farm_lab::hold::{HoldConfig, Holder};
use farm_lab::wire::Watcher;
use farm_lab::{Lab, LabConfig, MODULE, Mode, VIP};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);

const CONNECTIONS: usize = 200;

fn hold(lab: &Lab) -> Holder {
    let holder = Holder::start(&lab.client, HoldConfig::new(WEB, CONNECTIONS)).expect("connections can be held");
    holder.wait_rounds(3, Duration::from_secs(10)).expect("they go on");
    holder
}

fn power_cut(mode: Mode) {
    let lab = Lab::serve(LabConfig::with_mode(mode)).expect("the farm comes up");
    let holder = hold(&lab);
    let watcher = Watcher::start(&lab).expect("the wire can be watched");
    let victim = &lab.nodes[1];
    victim.power_off().expect("power goes");
    lab.wait_ready(MODULE, &lab.others(1), Duration::from_secs(10))
        .expect("the others have all");
    std::thread::sleep(Duration::from_secs(2));
    lab.rejoin(1, MODULE).expect("the node comes back");
    std::thread::sleep(Duration::from_secs(2));
    let evidence = watcher.stop().expect("the watcher ends");
    let report = holder.stop().expect("the holder ends");

    let (all, broken) = (report.per_node(), report.broken_per_node());
    assert_eq!(all.len(), 3, "connections on every node: {all:?}");
    assert_eq!(
        broken.get(victim.name()),
        all.get(victim.name()),
        "a dead node's connections end: {broken:?}"
    );
    assert_eq!(broken.len(), 1, "{mode:?}: of {all:?} these broke: {broken:?}");
    // The new owner may reset what was the dead node's, so that its clients know at once, and nothing else.
    let lost: BTreeSet<SocketAddr> = report.broken().iter().filter_map(|held| held.client).collect();
    let strangers: Vec<_> = evidence
        .resets
        .iter()
        .filter(|reset| !lost.contains(&reset.client))
        .collect();
    assert!(
        strangers.is_empty(),
        "{mode:?}: resets to clients of live nodes: {strangers:?}"
    );
    assert_eq!((evidence.missed, evidence.two_owners().len()), (0, 0));
}

#[test]
fn connections_of_live_nodes_survive_a_power_cut_and_the_return_in_directed_mode() {
    power_cut(Mode::Directed);
}

#[test]
fn connections_of_live_nodes_survive_a_power_cut_and_the_return_in_invisible_mode() {
    power_cut(Mode::Invisible);
}

#[test]
fn connections_of_the_others_survive_a_stop_and_a_start() {
    let lab = Lab::serve(LabConfig::default()).expect("the farm comes up");
    let holder = hold(&lab);
    lab.nodes[2].farm_ok(&["stop", MODULE]).expect("the module stops");
    lab.wait_ready(MODULE, &lab.others(2), Duration::from_secs(10))
        .expect("the others have all");
    std::thread::sleep(Duration::from_secs(1));
    lab.nodes[2].farm_ok(&["start", MODULE]).expect("the module starts");
    lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
        .expect("all serve");
    std::thread::sleep(Duration::from_secs(1));
    let report = holder.stop().expect("the holder ends");
    let mut broken = report.broken_per_node();
    broken.remove("node3");
    assert!(broken.is_empty(), "of {:?} these broke: {broken:?}", report.per_node());
}
