//! farmd at rest: its memory, by what it is for, and the processor time that it takes with nothing to do but to stay a farm.
//!
//! Nodes serve both modes with a checker each second and no clients. What the kernel does for farmd's heartbeats in farmd's name counts as farmd's.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Effort, Figure, Goals};
use crate::config::{LabConfig, Mode, VIP, VIP2, Vip};
use crate::outcome::{Outcome, Progress, Table};
use crate::{Lab, Node};

/// Name of the part.
pub const NAME: &str = "rest";

/// Nodes of the farm.
const NODES: usize = 8;

/// Goals: MiB in memory, and percent of a processor.
const MEMORY: f64 = 12.0;
const PROCESSOR: f64 = 1.0;

/// What a mapping is for, in the order of the table.
const KINDS: [&str; 5] = [
    "program and libraries",
    "packet rings",
    "heap",
    "stacks and other anonymous",
    "other",
];

/// Measures a farm for each data plane.
///
/// # Errors
/// The farm does not start, or /proc does not say what is asked.
pub fn run(effort: Effort, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new(NAME, 0);
    let window = Duration::from_secs(effort.seconds(20, 3));
    let mut table = Table::new(
        &format!(
            "One farmd of {NODES} nodes at rest: MiB in memory (median of the nodes, with the least and the most; `Rss` of its mappings), and processor time \
             in {} s",
            window.as_secs()
        ),
        &[
            "data plane",
            "in memory",
            KINDS[0],
            KINDS[1],
            KINDS[2],
            KINDS[3],
            KINDS[4],
            "own alone (Pss)",
            "% of a processor",
        ],
    );
    let mut goals = Goals::new();
    for plane in effort.pick(&["auto", "raw"][..], &["auto"][..]) {
        say(&format!("{NODES} nodes, data plane {plane}"))?;
        let lab = Lab::serve(LabConfig {
            nodes: NODES,
            client_addrs: 1,
            vips: vec![Vip::new(VIP, Mode::Directed), Vip::new(VIP2, Mode::Invisible)],
            plane,
            ..LabConfig::default()
        })?;
        let begun = Instant::now();
        let before = lab.nodes.iter().map(processor_time).collect::<Result<Vec<_>>>()?;
        while begun.elapsed() < window {
            say("")?;
            std::thread::sleep(Duration::from_millis(100));
        }
        let after = lab.nodes.iter().map(processor_time).collect::<Result<Vec<_>>>()?;
        let took = begun.elapsed().as_secs_f64();
        let shares = after.iter().zip(&before).map(|(after, before)| {
            let used = after.saturating_sub(*before);
            used.as_secs_f64() / took * 100.0
        });
        let shares = Figure::of(&shares.collect::<Vec<_>>());
        let memory = lab.nodes.iter().map(memory).collect::<Result<Vec<_>>>()?;
        let mib = |pick: &dyn Fn(&Memory) -> u64| {
            let all: Vec<f64> = memory.iter().map(|of| pick(of) as f64 / 1024.0).collect();
            Figure::of(&all)
        };
        let all = mib(&|of| of.resident());
        let mut row = vec![(*plane).to_owned(), all.text(1)];
        row.extend(KINDS.map(|kind| format!("{:.1}", mib(&|of| of.by_kind.get(kind).copied().unwrap_or(0)).median)));
        row.push(format!("{:.1}", mib(&|of| of.proportional).median));
        row.push(shares.text(2));
        table.row(row);
        goals.at_most(&format!("MiB in memory, data plane {plane}"), MEMORY, all.median, 1);
        goals.at_most(
            &format!("% of a processor, data plane {plane}"),
            PROCESSOR,
            shares.median,
            2,
        );
    }
    outcome.tables.push(table);
    outcome.notes.push(
        "`Rss` counts pages of the program's file that the page cache has anyway; with several farmd on one machine, as here, they share them, and `Pss` \
         has only a part of them."
            .to_owned(),
    );
    goals.conclude(&mut outcome);
    Ok(outcome)
}

/// Processor time of all threads of a node's farmd so far.
fn processor_time(node: &Node) -> Result<Duration> {
    let pid = node.farmd_pid().context("farmd runs")?;
    let mut nanos = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let file = task?.path().join("schedstat");
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let first = text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
        nanos += first.with_context(|| format!("{}: {text}", file.display()))?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// KiB of a process.
#[derive(Default, PartialEq, Debug)]
struct Memory {
    by_kind: BTreeMap<&'static str, u64>,
    proportional: u64,
}

impl Memory {
    fn resident(&self) -> u64 {
        self.by_kind.values().sum()
    }
}

fn memory(node: &Node) -> Result<Memory> {
    let pid = node.farmd_pid().context("farmd runs")?;
    let file = format!("/proc/{pid}/smaps");
    Ok(read_smaps(
        &fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?,
    ))
}

/// proc_pid_smaps(5): for each mapping a line with its range and name, then one for each figure.
fn read_smaps(text: &str) -> Memory {
    let mut memory = Memory::default();
    let mut kind = KINDS[4];
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        let number = || line.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
        match first {
            "Rss:" => *memory.by_kind.entry(kind).or_default() += number().unwrap_or(0),
            "Pss:" => memory.proportional += number().unwrap_or(0),
            range if range.contains('-') && !range.ends_with(':') => kind = kind_of(words.nth(4).unwrap_or_default()),
            _ => {}
        }
    }
    memory
}

/// What a mapping of this name is for.
fn kind_of(name: &str) -> &'static str {
    match name {
        "" => KINDS[3],
        "[heap]" => KINDS[2],
        _ if name.starts_with("[stack") || name.starts_with("[anon") => KINDS[3],
        _ if name.starts_with("socket:") => KINDS[1],
        _ if name.starts_with('/') => KINDS[0],
        _ => KINDS[4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mapping_counts_as_what_its_name_says() {
        let mapping = |name: &str, rss: u64| {
            format!(
                "5581e000-5591e000 r--p 00000000 fe:00 123 {name}\nSize: 4 kB\nRss: {rss} kB\nPss: {} kB\n",
                rss / 2
            )
        };
        let text: String = [
            mapping("/usr/sbin/farmd", 100),
            mapping("[heap]", 20),
            mapping("", 30),
            mapping("[stack]", 2),
            mapping("socket:[77]", 4000),
            mapping("anon_inode:bpf-map", 4),
        ]
        .concat();
        let memory = read_smaps(&text);
        assert_eq!(KINDS.map(|kind| memory.by_kind[kind]), [100, 4000, 20, 32, 4]);
        assert_eq!((memory.resident(), memory.proportional), (4156, 2078));
    }

    #[test]
    fn our_own_mappings_are_read() {
        let memory = read_smaps(&fs::read_to_string("/proc/self/smaps").unwrap());
        assert!(memory.by_kind[KINDS[0]] > 0 && memory.resident() >= memory.proportional);
    }
}
