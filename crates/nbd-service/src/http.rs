//! Serving HTTP with bounds: on connections, and on the time one may stay without an answer.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;

/// Connections one HTTP server holds at a time; the next waits in the kernel's backlog. Probes,
/// scrapers and consoles need a handful; each connection costs a descriptor and a few tens of KiB.
pub const HTTP_CONNECTIONS_MAX: usize = 256;

/// How long a connection may go without a byte of an answer: from its start, or from the last such
/// byte. Covers silent connections, requests sent a byte at a time, and answers nobody reads.
/// Longer than the deadline of any request that a service answers.
pub const HTTP_SILENCE_MAX: Duration = Duration::from_secs(30);

/// How long the end waits for the first byte of connections that were accepted before it.
pub const HTTP_FIRST_BYTE_MAX: Duration = Duration::from_millis(500);

/// Answers requests on `listener` until `stop` is cancelled, then until the requests under way are
/// answered. Who was accepted before that, and has sent nothing yet, may still ask within
/// [`HTTP_FIRST_BYTE_MAX`]: a request that was on its way is answered, not reset.
///
/// # Errors
/// None in practice: errors of a single connection end that connection only, and errors of
/// accepting (descriptors running out) are retried.
pub async fn serve_http(
    listener: TcpListener,
    router: Router,
    stop: CancellationToken,
) -> io::Result<()> {
    serve_bounded(listener, router, stop, HTTP_CONNECTIONS_MAX, HTTP_SILENCE_MAX).await
}

async fn serve_bounded(
    listener: TcpListener,
    router: Router,
    stop: CancellationToken,
    connections_max: usize,
    silence_max: Duration,
) -> io::Result<()> {
    let permits = Arc::new(Semaphore::new(connections_max));
    let unheard = TaskTracker::new();
    let listener = BoundedListener {
        listener,
        permits,
        silence_max,
        stop: stop.clone(),
        unheard: unheard.clone(),
    };
    let service = router.into_make_service_with_connect_info::<ClientAddress>();
    // Told of the end, hyper drops connections of which it does not know the protocol yet.
    let end = async move {
        stop.cancelled().await;
        unheard.close();
        let _ = tokio::time::timeout(HTTP_FIRST_BYTE_MAX, unheard.wait()).await;
    };
    axum::serve(listener, service).with_graceful_shutdown(end).await
}

/// Who is connected: what `axum::extract::ConnectInfo` gives to handlers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientAddress(pub SocketAddr);

impl fmt::Display for ClientAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Connected<IncomingStream<'_, BoundedListener>> for ClientAddress {
    fn connect_info(stream: IncomingStream<'_, BoundedListener>) -> Self {
        Self(*stream.remote_addr())
    }
}

#[derive(Debug)]
struct BoundedListener {
    listener: TcpListener,
    permits: Arc<Semaphore>,
    silence_max: Duration,
    stop: CancellationToken,
    /// A token for each connection of which no byte was read yet.
    unheard: TaskTracker,
}

impl Listener for BoundedListener {
    type Io = BoundedStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (BoundedStream, SocketAddr) {
        // The semaphore is never closed; were it, there would be nobody left to accept for.
        let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else {
            return std::future::pending().await;
        };
        // axum's own listener waits and retries when accepting fails.
        let (stream, address) = tokio::select! {
            biased;
            () = self.stop.cancelled() => return std::future::pending().await,
            accepted = Listener::accept(&mut self.listener) => accepted,
        };
        let _ = stream.set_nodelay(true);
        let deadline = Box::pin(tokio::time::sleep(self.silence_max));
        let silence_max = self.silence_max;
        let unheard = Some(self.unheard.token());
        (BoundedStream { stream, deadline, silence_max, unheard, _permit: permit }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that fails with `TimedOut` once nothing was written to it for `silence_max`.
#[derive(Debug)]
struct BoundedStream {
    stream: TcpStream,
    deadline: Pin<Box<Sleep>>,
    silence_max: Duration,
    unheard: Option<TaskTrackerToken>,
    _permit: OwnedSemaphorePermit,
}

impl BoundedStream {
    fn check_deadline(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }

    fn note_written(&mut self, written: usize) {
        if written > 0 {
            self.deadline.as_mut().reset(Instant::now() + self.silence_max);
        }
    }
}

impl AsyncRead for BoundedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_deadline(context)?;
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        self.unheard = None;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for BoundedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.check_deadline(context)?;
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, buffer))?;
        self.note_written(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.check_deadline(context)?;
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(context, buffers))?;
        self.note_written(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::health::{Readiness, probes};
    use crate::telemetry::detached_handle;

    struct Server {
        address: SocketAddr,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<io::Result<()>>,
    }

    async fn serve(readiness: Readiness, connections_max: usize, silence_max: Duration) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let router = probes(readiness, detached_handle());
        let task = tokio::spawn(serve_bounded(
            listener,
            router,
            stop.clone(),
            connections_max,
            silence_max,
        ));
        Server { address, stop, task }
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_request_that_was_on_its_way_at_the_end_is_answered() {
        let (readiness, [_store]) = Readiness::new(["store"]);
        let server = serve(readiness, 8, LONG).await;
        let mut early = TcpStream::connect(server.address).await.unwrap();
        // Accepted behind the other.
        assert!(get(server.address, "/livez").await.starts_with("HTTP/1.1 200"));
        server.stop.cancel();
        tokio::time::sleep(Duration::from_millis(50)).await;
        early.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        early.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        server.task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn who_never_asks_does_not_hold_up_the_end() {
        let (readiness, [_store]) = Readiness::new(["store"]);
        let server = serve(readiness, 8, LONG).await;
        let _silent = TcpStream::connect(server.address).await.unwrap();
        assert!(get(server.address, "/livez").await.starts_with("HTTP/1.1 200"));
        server.stop.cancel();
        tokio::time::timeout(Duration::from_secs(20), server.task).await.unwrap().unwrap().unwrap();
    }

    #[tokio::test]
    async fn probes_tell_live_from_ready() {
        let (readiness, [store]) = Readiness::new(["store"]);
        let server = serve(readiness.clone(), 8, LONG).await;
        assert!(get(server.address, "/livez").await.starts_with("HTTP/1.1 200"));
        let waiting = get(server.address, "/readyz").await;
        assert!(waiting.starts_with("HTTP/1.1 503"), "{waiting}");
        assert!(waiting.ends_with("waiting for: store\n"), "{waiting}");
        store.release();
        assert!(get(server.address, "/readyz").await.starts_with("HTTP/1.1 200"));
        let metrics = get(server.address, "/metrics").await;
        assert!(metrics.contains("text/plain; version=0.0.4"), "{metrics}");
        readiness.drain();
        assert!(get(server.address, "/readyz").await.ends_with("draining\n"));
        server.stop.cancel();
        server.task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_silent_connection_is_closed_and_gives_its_place_back() {
        let (readiness, []) = Readiness::new([]);
        let server = serve(readiness, 1, Duration::from_millis(50)).await;
        let mut silent = TcpStream::connect(server.address).await.unwrap();
        silent.write_all(b"GET /livez HTT").await.unwrap();
        // The only place is taken, so this waits until the silent one has been closed.
        assert!(get(server.address, "/livez").await.starts_with("HTTP/1.1 200"));
        let mut rest = Vec::new();
        let _ = silent.read_to_end(&mut rest).await;
        server.stop.cancel();
        server.task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn stopping_does_not_wait_for_idle_connections() {
        let (readiness, []) = Readiness::new([]);
        let server = serve(readiness, 8, LONG).await;
        let mut idle = TcpStream::connect(server.address).await.unwrap();
        idle.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut some = [0; 64];
        assert!(idle.read(&mut some).await.unwrap() > 0);
        server.stop.cancel();
        tokio::time::timeout(Duration::from_secs(10), server.task).await.unwrap().unwrap().unwrap();
    }
}
