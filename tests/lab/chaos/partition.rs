//! Split networks: links between nodes that carry nothing, one way or both, in every shape.
//!
//! In the first part the clients reach all nodes, so that they see every answer: by `vmac_invisible` each probe reaches every node. Two nodes that hear each
//! other both ways must never answer one probe, and in a clean split each side answers every flow with exactly one node. In the second part each
//! side has a client of its own, as a split switch would have it, and connections are held: those with a server of the client's own side go on
//! through the split and through the merge.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::{Outcome, PROFILES, Profile, Progress, Rig, RigConfig, Table, cell_ms, ms, quantile};
use crate::config::VIP2;
use crate::crowd::{Crowd, CrowdConfig};
use crate::pinger::{NodeNumber, Pinger, Probe};
use crate::process::wait_until;
use crate::random::Random;
use crate::{CLIENT_PORT, client_port};

/// Established connections of each client in the second part.
const HELD: usize = 100;
/// Between an answer and the next request of one of them: at each moment some speak, also before the first heartbeat after a split.
const PAUSE: Duration = Duration::from_millis(10);

/// Which nodes' frames reach which others: `cut[from][to]`.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Shape {
    cut: Vec<Vec<bool>>,
}

impl Shape {
    /// The directed links of `nodes` nodes, one bit each.
    fn of_mask(nodes: usize, mask: u64) -> Self {
        let mut shape = Self {
            cut: vec![vec![false; nodes]; nodes],
        };
        let links = (0..nodes).flat_map(|from| (0..nodes).map(move |to| (from, to)));
        for (bit, (from, to)) in links.filter(|(from, to)| from != to).enumerate() {
            shape.cut[from][to] = mask >> bit & 1 == 1;
        }
        shape
    }

    /// Nodes on different sides hear nothing of each other; `side[node]`.
    fn split(side: &[usize]) -> Self {
        let cut = |from: usize| (0..side.len()).map(|to| side[from] != side[to]).collect();
        Self {
            cut: (0..side.len()).map(cut).collect(),
        }
    }

    /// True if these two hear each other.
    fn both_ways(&self, a: usize, b: usize) -> bool {
        !self.cut[a][b] && !self.cut[b][a]
    }

    /// The sides, if every node hears exactly those of its own side, both ways.
    fn sides(&self) -> Option<Vec<BTreeSet<NodeNumber>>> {
        let nodes = self.cut.len();
        let side = |a: usize| -> BTreeSet<NodeNumber> {
            (0..nodes)
                .filter(|b| self.both_ways(a, *b))
                .map(|b| b as NodeNumber + 1)
                .collect()
        };
        let all: BTreeSet<BTreeSet<NodeNumber>> = (0..nodes).map(side).collect();
        let disjoint = all.iter().map(BTreeSet::len).sum::<usize>() == nodes;
        let mutual = (0..nodes).all(|a| (0..nodes).all(|b| self.cut[a][b] == self.cut[b][a]));
        (disjoint && mutual).then(|| all.into_iter().collect())
    }

    /// `1>2 3>1`: the links that carry nothing.
    fn name(&self) -> String {
        let nodes = self.cut.len();
        let links = (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b)));
        let cut: Vec<String> = links
            .filter(|(a, b)| self.cut[*a][*b])
            .map(|(a, b)| format!("{}>{}", a + 1, b + 1))
            .collect();
        if cut.is_empty() { "none".into() } else { cut.join(" ") }
    }

    /// The rules of a bridge that drop what the cut links would carry.
    fn rules(&self) -> String {
        let nodes = self.cut.len();
        let links = (0..nodes).flat_map(|a| (0..nodes).map(move |b| (a, b)));
        links
            .filter(|(a, b)| self.cut[*a][*b])
            .map(|(a, b)| drop_rule(&node_port(a), &node_port(b)))
            .collect()
    }
}

fn node_port(index: usize) -> String {
    format!("p{}", index + 1)
}

fn drop_rule(from: &str, to: &str) -> String {
    format!("iifname \"{from}\" oifname \"{to}\" drop; ")
}

/// Cuts `of_three` of the 64 shapes of three nodes, `of_five` shapes of five, and `held` (at most 3) clean splits of three with clients on the sides.
///
/// # Errors
/// The farm does not start or does not merge, or `say` ends the run.
pub fn run(seed: u64, of_three: usize, of_five: usize, held: usize, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("partition", seed);
    let mut random = Random::new(seed);
    let mut table = Table::new(
        "Shapes of split networks seen by clients that reach all nodes",
        &[
            "nodes",
            "shapes",
            "clean splits",
            "probes",
            "answered by two that hear each other",
            "flows unserved",
            "sides not as they should be",
            "merge p50, ms",
            "merge max, ms",
        ],
    );
    let mut masks: Vec<u64> = (0..64).collect();
    let three: Vec<Shape> = (0..of_three.min(64))
        .map(|_| Shape::of_mask(3, masks.swap_remove(random.below(masks.len()))))
        .collect();
    let five: Vec<Shape> = (0..of_five)
        .map(|index| {
            if index % 2 == 0 {
                Shape::split(&(0..5).map(|_| random.below(3)).collect::<Vec<_>>())
            } else {
                // About one link in three.
                let mask = random.next() & random.next() | random.next() & random.next() & random.next();
                Shape::of_mask(5, mask)
            }
        })
        .collect();
    for (nodes, shapes) in [(3, three), (5, five)] {
        if shapes.is_empty() {
            continue;
        }
        say(&format!("{nodes} nodes, {} shapes", shapes.len()))?;
        let rig = Rig::serve(&RigConfig::new(nodes, PROFILES[0]))?;
        let pinger = Pinger::start(&rig.clients(), &[Rig::udp()[1]], 4, 1000)?;
        let (mut sum, mut merges) = (Seen::default(), Vec::new());
        for shape in &shapes {
            let (seen, merge) = cut(&rig, &pinger, shape, PROFILES[0])?;
            let name = shape.name();
            if seen.doubles > 0 {
                outcome.violations.push(format!(
                    "partition, {nodes} nodes, {name}: {} probes were answered by two nodes that hear each other",
                    seen.doubles
                ));
            }
            if seen.wrong > 0 {
                outcome.violations.push(format!(
                    "partition, {nodes} nodes, clean split {name}: {} flows were not served by one node of each side",
                    seen.wrong
                ));
            } else if seen.silent > 0 {
                outcome.missed.push(format!(
                    "partition, {nodes} nodes, {name}: {} flows unserved while it lasted",
                    seen.silent
                ));
            }
            sum.add(&seen);
            merges.push(ms(merge));
            say("")?;
        }
        pinger.stop()?;
        rig.note_plane(&mut outcome);
        table.row([
            nodes.to_string(),
            shapes.len().to_string(),
            shapes
                .iter()
                .filter(|shape| shape.sides().is_some())
                .count()
                .to_string(),
            sum.probes.to_string(),
            sum.doubles.to_string(),
            sum.silent.to_string(),
            sum.wrong.to_string(),
            cell_ms(quantile(&merges, 0.5)),
            cell_ms(quantile(&merges, 1.0)),
        ]);
        say(&table.rows.last().map(|row| row.join("  ")).unwrap_or_default())?;
    }
    // A part that was not asked for has no table.
    if of_three + of_five > 0 {
        outcome.tables.push(table);
    }
    if held > 0 {
        hold_through_splits(&mut outcome, held, say)?;
    }
    Ok(outcome)
}

#[derive(Clone, Copy, Default)]
struct Seen {
    probes: usize,
    doubles: usize,
    silent: usize,
    wrong: usize,
}

impl Seen {
    fn add(&mut self, other: &Self) {
        self.probes += other.probes;
        self.doubles += other.doubles;
        self.silent += other.silent;
        self.wrong += other.wrong;
    }
}

/// One shape: what was seen while it lasted, and how long the merge took.
fn cut(rig: &Rig, pinger: &Pinger, shape: &Shape, profile: Profile) -> Result<(Seen, Duration)> {
    pinger.learn(Duration::from_secs(10))?;
    pinger.forget();
    rig.lab.switch.nft(&format!(
        "table bridge part {{ chain c {{ type filter hook forward priority -300; {} }}; }}\n",
        shape.rules()
    ))?;
    // Detection, and the two round trips after it many times over; a busy machine gets more, as long as it still changes.
    std::thread::sleep(profile.detection() * 3);
    let mut seen = Seen::default();
    let settled = wait_until(Duration::from_secs(10), "a settled split", || {
        let changing = pinger.look(|probes| judge(shape, pinger.flows().len(), probes));
        seen.doubles += changing.doubles;
        seen.probes += changing.probes;
        pinger.forget();
        std::thread::sleep(Duration::from_millis(300));
        let now = pinger.look(|probes| judge(shape, pinger.flows().len(), probes));
        (now.silent + now.wrong == 0).then_some(())
    });
    let last = pinger.look(|probes| judge(shape, pinger.flows().len(), probes));
    seen.add(&last);
    if settled.is_ok() {
        (seen.silent, seen.wrong) = (0, 0);
    }
    let healed = Instant::now();
    rig.lab.switch.nft("delete table bridge part\n")?;
    // What status says of the others is as old as their last heartbeat: one pulse more, and it is of after the healing.
    std::thread::sleep(Duration::from_millis(profile.pulse_ms));
    rig.wait_all()?;
    Ok((seen, healed.elapsed()))
}

/// Compares answers with what the shape allows.
fn judge(shape: &Shape, flows: usize, probes: &[Probe]) -> Seen {
    let mut by_flow: Vec<BTreeSet<NodeNumber>> = vec![BTreeSet::new(); flows];
    let mut asked = vec![0; flows];
    let mut seen = Seen {
        probes: probes.len(),
        ..Seen::default()
    };
    for probe in probes {
        asked[probe.flow] += 1;
        let nodes: Vec<usize> = probe.answers.iter().map(|(_, node)| usize::from(*node) - 1).collect();
        let pair = |(i, a): (usize, &usize)| nodes[i + 1..].iter().any(|b| a == b || shape.both_ways(*a, *b));
        seen.doubles += usize::from(nodes.iter().enumerate().any(pair));
        by_flow[probe.flow].extend(probe.answers.iter().map(|(_, node)| *node));
    }
    // A flow that was hardly asked tells nothing.
    let told = || by_flow.iter().zip(&asked).filter(|(_, asked)| **asked >= 3);
    seen.silent = told().filter(|(nodes, _)| nodes.is_empty()).count();
    if let Some(sides) = shape.sides() {
        let right = |nodes: &BTreeSet<NodeNumber>| sides.iter().all(|side| side.intersection(nodes).count() == 1);
        seen.wrong = told().filter(|(nodes, _)| !right(nodes)).count();
    }
    seen
}

/// The second part.
fn hold_through_splits(outcome: &mut Outcome, held: usize, say: Progress<'_>) -> Result<()> {
    let mut table = Table::new(
        "Clean splits of three nodes with a client on each side: established connections with servers of the client's own side, and with those of the other side",
        &[
            "split",
            "held before",
            "own side",
            "own side broken",
            "other side",
            "other side ended",
            "opened in the split",
            "broken at the merge",
        ],
    );
    let rig = Rig::serve(&RigConfig {
        clients: 2,
        ..RigConfig::new(3, PROFILES[0])
    })?;
    for lone in 0..held.min(3) {
        let mut side = [0; 3];
        side[lone] = 1;
        let shape = Shape::split(&side);
        let crowd = |count| -> Result<Vec<Crowd>> {
            rig.clients()
                .into_iter()
                .map(|client| {
                    let config = CrowdConfig {
                        to: Rig::tcp().to_vec(),
                        count,
                        pause: PAUSE,
                        replace: false,
                    };
                    Crowd::start(client, config)
                })
                .collect()
        };
        let full = |crowds: &[Crowd]| {
            crowds
                .iter()
                .try_for_each(|crowd| crowd.wait_full(Duration::from_secs(30)))
        };
        let before = crowd(HELD)?;
        full(&before)?;
        // What is opened in the last pulse before a split may be answered by both sides (PROTOCOL.md): not judged here.
        std::thread::sleep(PROFILES[0].detection());
        // The first client is on side 0, the second one on side 1.
        let ports = [CLIENT_PORT.to_owned(), client_port(1)];
        let mut rules = shape.rules();
        for (client, port) in ports.iter().enumerate() {
            for (node, side) in side.iter().enumerate().filter(|(_, side)| **side != client) {
                let _ = side;
                rules.push_str(&drop_rule(port, &node_port(node)));
                rules.push_str(&drop_rule(&node_port(node), port));
            }
        }
        rig.lab.switch.nft(&format!(
            "table bridge part {{ chain c {{ type filter hook forward priority -300; {rules} }}; }}\n"
        ))?;
        std::thread::sleep(PROFILES[0].detection() * 3);
        let during = crowd(HELD / 4)?;
        full(&during)?;
        std::thread::sleep(Duration::from_millis(500));
        rig.lab.switch.nft("delete table bridge part\n")?;
        std::thread::sleep(Duration::from_millis(PROFILES[0].pulse_ms));
        rig.wait_all()?;
        std::thread::sleep(Duration::from_secs(2));
        let on_side = |client: usize, node: NodeNumber| side[usize::from(node) - 1] == client;
        let (mut own, mut own_broken, mut other, mut other_ended, mut new, mut new_broken) = (0, 0, 0, 0, 0, 0);
        for (client, crowd) in before.into_iter().enumerate() {
            for life in crowd.stop()? {
                let broken = usize::from(life.broken.is_some());
                if on_side(client, life.node) {
                    own += 1;
                    own_broken += broken;
                } else {
                    other += 1;
                    other_ended += broken;
                }
            }
        }
        for crowd in during {
            for life in crowd.stop()? {
                new += 1;
                new_broken += usize::from(life.broken.is_some());
            }
        }
        let name = format!("node{} alone", lone + 1);
        if own_broken + new_broken > 0 {
            outcome.violations.push(format!(
                "partition, {name}: {own_broken} of {own} connections with servers of the client's side broke, and {new_broken} of {new} opened in the split"
            ));
        }
        table.row([
            name,
            (own + other).to_string(),
            own.to_string(),
            own_broken.to_string(),
            other.to_string(),
            other_ended.to_string(),
            new.to_string(),
            new_broken.to_string(),
        ]);
        say(&table.rows.last().map(|row| row.join("  ")).unwrap_or_default())?;
    }
    rig.note_plane(outcome);
    outcome.tables.push(table);
    outcome.notes.push(format!(
        "Both sides serve (`serve`). The address of the first part is {VIP2}, `vmac_invisible`; the second part uses both."
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_split_has_its_sides_and_a_one_way_cut_has_none() {
        let sides = Shape::split(&[0, 1, 0]).sides().unwrap();
        assert_eq!(sides, [BTreeSet::from([1, 3]), BTreeSet::from([2])]);
        assert_eq!(Shape::of_mask(3, 0).sides().unwrap().len(), 1);
        assert_eq!(Shape::of_mask(3, 1).sides(), None);
        // 1 and 2 do not hear each other, 3 hears both.
        assert_eq!(Shape::of_mask(3, 0b101).name(), "1>2 2>1");
        assert_eq!(Shape::of_mask(3, 0b101).sides(), None);
    }

    #[test]
    fn two_answers_count_only_from_nodes_that_hear_each_other() {
        let shape = Shape::split(&[0, 1, 0]);
        let now = Instant::now();
        let probe = |nodes: &[NodeNumber]| Probe {
            flow: 0,
            sent: now,
            answers: nodes.iter().map(|node| (now, *node)).collect(),
        };
        assert_eq!(judge(&shape, 1, &[probe(&[1, 2])]).doubles, 0);
        assert_eq!(judge(&shape, 1, &[probe(&[1, 3])]).doubles, 1);
        assert_eq!(judge(&shape, 1, &[probe(&[1, 1])]).doubles, 1);
        let each = |nodes: &[NodeNumber]| judge(&shape, 1, &vec![probe(nodes); 3]);
        assert_eq!((each(&[1, 2]).wrong, each(&[1]).wrong, each(&[1, 3]).wrong), (0, 1, 1));
        assert_eq!(each(&[]).silent, 1);
    }
}
