//! Real farms in network namespaces, judged from outside: by clients and on the wire.
//!
//! Needs root (or a user namespace), `/dev/net/tun`, nginx, iproute2, nftables, and the built `farmd` and `farm` beside this binary
//! or in `FARM_BIN`. `scripts/test` says which of them may run beside each other; with `--test-threads=1` all can.

mod attach;
mod bench;
mod bulk;
mod chaos;
mod common;
mod container;
mod continuity;
mod cut_off;
mod drain;
mod failover;
mod history;
mod host;
mod instruments;
mod ipv6;
mod lans;
mod life;
mod look;
mod malformed;
mod modules;
mod orphans;
mod plane;
mod policy;
mod priority;
mod refusals;
mod reload;
mod replay;
mod rolling;
mod serving;
mod signals;
mod tools;
mod trace;
mod wire;
mod xdp;
