//! Bytes moved between two TCP connections within the kernel.
//!
//! ```text
//!  client ══ socket ▶ pipe ▶ socket ══▶ server      the kernel moves pages from one to the
//!         ◀══ socket ◀ pipe ◀ socket ══             other; no byte passes through this process
//! ```
//!
//! It knows nothing of what the bytes mean. A side that takes nothing holds up the other, by way of
//! pipe and sockets: nothing grows. When a side has ended its direction, so does the other towards
//! the far end, and what is still to come the other way comes.
//!
//! - [`carry`]: both directions, to the end. `pump`: one of them. `pipe`: what it moves bytes
//!   through. [`set_options`]: how sockets that carry clients are set.

mod pipe;
mod pump;

use std::io;
use std::time::Duration;

use bytes::{Buf, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

pub use self::pipe::Pipes;
use self::pump::pump;

/// Longest wait, at the end of a connection, for the client to take its last bytes and close.
pub const LINGER: Duration = Duration::from_secs(1);

/// What goes to the server (`up`) and to the client (`down`), told of each time that bytes have
/// arrived there.
#[derive(Debug)]
pub struct Moved<Up, Down> {
    /// Told of bytes that have gone to the server.
    pub up: Up,
    /// Told of bytes that have gone to the client.
    pub down: Down,
}

/// Moves bytes both ways until both have ended. `input` is what has come from the client already;
/// `stop` ends the connection in good order: what was received by then goes to the server, and what
/// that has to say comes back.
///
/// # Errors
/// Of either connection; no pipe to be had.
pub async fn carry<Up: Fn(u64), Down: Fn(u64)>(
    client: &TcpStream,
    server: &TcpStream,
    input: BytesMut,
    pipes: &Pipes,
    stop: &CancellationToken,
    moved: Moved<Up, Down>,
) -> io::Result<()> {
    let up = async {
        send(server, input, &moved.up).await?;
        pump(client, server, pipes, stop, &moved.up).await
    };
    let never = CancellationToken::new();
    let down = pump(server, client, pipes, &never, &moved.down);
    tokio::pin!(up, down);
    tokio::select! {
        // The client has nothing more to ask. What it asked is answered yet.
        ended = &mut up => {
            ended?;
            down.await
        }
        // Nothing more will be answered: the client has a moment to take it in and leave.
        ended = &mut down => {
            ended?;
            tokio::time::timeout(LINGER, up).await.unwrap_or(Ok(()))
        }
    }
}

/// Sends bytes that are in this process already; `sent` is told of what has gone.
///
/// # Errors
/// Of the connection.
pub async fn send(to: &TcpStream, mut bytes: BytesMut, sent: impl Fn(u64)) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(&bytes) {
            Ok(count) => {
                bytes.advance(count);
                sent(count as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// What is sent leaves at once, and a peer whose host is gone is noticed within about a minute.
///
/// # Errors
/// When the system refuses an option.
pub fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new()
        .with_time(Duration::from_secs(30))
        .with_interval(Duration::from_secs(10))
        .with_retries(3);
    socket.set_tcp_keepalive(&keepalive)?;
    socket.set_tcp_user_timeout(Some(Duration::from_secs(60)))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    /// The two ends of a connection.
    pub(crate) async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let connect = TcpStream::connect(listener.local_addr().unwrap());
        let (connected, accepted) = tokio::join!(connect, listener.accept());
        (connected.unwrap(), accepted.unwrap().0)
    }

    // Goal: who has said all is still answered, and what was read before comes first.
    #[tokio::test]
    async fn an_end_in_one_direction_leaves_the_other() {
        let ((mut client, near), (far, mut server)) = (pair().await, pair().await);
        let (pipes, stop) = (Pipes::default(), CancellationToken::new());
        let (up, down) = (Cell::new(0), Cell::new(0));
        let moved = Moved {
            up: |bytes| up.set(up.get() + bytes),
            down: |bytes| down.set(down.get() + bytes),
        };
        let carried = carry(&near, &far, BytesMut::from("first "), &pipes, &stop, moved);
        let talk = async {
            client.write_all(b"second").await.unwrap();
            client.shutdown().await.unwrap();
            let mut asked = Vec::new();
            server.read_to_end(&mut asked).await.unwrap();
            assert_eq!(asked, b"first second");
            server.write_all(b"an answer").await.unwrap();
            drop(server);
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            assert_eq!(answer, b"an answer");
        };
        let (carried, ()) = tokio::join!(carried, talk);
        carried.unwrap();
        assert_eq!((up.get(), down.get()), (12, 9));
    }

    #[tokio::test]
    async fn a_server_that_has_ended_is_not_waited_for_by_a_client_that_stays() {
        let ((mut client, near), (far, server)) = (pair().await, pair().await);
        let (pipes, stop) = (Pipes::default(), CancellationToken::new());
        drop(server);
        let moved = Moved { up: |_| {}, down: |_| {} };
        let carried = carry(&near, &far, BytesMut::new(), &pipes, &stop, moved);
        let ended = tokio::time::timeout(10 * LINGER, carried).await;
        assert!(ended.is_ok(), "it goes on");
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    }
}
