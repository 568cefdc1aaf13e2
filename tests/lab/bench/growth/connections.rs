//! More established connections: in a bucket that changes hands the kernel program looks for the frame's connection, and the daemon asks for the list of all.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use farm_core::balance::plan::BucketState;
use farm_core::config::Protocol;
use farm_sys::sock_diag::SockDiag;
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::NAME;
use crate::bench::frames::{self, Segment, Way};
use crate::bench::judge::{Judge, LOOPBACK};
use crate::bench::{Effort, Figure, line};
use crate::config::VIP;
use crate::lab_program;
use crate::outcome::{Outcome, Plot, Progress, Table};
use crate::process::{spawn_kept, with_parent_death};
use crate::space::Space;

/// Numbers of connections.
const LIVE: [usize; 4] = [10, 1000, 10_000, 100_000];
/// Connections of one client address, from this port on.
const EACH: usize = 20_000;
const FIRST_PORT: u16 = 20_000;
/// Connections whose frames are judged.
const SAMPLES: usize = 16;

/// Both ends of a connection.
type Pair = (TcpStream, TcpStream);

/// Measures with each number of connections, or with as many as this process may have.
///
/// # Errors
/// The kernel does not take the program, or connections cannot be made.
pub fn measure(effort: Effort, outcome: &mut Outcome, say: Progress<'_>) -> Result<()> {
    let (rounds, repeat) = (effort.rounds(5, 3), effort.pick(200_000, 50_000));
    let rules = [frames::rule(Protocol::Tcp, 80, 0)];
    let plan = frames::plan(
        LOOPBACK,
        &[VIP.into()],
        &rules,
        vec![frames::group(BucketState::Guarded)?],
    );
    let mut judge = Judge::new(&plan)?;
    let clients = LIVE.into_iter().max().unwrap_or(1).div_ceil(EACH);
    let mut lines = vec![format!("address add {VIP}/32 dev lo")];
    lines.extend((0..clients).map(|index| format!("address add {}/32 dev lo", client(index))));
    judge.space().ip(&lines)?;
    let mut table = Table::new(
        &format!(
            "With many established connections: the kernel program on a frame of one of them, and of none, in a guarded bucket (ns), and one list of all by sock_diag \
             (ms); medians with the least and the most (rounds: {rounds})"
        ),
        &["connections", "frame of one", "frame of none", "list of all, ms"],
    );
    let mut points: [Vec<(f64, Vec<f64>)>; 3] = Default::default();
    let mut held = Crowd::default();
    for live in effort.pick(&LIVE[..], &LIVE[..2]) {
        say(&format!("{live} connections"))?;
        if let Err(error) = held.grow(judge.space(), *live) {
            outcome
                .notes
                .push(format!("Left out: {live} connections, because {error:#}."));
            break;
        }
        let unknown = frame((client(0), FIRST_PORT - 1).into())?;
        let known = (0..SAMPLES).map(|i| frame(end_of(i * (live - 1) / (SAMPLES - 1))));
        let known = known.collect::<Result<Vec<_>>>()?;
        let mut found: [Vec<f64>; 3] = Default::default();
        for _ in 0..rounds {
            let of_one = known.iter().map(|frame| judge.net_nanos(frame, repeat / 4));
            found[0].push(Figure::of(&of_one.collect::<Result<Vec<_>>>()?).median);
            found[1].push(judge.net_nanos(&unknown, repeat)?);
            found[2].push(judge.space().run(|| list(*live))?);
        }
        let digits = [0, 0, 1];
        let cells = found
            .iter()
            .zip(digits)
            .map(|(values, digits)| Figure::of(values).text(digits));
        table.row(std::iter::once(live.to_string()).chain(cells));
        for (points, values) in points.iter_mut().zip(found) {
            points.push((*live as f64, values));
        }
    }
    outcome.tables.push(table);
    let [of_one, of_none, list] = points;
    let plot = |name: &str, title: &str, unit: &str, lines| Plot {
        name: format!("{NAME}-{name}"),
        title: title.to_owned(),
        unit: unit.to_owned(),
        over: Some("established connections".to_owned()),
        by_factors: true,
        lines,
        goal: None,
    };
    outcome.plots.extend([
        plot(
            "connections",
            "The kernel program in a guarded bucket",
            "ns for one frame",
            vec![line("frame of one", of_one), line("frame of none", of_none)],
        ),
        plot(
            "list",
            "The list of all connections (sock_diag)",
            "ms",
            vec![line("one list", list)],
        ),
    ]);
    Ok(())
}

fn client(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(198, 18, 2, 1 + index as u8)
}

/// The client's end of connection number `index`.
fn end_of(index: usize) -> SocketAddr {
    (client(index / EACH), FIRST_PORT + (index % EACH) as u16).into()
}

fn frame(from: SocketAddr) -> Result<Vec<u8>> {
    let way = Way {
        from: (from.ip(), from.port()),
        to: (VIP.into(), 80),
    };
    way.tcp(Segment::Ack)
}

/// Connections of one process: it has two open files for each.
const OF_ONE: usize = 8000;

/// Processes that hold connections until they are dropped.
#[derive(Debug, Default)]
struct Crowd {
    processes: Vec<Child>,
    count: usize,
}

impl Crowd {
    /// Opens more, until there are `count`.
    fn grow(&mut self, space: &Space, count: usize) -> Result<()> {
        let program = lab_program()?.display().to_string();
        while self.count < count {
            let to = count.min(self.count + OF_ONE);
            let mut command = with_parent_death(&program);
            command
                .args([
                    "connections",
                    "--from",
                    &self.count.to_string(),
                    "--to",
                    &to.to_string(),
                ])
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            space.enter(&mut command);
            let mut process = spawn_kept(command)?;
            let mut line = String::new();
            if let Some(stdout) = process.stdout.take() {
                BufReader::new(stdout).read_line(&mut line)?;
            }
            if line.trim() != READY {
                let _ = process.kill();
                let output = process.wait_with_output()?;
                bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
            }
            self.processes.push(process);
            self.count = to;
        }
        Ok(())
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

/// What the holding process says when all are open.
const READY: &str = "ready";

/// `farm-lab connections`: opens connections number `from` to `to` of the measurement, in this network namespace, says so, and holds them until it is ended.
///
/// # Errors
/// They cannot be opened.
pub fn hold(from: usize, to: usize) -> Result<()> {
    let pairs = open(from, to)?;
    println!("{READY}");
    loop {
        // Parking may end for no reason.
        std::thread::park();
        std::hint::black_box(&pairs);
    }
}

/// Opens connections number `from` to `to`.
fn open(from: usize, to: usize) -> Result<Vec<Pair>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind((VIP, 80)).await?;
        let mut pairs = Vec::with_capacity(to.saturating_sub(from));
        for index in from..to {
            let pair = one(&listener, end_of(index)).await;
            pairs.push(pair.with_context(|| format!("connection number {index}"))?);
        }
        Ok(pairs)
    })
}

async fn one(listener: &TcpListener, from: SocketAddr) -> Result<Pair> {
    let socket = TcpSocket::new_v4()?;
    socket.bind(from)?;
    let both = async { tokio::join!(socket.connect((VIP, 80).into()), listener.accept()) };
    let (client, server) = tokio::time::timeout(Duration::from_secs(5), both)
        .await
        .context("it is not open after 5 s")?;
    Ok((client?, server?.0))
}

/// Milliseconds of one list of all connections to the virtual address.
fn list(expected: usize) -> Result<f64> {
    let mut diag = SockDiag::open()?;
    let begun = Instant::now();
    let listed = diag.tcp_sockets(&[VIP.into()])?;
    let took = begun.elapsed();
    if listed.len() < expected {
        bail!("{} of {expected} connections are listed", listed.len());
    }
    Ok(took.as_secs_f64() * 1e3)
}
