//! Short forms of the chaos matrices: their promises, not their times. `scripts/chaos` runs them long.

use std::time::Duration;

use anyhow::Result;
use farm_lab::chaos::{
    Outcome, PROFILES, connect, continuity, failover, freeze, partition, planned, soak, traffic, vrrp,
};

/// Another one would do; this one is as good, and a failure comes back with it.
const SEED: u64 = 7;

fn quiet(_: &str) -> Result<()> {
    Ok(())
}

/// Prints what was measured, and fails if a promise was broken or nothing was measured.
fn kept(outcome: Result<Outcome>) -> Outcome {
    let outcome = outcome.expect("the matrix runs");
    for table in &outcome.tables {
        println!("{}\n{}", table.title, table.columns.join(" | "));
        table.rows.iter().for_each(|row| println!("{}", row.join(" | ")));
    }
    println!("missed: {:?}\nnotes: {:?}", outcome.missed, outcome.notes);
    assert_eq!(outcome.violations, Vec::<String>::new());
    assert!(
        outcome.tables.iter().all(|table| !table.rows.is_empty()),
        "an empty table"
    );
    outcome
}

#[test]
fn crashes_are_taken_over_in_both_modes() {
    let options = failover::Options {
        seed: SEED,
        kills: 2,
        nodes: vec![3],
        profiles: PROFILES[1..].to_vec(),
    };
    let outcome = kept(failover::run(&options, &mut quiet));
    assert!(outcome.series.iter().all(|series| series.values.len() == 2));
}

#[test]
fn planned_changes_give_no_probe_two_answers() {
    kept(planned::run(SEED, 1, None, &mut quiet));
}

#[test]
fn clients_that_connect_during_a_crash_are_measured() {
    let outcome = kept(connect::run(SEED, 1, None, &mut quiet));
    assert!(outcome.series.iter().any(|series| !series.values.is_empty()));
}

#[test]
fn connections_of_others_outlast_stops_restarts_and_a_crash() {
    // On two nodes, so that one act can run into another one.
    kept(continuity::run(SEED, 300, 2, None, &mut quiet));
}

#[test]
fn they_do_in_user_space_too() {
    kept(continuity::run(SEED, 300, 2, Some("raw"), &mut quiet));
}

/// The rows of the freeze matrix; the second one only where there are cgroups that can be frozen.
const WAYS: [&str; 6] = [
    "farmd stopped (SIGSTOP)",
    "whole node frozen (cgroup)",
    "nothing out",
    "nothing in",
    "no heartbeat out",
    "no heartbeat in",
];

/// Nor do those that only fail to hear, be it heartbeats or anything.
fn nodes_that_stand_still_never_answer_beside_another(plane: Option<&'static str>) {
    let outcome = kept(freeze::run(SEED, 1, &freeze::WAYS, plane, &mut quiet));
    let table = &outcome.tables[0];
    let no_cgroup = |note: &String| note.contains("whole nodes were not frozen");
    let frozen = !outcome.notes.iter().any(no_cgroup);
    let ways = WAYS.iter().filter(|way| frozen || **way != WAYS[1]);
    let rows: Vec<&str> = table.rows.iter().map(|row| row[0].as_str()).collect();
    assert_eq!(rows, ways.copied().collect::<Vec<_>>());
    for row in &table.rows {
        let cell = |what: &str| {
            let column = table.columns.iter().position(|column| column == what);
            row[column.expect("the column is there")].as_str()
        };
        for what in ["probes", "requests answered"] {
            assert_ne!(cell(what), "0", "{what}: {row:?}");
        }
        for what in ["two answers", "of other nodes", "wrong bytes"] {
            assert_eq!(cell(what), "0", "{what}: {row:?}");
        }
    }
}

#[test]
fn nodes_that_stand_still_or_are_cut_off_one_way_never_answer_beside_another() {
    nodes_that_stand_still_never_answer_beside_another(None);
}

#[test]
fn nor_do_they_in_user_space() {
    nodes_that_stand_still_never_answer_beside_another(Some("raw"));
}

#[test]
fn split_networks_of_every_shape_have_one_owner_on_each_side() {
    kept(partition::run(SEED, 4, 1, 0, &mut quiet));
}

#[test]
fn connections_on_a_side_outlast_the_split_and_the_merge() {
    kept(partition::run(SEED, 0, 0, 1, &mut quiet));
}

#[test]
fn a_busy_machine_with_a_lossy_network_has_one_owner_for_everything() {
    kept(soak::run(SEED, Duration::from_secs(5), &[3], &mut quiet));
}

#[test]
fn keepalived_can_be_measured_beside_the_farm() {
    let outcome = kept(vrrp::run(SEED, 1, &mut quiet));
    assert!(
        outcome.series.iter().all(|series| series.values.len() == 1),
        "{outcome:?}"
    );
}

#[test]
fn heartbeats_are_counted() {
    let outcome = kept(traffic::run(&[2], &mut quiet));
    for row in &outcome.tables[0].rows {
        let datagrams: u32 = row[2].parse().expect("a number");
        assert!(datagrams > 0, "{row:?}");
    }
}
