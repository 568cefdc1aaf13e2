//! Where the program is in the way of frames, and how it gets there, is missed there, and stays there while another farmd takes this process's place.
//!
//! Two ways to tc ingress: a tcx link (Linux 6.6), which the process owns, and a filter at a clsact queueing discipline, which stays where it is until somebody removes
//! it. Either way the program is put ahead of all others: what another one lets by or takes for itself would never come here, and the raw data plane captures
//! ahead of tc too. No order of programs gives a frame to two servers: what does not come here is dropped by the nf_tables chain behind tc.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::link::{Hook, Link};
use super::{BpfError, Filter, PROGRAM, failed};
use crate::interface;
use crate::tc::{self, Tc};

/// First part of the handles of our filters.
const HANDLE: u32 = 0xfa12_0000;
const HANDLE_MASK: u32 = 0xffff_0000;
/// In a handle: the clsact was not there before, and goes with the last filter.
const MADE_CLSACT: u32 = 0x10;
/// In a handle: which of ours it is. A program and its successor are there at the same time.
const GENERATION: std::ops::RangeInclusive<u32> = 1..=0xf;

/// How a program is put in the way of frames.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attachment {
    /// A tcx link.
    Tcx,
    /// A filter at a clsact queueing discipline.
    Clsact,
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        })
    }
}

/// A program at an interface; it is taken off with this value.
#[derive(Debug)]
pub(super) enum Place {
    Tcx(Link),
    Clsact(Clsact),
}

impl Place {
    /// Puts another program in the place of the one that is there, between two frames.
    fn exchange(&self, program: BorrowedFd<'_>) -> Result<(), BpfError> {
        let what = "the program that is attached cannot be exchanged for its twin";
        match self {
            Self::Tcx(link) => link.exchange(program).map_err(|e| failed(what, &e)),
            Self::Clsact(filter) => filter.exchange(program).map_err(|e| failed(what, &e)),
        }
    }

    fn leave(self) -> io::Result<()> {
        match self {
            Self::Tcx(link) => link.leave(),
            Self::Clsact(filter) => {
                std::mem::forget(filter);
                Ok(())
            }
        }
    }
}

/// A filter of ours, removed with this value; and with the last one the clsact, if farmd has made it and nobody else has come to use it.
#[derive(Debug)]
pub(super) struct Clsact {
    ifindex: u32,
    handle: u32,
}

impl Clsact {
    fn add(program: &impl AsFd, ifindex: u32) -> Result<Self, tc::TcError> {
        let mut tc = Tc::open()?;
        let added = tc.add_clsact(ifindex)?;
        let ours = handles(&mut tc, ifindex)?;
        let made = added || ours.iter().any(|handle| handle & MADE_CLSACT != 0);
        let is_free = |generation: &u32| ours.iter().all(|handle| handle & 0xf != *generation);
        let generation = GENERATION.into_iter().find(is_free).unwrap_or(*GENERATION.end());
        let handle = HANDLE | if made { MADE_CLSACT } else { 0 } | generation;
        let result = tc.add(ifindex, handle, PROGRAM, program.as_fd());
        if result.is_err() && added {
            tc.remove_clsact(ifindex)?;
        }
        result.map(|()| Self { ifindex, handle })
    }

    fn exchange(&self, program: BorrowedFd<'_>) -> Result<(), tc::TcError> {
        Tc::open()?.replace(self.ifindex, self.handle, PROGRAM, program)
    }

    fn is_there(&self) -> Result<bool, tc::TcError> {
        let mut tc = Tc::open()?;
        Ok(handles(&mut tc, self.ifindex)?.contains(&self.handle))
    }

    fn remove(&self) -> Result<(), tc::TcError> {
        let mut tc = Tc::open()?;
        tc.remove(self.ifindex, self.handle)?;
        if self.handle & MADE_CLSACT != 0 {
            tc.remove_clsact(self.ifindex)?;
        }
        Ok(())
    }
}

impl Drop for Clsact {
    fn drop(&mut self) {
        // What could not be removed accepts nothing once its lease has ended, and is removed by the next start.
        let _ = self.remove();
    }
}

/// Handles of our filters on an interface.
fn handles(tc: &mut Tc, ifindex: u32) -> Result<Vec<u32>, tc::TcError> {
    let all = tc.programs(ifindex)?.into_iter();
    let ours = all.filter(|one| one.handle & HANDLE_MASK == HANDLE && one.name == PROGRAM);
    Ok(ours.map(|one| one.handle).collect())
}

impl Filter {
    /// How programs are attached from here on; [`Attachment::Tcx`] if nobody says.
    pub fn set_attachment(&mut self, attachment: Attachment) {
        self.attachment = attachment;
    }

    /// How programs are attached.
    pub fn attachment(&self) -> Attachment {
        self.attachment
    }

    /// Puts the program in the way of what comes in on the interface with this index, ahead of others. It leaves when it is detached, with this value, and, unless it
    /// is a filter, with the process.
    ///
    /// # Errors
    /// What the kernel says; one older than 6.6 has no [`Attachment::Tcx`].
    pub fn attach(&mut self, ifindex: u32, name: &str) -> Result<(), BpfError> {
        if self.places.contains_key(&ifindex) {
            return Ok(());
        }
        let way = self.attachment;
        let what = format!("the program cannot be attached to {name} ({way})");
        let program = self.program()?.fd().map_err(|e| failed(&what, &e))?;
        let place = match way {
            Attachment::Tcx => Place::Tcx(Link::tcx(program.as_fd(), ifindex).map_err(|e| failed(&what, &e))?),
            Attachment::Clsact => Place::Clsact(Clsact::add(program, ifindex).map_err(|e| failed(&what, &e))?),
        };
        self.places.insert(ifindex, place);
        Ok(())
    }

    /// Puts the chosen program in the place of the one that is attached, everywhere.
    ///
    /// # Errors
    /// What the kernel says first; where it refuses, the one that is there stays.
    pub(super) fn exchange(&mut self) -> Result<(), BpfError> {
        let what = "the program has no descriptor";
        let program = self.program()?.fd().map_err(|e| failed(what, &e))?;
        let program = program.try_clone().map_err(|e| failed(what, &e))?;
        let mut result = Ok(());
        for place in self.places.values() {
            result = result.and(place.exchange(program.as_fd()));
        }
        result
    }

    /// Takes the program off the interface.
    pub fn detach(&mut self, ifindex: u32) {
        self.places.remove(&ifindex);
    }

    /// True if the program that was attached to the interface is still there: others can take it off, and an interface takes it along when it goes.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn is_in_place(&self, ifindex: u32) -> Result<bool, BpfError> {
        let what = "the kernel does not say where the program is";
        match self.places.get(&ifindex) {
            None => Ok(false),
            Some(Place::Tcx(link)) => Ok(link.place().map_err(|e| failed(what, &e))? == (Hook::Tcx, ifindex)),
            Some(Place::Clsact(filter)) => filter.is_there().map_err(|e| failed(what, &e)),
        }
    }

    /// Leaves the programs, at XDP too, where they are, with their tables and their lease, to the farmd that this process executes next; [`Predecessor::find`] is how
    /// that one finds them.
    ///
    /// # Errors
    /// What the kernel says; where it fails the program is taken off.
    pub fn leave(&mut self) -> Result<(), BpfError> {
        let mut result = Ok(());
        for place in std::mem::take(&mut self.places).into_values() {
            result = result.and(place.leave());
        }
        for early in std::mem::take(&mut self.early).into_values() {
            result = result.and(early.leave());
        }
        result.map_err(|e| failed("the program cannot be left to the next farmd", &e))
    }
}

/// Programs that the farmd in whose place this process is has left attached. They are taken off with this value.
#[derive(Debug, Default)]
pub struct Predecessor {
    places: BTreeMap<u32, Place>,
    /// Links at XDP.
    early: BTreeMap<u32, Link>,
}

impl Predecessor {
    /// Finds them, once; before this process loads a program itself.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn find() -> Result<Self, BpfError> {
        let what = "what the farmd before has left attached is not known";
        let (mut places, mut early) = (BTreeMap::new(), BTreeMap::new());
        for link in Link::inherited().map_err(|e| failed(what, &e))? {
            match link.place() {
                // Of another kind, or taken away meanwhile: it ends here.
                Err(_) | Ok((_, 0)) => {}
                Ok((Hook::Tcx, ifindex)) => drop(places.insert(ifindex, Place::Tcx(link))),
                Ok((Hook::Xdp, ifindex)) => drop(early.insert(ifindex, link)),
            }
        }
        for filter in left_filters().map_err(|e| failed(what, &e))? {
            places.insert(filter.ifindex, Place::Clsact(filter));
        }
        Ok(Self { places, early })
    }

    /// Interfaces that have one at tc ingress.
    pub fn interfaces(&self) -> impl Iterator<Item = u32> {
        self.places.keys().copied()
    }

    /// Takes those of one interface off.
    pub fn end(&mut self, ifindex: u32) {
        self.places.remove(&ifindex);
        self.early.remove(&ifindex);
    }

    /// The link at XDP of one interface.
    pub(super) fn take_early(&mut self, ifindex: u32) -> Option<Link> {
        self.early.remove(&ifindex)
    }
}

/// Removes filters that a farmd has left on interfaces of this network namespace, and returns the names of these.
///
/// # Errors
/// What the kernel says.
pub fn remove_left_filters() -> Result<Vec<String>, BpfError> {
    let what = "filters that were left";
    let mut names = Vec::new();
    for filter in left_filters().map_err(|e| failed(what, &e))? {
        let result = filter.remove();
        let ifindex = filter.ifindex;
        std::mem::forget(filter);
        result.map_err(|e| failed(what, &e))?;
        let name = interface::interfaces().into_iter().find(|i| i.index == ifindex);
        names.push(name.map_or_else(|| ifindex.to_string(), |interface| interface.name));
    }
    Ok(names)
}

fn left_filters() -> Result<Vec<Clsact>, tc::TcError> {
    let mut tc = Tc::open()?;
    let mut found = Vec::new();
    for ifindex in interface::interfaces().into_iter().map(|i| i.index) {
        let ours = handles(&mut tc, ifindex)?.into_iter();
        found.extend(ours.map(|handle| Clsact { ifindex, handle }));
    }
    Ok(found)
}
