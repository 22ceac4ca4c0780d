//! Connections that are kept for the next call.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tonic::transport::Channel;

use crate::connect::{InvalidAddress, channel};

/// Connections that are kept. Many more than a cluster has nodes, unless addresses change for
/// years: then they are all made anew.
pub const CHANNELS_MAX: usize = 1024;

/// Connections by address, for one kind of call: each kind has its own, so that none waits behind
/// another's data. Clones are the same. A leaf registry: locked for a look-up, never across I/O.
#[derive(Debug, Clone, Default)]
pub struct Channels {
    by_address: Arc<Mutex<HashMap<String, Channel>>>,
}

impl Channels {
    /// The connection to the gRPC server at `address`, a `host:port`. It is made when it is first
    /// used, and again whenever it is found broken.
    ///
    /// # Errors
    /// [`InvalidAddress`].
    pub fn to(&self, address: &str) -> Result<Channel, InvalidAddress> {
        let mut by_address = self.by_address.lock();
        if let Some(known) = by_address.get(address) {
            return Ok(known.clone());
        }
        let made = channel(address)?.connect_lazy();
        if by_address.len() >= CHANNELS_MAX {
            by_address.clear();
        }
        by_address.insert(address.to_owned(), made.clone());
        Ok(made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn connections_are_kept_up_to_a_bound() {
        let channels = Channels::default();
        channels.to("a:1").unwrap();
        channels.clone().to("a:1").unwrap();
        assert_eq!(channels.by_address.lock().len(), 1);
        assert!(channels.to("no address").is_err());
        (0..CHANNELS_MAX).for_each(|port| _ = channels.to(&format!("b:{port}")).unwrap());
        assert_eq!(channels.by_address.lock().len(), 1, "the last one");
    }
}
