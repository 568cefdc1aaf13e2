//! Heartbeats in and out, and the lease that goes with them.

use std::net::SocketAddr;
use std::time::Duration;

use farm_core::farm::Refused;
use farm_core::wire::heartbeat::ParseError;
use tracing::warn;

use super::{Node, Stranger};
use crate::standstill;

/// Datagrams taken from one socket before everything else has its turn.
const DATAGRAM_BUDGET: usize = 512;
/// How often a node that leaves says so.
const GOODBYES: usize = 3;
/// Time between two log lines about datagrams from the same address that are not authentic.
const REFUSAL_LOG_INTERVAL: Duration = Duration::from_secs(60);

impl Node {
    pub(super) fn receive(&mut self, buffer: &mut [u8]) {
        let (start, farm) = (self.start, &mut self.farm);
        let mut refusals = Vec::new();
        let mut received = 0;
        let strangers = self.heartbeats.receive(buffer, DATAGRAM_BUDGET, |lan, from, datagram| {
            received += 1;
            let now = start.elapsed();
            if let Err(refused) = farm.handle_datagram(now, lan, datagram) {
                refusals.push((now, from, refused));
            }
        });
        self.received += received + strangers;
        if strangers > 0 {
            *self.refused.entry("unknown_address").or_default() += strangers;
        }
        for (now, from, refused) in refusals {
            self.note_refusal(now, from, refused);
        }
    }

    /// Counts a refused datagram, and says so once a minute and address if it is a sign of trouble.
    fn note_refusal(&mut self, now: Duration, from: SocketAddr, refused: Refused) {
        *self.refused.entry(refused.name()).or_default() += 1;
        let text = match refused {
            Refused::Parse(ParseError::Authentication) => {
                "are not authentic: its cluster.key differs from the one here".to_owned()
            }
            Refused::Parse(error) => format!("cannot be used: {error}"),
            Refused::Membership(farm_core::membership::Refusal::OwnName) => {
                "claim to be from this node: two nodes have the same name".to_owned()
            }
            Refused::Membership(_) => return,
        };
        let stranger = self.strangers.entry(from.ip()).or_insert(Stranger {
            count: 0,
            last: now,
            logged: None,
            what: String::new(),
        });
        stranger.count += 1;
        stranger.last = now;
        stranger.what.clone_from(&text);
        if stranger.logged.is_none_or(|at| now >= at + REFUSAL_LOG_INTERVAL) {
            stranger.logged = Some(now);
            let count = stranger.count;
            warn!(from = %from.ip(), count, "heartbeats {text}");
            self.log_to_active('E', "membership", &format!("Heartbeats from {} {text}", from.ip()));
        }
    }

    /// Sends what is due, and lets the data plane accept for as long as nobody takes over.
    pub(super) fn speak(&mut self) {
        let to_all = self.transmit();
        // As of the last look at the clock that would have noticed a pause.
        let now = self.last_turn;
        let left = self.farm.lease_until(now).saturating_sub(now);
        self.lease.renew(self.start + now + left);
        // Only now: to find out why takes its time.
        if to_all {
            self.note_pace();
        }
    }

    /// True if a heartbeat to everybody was among what has gone.
    fn transmit(&mut self) -> bool {
        self.sent_rate.note(self.now(), self.sent_bytes);
        let mut to_all = false;
        while let Some(transmit) = self.farm.poll_transmit() {
            to_all |= !transmit.broadcast && !transmit.nudge;
            self.heartbeat_bytes = transmit.payload.len() as u64;
            let sent = self.heartbeats.send(&transmit);
            self.sent += sent.datagrams;
            self.sent_bytes += sent.datagrams * transmit.payload.len() as u64;
            self.send_failed += sent.failed;
        }
        to_all
    }

    /// A heartbeat has gone; says so if that was late, with what is known of why.
    fn note_pace(&mut self) {
        let now = self.now();
        if let Some(late) = self.pace.speak(now) {
            let priority = if self.realtime {
                ""
            } else {
                ", which has no real-time priority"
            };
            warn!(
                count = self.pace.late(),
                "{late}{priority}; {}",
                standstill::describe(&["owner"])
            );
        }
    }

    /// Each lost one would cost the others the detection time, so it is said more than once.
    pub(super) fn say_goodbye(&mut self, now: Duration, returning: bool) {
        for _ in 0..GOODBYES {
            self.farm.leave(now, returning);
            self.transmit();
        }
        self.left = Some(now);
    }
}
