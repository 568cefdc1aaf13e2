//! The life of one application module.
//!
//! [`state`] is the machine that decides what happens next; [`event`] is what it hears and says;
//! [`script`] names the module's scripts and how they end; [`logline`] is the text form of the module log.
//! Nothing here runs a script, probes a port or writes a file: the daemon does, one edge for each action.

mod command;
pub mod event;
pub mod logline;
mod phase;
mod resource;
pub mod script;
pub mod state;
mod steps;

#[cfg(test)]
mod proptests;
#[cfg(test)]
mod tests;
