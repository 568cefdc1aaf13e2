//! `farm reload`: the node gives its share away, says that it will be back at once, and is replaced; its connections go on meanwhile.
//!
//! Called by [`crate::world`].

use std::time::Duration;

use farm_core::id::NodeId;

use crate::node::{Fixed, Node, Outcome};
use crate::world::{Work, World};

/// How often the goodbye is said.
const GOODBYES: usize = 3;
/// Pulses until the next farmd runs: less than the detection time, as on a host.
const AWAY_PULSES: u32 = 2;

impl World {
    /// Node `id` has handed over: it says goodbye, and is back soon.
    pub fn replace(&mut self, id: NodeId, fixed: &Fixed) {
        let now = self.now;
        let goodbye = self.node_mut(id).leave_to_return(now, fixed);
        self.follow(id, goodbye, fixed);
        self.forget(id);
        self.push(now + fixed.pulse() * AWAY_PULSES, Work::Back(id));
    }
}

impl Node {
    /// Hands over, and then is replaced.
    pub fn reload(&mut self) {
        self.stopping = true;
        self.reloading = true;
        self.local.ready = false;
    }

    /// Says goodbye and is away; its connections stay.
    fn leave_to_return(&mut self, now: Duration, fixed: &Fixed) -> Outcome {
        let mut outcome = Outcome::default();
        for _ in 0..GOODBYES {
            if let Some(farm) = &mut self.farm {
                farm.leave(now, true);
            }
            self.transmit(now, fixed, &mut outcome);
        }
        let flows = self.plane.flows;
        self.crash();
        self.plane.flows = flows;
        self.away = true;
        outcome
    }

    /// The next farmd runs; its module has been up all the time, and its connections are where they were.
    pub fn come_back(&mut self, now: Duration, answers: bool, fixed: &Fixed) {
        let flows = self.plane.flows;
        self.start(now, answers, fixed);
        self.plane.flows = flows;
        // Unlike one that has crashed it owes the others no time: nobody may reset its connections.
        self.upset_at = None;
        self.ready();
        let local = self.local.clone();
        if let Some(farm) = &mut self.farm {
            farm.set_module(now, fixed.module.clone(), local);
        }
    }
}
