//! What is done to a node, and which connections may end by it.
//!
//! Owns the acts and how each is done and undone. Never decides what is a broken promise.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::chaos::{MODULE, Rig};
use crate::crowd::Life;
use crate::http::Failure;
use crate::pinger::NodeNumber;
use crate::process::wait_until;

/// From doing something to undoing it. A second act begins within it, so that it begins while the first is under way.
pub(super) const BREATH: Duration = Duration::from_millis(500);

/// Something done to one node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Act {
    StopStart,
    Restart,
    KillDaemon,
    Reload,
    Drain,
    Weight,
    Crash,
}

impl Act {
    /// What it is called in tables.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::StopStart => "module stopped and started",
            Self::Restart => "farmd stopped in order and started",
            Self::KillDaemon => "farmd killed (-9) and started",
            Self::Reload => "farmd restarted in place",
            Self::Drain => "drained and undrained",
            Self::Weight => "weight 3, then as before",
            Self::Crash => "power cut",
        }
    }

    /// True if it ends the connections of the node it is done to.
    pub(super) const fn ends_own(self) -> bool {
        match self {
            Self::StopStart | Self::Restart | Self::KillDaemon | Self::Crash => true,
            Self::Reload | Self::Drain | Self::Weight => false,
        }
    }

    /// What `farm` must know for it.
    pub(super) const fn verb(self) -> &'static str {
        match self {
            Self::StopStart | Self::Restart | Self::KillDaemon | Self::Crash => "start",
            Self::Reload => "reload",
            Self::Drain => "drain",
            Self::Weight => "weight",
        }
    }

    /// Does it to a node and undoes it; a dead node stays dead for `aftermath`.
    pub(super) fn perform(self, rig: &Rig, number: NodeNumber, aftermath: Duration) -> Result<Deed> {
        let node = rig.node(number)?;
        let (mut begun, mut back) = (Instant::now(), Instant::now());
        match self {
            Self::StopStart => {
                node.farm_ok(&["stop", MODULE])?;
                std::thread::sleep(BREATH);
                back = Instant::now();
                node.farm_ok(&["start", MODULE])?;
            }
            Self::Restart => {
                node.stop_farmd()?;
                std::thread::sleep(BREATH);
                back = Instant::now();
                rig.start_again(node)?;
            }
            Self::KillDaemon => {
                node.signal_farmd("KILL")?;
                node.wait_farmd_end(Duration::from_secs(10))?;
                std::thread::sleep(BREATH);
                back = Instant::now();
                rig.start_again(node)?;
            }
            // Two nodes never do it at the same time: the second is refused until the first is back, and begins only then.
            Self::Reload => {
                begun = wait_until(Duration::from_secs(20), "the reload", || {
                    let now = Instant::now();
                    node.farm_ok(&["reload"]).ok().map(|_| now)
                })?;
            }
            Self::Drain => {
                node.farm_ok(&["drain", node.name(), "-m", MODULE, "--no-wait"])?;
                std::thread::sleep(BREATH);
                node.farm_ok(&["undrain", node.name(), "-m", MODULE])?;
            }
            Self::Weight => {
                node.farm_ok(&["weight", node.name(), "3", "-m", MODULE])?;
                std::thread::sleep(BREATH);
                node.farm_ok(&["weight", node.name(), "default", "-m", MODULE])?;
            }
            Self::Crash => {
                begun = node.crash()?;
                std::thread::sleep(aftermath);
                back = Instant::now();
                rig.bring_back(&[node])?;
            }
        }
        Ok(Deed {
            act: self,
            node: number,
            begun,
            back,
            done: Instant::now(),
        })
    }
}

/// What was done to whom, from when to when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deed {
    /// What it was.
    pub act: Act,
    /// The node it was done to.
    pub node: NodeNumber,
    /// When it began.
    pub begun: Instant,
    /// When the server began to be started again, if the act ended it: what is opened later is of the new one, which nothing may end.
    pub back: Instant,
    /// When it was done.
    pub done: Instant,
}

impl Deed {
    /// True if `life` may have ended because of it.
    pub(super) fn may_end(&self, life: &Life) -> bool {
        self.act.ends_own() && self.node == life.node && life.opened <= self.back && life.ended >= self.begun
    }

    /// True if `life` was on the node when it began.
    pub(super) fn met(&self, life: &Life) -> bool {
        self.node == life.node && life.opened < self.begun && life.ended > self.begun
    }

    /// How `life` ended before anything else was done to the node, be it long after this was done; `None` if it went on until then.
    pub(super) fn end_of<'a>(&self, life: &'a Life, deeds: &[Self]) -> Option<&'a Failure> {
        let later = |deed: &&Self| deed.node == self.node && deed.begun > self.begun;
        let next = deeds.iter().filter(later).map(|deed| deed.begun).min();
        life.broken.as_ref().filter(|_| next.is_none_or(|at| life.ended <= at))
    }

    /// How long both were under way; `None` if one was done before the other began.
    pub(super) fn beside(&self, other: &Self) -> Option<Duration> {
        let (begun, done) = (self.begun.max(other.begun), self.done.min(other.done));
        done.checked_duration_since(begun).filter(|time| !time.is_zero())
    }
}
