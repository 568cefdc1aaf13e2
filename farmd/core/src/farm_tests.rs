//! The whole core under a simulated network: seeded faults, and the promises of `farmd/docs/PROTOCOL.md` checked after every event.

#[path = "farm_tests/action.rs"]
mod action;
#[path = "farm_tests/bridged.rs"]
mod bridged;
#[path = "farm_tests/caught.rs"]
mod caught;
#[path = "farm_tests/continuity.rs"]
mod continuity;
#[path = "farm_tests/cost.rs"]
mod cost;
#[path = "farm_tests/divided.rs"]
mod divided;
#[path = "farm_tests/ears.rs"]
mod ears;
#[path = "farm_tests/faults.rs"]
mod faults;
#[path = "farm_tests/network.rs"]
mod network;
#[path = "farm_tests/node.rs"]
mod node;
#[path = "farm_tests/partitions.rs"]
mod partitions;
#[path = "farm_tests/plane.rs"]
mod plane;
#[path = "farm_tests/promises.rs"]
mod promises;
#[path = "farm_tests/rng.rs"]
mod rng;
#[path = "farm_tests/runs.rs"]
mod runs;
#[path = "farm_tests/scale.rs"]
mod scale;
#[path = "farm_tests/scenarios.rs"]
mod scenarios;
#[path = "farm_tests/sim.rs"]
mod sim;
