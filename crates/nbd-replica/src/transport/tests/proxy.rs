//! A TCP proxy in front of a node: a network that can be slow, frozen or gone.

use std::net::SocketAddr;
use std::time::Duration;

use nbd_testkit::free_port;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What the network does to each connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Pass,
    /// Takes at most this many bytes a second and direction.
    Slow(u32),
    /// Takes nothing, and says nothing.
    Frozen,
    /// Closes every connection, and refuses new ones.
    Dead,
}

pub(super) struct Proxy {
    pub(super) address: SocketAddr,
    target: SocketAddr,
    mode: watch::Sender<Mode>,
}

impl Proxy {
    pub(super) async fn to(target: SocketAddr) -> Self {
        // One of those from which the kernel takes none for connections, while nobody listens.
        let address = SocketAddr::from(([127, 0, 0, 1], free_port()));
        let listener = TcpListener::bind(address).await.unwrap();
        let mode = watch::Sender::new(Mode::Pass);
        tokio::spawn(accept(listener, target, mode.subscribe()));
        Self { address, target, mode }
    }

    pub(super) fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Listens again after it was dead.
    pub(super) async fn revive(&self) {
        self.set(Mode::Pass);
        let listener = TcpListener::bind(self.address).await.unwrap();
        tokio::spawn(accept(listener, self.target, self.mode.subscribe()));
    }
}

async fn accept(listener: TcpListener, target: SocketAddr, mut mode: watch::Receiver<Mode>) {
    let serving = mode.clone();
    let accepting = async {
        loop {
            let (near, _) = listener.accept().await.unwrap();
            if let Ok(far) = TcpStream::connect(target).await {
                near.set_nodelay(true).unwrap();
                far.set_nodelay(true).unwrap();
                tokio::spawn(connection(near, far, serving.clone()));
            }
        }
    };
    tokio::select! {
        () = accepting => {}
        _ = mode.wait_for(|mode| *mode == Mode::Dead) => {}
    }
}

async fn connection(near: TcpStream, far: TcpStream, mut mode: watch::Receiver<Mode>) {
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let (there, back) = (mode.clone(), mode.clone());
    tokio::select! {
        () = copy(near_read, far_write, there) => {}
        () = copy(far_read, near_write, back) => {}
        _ = mode.wait_for(|mode| *mode == Mode::Dead) => {}
    }
}

async fn copy(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut mode: watch::Receiver<Mode>) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let Ok(read @ 1..) = from.read(&mut buffer).await else { return };
        let now = *mode.wait_for(|mode| *mode != Mode::Frozen).await.unwrap();
        if let Mode::Slow(bytes) = now {
            tokio::time::sleep(Duration::from_secs(1).mul_f64(read as f64 / f64::from(bytes)))
                .await;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
