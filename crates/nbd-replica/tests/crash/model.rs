//! A writer that knows what each of its blocks may hold.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use nbd_proto::Command;
use nbd_testkit::NbdClient;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Unit that the model keeps account of: the sector, the unit of consistency.
const SECTOR: usize = 512;

/// Size of each writer's volume.
pub(crate) const VOLUME_BYTES: usize = 8 << 20;

const SECTORS: usize = VOLUME_BYTES / SECTOR;

/// Requests kept under way.
const DEPTH: usize = 16;

/// Version of a sector that reads as zero: never written, trimmed or zeroed. Such a sector holds no
/// version number, so which zeroing it stems from cannot be told.
const ZERO: u64 = 0;

/// What one sector may hold.
#[derive(Debug, Clone, Default)]
struct Sector {
    /// Newest acknowledged change, and the version that it leaves.
    acknowledged: (u64, u64),
    /// Changes under way or unanswered at a crash, later than `acknowledged` or concurrent with it.
    open: Vec<(u64, u64)>,
}

/// A change under way.
#[derive(Debug)]
struct Change {
    number: u64,
    first: usize,
    end: usize,
    version: u64,
}

/// One client's volume and what must be on it.
#[derive(Debug)]
pub(crate) struct Writer {
    number: u64,
    rng: StdRng,
    sectors: Vec<Sector>,
    next_change: u64,
}

impl Writer {
    pub(crate) fn new(number: u64, seed: u64) -> Self {
        let rng = StdRng::seed_from_u64(seed);
        Self { number, rng, sectors: vec![Sector::default(); SECTORS], next_change: 1 }
    }

    pub(crate) fn volume(&self) -> String {
        format!("crash-{}", self.number)
    }

    /// Writes until told to stop and cut off, and gives the number of acknowledged changes. Ranges
    /// of requests under way never overlap: what an overlap leaves is not defined.
    pub(crate) fn run(&mut self, mut client: NbdClient, stop: &AtomicBool) -> u64 {
        let mut under_way: HashMap<u64, Change> = HashMap::new();
        let mut acknowledged = 0;
        while !stop.load(Ordering::Relaxed) {
            while under_way.len() < DEPTH {
                let Some((cookie, change)) = self.send(&mut client, &under_way) else { break };
                match cookie {
                    Some(cookie) => drop(under_way.insert(cookie, change)),
                    None => return acknowledged,
                }
            }
            let Ok((cookie, outcome)) = client.receive() else { break };
            let change = under_way.remove(&cookie).expect("a reply to a request");
            assert!(outcome.is_ok(), "{change:?} failed: {outcome:?}");
            acknowledged += 1;
            for sector in &mut self.sectors[change.first..change.end] {
                sector.open.retain(|(number, _)| *number > change.number);
                sector.acknowledged = (change.number, change.version);
            }
        }
        acknowledged
    }

    /// Sends one change. The outer `None`: it would overlap one under way. The inner: cut off.
    fn send(
        &mut self,
        client: &mut NbdClient,
        under_way: &HashMap<u64, Change>,
    ) -> Option<(Option<u64>, Change)> {
        let sectors = match self.rng.random_range(0..10) {
            0..5 => 8,
            5..7 => self.rng.random_range(1..=24),
            7..9 => self.rng.random_range(1..=256),
            _ => self.rng.random_range(1..=2560),
        };
        let aligned = self.rng.random_bool(0.6);
        let mut first = self.rng.random_range(0..SECTORS - sectors);
        if aligned {
            first -= first % 8;
        }
        let end = first + sectors;
        if under_way.values().any(|change| first < change.end && change.first < end) {
            return None;
        }
        let number = self.next_change;
        self.next_change += 1;
        let (offset, len) = ((first * SECTOR) as u64, (sectors * SECTOR) as u64);
        let kind = self.rng.random_range(0..12);
        let version = if kind < 10 { number } else { ZERO };
        let mut change = Change { number, first, end, version };
        let sent = match kind {
            0..10 => {
                client.send(&Command::Write { offset, len }, &self.content(first, end, number))
            }
            10 => {
                // Only whole 4 KiB blocks are given back: the rest keeps what it has.
                change.first = first.next_multiple_of(8);
                change.end = (end / 8 * 8).max(change.first);
                client.send(&Command::Trim { offset, len }, &[])
            }
            _ => {
                let no_hole = self.rng.random();
                client.send(&Command::WriteZeroes { offset, len, no_hole }, &[])
            }
        };
        for sector in &mut self.sectors[change.first..change.end] {
            sector.open.push((number, version));
        }
        Some((sent.ok(), change))
    }

    /// Each sector says where it belongs and which change wrote it, over and over.
    fn content(&self, first: usize, end: usize, version: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity((end - first) * SECTOR);
        for sector in first..end {
            let stamp = self.stamp(sector, version);
            bytes.extend(stamp.iter().copied().cycle().take(SECTOR));
        }
        bytes
    }

    fn stamp(&self, sector: usize, version: u64) -> [u8; 16] {
        let place = (self.number << 32) | sector as u64;
        let mut stamp = [0; 16];
        stamp[..8].copy_from_slice(&(place ^ 0x5eed_0000_0000_0000).to_le_bytes());
        stamp[8..].copy_from_slice(&version.to_le_bytes());
        stamp
    }

    /// Reads everything and holds it against the account. What is found is the truth from now on.
    pub(crate) fn verify(&mut self, client: &mut NbdClient, when: &str) {
        const STEP: usize = 1 << 20;
        for at in (0..VOLUME_BYTES).step_by(STEP) {
            let bytes = client.read(at as u64, STEP).expect("read");
            for (place, content) in bytes.chunks_exact(SECTOR).enumerate() {
                self.verify_sector(at / SECTOR + place, content, when);
            }
        }
    }

    fn verify_sector(&mut self, place: usize, content: &[u8], when: &str) {
        let version = self.version(place, content).unwrap_or_else(|| {
            panic!("{when}: sector {place} of {} is torn or foreign", self.volume())
        });
        let sector = &self.sectors[place];
        let allowed = sector.acknowledged.1 == version
            || sector.open.iter().any(|(_, open)| *open == version);
        assert!(
            allowed,
            "{when}: sector {place} of {} holds version {version}, not one of {sector:?}",
            self.volume()
        );
        let number = if version == ZERO { self.next_change } else { version };
        self.sectors[place] = Sector { acknowledged: (number, version), open: Vec::new() };
    }

    /// The version a sector's content shows; `None` if it is not one that was ever written there.
    fn version(&self, place: usize, content: &[u8]) -> Option<u64> {
        if content.iter().all(|byte| *byte == 0) {
            return Some(ZERO);
        }
        let version = u64::from_le_bytes(content[8..16].try_into().expect("8 bytes"));
        let stamp = self.stamp(place, version);
        content.chunks_exact(16).all(|chunk| chunk == stamp).then_some(version)
    }
}
