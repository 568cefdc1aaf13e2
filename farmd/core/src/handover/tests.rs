//! The steps of one hand-over, each report given by hand. Whole farms are run in `farm_tests`.

use super::*;
use crate::id::BUCKETS;

fn id(i: usize) -> NodeId {
    NodeId::new(i).unwrap()
}

fn set(nodes: &[usize]) -> NodeSet {
    nodes.iter().map(|i| id(*i)).collect()
}

/// One group at each of `n` nodes; reports go from all to all when [`Farm::exchange`] says so.
struct Farm {
    nodes: Vec<Handover>,
    reports: Vec<GroupReport>,
    weights: Vec<u16>,
    view: NodeSet,
    version: u64,
}

impl Farm {
    fn new(n: usize) -> Self {
        Self {
            nodes: (0..n).map(|i| Handover::new(id(i))).collect(),
            reports: vec![GroupReport::default(); n],
            weights: vec![1; n],
            view: (0..n).map(id).collect(),
            version: 0,
        }
    }

    fn settled(n: usize) -> Self {
        let mut farm = Self::new(n);
        farm.settle();
        assert!(farm.nodes.iter().all(|h| h.committed() > Epoch::default()));
        farm
    }

    fn advance_with(&mut self, i: usize, shut: bool, outside: &[usize]) -> Outcome {
        let peers = |n: &usize| *n != i && (self.view.contains(id(*n)) || outside.contains(n));
        let peers = (0..self.nodes.len()).filter(peers).map(|n| {
            let peer = PeerGroup {
                eligible: true,
                fenced: false,
                hears_us: true,
                report: &self.reports[n],
            };
            (id(n), peer)
        });
        let peers = peers.collect();
        let around = Surroundings {
            view: self.view,
            coordinator: self.view.first(),
            weight: self.weights[i],
            closed: if shut { Closed::Shut } else { Closed::No },
            unheard: false,
            peers: &peers,
            away: &BTreeMap::new(),
        };
        let outcome = self.nodes[i].advance(&around);
        if outcome.plan_changed {
            self.version += 1;
            self.nodes[i].planned(self.version);
        }
        outcome
    }

    fn advance(&mut self, i: usize) -> Outcome {
        self.advance_with(i, false, &[])
    }

    /// The others hear what node `i` says.
    fn tell(&mut self, i: usize) {
        self.reports[i] = self.nodes[i].report(self.weights[i], true);
    }

    /// The data plane of node `i` works with the newest plan, and has connections in `held`.
    fn applied(&mut self, i: usize, held: &[usize]) {
        let version = self.version;
        self.nodes[i].handle_applied(version, held.iter().copied().collect(), held.len() as u32);
    }

    fn members(&self) -> Vec<usize> {
        self.view.iter().map(NodeId::index).collect()
    }

    /// Reports and plans go round until nothing changes any more.
    fn settle(&mut self) {
        for _ in 0..10 {
            for i in self.members() {
                self.advance(i);
                self.applied(i, &[]);
                self.advance(i);
                self.tell(i);
            }
        }
        for i in self.members() {
            assert_eq!(self.advance(i), Outcome::default(), "node {i} rests");
        }
    }

    fn open(&self) -> Vec<usize> {
        self.nodes.iter().map(Handover::open_count).collect()
    }
}

fn states(handover: &Handover, wanted: BucketState) -> usize {
    handover
        .plan("web/g".to_owned())
        .states
        .iter()
        .filter(|s| **s == wanted)
        .count()
}

#[test]
fn the_first_map_shares_exactly_and_opens_without_a_guard() {
    let farm = Farm::settled(3);
    assert_eq!(farm.open(), [1366, 1365, 1365]);
    for node in &farm.nodes {
        assert_eq!(states(node, BucketState::Own), node.open_count());
        assert_eq!(node.map(), farm.nodes[0].map());
        assert_eq!(node.committed(), farm.nodes[0].committed());
    }
}

#[test]
fn a_bucket_is_opened_by_the_winner_only_after_the_losers_data_plane_has_closed_it() {
    let mut farm = Farm::settled(2);
    farm.weights[1] = 0;
    farm.tell(1);
    let proposed = farm.advance(0);
    assert!(
        matches!(proposed.events[..], [Event::Proposed { moves: 2048, .. }]),
        "{:?}",
        proposed.events
    );
    // The winner closes nothing, and so waits for nothing.
    let epoch = farm.nodes[0].pending.as_ref().map(|p| p.epoch);
    assert_eq!(Some(farm.nodes[0].promised), epoch);
    assert!(!proposed.plan_changed);
    farm.tell(0);
    let released = farm.advance(1);
    assert!(
        matches!(
            &released.events[..],
            [Event::Accepted { by, .. }, Event::Released { lost: 2048, to, .. }]
                if *by == id(0) && *to == BTreeMap::from([(id(0), 2048)])
        ),
        "{:?}",
        released.events
    );
    assert_eq!(
        states(&farm.nodes[1], BucketState::Draining),
        2048,
        "nobody has looked yet who has connections"
    );
    let version = farm.version;
    for _ in 0..3 {
        farm.tell(1);
        farm.advance(0);
        assert_eq!(farm.nodes[0].open_count(), 2048, "no promise was given");
        // A plan from before the release proves nothing.
        assert!(!farm.nodes[1].handle_applied(version - 1, BucketSet::default(), 0));
        farm.advance(1);
    }
    assert!(farm.nodes[1].handle_applied(version, [5].into_iter().collect(), 1));
    farm.advance(1);
    farm.tell(1);
    let committed = farm.advance(0);
    assert!(
        matches!(
            &committed.events[..],
            [Event::Committed { gained: 2048, moved, .. }]
                if *moved == Moves::from([((Some(id(1)), Some(id(0))), 2048)])
        ),
        "{:?}",
        committed.events
    );
    assert_eq!(farm.nodes[0].open_count(), BUCKETS);
}

#[test]
fn the_winner_guards_what_the_loser_holds_and_nothing_else() {
    let mut farm = Farm::settled(2);
    let of_loser: Vec<usize> = (0..BUCKETS)
        .filter(|i| farm.nodes[1].map().owns(id(1), *i))
        .take(3)
        .collect();
    farm.weights[1] = 0;
    for _ in 0..5 {
        for i in 0..2 {
            farm.advance(i);
            farm.applied(i, if i == 1 { &of_loser } else { &[] });
            farm.advance(i);
            farm.tell(i);
        }
    }
    assert_eq!(farm.open(), [BUCKETS, 0]);
    assert_eq!(states(&farm.nodes[0], BucketState::Guarded), 3);
    assert_eq!(states(&farm.nodes[1], BucketState::Draining), 3);
    assert_eq!(farm.nodes[1].held_connections(), 3);
    let holders = farm.nodes[0].plan("g".to_owned()).holders;
    assert_eq!(holders, of_loser.iter().map(|i| (*i, set(&[1]))).collect());
    farm.applied(1, &of_loser[..1]);
    farm.advance(1);
    farm.tell(1);
    assert!(farm.advance(0).plan_changed);
    assert_eq!(states(&farm.nodes[0], BucketState::Guarded), 1);
    farm.applied(1, &[]);
    farm.settle();
    assert_eq!(states(&farm.nodes[0], BucketState::Own), BUCKETS);
}

#[test]
fn a_dead_nodes_buckets_open_unguarded_and_only_they_move() {
    let mut farm = Farm::settled(3);
    let before = farm.nodes[0].map().clone();
    farm.view.remove(id(2));
    farm.settle();
    assert_eq!(farm.nodes[0].map().moves_to(&before), 1365);
    assert_eq!(farm.open()[..2], [2048, 2048]);
    assert_eq!(
        states(&farm.nodes[0], BucketState::Own) + states(&farm.nodes[1], BucketState::Own),
        BUCKETS
    );
}

#[test]
fn whoever_serves_outside_the_view_blocks_until_it_says_that_it_does_not() {
    let mut farm = Farm::settled(3);
    farm.view.remove(id(2));
    for _ in 0..5 {
        for i in 0..2 {
            farm.advance_with(i, false, &[2]);
            farm.applied(i, &[]);
            farm.tell(i);
        }
    }
    assert_eq!(
        farm.open(),
        [1366, 1365, 1365],
        "node 2 is heard and may have its buckets open"
    );
    let shut = farm.advance_with(2, true, &[]);
    assert_eq!(shut.events, [Event::Shut]);
    farm.tell(2);
    farm.advance_with(0, false, &[2]);
    assert!(
        farm.reports[2].committed > Epoch::default(),
        "its data plane may still be open"
    );
    farm.applied(2, &[]);
    farm.advance_with(2, true, &[]);
    farm.tell(2);
    assert_eq!(farm.reports[2].committed, Epoch::default());
    for _ in 0..5 {
        for i in 0..2 {
            farm.advance_with(i, false, &[2]);
            farm.applied(i, &[]);
            farm.advance_with(i, false, &[2]);
            farm.tell(i);
        }
    }
    assert_eq!(farm.open(), [2048, 2048, 0]);
}

#[test]
fn who_was_shut_gets_its_buckets_by_a_new_map_and_no_other_bucket_moves() {
    let mut farm = Farm::settled(3);
    let before = farm.nodes[0].map().clone();
    farm.advance_with(1, true, &[]);
    assert_eq!(farm.nodes[1].open_count(), 0);
    assert_eq!(states(&farm.nodes[1], BucketState::Foreign), BUCKETS);
    assert!(!farm.nodes[1].is_released(), "the data plane has not said so");
    farm.applied(1, &[]);
    assert!(farm.nodes[1].is_released());
    farm.settle();
    assert_eq!(farm.open(), [1366, 1365, 1365]);
    assert_eq!(farm.nodes[1].map().moves_to(&before), 0);
}

#[test]
fn a_map_agreed_without_a_node_is_learned_with_what_moved() {
    let mut farm = Farm::settled(3);
    farm.view.remove(id(2));
    farm.settle();
    farm.view.insert(id(2));
    let learned = farm.advance(2).events;
    let told = learned.iter().find_map(|event| match event {
        Event::Adopted { moved, .. } => Some(moved.clone()),
        _ => None,
    });
    let moved = Moves::from([((Some(id(2)), Some(id(0))), 682), ((Some(id(2)), Some(id(1))), 683)]);
    assert_eq!(told, Some(moved), "{learned:?}");
}

#[test]
fn what_a_dead_node_leaves_is_promised_at_once() {
    let mut farm = Farm::settled(3);
    let settled = farm.nodes[0].committed();
    farm.view.remove(id(2));
    farm.advance(0);
    farm.tell(0);
    farm.advance(1);
    assert!(
        farm.nodes[1].report(1, false).promised > settled,
        "nobody keeps requests that the data plane could be late for"
    );
    assert!(farm.nodes[1].is_to_gain());
}

#[test]
fn a_stopped_group_uses_no_number_twice() {
    let mut farm = Farm::settled(2);
    let before = farm.nodes[0].report(1, false);
    farm.nodes[0].stop();
    assert_eq!(
        (farm.nodes[0].open_count(), farm.nodes[0].committed()),
        (0, Epoch::default())
    );
    assert!(
        farm.nodes[0].report(0, false).promised > before.promised,
        "no earlier promise is kept to"
    );
    // Alone, with nobody to tell it which numbers were used.
    farm.view = set(&[0]);
    farm.settle();
    assert!(farm.nodes[0].committed() > before.committed);
}

#[test]
fn a_superseded_proposal_is_never_opened() {
    let mut farm = Farm::settled(3);
    let settled = farm.nodes[0].committed();
    farm.weights[2] = 0;
    farm.tell(2);
    farm.advance(0);
    farm.tell(0);
    farm.advance(1);
    let first = farm.nodes[1].report(1, false).promised;
    assert!(first > settled);
    // Node 0 dies before it commits; node 1 proposes anew.
    farm.view.remove(id(0));
    farm.settle();
    assert_eq!(farm.nodes[1].open_count(), BUCKETS);
    assert!(
        farm.nodes[1].committed() > first,
        "by a number above the one that was promised"
    );
    // What the dead node had proposed comes late.
    farm.view.insert(id(0));
    let stale = farm.reports[0].clone();
    assert!(stale.map.is_some_and(|m| m.epoch == first));
    assert_eq!(farm.advance(1).events, []);
    assert_eq!(farm.nodes[1].open_count(), BUCKETS);
}

#[test]
fn nobody_ready_leaves_the_buckets_to_nobody() {
    let mut farm = Farm::settled(2);
    farm.weights = vec![0, 0];
    farm.settle();
    assert_eq!(farm.open(), [0, 0]);
    assert!(farm.nodes[0].map().owners().is_empty());
    farm.weights = vec![0, 3];
    farm.settle();
    assert_eq!(farm.open(), [0, BUCKETS]);
}

/// As after a restart of farmd in place of which only the kernel still knows the connections, in a farm where nobody may take anything new.
#[test]
fn where_nobody_is_ready_connections_that_are_found_go_on_and_those_of_others_are_known() {
    let mut here = Handover::new(id(0));
    let held: BucketSet = [7].into_iter().collect();
    let elsewhere = GroupReport {
        held: [9].into_iter().collect(),
        ..GroupReport::default()
    };
    let peer = PeerGroup {
        eligible: true,
        fenced: false,
        hears_us: true,
        report: &elsewhere,
    };
    let away = BTreeMap::new();
    let (alone, both) = (BTreeMap::new(), BTreeMap::from([(id(1), peer)]));
    let around = |peers| Surroundings {
        view: set(&[0, 1]),
        coordinator: Some(id(0)),
        weight: 0,
        closed: Closed::Unserved,
        unheard: false,
        peers,
        away: &away,
    };
    assert!(here.advance(&around(&alone)).plan_changed);
    here.planned(1);
    assert_eq!(here.plan(String::new()).states[7], BucketState::Foreign);

    assert!(here.handle_applied(1, held, 1));
    assert!(here.advance(&around(&alone)).plan_changed);
    here.planned(2);
    assert_eq!(here.plan(String::new()).states[7], BucketState::Draining);

    assert!(here.advance(&around(&both)).plan_changed);
    assert_eq!(here.plan(String::new()).holders.get(&9), Some(&set(&[1])));
}
