//! Real farms in network namespaces, judged from outside: by clients and on the wire.
//!
//! Needs root (or a user namespace), `/dev/net/tun`, nginx, iproute2, nftables, and the built `farmd` and `farm` beside this binary
//! or in `FARM_BIN`. `scripts/test` runs it one test at a time: `cargo test --release --test netns -- --test-threads=1`.

mod chaos;
mod common;
mod continuity;
mod drain;
mod failover;
mod history;
mod host;
mod instruments;
mod lans;
mod life;
mod modules;
mod policy;
mod refusals;
mod replay;
mod serving;
mod tools;
mod wire;
