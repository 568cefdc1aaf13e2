//! Thousands of established connections of four kinds, each checked to the byte, held from one client on one thread.
//!
//! Owns the connections of one client. Each knows which node it is on, since when, and how it ended; a crowd that is told so replaces those that ended, so
//! that its number stays. None counts as whole because nothing was heard: each proves at the end, in the way of its kind, that its server is there.
//! Never decides which ends are allowed: it reports every one.

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
use crate::responder::{Digest, PIECE, pattern};

/// What a connection does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Kind {
    /// Silent after its first exchange, until one more at the end.
    Idle,
    /// Sends something and gets it back, again and again.
    Talk,
    /// Sends without an answer; at the end the server's receipt must be right.
    Upload,
    /// Closed by the client, while the server goes on sending; at the end one more piece must come.
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

/// Longest silence on a half-closed connection, whose server sends something each second.
const SILENCE: Duration = Duration::from_secs(5);

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
                    silence: SILENCE,
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
        self.end();
        self.thread.wait()?;
        Ok(std::mem::take(
            &mut *self.book.lives.lock().unwrap_or_else(PoisonError::into_inner),
        ))
    }

    /// As [`Self::stop`], for several crowds at the same time.
    ///
    /// # Errors
    /// The thread of one could not work.
    pub fn stop_all(crowds: Vec<Self>) -> Result<Vec<Life>> {
        crowds.iter().for_each(Self::end);
        let mut lives = Vec::new();
        for crowd in crowds {
            lives.extend(crowd.stop()?);
        }
        Ok(lives)
    }

    /// Tells the connections to end.
    fn end(&self) {
        // Nobody hears it if all have ended already.
        let _ = self.stop.send(true);
    }
}

/// The place of one connection and of those that replace it.
struct Slot {
    source: Ipv4Addr,
    to: SocketAddrV4,
    kind: Kind,
    index: usize,
    pause: Duration,
    silence: Duration,
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
        let mut receipt = Vec::new();
        timeout(LIMIT, async {
            stream.shutdown().await?;
            stream.read_to_end(&mut receipt).await
        })
        .await
        .map_err(|_| Failure::AnswerTimeout)??;
        if receipt == digest.receipt(count).into_bytes() {
            Ok(())
        } else if receipt.is_empty() {
            Err(Failure::Closed)
        } else {
            Err(Failure::BadAnswer(String::from_utf8_lossy(&receipt).into_owned()))
        }
    }

    async fn half(&mut self, stream: &mut TcpStream, sent: &mut Instant) -> Result<(), Failure> {
        *sent = Instant::now();
        stream.shutdown().await?;
        let mut pieces = Pieces {
            stream,
            silence: self.silence,
            got: 0,
            last: Instant::now(),
        };
        tokio::select! {
            _ = self.stop.wait_for(|stop| *stop) => {}
            end = pieces.read_to(usize::MAX) => return end,
        }
        // That the socket is open says nothing of its server; one more piece does.
        let enough = pieces.got + PIECE;
        pieces.read_to(enough).await
    }

    /// Waits for `pause`; true, and at once, if the crowd is to end.
    async fn stopped_within(&self, pause: Duration) -> bool {
        let mut stop = self.stop.clone();
        timeout(pause, stop.wait_for(|stop| *stop)).await.is_ok()
    }
}

/// What a half-closed connection gets.
struct Pieces<'a> {
    stream: &'a mut TcpStream,
    /// Longest time without a byte.
    silence: Duration,
    /// Right bytes so far.
    got: usize,
    /// When the last of them came.
    last: Instant,
}

impl Pieces<'_> {
    /// Reads until `enough` bytes have come, all of them right. Loses nothing if it is given up on the way.
    async fn read_to(&mut self, enough: usize) -> Result<(), Failure> {
        let mut buffer = [0; 256];
        while self.got < enough {
            let left = self.silence.saturating_sub(self.last.elapsed());
            let read = timeout(left, self.stream.read(&mut buffer))
                .await
                .map_err(|_| Failure::AnswerTimeout)??;
            if read == 0 {
                return Err(Failure::Closed);
            }
            let wrong = |(i, byte): (usize, &u8)| *byte != pattern(self.got + i);
            if buffer[..read].iter().enumerate().any(wrong) {
                return Err(Failure::BadAnswer(format!("a wrong byte after {}", self.got)));
            }
            self.got += read;
            self.last = Instant::now();
        }
        Ok(())
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

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    /// How a half-closed connection ends when its crowd does, while its server does `serve`, and then nothing with what that gives back.
    fn half_at_the_stop<F, Fut>(serve: F) -> Result<(), Failure>
    where
        F: FnOnce(TcpStream) -> Fut,
        Fut: Future<Output = Option<TcpStream>>,
    {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            let mut stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (server, _) = listener.accept().await.unwrap();
            let (_stop, stopped) = watch::channel(true);
            let mut slot = Slot {
                source: Ipv4Addr::LOCALHOST,
                to: SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0),
                kind: Kind::Half,
                index: 0,
                pause: Duration::ZERO,
                silence: Duration::from_millis(300),
                stop: stopped,
            };
            let mut sent = Instant::now();
            let (end, _server) = tokio::join!(slot.half(&mut stream, &mut sent), serve(server));
            end
        })
    }

    #[test]
    fn a_half_closed_connection_is_whole_only_if_its_server_goes_on_sending() {
        let alive = half_at_the_stop(async move |mut server: TcpStream| {
            for index in 0..10 {
                let piece: Vec<u8> = (index * PIECE..(index + 1) * PIECE).map(pattern).collect();
                server.write_all(&piece).await.unwrap();
                sleep(Duration::from_millis(10)).await;
            }
            Some(server)
        });
        assert_eq!(alive, Ok(()));
        let silent = half_at_the_stop(async move |server: TcpStream| Some(server));
        assert_eq!(silent, Err(Failure::AnswerTimeout));
        let closed = half_at_the_stop(async move |_: TcpStream| None);
        assert_eq!(closed, Err(Failure::Closed));
        let reset = half_at_the_stop(async move |server: TcpStream| {
            server.set_zero_linger().unwrap();
            None
        });
        assert_eq!(reset, Err(Failure::Reset));
        let wrong = half_at_the_stop(async move |mut server: TcpStream| {
            server.write_all(&[1; PIECE]).await.unwrap();
            Some(server)
        });
        assert!(matches!(wrong, Err(Failure::BadAnswer(_))), "{wrong:?}");
    }
}
