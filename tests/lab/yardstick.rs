//! What the machine itself costs: a plain host on the lab's network, asked in the same way and at the same time as the farm.
//!
//! Owns the host, its little web server and the prober that asks it. Nothing happens to the host, so whatever its clients wait for is the
//! scheduler's doing, and a measurement of the farm in the same time may be late by as much. Never judges: it reports one time.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::probe::{ProbeConfig, Prober};
use crate::space::Space;
use crate::{Lab, add_host};

/// Where the plain host is.
pub const PLAIN_HOST: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 18, 0, 90), 80);

/// The plain host of a lab; one is enough for many measurements.
#[derive(Debug)]
pub struct PlainHost {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    _space: Space,
}

impl PlainHost {
    /// Adds it to the lab.
    pub fn start(lab: &Lab) -> Result<Self> {
        let space = add_host(lab, "plain", "pk", *PLAIN_HOST.ip())?;
        let listener = space.run(|| TcpListener::bind(PLAIN_HOST))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("lab-plain".into()).spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                // A client that is gone is counted by the client.
                let _ = stream.and_then(answer);
            }
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
            _space: space,
        })
    }

    /// Begins to ask it, from the lab's client, as `config` says; only the address is the host's own.
    pub fn ask(&self, lab: &Lab, config: ProbeConfig) -> Result<Yardstick> {
        let turn = config.turn();
        let prober = Prober::start(
            &lab.client,
            ProbeConfig {
                to: PLAIN_HOST.into(),
                ..config
            },
        )?;
        Ok(Yardstick { prober, turn })
    }
}

impl Drop for PlainHost {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // One more connection wakes the accepting thread.
        let _ = self
            ._space
            .run(|| TcpStream::connect_timeout(&PLAIN_HOST.into(), Duration::from_secs(1)));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Answers one request as the nodes' web servers do.
fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(2)))?;
    let (mut request, mut buffer) = (Vec::new(), [0; 1024]);
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => request.extend_from_slice(&buffer[..length]),
        }
    }
    let body = format!("{{\"node\":\"plain\",\"client\":\"{}\"}}\n", stream.peer_addr()?);
    let head = format!(
        "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes())
}

/// A measurement under way.
#[derive(Debug)]
pub struct Yardstick {
    prober: Prober,
    turn: Duration,
}

impl Yardstick {
    /// Ends it: how much longer than the time between two questions the worst silence of any source was.
    pub fn stop(self) -> Result<Duration> {
        let report = self.prober.stop()?;
        let gap = report.longest_gap().context("the plain host has answered nothing")?;
        Ok(gap.length().saturating_sub(self.turn))
    }
}
