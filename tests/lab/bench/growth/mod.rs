//! How the cost grows: with nodes, with the share of foreign frames, with rules, with connections.

pub mod connections;
pub mod foreign;
pub mod nodes;
pub mod rules;

use anyhow::Result;

use super::Effort;
use crate::outcome::{Outcome, Progress};

/// Name of the part.
pub const NAME: &str = "growth";

/// Measures all four.
///
/// # Errors
/// What the first that fails says.
pub fn run(effort: Effort, say: Progress<'_>) -> Result<Outcome> {
    let mut outcome = Outcome::new(NAME, 0);
    rules::measure(effort, &mut outcome, say)?;
    connections::measure(effort, &mut outcome, say)?;
    foreign::measure(effort, &mut outcome, say)?;
    nodes::measure(effort, &mut outcome, say)?;
    Ok(outcome)
}
