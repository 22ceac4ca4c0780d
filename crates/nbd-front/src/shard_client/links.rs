//! Connections to nodes, one each, shared by all sessions of this process.

use nbd_rpc::v1::session_client::SessionClient as RpcClient;
use nbd_rpc::{Channels, InvalidAddress, MESSAGE_BYTES_MAX};
use tonic::transport::Channel;

/// The connections, by address.
#[derive(Debug, Clone, Default)]
pub struct Links {
    channels: Channels,
}

impl Links {
    /// A client of the node at `address`, a `host:port`. It connects when it is first used, and
    /// again whenever the connection is found broken.
    ///
    /// # Errors
    /// An address that is none.
    pub fn client(&self, address: &str) -> Result<RpcClient<Channel>, InvalidAddress> {
        Ok(RpcClient::new(self.channels.to(address)?)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }
}
