//! Whether an interface gets the kernel's program at XDP as well, ahead of the one at tc, and whether it proves itself there.
//!
//! Pure: what is wanted, what a device looks like and what has come in on it are values. The data plane's thread looks, attaches and detaches
//! (`raw/early.rs`). Nothing depends on XDP: without it the program at tc judges every frame.

use std::time::{Duration, Instant};

use farm_core::balance::plan::Plan;
use farm_core::config::{PlaneChoice, XdpChoice};
use farm_sys::nic::{Nic, Received};

/// How long frames are counted before the program is attached: some pulses of the other members.
pub const SAMPLE: Duration = Duration::from_millis(300);
/// How long the carrier may be away after it, while the driver sets up its queues anew: negotiation on copper takes some three seconds.
const CARRIER: Duration = Duration::from_secs(10);
/// How long nothing may come in once the carrier is there, where frames came in before.
const SILENCE: Duration = Duration::from_secs(3);
/// Time between two looks at what has come in.
pub const LOOK: Duration = Duration::from_millis(500);

/// What the modules with addresses on an interface want of it; `None` if none of their frames are judged in the kernel.
pub fn wish(plan: &Plan, interface: u32) -> Option<XdpChoice> {
    let vips = plan.vips.iter().filter(|vip| vip.interface == interface);
    vips.filter(|vip| vip.choice != PlaneChoice::Raw)
        .map(|vip| vip.xdp)
        .max()
}

/// Why a device has no XDP unless somebody wants it; `None` for a card.
pub fn objection(nic: &Nic) -> Option<String> {
    match (&nic.kind, &nic.driver, &nic.on_bus) {
        (Some(kind), ..) => Some(format!("it is a {kind} device")),
        (None, _, None) => Some("it is no card with a driver".to_owned()),
        (None, Some(driver), Some(_)) if driver == "virtio_net" => {
            Some("it is a virtual card (virtio_net), which XDP costs more than it saves".to_owned())
        }
        (None, ..) if nic.strips_tags && nic.has_vlans => Some(
            "it takes VLAN tags off before XDP could tell its VLANs' frames (ethtool -K ... rxvlan off changes that)"
                .to_owned(),
        ),
        (None, ..) => None,
    }
}

/// Whether the driver can send a frame as it came in: a card's frames have their checksums, which a veth's may lack, and nothing of them is kept apart.
pub fn can_send(nic: &Nic) -> bool {
    nic.kind.is_none() && nic.on_bus.is_some() && !nic.strips_tags
}

/// What a look at an interface on probation says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Finding {
    /// Nothing yet.
    Wait,
    /// Frames come in.
    Works,
    /// They do not, as they did before: why.
    Fails(String),
}

/// An interface that has just got the program in its driver.
#[derive(Clone, Debug)]
pub struct Probation {
    since: Instant,
    /// Frames came in before.
    lively: bool,
    /// Since when the carrier is there, and what had come in by then.
    up: Option<(Instant, u64)>,
}

impl Probation {
    /// Attached at `now`; what had come in at the beginning and at the end of the [`SAMPLE`] before.
    pub fn new(now: Instant, first: Received, last: Received) -> Self {
        Self {
            since: now,
            lively: first.up && last.frames > first.frames,
            up: None,
        }
    }

    /// What `received` by `now` says.
    pub fn look(&mut self, now: Instant, received: Received) -> Finding {
        if !received.up {
            self.up = None;
            let waited = now.saturating_duration_since(self.since);
            // An interface without a carrier before is told nothing by one without it now.
            return if waited > CARRIER && self.lively {
                Finding::Fails(format!("the carrier did not come back in {} s", CARRIER.as_secs()))
            } else {
                Finding::Wait
            };
        }
        let (since, before) = *self.up.get_or_insert((now, received.frames));
        // Some drivers count from 0 again.
        if received.frames != before {
            Finding::Works
        } else if self.lively && now.saturating_duration_since(since) > SILENCE {
            Finding::Fails(format!("nothing came in any more in {} s", SILENCE.as_secs()))
        } else {
            Finding::Wait
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card() -> Nic {
        Nic {
            kind: None,
            driver: Some("ixgbe".to_owned()),
            on_bus: Some("0000:03:00.0".to_owned()),
            strips_tags: false,
            has_vlans: false,
        }
    }

    #[test]
    fn cards_get_xdp_and_what_the_kernel_makes_up_does_not() {
        assert_eq!(objection(&card()), None);
        assert!(can_send(&card()));
        for kind in ["veth", "bridge", "bond", "macvlan", "vlan", "tun"] {
            let made_up = Nic {
                kind: Some(kind.to_owned()),
                on_bus: None,
                ..card()
            };
            assert!(objection(&made_up).unwrap().contains(kind));
            assert!(!can_send(&made_up));
        }
        let nowhere = Nic { on_bus: None, ..card() };
        assert!(objection(&nowhere).is_some() && !can_send(&nowhere));
        let guest = Nic {
            driver: Some("virtio_net".to_owned()),
            ..card()
        };
        assert!(objection(&guest).unwrap().contains("virtio_net"));
        assert!(can_send(&guest));
    }

    #[test]
    fn tags_that_are_kept_apart_are_not_sent_and_where_vlans_share_the_card_not_judged() {
        let strips = Nic {
            strips_tags: true,
            ..card()
        };
        assert!(objection(&strips).is_none() && !can_send(&strips));
        let shared = Nic {
            has_vlans: true,
            ..strips
        };
        assert!(objection(&shared).unwrap().contains("rxvlan off"));
        let whole = Nic {
            has_vlans: true,
            ..card()
        };
        assert!(objection(&whole).is_none());
    }

    fn at(frames: u64, up: bool) -> Received {
        Received { frames, up }
    }

    #[test]
    fn an_interface_on_which_frames_go_on_coming_in_has_proved_itself() {
        let start = Instant::now();
        let mut probation = Probation::new(start, at(10, true), at(16, true));
        // The driver sets up its queues, and counts from 0 again.
        assert_eq!(
            probation.look(start + Duration::from_secs(1), at(16, false)),
            Finding::Wait
        );
        assert_eq!(
            probation.look(start + Duration::from_secs(4), at(0, true)),
            Finding::Wait
        );
        assert_eq!(
            probation.look(start + Duration::from_secs(5), at(3, true)),
            Finding::Works
        );
    }

    #[test]
    fn silence_where_there_was_none_before_is_a_failure() {
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let mut probation = Probation::new(start, at(10, true), at(16, true));
        assert_eq!(probation.look(second(1), at(16, true)), Finding::Wait);
        assert_eq!(probation.look(second(4), at(16, true)), Finding::Wait);
        assert!(matches!(probation.look(second(5), at(16, true)), Finding::Fails(_)));
        let mut silent = Probation::new(start, at(16, true), at(16, true));
        assert_eq!(silent.look(second(1), at(16, true)), Finding::Wait);
        assert_eq!(silent.look(second(60), at(16, true)), Finding::Wait);
        assert_eq!(silent.look(second(61), at(17, true)), Finding::Works);
    }

    #[test]
    fn a_carrier_that_stays_away_is_a_failure() {
        let start = Instant::now();
        let second = |n| start + Duration::from_secs(n);
        let mut probation = Probation::new(start, at(10, true), at(16, true));
        assert_eq!(probation.look(second(9), at(16, false)), Finding::Wait);
        assert!(matches!(probation.look(second(11), at(16, false)), Finding::Fails(_)));
        let mut unplugged = Probation::new(start, at(10, false), at(10, false));
        assert_eq!(unplugged.look(second(60), at(10, false)), Finding::Wait);
    }
}
