//! Bulk over one TCP connection, as fast as it goes: a service on every server, and a client that downloads or uploads for a while.
//!
//! Owns the service's threads, which end with the value. The bytes mean nothing: whether they arrive whole is for the tests.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::space::Space;

/// Where the service listens, on all addresses of a server.
pub const BULK_PORT: u16 = 81;

/// Bytes of one call.
const PIECE: usize = 256 * 1024;

/// Longest silence of the other end.
const LIMIT: Duration = Duration::from_secs(5);

/// Which way the bytes go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Direction {
    /// From the server.
    Down,
    /// To the server.
    Up,
}

/// The service on one server.
#[derive(Debug)]
pub struct BulkServer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl BulkServer {
    /// Starts it in this namespace.
    ///
    /// # Errors
    /// The port is in use.
    pub fn start(space: &Space) -> Result<Self> {
        let at = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, BULK_PORT);
        let listener = space
            .run(|| TcpListener::bind(at))
            .with_context(|| format!("cannot listen on port {BULK_PORT} of {}", space.name()))?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("lab-bulk".into()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    // One at a time, as they are measured; a client that breaks off is the client's to report.
                    Ok((stream, _)) => drop(serve(stream)),
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for BulkServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// After a `d` it sends until the client closes; after a `u` it takes until the client has ended, and answers how much that was.
fn serve(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    let mut wish = [0];
    stream.read_exact(&mut wish)?;
    let mut piece = vec![0; PIECE];
    if &wish == b"d" {
        loop {
            stream.write_all(&piece)?;
        }
    }
    let mut taken: u64 = 0;
    loop {
        match stream.read(&mut piece)? {
            0 => return stream.write_all(&taken.to_be_bytes()),
            length => taken += length as u64,
        }
    }
}

/// Moves bytes for `window` over one connection from this namespace; Gbit/s. Of an upload only what the server has got counts, and the time
/// until it says so.
///
/// # Errors
/// No connection, or it stands still.
pub fn transfer(space: &Space, to: Ipv4Addr, direction: Direction, window: Duration) -> Result<f64> {
    let to = SocketAddrV4::new(to, BULK_PORT);
    let moved = space.run(|| match direction {
        Direction::Down => download(to, window),
        Direction::Up => upload(to, window),
    });
    let (bytes, took) = moved.with_context(|| format!("bulk ({direction:?}) with {to}"))?;
    Ok(bytes as f64 * 8.0 / 1e9 / took.as_secs_f64())
}

fn connect(to: SocketAddrV4) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to.into(), LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}

fn download(to: SocketAddrV4, window: Duration) -> io::Result<(u64, Duration)> {
    let mut stream = connect(to)?;
    stream.write_all(b"d")?;
    let (mut piece, mut bytes) = (vec![0; PIECE], 0);
    let begun = Instant::now();
    while begun.elapsed() < window {
        match stream.read(&mut piece)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => bytes += length as u64,
        }
    }
    Ok((bytes, begun.elapsed()))
}

fn upload(to: SocketAddrV4, window: Duration) -> io::Result<(u64, Duration)> {
    let mut stream = connect(to)?;
    stream.write_all(b"u")?;
    let piece = vec![0; PIECE];
    let begun = Instant::now();
    while begun.elapsed() < window {
        stream.write_all(&piece)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut taken = [0; 8];
    stream.read_exact(&mut taken)?;
    Ok((u64::from_be_bytes(taken), begun.elapsed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_counts_what_the_server_took() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let std::net::SocketAddr::V4(at) = listener.local_addr().unwrap() else {
            panic!("an IPv4 address")
        };
        let server = std::thread::spawn(move || {
            for _ in 0..2 {
                drop(serve(listener.accept().unwrap().0));
            }
        });
        let (up, _) = upload(at, Duration::from_millis(20)).unwrap();
        let (down, _) = download(at, Duration::from_millis(20)).unwrap();
        server.join().unwrap();
        assert!(up > 0 && up.is_multiple_of(PIECE as u64) && down > 0, "{up} {down}");
    }
}
