//! The clients of a dead node are reset by the one that takes its bucket over, also where a live node has connections in the same bucket.

use std::collections::BTreeMap;
use std::net::SocketAddrV4;
use std::time::Duration;

use farm_lab::hold::{HoldConfig, Holder};
use farm_lab::http::{Connection, Failure};
use farm_lab::{LabConfig, MODULE, Mode, VIP, wait_until};
use tokio::runtime;

use crate::common::{configured, counter, farm_of, on_all, shell_ok};

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

/// A client whose connection the first node has ended, and which comes again with the same address and port, to the second one.
#[test]
fn who_has_come_to_the_heir_before_is_reset_too() {
    const PORT: u16 = 7000;
    let lab = configured(
        LabConfig {
            client_addrs: 12,
            ..farm_of(2)
        },
        |_, module| module,
    );
    let [first, second] = [0, 1].map(|i| &lab.nodes[i]);
    on_all(&lab, &["start", MODULE]);
    lab.wait_ready(MODULE, &[first, second], LONG).expect("both serve");
    let addrs = lab.client.addrs().to_vec();
    let open = async |addr| {
        Connection::open_from((addr, PORT), WEB, LONG)
            .await
            .expect("a connection")
    };
    lab.client.space().run(|| {
        let runtime = runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let mut known = Vec::new();
            for addr in addrs {
                let node = open(addr).await.get_last("/", LONG).await.expect("an answer");
                known.extend(node.contains(first.name()).then_some(addr));
            }
            assert!(!known.is_empty(), "some are the first node's");
            first.farm_ok(&["drain"]).expect("it gives all away");
            let mut connections = Vec::new();
            for addr in &known {
                let mut connection = open(*addr).await;
                let node = connection.get("/", LONG).await.expect("an answer");
                assert!(node.contains(second.name()), "{addr}: {node}");
                connections.push(connection);
            }
            first.farm_ok(&["undrain"]).expect("it serves again");
            lab.wait_ready(MODULE, &[first, second], LONG).expect("both serve");
            let remembered = shell_ok(first, "ss -H -t -a -n state time-wait sport = :80");
            assert!(remembered.lines().count() >= known.len(), "{remembered}");
            second.crash().expect("it has power");
            for (mut connection, addr) in connections.into_iter().zip(known) {
                let failure = connection.get("/", LONG).await.expect_err("its server is dead");
                assert_eq!(failure, Failure::Reset, "{addr}: {}", first.log_tail(20));
            }
        });
    });
}
