//! `farm-lab demo`: the farm's main job, shown and judged.
//!
//! Owns the order of the show and the judgement of `--once`: every request before and after the failure was answered, all nodes
//! took part, and the others took over within two seconds. The web server is the one in `farm` (module `demo`).

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddrV4;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use farm_lab::client::{Batch, Report};
use farm_lab::probe::{Gap, ProbeConfig, ProbeReport, Prober};
use farm_lab::process::run as run_short;
use farm_lab::{Lab, LabConfig, Mode, Node, VIP};
use serde::Serialize;

use crate::screen::{Screen, picture_of};
use crate::stop;
use crate::up::hints;

const MODULE: &str = "demo";

/// Requests of the batches before and after.
const REQUESTS: usize = 600;

/// The longest takeover that counts as one.
const TAKEOVER: Duration = Duration::from_secs(2);

/// The last line of `--once`.
#[derive(Default, Serialize)]
struct Outcome {
    answered: usize,
    lost: usize,
    per_node: BTreeMap<String, usize>,
    failover_gap_ms: Option<u64>,
}

impl Outcome {
    fn add(&mut self, report: &Report) {
        self.answered += report.answered();
        self.lost += report.lost();
        for (node, count) in report.per_node() {
            *self.per_node.entry(node).or_default() += count;
        }
    }
}

/// The show; true if the farm did its job.
pub fn run(once: bool, nodes: usize, mode: Mode) -> Result<bool> {
    let mut screen = Screen::new(5);
    let mut outcome = Outcome::default();
    let mut faults = Vec::new();
    let shown = show(&mut screen, nodes, mode, &mut outcome, &mut faults);
    let lab = match shown {
        Ok(lab) => Some(lab),
        Err(error) => {
            stop::check()?;
            faults.push(format!("{error:#}"));
            None
        }
    };
    println!();
    if faults.is_empty() {
        screen.good("The farm did its job.");
    }
    for fault in &faults {
        screen.bad(&format!("Not as it should be: {fault}"));
    }
    if once {
        println!("{}", serde_json::to_string(&outcome)?);
    } else if let Some(lab) = lab {
        live(&screen, &lab)?;
    }
    Ok(faults.is_empty())
}

fn show(screen: &mut Screen, nodes: usize, mode: Mode, outcome: &mut Outcome, faults: &mut Vec<String>) -> Result<Lab> {
    let web = SocketAddrV4::new(VIP, 80);

    screen.step(&format!(
        "Build {nodes} servers, clients and a switch in network namespaces"
    ));
    let lab = Lab::new(LabConfig {
        nodes,
        ..LabConfig::with_mode(mode)
    })?;
    screen.quote(&picture_of(&lab));
    stop::check()?;

    screen.step("Start the farm");
    let begun = Instant::now();
    lab.start_daemons()?;
    for node in &lab.nodes {
        install(node, mode)?;
    }
    lab.start_module(MODULE)?;
    screen.line(&format!(
        "All {nodes} serve, {:.1} s after the first daemon was started.",
        begun.elapsed().as_secs_f64()
    ));
    screen.quote(&status(&lab.nodes[0])?);
    stop::check()?;

    screen.step(&format!(
        "{REQUESTS} requests from {} clients",
        lab.client.addrs().len()
    ));
    let before = lab.client.batch(Batch::new(web, REQUESTS))?;
    bars(screen, &lab, &before);
    judge_batch("before the failure", &before, faults);
    let silent: Vec<&str> = lab
        .nodes
        .iter()
        .map(Node::name)
        .filter(|n| !before.per_node().contains_key(*n))
        .collect();
    if !silent.is_empty() {
        faults.push(format!("{} answered nothing before the failure", silent.join(", ")));
    }
    outcome.add(&before);
    stop::check()?;

    screen.step("Cut the power of one server while clients keep asking");
    let victim = fail_over(screen, &lab, web, outcome, faults)?;
    let after = lab.client.batch(Batch::new(web, REQUESTS))?;
    bars(screen, &lab, &after);
    judge_batch("after the failure", &after, faults);
    outcome.add(&after);
    stop::check()?;

    screen.step(&format!("{} comes back", lab.nodes[victim].name()));
    let rejoin = come_back(screen, &lab, victim, web)?;
    judge_batch("while the server came back", &rejoin.report, faults);
    outcome.add(&rejoin.report);
    let last = lab.client.batch(Batch::new(web, REQUESTS))?;
    bars(screen, &lab, &last);
    judge_batch("after the return", &last, faults);
    outcome.add(&last);
    Ok(lab)
}

/// Puts the repository's module on `node`, in the asked mode.
fn install(node: &Node, mode: Mode) -> Result<()> {
    node.install_module(MODULE, &[("VIRTUAL_IP", &VIP.to_string()), ("PORT", "80")])?;
    let file = node.dirs().etc.join("modules").join(MODULE).join("conf/userconfig.xml");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let text = text.replace(Mode::Directed.as_str(), mode.as_str());
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Cuts the power of the server that has most of the probing clients; returns its position.
fn fail_over(
    screen: &Screen,
    lab: &Lab,
    web: SocketAddrV4,
    outcome: &mut Outcome,
    faults: &mut Vec<String>,
) -> Result<usize> {
    let config = ProbeConfig {
        limit: Duration::from_secs(3),
        ..ProbeConfig::new(web)
    };
    let turn = config.turn();
    let prober = Prober::start(&lab.client, config)?;
    stop::sleep(Duration::from_millis(1500))?;
    let busiest = prober.so_far().per_node().into_iter().max_by_key(|(_, count)| *count);
    let (name, _) = busiest.context("nobody answers the prober")?;
    let victim = lab.nodes.iter().position(|node| node.name() == name);
    let victim = victim.with_context(|| format!("an unknown server `{name}` answers"))?;
    screen.line(&format!("Off goes {name}: its link and every process on it, at once."));
    let entered = entry_of(lab)?.is_some_and(|entry| entry == name);
    lab.nodes[victim].power_off()?;
    stop::sleep(Duration::from_secs(3))?;
    let probe = prober.stop()?;
    outcome.add(&probe.report);

    let hit: Vec<Gap> = probe.gaps().into_iter().filter(|gap| gap.before == name).collect();
    let others: Vec<Gap> = probe.gaps().into_iter().filter(|gap| gap.before != name).collect();
    match hit.first() {
        Some(gap) => {
            outcome.failover_gap_ms = Some(gap.length().as_millis() as u64);
            let text = format!(
                "Its clients waited at most {} ms for the next answer.",
                gap.length().as_millis()
            );
            if gap.after.as_ref().is_some_and(|node| *node != name) && gap.length() < TAKEOVER {
                screen.good(&text);
            } else {
                screen.bad(&text);
                faults.push(format!(
                    "no takeover of {}'s clients within {TAKEOVER:?}: {gap:?}",
                    name
                ));
            }
        }
        None => faults.push(format!("no probing client was on {name}")),
    }
    if let Some(gap) = others.first() {
        // Each asks in its turn only, so that is what it waits for anyway.
        let extra = gap.length().saturating_sub(turn).as_millis();
        screen.line(&if entered {
            format!(
                "The clients of the others, whose packets came in by {name} too: at most {extra} ms more than usual."
            )
        } else {
            format!("The clients of the others: at most {extra} ms more than usual.")
        });
    }
    screen.dim(&format!(
        "{} of {} tries in these seconds were answered{}.",
        probe.report.answered(),
        probe.report.records.len(),
        if probe.report.lost() > 0 {
            "; the rest were on the dead server or given up"
        } else {
            ""
        }
    ));
    Ok(victim)
}

/// The server whose Ethernet address the clients, one host, use for the virtual IP; none where it is no server's own.
fn entry_of(lab: &Lab) -> Result<Option<&str>> {
    let shown = run_short(
        lab.client
            .space()
            .command("ip")
            .args(["neigh", "show", &VIP.to_string()]),
    )?;
    for node in &lab.nodes {
        if shown.contains(&node.mac()?) {
            return Ok(Some(node.name()));
        }
    }
    Ok(None)
}

fn come_back(screen: &Screen, lab: &Lab, victim: usize, web: SocketAddrV4) -> Result<ProbeReport> {
    let prober = Prober::start(
        &lab.client,
        ProbeConfig {
            limit: Duration::from_secs(3),
            ..ProbeConfig::new(web)
        },
    )?;
    let begun = Instant::now();
    lab.rejoin(victim, MODULE)?;
    let took = begun.elapsed();
    stop::sleep(Duration::from_secs(1))?;
    let probe = prober.stop()?;
    screen.line(&format!(
        "It has its share again {:.1} s after power-on.",
        took.as_secs_f64()
    ));
    let text = format!(
        "{} of {} requests answered meanwhile.",
        probe.report.answered(),
        probe.report.records.len()
    );
    if probe.report.lost() == 0 {
        screen.good(&text)
    } else {
        screen.bad(&text)
    }
    Ok(probe)
}

fn bars(screen: &Screen, lab: &Lab, report: &Report) {
    let counts = report.per_node();
    for node in &lab.nodes {
        screen.bar(
            node.name(),
            counts.get(node.name()).copied().unwrap_or(0),
            report.records.len(),
        );
    }
    screen.line(&format!(
        "{} of {} requests answered.",
        report.answered(),
        report.records.len()
    ));
}

fn judge_batch(when: &str, report: &Report, faults: &mut Vec<String>) {
    if report.lost() > 0 {
        let kinds: Vec<String> = report
            .failures()
            .iter()
            .map(|(kind, count)| format!("{count} {kind}"))
            .collect();
        faults.push(format!("{} requests lost {when}: {}", report.lost(), kinds.join(", ")));
    }
}

/// What `farm status` prints on `node`, whatever its exit code says about the farm.
fn status(node: &Node) -> Result<String> {
    let finished = node.farm(&["status"])?;
    Ok(if finished.stdout.trim().is_empty() {
        finished.stderr
    } else {
        finished.stdout
    })
}

/// The live table until a signal: who answers how much, and the way in for a curious person.
fn live(screen: &Screen, lab: &Lab) -> Result<()> {
    let web = SocketAddrV4::new(VIP, 80);
    println!("\nThe farm stays until Ctrl-C. Meanwhile, in another terminal:");
    screen.quote(&hints(lab)?);
    println!();
    let mut lines = 0;
    while !stop::asked() {
        for node in &lab.nodes {
            // A person cut the power from outside: it returns by itself.
            if node.init_pid().is_none() {
                node.power_off()?;
                node.power_on()?;
            }
            if node.farmd_pid().is_none() {
                node.start_farmd()?;
                node.wait_farmd(Duration::from_secs(10))?;
                node.farm(&["start", MODULE])?;
            }
        }
        let report = lab.client.batch(Batch {
            limit: Duration::from_secs(2),
            ..Batch::new(web, 100)
        })?;
        let first = lab
            .nodes
            .iter()
            .find(|node| node.farmd_pid().is_some())
            .context("no daemon runs")?;
        let mut text = status(first)?.trim_end().to_owned();
        for node in &lab.nodes {
            let count = report.per_node().get(node.name()).copied().unwrap_or(0);
            text.push_str(&format!(
                "\n{}",
                screen.bar_text(node.name(), count, report.records.len())
            ));
        }
        text.push_str(&format!(
            "\n{} of the last {} requests answered",
            report.answered(),
            report.records.len()
        ));
        if screen.is_terminal() {
            text = screen.folded(&text);
            screen.rewind(lines);
            lines = text.lines().count();
            screen.quote(&text);
        } else if lines == 0 {
            lines = 1;
            screen.quote(&text);
        }
        if stop::sleep(Duration::from_secs(1)).is_err() {
            break;
        }
    }
    println!("\nEnding; nothing stays behind.");
    Ok(())
}
