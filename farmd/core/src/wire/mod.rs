//! Bytes from the network, all of them possibly hostile.
//!
//! Nothing here panics on any input: datagrams are authenticated before they are parsed ([`auth`]), every read is checked
//! ([`heartbeat`], [`command`]), frames go through checked slices ([`packet`], [`arp`], [`nd`]).

pub mod arp;
pub mod auth;
mod codec;
pub mod command;
pub mod heartbeat;
pub mod nd;
pub mod packet;
