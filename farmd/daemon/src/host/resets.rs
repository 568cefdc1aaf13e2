//! Resets of this host's stack on their way to the data plane while a node is missing: the missing one may only be out of touch.
//!
//! Where it cannot be had (kernels before 5.16 have no nf_tables at egress) they leave as ever, and the log says so once.

use std::collections::BTreeSet;
use std::io;

use farm_sys::nft;
use tracing::{debug, warn};

use super::{Host, table_of};

impl Host {
    /// Sends the resets without ACK of all virtual addresses to the device from now on, or no longer.
    pub fn divert_resets(&mut self, on: bool) {
        self.diverts_resets = on;
        let names: BTreeSet<String> = self.placed.iter().map(|p| p.interface.name.clone()).collect();
        for name in &names {
            self.divert_on(name);
        }
    }

    /// The same on one interface, whose table stands.
    pub(super) fn divert_on(&mut self, name: &str) {
        let (table, vips) = (table_of(name), self.vips_on(name));
        let device = self.device.as_ref().filter(|_| self.diverts_resets);
        let Some(device) = device else {
            match nft::dropped_resets(&table) {
                Ok(0) | Err(_) => {}
                Ok(dropped) => warn!(
                    interface = name,
                    dropped,
                    "while a node was missing resets came too fast: some were dropped, and their clients repeat what they were for"
                ),
            }
            if let Err(error) = nft::leave_resets(&table) {
                warn!(%error, interface = name, "resets go on to wait");
            }
            return;
        };
        match nft::divert_resets(&table, name, &vips, device.index) {
            Ok(()) => {
                self.divert_problems.remove(name);
                debug!(interface = name, "resets are diverted");
            }
            Err(error) => {
                let text = error.to_string();
                if self.divert_problems.get(name).is_none_or(|(_, told)| *told != text) {
                    warn!(
                        interface = name,
                        "resets cannot be held back ({text}): when nodes that were out of touch come back, busy connections of theirs may be reset"
                    );
                }
                self.divert_problems.insert(name.to_owned(), (error.kind(), text));
            }
        }
    }

    /// Makes the chain again that another program has removed, or that could not be made.
    pub(super) fn mend_divert(&mut self, name: &str) {
        let never = |(kind, _): &(io::ErrorKind, String)| *kind == io::ErrorKind::Unsupported;
        if !self.diverts_resets || self.divert_problems.get(name).is_some_and(never) {
            return;
        }
        // An error is told by the attempt.
        if !nft::diverts_resets(&table_of(name), name, &self.vips_on(name)).unwrap_or(false) {
            self.divert_on(name);
        }
    }
}
