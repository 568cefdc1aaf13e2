//! Judgement over raw probe results. The probes themselves are the daemon's.

pub mod outcome;
