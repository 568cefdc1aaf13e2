//! A thread that looks this host's connections up, so that no packet waits for it: the kernel walks whole tables for each look-up, which takes
//! milliseconds on an idle machine. Before that it forgets what is half open in buckets that were lost. Keeps no answer; the data plane's thread asks and is woken with it.

use std::io;
use std::net::IpAddr;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Instant;

use farm_core::balance::plan::Plan;
use farm_core::wire::heartbeat::BucketSet;
use tracing::{debug, info, warn};

use super::connections::{Connection, Connections, place};
use crate::reset;

/// Buckets that this host had open and has lost without a hand-over. What was half open in them may have been opened by who has them now: the client's request came to
/// both, and only one of the answers came to the client. The stack would send its own answer again, and reset the client's connection as one that it does not know.
#[derive(Debug, Clone)]
pub struct Lost {
    /// By which plan.
    pub plan: Arc<Plan>,
    /// Of each group of it.
    pub buckets: Vec<BucketSet>,
}

impl Lost {
    /// True if the connection lies in one of them.
    pub fn contains(&self, connection: Connection) -> bool {
        place(&self.plan, connection)
            .is_some_and(|(group, bucket, _)| self.buckets.get(group).is_some_and(|set| set.contains(bucket.index())))
    }

    /// Has the kernel forget what is half open in them; how much that was.
    fn forget(&self) -> u32 {
        let vips: Vec<IpAddr> = self.plan.vips.iter().map(|vip| vip.addr).collect();
        let forgotten = reset::forget_half_open(&vips, |vip, client| self.contains(Connection { vip, client }));
        match &forgotten {
            Ok(0) => {}
            Ok(count) => info!(
                count,
                "handshakes are forgotten in buckets that this node has lost: who has them now may have answered too"
            ),
            Err(error) => {
                warn!(%error, "handshakes in buckets that this node has lost cannot be forgotten: clients that another node has answered too may be reset")
            }
        }
        forgotten.unwrap_or_default()
    }
}

/// A question.
#[derive(Debug)]
struct Question {
    began: Instant,
    vips: Vec<IpAddr>,
    lost: Vec<Lost>,
}

/// An answer.
#[derive(Debug)]
pub struct Listed {
    /// When the look-up began.
    pub began: Instant,
    /// The addresses it was asked for.
    pub vips: Vec<IpAddr>,
    /// What it has found.
    pub connections: io::Result<Vec<Connection>>,
    /// Whether some may end in containers.
    pub tracked: bool,
    /// Of how many losses the handshakes were forgotten before, and how many these were.
    pub forgot: usize,
    /// See there.
    pub handshakes: u32,
}

/// See the module doc.
#[derive(Debug)]
pub struct Lister {
    questions: Option<mpsc::Sender<Question>>,
    /// When the look-up under way was asked for.
    asked: Option<Instant>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Lister {
    /// Starts the thread in the network namespace of the caller; it gives each answer to `answer`.
    ///
    /// # Errors
    /// What the kernel says if it cannot be asked, or if there is no thread.
    pub fn start(nice: i8, answer: impl Fn(Listed) + Send + 'static) -> io::Result<Self> {
        let mut connections = Connections::open()?;
        let (questions, inbox) = mpsc::channel::<Question>();
        let run = move || {
            // Hand-overs wait for this thread as they do for the data plane's.
            if let Err(error) = farm_sys::sched::set_nice(nice) {
                debug!(%error, "the thread that lists connections keeps its ordinary share of the processors");
            }
            for Question { began, vips, lost } in inbox {
                let handshakes = lost.iter().map(Lost::forget).sum();
                let tracked = connections.tracked();
                answer(Listed {
                    began,
                    connections: connections.list(&vips),
                    vips,
                    tracked,
                    forgot: lost.len(),
                    handshakes,
                });
            }
        };
        let thread = thread::Builder::new().name("connections".into()).spawn(run)?;
        Ok(Self {
            questions: Some(questions),
            asked: None,
            thread: Some(thread),
        })
    }

    /// Asks for the connections to `vips`, unless a look-up is under way; what is half open in buckets that are `lost` is forgotten first.
    pub fn ask(&mut self, vips: Vec<IpAddr>, lost: &[Lost]) {
        if self.asked.is_none()
            && let Some(questions) = &self.questions
        {
            let began = Instant::now();
            let lost = lost.to_vec();
            if questions.send(Question { began, vips, lost }).is_ok() {
                self.asked = Some(began);
            }
        }
    }

    /// The answer has come.
    pub fn handle_answer(&mut self) {
        self.asked = None;
    }

    /// True if a look-up is under way.
    pub fn is_busy(&self) -> bool {
        self.asked.is_some()
    }
}

impl Drop for Lister {
    fn drop(&mut self) {
        self.questions = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the thread that lists connections ended with a panic");
        }
    }
}
