//! Pipes, by which the kernel moves bytes from one socket to another.
//!
//! A direction holds one only while it has bytes to move: idle clients cost no pipe, and what the
//! kernel grants a user in pipes (16,384 pages in all, unless the process is privileged) is for
//! those that are busy.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::net::TcpStream;

/// Bytes that a pipe may hold, and so the most that is under way in one direction beside what the
/// two sockets hold. Where the kernel does not grant it, a pipe has the size that it comes with.
const PIPE_BYTES: usize = 256 << 10;

/// Empty pipes kept for the next who needs one. Each costs two descriptors and a few KiB; making
/// one takes about 10 us.
const IDLE_MAX: usize = 64;

const FLAGS: SpliceFlags = SpliceFlags::MOVE.union(SpliceFlags::NONBLOCK);

/// Empty pipes, shared by all connections. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Pipes {
    idle: Arc<Mutex<Vec<Pipe>>>,
}

/// A pipe. It is filled only when it is empty: then a source that would block has no bytes, and
/// cannot be mistaken for one that has and finds no room.
#[derive(Debug)]
pub(super) struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// Bytes in it.
    held: usize,
}

impl Pipes {
    /// An empty pipe.
    pub(super) fn take(&self) -> io::Result<Pipe> {
        match self.idle.lock().pop() {
            Some(pipe) => Ok(pipe),
            None => Pipe::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn idle_count(&self) -> usize {
        self.idle.lock().len()
    }

    /// Gives a pipe back. One that is not empty is closed: its bytes are somebody's.
    pub(super) fn give(&self, pipe: Pipe) {
        let mut idle = self.idle.lock();
        if pipe.is_empty() && idle.len() < IDLE_MAX {
            idle.push(pipe);
        }
    }
}

impl Pipe {
    fn new() -> io::Result<Self> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // A smaller pipe works as well, with more calls.
        let _ = fcntl_setpipe_size(&write, PIPE_BYTES);
        Ok(Self { read, write, held: 0 })
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.held == 0
    }

    /// Moves what `from` has received into the pipe, as much as fits. 0: it has ended.
    ///
    /// # Errors
    /// `WouldBlock`: nothing was received.
    ///
    /// # Panics
    /// If the pipe is not empty.
    pub(super) fn fill(&mut self, from: &TcpStream) -> io::Result<usize> {
        assert!(self.is_empty(), "a pipe is emptied before it is filled again");
        self.held = splice(from, None, &self.write, None, PIPE_BYTES, FLAGS)?;
        Ok(self.held)
    }

    /// Moves what the pipe holds to `to`, as much as that takes.
    ///
    /// # Errors
    /// `WouldBlock`: it takes nothing now.
    ///
    /// # Panics
    /// If the pipe is empty.
    pub(super) fn drain(&mut self, to: &TcpStream) -> io::Result<usize> {
        assert!(!self.is_empty(), "there is something to move");
        let moved = splice(&self.read, None, to, None, self.held, FLAGS)?;
        if moved == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.held -= moved;
        Ok(moved)
    }
}
