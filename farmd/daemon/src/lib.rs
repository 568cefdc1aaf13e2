//! The farm daemon: edges around one owner loop.
//!
//! [`node`] owns the farm's state and runs on its own thread; [`dataplane`] moves packets on another; everything that may wait (scripts, checkers, host
//! set-up, the control socket) lives on one tokio runtime and talks to the owner loop by [`event::Event`] and [`effect::Effect`].

pub mod admission;
pub mod checker;
pub mod control;
pub mod dataplane;
pub mod effect;
pub mod event;
pub mod heartbeat_io;
pub mod history;
pub mod host;
pub mod incarnation;
pub mod journal;
pub mod logwriter;
pub mod look;
pub mod node;
pub mod reload;
pub mod remote;
pub mod reset;
#[cfg(test)]
mod scratch;
pub mod script;
pub mod shares;
mod standstill;
pub mod start;
pub mod store;
pub mod witness;
