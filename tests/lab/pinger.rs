//! UDP probes at a fixed rate over many flows, each answer noted with its time and its node.
//!
//! Owns the flows (a client address, a port and a virtual address: one bucket each), the schedule and the log of every probe. A probe that two answers came to
//! is kept as such: that is how two owners show themselves to a client. Never repeats a probe.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::net::UdpSocket;
use tokio::task::LocalSet;
use tokio::time::MissedTickBehavior;

use crate::client::Client;
use crate::process::wait_until;

/// Number of a node, from its name: `node3` is 3.
pub type NodeNumber = u8;

/// One flow.
#[derive(Clone, Debug)]
pub struct Flow {
    /// Position of its client among those given.
    pub client: usize,
    /// Client address.
    pub source: Ipv4Addr,
    /// Virtual address and port.
    pub to: SocketAddrV4,
}

/// One probe.
#[derive(Clone, Debug)]
pub struct Probe {
    /// Position of its flow.
    pub flow: usize,
    /// When it was sent.
    pub sent: Instant,
    /// Every answer, in the order in which they came.
    pub answers: Vec<(Instant, NodeNumber)>,
}

#[derive(Debug, Default)]
struct Log {
    /// Number of the first probe in `probes`.
    base: u64,
    probes: Vec<Probe>,
    /// Who answered each flow last.
    owners: Vec<Option<NodeNumber>>,
    /// Flows to be probed in turn.
    focus: Vec<usize>,
    turn: usize,
}

/// Probes under way.
#[derive(Debug)]
pub struct Pinger {
    flows: Arc<[Flow]>,
    log: Arc<Mutex<Log>>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<io::Result<()>>>,
}

impl Pinger {
    /// Probes each of `targets` from `ports` ports of every address of `clients`, at `rate` probes a second over all flows.
    ///
    /// # Errors
    /// A socket that cannot be opened.
    pub fn start(clients: &[&Client], targets: &[SocketAddrV4], ports: usize, rate: u32) -> Result<Self> {
        let (mut flows, mut sockets) = (Vec::new(), Vec::new());
        for (index, client) in clients.iter().enumerate() {
            let wanted: Vec<Flow> = (0..ports)
                .flat_map(|_| client.addrs())
                .flat_map(|source| {
                    targets.iter().map(move |to| Flow {
                        client: index,
                        source: *source,
                        to: *to,
                    })
                })
                .collect();
            let opened: io::Result<Vec<_>> = client.space().run(|| wanted.iter().map(open).collect());
            sockets.extend(opened.context("cannot open the probes' sockets")?);
            flows.extend(wanted);
        }
        let log = Arc::new(Mutex::new(Log {
            owners: vec![None; flows.len()],
            focus: (0..flows.len()).collect(),
            ..Log::default()
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let flows: Arc<[Flow]> = flows.into();
        let (shared, stopped, given) = (Arc::clone(&log), Arc::clone(&stop), Arc::clone(&flows));
        let thread = std::thread::Builder::new()
            .name("lab-pinger".into())
            .spawn(move || run(sockets, &given, &shared, &stopped, rate))?;
        Ok(Self {
            flows,
            log,
            stop,
            thread: Some(thread),
        })
    }

    /// All flows.
    pub fn flows(&self) -> &[Flow] {
        &self.flows
    }

    /// Who answered each flow last, since the owners were forgotten.
    pub fn owners(&self) -> Vec<Option<NodeNumber>> {
        self.log().owners.clone()
    }

    /// Probes only these flows from now on; all of them if none are given.
    pub fn focus(&self, flows: &[usize]) {
        let all = || (0..self.flows.len()).collect();
        self.log().focus = if flows.is_empty() { all() } else { flows.to_vec() };
    }

    /// Begins a new log, with all owners forgotten.
    pub fn forget(&self) {
        let mut log = self.log();
        log.base += log.probes.len() as u64;
        log.probes.clear();
        log.owners.fill(None);
    }

    /// Probes all flows until each has been answered since [`Self::forget`]; who answers them.
    ///
    /// # Errors
    /// A flow that nobody answers within `limit`.
    pub fn learn(&self, limit: Duration) -> Result<Vec<NodeNumber>> {
        self.focus(&[]);
        self.forget();
        wait_until(limit, "an answer to every flow", || {
            self.log().owners.iter().copied().collect::<Option<Vec<_>>>()
        })
        .with_context(|| {
            let silent: Vec<&Flow> = self
                .flows
                .iter()
                .zip(self.owners())
                .filter(|(_, owner)| owner.is_none())
                .map(|(flow, _)| flow)
                .collect();
            format!("{} flows are silent, e.g. {:?}", silent.len(), silent.first())
        })
    }

    /// Looks at the probes since [`Self::forget`].
    pub fn look<T>(&self, look: impl FnOnce(&[Probe]) -> T) -> T {
        look(&self.log().probes)
    }

    /// Ends the probing.
    ///
    /// # Errors
    /// The prober's thread could not do its work.
    pub fn stop(mut self) -> Result<Vec<Probe>> {
        self.end()?;
        Ok(std::mem::take(&mut self.log().probes))
    }

    fn end(&mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        match self.thread.take().map(std::thread::JoinHandle::join) {
            Some(Ok(result)) => result.context("the prober ended early"),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pinger {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

/// Probes that more than one answer came to.
pub fn doubles(probes: &[Probe]) -> Vec<&Probe> {
    probes.iter().filter(|probe| probe.answers.len() > 1).collect()
}

/// The longest silence of any flow: from one answer to the flow's next one, or to `end` for a flow that is still probed then.
pub fn longest_silence(probes: &[Probe], end: Instant) -> Duration {
    let mut last: BTreeMap<usize, Instant> = BTreeMap::new();
    let mut longest = Duration::ZERO;
    let mut answers: Vec<(Instant, usize)> = probes
        .iter()
        .filter_map(|probe| Some((probe.answers.first()?.0, probe.flow)))
        .collect();
    answers.sort_unstable();
    for (at, flow) in answers {
        if let Some(before) = last.insert(flow, at) {
            longest = longest.max(at.saturating_duration_since(before));
        }
    }
    last.values()
        .map(|at| end.saturating_duration_since(*at))
        .fold(longest, Duration::max)
}

fn open(flow: &Flow) -> io::Result<std::net::UdpSocket> {
    let socket = std::net::UdpSocket::bind((flow.source, 0))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn run(
    sockets: Vec<std::net::UdpSocket>,
    flows: &[Flow],
    log: &Arc<Mutex<Log>>,
    stop: &AtomicBool,
    rate: u32,
) -> io::Result<()> {
    let lock = || log.lock().unwrap_or_else(PoisonError::into_inner);
    // What is measured is the farm, not how long this thread waits for a processor. Where that is not allowed it is measured too.
    let _ = farm_sys::sched::set_realtime(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let sockets: Rc<[UdpSocket]> = sockets
            .into_iter()
            .map(UdpSocket::from_std)
            .collect::<io::Result<Vec<_>>>()?
            .into();
        for flow in 0..sockets.len() {
            tokio::task::spawn_local(listen(Rc::clone(&sockets), flow, Arc::clone(log)));
        }
        let mut due = tokio::time::interval(Duration::from_secs(1) / rate.max(1));
        due.set_missed_tick_behavior(MissedTickBehavior::Burst);
        while !stop.load(Ordering::Relaxed) {
            due.tick().await;
            let (flow, number) = {
                let mut log = lock();
                let turn = log.turn;
                log.turn = turn.wrapping_add(1);
                let flow = log.focus[turn % log.focus.len()];
                log.probes.push(Probe {
                    flow,
                    sent: Instant::now(),
                    answers: Vec::new(),
                });
                (flow, log.base + log.probes.len() as u64 - 1)
            };
            // An address that cannot be resolved for a while is a probe without an answer.
            let _ = sockets[flow].try_send_to(&number.to_be_bytes(), flows[flow].to.into());
        }
        Ok(())
    })
}

async fn listen(sockets: Rc<[UdpSocket]>, flow: usize, log: Arc<Mutex<Log>>) {
    let mut buffer = [0; 256];
    loop {
        let Ok((length, _)) = sockets[flow].recv_from(&mut buffer).await else {
            continue;
        };
        let at = Instant::now();
        let Some((number, node)) = parse(&buffer[..length]) else {
            continue;
        };
        let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
        let index = number.checked_sub(log.base).map(|index| index as usize);
        if let Some(probe) = index.and_then(|index| log.probes.get_mut(index)) {
            probe.answers.push((at, node));
            log.owners[flow] = Some(node);
        }
    }
}

fn parse(answer: &[u8]) -> Option<(u64, NodeNumber)> {
    let (number, name) = answer.split_first_chunk::<8>()?;
    let node = std::str::from_utf8(name).ok()?.strip_prefix("node")?.parse().ok()?;
    Some((u64::from_be_bytes(*number), node))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(flow: usize, zero: Instant, answers: &[u64]) -> Probe {
        Probe {
            flow,
            sent: zero,
            answers: answers
                .iter()
                .map(|ms| (zero + Duration::from_millis(*ms), 1))
                .collect(),
        }
    }

    #[test]
    fn an_answer_names_its_probe_and_its_node() {
        assert_eq!(parse(b"\0\0\0\0\0\0\x01\x02node16"), Some((258, 16)));
        assert_eq!(parse(b"\0\0\0\0\0\0\x01\x02somebody"), None);
        assert_eq!(parse(b"short"), None);
    }

    #[test]
    fn a_silence_lies_between_answers_of_one_flow_and_reaches_to_the_end() {
        let zero = Instant::now();
        let probes = [
            probe(0, zero, &[10]),
            probe(1, zero, &[20]),
            probe(0, zero, &[110]),
            probe(1, zero, &[]),
            probe(1, zero, &[70]),
        ];
        let at = |ms| zero + Duration::from_millis(ms);
        assert_eq!(longest_silence(&probes, at(110)), Duration::from_millis(100));
        assert_eq!(longest_silence(&probes, at(400)), Duration::from_millis(330));
    }

    #[test]
    fn a_probe_with_two_answers_is_a_double() {
        let zero = Instant::now();
        let probes = [probe(0, zero, &[1]), probe(0, zero, &[1, 2]), probe(0, zero, &[])];
        assert_eq!(doubles(&probes).len(), 1);
    }
}
