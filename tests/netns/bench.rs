//! Shortest forms of the measurements that need no farm: they run, and measure what they say. `scripts/bench` runs all of them long.

use anyhow::Result;
use farm_lab::bench::{Effort, cost, drop, growth};
use farm_lab::outcome::Outcome;
use farm_sys::bpf::BpfError;

const EFFORT: Effort = Effort {
    short: true,
    rounds: Some(1),
    seconds: Some(1),
};

fn quiet(_: &str) -> Result<()> {
    Ok(())
}

/// The value; `None`, and a line, where there is no kernel program to measure, unless there must be one.
fn with_program<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            let cause = error.downcast_ref::<BpfError>();
            let excused = cause.is_some_and(|e| e.is_denied() || e.is_missing());
            assert!(excused && std::env::var_os("FARM_NEED_BPF").is_none(), "{error:#}");
            println!("the kernel program is not measured: {error:#}");
            None
        }
    }
}

/// Each picture has lines, and each line a value at every place.
fn measured(outcome: &Outcome) {
    println!("missed: {:?}\nnotes: {:?}", outcome.missed, outcome.notes);
    assert!(!outcome.tables.is_empty() && outcome.tables.iter().all(|table| !table.rows.is_empty()));
    for plot in &outcome.plots {
        assert!(!plot.lines.is_empty(), "{}", plot.name);
        for line in &plot.lines {
            let values: Vec<f64> = line.points.iter().flat_map(|point| point.values.clone()).collect();
            assert!(
                !values.is_empty() && values.iter().all(|value| value.is_finite()),
                "{}, {}: {values:?}",
                plot.name,
                line.name
            );
        }
    }
}

#[test]
fn every_kind_of_frame_is_judged_as_what_it_is_and_takes_a_time() {
    if let Some(outcome) = with_program(cost::run(EFFORT, &mut quiet)) {
        measured(&outcome);
    }
}

#[test]
fn every_frame_that_is_thrown_comes_in() {
    measured(&drop::run(EFFORT, &mut quiet).expect("dropping is measured"));
    let mut outcome = Outcome::new(growth::NAME, 0);
    growth::foreign::measure(EFFORT, &mut outcome, &mut quiet).expect("a mixture is measured");
    measured(&outcome);
}

#[test]
fn rules_and_connections_are_measured_up_to_their_numbers() {
    let mut outcome = Outcome::new(growth::NAME, 0);
    let rules = growth::rules::measure(EFFORT, &mut outcome, &mut quiet);
    let connections = growth::connections::measure(EFFORT, &mut outcome, &mut quiet);
    if with_program(rules.and(connections)).is_some() {
        measured(&outcome);
    }
}
