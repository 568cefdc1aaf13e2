//! Looks at the placed interfaces and tables again and again: others change them too.
//!
//! A reload of the firewall flushes our table, and a chain goes with its device; then the kernel's own stack would take over the VIPs, so what is gone is made
//! again here. An interface that went down, or is another one by now, is only told: the owner loop decides. Called by the executor, and never waits.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use farm_core::id::{MacAddr, ModuleName};
use farm_sys::interface::{self, Link};
use farm_sys::nft;
use tokio::time::Instant;
use tracing::warn;

use super::{Host, Placed, table_of};

/// How often the nf_tables tables are looked at, at most, unless they are said to have changed.
pub(super) const TABLE_INTERVAL: Duration = Duration::from_millis(500);

/// Placed interfaces by name, as they are now; `None` for one that has vanished.
type Links = BTreeMap<String, io::Result<Option<Link>>>;

impl Host {
    /// The tables may have changed: the next look is at them too. Where one has just been mended somebody else may be at work, who is not raced.
    pub fn doubt_tables(&mut self) {
        if self.tables_mended.is_none_or(|at| at.elapsed() >= TABLE_INTERVAL) {
            self.tables_seen = None;
        }
    }

    /// Modules whose service interfaces have a problem, another one or none any more since the last call. Also mends their nf_tables tables.
    ///
    /// `interface NAME has changed ...` means that the interface of this name is no longer the one that was set up: only a new set-up of the module helps.
    pub fn check_links(&mut self) -> Vec<(ModuleName, Option<String>)> {
        let links: Links = self
            .placed
            .iter()
            .map(|p| &p.interface.name)
            .map(|n| (n.clone(), look(n)))
            .collect();
        if self.tables_seen.is_none_or(|at| at.elapsed() >= TABLE_INTERVAL) {
            self.tables_seen = Some(Instant::now());
            self.mend_tables(&links);
        }
        let mut now: BTreeMap<ModuleName, Option<String>> = BTreeMap::new();
        for placed in &self.placed {
            if !now.contains_key(&placed.module) {
                now.insert(placed.module.clone(), self.problem(&placed.module, &links));
            }
        }
        let before = std::mem::replace(&mut self.links, now.clone());
        now.into_iter()
            .filter(|(module, said)| before.get(module).unwrap_or(&None) != said)
            .collect()
    }

    fn problem(&self, module: &ModuleName, links: &Links) -> Option<String> {
        let own = || self.placed.iter().filter(|p| p.module == *module);
        let table = own().find_map(|p| self.table_problems.get(&p.interface.name).cloned());
        let unusable = |checked: bool| own().filter(|p| p.check || !checked).find_map(|p| unusable(p, links));
        let changed = || own().find(|p| has_changed(p, links));
        table.or_else(|| unusable(true)).or_else(|| {
            // A module that starts anew would fail for an unusable interface, so a change is told only when all are usable, checked or not.
            let name = &changed().filter(|_| unusable(false).is_none())?.interface.name;
            Some(format!(
                "interface {name} has changed (another MAC or index); the module starts anew"
            ))
        })
    }

    /// Makes tables again that are not as they were set up.
    fn mend_tables(&mut self, links: &Links) {
        self.table_problems.retain(|name, _| links.contains_key(name));
        let there = links.iter().filter(|(_, link)| matches!(link, Ok(Some(_))));
        for name in there.map(|(name, _)| name) {
            let (table, vips) = (table_of(name), self.vips_on(name));
            let what = match nft::is_installed(&table, name, &vips, true) {
                Ok(true) => {
                    self.table_problems.remove(name);
                    self.mend_divert(name);
                    continue;
                }
                Ok(false) => {
                    "was removed or changed by another program (a firewall reload?), or went with its interface"
                        .to_owned()
                }
                Err(error) => format!("cannot be read ({error})"),
            };
            match nft::install(&table, name, &vips, true) {
                Ok(()) => {
                    warn!(
                        interface = name,
                        "nf_tables table netdev {table} {what}; it was made again"
                    );
                    self.table_problems.remove(name);
                    self.tables_mended = Some(Instant::now());
                    self.divert_on(name);
                }
                Err(error) => {
                    let text = format!(
                        "nf_tables table netdev {table}, without which the kernel answers for the virtual addresses, {what} and cannot be made again: {error}"
                    );
                    if self.table_problems.get(name) != Some(&text) {
                        warn!(interface = name, "{text}");
                    }
                    self.table_problems.insert(name.clone(), text);
                }
            }
        }
    }
}

fn look(name: &str) -> io::Result<Option<Link>> {
    match interface::link(name) {
        Ok(link) => Ok(Some(link)),
        // ENODEV after the first of several questions comes as NotFound too.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Why nothing can be served on the interface now.
fn unusable(placed: &Placed, links: &Links) -> Option<String> {
    let name = &placed.interface.name;
    match links.get(name)? {
        Ok(Some(link)) if !link.up => Some(format!("interface {name} is down")),
        Ok(Some(_)) => {
            let subnet_of = placed.found_by.filter(|_| has_changed(placed, links))?;
            let all = interface::interfaces();
            let ready = all.iter().any(|i| i.name == *name && i.has_subnet_of(subnet_of));
            (!ready)
                .then(|| format!("interface {name} is a new one and has no address in the subnet of {subnet_of} yet"))
        }
        Ok(None) => Some(format!(
            "interface {name} has vanished; module {} starts anew when it is back",
            placed.module
        )),
        Err(error) => Some(format!("interface {name} cannot be looked at: {error}")),
    }
}

/// Whether the interface of this name is another one than was set up.
fn has_changed(placed: &Placed, links: &Links) -> bool {
    matches!(links.get(&placed.interface.name), Some(Ok(Some(link)))
        if link.index != placed.interface.index || link.mac.map(MacAddr) != Some(placed.mac))
}
