//! The application of the chaos runs: a server that starts in a moment, says who it is, and can prove every byte.
//!
//! Owns one UDP socket per virtual address and one TCP listener, on one thread. It runs as a process of its node
//! (`farm-lab responder`, started by the module's scripts), so that a power cut ends it. Never limits or ends a connection by itself.
//!
//! A datagram is sent back with the node's name behind it. A TCP client sends one byte that says what it wants and gets the node's name and a
//! line feed; then:
//!
//! | byte | the server |
//! | --- | --- |
//! | `T` | sends back what comes |
//! | `U` | reads to the end, then sends `BYTES DIGEST` and a line feed |
//! | `H` | reads to the end, then sends [`PIECE`] bytes of [`pattern`] every second |

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::task::LocalSet;

/// UDP port of the probes.
pub const UDP_PORT: u16 = 7000;
/// TCP port.
pub const TCP_PORT: u16 = 80;
/// Bytes that a half-closed connection gets each second.
pub const PIECE: usize = 16;

/// Byte `index` of what a half-closed connection gets.
pub const fn pattern(index: usize) -> u8 {
    (index % 251) as u8
}

/// A running digest (FNV-1a, 64 bits): bytes that are missing, doubled or swapped change it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Digest(u64);

impl Default for Digest {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Digest {
    /// Takes in `bytes`.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    /// What a whole upload of `count` bytes is answered with.
    pub fn receipt(self, count: usize) -> String {
        format!("{count} {:016x}\n", self.0)
    }
}

/// Serves as `name` on `vips` until the process is ended; prints `ready` when it can be asked.
///
/// # Errors
/// An address or port that cannot be bound, with its name.
pub fn run(name: &str, vips: &[Ipv4Addr]) -> io::Result<()> {
    // It shares the processors with the clients that measure it. Where that is not allowed it waits for them.
    let _ = farm_sys::sched::set_nice(-10);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let named = |what: String| move |e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"));
        for vip in vips {
            let at = SocketAddrV4::new(*vip, UDP_PORT);
            let socket = UdpSocket::bind(at).await.map_err(named(format!("UDP {at}")))?;
            tokio::task::spawn_local(echo(socket, name.to_owned()));
        }
        let at = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, TCP_PORT);
        let listener = TcpListener::bind(at).await.map_err(named(format!("TCP {at}")))?;
        println!("ready");
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::task::spawn_local(converse(stream, name.to_owned()));
                }
                // Out of descriptors: the connections that are there go on.
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    })
}

async fn echo(socket: UdpSocket, name: String) {
    let mut buffer = [0; 2048];
    loop {
        if let Ok((length, from)) = socket.recv_from(&mut buffer).await {
            let mut answer = buffer[..length].to_vec();
            answer.extend_from_slice(name.as_bytes());
            // A client that is gone, or an address that is just leaving, is nobody's fault.
            let _ = socket.send_to(&answer, from).await;
        }
    }
}

async fn converse(mut stream: TcpStream, name: String) {
    // What fails here is the client's to report.
    let _ = serve(&mut stream, &name).await;
}

async fn serve(stream: &mut TcpStream, name: &str) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mode = stream.read_u8().await?;
    stream.write_all(format!("{name}\n").as_bytes()).await?;
    let mut buffer = vec![0; 2048];
    match mode {
        b'T' => loop {
            let length = stream.read(&mut buffer).await?;
            if length == 0 {
                return Ok(());
            }
            stream.write_all(&buffer[..length]).await?;
        },
        b'U' => {
            let (mut digest, mut count) = (Digest::default(), 0);
            loop {
                let length = stream.read(&mut buffer).await?;
                if length == 0 {
                    return stream.write_all(digest.receipt(count).as_bytes()).await;
                }
                digest.add(&buffer[..length]);
                count += length;
            }
        }
        b'H' => {
            while stream.read(&mut buffer).await? > 0 {}
            let mut sent = 0;
            loop {
                let piece: Vec<u8> = (sent..sent + PIECE).map(pattern).collect();
                stream.write_all(&piece).await?;
                sent += PIECE;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_tells_missing_doubled_and_swapped_bytes() {
        let receipt = |parts: &[&[u8]]| {
            let mut digest = Digest::default();
            parts.iter().for_each(|part| digest.add(part));
            digest.receipt(parts.iter().map(|part| part.len()).sum())
        };
        assert_eq!(receipt(&[b"ab", b"cd"]), receipt(&[b"abcd"]));
        for other in [&b"abc"[..], b"abcdd", b"abdc"] {
            assert_ne!(receipt(&[b"abcd"]), receipt(&[other]));
        }
    }
}
