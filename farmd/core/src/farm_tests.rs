//! The whole core under a simulated network: seeded faults, and the promises of `farmd/docs/ARCHITECTURE.md`,
//! "Life of a failover", checked after every event.

#[path = "farm_tests/divided.rs"]
mod divided;
#[path = "farm_tests/faults.rs"]
mod faults;
#[path = "farm_tests/plane.rs"]
mod plane;
#[path = "farm_tests/promises.rs"]
mod promises;
#[path = "farm_tests/scenarios.rs"]
mod scenarios;
#[path = "farm_tests/sim.rs"]
mod sim;
