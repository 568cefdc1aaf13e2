//! The checks themselves: each promise is broken by hand, and the simulator must say so.

use super::action::Action;
use super::node::least_moves;
use super::plane::Bits;
use super::sim::{Sim, id, ms};
use crate::balance::assign::assign;

fn first_bucket_of(sim: &Sim, node: usize) -> usize {
    sim.nodes[node].plane.open.iter().next().unwrap()
}

fn is_caught_with_two_owners(mut sim: Sim) {
    let bucket = first_bucket_of(&sim, 0);
    sim.nodes[1].plane.open.insert(bucket);
    sim.plane_changed(1);
    let breach = sim.run(ms(60)).unwrap_err();
    assert!(breach.0.contains("s0 and s1 both accept 1 buckets"), "{}", breach.0);
}

#[test]
fn two_owners() {
    let sim = Sim::started(3, 1);
    is_caught_with_two_owners(sim);
}

#[test]
fn two_owners_that_cannot_hear_each_other_are_none_and_become_two_when_they_can() {
    let mut sim = Sim::started(2, 2);
    sim.longest_overlap = Some(ms(20));
    sim.act(Action::Cut(0, 1));
    sim.act(Action::Cut(1, 0));
    sim.run(ms(500)).unwrap();
    assert_eq!(sim.counts().iter().sum::<usize>(), 2 * crate::id::BUCKETS);
    // The network is whole, and still nothing gets through.
    sim.net.loss = 1000;
    sim.net.mend_all();
    assert!(sim.run(ms(200)).unwrap_err().0.contains("both accept 4096 buckets"));
}

#[test]
fn two_owners_in_one_view_that_cannot_hear_each_other() {
    let mut sim = Sim::started(3, 8);
    sim.act(Action::Cut(0, 1));
    sim.act(Action::Cut(1, 0));
    sim.run(ms(2000)).unwrap();
    sim.check_covered().unwrap();
    is_caught_with_two_owners(sim);
}

#[test]
fn a_node_that_goes_on_accepting_while_it_is_not_run() {
    let mut sim = Sim::started(3, 9);
    sim.longest_overlap = Some(ms(0));
    sim.act(Action::Pause(2, ms(2000), true));
    sim.nodes[2].plane.lease_until = sim.now + ms(2000);
    let breach = sim.run(ms(1000)).unwrap_err();
    assert!(breach.0.contains("s2 both accept"), "{}", breach.0);
}

#[test]
fn a_connection_that_is_reset() {
    let mut sim = Sim::started(3, 3);
    sim.run(ms(300)).unwrap();
    let bucket = first_bucket_of(&sim, 0);
    let end = sim.now + ms(1000);
    sim.connect(1, bucket, end);
    let breach = sim.check_served().unwrap_err();
    assert!(breach.0.contains("s0 resets a connection of s1"), "{}", breach.0);
}

#[test]
fn a_connection_that_is_no_longer_served() {
    let mut sim = Sim::started(3, 4);
    let bucket = first_bucket_of(&sim, 0);
    let end = sim.now + ms(1000);
    sim.connect(0, bucket, end);
    sim.check_served().unwrap();
    sim.nodes[0].plane.clear();
    assert!(sim.check_served().unwrap_err().0.contains("no longer serves"));
}

#[test]
fn a_gap_between_two_owners() {
    let mut sim = Sim::started(2, 5);
    sim.planned = true;
    sim.check_no_gap().unwrap();
    sim.nodes[0].plane.open = Bits::NONE;
    assert!(
        sim.check_no_gap()
            .unwrap_err()
            .0
            .contains("nobody accepts or keeps requests for 2048 buckets")
    );
}

#[test]
fn a_bucket_of_nobody_and_a_wrong_share() {
    let mut sim = Sim::started(2, 6);
    sim.nodes[0].local.weights = vec![2];
    assert!(sim.check_covered().unwrap_err().0.contains("are its share"));
    sim.nodes[0].local.weights = vec![1];
    sim.check_covered().unwrap();
    let bucket = first_bucket_of(&sim, 0);
    let only = |i: usize| if i == bucket { None } else { Some(i) };
    let rest: Vec<usize> = sim.nodes[0].plane.open.iter().filter_map(only).collect();
    sim.nodes[0].plane.open = Bits::NONE;
    rest.iter().for_each(|i| sim.nodes[0].plane.open.insert(*i));
    assert!(sim.check_covered().is_err());
}

#[test]
fn a_map_that_moves_more_than_it_must() {
    let mut sim = Sim::started(3, 10);
    sim.act(Action::Weight(1, 2));
    // As if another map had been at work before: a few buckets lie with the wrong node by each.
    let before = [(id(1), 1)].into_iter().collect();
    let weights = [1, 2, 0].into_iter().map(|n| (id(n), 1)).collect();
    let other = assign(&assign(&Default::default(), &before), &weights);
    let breach = loop {
        for node in &mut sim.nodes {
            node.map = other.clone();
        }
        if let Err(breach) = sim.run(ms(1)) {
            break breach;
        }
        assert!(sim.now < ms(3000), "nothing was found");
    };
    assert!(breach.0.contains("buckets move"), "{}", breach.0);
}

#[test]
fn the_least_moves_are_those_of_the_nearest_map() {
    let weights = |nodes: &[usize]| nodes.iter().map(|n| (id(*n), 1)).collect();
    let two = assign(&Default::default(), &weights(&[0, 1]));
    let three = assign(&two, &weights(&[0, 1, 2]));
    assert_eq!(two.moves_to(&three), least_moves(&two, &three));
    let anew = assign(&Default::default(), &weights(&[0, 1, 2]));
    assert!(two.moves_to(&anew) > least_moves(&two, &anew));
}
