//! Connections between nodes, all with the same settings.

use std::time::Duration;

use tokio::net::TcpListener;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Endpoint, Server};

use crate::limits::{
    CONNECT_TIMEOUT, CONNECTION_WINDOW_BYTES, FRAME_BYTES_MAX, KEEPALIVE_INTERVAL,
    KEEPALIVE_TIMEOUT, SERVER_KEEPALIVE_INTERVAL, SERVER_KEEPALIVE_TIMEOUT, STREAM_WINDOW_BYTES,
};

/// An address that is not `host:port`.
#[derive(Debug, thiserror::Error)]
#[error("{address:?} is not an address of the form host:port")]
pub struct InvalidAddress {
    /// The address as given.
    pub address: String,
    /// What tonic said.
    #[source]
    pub source: tonic::transport::Error,
}

/// How to reach the gRPC server at `address`, a `host:port`. The caller connects, and gives the
/// generated client [`MESSAGE_BYTES_MAX`](crate::MESSAGE_BYTES_MAX) as both of its limits.
///
/// # Errors
/// [`InvalidAddress`].
pub fn channel(address: &str) -> Result<Endpoint, InvalidAddress> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))
        .map_err(|source| InvalidAddress { address: address.to_owned(), source })?;
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true))
}

/// A call with a deadline.
pub fn within<T>(deadline: Duration, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.set_timeout(deadline);
    request
}

/// A server to add services to. Each gets [`MESSAGE_BYTES_MAX`](crate::MESSAGE_BYTES_MAX) as both
/// of its limits; serve it with [`incoming`].
#[must_use]
pub fn server() -> Server {
    Server::builder()
        .tcp_nodelay(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .http2_keepalive_interval(Some(SERVER_KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(SERVER_KEEPALIVE_TIMEOUT))
}

/// The connections of a listener that is bound already, for `serve_with_incoming_shutdown`: tonic
/// applies TCP settings only to listeners that it binds itself.
#[must_use]
pub fn incoming(listener: TcpListener) -> TcpIncoming {
    TcpIncoming::from(listener).with_nodelay(Some(true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked() {
        for good in ["127.0.0.1:7400", "nbd-1-1:7400", "[::1]:7400"] {
            assert!(channel(good).is_ok(), "{good}");
        }
        for bad in ["", "a b:1", "host:port:more"] {
            let error = channel(bad).unwrap_err();
            assert!(error.to_string().contains(&format!("{bad:?}")), "{error}");
        }
    }
}
