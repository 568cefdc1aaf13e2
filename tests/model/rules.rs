//! For each rule: a node that breaks it is caught, and the same space without it keeps every promise.
//!
//! | rule | broken by | promise that it costs |
//! | --- | --- | --- |
//! | a plan counts as confirmed when the data plane works with it | `ConfirmsEarly` | exclusion |
//! | a promise is given when all that the map takes is closed | `PromisesEarly` | exclusion |
//! | a commit needs the promise of every active member | `CommitsEarly` | exclusion |
//! | what is passed on is what was said | `PassesOnMore` | self-fencing |
//! | a part that lacks the majority does not serve (`majority`) | `ServesInAnyPart` | exclusion |
//! | who lacks nodes serves while the witness answers (`witness`) | `BelievesInWitness` | exclusion |
//! | who has another configuration is kept out | `HidesConfiguration` | exclusion |
//! | who says goodbye has closed | `SaysGoodbyeEarly` | exclusion |
//! | who was not run closes everything and joins anew | `ForgetsPause` | self-fencing |
//! | the lease ends a pulse before the detection time | `LongLease` | self-fencing |
//! | the lease counts from what the others have heard | `LeaseFromLastTurn` | self-fencing |
//! | a row names those that are heard | `SaysItHears` | self-fencing |
//! | who is not heard steps out | `TakesItselfForHeard` | self-fencing |
//! | who says that it has stepped out has closed | `SaysItHasSteppedOut` | self-fencing |
//! | who says that it has committed nothing has nothing open | `SaysNothingCommitted` | coverage |
//! | who is joining takes no share | `SharesWhileJoining` | self-fencing |
//! | who has another `cluster.xml` than most steps out | `IgnoresOtherCluster` | self-fencing |
//! | a restart has a new incarnation | `SameIncarnation` | coverage |
//! | an active member promises | `NeverPromises` | coverage |
//! | who is withheld says so: it is not waited for | `HidesWithheld` | coverage |
//! | who is kept out is not waited for | `MistakesConfiguration` | coverage |
//! | who proposes talks with all, or is told what the one says with which it does not | `OverlooksBrokenWays` | coverage |
//! | what is gained is guarded while others have connections in it | `NeverGuards` | continuity |
//! | who has connections in buckets of others says in which | `HidesConnections` | continuity |
//! | a map moves no more than the shares ask for | `MovesTooMuch` | few moves |
//! | what came in while a node was not run is old | `TakesOldHeartbeats` | completeness |
//! | it takes two to evict a node, of three or more | `EvictsAlone` | accuracy |
//! | a number that is not above the last one is refused | `TakesRecordings` | coverage |
//! | a row ages from when the first node heard it, and ends | `KeepsRowsYoung` | completeness |
//! | a circle that only hears another one steps out | `HidesThoseThatDoNotHearIt` | self-fencing |
//! | who was not run for a while speaks before it judges by silence | `HidesShortStop` | self-fencing |
//! | who is told that it is deaf steps out | `IgnoresCommand` | exclusion |
//! | who is back at once holds what it held | `ForgetsWhoReturns` | continuity |
//! | where nothing comes in a node steps out | `NeverLooks` | coverage, exclusion |
//! | who is left out stays until it has stepped out, and blocks the promise while it serves | `OverlooksOutsiders` | exclusion |
//! | who has just joined waits two pulses if some are missing | `SkipsOpening` | self-fencing |
//! | who is back has no lease before its data plane has closed | `LeaseWhenBack` | self-fencing |
//! | who closes everything withdraws its promise | `NeverWithdraws` | coverage |
//!
//! By another configuration a bucket's number stands for other connections ([`crate::plane`]): so two that share the buckets by their numbers
//! accept the same.

use farm_core::id::{NodeId, NodeSet};

use crate::broken::Broken;
use crate::checker::{Asked, Farms, asked};
use crate::promises::Promise;

/// Node `culprit` of the space `spec` breaks `rule`, and the checker finds a state in which `promise` is not kept.
fn caught(spec: &str, rule: Broken, culprit: usize, promise: Promise) {
    if matches!(asked(), Asked::One(_)) {
        return;
    }
    Farms::parse(spec).expect("the test's own words").holds();
    caught_in_large(spec, rule, culprit, promise);
}

/// The same of a space that is walked without the broken rule by another test, here or in [`crate::kept`], or as part of a larger space there.
fn caught_in_large(spec: &str, rule: Broken, culprit: usize, promise: Promise) {
    if matches!(asked(), Asked::One(_)) {
        return;
    }
    caught_together(spec, rule, &[culprit], promise);
}

/// The same of several nodes that break the rule, with `FARM_MODEL` looked at before.
fn caught_together(spec: &str, rule: Broken, culprits: &[usize], promise: Promise) {
    let mut farms = Farms::parse(spec).expect("the test's own words");
    let nodes: NodeSet = culprits.iter().filter_map(|n| NodeId::new(*n)).collect();
    farms.broken = Some((rule, nodes));
    let verdict = farms.check();
    assert_eq!(
        verdict.promise,
        Some(promise),
        "{rule:?} of {culprits:?}\n{}",
        verdict.trace
    );
}

#[test]
fn a_plan_is_confirmed_only_when_it_is_at_work() {
    caught(
        "nodes=3 faults=2 stop=1 slow=1",
        Broken::ConfirmsEarly,
        2,
        Promise::Exclusion,
    );
}

#[test]
fn who_was_not_run_starts_over() {
    caught("nodes=2 pause=1", Broken::ForgetsPause, 0, Promise::SelfFencing);
}

#[test]
fn the_lease_ends_before_the_detection_time() {
    caught("nodes=2 pause=1", Broken::LongLease, 1, Promise::SelfFencing);
}

#[test]
fn the_lease_counts_from_what_others_have_heard() {
    caught_in_large(
        "nodes=2 faults=2 pause=1 lose=1",
        Broken::LeaseFromLastTurn,
        0,
        Promise::SelfFencing,
    );
}

#[test]
fn a_promise_is_given_only_when_all_is_closed() {
    caught(
        "nodes=3 faults=2 stop=1 slow=1",
        Broken::PromisesEarly,
        2,
        Promise::Exclusion,
    );
}

#[test]
fn a_commit_needs_every_promise() {
    caught(
        "nodes=3 faults=2 stop=1 slow=1",
        Broken::CommitsEarly,
        0,
        Promise::Exclusion,
    );
}

#[test]
fn nobody_says_that_he_hears_whom_he_does_not() {
    caught("nodes=2 cut=1", Broken::SaysItHears, 0, Promise::SelfFencing);
}

#[test]
fn who_is_not_heard_steps_out() {
    caught("nodes=2 cut=1", Broken::TakesItselfForHeard, 1, Promise::SelfFencing);
}

#[test]
fn a_restart_has_a_new_incarnation() {
    caught(
        "nodes=2 crash=1 restart=1",
        Broken::SameIncarnation,
        1,
        Promise::Coverage,
    );
}

#[test]
fn everybody_answers() {
    caught("nodes=3 crash=1", Broken::NeverPromises, 1, Promise::Coverage);
}

#[test]
fn who_has_stepped_out_has_closed() {
    // It loses two others, and is out, and still hears the last.
    caught_in_large(
        "nodes=4 faults=2 split=2",
        Broken::SaysItHasSteppedOut,
        3,
        Promise::SelfFencing,
    );
}

#[test]
fn who_has_committed_nothing_has_nothing_open() {
    caught("nodes=4 dead=1", Broken::SaysNothingCommitted, 0, Promise::Coverage);
}

#[test]
fn who_lacks_nodes_asks_the_witness() {
    caught(
        "nodes=2 witness=1 faults=2 hide=1 split=1",
        Broken::BelievesInWitness,
        1,
        Promise::Exclusion,
    );
}

#[test]
fn of_a_divided_farm_only_the_majority_serves() {
    // Of two halves the one with the first node serves; the other one is all in order in itself.
    caught(
        "nodes=2 majority=1 split=1",
        Broken::ServesInAnyPart,
        1,
        Promise::Exclusion,
    );
}

#[test]
fn who_is_withheld_says_so() {
    // The part is the first or the second node, which the witness answers, and this one: its promise is waited for, and never comes.
    caught_in_large(
        "nodes=3 witness=1 faults=2 hide=1 crash=1",
        Broken::HidesWithheld,
        2,
        Promise::Coverage,
    );
}

#[test]
fn who_is_joining_takes_no_share() {
    // The one heartbeat that would tell it of the other node before its module is ready is lost; the other one takes it for joining, and
    // serves on.
    caught_in_large(
        "nodes=2 faults=2 crash=1 restart=1 lose=1",
        Broken::SharesWhileJoining,
        1,
        Promise::SelfFencing,
    );
}

#[test]
fn who_has_another_configuration_is_kept_out() {
    caught(
        "nodes=3 other=1 stop=1",
        Broken::HidesConfiguration,
        2,
        Promise::Exclusion,
    );
}

#[test]
fn who_is_kept_out_is_not_waited_for() {
    // The space is walked without a broken node by the test before. Here the coordinator waits for the promise of the one that is kept out.
    caught_in_large(
        "nodes=3 other=1 stop=1",
        Broken::MistakesConfiguration,
        0,
        Promise::Coverage,
    );
}

#[test]
fn who_has_another_cluster_xml_steps_out() {
    caught(
        "nodes=3 cluster=1 crash=1",
        Broken::IgnoresOtherCluster,
        2,
        Promise::SelfFencing,
    );
}

#[test]
fn who_says_goodbye_has_closed() {
    // The other one serves everything as soon as it hears the goodbye.
    caught(
        "nodes=2 leave=1 restart=1",
        Broken::SaysGoodbyeEarly,
        1,
        Promise::Exclusion,
    );
}

#[test]
fn what_waited_is_not_taken_for_fresh() {
    // The other one is cut off while this one is not run, and what it said before still waits.
    caught_in_large(
        "nodes=2 faults=2 pause=1 split=1",
        Broken::TakesOldHeartbeats,
        1,
        Promise::Completeness,
    );
}

#[test]
fn what_is_passed_on_is_what_was_said() {
    // The third stands between the first, which proposes, and the second.
    caught(
        "nodes=4 apart=2 faults=2 stop=1 slow=1",
        Broken::PassesOnMore,
        2,
        Promise::SelfFencing,
    );
}

#[test]
fn one_observer_evicts_nobody() {
    caught("nodes=3 split=1", Broken::EvictsAlone, 1, Promise::Accuracy);
}

#[test]
fn who_proposes_talks_with_all() {
    // The hub leaves it to the lowest, which knows that it does not hear the second, and leaves it to the hub.
    caught(
        "nodes=3 apart=1 stop=1",
        Broken::OverlooksBrokenWays,
        2,
        Promise::Coverage,
    );
}

#[test]
fn what_is_gained_is_guarded() {
    // It gains buckets of the node that stops, which has connections in them until its module has ended.
    caught("nodes=3 stop=1 flows=1", Broken::NeverGuards, 0, Promise::Continuity);
}

#[test]
fn connections_that_are_left_are_told() {
    caught(
        "nodes=3 stop=1 flows=1",
        Broken::HidesConnections,
        2,
        Promise::Continuity,
    );
}

#[test]
fn a_map_moves_what_it_must() {
    caught("nodes=3 crash=1", Broken::MovesTooMuch, 0, Promise::FewMoves);
}

#[test]
fn a_recording_is_no_news() {
    // The node is gone, and somebody sends on what it has said.
    caught(
        "nodes=2 faults=2 record=1 crash=1",
        Broken::TakesRecordings,
        0,
        Promise::Coverage,
    );
}

#[test]
fn what_goes_round_does_not_become_younger() {
    // The space is walked without a broken node by the test of who never promises. Here the first or the second node is gone, and the third one
    // goes on telling the other of it.
    caught_in_large("nodes=3 crash=1", Broken::KeepsRowsYoung, 2, Promise::Completeness);
}

#[test]
fn a_circle_that_only_hears_another_one_steps_out() {
    if matches!(asked(), Asked::One(_)) {
        return;
    }
    // Two that talk with each other, and are not heard by the two others. They go on past the time for which they may.
    let spec = "nodes=4 oneway=1";
    Farms::parse(spec).expect("the test's own words").holds();
    caught_together(spec, Broken::HidesThoseThatDoNotHearIt, &[0, 1], Promise::SelfFencing);
}

#[test]
fn who_was_not_run_for_a_while_speaks_before_it_judges() {
    // The space is walked without a broken node in `kept`. The other one does not know that it is not heard here, and takes this one for dead a
    // little later than this one would take it.
    caught_in_large(
        "nodes=2 faults=2 cut=1 pause=1",
        Broken::HidesShortStop,
        0,
        Promise::SelfFencing,
    );
}

#[test]
fn who_is_told_that_it_is_deaf_steps_out() {
    caught("nodes=3 deaf=1", Broken::IgnoresCommand, 0, Promise::Exclusion);
}

#[test]
fn who_is_back_at_once_holds_what_it_held() {
    caught(
        "nodes=2 reload=1 flows=1",
        Broken::ForgetsWhoReturns,
        0,
        Promise::Continuity,
    );
}

#[test]
fn of_two_the_one_at_which_nothing_comes_in_leaves_it_to_the_other() {
    // That one has stepped out because it is not heard.
    caught("nodes=2 dead=1", Broken::NeverLooks, 0, Promise::Coverage);
}

#[test]
fn of_three_the_one_at_which_nothing_comes_in_is_out_before_the_others_take_over() {
    // Otherwise it would answer clients beside them as soon as something comes in again.
    caught("nodes=3 dead=1", Broken::NeverLooks, 0, Promise::Exclusion);
}

#[test]
fn who_is_left_out_stays_until_it_has_stepped_out_and_blocks_the_promise() {
    // The space is walked without a broken node by the test before. One at which nothing comes in is left out of the view a pulse before it can
    // take over, and has open until then what it had.
    caught_in_large("nodes=3 dead=1", Broken::OverlooksOutsiders, 0, Promise::Exclusion);
}

#[test]
fn who_has_just_joined_tells_so_before_it_takes_a_share() {
    // It does not hear the other one, which serves on until it hears that the missing ears count.
    caught(
        "nodes=2 faults=2 oneway=1 crash=1 restart=1",
        Broken::SkipsOpening,
        1,
        Promise::SelfFencing,
    );
}

#[test]
fn who_closes_everything_withdraws_its_promise() {
    // As it also says that its weight is 0, a new map comes, unless nothing that it says while it is out gets to the other one: two cuts, and
    // between them a heartbeat that comes late, by whose answer it comes back. The first one has just been.
    caught(
        "nodes=2 blink=95 faults=2 split=1 mend=1 late=1",
        Broken::NeverWithdraws,
        1,
        Promise::Coverage,
    );
    // At any moment.
    if matches!(asked(), Asked::Deep) {
        Farms::parse("nodes=2 faults=3 split=2 mend=2 late=1").unwrap().holds();
    }
}

#[test]
fn who_is_back_has_closed_first() {
    caught(
        "nodes=2 faults=2 pause=1 slow=1",
        Broken::LeaseWhenBack,
        0,
        Promise::SelfFencing,
    );
}
