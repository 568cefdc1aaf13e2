//! The identity of a connection, named from the client's side.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// Protocol and the two ends of a flow.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct FlowKey {
    /// IP protocol number.
    pub protocol: u8,
    /// Service address.
    pub vip: IpAddr,
    /// Service port.
    pub vip_port: u16,
    /// Client address.
    pub client: IpAddr,
    /// Client port.
    pub client_port: u16,
}

/// TCP's protocol number.
pub const TCP: u8 = 6;
/// UDP's protocol number.
pub const UDP: u8 = 17;
