//! Established connections through changes of the farm: only those of a node that died may end.

use std::collections::BTreeSet;
use std::net::{SocketAddr, SocketAddrV4};
use std::time::Duration;

use farm_lab::hold::{Held, HoldConfig, HoldReport, Holder};
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

/// What a node has half open when its answers stop getting out, its heir opens too. When it is back it still has its halves, and would say so to the clients
/// again after one second and three.
fn half_open_where_nothing_gets_out(config: LabConfig) {
    let lab = Lab::serve(LabConfig {
        client_addrs: 60,
        ..config
    })
    .expect("the farm comes up");
    let cut_off = &lab.nodes[1];
    let has_lost = || {
        cut_off
            .log_text()
            .contains("handshakes are forgotten in buckets that this node has lost")
    };
    let mut holders = Vec::new();
    // Where the clients begin after the node has stepped out it has nothing half open.
    for _ in 0..8 {
        cut_off.cut(true).expect("nothing gets out");
        // Each opens one connection after the other, and waits at the first one that the node has half open.
        holders.extend(std::thread::scope(|scope| {
            let start = || Holder::start(&lab.client, HoldConfig::new(WEB, 12)).expect("connections can be held");
            let starts: Vec<_> = (0..12).map(|_| scope.spawn(start)).collect();
            starts
                .into_iter()
                .map(|start| start.join().expect("it starts"))
                .collect::<Vec<_>>()
        }));
        cut_off.heal().expect("it gets out again");
        lab.wait_ready(MODULE, &lab.nodes.iter().collect::<Vec<_>>(), Duration::from_secs(20))
            .expect("all serve");
        if has_lost() {
            break;
        }
        // What the node has now would end with the next cut.
        holders.drain(..).for_each(|holder| drop(holder.stop()));
    }
    assert!(has_lost(), "it never had any half open");
    std::thread::sleep(Duration::from_secs(4));
    let reports = holders
        .into_iter()
        .map(|holder| holder.stop().expect("the holder ends"));
    let broken = |report: HoldReport| report.broken().into_iter().cloned().collect::<Vec<Held>>();
    let broken: Vec<Held> = reports.flat_map(broken).collect();
    assert!(broken.is_empty(), "{} broke: {broken:?}", broken.len());
}

#[test]
fn connections_that_an_heir_opened_outlast_the_return_of_who_had_them_half_open_in_directed_mode() {
    half_open_where_nothing_gets_out(LabConfig::with_mode(Mode::Directed));
}

#[test]
fn connections_that_an_heir_opened_outlast_the_return_of_who_had_them_half_open_in_invisible_mode() {
    half_open_where_nothing_gets_out(LabConfig::with_mode(Mode::Invisible));
}

#[test]
fn connections_that_an_heir_opened_outlast_the_return_of_who_had_them_half_open_in_user_space() {
    half_open_where_nothing_gets_out(LabConfig {
        plane: "raw",
        ..LabConfig::with_mode(Mode::Invisible)
    });
}
