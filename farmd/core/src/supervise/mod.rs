//! Decisions about what keeps failing. Nothing here forks, waits or reads a clock.

pub mod policy;
