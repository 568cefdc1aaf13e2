//! Finding out, when all other nodes have fallen silent, whether anything comes in here at all.
//!
//! A node that hears nobody is alone, or what is sent to it does not come in: a dead receiver of its network card, a port of the switch that lets nothing out.
//! Then no client's frame comes in either, so that it serves nobody, while its own heartbeats may go out and keep the others from taking over; and when things
//! come in again it would answer clients beside them until it hears them. So the frames that its service interfaces receive are counted as soon as two pulses
//! are silent, and clients are asked whether they are there. As long as nothing comes in [`farm_core::farm::Farm::handle_nothing_in`] is told. Where clients said
//! next to nothing before, or none can be asked, their silence means nothing.
//!
//! ```text
//!            silent, after many frames            a frame
//! Company ────────────────────────────► Nothing ─────────► Something
//!    ▲  └──────── silent, else ───────────│────────────────────▲ │
//!    └──────────── a heartbeat ───────────┴──────────────────────┘
//! ```

use std::time::Duration;

use farm_sys::interface;
use tracing::{debug, info};

use super::Node;

/// Pulses without a heartbeat of anybody after which the frames are counted.
const SILENT_PULSES: u32 = 2;
/// Looks in a pulse.
const LOOKS: u32 = 4;
/// How often clients' frames are counted while all is well, and how many there must have been in that time for their absence to mean something: so many make seven
/// in the three pulses of the default profile that it is looked for.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);
const LIVELY: u64 = 50;
/// How many times in a row clients are asked, a pulse apart; after that once a second.
const ASKED_AT_ONCE: u32 = 5;
const ASK_INTERVAL: Duration = Duration::from_secs(1);

/// Frames for the virtual addresses up to one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Clients {
    frames: u64,
    at: Duration,
    /// There were many in the time before.
    lively: bool,
}

/// What comes in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Inlet {
    /// Heartbeats, or there is nobody that could send some.
    Company(Option<Clients>),
    /// Nothing since the interfaces had received so many frames.
    Nothing {
        /// So many.
        frames: u64,
        /// When that was.
        since: Duration,
        /// When they are counted again.
        look_at: Duration,
        /// When clients are asked again, and how often they were.
        ask_at: Duration,
        asked: u32,
    },
    /// Something, though no heartbeat, since the others fell silent; or nothing can be concluded.
    Something,
}

/// What follows from a look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Found {
    /// Nothing comes in; clients are to be asked.
    Nothing { ask: bool },
    /// Something came in before it could be known that nothing does.
    Something,
    /// Something comes in again, after this time. The others may be heard next.
    Again(Duration),
}

impl Default for Inlet {
    fn default() -> Self {
        Self::Company(None)
    }
}

impl Inlet {
    /// A look at `now`; `silent_at` is when the others have been silent for long enough, if there are such. `clients` are the frames for the virtual addresses,
    /// `None` if no client can be asked; `frames` what the service interfaces have received, `None` if that is not known.
    fn look(
        self,
        now: Duration,
        pulse: Duration,
        silent_at: Option<Duration>,
        clients: impl FnOnce() -> Option<u64>,
        frames: impl FnOnce() -> Option<u64>,
    ) -> (Self, Option<Found>) {
        let Some(silent_at) = silent_at.filter(|at| now >= *at) else {
            return (self.keep_count(now, clients), None);
        };
        let look_at = now + pulse / LOOKS;
        match self {
            Self::Company(before) => {
                let clients = clients();
                let lively = before
                    .zip(clients)
                    .is_some_and(|(before, frames)| before.lively || frames >= before.frames + LIVELY);
                // A pulse late there is nothing to compare with before the others count as gone.
                match frames().filter(|_| lively && now < silent_at + pulse) {
                    Some(frames) => {
                        let nothing = Self::Nothing {
                            frames,
                            since: now,
                            look_at,
                            ask_at: now + pulse,
                            asked: 1,
                        };
                        (nothing, Some(Found::Nothing { ask: true }))
                    }
                    None => (Self::Something, None),
                }
            }
            Self::Nothing { look_at, .. } if now < look_at => (self, None),
            Self::Nothing {
                frames: before,
                since,
                ask_at,
                asked,
                ..
            } => {
                if frames() != Some(before) {
                    let silence = now - since;
                    let again = silence >= pulse;
                    let found = if again { Found::Again(silence) } else { Found::Something };
                    return (Self::Something, Some(found));
                }
                let ask = now >= ask_at;
                let asked = asked.saturating_add(u32::from(ask));
                let wait = if asked < ASKED_AT_ONCE { pulse } else { ASK_INTERVAL };
                let nothing = Self::Nothing {
                    frames: before,
                    since,
                    look_at,
                    ask_at: if ask { now + wait } else { ask_at },
                    asked,
                };
                (nothing, Some(Found::Nothing { ask }))
            }
            Self::Something => (self, None),
        }
    }

    /// Nobody is missed: counts what clients send, if it is time.
    fn keep_count(self, now: Duration, clients: impl FnOnce() -> Option<u64>) -> Self {
        let before = match self {
            Self::Company(before) => before,
            Self::Nothing { .. } | Self::Something => None,
        };
        if before.is_some_and(|before| now < before.at + COUNT_INTERVAL) {
            return self;
        }
        Self::Company(clients().map(|frames| Clients {
            frames,
            at: now,
            lively: before.is_some_and(|before| frames >= before.frames + LIVELY),
        }))
    }

    /// When there is something to look at.
    fn looks_at(self, silent_at: Option<Duration>) -> Option<Duration> {
        match self {
            Self::Company(_) => silent_at,
            Self::Nothing { look_at, .. } => Some(look_at),
            Self::Something => None,
        }
    }
}

impl Node {
    /// When [`Self::watch_inlet`] has something to do.
    pub(super) fn inlet_timeout(&self) -> Option<Duration> {
        self.inlet.looks_at(self.silent_at())
    }

    /// Looks whether anything comes in, if it is time; before the farm draws conclusions from the silence.
    pub(super) fn watch_inlet(&mut self, now: Duration) {
        let pulse = self.cluster.heartbeat_interval;
        let clients = || self.clients_frames();
        let frames = || self.frames_in();
        let (inlet, found) = self.inlet.look(now, pulse, self.silent_at(), clients, frames);
        self.inlet = inlet;
        match found {
            None => {}
            Some(Found::Nothing { ask }) => {
                if ask {
                    self.plane.ask_around();
                }
                self.farm.handle_nothing_in(now);
            }
            Some(Found::Something) => self.farm.handle_something_in(now),
            Some(Found::Again(silence)) => {
                info!("something comes in again, after {} ms", silence.as_millis());
            }
        }
    }

    /// When it is silent enough to look.
    fn silent_at(&self) -> Option<Duration> {
        let since = self.farm.membership().silent_since()?;
        Some(since + self.cluster.heartbeat_interval * SILENT_PULSES)
    }

    /// Frames that were judged; `None` if no client is known that can be asked whether it is there.
    fn clients_frames(&self) -> Option<u64> {
        let mut known = self.farm.requesters().iter();
        known
            .any(|requester| requester.addr.is_ipv4())
            .then(|| self.counters.frames())
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
        let frames = interface::frames_received(&interfaces);
        frames
            .inspect_err(|error| debug!(%error, "frames cannot be counted"))
            .ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PULSE: Duration = Duration::from_millis(50);

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    /// One look; the others have been silent since `since`.
    fn look(inlet: Inlet, now: u64, since: u64, clients: Option<u64>, frames: u64) -> (Inlet, Option<Found>) {
        let silent_at = Some(ms(since) + PULSE * SILENT_PULSES);
        inlet.look(ms(now), PULSE, silent_at, || clients, || Some(frames))
    }

    /// Clients have sent `frames` in the second before 2 s.
    fn company(frames: u64) -> Inlet {
        let (inlet, _) = look(Inlet::default(), 1000, 1000, Some(10), 0);
        look(inlet, 2000, 2000, Some(10 + frames), 0).0
    }

    #[test]
    fn who_misses_frames_is_told_and_asks_until_something_comes() {
        let (mut inlet, mut found) = look(company(LIVELY), 2100, 2000, Some(60), 500);
        let mut asked = 0;
        for now in (2100..3600).step_by(12) {
            assert!(matches!(found, None | Some(Found::Nothing { .. })), "{found:?}");
            asked += u32::from(found == Some(Found::Nothing { ask: true }));
            (inlet, found) = look(inlet, now, 2000, Some(60), 500);
        }
        assert!((ASKED_AT_ONCE..=ASKED_AT_ONCE + 2).contains(&asked), "{asked}");
        assert!(inlet.looks_at(None).is_some());
        let (inlet, found) = look(inlet, 3700, 2000, Some(60), 501);
        assert_eq!((inlet, found), (Inlet::Something, Some(Found::Again(ms(1600)))));
        assert_eq!(
            (inlet.looks_at(Some(ms(2100))), look(inlet, 3800, 2000, Some(60), 501)),
            (None, (inlet, None))
        );
        // A heartbeat.
        assert!(matches!(
            look(inlet, 3900, 3890, Some(60), 502),
            (Inlet::Company(Some(_)), None)
        ));
    }

    #[test]
    fn what_comes_within_a_pulse_shows_that_nothing_is_wrong() {
        let (inlet, _) = look(company(LIVELY), 2100, 2000, Some(60), 500);
        assert_eq!(look(inlet, 2105, 2000, Some(60), 501), (inlet, None), "not yet");
        assert_eq!(
            look(inlet, 2113, 2000, Some(60), 501),
            (Inlet::Something, Some(Found::Something))
        );
    }

    #[test]
    fn silence_means_nothing_where_clients_were_silent_or_none_can_be_asked_or_it_is_too_late() {
        let nothing = (Inlet::Something, None);
        assert_eq!(look(company(LIVELY - 1), 2100, 2000, Some(59), 500), nothing);
        assert_eq!(look(Inlet::default(), 2100, 2000, Some(60), 500), nothing);
        assert_eq!(look(company(LIVELY), 2100, 2000, None, 500), nothing);
        assert_eq!(look(company(LIVELY), 2150, 2000, Some(60), 500), nothing);
        let lively_since = look(company(0), 2900, 2800, Some(10 + LIVELY), 500);
        assert!(matches!(
            lively_since,
            (Inlet::Nothing { .. }, Some(Found::Nothing { ask: true }))
        ));
    }
}
