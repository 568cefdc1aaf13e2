//! Whole transfers through the farm, each byte of which is checked: the service on the nodes, and its clients.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use farm_lab::client::Batch;
use farm_lab::{Client, Node};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

/// `length` bytes that only `seed` gives and that repeat nowhere.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Services of a node that end when dropped.
pub struct Service {
    pub stop: Arc<AtomicBool>,
    pub threads: Vec<JoinHandle<()>>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Takes and gives bytes on `at`: a line `up SEED N` and N bytes, answered by `NODE ok`; a line `down SEED N`, answered
/// by the line `NODE` and N bytes.
pub fn bulk(node: &Node, at: SocketAddr) -> Service {
    let listener = node.space().run(|| TcpListener::bind(at)).expect("the VIP is there");
    listener.set_nonblocking(true).expect("a mode");
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, name) = (Arc::clone(&stop), node.name().to_owned());
    let thread = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((stream, _)) => {
                    let name = name.clone();
                    // It ends with its client.
                    std::thread::spawn(move || serve_bulk(&name, &stream));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    });
    Service {
        stop,
        threads: vec![thread],
    }
}

fn serve_bulk(name: &str, stream: &TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words.get(at).and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        let expected = pattern(number(1), number(2) as usize);
        if words.first() == Some(&"up") {
            let mut got = vec![0; expected.len()];
            reader.read_exact(&mut got)?;
            let wrong = got.iter().zip(&expected).position(|(a, b)| a != b);
            let said = wrong.map_or_else(|| "ok".to_owned(), |at| format!("byte {at} is wrong"));
            writer.write_all(format!("{name} {said}\n").as_bytes())?;
        } else {
            writer.write_all(format!("{name}\n").as_bytes())?;
            writer.write_all(&expected)?;
        }
    }
}

/// What one client does on one connection, in order.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Send as many bytes.
    Up(usize),
    /// Fetch as many bytes.
    Down(usize),
}

/// Runs the steps on one connection and returns the node that served it; before each step but the first it meets the others twice.
async fn transfer(
    source: IpAddr,
    to: SocketAddr,
    steps: &[Step],
    between: &tokio::sync::Barrier,
) -> Result<String, String> {
    let text = |what: &str, e: io::Error| format!("{source}: {what}: {e}");
    let socket = match to {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    };
    let socket = socket.map_err(|e| text("socket", e))?;
    socket.bind((source, 0).into()).map_err(|e| text("bind", e))?;
    let connected = tokio::time::timeout(Duration::from_secs(5), socket.connect(to)).await;
    // All meet at the barrier, also those that failed.
    let (mut stream, mut node) = match connected {
        Ok(Ok(stream)) => (Some(tokio::io::BufReader::new(stream)), Err(String::new())),
        other => (None, Err(format!("{source}: no connection: {other:?}"))),
    };
    for (index, step) in steps.iter().enumerate() {
        if index > 0 {
            between.wait().await;
            between.wait().await;
        }
        let Some(open) = stream.as_mut() else { continue };
        let seed = match source {
            IpAddr::V4(v4) => u64::from(v4.to_bits()),
            IpAddr::V6(v6) => v6.to_bits() as u64,
        };
        let seed = seed + index as u64;
        let done = tokio::time::timeout(Duration::from_secs(20), one_step(open, *step, seed)).await;
        match done {
            Ok(Ok(name)) if node.as_ref().map_or(true, |before| *before == name) => node = Ok(name),
            other => {
                node = Err(format!("{source}: {step:?} as step {index}: {other:?}"));
                stream = None;
            }
        }
    }
    node
}

async fn one_step(
    stream: &mut tokio::io::BufReader<tokio::net::TcpStream>,
    step: Step,
    seed: u64,
) -> Result<String, String> {
    let text = |e: io::Error| e.to_string();
    let mut line = String::new();
    match step {
        Step::Up(length) => {
            stream
                .write_all(format!("up {seed} {length}\n").as_bytes())
                .await
                .map_err(text)?;
            stream.write_all(&pattern(seed, length)).await.map_err(text)?;
            stream.read_line(&mut line).await.map_err(text)?;
            match line.trim().split_once(' ') {
                Some((node, "ok")) => Ok(node.to_owned()),
                _ => Err(line),
            }
        }
        Step::Down(length) => {
            stream
                .write_all(format!("down {seed} {length}\n").as_bytes())
                .await
                .map_err(text)?;
            stream.read_line(&mut line).await.map_err(text)?;
            let mut got = vec![0; length];
            stream.read_exact(&mut got).await.map_err(text)?;
            let wrong = got.iter().zip(pattern(seed, length)).position(|(a, b)| *a != b);
            wrong.map_or_else(|| Ok(line.trim().to_owned()), |at| Err(format!("byte {at} is wrong")))
        }
    }
}

/// The same steps from each source to `to` at once; `change` is called between two steps, when no byte is under way. Returns who served.
pub fn transfers(
    client: &Client,
    to: SocketAddr,
    sources: &[IpAddr],
    steps: &[Step],
    change: impl FnOnce(),
) -> BTreeSet<String> {
    let (sources, steps) = (sources.to_vec(), Arc::<[Step]>::from(steps));
    let (meet, pauses) = (Arc::new(tokio::sync::Barrier::new(sources.len() + 1)), steps.len() - 1);
    let (paused, wait_paused) = std::sync::mpsc::channel();
    let (go_on, mut wait_go_on) = tokio::sync::mpsc::unbounded_channel::<()>();
    let running = client
        .start(async move || {
            let mut tasks = tokio::task::JoinSet::new();
            for source in sources {
                let (steps, meet) = (Arc::clone(&steps), Arc::clone(&meet));
                tasks.spawn(async move { transfer(source, to, &steps, &meet).await });
            }
            for _ in 0..pauses {
                meet.wait().await;
                let _ = paused.send(());
                let _ = wait_go_on.recv().await;
                meet.wait().await;
            }
            tasks.join_all().await
        })
        .expect("the client runs");
    let mut change = Some(change);
    for _ in 0..pauses {
        wait_paused.recv().expect("the transfers pause");
        if let Some(change) = change.take() {
            change();
        }
        go_on.send(()).expect("the client waits");
    }
    let ended = running.wait().expect("the client ends");
    let wrong: Vec<_> = ended.iter().filter_map(|one| one.as_ref().err()).collect();
    assert!(wrong.is_empty(), "{} of {}: {wrong:#?}", wrong.len(), ended.len());
    ended.into_iter().flatten().collect()
}

/// `count` of the client's addresses of the family of `web`, the nodes that serve them in turn, so that a few have all nodes among their servers.
pub fn spread(client: &Client, web: SocketAddr, count: usize) -> Vec<IpAddr> {
    let report = client.batch(Batch::new(web, client.addrs().len())).expect("a batch");
    assert_eq!(report.lost(), 0, "{:?}", report.failures());
    let mut by_node = BTreeMap::<String, Vec<IpAddr>>::new();
    for (source, nodes) in report.nodes_by_source() {
        by_node.entry(nodes[0].clone()).or_default().push(source);
    }
    let longest = by_node.values().map(Vec::len).max().unwrap_or(0);
    let turns = (0..longest).flat_map(|turn| by_node.values().filter_map(move |sources| sources.get(turn).copied()));
    turns.take(count).collect()
}
