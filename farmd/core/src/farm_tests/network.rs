//! The simulated lans: what becomes of one datagram. Loss, bursts of loss, copies, disorder, ways that are cut, lans that are down. It knows
//! nothing of what a datagram says. Called by [`super::sim::Sim`] only.

use std::time::Duration;

use super::rng::Rng;
use super::sim::us;

/// What was done to datagrams, for the summary of a test.
#[derive(Clone, Copy, Default, Debug)]
pub struct Traffic {
    /// Sent, one per receiver.
    pub sent: u64,
    /// Lost by chance, in a burst, on a cut way or on a lan that is down.
    pub lost: u64,
    /// Delivered twice.
    pub doubled: u64,
    /// Delivered so late that others overtake them.
    pub late: u64,
}

/// See the module doc.
pub struct Network {
    /// Per mille of datagrams that are lost, doubled, and late.
    pub loss: u64,
    pub duplication: u64,
    pub late: u64,
    /// Longest delay of a late one.
    pub late_by: Duration,
    pub traffic: Traffic,
    /// Bit `to` of `cut[from]`: nothing gets through.
    cut: Vec<u64>,
    lans_down: u64,
    /// Until when everything is lost that a node sends, and that it should receive.
    mute_until: Vec<Duration>,
    deaf_until: Vec<Duration>,
}

impl Network {
    pub fn new(nodes: usize) -> Self {
        Self {
            loss: 0,
            duplication: 0,
            late: 0,
            late_by: us(60_000),
            traffic: Traffic::default(),
            cut: vec![0; nodes],
            lans_down: 0,
            mute_until: vec![Duration::ZERO; nodes],
            deaf_until: vec![Duration::ZERO; nodes],
        }
    }

    pub fn cut(&mut self, from: usize, to: usize) {
        self.cut[from] |= 1 << to;
    }

    pub fn mend(&mut self, from: usize, to: usize) {
        self.cut[from] &= !(1 << to);
    }

    pub fn mend_all(&mut self) {
        self.cut.fill(0);
    }

    pub fn set_lan(&mut self, lan: usize, up: bool) {
        if up {
            self.lans_down &= !(1 << lan);
        } else {
            self.lans_down |= 1 << lan;
        }
    }

    /// Everything that `node` sends (`out`) or should receive is lost until then.
    pub fn burst(&mut self, node: usize, out: bool, until: Duration) {
        let end = if out {
            &mut self.mute_until[node]
        } else {
            &mut self.deaf_until[node]
        };
        *end = until.max(*end);
    }

    /// The last of the bursts is over.
    pub fn bursts_end(&self) -> Duration {
        self.mute_until
            .iter()
            .chain(&self.deaf_until)
            .max()
            .copied()
            .unwrap_or_default()
    }

    pub fn is_cut(&self, from: usize, to: usize) -> bool {
        self.cut[from] & (1 << to) != 0
    }

    /// Neither of the two ways between them is cut.
    pub fn reach(&self, a: usize, b: usize) -> bool {
        !self.is_cut(a, b) && !self.is_cut(b, a)
    }

    /// When a datagram sent at `now` arrives: never, once or twice.
    pub fn carry(&mut self, rng: &mut Rng, now: Duration, from: usize, to: usize, lan: usize) -> [Option<Duration>; 2] {
        self.traffic.sent += 1;
        let gone = self.is_cut(from, to)
            || self.lans_down & (1 << lan) != 0
            || now < self.mute_until[from].max(self.deaf_until[to])
            || rng.chance(self.loss);
        if gone {
            self.traffic.lost += 1;
            return [None, None];
        }
        let first = now + self.delay(rng);
        if !rng.chance(self.duplication) {
            return [Some(first), None];
        }
        self.traffic.doubled += 1;
        [Some(first), Some(now + self.delay(rng))]
    }

    /// 0.1 to 2 ms, each its own: neighbours in the stream change places.
    fn delay(&mut self, rng: &mut Rng) -> Duration {
        if rng.chance(self.late) {
            self.traffic.late += 1;
            return us(rng.range(2000..=self.late_by.as_micros() as u64));
        }
        us(rng.range(100..=2000))
    }
}
