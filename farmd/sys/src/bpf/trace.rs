//! What the program tells of each frame while somebody listens: switching to its twin that tells, and reading that.
//!
//! Owns the form of an event and the ring that they come through. Without a listener the ordinary program stands in its place and tells nothing.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use aya::maps::{Map, MapData, RingBuf};

use super::layout::{BUCKETS, SNAP_AT, UNTOLD_AT};
use super::{BpfError, Filter, PROGRAM, Shared, failed};

/// Name of the program that tells.
pub(super) const TELLING: &str = "farm_traced";
/// Bytes of an event before those of the frame.
const HEADER: usize = 40;

/// What became of a frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// To the stack.
    Accepted,
    /// Nowhere.
    Dropped,
    /// To its owner alone.
    SentOn,
    /// To farmd, which judges it.
    LeftToFarmd,
}

/// One frame, as the program tells of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event<'a> {
    /// Nanoseconds of [`BootInstant`](crate::clock::BootInstant).
    pub at: u64,
    /// Interface it came in on.
    pub ifindex: u32,
    /// Length of the whole frame.
    pub length: u32,
    /// What became of it.
    pub outcome: Outcome,
    /// The counter that it is counted in: a place in [`super::KernelCounters::read`].
    pub why: usize,
    /// Number of its group, and its bucket there, if they were looked up.
    pub place: Option<(u16, u16)>,
    /// Number of the node that owns the bucket.
    pub owner: Option<u8>,
    /// Nodes that it was sent on to: bit 0 is node 0.
    pub sent_to: u64,
    /// The first bytes of it.
    pub bytes: &'a [u8],
}

impl<'a> Event<'a> {
    /// `struct event` of `bpf/farm.h`; `None` if it is none.
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, frame) = bytes.split_at_checked(HEADER)?;
        let word = |at: usize| header.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
        let long = |at: usize| header.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes);
        let [outcome, why, owner, placed, ..] = *header.get(32..)? else {
            return None;
        };
        let place = word(28)?;
        let buckets = BUCKETS as u32;
        let place = (u16::try_from(place / buckets).ok()?, (place % buckets) as u16);
        Some(Self {
            at: long(0)?,
            ifindex: word(16)?,
            length: word(20)?,
            outcome: match outcome {
                0 => Outcome::Accepted,
                1 => Outcome::Dropped,
                2 => Outcome::SentOn,
                3 => Outcome::LeftToFarmd,
                _ => return None,
            },
            why: why.into(),
            place: (placed != 0).then_some(place),
            owner: (placed != 0 && owner != 0xff).then_some(owner),
            sent_to: long(8)?,
            bytes: frame.get(..word(24)? as usize)?,
        })
    }
}

/// What the program tells, in order; for one reader.
pub struct Events {
    ring: RingBuf<MapData>,
    shared: Arc<Shared>,
    untold: u64,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Events(..)")
    }
}

impl Events {
    /// Hands what is there to `take`, at most `most` frames; returns how many.
    pub fn read(&mut self, most: usize, mut take: impl FnMut(Event<'_>)) -> usize {
        for read in 0..most {
            let Some(item) = self.ring.next() else { return read };
            if let Some(event) = Event::parse(&item) {
                take(event);
            }
        }
        most
    }

    /// Frames that there was no room to tell of, since the last time this was asked.
    pub fn untold(&mut self) -> u64 {
        let all = self.shared.at(UNTOLD_AT).load(Ordering::Relaxed);
        all.wrapping_sub(std::mem::replace(&mut self.untold, all))
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl Filter {
    /// What the program tells from here on, for one reader at a time. Nothing until [`Self::tell`].
    ///
    /// # Errors
    /// What the kernel says.
    pub fn events(&self) -> Result<Events, BpfError> {
        let what = "what the kernel program tells cannot be read";
        let fd = self.events.as_fd().try_clone_to_owned().map_err(|e| failed(what, &e))?;
        let data = MapData::from_fd(fd).map_err(|e| failed(what, &e))?;
        let map = Map::from_map_data(data).map_err(|e| failed(what, &e))?;
        let mut ring = RingBuf::try_from(map).map_err(|e| failed(what, &e))?;
        // What was told to somebody else.
        while ring.next().is_some() {}
        let untold = self.shared.at(UNTOLD_AT).load(Ordering::Relaxed);
        Ok(Events {
            ring,
            shared: Arc::clone(&self.shared),
            untold,
        })
    }

    /// Has the program tell of each frame, with `snap` bytes of it, wherever it is attached and will be; with `None` no longer. True if that is a change.
    ///
    /// # Errors
    /// What the kernel says. Where the programs cannot be exchanged, the one that is there goes on.
    pub fn tell(&mut self, snap: Option<u32>) -> Result<bool, BpfError> {
        self.shared
            .at(SNAP_AT)
            .store(snap.unwrap_or(0).into(), Ordering::Release);
        let wanted = if snap.is_some() { TELLING } else { PROGRAM };
        if self.chosen == wanted {
            return Ok(false);
        }
        self.chosen = wanted;
        self.exchange().map(|()| true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_reads_as_it_is_laid_out() {
        let mut bytes = Vec::new();
        for long in [7u64, 1 << 5 | 1 << 63] {
            bytes.extend(long.to_ne_bytes());
        }
        for word in [3u32, 1514, 4, 2 * 4096 + 17] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend([2, 11, 5, 1, 0, 0, 0, 0]);
        bytes.extend([1, 2, 3, 4]);
        let event = Event::parse(&bytes).unwrap();
        let expected = Event {
            at: 7,
            ifindex: 3,
            length: 1514,
            outcome: Outcome::SentOn,
            why: 11,
            place: Some((2, 17)),
            owner: Some(5),
            sent_to: 1 << 5 | 1 << 63,
            bytes: &[1, 2, 3, 4],
        };
        assert_eq!(event, expected);
        bytes[34] = 0xff;
        assert_eq!(Event::parse(&bytes).unwrap().owner, None);
        bytes[35] = 0;
        assert_eq!(Event::parse(&bytes).unwrap().place, None);
        bytes[32] = 9;
        assert_eq!(Event::parse(&bytes), None);
        for length in 0..bytes.len() {
            assert_eq!(Event::parse(&bytes[..length]), None, "{length} bytes");
        }
    }
}
