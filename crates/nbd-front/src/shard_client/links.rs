//! Connections to nodes, one each, shared by all sessions of this process.

use std::collections::HashMap;
use std::sync::Arc;

use nbd_rpc::v1::session_client::SessionClient as RpcClient;
use nbd_rpc::{InvalidAddress, MESSAGE_BYTES_MAX};
use parking_lot::Mutex;
use tonic::transport::Channel;

/// The connections, by address. A leaf registry: it is locked for a look-up and never across I/O.
#[derive(Debug, Clone, Default)]
pub struct Links {
    channels: Arc<Mutex<HashMap<String, Channel>>>,
}

impl Links {
    /// A client of the node at `address`, a `host:port`. It connects when it is first used, and
    /// again whenever the connection is found broken.
    ///
    /// # Errors
    /// An address that is none.
    pub fn client(&self, address: &str) -> Result<RpcClient<Channel>, InvalidAddress> {
        let mut channels = self.channels.lock();
        let channel = match channels.get(address) {
            Some(channel) => channel.clone(),
            None => {
                let channel = nbd_rpc::channel(address)?.connect_lazy();
                channels.insert(address.to_owned(), channel.clone());
                channel
            }
        };
        drop(channels);
        Ok(RpcClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }
}
