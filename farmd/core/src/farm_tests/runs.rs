//! Many independent runs on all processors: which seeds, what was done in them, and how a failed one is replayed.
//!
//! `FARM_RUNS=n` runs that many seeds; `FARM_SEED=n` runs one, with its trace. A failure prints the command that replays it.

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::faults;
use super::promises::Breach;
use super::sim::Sim;

/// Most failures shown in full.
const SHOWN: usize = 5;

/// What was done in some runs.
#[derive(Clone, Copy, PartialEq, Default, Debug)]
pub struct Tally {
    runs: u64,
    events: u64,
    datagrams: u64,
    lost: u64,
    doubled: u64,
    late: u64,
    actions: u64,
    maps: u64,
    moved: u64,
    connections: u64,
    reset_apart: u64,
    busiest: usize,
}

impl Tally {
    /// What was done in one run.
    pub fn of(sim: &Sim) -> Self {
        let traffic = sim.net.traffic;
        Self {
            runs: 1,
            events: sim.events(),
            datagrams: traffic.sent,
            lost: traffic.lost,
            doubled: traffic.doubled,
            late: traffic.late,
            actions: sim.actions,
            maps: sim.maps,
            moved: sim.moved,
            connections: sim.connected,
            reset_apart: sim.reset_apart,
            busiest: sim.busiest,
        }
    }

    fn add(&mut self, other: Self) {
        self.runs += other.runs;
        self.events += other.events;
        self.datagrams += other.datagrams;
        self.lost += other.lost;
        self.doubled += other.doubled;
        self.late += other.late;
        self.actions += other.actions;
        self.maps += other.maps;
        self.moved += other.moved;
        self.connections += other.connections;
        self.reset_apart += other.reset_apart;
        self.busiest = self.busiest.max(other.busiest);
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} runs, {} events, {} faults and commands; of {} datagrams {} lost, {} doubled, {} late; {} maps committed, {} buckets moved; \
             {} connections, {} reset by a server that could not know; at most {} heartbeats in a second",
            self.runs,
            self.events,
            self.actions,
            self.datagrams,
            self.lost,
            self.doubled,
            self.late,
            self.maps,
            self.moved,
            self.connections,
            self.reset_apart,
            self.busiest
        )
    }
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text}: a number is expected")),
    )
}

/// The seed that is to be replayed.
pub fn replayed() -> Option<u64> {
    number("FARM_SEED")
}

/// Runs `run` for the seeds from 0 on: `count` of them, or as many as `FARM_RUNS` says if `more`, or only `FARM_SEED`. `test` is the name of the test.
///
/// # Panics
/// If a run fails, with the command that replays it.
pub fn run_all(test: &str, count: u64, more: bool, run: impl Fn(u64) -> Result<Tally, Breach> + Sync) {
    let count = number("FARM_RUNS").filter(|_| more).unwrap_or(count);
    let seeds = replayed().map_or(0..count, |seed| seed..seed + 1);
    let began = Instant::now();
    let next = AtomicU64::new(seeds.start);
    let done = Mutex::new((Tally::default(), Vec::new()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let result = run(seed);
            let mut done = done.lock().unwrap();
            match result {
                Ok(tally) => done.0.add(tally),
                Err(breach) => done.1.push((seed, breach)),
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let (tally, mut failed) = done.into_inner().unwrap();
    // Not by println, which the test harness keeps to itself.
    let line = format!(
        "{test}: {tally}; {} failed; {:.1} s\n",
        failed.len(),
        began.elapsed().as_secs_f64()
    );
    drop(std::io::stderr().write_all(line.as_bytes()));
    failed.sort_by_key(|(seed, _)| *seed);
    let release = if cfg!(debug_assertions) { "" } else { " --release" };
    let shown = failed.iter().take(SHOWN).map(|(seed, Breach(text))| {
        format!("{text}\n  replay: FARM_SEED={seed} cargo test{release} -p farm-core --lib {test} -- --exact\n")
    });
    let shown: String = shown.collect();
    assert!(
        failed.is_empty(),
        "{} of {} runs failed\n{shown}",
        failed.len(),
        seeds.end - seeds.start
    );
}

/// Everything that happens in the random runs of some seeds of each kind: every datagram with all of its bytes, every plan, turn, fault and command with its moment;
/// what the nodes say of it; the trace; and where chance has come to.
#[test]
fn a_seed_has_the_same_run_each_time() {
    let run = |seed: u64| {
        faults::run_of(seed, |sim| {
            sim.trace = Some(Vec::new());
            sim.record = Some(Vec::new());
        })
        .unwrap_or_else(|Breach(text)| panic!("seed {seed}: {text}"))
    };
    let mut events = 0;
    for seed in 0..20 {
        let (one, other) = (run(seed), run(seed));
        let (happened, again) = (one.record.as_deref().unwrap(), other.record.as_deref().unwrap());
        events += happened.len();
        if let Some(i) = (0..happened.len().max(again.len())).find(|i| happened.get(*i) != again.get(*i)) {
            panic!(
                "seed {seed}, event {i}: {:?} and then {:?}",
                happened.get(i),
                again.get(i)
            );
        }
        assert_eq!(one.log, other.log, "seed {seed}");
        assert_eq!(one.trace, other.trace, "seed {seed}");
        assert_eq!(one.rng, other.rng, "seed {seed}");
        assert_eq!(Tally::of(&one), Tally::of(&other), "seed {seed}");
        // It is seen if two runs differ.
        assert_ne!(one.record, run(seed + 5).record, "seeds {seed} and {}", seed + 5);
    }
    let line = format!("20 seeds, each run twice: {events} events, all the same\n");
    drop(std::io::stderr().write_all(line.as_bytes()));
}
