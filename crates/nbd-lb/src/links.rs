//! Connections to nodes, one an address, shared by the streams of all shards.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use nbd_rpc::v1::session_client::SessionClient;
use nbd_rpc::{InvalidAddress, MESSAGE_BYTES_MAX};
use parking_lot::Mutex;
use tonic::transport::Channel;

/// The connections, by address, as long as somebody holds them. A leaf registry: it is locked for a
/// look-up and never across I/O.
#[derive(Debug, Clone, Default)]
pub(crate) struct Links {
    links: Arc<Mutex<HashMap<String, Weak<Link>>>>,
}

/// A connection to a node. It comes about when it is first used, and again whenever it is found
/// broken.
#[derive(Debug)]
pub(crate) struct Link {
    channel: Channel,
}

impl Links {
    /// The connection to `address`, a `host:port`.
    pub(crate) fn to(&self, address: &str) -> Result<Arc<Link>, InvalidAddress> {
        let mut links = self.links.lock();
        if let Some(link) = links.get(address).and_then(Weak::upgrade) {
            return Ok(link);
        }
        let link = Arc::new(Link { channel: nbd_rpc::channel(address)?.connect_lazy() });
        links.retain(|_, link| link.strong_count() > 0);
        links.insert(address.to_owned(), Arc::downgrade(&link));
        drop(links);
        Ok(link)
    }
}

impl Link {
    /// A client of the node's session service.
    pub(crate) fn client(&self) -> SessionClient<Channel> {
        SessionClient::new(self.channel.clone())
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_is_shared_while_it_is_held() {
        let links = Links::default();
        let one = links.to("a:1").unwrap();
        assert!(Arc::ptr_eq(&one, &links.to("a:1").unwrap()));
        assert!(!Arc::ptr_eq(&one, &links.to("b:1").unwrap()));
        drop(one);
        let _other = links.to("c:1").unwrap();
        assert_eq!(links.links.lock().len(), 1);
        assert!(links.to("no address").is_err());
    }
}
