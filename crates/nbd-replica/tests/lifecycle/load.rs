//! A heavy load of writes that remembers what was acknowledged, to be cut short and checked later.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use nbd_proto::{Command, NbdError};
use nbd_testkit::{ClientError, NbdClient, NodeProcess};

/// Writes that each client has under way.
const DEPTH: usize = 16;

/// Clients that write the parts of one volume over and over, until they are cut off or stopped.
pub(crate) struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Written>>,
}

/// What one client knows of each of its blocks.
pub(crate) struct Written {
    /// Offset of its first block in the volume.
    start: u64,
    block_bytes: usize,
    /// By block: the highest round that was acknowledged, and the highest that was sent. Rounds
    /// count from 1; 0 is a block that was never written.
    rounds: Vec<(u32, u32)>,
}

impl Load {
    /// Begins to write `export` with `clients` connections, each `blocks` blocks of `block_bytes`.
    pub(crate) fn start(
        node: &NodeProcess,
        export: &str,
        clients: u64,
        blocks: usize,
        block_bytes: usize,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |number: u64| {
            let client = node.connect(export).expect("attach a client");
            let start = number * (blocks * block_bytes) as u64;
            let written = Written { start, block_bytes, rounds: vec![(0, 0); blocks] };
            let stop = Arc::clone(&stop);
            thread::spawn(move || written.write(client, &stop))
        };
        let threads = (0..clients).map(start).collect();
        Self { stop, threads }
    }

    /// What was written, now that every client was cut off or has stopped by itself.
    pub(crate) fn stop(self) -> Vec<Written> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|t| t.join().expect("a client was served badly")).collect()
    }
}

/// How many bytes were acknowledged.
pub(crate) fn acknowledged_bytes(all: &[Written]) -> u64 {
    let blocks = |written: &Written| {
        let rounds: u64 = written.rounds.iter().map(|(acked, _)| u64::from(*acked)).sum();
        rounds * written.block_bytes as u64
    };
    all.iter().map(blocks).sum()
}

/// Reads everything and holds it against what was acknowledged and what was sent.
pub(crate) fn verify(node: &NodeProcess, export: &str, all: &[Written]) {
    let mut client = node.connect(export).expect("attach to check");
    for written in all {
        written.verify(&mut client);
    }
}

/// A block's content says which block it is and which round wrote it, all over.
fn content(block: u64, round: u32, block_bytes: usize) -> Vec<u8> {
    let mut stamp = [0; 16];
    stamp[..8].copy_from_slice(&block.to_le_bytes());
    stamp[8..12].copy_from_slice(&round.to_le_bytes());
    stamp.repeat(block_bytes / stamp.len())
}

impl Written {
    fn write(mut self, mut client: NbdClient, stop: &AtomicBool) -> Self {
        // At most one write of a block is under way at a time: the rest of the blocks come between.
        assert!(self.rounds.len() > DEPTH);
        let mut next = 0;
        let mut under_way = HashMap::new();
        let end = loop {
            let stopping = stop.load(Ordering::Relaxed);
            if under_way.len() < DEPTH && !stopping {
                let block = next % self.rounds.len();
                next += 1;
                self.rounds[block].1 += 1;
                let (offset, len) = (self.offset(block), self.block_bytes as u64);
                let data = content(offset, self.rounds[block].1, self.block_bytes);
                match client.send(&Command::Write { offset, len }, &data) {
                    Ok(cookie) => under_way.insert(cookie, block),
                    Err(error) => break error,
                };
            } else if under_way.is_empty() {
                return self;
            } else {
                match client.receive() {
                    Ok((cookie, Ok(_))) => {
                        let block = under_way.remove(&cookie).expect("a write under way");
                        self.rounds[block].0 = self.rounds[block].1;
                    }
                    // A node that stops may say so; the write happened or it did not.
                    Ok((cookie, Err(refused))) if refused.error == NbdError::Shutdown => {
                        under_way.remove(&cookie);
                    }
                    Ok((_, Err(refused))) => panic!("a write was answered with {refused}"),
                    Err(error) => break error,
                }
            }
        };
        // Replies that came before the end were given out first; what is left is unknown.
        assert!(matches!(end, ClientError::Closed | ClientError::Io(_)), "{end}");
        self.take_last_answers(&mut client, &under_way);
        self
    }

    /// A send may fail while answers still wait to be read.
    fn take_last_answers(&mut self, client: &mut NbdClient, under_way: &HashMap<u64, usize>) {
        while let Ok((cookie, outcome)) = client.receive() {
            if outcome.is_ok() {
                let block = under_way[&cookie];
                self.rounds[block].0 = self.rounds[block].1;
            }
        }
    }

    fn offset(&self, block: usize) -> u64 {
        self.start + (block * self.block_bytes) as u64
    }

    fn verify(&self, client: &mut NbdClient) {
        for (block, &(acked, sent)) in self.rounds.iter().enumerate() {
            let offset = self.offset(block);
            let data = client.read(offset, self.block_bytes).expect("read a block");
            let intact = (acked..=sent).any(|round| match round {
                0 => data.iter().all(|byte| *byte == 0),
                round => data == content(offset, round, self.block_bytes),
            });
            assert!(intact, "block at {offset}: not what rounds {acked}..={sent} wrote");
        }
    }
}
