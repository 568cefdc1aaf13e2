//! A thread that looks this host's connections up, so that no packet waits for it: the kernel walks whole tables for each look-up, which takes
//! milliseconds on an idle machine. Keeps no answer; the data plane's thread asks and is woken with it.

use std::io;
use std::net::IpAddr;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use tracing::{debug, warn};

use super::connections::{Connection, Connections};

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
}

/// See the module doc.
#[derive(Debug)]
pub struct Lister {
    questions: Option<mpsc::Sender<(Instant, Vec<IpAddr>)>>,
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
        let (questions, inbox) = mpsc::channel::<(Instant, Vec<IpAddr>)>();
        let run = move || {
            // Hand-overs wait for this thread as they do for the data plane's.
            if let Err(error) = farm_sys::sched::set_nice(nice) {
                debug!(%error, "the thread that lists connections keeps its ordinary share of the processors");
            }
            for (began, vips) in inbox {
                let tracked = connections.tracked();
                answer(Listed {
                    began,
                    connections: connections.list(&vips),
                    vips,
                    tracked,
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

    /// Asks for the connections to `vips`, unless a look-up is under way.
    pub fn ask(&mut self, vips: Vec<IpAddr>) {
        if self.asked.is_none()
            && let Some(questions) = &self.questions
        {
            let now = Instant::now();
            if questions.send((now, vips)).is_ok() {
                self.asked = Some(now);
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
