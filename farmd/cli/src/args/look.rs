//! The words of `why`, `map`, `flows` and `trace`. Nothing here acts.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use farm_core::api::trace::{DEFAULT_SECONDS, DEFAULT_SNAP, MAX_SNAP, MIN_SNAP};

/// Words of `why`.
#[derive(Args, Debug)]
pub struct WhyArgs {
    /// The client, with its port where the rule deals by it
    #[arg(value_name = "CLIENT[:PORT]", value_parser = client)]
    pub client: Client,
    /// The virtual IP and the service's port
    #[arg(value_name = "VIP:PORT", value_parser = service)]
    pub service: SocketAddr,
    /// The protocol
    #[arg(value_enum, default_value = "tcp")]
    pub protocol: Transport,
}

/// A client's address, and its port if one is named.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Client {
    /// The address.
    pub addr: IpAddr,
    /// The port.
    pub port: Option<u16>,
}

/// `tcp` or `udp`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Transport {
    /// TCP
    Tcp,
    /// UDP
    Udp,
}

/// Words of `map`.
#[derive(Args, Debug)]
pub struct MapArgs {
    /// Only this module
    #[arg(value_name = "AM")]
    pub module: Option<String>,
    /// Only this group
    #[arg(long)]
    pub group: Option<String>,
}

/// Words of `flows`.
#[derive(Args, Debug)]
pub struct FlowsArgs {
    /// Only connections of this client
    #[arg(long, value_name = "ADDR")]
    pub client: Option<IpAddr>,
    /// Only connections in buckets that this node owns
    #[arg(long)]
    pub node: Option<String>,
    /// Name at most so many clients and connections
    #[arg(short = 'n', long, value_name = "N", default_value_t = farm_core::api::flows::DEFAULT_FLOWS)]
    pub lines: usize,
}

/// Shown under the help of `trace`.
const FILTERS: &str = "\
Filter:
  host ADDR | net ADDR/LENGTH | vip ADDR | port N | tcp | udp | icmp
  accepted | dropped | forwarded | held | punted | reason NAME
joined by `and`, as in: farm trace tcp port 80 and host 198.18.0.2 and dropped

A frame that the program in the kernel leaves to farmd has two lines: punted,
and what farmd made of it. farm(1) explains verdicts and reasons.";

/// Words of `trace`.
#[derive(Args, Debug)]
#[command(after_help = FILTERS)]
pub struct TraceArgs {
    /// Which frames; all of virtual IPs if not given
    #[arg(value_name = "FILTER")]
    pub filter: Vec<String>,
    /// End after so many frames
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,
    /// Write the frames to a pcapng file instead, their verdicts as comments; `-` is standard output
    #[arg(short, long, value_name = "FILE", conflicts_with = "json")]
    pub write: Option<PathBuf>,
    /// Take at most so many bytes of each frame
    #[arg(short, long, value_name = "BYTES", default_value_t = DEFAULT_SNAP, value_parser = clap::value_parser!(u32).range(i64::from(MIN_SNAP)..=i64::from(MAX_SNAP)))]
    pub snaplen: u32,
    /// End after so many seconds; 0 for never
    #[arg(long, value_name = "N", default_value_t = DEFAULT_SECONDS)]
    pub seconds: u64,
}

fn client(text: &str) -> Result<Client, String> {
    if let Ok(addr) = text.trim_matches(['[', ']']).parse() {
        return Ok(Client { addr, port: None });
    }
    match text.parse::<SocketAddr>() {
        Ok(end) => Ok(Client {
            addr: end.ip(),
            port: Some(end.port()),
        }),
        Err(_) => Err("an address is expected, with or without a port: 198.18.0.2 or 198.18.0.2:40000".to_owned()),
    }
}

fn service(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "a virtual IP and a port are expected, as in 198.18.0.20:80".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_read_with_and_without_a_port() {
        let end = |addr: &str, port| {
            Ok(Client {
                addr: addr.parse().unwrap(),
                port,
            })
        };
        assert_eq!(client("198.18.0.2"), end("198.18.0.2", None));
        assert_eq!(client("198.18.0.2:40000"), end("198.18.0.2", Some(40_000)));
        assert_eq!(client("2001:db8::2"), end("2001:db8::2", None));
        assert_eq!(client("[2001:db8::2]:40"), end("2001:db8::2", Some(40)));
        for wrong in ["", "me", "198.18.0.2:", "198.18.0.2:70000", "198.18.0"] {
            assert!(client(wrong).is_err(), "{wrong}");
        }
        assert!(service("198.18.0.20").is_err() && service("198.18.0.20:80").is_ok());
    }
}
