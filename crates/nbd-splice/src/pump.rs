//! One direction of a spliced connection.

use std::io;
use std::net::Shutdown;
use std::time::Instant;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::LINGER;
use crate::pipe::Pipes;

/// Moves bytes from one socket to the other until the first has ended, or `stop` is cancelled and
/// what was received by then is moved; then ends the other in that direction. `moved` is told of
/// bytes that have arrived there. A socket that takes nothing holds up the other, by way of the
/// pipe.
///
/// # Errors
/// Of either socket; no pipe to be had.
pub(super) async fn pump(
    from: &TcpStream,
    to: &TcpStream,
    pipes: &Pipes,
    stop: &CancellationToken,
    moved: impl Fn(u64),
) -> io::Result<()> {
    let mut held = None;
    let mut stopping = None;
    loop {
        let mut pipe = match held.take() {
            Some(pipe) => pipe,
            None => pipes.take()?,
        };
        match from.try_io(Interest::READABLE, || pipe.fill(from)) {
            Ok(0) => {
                pipes.give(pipe);
                break;
            }
            Ok(_) => {
                while !pipe.is_empty() {
                    let count = to.async_io(Interest::WRITABLE, || pipe.drain(to)).await?;
                    moved(count as u64);
                }
                held = Some(pipe);
                // Between two bursts is best, for there a request ends: but not for ever.
                if stop.is_cancelled()
                    && stopping.get_or_insert_with(Instant::now).elapsed() >= LINGER
                {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                pipes.give(pipe);
                tokio::select! {
                    ready = from.readable() => ready?,
                    () = stop.cancelled() => break,
                }
            }
            Err(error) => return Err(error),
        }
    }
    match SockRef::from(to).shutdown(Shutdown::Write) {
        // The other side is gone altogether: whoever reads from it finds out.
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        ended => ended,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::tests::pair;

    fn bytes(count: u32) -> Vec<u8> {
        (0..count).map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    // Goal: every byte arrives, in order, also when the reader is slow and the pipe is full, and
    // then the end does.
    #[tokio::test]
    async fn bytes_arrive_and_the_end_behind_them() {
        let ((mut client, from), (to, mut server)) = (pair().await, pair().await);
        let (pipes, stop) = (Pipes::default(), CancellationToken::new());
        let sent = bytes(20 << 20);
        let moved = Cell::new(0);
        let count = |bytes| moved.set(moved.get() + bytes);
        let write = async {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
        };
        let read = async {
            let mut found = Vec::new();
            while server.read_buf(&mut found).await.unwrap() > 0 {
                if found.len() < 1 << 20 {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            found
        };
        let (pumped, (), found) = tokio::join!(pump(&from, &to, &pipes, &stop, count), write, read);
        pumped.unwrap();
        assert!(found == sent, "{} bytes", found.len());
        assert_eq!(moved.get(), sent.len() as u64);
    }

    #[tokio::test]
    async fn a_stop_moves_what_was_received_and_ends_the_other() {
        let ((mut client, from), (to, mut server)) = (pair().await, pair().await);
        let (pipes, stop) = (Pipes::default(), CancellationToken::new());
        client.write_all(b"a request").await.unwrap();
        from.readable().await.unwrap();
        stop.cancel();
        pump(&from, &to, &pipes, &stop, |_| {}).await.unwrap();
        let mut found = Vec::new();
        server.read_to_end(&mut found).await.unwrap();
        assert_eq!(found, b"a request");
    }

    #[tokio::test]
    async fn a_direction_without_bytes_holds_no_pipe() {
        let ((mut client, from), (to, mut server)) = (pair().await, pair().await);
        let (pipes, stop) = (Pipes::default(), CancellationToken::new());
        let pumping = pump(&from, &to, &pipes, &stop, |_| {});
        let talk = async {
            for _ in 0..100 {
                client.write_all(b"ping").await.unwrap();
                server.read_exact(&mut [0; 4]).await.unwrap();
            }
            // The pump goes back to waiting once it is polled.
            while pipes.idle_count() == 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!(pipes.idle_count(), 1, "one served them all");
            drop(client);
        };
        let (pumped, ()) = tokio::join!(pumping, talk);
        pumped.unwrap();
    }

    #[tokio::test]
    async fn a_reset_is_an_error() {
        let ((client, from), (to, _server)) = (pair().await, pair().await);
        SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        let (pipes, stop) = (Pipes::default(), CancellationToken::new());
        let error = pump(&from, &to, &pipes, &stop, |_| {}).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
