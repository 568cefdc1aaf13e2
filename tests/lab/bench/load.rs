//! Requests as a client sends them, and what it sees: rates by wrk(1), times one request after the other.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::Figure;
use crate::Client;
use crate::http::Connection;
use crate::process::run_limited;

/// Where web servers listen.
pub const WEB_PORT: u16 = 80;

/// How wrk keeps its 64 connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// One request after the other on each.
    Alive,
    /// A new one for each request.
    Never,
}

/// Requests per second as wrk counts them, from one thread with 64 connections.
///
/// # Errors
/// wrk is not there, or the server's answers are not what they should be.
pub fn wrk(client: &Client, to: Ipv4Addr, seconds: u64, keep: Keep) -> Result<f64> {
    let mut command = client.space().command("wrk");
    command.args(["-t1", "-c64", &format!("-d{seconds}s"), "--timeout", "5s"]);
    if keep == Keep::Never {
        command.args(["-H", "Connection: close"]);
    }
    command.arg(format!("http://{to}:{WEB_PORT}/who"));
    let finished = run_limited(command, Duration::from_secs(seconds + 20)).context("is the package wrk installed?")?;
    let line = finished
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("Requests/sec:"));
    let rate: Option<f64> = line.and_then(|text| text.trim().parse().ok());
    let rate = rate.filter(|rate| *rate > 0.0);
    let rate = rate.with_context(|| format!("wrk against {to} said: {}{}", finished.stdout, finished.stderr))?;
    // With `Connection: close` wrk counts some ends of its own connections as read errors; refused answers are never fine.
    if let Some(line) = finished.stdout.lines().find(|line| line.contains("Non-2xx")) {
        bail!("wrk against {to}: {}", line.trim());
    }
    Ok(rate)
}

/// Medians of one request at a time, in microseconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Times {
    /// On one connection that stays.
    pub request: f64,
    /// From the SYN of a new connection to the end of the answer.
    pub connection: f64,
}

/// Asks one request after the other, for `window` on one connection and for as long on new ones.
///
/// # Errors
/// A request that fails.
pub fn times(client: &Client, to: Ipv4Addr, window: Duration) -> Result<Times> {
    let source = client.addrs()[0];
    let to = SocketAddrV4::new(to, WEB_PORT);
    let work = async move || -> Result<Times> {
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
            let fresh = Connection::open(source, to, limit).await.map_err(broken)?;
            fresh.get_last("/who", limit).await.map_err(broken)?;
            connections.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        Ok(Times {
            request: Figure::of(&requests).median,
            connection: Figure::of(&connections).median,
        })
    };
    client.start(work)?.wait()?
}
