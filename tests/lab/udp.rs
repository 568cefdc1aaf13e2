//! A UDP service for the nodes and its client: one question, one answer with the node's name.
//!
//! Owns a thread inside a node's namespace that answers from the address it was asked at. The thread is the lab's, so a power cut does
//! not end it: drop it, or cut the link.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::client::Client;
use crate::node::Node;

/// A UDP service at work.
#[derive(Debug)]
pub struct UdpService {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpService {
    /// Answers datagrams to `at` on `node` with `NODE TEXT`; the address must be the node's already, e.g. the VIP of a started module.
    pub fn start(node: &Node, at: SocketAddrV4) -> Result<Self> {
        let socket = node
            .space()
            .run(|| UdpSocket::bind(at))
            .with_context(|| format!("cannot bind {at} on {}", node.name()))?;
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, name) = (Arc::clone(&stop), node.name().to_owned());
        // The socket belongs to the namespace it was opened in; the thread that reads it may be anywhere.
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 2048];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, from)) = socket.recv_from(&mut buffer) {
                    let mut answer = format!("{name} ").into_bytes();
                    answer.extend_from_slice(&buffer[..length]);
                    let _ = socket.send_to(&answer, from);
                }
            }
        });
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for UdpService {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Asks `to` once from `source` and returns every answer that came within `limit`: the names of the nodes.
pub fn ask(client: &Client, source: Ipv4Addr, to: SocketAddrV4, text: &str, limit: Duration) -> Result<Vec<String>> {
    let socket = client.space().run(|| -> io::Result<UdpSocket> {
        let socket = UdpSocket::bind((source, 0))?;
        socket.send_to(text.as_bytes(), to)?;
        Ok(socket)
    })?;
    socket.set_read_timeout(Some(limit))?;
    let mut answers = Vec::new();
    let mut buffer = [0; 2048];
    while let Ok((length, from)) = socket.recv_from(&mut buffer) {
        let answer = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let (node, said) = answer.split_once(' ').unwrap_or((&answer, ""));
        if from == SocketAddr::V4(to) && said == text {
            answers.push(node.to_owned());
        } else {
            answers.push(format!("wrong answer {answer:?} from {from}"));
        }
        // After the first answer only a second one, by another node, is waited for.
        socket.set_read_timeout(Some(Duration::from_millis(30)))?;
    }
    Ok(answers)
}
