//! Model checking: the real core of a few nodes in every state into which a budget of faults can bring them.
//!
//! A state is the farms themselves with their data planes, what is under way between them, and the clock ([`world`]). Without a fault the
//! world does what is due next; the checker departs from that at every moment at which it can matter ([`faults`]). States that differ only
//! in when they are, or in how high counters have risen, are one ([`fingerprint`]), so a farm at rest is a circle of states and the whole
//! space is finite: what a test of [`kept`] says holds for every run within its budget, however long. The promises are checked in each
//! state ([`promises`]). That a breach would be seen is shown by nodes that break one rule each ([`broken`], [`rules`]).
//!
//! `FARM_MODEL=deep` adds the larger budgets (build with `--release`); `FARM_MODEL="nodes=3 crash=1 lose=1"` walks one space and nothing
//! else, with the way to the first breach.

mod broken;
mod checker;
mod ears;
mod faults;
mod fingerprint;
mod identity;
mod kept;
mod node;
mod plane;
mod promises;
mod reload;
mod rules;
mod world;
