//! How long a client waits for its connection that begins to connect while its node is dead and nobody has taken over yet.
//!
//! Connections are begun all the time from many addresses. By the filter `on_addr` the UDP probes tell which address is whose, so the connections
//! that the dead node would have had are known.

use std::time::Duration;

use anyhow::{Context, Result};

use super::{MODES, Outcome, PROFILES, Progress, Rig, RigConfig, Series, Table, cell_ms, ms, quantile};
use crate::pinger::Pinger;
use crate::random::Random;
use crate::requester::Requester;

/// New connections a second over all clients.
const RATE: u32 = 400;

/// Past the client's second retransmission, which is 3 s after its first try.
const LIMIT: Duration = Duration::from_secs(4);

/// Over the detection time, in milliseconds.
const GRACE: f64 = 100.0;

/// Crashes a node of three under new connections `crashes` times with each profile.
///
/// # Errors
/// The farm does not start or does not come back, or `say` ends the run.
pub fn run(seed: u64, crashes: usize, plane: Option<&'static str>, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new("connect", seed);
    let mut table = Table::new(
        "connect() of clients of a dead node, begun between the crash and the end of the detection time, in ms",
        &[
            "profile",
            "mode",
            "crashes",
            "connections",
            "not at all",
            "p50",
            "p99",
            "max",
            "goal p99",
        ],
    );
    let mut random = Random::new(seed);
    for profile in PROFILES {
        say(&format!("profile {}", profile.name))?;
        let goal = ms(profile.detection()) + GRACE;
        let config = RigConfig {
            filter: "on_addr",
            addrs: 8,
            plane,
            ..RigConfig::new(3, profile)
        };
        let seen = crash(&config, crashes, &mut random, &mut outcome, say)?;
        for ((mode, _), Seen { values, failed }) in MODES.iter().zip(seen) {
            let what = format!("connect, {}, {mode}", profile.name);
            table.row([
                profile.name.to_owned(),
                (*mode).to_owned(),
                crashes.to_string(),
                (values.len() + failed).to_string(),
                failed.to_string(),
                cell_ms(quantile(&values, 0.5)),
                cell_ms(quantile(&values, 0.99)),
                cell_ms(quantile(&values, 1.0)),
                cell_ms(goal),
            ]);
            say(&table.rows.last().map(|row| row.join("  ")).unwrap_or_default())?;
            outcome.judge_p99(&what, &values, goal);
            if failed > 0 {
                outcome
                    .missed
                    .push(format!("{what}: {failed} connections not made within {LIMIT:?}"));
            }
            outcome.series.push(Series {
                group: "connect".into(),
                name: format!("{}, {mode}", profile.name),
                values,
                goal: Some(goal),
            });
        }
    }
    outcome.tables.push(table);
    Ok(outcome)
}

/// Connections that a dead node would have had.
#[derive(Debug, Default)]
struct Seen {
    /// Milliseconds until each was made.
    values: Vec<f64>,
    /// Those that were not made.
    failed: usize,
}

/// Crashes nodes of a farm of its own; what each of [`MODES`] saw.
fn crash(
    config: &RigConfig,
    crashes: usize,
    random: &mut Random,
    outcome: &mut Outcome,
    say: Progress<'_>,
) -> Result<[Seen; 2]> {
    let (profile, rig) = (config.profile, Rig::serve(config)?);
    let pinger = Pinger::start(&rig.clients(), &Rig::udp(), 1, 500)?;
    let mut seen: [Seen; 2] = Default::default();
    for _ in 0..crashes {
        let owners = pinger.learn(Duration::from_secs(10))?;
        let victim = *random.pick(&owners).context("no flow is probed")?;
        let flows = pinger.flows().iter().zip(&owners);
        let orphans: Vec<_> = flows
            .filter(|(_, owner)| **owner == victim)
            .map(|(flow, _)| (flow.source, *flow.to.ip()))
            .collect();
        let clients = rig.clients();
        let share = RATE / clients.len() as u32;
        let streams: Vec<Requester> = clients
            .iter()
            .map(|client| Requester::start(client, &Rig::tcp(), share, LIMIT))
            .collect::<Result<_>>()?;
        std::thread::sleep(Duration::from_millis(200) + random.up_to(Duration::from_millis(100)));
        let node = rig.node(victim)?;
        let at = node.crash()?;
        std::thread::sleep(profile.detection() * 2);
        for stream in streams {
            for request in stream.stop()? {
                let mode = MODES.iter().position(|(_, vip)| vip == request.to.ip());
                let orphan = orphans.contains(&(request.source, *request.to.ip()));
                let begun = request.begun.checked_duration_since(at);
                if let (Some(mode), true, Some(begun)) = (mode, orphan, begun)
                    && begun <= profile.detection()
                {
                    match request.connected {
                        Some(time) => seen[mode].values.push(ms(time)),
                        None => seen[mode].failed += 1,
                    }
                }
            }
        }
        rig.bring_back(&[node])?;
        say("")?;
    }
    rig.note_plane(outcome);
    Ok(seen)
}
