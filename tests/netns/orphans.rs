//! The clients of a dead node are reset by the one that takes its bucket over, also where a live node has connections in the same bucket.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::time::Duration;

use farm_lab::hold::{HoldConfig, Holder};
use farm_lab::http::Failure;
use farm_lab::{LabConfig, MODULE, Mode, VIP, wait_until};

use crate::common::{configured, counter, farm_of};

const WEB: SocketAddrV4 = SocketAddrV4::new(VIP, 80);
const LONG: Duration = Duration::from_secs(20);
const ADDRS: usize = 60;

/// Each client address has a connection to the first node from when that was alone, and one more since there are three.
fn the_dead_nodes_clients_are_reset(mode: Mode, plane: &'static str) {
    let lab = configured(
        LabConfig {
            plane,
            client_addrs: ADDRS,
            vips: LabConfig::with_mode(mode).vips,
            ..farm_of(3)
        },
        |_, module| module,
    );
    let [first, second, third] = [0, 1, 2].map(|i| &lab.nodes[i]);
    first.farm_ok(&["start", MODULE]).expect("the first node starts");
    lab.wait_ready(MODULE, &[first], LONG).expect("it serves");
    let old = Holder::start(&lab.client, HoldConfig::new(WEB, ADDRS)).expect("connections to the first node");
    for node in [second, third] {
        node.farm_ok(&["start", MODULE]).expect("it starts");
    }
    lab.wait_ready(MODULE, &[first, second, third], LONG)
        .expect("all serve");
    let patient = HoldConfig {
        limit: LONG,
        ..HoldConfig::new(WEB, ADDRS)
    };
    let new = Holder::start(&lab.client, patient).expect("connections to all");
    new.wait_rounds(2, LONG).expect("they go on");
    third.crash().expect("it has power");
    wait_until(LONG, "the heir to reset one", || {
        (counter(second, "dataplane_orphan_reset") > 0).then_some(())
    })
    .unwrap_or_else(|e| panic!("{mode:?}, {plane}: {e}\n{}", second.log_tail(40)));
    // A segment that is lost to the detection is repeated, a few times if it has to be.
    old.wait_rounds(80, LONG).expect("those of the first node go on");
    let (old, new) = (old.stop().expect("a report"), new.stop().expect("a report"));
    assert!(old.broken().is_empty(), "{mode:?}, {plane}: {:?}", old.broken());
    assert_eq!(old.per_node(), BTreeMap::from([(first.name().to_owned(), ADDRS)]));
    let of_dead: Vec<_> = new.held.iter().filter(|held| held.node == third.name()).collect();
    assert!(of_dead.len() > 5, "{:?}", new.per_node());
    for held in &new.held {
        let failure = held.broken.as_ref().map(|(_, failure)| failure);
        let expected = (held.node == third.name()).then_some(&Failure::Reset);
        assert_eq!(
            failure,
            expected,
            "{mode:?}, {plane}: {held:?}\n{}",
            second.log_tail(40)
        );
    }
}

#[test]
fn clients_of_a_dead_node_are_reset_where_another_has_connections_in_the_bucket() {
    the_dead_nodes_clients_are_reset(Mode::Directed, "bpf");
    the_dead_nodes_clients_are_reset(Mode::Invisible, "bpf");
}

#[test]
fn clients_of_a_dead_node_are_reset_in_user_space_too() {
    the_dead_nodes_clients_are_reset(Mode::Directed, "raw");
}
