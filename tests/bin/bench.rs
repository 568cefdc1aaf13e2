//! `farm-lab bench`: the farm against one server alone and against HAProxy, interleaved in one run.
//!
//! Owns the paths, the order (the straight path first and last in every round, so that drift of the machine shows) and the
//! arithmetic of ratios. Absolute figures belong to the machine; ratios to the straight path of the same round are what counts.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use farm_lab::config::{Group, LabConfig, Mode, VIP, VIP2, Vip};
use farm_lab::http::Connection;
use farm_lab::process::{run_limited, spawn_kept, with_parent_death};
use farm_lab::{Lab, Space, add_host, wait_until};
use serde::Serialize;

use crate::screen::Screen;
use crate::stop;

/// Where HAProxy listens.
const PROXY: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 90);

const STRAIGHT: &str = "straight to one nginx";

/// One measurement of one path.
#[derive(Clone, Serialize)]
struct Sample {
    round: usize,
    path: &'static str,
    requests_per_s: f64,
    connections_per_s: f64,
    /// One keep-alive connection, one request at a time.
    request_p50_us: f64,
    /// One new connection at a time, from SYN to the end of the answer.
    connection_p50_us: f64,
}

/// Median and extremes of one figure of one path.
#[derive(Clone, Copy, Serialize)]
struct Figure {
    median: f64,
    least: f64,
    most: f64,
}

#[derive(Serialize)]
struct Row {
    path: &'static str,
    requests_per_s: Figure,
    requests_ratio: Figure,
    connections_per_s: Figure,
    connections_ratio: Figure,
    request_p50_us: Figure,
    added_request_p50_us: Figure,
    added_connection_p50_us: Figure,
}

/// A farm of three with both modes, judged by `plane`.
fn farm(plane: &'static str) -> Result<Lab> {
    eprintln!("building the farm, data plane {plane} ...");
    Lab::serve(LabConfig {
        vips: vec![Vip::new(VIP, Mode::Directed), Vip::new(VIP2, Mode::Invisible)],
        // By port: wrk has one address, and all nodes are to share its load.
        groups: vec![Group::tcp("web", 80, "on_port")],
        plane,
        ..LabConfig::default()
    })
}

/// Measures and prints; always true when it could measure.
pub fn run(rounds: usize, seconds: u64, json: Option<&Path>) -> Result<bool> {
    let in_kernel = farm("bpf")?;
    let captured = farm("raw")?;
    let proxy_space = add_host(&in_kernel, "proxy", "ph", PROXY)?;
    let mut proxy = start_proxy(&in_kernel, &proxy_space)?;
    let paths: [(&'static str, &Lab, Ipv4Addr); 6] = [
        (STRAIGHT, &in_kernel, in_kernel.nodes[0].addr()),
        ("farm bpf, vmac_directed", &in_kernel, VIP),
        ("farm bpf, vmac_invisible", &in_kernel, VIP2),
        ("farm raw, vmac_directed", &captured, VIP),
        ("farm raw, vmac_invisible", &captured, VIP2),
        ("HAProxy, TCP, 2 threads", &in_kernel, PROXY),
    ];
    let mut samples = Vec::new();
    for round in 1..=rounds {
        // The straight path once more at the end of the round.
        for (path, lab, addr) in paths.iter().chain(&paths[..1]) {
            stop::check()?;
            eprintln!("round {round}/{rounds}: {path}");
            samples.push(measure(lab, round, path, *addr, seconds)?);
        }
    }
    let _ = proxy.kill();
    let _ = proxy.wait();
    let rows: Vec<Row> = paths.iter().map(|(path, ..)| row(path, &samples)).collect();
    print_rows(&rows, rounds, seconds);
    if let Some(file) = json {
        let all = serde_json::json!({ "rounds": rounds, "seconds": seconds, "rows": rows, "samples": samples });
        fs::write(file, serde_json::to_string_pretty(&all)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(true)
}

fn start_proxy(lab: &Lab, space: &Space) -> Result<Child> {
    let file = lab.base().join("haproxy.cfg");
    let mut text = format!(
        "global\n  nbthread 2\n  maxconn 8000\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
         listen web\n  bind {PROXY}:80\n  balance roundrobin\n"
    );
    for node in &lab.nodes {
        text.push_str(&format!("  server {} {}:80\n", node.name(), node.addr()));
    }
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    let mut command = with_parent_death("haproxy");
    let log = fs::File::create(lab.base().join("haproxy.log"))?;
    command
        .args(["-db", "-f"])
        .arg(&file)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    space.enter(&mut command);
    let mut child = spawn_kept(command).context("cannot start haproxy; is its package installed?")?;
    let source = lab.client.addrs()[0];
    let answers = wait_until(Duration::from_secs(10), "HAProxy to answer", || {
        // Through a proxy the servers see the proxy's address, so this is not one of the lab's own checks.
        let get = async move || {
            let limit = Duration::from_secs(1);
            Connection::open(source, SocketAddrV4::new(PROXY, 80), limit)
                .await
                .ok()?
                .get("/who", limit)
                .await
                .ok()
        };
        lab.client.start(get).ok()?.wait().ok()?
    });
    if let Err(error) = answers {
        let _ = child.kill();
        let _ = child.wait();
        bail!(
            "{error}: {}",
            fs::read_to_string(lab.base().join("haproxy.log")).unwrap_or_default()
        );
    }
    Ok(child)
}

fn measure(lab: &Lab, round: usize, path: &'static str, addr: Ipv4Addr, seconds: u64) -> Result<Sample> {
    let to = SocketAddrV4::new(addr, 80);
    let requests_per_s = wrk(lab, to, seconds, &[])?;
    let connections_per_s = wrk(lab, to, seconds, &["-H", "Connection: close"])?;
    let source = lab.client.addrs()[0];
    let window = Duration::from_secs(1);
    let (requests, connections) = lab
        .client
        .start(async move || -> Result<(Vec<f64>, Vec<f64>)> {
            let limit = Duration::from_secs(2);
            let broken = |failure| anyhow::anyhow!("{to}: {failure}");
            let mut kept = Connection::open(source, to, limit).await.map_err(broken)?;
            let (mut requests, mut connections) = (Vec::new(), Vec::new());
            let end = Instant::now() + window;
            while Instant::now() < end {
                let begun = Instant::now();
                kept.get("/who", limit).await.map_err(broken)?;
                requests.push(begun.elapsed().as_secs_f64() * 1e6);
            }
            let end = Instant::now() + window;
            while Instant::now() < end {
                let begun = Instant::now();
                Connection::open(source, to, limit)
                    .await
                    .map_err(broken)?
                    .get_last("/who", limit)
                    .await
                    .map_err(broken)?;
                connections.push(begun.elapsed().as_secs_f64() * 1e6);
            }
            Ok((requests, connections))
        })?
        .wait()??;
    Ok(Sample {
        round,
        path,
        requests_per_s,
        connections_per_s,
        request_p50_us: figure(requests).median,
        connection_p50_us: figure(connections).median,
    })
}

/// Requests per second as wrk(1) counts them.
fn wrk(lab: &Lab, to: SocketAddrV4, seconds: u64, more: &[&str]) -> Result<f64> {
    let mut command = lab.client.space().command("wrk");
    command
        .args(["-t1", "-c64", &format!("-d{seconds}s"), "--timeout", "5s"])
        .args(more)
        .arg(format!("http://{to}/who"));
    let finished = run_limited(command, Duration::from_secs(seconds + 20)).context("is the package wrk installed?")?;
    let line = finished
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"));
    let rate = line.and_then(|text| text.trim().parse().ok());
    let rate = rate.with_context(|| format!("wrk against {to} said: {}{}", finished.stdout, finished.stderr))?;
    // With `Connection: close` wrk counts some ends of its own connections as read errors; refused answers are never fine.
    if let Some(line) = finished.stdout.lines().find(|line| line.contains("Non-2xx")) {
        bail!("wrk against {to}: {}", line.trim());
    }
    Ok(rate)
}

fn row(path: &'static str, samples: &[Sample]) -> Row {
    let straight = |pick: fn(&Sample) -> f64| -> BTreeMap<usize, f64> {
        let mut rounds: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for sample in samples.iter().filter(|sample| sample.path == STRAIGHT) {
            rounds.entry(sample.round).or_default().push(pick(sample));
        }
        rounds
            .into_iter()
            .map(|(round, all)| (round, all.iter().sum::<f64>() / all.len() as f64))
            .collect()
    };
    let own = |pick: fn(&Sample) -> f64| figure(samples.iter().filter(|s| s.path == path).map(pick).collect());
    let against = |pick: fn(&Sample) -> f64, join: fn(f64, f64) -> f64| {
        let base = straight(pick);
        figure(
            samples
                .iter()
                .filter(|s| s.path == path)
                .map(|s| join(pick(s), base[&s.round]))
                .collect(),
        )
    };
    let ratio = |own: f64, base: f64| own / base;
    let excess = |own: f64, base: f64| own - base;
    Row {
        path,
        requests_per_s: own(|s| s.requests_per_s),
        requests_ratio: against(|s| s.requests_per_s, ratio),
        connections_per_s: own(|s| s.connections_per_s),
        connections_ratio: against(|s| s.connections_per_s, ratio),
        request_p50_us: own(|s| s.request_p50_us),
        added_request_p50_us: against(|s| s.request_p50_us, excess),
        added_connection_p50_us: against(|s| s.connection_p50_us, excess),
    }
}

fn figure(mut values: Vec<f64>) -> Figure {
    values.sort_by(f64::total_cmp);
    let median = match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    };
    Figure {
        median,
        least: values.first().copied().unwrap_or(f64::NAN),
        most: values.last().copied().unwrap_or(f64::NAN),
    }
}

fn print_rows(rows: &[Row], rounds: usize, seconds: u64) {
    let screen = Screen::new(0);
    println!("\nMedian of {rounds} interleaved rounds of {seconds} s; in brackets least and most.\n");
    screen.line(&format!(
        "{:<25} {:>9} {:>6}  {:>9} {:>6}",
        "", "req/s", "ratio", "conn/s", "ratio"
    ));
    for row in rows {
        screen.line(&format!(
            "{:<25} {:>9.0} {:>6.2}  {:>9.0} {:>6.2}",
            row.path,
            row.requests_per_s.median,
            row.requests_ratio.median,
            row.connections_per_s.median,
            row.connections_ratio.median
        ));
        screen.dim(&format!(
            "{:<25} {:>16}  {:>16}",
            "",
            spread(row.requests_ratio),
            spread(row.connections_ratio)
        ));
    }
    println!();
    screen.line(&format!(
        "{:<25} {:>12} {:>12} {:>16}",
        "one at a time, median", "request us", "added us", "added/new conn"
    ));
    for row in rows {
        screen.line(&format!(
            "{:<25} {:>12.0} {:>12.0} {:>16.0}",
            row.path,
            row.request_p50_us.median,
            whole(row.added_request_p50_us.median),
            whole(row.added_connection_p50_us.median)
        ));
    }
}

/// Rounded, without the sign that a small negative number would leave on its zero.
fn whole(value: f64) -> f64 {
    value.round() + 0.0
}

fn spread(figure: Figure) -> String {
    format!("({:.2}-{:.2})", figure.least, figure.most)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(round: usize, path: &'static str, rate: f64) -> Sample {
        Sample {
            round,
            path,
            requests_per_s: rate,
            connections_per_s: rate,
            request_p50_us: 1e6 / rate,
            connection_p50_us: 100.0,
        }
    }

    #[test]
    fn ratios_are_to_the_straight_path_of_the_same_round() {
        let samples = [
            sample(1, STRAIGHT, 90.0),
            sample(1, "farm", 50.0),
            sample(1, STRAIGHT, 110.0),
            sample(2, STRAIGHT, 200.0),
            sample(2, "farm", 150.0),
            sample(2, STRAIGHT, 200.0),
        ];
        let row = row("farm", &samples);
        assert_eq!((row.requests_ratio.least, row.requests_ratio.most), (0.5, 0.75));
        assert_eq!(row.requests_per_s.median, 100.0);
    }

    #[test]
    fn the_median_of_an_even_number_lies_between() {
        assert_eq!(figure(vec![4.0, 1.0, 3.0, 2.0]).median, 2.5);
    }
}
