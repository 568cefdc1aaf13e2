//! What `farm-lab chaos` and `farm-lab bench` leave behind: the record of a run as text and JSON, its tables in a Markdown file, its pictures.
//!
//! Never measures anything.

pub mod histogram;
pub mod markdown;
pub mod plot;
pub mod record;
mod svg;
