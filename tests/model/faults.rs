//! What may happen to a farm, and how often.
//!
//! Without a fault the world does what is due next: it is a schedule, not a choice. A [`Budget`] says how many departures from it one run
//! may have; the checker tries each of them at each moment at which it can matter.

use farm_core::id::NodeId;

/// One step of the world.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Action {
    /// What is due next happens.
    Next,
    /// The datagram at this place of the queue comes before the others that are due within a round trip.
    Pick(usize),
    /// The next datagram is lost.
    Lose,
    /// It comes most of a pulse late, after others that were sent later.
    Late,
    /// It comes, and once more most of a pulse later.
    Twice,
    /// It comes, and from then on again in every pulse: somebody has recorded it.
    Record,
    /// The data plane takes the next plan a pulse late.
    Slow,
    /// The node is gone, with all it knew.
    Crash(NodeId),
    /// It starts again; its module is ready soon after.
    Restart(NodeId),
    /// It is not run; its data plane works on.
    Pause(NodeId),
    /// It is run again.
    Wake(NodeId),
    /// Nothing gets from the first to the second any more.
    Cut(NodeId, NodeId),
    /// Nothing gets from either to the other.
    Split(NodeId, NodeId),
    /// Nothing gets from the first half of the nodes to the others any more.
    Oneway,
    /// No heartbeat comes in at the node any more; commands do.
    Deaf(NodeId),
    /// Nothing at all comes in at the node any more.
    Dead(NodeId),
    /// Nothing gets through on this lan any more.
    LanDown(usize),
    /// The witness no longer answers the node, and the node notices.
    Hide(NodeId),
    /// It answers again, and the node notices.
    Show(NodeId),
    /// All cuts are mended, and all lans work.
    Mend,
    /// The module hands over and stops.
    Stop(NodeId),
    /// It starts again.
    Start(NodeId),
    /// The module hands over and stops; then the node says goodbye and ends.
    Leave(NodeId),
    /// The module hands over; then another farmd takes the place of this one, and the connections go on.
    Reload(NodeId),
    /// The connections left in buckets of others end.
    Close(NodeId),
}

/// How often each fault may happen in one run, and how many in all.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Budget {
    /// Faults in all. What ends one (waking, mending, starting again, connections that end) is free, and so is what overtakes something.
    pub faults: u8,
    /// [`Action::Pick`]; no fault.
    pub pick: u8,
    /// [`Action::Lose`].
    pub lose: u8,
    /// [`Action::Late`].
    pub late: u8,
    /// [`Action::Twice`].
    pub twice: u8,
    /// [`Action::Record`].
    pub record: u8,
    /// [`Action::Slow`].
    pub slow: u8,
    /// [`Action::Crash`].
    pub crash: u8,
    /// [`Action::Restart`].
    pub restart: u8,
    /// [`Action::Pause`].
    pub pause: u8,
    /// [`Action::Cut`].
    pub cut: u8,
    /// [`Action::Split`].
    pub split: u8,
    /// [`Action::Oneway`].
    pub oneway: u8,
    /// [`Action::Deaf`].
    pub deaf: u8,
    /// [`Action::Dead`].
    pub dead: u8,
    /// [`Action::LanDown`].
    pub lan: u8,
    /// [`Action::Hide`].
    pub hide: u8,
    /// [`Action::Show`].
    pub show: u8,
    /// [`Action::Mend`].
    pub mend: u8,
    /// [`Action::Stop`].
    pub stop: u8,
    /// [`Action::Start`].
    pub start: u8,
    /// [`Action::Close`].
    pub close: u8,
    /// [`Action::Leave`].
    pub leave: u8,
    /// [`Action::Reload`].
    pub reload: u8,
}

impl Budget {
    /// As often as it can be: never spent.
    pub const UNLIMITED: u8 = u8::MAX;

    /// What is left for `action`, and whether it counts as a fault; `None` if it is free.
    fn left(&mut self, action: Action) -> Option<(&mut u8, bool)> {
        Some(match action {
            Action::Next | Action::Wake(_) => return None,
            Action::Pick(_) => (&mut self.pick, false),
            Action::Lose => (&mut self.lose, true),
            Action::Late => (&mut self.late, true),
            Action::Twice => (&mut self.twice, true),
            Action::Record => (&mut self.record, true),
            Action::Slow => (&mut self.slow, true),
            Action::Crash(_) => (&mut self.crash, true),
            Action::Pause(_) => (&mut self.pause, true),
            Action::Cut(..) => (&mut self.cut, true),
            Action::Split(..) => (&mut self.split, true),
            Action::Oneway => (&mut self.oneway, true),
            Action::Deaf(_) => (&mut self.deaf, true),
            Action::Dead(_) => (&mut self.dead, true),
            Action::LanDown(_) => (&mut self.lan, true),
            Action::Hide(_) => (&mut self.hide, true),
            Action::Show(_) => (&mut self.show, false),
            Action::Stop(_) => (&mut self.stop, true),
            Action::Leave(_) => (&mut self.leave, true),
            Action::Reload(_) => (&mut self.reload, true),
            Action::Restart(_) => (&mut self.restart, false),
            Action::Mend => (&mut self.mend, false),
            Action::Start(_) => (&mut self.start, false),
            Action::Close(_) => (&mut self.close, false),
        })
    }

    /// The field of that name.
    pub fn word(&mut self, name: &str) -> Option<&mut u8> {
        Some(match name {
            "faults" => &mut self.faults,
            "pick" => &mut self.pick,
            "lose" => &mut self.lose,
            "late" => &mut self.late,
            "twice" => &mut self.twice,
            "record" => &mut self.record,
            "slow" => &mut self.slow,
            "crash" => &mut self.crash,
            "restart" => &mut self.restart,
            "pause" => &mut self.pause,
            "cut" => &mut self.cut,
            "split" => &mut self.split,
            "oneway" => &mut self.oneway,
            "deaf" => &mut self.deaf,
            "dead" => &mut self.dead,
            "lan" => &mut self.lan,
            "hide" => &mut self.hide,
            "show" => &mut self.show,
            "mend" => &mut self.mend,
            "stop" => &mut self.stop,
            "start" => &mut self.start,
            "close" => &mut self.close,
            "leave" => &mut self.leave,
            "reload" => &mut self.reload,
            _ => return None,
        })
    }

    /// True if `action` may happen once more.
    pub fn allows(mut self, action: Action) -> bool {
        let faults = self.faults;
        self.left(action)
            .is_none_or(|(left, is_fault)| *left > 0 && (!is_fault || faults > 0))
    }

    /// `action` has happened.
    pub fn spend(&mut self, action: Action) {
        if let Some((left, is_fault)) = self.left(action) {
            if *left < Self::UNLIMITED {
                *left = left.saturating_sub(1);
            }
            self.faults -= u8::from(is_fault && self.faults > 0);
        }
    }
}

#[test]
fn what_overtakes_is_counted_and_is_no_fault() {
    let pick = Action::Pick(1);
    let mut once = Budget {
        pick: 1,
        ..Budget::default()
    };
    assert!(once.allows(pick), "without a fault left");
    once.spend(pick);
    assert!(!once.allows(pick));
    let mut always = Budget {
        pick: Budget::UNLIMITED,
        faults: 1,
        ..Budget::default()
    };
    let before = always;
    always.spend(pick);
    assert_eq!(always, before);
}
