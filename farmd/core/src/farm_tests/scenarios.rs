//! One story each.
