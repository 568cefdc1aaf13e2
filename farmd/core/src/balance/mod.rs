//! Who takes which client: the keyed hash, the deal of buckets, and the verdict on one frame.
//!
//! Everything is a pure function of its arguments, so that all nodes, and every data plane, answer alike.

pub mod assign;
pub mod decide;
pub mod explain;
pub mod filter;
pub mod flow;
pub mod fragment;
pub mod hash;
pub mod orphans;
pub mod plan;
pub mod resets;

#[cfg(test)]
pub(crate) mod test_frames;
