//! The farm's decisions, without IO.
//!
//! Contract: nothing here reads a clock, a file, a socket or a random source, and nothing
//! spawns or blocks. Inputs are values and `now` (a [`std::time::Duration`] since an arbitrary
//! fixed point, the same for all calls on one object); outputs are values. The same inputs in
//! the same order give the same outputs, so a run can be recorded, replayed and model-checked.
//!
//! Map: [`id`] names things; [`config`] turns XML into values that can only be valid; [`wire`]
//! parses and emits bytes; [`membership`] judges who is alive; [`handover`] moves buckets
//! between the live; [`balance`] hashes clients, deals buckets and judges frames; [`module`] is the
//! life of one application; [`api`] is what daemon, command line and tests tell each other.
#![forbid(unsafe_code)]

// Test frames are shared with the crates that have data planes, and so name this one as they do.
#[cfg(test)]
extern crate self as farm_core;

pub mod api;
pub mod balance;
pub mod check;
pub mod config;
pub mod farm;
pub mod handover;
pub mod id;
pub mod membership;
pub mod module;
pub mod requesters;
pub mod supervise;
pub mod trace;
pub mod wire;
