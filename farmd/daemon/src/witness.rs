//! Asks the witness of a module's partition policy whether it answers.
//!
//! Owns one task per module with such a policy. While the farm is whole the witness is asked now and then, so that one that does not answer is
//! known before it is needed; when a node goes missing it is asked at once and often. It decides nothing: the owner loop is told each
//! change, and [`farm_core::farm`] what follows from it. Two questions without an answer in a row end an answer of before.

use std::net::IpAddr;
use std::time::Duration;

use farm_core::id::ModuleName;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use crate::event::{Event, EventSender};

/// Time between two questions while all nodes are together.
const CALM: Duration = Duration::from_secs(5);
/// Time between two questions while a node is missing.
const ALERT: Duration = Duration::from_millis(200);
/// How long one answer may take.
const LIMIT: Duration = Duration::from_millis(150);
/// Questions without an answer in a row, after which the witness does not answer.
const MISSES: u32 = 2;

/// The task; dropping it ends it.
#[derive(Debug)]
pub struct Witness {
    whole: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Witness {
    /// Begins to ask `addr` for `module`; each change is told to `events`.
    pub fn start(runtime: &Handle, module: ModuleName, addr: IpAddr, events: EventSender) -> Self {
        let (whole, changes) = watch::channel(false);
        let task = runtime.spawn(ask(module, addr, events, changes));
        Self { whole, task }
    }

    /// Tells whether all nodes are together.
    pub fn set_whole(&self, whole: bool) {
        self.whole
            .send_if_modified(|before| std::mem::replace(before, whole) != whole);
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn ask(module: ModuleName, addr: IpAddr, events: EventSender, mut whole: watch::Receiver<bool>) {
    let mut told = None;
    let mut misses = 0;
    let mut token = std::process::id() << 16;
    loop {
        let begin = Instant::now();
        token = token.wrapping_add(1);
        // A panic of the ping itself counts as no answer.
        let answer = tokio::task::spawn_blocking(move || farm_sys::icmp::ping(addr, token, LIMIT)).await;
        let (answers, detail) = match answer {
            Ok(Ok(rtt)) => (true, format!("{addr} answers within {} us", rtt.as_micros())),
            Ok(Err(error)) => (false, error.to_string()),
            Err(error) => (false, error.to_string()),
        };
        misses = if answers { 0 } else { misses + 1 };
        let verdict = answers || (misses < MISSES && told == Some(true));
        if told != Some(verdict) {
            told = Some(verdict);
            events.send(Event::Witness {
                module: module.clone(),
                answers: verdict,
                detail,
            });
        }
        let pause = if *whole.borrow_and_update() { CALM } else { ALERT };
        tokio::select! {
            () = sleep_until(begin + pause) => {}
            changed = whole.changed() => if changed.is_err() { return },
        }
    }
}
