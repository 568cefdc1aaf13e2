//! Finding out, when all other nodes have fallen silent, whether anything comes in here at all.
//!
//! A node that hears nobody is alone, or what is sent to it does not come in: a dead receiver of its network card, a port of the switch that lets nothing out.
//! Then no client's frame comes in either, so that it serves nobody, while its own heartbeats may go out and keep the others from taking over; and when things
//! come in again it would answer clients beside them until it hears them. So the frames that its service interfaces receive are counted as soon as two pulses
//! are silent, and clients are asked whether they are there. As long as nothing comes in [`farm_core::farm::Farm::handle_nothing_in`] is told. Where others than the
//! nodes said next to nothing before, their silence means nothing.

use std::time::Duration;

use farm_sys::interface;
use tracing::{debug, info};

use super::Node;

/// Pulses without a heartbeat of anybody after which the frames are counted.
const SILENT_PULSES: u32 = 2;
/// How often frames are counted while all is well, and how many there must have been in that time, heartbeats apart, for their absence to mean something: so many
/// make seven in the three pulses of the default profile that it is looked for.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);
const LIVELY: u64 = 50;
/// How many times in a row clients are asked, a pulse apart; after that once in as many pulses as fit a second.
const ASKED_AT_ONCE: u32 = 5;
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// What the service interfaces had received, and this node of heartbeats, at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Counted {
    frames: u64,
    heartbeats: u64,
    at: Duration,
    /// Others than the nodes said something in the time before.
    lively: bool,
}

impl Counted {
    /// True if since then so many frames came that were no heartbeats.
    fn is_lively_by(self, frames: u64, heartbeats: u64) -> bool {
        let others = frames.saturating_sub(self.frames);
        others.saturating_sub(heartbeats - self.heartbeats) >= LIVELY
    }
}

/// What comes in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Inlet {
    /// Heartbeats, or there is nobody that could send some.
    Company(Option<Counted>),
    /// Nothing since the interfaces had received so many frames.
    Nothing {
        /// So many.
        frames: u64,
        /// When that was.
        since: Duration,
        /// They were counted again, and were no more.
        confirmed: bool,
        /// When they are counted again.
        look_at: Duration,
        /// When clients are asked again, and how often they were.
        ask_at: Duration,
        asked: u32,
    },
    /// Something, though no heartbeat, since the others fell silent; or nothing can be concluded.
    Something,
}

impl Default for Inlet {
    fn default() -> Self {
        Self::Company(None)
    }
}

impl Node {
    /// When [`Self::watch_inlet`] has something to do.
    pub(super) fn inlet_timeout(&self) -> Option<Duration> {
        match self.inlet {
            Inlet::Company(_) => self.silent_at(),
            Inlet::Nothing { look_at, .. } => Some(look_at),
            Inlet::Something => None,
        }
    }

    /// Looks whether anything comes in, if it is time; before the farm draws conclusions from the silence.
    pub(super) fn watch_inlet(&mut self, now: Duration) {
        if self.silent_at().is_none_or(|at| now < at) {
            self.keep_count(now);
            return;
        }
        let look_at = now + self.cluster.heartbeat_interval;
        match self.inlet {
            Inlet::Company(before) => {
                let frames = self.frames_in();
                let was_lively = |frames| before.is_some_and(|b| b.lively || b.is_lively_by(frames, self.received));
                self.inlet = match frames {
                    Some(frames) if was_lively(frames) => Inlet::Nothing {
                        frames,
                        since: now,
                        confirmed: false,
                        look_at,
                        ask_at: now,
                        asked: 0,
                    },
                    _ => Inlet::Something,
                };
                if self.inlet != Inlet::Something {
                    self.miss_everything(now);
                }
            }
            Inlet::Nothing {
                frames,
                since,
                confirmed,
                ..
            } if self.frames_in() != Some(frames) => {
                if self.farm.membership().fenced().is_some() {
                    info!("something comes in again, after {} ms", (now - since).as_millis());
                }
                self.inlet = Inlet::Something;
                // Else it comes in again, and the others may be heard next.
                if !confirmed {
                    self.farm.handle_something_in(now);
                }
            }
            Inlet::Nothing { look_at: due, .. } if now >= due => {
                if let Inlet::Nothing {
                    look_at: at, confirmed, ..
                } = &mut self.inlet
                {
                    *at = look_at;
                    *confirmed = true;
                }
                self.miss_everything(now);
            }
            Inlet::Nothing { .. } | Inlet::Something => {}
        }
    }

    /// Nobody is missed: counts what comes in, if it is time.
    fn keep_count(&mut self, now: Duration) {
        let before = match self.inlet {
            Inlet::Company(before) => before,
            Inlet::Nothing { .. } | Inlet::Something => None,
        };
        let heartbeats = self.received;
        if before.is_some_and(|before| now < before.at + COUNT_INTERVAL) {
            return;
        }
        let counted = self.frames_in().map(|frames| Counted {
            frames,
            heartbeats,
            at: now,
            lively: before.is_some_and(|before| before.is_lively_by(frames, heartbeats)),
        });
        self.inlet = Inlet::Company(counted);
    }

    /// Nothing has come in: asks clients, if it is time, and tells the farm.
    fn miss_everything(&mut self, now: Duration) {
        if let Inlet::Nothing { ask_at, asked, .. } = &mut self.inlet
            && now >= *ask_at
        {
            *asked = asked.saturating_add(1);
            if *asked >= ASKED_AT_ONCE {
                *ask_at = now + ASK_INTERVAL;
            }
            self.plane.ask_around();
        }
        self.farm.handle_nothing_in(now);
    }

    /// When it is silent enough to look.
    fn silent_at(&self) -> Option<Duration> {
        let since = self.farm.membership().silent_since()?;
        Some(since + self.cluster.heartbeat_interval * SILENT_PULSES)
    }

    /// Frames that the service interfaces have received; `None` if there are no such interfaces, or it cannot be known.
    fn frames_in(&self) -> Option<u64> {
        let vips = self.modules.values().flat_map(|module| &module.vips);
        let mut interfaces: Vec<u32> = vips.map(|vip| vip.interface).collect();
        interfaces.sort_unstable();
        interfaces.dedup();
        if interfaces.is_empty() {
            return None;
        }
        let frames = interface::received(&interfaces);
        frames
            .inspect_err(|error| debug!(%error, "frames cannot be counted"))
            .ok()
    }
}
