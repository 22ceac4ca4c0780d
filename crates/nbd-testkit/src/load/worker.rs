//! One thread of a load.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nbd_proto::{Command, NbdError};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::client::{ClientError, ConnectOptions, NbdClient, Reply};
use crate::history::Operation;
use crate::server::Target;

use super::region::{ReadFlight, Region, SECTOR, ZERO, content, value_in};
use super::{ANSWER_MAX, Outcome, Shared, Stall, nanoseconds};

/// Shorter times without an answer are not remembered.
pub(super) const STALL_MIN: Duration = Duration::from_millis(20);

/// Time for one attempt to attach; then the next node is tried.
const ATTACH_MAX: Duration = Duration::from_secs(3);

/// Of a thousand requests, how many go to the shared region.
const SHARED_PER_MILLE: u32 = 250;

/// Sectors of a block: trims leave blocks alone that they cover in part.
const BLOCK_SECTORS: usize = 8;

/// A request under way.
#[derive(Debug)]
enum Flight {
    /// Write, trim or write-zeroes in the own region.
    Mutation(Range<usize>),
    Read(ReadFlight),
    Flush,
    /// In the shared region: the sectors, when it was sent, and the value if it is a write.
    Shared {
        sectors: Range<usize>,
        start: u64,
        value: Option<u64>,
    },
}

/// An attachment, and which run of its node it belongs to.
struct Attachment {
    client: NbdClient,
    target: Target,
    endings: u64,
}

pub(super) struct Worker {
    number: usize,
    shared: Arc<Shared>,
    random: StdRng,
    attachment: Attachment,
    /// Place of the target attached to.
    at: usize,
    flights: HashMap<u64, Flight>,
    /// Values written so far; the next is unique in the volume.
    values: u64,
    /// When the last answer came, or the first request after a time without any was sent.
    quiet_since: Instant,
    reconnected: bool,
    /// Requests still to be sent together.
    burst: u32,
    /// When the next burst is due.
    next_send: Instant,
    outcome: Outcome,
}

impl Worker {
    /// Attaches.
    ///
    /// # Panics
    /// If it cannot.
    pub(super) fn start(number: usize, shared: Arc<Shared>) -> Self {
        let options = &shared.options;
        let seed = options.seed.wrapping_add((number as u64).wrapping_mul(0x9e37_79b9));
        let at = number % shared.targets.len();
        let sectors = options.region_bytes / SECTOR;
        let outcome = Outcome {
            region: Region::new(number * sectors, sectors),
            history: Vec::new(),
            stalls: Vec::new(),
            lost: 0,
            reconnects: 0,
        };
        let attachment = attach(&shared.targets[at], &options.volume);
        let attachment = attachment.unwrap_or_else(|error| panic!("attach a load: {error}"));
        assert!(attachment.client.size() >= options.volume_bytes() as u64, "the volume is small");
        Self {
            number,
            random: StdRng::seed_from_u64(seed),
            attachment,
            at,
            flights: HashMap::new(),
            values: 0,
            quiet_since: Instant::now(),
            reconnected: false,
            burst: 0,
            next_send: Instant::now(),
            outcome,
            shared,
        }
    }

    /// Runs until told to stop.
    pub(super) fn run(mut self) -> Outcome {
        while !(self.is_stopping() && self.flights.is_empty()) {
            let done = self.step();
            if let Err(error) = done
                && let Err(failure) = self.recover(&error)
            {
                let node = self.attachment.target.name();
                self.shared.fail(format!("thread {} at {node}: {failure}", self.number));
                break;
            }
        }
        // As a good client does. The connection may be broken; either way it ends here.
        let _ = self.attachment.client.disconnect();
        self.outcome
    }

    fn is_stopping(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }

    /// Sends a request if it is time for one, else awaits an answer.
    fn step(&mut self) -> Result<(), Trouble> {
        let room = self.flights.len() < self.shared.options.depth && !self.is_stopping();
        let now = Instant::now();
        if self.burst == 0 && now >= self.next_send {
            let depth = u32::try_from(self.shared.options.depth).unwrap_or(u32::MAX);
            self.burst = self.random.random_range(1..=depth);
            let interval = Duration::from_secs(1) / self.shared.options.pace;
            // Time lost in a stall is not made up for.
            self.next_send = (self.next_send + interval * self.burst).max(now);
        }
        if room && self.burst > 0 {
            self.burst -= 1;
            if self.flights.is_empty() {
                self.quiet_since = now;
            }
            return self.send();
        }
        if self.flights.is_empty() {
            thread::sleep(self.next_send.saturating_duration_since(now));
            return Ok(());
        }
        let (cookie, outcome) = self.attachment.client.receive()?;
        let flight = self.flights.remove(&cookie).ok_or(ClientError::UnknownCookie(cookie))?;
        match outcome {
            Ok(reply) => self.take(flight, &reply),
            Err(refused) => {
                self.give_up(flight);
                Err(Trouble::Client(ClientError::Error(refused)))
            }
        }
    }

    fn send(&mut self) -> Result<(), Trouble> {
        match self.random.random_range(0..1000) {
            0..SHARED_PER_MILLE => self.send_shared(),
            SHARED_PER_MILLE..600 => self.send_read(),
            600..950 => self.send_write(),
            950..990 => self.send_zeroes(),
            _ => self.transmit(Flight::Flush, &Command::Flush, &[]),
        }
    }

    /// Some sectors of a region of `len`, in blocks more often than not.
    fn choose(&mut self, len: usize, most: usize) -> Range<usize> {
        let sectors = match self.random.random_range(0..10) {
            0..5 => BLOCK_SECTORS,
            5..8 => self.random.random_range(1..=16),
            _ => self.random.random_range(1..=most),
        };
        let sectors = sectors.min(len);
        let mut start = self.random.random_range(0..=len - sectors);
        if self.random.random_bool(0.6) {
            start -= start % BLOCK_SECTORS;
        }
        start..start + sectors
    }

    fn send_shared(&mut self) -> Result<(), Trouble> {
        let sectors = self.choose(self.shared.options.shared_sectors, BLOCK_SECTORS);
        let (first, start) = (self.shared.options.shared_offset() / SECTOR, self.now());
        let (offset, len) = bytes_of(&(first + sectors.start..first + sectors.end));
        let value = self.random.random_bool(0.5).then(|| self.next_value());
        let flight = Flight::Shared { sectors: sectors.clone(), start, value };
        let Some(value) = value else {
            let read = Command::Read { offset, len, dont_fragment: false };
            return self.transmit(flight, &read, &[]);
        };
        let mut payload = Vec::new();
        for sector in sectors {
            content(first + sector, value, &mut payload);
        }
        self.transmit(flight, &Command::Write { offset, len }, &payload)
    }

    fn send_read(&mut self) -> Result<(), Trouble> {
        let sectors = self.choose(self.outcome.region.len(), 256);
        let (offset, len) = self.bytes_at(&sectors);
        let read = Command::Read { offset, len, dont_fragment: false };
        self.transmit(Flight::Read(ReadFlight::new(sectors)), &read, &[])
    }

    fn send_write(&mut self) -> Result<(), Trouble> {
        let sectors = self.choose(self.outcome.region.len(), 512);
        // What two writes of one place leave, both under way, is not for the account to know.
        if self.outcome.region.is_busy(sectors.clone()) {
            return Ok(());
        }
        let value = self.next_value();
        let mut payload = Vec::new();
        for sector in sectors.clone() {
            content(self.outcome.region.place(sector), value, &mut payload);
        }
        let (offset, len) = self.bytes_at(&sectors);
        self.outcome.region.begin(sectors.clone(), value);
        self.transmit(Flight::Mutation(sectors), &Command::Write { offset, len }, &payload)
    }

    fn send_zeroes(&mut self) -> Result<(), Trouble> {
        let sectors = self.choose(self.outcome.region.len(), 64);
        if self.outcome.region.is_busy(sectors.clone()) {
            return Ok(());
        }
        let (offset, len) = self.bytes_at(&sectors);
        let (command, changed) = if self.random.random_bool(0.5) {
            let start = sectors.start.next_multiple_of(BLOCK_SECTORS);
            let end = (sectors.end / BLOCK_SECTORS * BLOCK_SECTORS).max(start);
            (Command::Trim { offset, len }, start..end)
        } else {
            let no_hole = self.random.random();
            (Command::WriteZeroes { offset, len, no_hole }, sectors)
        };
        self.outcome.region.begin(changed.clone(), ZERO);
        self.transmit(Flight::Mutation(changed), &command, &[])
    }

    fn transmit(&mut self, flight: Flight, command: &Command, data: &[u8]) -> Result<(), Trouble> {
        match self.attachment.client.send(command, data) {
            Ok(cookie) => {
                self.flights.insert(cookie, flight);
                Ok(())
            }
            Err(error) => {
                // Part of it may have gone out, with all that matters.
                self.give_up(flight);
                Err(error.into())
            }
        }
    }

    /// A request is answered.
    fn take(&mut self, flight: Flight, reply: &Reply) -> Result<(), Trouble> {
        self.note_answer();
        let reads = self.flights.values_mut().filter_map(Flight::read_mut);
        match flight {
            Flight::Flush => {}
            Flight::Mutation(sectors) => self.outcome.region.finish(sectors, reads),
            Flight::Read(read) => self.outcome.region.check(&read, data(reply)?, reads)?,
            Flight::Shared { sectors, start, value } => {
                let end = Some(nanoseconds(self.shared.epoch));
                let first = self.shared.options.shared_offset() / SECTOR;
                for (number, sector) in sectors.enumerate() {
                    let (write, value) = match value {
                        Some(value) => (true, value),
                        None => {
                            let content = &data(reply)?[number * SECTOR..][..SECTOR];
                            (false, value_in(first + sector, content)?)
                        }
                    };
                    let operation = Operation { write, value, start, end };
                    self.outcome.history.push((sector, operation));
                }
            }
        }
        Ok(())
    }

    /// A request will not be answered.
    fn give_up(&mut self, flight: Flight) {
        self.outcome.lost += 1;
        match flight {
            Flight::Mutation(sectors) => self.outcome.region.lose(sectors),
            Flight::Shared { sectors, start, value: Some(value) } => {
                let operation = Operation { write: true, value, start, end: None };
                self.outcome.history.extend(sectors.map(|sector| (sector, operation)));
            }
            Flight::Read(_) | Flight::Flush | Flight::Shared { value: None, .. } => {}
        }
    }

    fn note_answer(&mut self) {
        self.shared.answers[self.number].fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        if now - self.quiet_since >= STALL_MIN {
            self.outcome.stalls.push(Stall {
                node: self.attachment.target.name().to_owned(),
                reconnected: self.reconnected,
                begin: self.quiet_since,
                end: now,
            });
        }
        self.quiet_since = now;
        self.reconnected = false;
    }

    /// Goes on after trouble that was to be expected.
    ///
    /// # Errors
    /// It was not.
    fn recover(&mut self, trouble: &Trouble) -> Result<(), String> {
        let error = match trouble {
            Trouble::Wrong(wrong) => return Err(wrong.clone()),
            Trouble::Client(error) => error,
        };
        let ended = self.attachment.target.endings() != self.attachment.endings;
        match error {
            // A node that stops may say so before it closes the connection.
            ClientError::Error(reply) if reply.error == NbdError::Shutdown && ended => Ok(()),
            ClientError::Io(io)
                if matches!(io.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) =>
            {
                Err(format!("no answer within {ANSWER_MAX:?} to {:?}", self.flights))
            }
            ClientError::Io(_) | ClientError::Closed if ended => self.reconnect(),
            ClientError::Io(_) | ClientError::Closed => {
                Err(format!("the connection broke though the node was not ended: {error:?}"))
            }
            _ => Err(format!("{error:?}")),
        }
    }

    fn reconnect(&mut self) -> Result<(), String> {
        let flights: Vec<Flight> = self.flights.drain().map(|(_, flight)| flight).collect();
        flights.into_iter().for_each(|flight| self.give_up(flight));
        let started = Instant::now();
        while !self.is_stopping() {
            self.at = self.random.random_range(0..self.shared.targets.len());
            match attach(&self.shared.targets[self.at], &self.shared.options.volume) {
                Ok(attachment) => {
                    self.attachment = attachment;
                    self.outcome.reconnects += 1;
                    self.reconnected = true;
                    return Ok(());
                }
                Err(error) if started.elapsed() > ANSWER_MAX => {
                    return Err(format!("no node to attach to within {ANSWER_MAX:?}: {error:?}"));
                }
                // That node is down as well, or cannot serve now.
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
        Ok(())
    }

    fn now(&self) -> u64 {
        nanoseconds(self.shared.epoch)
    }

    fn next_value(&mut self) -> u64 {
        self.values += 1;
        ((self.number as u64 + 1) << 40) | self.values
    }

    /// Offset and length in the volume of sectors of the own region.
    fn bytes_at(&self, sectors: &Range<usize>) -> (u64, u64) {
        let place = |sector| self.outcome.region.place(sector);
        bytes_of(&(place(sectors.start)..place(sectors.end)))
    }
}

impl Flight {
    fn read_mut(&mut self) -> Option<&mut ReadFlight> {
        match self {
            Self::Read(read) => Some(read),
            _ => None,
        }
    }
}

/// What a step can come to other than success.
#[derive(Debug)]
enum Trouble {
    Client(ClientError),
    /// Content that cannot be there.
    Wrong(String),
}

impl From<ClientError> for Trouble {
    fn from(error: ClientError) -> Self {
        Self::Client(error)
    }
}

impl From<String> for Trouble {
    fn from(wrong: String) -> Self {
        Self::Wrong(wrong)
    }
}

fn attach(target: &Target, volume: &str) -> Result<Attachment, ClientError> {
    // Read first: an end that comes later is then seen as one.
    let endings = target.endings();
    let (export, timeout) = (volume.to_owned(), ATTACH_MAX);
    let options = ConnectOptions { export, timeout, ..ConnectOptions::default() };
    let mut client = NbdClient::connect_with(target.address(), &options)?;
    client.stream().set_read_timeout(Some(ANSWER_MAX))?;
    client.stream().set_write_timeout(Some(ANSWER_MAX))?;
    Ok(Attachment { client, target: target.clone(), endings })
}

fn data(reply: &Reply) -> Result<&[u8], Trouble> {
    match reply {
        Reply::Data(data) => Ok(data),
        other => Err(Trouble::Wrong(format!("a read was answered with {other:?}"))),
    }
}

fn bytes_of(sectors: &Range<usize>) -> (u64, u64) {
    ((sectors.start * SECTOR) as u64, (sectors.len() * SECTOR) as u64)
}
