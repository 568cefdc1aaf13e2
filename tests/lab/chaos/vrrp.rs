//! Being written.
use super::{Outcome, Progress};
use anyhow::Result;
pub fn run(seed: u64, _n: usize, _say: Progress<'_>) -> Result<Outcome> {
    Ok(Outcome::new("x", seed))
}
