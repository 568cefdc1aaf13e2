//! Spaces in which every promise is kept in every state.

use std::time::Duration;

use crate::checker::{Asked, Farms, asked};

/// Walks the spaces of `default`, and with `FARM_MODEL=deep` those of `deep` too.
fn all_hold(default: &[&str], deep: &[&str]) {
    let deep = match asked() {
        Asked::Default => &[],
        Asked::Deep => deep,
        Asked::One(_) => return,
    };
    for spec in default.iter().chain(deep) {
        Farms::parse(spec).expect("the test's own words").holds();
    }
}

#[test]
fn what_is_asked_for_holds() {
    if let Asked::One(spec) = asked() {
        Farms::parse(&spec).expect("FARM_MODEL is `deep` or such words").holds();
    }
}

#[test]
fn datagrams_come_in_any_order_twice_late_or_not_at_all() {
    all_hold(
        &[
            "nodes=2 faults=3 any_order=1 late=1 lose=1 twice=1",
            "nodes=2 faults=3 lose=3",
        ],
        &[
            "nodes=3 faults=2 late=1 lose=2 twice=1",
            "nodes=2 faults=4 any_order=1 late=2 lose=2 twice=2",
        ],
    );
}

#[test]
fn datagrams_between_three_overtake_come_late_twice_or_not_at_all() {
    all_hold(
        &[
            "nodes=3 late=1 lose=1 twice=1 pick=1",
            // At rest every heartbeat says the same; these meet a hand-over.
            "nodes=3 stop=1 pick=2",
            "nodes=3 faults=2 stop=1 lose=1 late=1 twice=1",
        ],
        &[
            "nodes=3 crash=1 restart=1 pick=1",
            "nodes=3 stop=1 start=1 pick=3",
            "nodes=3 faults=2 stop=1 late=1 pick=1",
            "nodes=3 faults=2 stop=1 twice=1 pick=1",
        ],
    );
}

#[test]
fn a_crash_is_covered_within_the_detection_time_and_two_round_trips() {
    for nodes in 2..=4 {
        let mut farms = Farms::parse("crash=1 lost=5").unwrap();
        farms.nodes = nodes;
        // Two round trips of the model's network, and a data plane that closes and one that opens; four nodes begin up to two round trips
        // apart, because they detect one after the other.
        farms.recovery = Some(Duration::from_millis(250 + 10));
        farms.holds();
    }
}

#[test]
fn a_node_crashes_and_starts_again() {
    all_hold(
        &[
            // Of two with a lost datagram: walked where faults of different kinds meet.
            "nodes=3 crash=1 restart=1",
            "nodes=4 crash=1 restart=1",
        ],
        &[
            "nodes=2 faults=2 crash=2 restart=2",
            "nodes=3 faults=2 crash=1 restart=1 lose=1",
            "nodes=3 faults=2 crash=1 restart=1 slow=1",
            "nodes=3 faults=2 crash=1 restart=1 late=1",
        ],
    );
}

#[test]
fn a_node_ends_in_order_and_starts_again() {
    all_hold(
        // With the start: walked by the rule on the goodbye.
        &["nodes=3 leave=1"],
        &["nodes=3 leave=1 restart=1", "nodes=2 faults=2 leave=1 restart=1 lose=1"],
    );
}

#[test]
fn a_node_with_another_configuration_serves_when_no_other_does() {
    all_hold(
        &["nodes=2 other=1 stop=1 start=1", "nodes=2 other=1 crash=1 restart=1"],
        &[
            "nodes=3 other=1 crash=1 restart=1",
            "nodes=3 other=1 faults=2 stop=2 start=1",
        ],
    );
}

#[test]
fn a_node_is_not_run_for_a_while() {
    all_hold(
        // Of two with another fault: walked where faults of different kinds meet.
        &["nodes=3 pause=1"],
        &[
            "nodes=2 faults=2 pause=1 lose=1 lost=5",
            "nodes=2 faults=2 pause=2",
            "nodes=4 pause=1",
        ],
    );
}

#[test]
fn one_direction_of_a_link_is_cut() {
    all_hold(
        // Of two: walked where faults of different kinds meet.
        &["nodes=3 cut=1 mend=1", "nodes=4 cut=1 mend=1"],
        &["nodes=2 faults=2 cut=2 mend=2"],
    );
}

#[test]
fn two_nodes_lose_each_other() {
    all_hold(
        &[
            "nodes=2 split=1 mend=1",
            "nodes=3 split=1 mend=1",
            "nodes=4 split=1 mend=1",
            "nodes=4 faults=2 split=2",
        ],
        &[],
    );
}

#[test]
fn heartbeats_do_not_come_in_at_one_node() {
    all_hold(
        // With three, and without an end: walked by the rules on what is told, and on what comes in.
        &["nodes=2 dead=1 mend=1", "nodes=2 deaf=1 mend=1"],
        &["nodes=3 dead=1 mend=1", "nodes=3 deaf=1 mend=1"],
    );
}

#[test]
fn farmd_is_restarted_in_place() {
    all_hold(
        &["nodes=2 faults=2 reload=1 lose=1 flows=1"],
        &[
            "nodes=3 reload=1 flows=1",
            "nodes=2 faults=2 reload=1 lose=1",
            "nodes=3 faults=2 reload=1 flows=1 lose=1",
        ],
    );
}

#[test]
fn several_lans_are_one_network() {
    all_hold(
        &[
            "nodes=2 lans=2 lan=1 mend=1",
            "nodes=2 lans=2 faults=2 lan=1 crash=1 restart=1",
        ],
        &[
            "nodes=3 lans=2 lan=1 mend=1",
            "nodes=2 lans=2 faults=2 lan=1 mend=1 cut=1",
            "nodes=2 lans=2 faults=2 lose=2",
        ],
    );
}

#[test]
fn shares_follow_the_weights() {
    all_hold(
        &["nodes=2 weight=3 crash=1 restart=1", "nodes=3 weight=2 stop=1 start=1"],
        &["nodes=3 weight=2 faults=2 crash=1 restart=1 lose=1"],
    );
}

#[test]
fn of_a_divided_farm_the_majority_serves() {
    all_hold(
        &[
            "nodes=2 majority=1 split=1 mend=1",
            "nodes=3 majority=1 faults=2 split=2",
            "nodes=3 majority=1 crash=1 restart=1",
        ],
        &[
            "nodes=3 majority=1 faults=2 split=2 mend=1",
            "nodes=2 majority=1 cut=1 mend=1",
        ],
    );
}

#[test]
fn of_a_divided_farm_those_serve_that_the_witness_answers() {
    all_hold(
        // With a split: walked by the rule on the witness.
        &[
            "nodes=2 witness=1 faults=2 hide=1 crash=1",
            "nodes=3 witness=1 faults=2 hide=1 crash=1",
        ],
        &["nodes=2 witness=1 faults=3 hide=2 split=1 show=2"],
    );
}

#[test]
fn where_nobody_talks_with_all_a_third_passes_on_what_is_said() {
    all_hold(
        &[
            "nodes=4 apart=2 crash=1 restart=1",
            "nodes=4 apart=2 stop=1 start=1",
            "nodes=4 apart=2 pause=1",
            "nodes=4 apart=2 faults=2 crash=1 lose=1",
            "nodes=4 apart=2 faults=2 stop=1 lose=1",
            "nodes=4 apart=2 faults=2 stop=1 late=1",
        ],
        &[
            "nodes=4 apart=2 faults=2 stop=1 crash=1",
            "nodes=4 apart=2 faults=2 pause=1 lose=1",
        ],
    );
}

#[test]
fn two_faults_of_which_one_breaks_a_way() {
    all_hold(
        &[
            "nodes=2 faults=2 cut=2",
            // Two that do not talk, while the third, by which they agree, stops.
            "nodes=3 apart=1 faults=2 stop=2",
        ],
        &[
            "nodes=3 faults=2 cut=2",
            "nodes=2 faults=2 cut=1 mend=1 pause=1",
            "nodes=3 faults=2 cut=2 mend=1",
        ],
    );
}

#[test]
fn two_faults_of_different_kinds_meet_between_two() {
    all_hold(
        &[
            "nodes=2 faults=2 crash=1 restart=1 lose=1 late=1 twice=1 cut=1 pick=1",
            "nodes=2 faults=2 lose=1 late=1 twice=1 cut=1 mend=1",
            "nodes=2 faults=3 crash=1 lose=1 cut=1",
        ],
        &["nodes=2 faults=2 crash=1 restart=1 lose=1 late=1 twice=1 cut=1 mend=1"],
    );
}

#[test]
fn a_pause_and_another_fault_meet_between_two() {
    all_hold(
        &[
            "nodes=2 faults=2 pause=1 lose=1 late=1 twice=1",
            "nodes=2 faults=2 pause=1 crash=1",
            // A node that joins without hearing the other, which hears it.
            "nodes=2 faults=2 pause=1 cut=1",
            "nodes=2 faults=2 pause=1 split=1",
        ],
        &["nodes=2 faults=2 pause=1 crash=1 restart=1"],
    );
}

#[test]
fn two_faults_of_different_kinds_meet_between_three() {
    all_hold(
        &[
            "nodes=3 faults=2 crash=1 cut=1 lose=1 late=1 twice=1",
            "nodes=3 crash=1 pick=1",
            "nodes=3 cut=1 pick=1",
            "nodes=3 faults=2 pause=1 lose=1",
        ],
        &["nodes=3 faults=2 pause=1 crash=1"],
    );
}

#[test]
fn a_way_a_node_or_a_module_fails_and_something_else_between_three() {
    all_hold(
        &[
            "nodes=3 faults=2 split=1 crash=1",
            "nodes=3 faults=2 dead=1 lose=1",
            "nodes=3 faults=2 stop=1 crash=1",
        ],
        &[],
    );
}

#[test]
fn two_faults_of_different_kinds_meet_between_four() {
    all_hold(
        &["nodes=4 faults=2 crash=1 lose=1", "nodes=4 faults=2 oneway=1 lose=1"],
        &["nodes=4 crash=1 pick=1"],
    );
}

#[test]
fn modules_stop_and_start_with_connections_open() {
    all_hold(
        &[
            "nodes=2 stop=1 start=1 close=1 flows=1",
            "nodes=3 faults=2 stop=1 start=1 slow=1",
            "nodes=4 stop=1 start=1",
        ],
        &[
            "nodes=3 stop=1 start=1 close=1 flows=1",
            "nodes=2 faults=3 stop=2 start=2 slow=1",
            "nodes=2 faults=3 stop=1 start=1 close=1 flows=1 lose=2",
            "nodes=3 faults=2 stop=1 start=1 lose=1",
            "nodes=3 crash=1 restart=1 close=1 flows=1",
        ],
    );
}
