//! Thousands of established connections of four kinds, each checked to the byte, held from one client on one thread.
//!
//! Owns the connections of one client. Each knows which node it is on, since when, and how it ended; a crowd that is told so replaces those that ended, so
//! that its number stays. Never decides which ends are allowed: it reports every one.

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use crate::client::{Client, Running};
use crate::http::Failure;
use crate::pinger::NodeNumber;
use crate::process::wait_until;
use crate::responder::{Digest, pattern};

/// What a connection does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// Silent after its first exchange, until the end.
    Idle,
    /// Sends something and gets it back, again and again.
    Talk,
    /// Sends without an answer; at the end the server's receipt must be right.
    Upload,
    /// Closed by the client, while the server goes on sending.
    Half,
}

/// Of ten connections: four idle, three talk, two upload, one is half-closed.
const MIX: [Kind; 10] = [
    Kind::Idle,
    Kind::Talk,
    Kind::Idle,
    Kind::Upload,
    Kind::Talk,
    Kind::Idle,
    Kind::Half,
    Kind::Talk,
    Kind::Upload,
    Kind::Idle,
];

/// Connections that may be in the middle of being opened.
const AT_ONCE: usize = 32;

/// Longest wait for anything the server owes.
const LIMIT: Duration = Duration::from_secs(15);

/// What to hold.
#[derive(Clone, Debug)]
pub struct CrowdConfig {
    /// Where to, in turn.
    pub to: Vec<SocketAddrV4>,
    /// Number of connections.
    pub count: usize,
    /// Pause between two exchanges, or pieces of an upload, of one connection.
    pub pause: Duration,
    /// Whether a connection that ended is replaced by a new one.
    pub replace: bool,
}

/// A connection and its end.
#[derive(Clone, Debug)]
pub struct Life {
    /// The client's end.
    pub source: SocketAddr,
    /// What it did.
    pub kind: Kind,
    /// The node it was on.
    pub node: NodeNumber,
    /// When it was established.
    pub opened: Instant,
    /// When it ended.
    pub ended: Instant,
    /// When the client last sent something.
    pub sent: Instant,
    /// How it broke; `None` if it was whole to the end.
    pub broken: Option<Failure>,
}

#[derive(Debug, Default)]
struct Book {
    open: AtomicUsize,
    lives: Mutex<Vec<Life>>,
    refused: AtomicUsize,
}

/// Connections being held.
#[derive(Debug)]
pub struct Crowd {
    stop: watch::Sender<bool>,
    book: Arc<Book>,
    count: usize,
    thread: Running<()>,
}

impl Crowd {
    /// Begins to open the connections from the client's addresses in turn; see [`Self::wait_full`].
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub fn start(client: &Client, config: CrowdConfig) -> Result<Self> {
        let (stop, stopped) = watch::channel(false);
        let book: Arc<Book> = Arc::default();
        let (shared, count) = (Arc::clone(&book), config.count);
        let addrs = client.addrs().to_vec();
        let thread = client.start(async move || {
            let gate = Arc::new(Semaphore::new(AT_ONCE));
            let mut running = tokio::task::JoinSet::new();
            for index in 0..config.count {
                let slot = Slot {
                    source: addrs[index % addrs.len()],
                    to: config.to[index / addrs.len() % config.to.len()],
                    kind: MIX[index % MIX.len()],
                    index,
                    pause: config.pause,
                    stop: stopped.clone(),
                };
                running.spawn(slot.hold(Arc::clone(&gate), Arc::clone(&shared), config.replace));
            }
            while running.join_next().await.is_some() {}
        })?;
        Ok(Self {
            stop,
            book,
            count,
            thread,
        })
    }

    /// Established connections at this moment.
    pub fn open(&self) -> usize {
        self.book.open.load(Ordering::Relaxed)
    }

    /// Tries to connect that failed so far.
    pub fn refused(&self) -> usize {
        self.book.refused.load(Ordering::Relaxed)
    }

    /// Waits until all are established.
    ///
    /// # Errors
    /// They are not within `limit`.
    pub fn wait_full(&self, limit: Duration) -> Result<()> {
        wait_until(limit, &format!("{} established connections", self.count), || {
            (self.open() >= self.count).then_some(())
        })
        .with_context(|| format!("{} are, {} tries failed", self.open(), self.refused()))
    }

    /// Ends all connections in order, each after a last exchange, and returns the lives of all that ever were.
    ///
    /// # Errors
    /// The client's thread could not work.
    pub fn stop(self) -> Result<Vec<Life>> {
        let _ = self.stop.send(true);
        self.thread.wait()?;
        Ok(std::mem::take(
            &mut *self.book.lives.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }
}

/// The place of one connection and of those that replace it.
struct Slot {
    source: Ipv4Addr,
    to: SocketAddrV4,
    kind: Kind,
    index: usize,
    pause: Duration,
    stop: watch::Receiver<bool>,
}

impl Slot {
    async fn hold(mut self, gate: Arc<Semaphore>, book: Arc<Book>, replace: bool) {
        loop {
            let Ok(permit) = gate.acquire().await else { return };
            if *self.stop.borrow() {
                return;
            }
            let opened = timeout(LIMIT, self.open())
                .await
                .unwrap_or(Err(Failure::ConnectTimeout));
            drop(permit);
            let Ok((stream, node)) = opened else {
                book.refused.fetch_add(1, Ordering::Relaxed);
                sleep(Duration::from_millis(100)).await;
                continue;
            };
            book.open.fetch_add(1, Ordering::Relaxed);
            let Ok(source) = stream.local_addr() else { return };
            let now = Instant::now();
            let mut life = Life {
                source,
                kind: self.kind,
                node,
                opened: now,
                ended: now,
                sent: now,
                broken: None,
            };
            life.broken = self.live(stream, &mut life.sent).await.err();
            life.ended = Instant::now();
            let broken = life.broken.is_some();
            book.lives.lock().unwrap_or_else(PoisonError::into_inner).push(life);
            book.open.fetch_sub(1, Ordering::Relaxed);
            if !(broken && replace) || *self.stop.borrow() {
                return;
            }
        }
    }

    /// Connects and learns which node it is.
    async fn open(&self) -> Result<(TcpStream, NodeNumber), Failure> {
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::from((self.source, 0)))?;
        let mut stream = socket.connect(SocketAddr::V4(self.to)).await?;
        stream.set_nodelay(true)?;
        let wish = match self.kind {
            Kind::Idle | Kind::Talk => b'T',
            Kind::Upload => b'U',
            Kind::Half => b'H',
        };
        stream.write_all(&[wish]).await?;
        let mut name = Vec::new();
        loop {
            match stream.read_u8().await? {
                b'\n' => break,
                byte => name.push(byte),
            }
        }
        let name = String::from_utf8_lossy(&name).into_owned();
        let node = name.strip_prefix("node").and_then(|number| number.parse().ok());
        Ok((stream, node.ok_or(Failure::BadAnswer(name))?))
    }

    async fn live(&mut self, mut stream: TcpStream, sent: &mut Instant) -> Result<(), Failure> {
        match self.kind {
            Kind::Idle => {
                self.exchange(&mut stream, 0, sent).await?;
                tokio::select! {
                    _ = self.stop.wait_for(|stop| *stop) => {}
                    end = unasked(&mut stream) => return Err(end),
                }
                self.exchange(&mut stream, 1, sent).await
            }
            Kind::Talk => {
                let mut round = 0;
                while !self.stopped_within(self.pause).await {
                    self.exchange(&mut stream, round, sent).await?;
                    round += 1;
                }
                self.exchange(&mut stream, round, sent).await
            }
            Kind::Upload => self.upload(&mut stream, sent).await,
            Kind::Half => self.half(&mut stream, sent).await,
        }
    }

    /// Sends a text that no other connection and no other round has, and wants it back.
    async fn exchange(&self, stream: &mut TcpStream, round: usize, sent: &mut Instant) -> Result<(), Failure> {
        let text = format!("{}-{round}-{}", self.index, "x".repeat(round * 37 % 300)).into_bytes();
        *sent = Instant::now();
        timeout(LIMIT, async {
            stream.write_all(&text).await?;
            let mut answer = vec![0; text.len()];
            stream.read_exact(&mut answer).await?;
            if answer == text {
                Ok(())
            } else {
                Err(Failure::BadAnswer(String::from_utf8_lossy(&answer).into_owned()))
            }
        })
        .await
        .unwrap_or(Err(Failure::AnswerTimeout))
    }

    async fn upload(&mut self, stream: &mut TcpStream, sent: &mut Instant) -> Result<(), Failure> {
        let (mut digest, mut count) = (Digest::default(), 0);
        loop {
            tokio::select! {
                stopped = self.stopped_within(self.pause) => if stopped { break },
                end = unasked(stream) => return Err(end),
            }
            let piece = format!("{}:{count};", self.index).repeat(1 + count % 40);
            digest.add(piece.as_bytes());
            count += piece.len();
            *sent = Instant::now();
            timeout(LIMIT, stream.write_all(piece.as_bytes()))
                .await
                .map_err(|_| Failure::AnswerTimeout)??;
        }
        *sent = Instant::now();
        let mut receipt = String::new();
        timeout(LIMIT, async {
            stream.shutdown().await?;
            stream.read_to_string(&mut receipt).await
        })
        .await
        .map_err(|_| Failure::AnswerTimeout)??;
        if receipt == digest.receipt(count) {
            Ok(())
        } else if receipt.is_empty() {
            Err(Failure::Closed)
        } else {
            Err(Failure::BadAnswer(receipt))
        }
    }

    async fn half(&mut self, stream: &mut TcpStream, sent: &mut Instant) -> Result<(), Failure> {
        *sent = Instant::now();
        stream.shutdown().await?;
        let mut got = 0;
        let mut buffer = [0; 256];
        loop {
            let read = tokio::select! {
                _ = self.stop.wait_for(|stop| *stop) => return Ok(()),
                read = timeout(LIMIT, stream.read(&mut buffer)) => read.map_err(|_| Failure::AnswerTimeout)??,
            };
            if read == 0 {
                return Err(Failure::Closed);
            }
            if buffer[..read]
                .iter()
                .enumerate()
                .any(|(i, byte)| *byte != pattern(got + i))
            {
                return Err(Failure::BadAnswer(format!("a wrong byte after {got}")));
            }
            got += read;
        }
    }

    /// Waits for `pause`; true, and at once, if the crowd is to end.
    async fn stopped_within(&self, pause: Duration) -> bool {
        let mut stop = self.stop.clone();
        timeout(pause, stop.wait_for(|stop| *stop)).await.is_ok()
    }
}

/// Waits for what no server sends unasked: the end of the connection, or bytes that do not belong there.
async fn unasked(stream: &mut TcpStream) -> Failure {
    let mut buffer = [0; 64];
    match stream.read(&mut buffer).await {
        Ok(0) => Failure::Closed,
        Ok(length) => Failure::BadAnswer(format!("{length} bytes that nobody asked for")),
        Err(error) => error.into(),
    }
}
