//! `host:port`, with a host name or an IP address.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A host (name, IPv4 address, or IPv6 address in brackets) and a port. Names are not looked up
/// here: in compose and Kubernetes a peer's name may appear only after this process has started.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostPort {
    host: String,
    port: u16,
}

/// A text that is not `host:port`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddress {
    /// There is no `:` before a port.
    #[error("it has no port; write host:port, as in 10.0.0.5:10809 or nbd-1-1:10809")]
    NoPort,
    /// What follows the last `:` is not a port.
    #[error("its port is not a number from 0 to 65535")]
    BadPort,
    /// What precedes it is neither an IP address nor a host name. An IPv6 address goes in brackets.
    #[error("its host is not a host name, an IPv4 address or an IPv6 address in brackets")]
    BadHost,
}

/// Longest host name, from RFC 1035.
const HOST_BYTES_MAX: usize = 253;

impl HostPort {
    /// An address of a node of this name, at `port`. Node names are host names by their alphabet.
    #[must_use]
    pub fn of_node(node: &nbd_topology::NodeName, port: u16) -> Self {
        Self { host: node.as_str().to_owned(), port }
    }

    /// Every interface (IPv4), at `port`: to listen on.
    #[must_use]
    pub fn any(port: u16) -> Self {
        Self { host: Ipv4Addr::UNSPECIFIED.to_string(), port }
    }

    /// The host as written, brackets included. `to_string()` is what `bind` and `connect` take.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port; 0 lets the system choose one to listen on.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for HostPort {
    type Err = InvalidAddress;

    fn from_str(text: &str) -> Result<Self, InvalidAddress> {
        let (host, port) = text.rsplit_once(':').ok_or(InvalidAddress::NoPort)?;
        if port.is_empty() || !port.bytes().all(|b| b.is_ascii_digit()) {
            return Err(InvalidAddress::BadPort);
        }
        let port = port.parse().map_err(|_| InvalidAddress::BadPort)?;
        if !is_host(host) {
            return Err(InvalidAddress::BadHost);
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

fn is_host(host: &str) -> bool {
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        return inner.parse::<Ipv6Addr>().is_ok();
    }
    let name_byte = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    !host.is_empty() && host.len() <= HOST_BYTES_MAX && host.bytes().all(name_byte)
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}:{}", self.host, self.port))
    }
}

impl Serialize for HostPort {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HostPort {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|problem| {
            serde::de::Error::custom(format_args!("{text:?} is not an address: {problem}"))
        })
    }
}
