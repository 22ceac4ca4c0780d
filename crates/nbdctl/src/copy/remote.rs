//! A volume on a server, or an image behind a server of our own: NBD, over connections that are
//! made again when they are lost.
//!
//! Each request of a copy may be sent twice: it writes the same bytes to the same place, and no
//! other request of the copy writes there.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use bytes::Bytes;
use nbd_client::{Address, ConnectError, Connection, Error, Lost, Options};
use nbd_proto::constants::TransmissionFlags;
use nbd_proto::{Answer, Command, ExportName, NbdError};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::endpoint::Stretch;
use super::progress::Progress;
use crate::failure::{FAILED, Failure, NOT_FOUND, UNAVAILABLE};

/// Connections to a server that keeps them consistent.
const CONNECTIONS: usize = 4;

/// First and longest wait between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Longest time without any answer after which a connection is given up; or `--retry-for`, if that
/// is shorter.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Bytes asked about at once: what a length of 32 bits holds in whole blocks.
const STATUS_BYTES_MAX: u64 = 1 << 31;

/// How a server is reached.
#[derive(Debug, Clone)]
pub(super) struct Place {
    pub(super) address: Address,
    pub(super) export: ExportName,
    /// What it is called in messages.
    pub(super) name: String,
    /// How long to try to reach it again when it is lost.
    pub(super) retry_for: Duration,
}

impl Place {
    /// The exit code when it is out of reach. A server of our own that is lost does not come back.
    fn lost_code(&self) -> u8 {
        match self.address {
            Address::Unix(_) => FAILED,
            Address::Tcp(_) => UNAVAILABLE,
        }
    }
}

/// An export that stays attached.
#[derive(Debug)]
pub(super) struct Remote {
    place: Place,
    size: u64,
    has_status: bool,
    flags: TransmissionFlags,
    /// Locked while one is made.
    connections: Vec<Mutex<Option<Connection>>>,
    next: AtomicUsize,
    /// Since when there was no answer, if the last that happened was a loss.
    down_since: std::sync::Mutex<Option<Instant>>,
    progress: Arc<Progress>,
}

impl Remote {
    /// Attaches. A server that is not there is no reason to wait: it has never been.
    pub(super) async fn open(place: Place, progress: Arc<Progress>) -> Result<Self> {
        let began = Instant::now();
        let mut wait = BACKOFF.0;
        let connection = loop {
            match Connection::open(&place.address, &place.export, &options(&place)).await {
                Ok(connection) => break connection,
                Err(error)
                    if error.is_transient()
                        && !matches!(error, ConnectError::Io(_))
                        && began.elapsed() < place.retry_for =>
                {
                    sleep(wait).await;
                    wait = (2 * wait).min(BACKOFF.1);
                }
                Err(error) => return Err(unattached(&place, error)),
            }
        };
        let many = connection.can(TransmissionFlags::CAN_MULTI_CONN);
        let (size, flags) = (connection.size(), connection.attached().export.flags);
        let has_status = connection.attached().allocation_context.is_some();
        let mut connections = vec![Mutex::new(Some(connection))];
        connections.resize_with(if many { CONNECTIONS } else { 1 }, || Mutex::new(None));
        let (next, down_since) = (AtomicUsize::new(0), std::sync::Mutex::new(None));
        Ok(Self { place, size, has_status, flags, connections, next, down_since, progress })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Whether it tells what is allocated.
    pub(super) fn has_status(&self) -> bool {
        self.has_status
    }

    pub(super) fn is_read_only(&self) -> bool {
        self.flags.contains(TransmissionFlags::READ_ONLY)
    }

    pub(super) async fn stretches(&self, offset: u64, len: u64) -> Result<Vec<Stretch>> {
        if !self.has_status {
            return Ok(vec![Stretch { len, zero: false }]);
        }
        let len = len.min(STATUS_BYTES_MAX);
        let command = Command::BlockStatus { offset, len, req_one: false };
        match self.ask(command, Bytes::new(), Vec::new()).await? {
            Answer::Extents(extents) => {
                Ok(extents.iter().map(|it| Stretch { len: it.len, zero: it.zero }).collect())
            }
            Answer::Done | Answer::Data(_) => unreachable!("status is answered with extents"),
        }
    }

    pub(super) async fn read(&self, offset: u64, buffer: Vec<u8>) -> Result<Vec<u8>> {
        let command = Command::Read { offset, len: buffer.len() as u64, dont_fragment: false };
        match self.ask(command, Bytes::new(), buffer).await? {
            Answer::Data(data) => Ok(data),
            Answer::Done | Answer::Extents(_) => unreachable!("a read is answered with content"),
        }
    }

    pub(super) async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        let command = Command::Write { offset, len: data.len() as u64 };
        self.ask(command, data, Vec::new()).await.map(drop)
    }

    /// Leaves alone what is zero already.
    pub(super) async fn zero(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            for Stretch { len, zero } in self.stretches(at, end - at).await? {
                if !zero {
                    self.write_zeroes(at, len).await?;
                }
                at += len;
            }
        }
        Ok(())
    }

    async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        if self.flags.contains(TransmissionFlags::SEND_WRITE_ZEROES) {
            let command = Command::WriteZeroes { offset, len, no_hole: false };
            return self.ask(command, Bytes::new(), Vec::new()).await.map(drop);
        }
        let zeroes = Bytes::from(vec![0; 1 << 20]);
        let mut at = offset;
        while at < offset + len {
            let part = usize::try_from(offset + len - at).unwrap_or(usize::MAX).min(zeroes.len());
            self.write(at, zeroes.slice(..part)).await?;
            at += part as u64;
        }
        Ok(())
    }

    pub(super) async fn sync(&self) -> Result<()> {
        if !self.flags.contains(TransmissionFlags::SEND_FLUSH) {
            return Ok(());
        }
        self.ask(Command::Flush, Bytes::new(), Vec::new()).await.map(drop)
    }

    /// Asks until there is an answer, for as long as the server may stay away.
    async fn ask(&self, command: Command, payload: Bytes, mut buffer: Vec<u8>) -> Result<Answer> {
        let slot = self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        loop {
            let connection = self.connection(slot).await?;
            // It goes with a connection that is lost; another is made then.
            let buffer = std::mem::take(&mut buffer);
            match connection.ask(command, payload.clone(), buffer).await {
                Ok(answer) => {
                    *self.down_since() = None;
                    return Ok(answer);
                }
                Err(error) if error.is_transient() => {
                    self.lost(&connection, slot, error).await?;
                }
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    /// The connection at `slot`, made again if need be.
    async fn connection(&self, slot: usize) -> Result<Connection> {
        let mut held = self.connections[slot].lock().await;
        if let Some(connection) = held.as_ref().filter(|connection| !connection.has_ended()) {
            return Ok(connection.clone());
        }
        let mut wait = BACKOFF.0;
        loop {
            let Place { address, export, .. } = &self.place;
            match Connection::open(address, export, &options(&self.place)).await {
                Ok(connection) if connection.size() == self.size => {
                    *held = Some(connection.clone());
                    return Ok(connection);
                }
                Ok(connection) => bail!(
                    "{} has changed its size from {} to {} bytes",
                    self.place.name,
                    self.size,
                    connection.size()
                ),
                Err(error) if error.is_transient() => {
                    self.is_down(Duration::ZERO, &error)?;
                    sleep(wait).await;
                    wait = (2 * wait).min(BACKOFF.1);
                }
                Err(error) => return Err(unattached(&self.place, error)),
            }
        }
    }

    async fn lost(&self, connection: &Connection, slot: usize, error: Error) -> Result<()> {
        let silence = match &error {
            Error::Lost(lost) => match **lost {
                Lost::Silent(silence) => silence,
                _ => Duration::ZERO,
            },
            // A server that says that it goes down does not say when.
            _ => {
                let mut held = self.connections[slot].lock().await;
                if held.as_ref().is_some_and(|held| held.is_same(connection)) {
                    *held = None;
                }
                drop(held);
                sleep(BACKOFF.0).await;
                Duration::ZERO
            }
        };
        self.is_down(silence, &error)
    }

    /// Notes that there is no answer, and for how long there was none already; fails once that is
    /// too long.
    fn is_down(&self, silence: Duration, error: &dyn std::error::Error) -> Result<()> {
        let now = Instant::now();
        let mut down_since = self.down_since();
        if down_since.is_none() {
            let name = &self.place.name;
            self.progress.say(&format!("{name}: {error}; trying again"));
        }
        let since = *down_since.get_or_insert(now.checked_sub(silence).unwrap_or(now));
        let retry_for = self.place.retry_for;
        if now.duration_since(since) < retry_for {
            return Ok(());
        }
        let what = format!("{} was out of reach for {retry_for:?}: {error}", self.place.name);
        Err(Failure::new(self.place.lost_code(), what).into())
    }

    fn down_since(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.down_since.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn failed(&self, error: Error) -> anyhow::Error {
        let full = error.nbd_error() == Some(NbdError::NoSpc);
        let hint = if full { ": its disks are full" } else { "" };
        anyhow::Error::from(error).context(format!("{}{hint}", self.place.name))
    }
}

fn options(place: &Place) -> Options {
    let silence_max = place.retry_for.clamp(Duration::from_secs(1), SILENCE_MAX);
    let connect_max = silence_max.min(Options::default().connect_max);
    Options { silence_max, connect_max, ..Options::default() }
}

fn unattached(place: &Place, error: ConnectError) -> anyhow::Error {
    let (unknown, transient) = (error.is_unknown_export(), error.is_transient());
    let error = anyhow::Error::from(error);
    let Place { address, name, .. } = place;
    if unknown {
        let what = format!(
            "there is no volume {name:?} at {address}, and attaching does not create it there; \
             `nbdctl volume create` does"
        );
        return Failure::new(NOT_FOUND, what).into();
    }
    let error = error.context(format!("attach {name} at {address}"));
    if transient { Failure::with_code(place.lost_code(), &error).into() } else { error }
}
