use std::fmt;
use std::ops::{Deref, DerefMut};

use crate::limits::BLOCK_BYTES;

/// A growable byte buffer whose address is a multiple of [`BLOCK_BYTES`], as direct I/O needs it.
///
/// Keeps its memory when cleared: large allocations are mapped afresh by the allocator each time,
/// which costs more than the copy into them.
#[derive(Default)]
pub struct AlignedBuf {
    /// Longer than what is in use by up to a block, so that an aligned start can be found inside.
    /// Its length never changes without `start` being found anew.
    memory: Vec<u8>,
    /// Offset in `memory` of the first aligned byte.
    start: usize,
    /// Bytes in use from `start`. `start + len <= memory.len()`.
    len: usize,
}

impl AlignedBuf {
    /// An empty buffer without memory.
    #[must_use]
    pub const fn new() -> Self {
        Self { memory: Vec::new(), start: 0, len: 0 }
    }

    /// An empty buffer with room for `bytes`.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> Self {
        let mut buf = Self::new();
        buf.reserve(bytes);
        buf
    }

    /// A buffer of `bytes` zeroes.
    #[must_use]
    pub fn zeroed(bytes: usize) -> Self {
        let mut buf = Self::with_capacity(bytes);
        buf.len = bytes;
        buf
    }

    /// Bytes that fit without new memory.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.memory.len() - self.start
    }

    /// Makes room for `bytes` in all, at least doubling what there is.
    pub fn reserve(&mut self, bytes: usize) {
        if bytes <= self.capacity() {
            return;
        }
        let room = bytes.max(2 * self.capacity()).next_multiple_of(BLOCK_BYTES);
        let mut memory = vec![0; room + BLOCK_BYTES - 1];
        let start = (memory.as_ptr() as usize).wrapping_neg() % BLOCK_BYTES;
        memory[start..start + self.len].copy_from_slice(self);
        self.memory = memory;
        self.start = start;
    }

    /// Empties the buffer; its memory stays.
    pub const fn clear(&mut self) {
        self.len = 0;
    }

    /// Cuts the buffer to `len`, or extends it with zeroes.
    pub fn resize(&mut self, len: usize) {
        self.reserve(len);
        if len > self.len {
            self.memory[self.start + self.len..self.start + len].fill(0);
        }
        self.len = len;
    }

    /// Appends `bytes`.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.reserve(self.len + bytes.len());
        let end = self.start + self.len;
        self.memory[end..end + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
    }

    /// Appends zeroes up to the next multiple of [`BLOCK_BYTES`].
    pub fn pad_to_block(&mut self) {
        self.resize(self.len.next_multiple_of(BLOCK_BYTES));
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} of {} bytes)", self.len, self.capacity())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_aligned_while_it_grows() {
        let mut buf = AlignedBuf::new();
        let mut model = Vec::new();
        for n in 1..200_usize {
            let piece = vec![n.to_le_bytes()[0]; n * 7];
            buf.extend_from_slice(&piece);
            model.extend_from_slice(&piece);
            assert!((buf.as_ptr() as usize).is_multiple_of(BLOCK_BYTES));
            assert_eq!(&*buf, &*model);
        }
    }

    #[test]
    fn old_bytes_do_not_return() {
        let mut buf = AlignedBuf::zeroed(2 * BLOCK_BYTES);
        buf.fill(7);
        buf.clear();
        buf.extend_from_slice(b"abc");
        buf.pad_to_block();
        assert_eq!(buf.len(), BLOCK_BYTES);
        assert_eq!(&buf[..3], b"abc");
        assert!(buf[3..].iter().all(|&b| b == 0));
    }
}
