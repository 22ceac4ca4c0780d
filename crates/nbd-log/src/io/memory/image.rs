//! Contents of one file, twice: as seen and as promised.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use rand::Rng;
use rand::rngs::StdRng;

use super::style::CrashStyle;
use crate::limits::BLOCK_BYTES;

/// What a disk writes whole at the very least.
const SECTOR_BYTES: usize = 512;

/// Versions of a block kept between two syncs. Older ones are forgotten: a crash then cannot bring
/// them back, which only matters to a test that rewrites one block this often without a sync.
const VERSIONS_MAX: usize = 16;

type Block = [u8; BLOCK_BYTES];

/// Both images of a file.
#[derive(Default)]
pub(super) struct FileImage {
    live: Contents,
    durable: Contents,
    /// For each block changed since it was last made durable: its contents after each change.
    unsynced: BTreeMap<usize, Vec<Page>>,
}

/// A file's bytes by block. Blocks that are all zero take no memory.
#[derive(Clone, Default)]
struct Contents {
    len: u64,
    /// `pages.len() * BLOCK_BYTES >= len`; bytes past `len` are zero.
    pages: Vec<Page>,
}

#[derive(Clone, Default)]
enum Page {
    /// Never written: takes no space on the disk.
    #[default]
    Hole,
    Zero,
    Data(Arc<Block>),
}

impl Page {
    fn of(block: Block) -> Self {
        if block == [0; BLOCK_BYTES] { Self::Zero } else { Self::Data(Arc::new(block)) }
    }

    fn bytes(&self) -> &Block {
        match self {
            Self::Hole | Self::Zero => &[0; BLOCK_BYTES],
            Self::Data(block) => block,
        }
    }
}

impl Contents {
    fn page(&self, index: usize) -> Page {
        self.pages.get(index).cloned().unwrap_or_default()
    }

    fn set_page(&mut self, index: usize, page: Page) {
        if index >= self.pages.len() {
            self.pages.resize_with(index + 1, Page::default);
        }
        self.pages[index] = page;
    }

    fn set_len(&mut self, len: u64) {
        self.len = len;
        self.pages.truncate(index_of(len.next_multiple_of(BLOCK_BYTES as u64)));
        let tail = usize_of(len) % BLOCK_BYTES;
        if tail != 0 && self.pages.len() == index_of(len) + 1 {
            let mut block = *self.page(index_of(len)).bytes();
            block[tail..].fill(0);
            self.pages[index_of(len)] = Page::of(block);
        }
    }
}

impl FileImage {
    pub(super) fn len(&self) -> u64 {
        self.live.len
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        let taken = self.live.pages.iter().filter(|page| !matches!(page, Page::Hole));
        (taken.count() * BLOCK_BYTES) as u64
    }

    /// Space that writing the whole range would take anew.
    pub(super) fn unallocated_bytes(&self, offset: u64, len: u64) -> u64 {
        let holes = pages_of(offset, len).filter(|&p| matches!(self.live.page(p), Page::Hole));
        (holes.count() * BLOCK_BYTES) as u64
    }

    pub(super) fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if offset.checked_add(buf.len() as u64).is_none_or(|end| end > self.live.len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for piece in pieces(offset, buf.len()) {
            let page = self.live.page(piece.page);
            buf[piece.in_buffer.clone()].copy_from_slice(&page.bytes()[piece.in_page]);
        }
        Ok(())
    }

    pub(super) fn write(&mut self, buf: &[u8], offset: u64) {
        for piece in pieces(offset, buf.len()) {
            let mut block = *self.live.page(piece.page).bytes();
            block[piece.in_page].copy_from_slice(&buf[piece.in_buffer]);
            self.change(piece.page, Page::of(block));
        }
        self.live.len = self.live.len.max(offset + buf.len() as u64);
    }

    pub(super) fn allocate(&mut self, offset: u64, len: u64) {
        for page in pages_of(offset, len) {
            if let Page::Hole = self.live.page(page) {
                self.change(page, Page::Zero);
            }
        }
        self.live.len = self.live.len.max(offset + len);
    }

    pub(super) fn set_len(&mut self, len: u64) {
        let before = self.live.pages.len();
        self.live.set_len(len);
        for page in index_of(len)..before {
            let now = self.live.page(page);
            self.note_version(page, now);
        }
    }

    fn change(&mut self, index: usize, page: Page) {
        self.live.set_page(index, page.clone());
        self.note_version(index, page);
    }

    fn note_version(&mut self, index: usize, page: Page) {
        let versions = self.unsynced.entry(index).or_default();
        if versions.len() == VERSIONS_MAX {
            versions.remove(0);
        }
        versions.push(page);
    }

    /// Makes these whole blocks last.
    pub(super) fn make_durable(&mut self, len: usize, offset: u64) {
        for page in pages_of(offset, len as u64) {
            self.unsynced.remove(&page);
            self.durable.set_page(page, self.live.page(page));
        }
        self.durable.len = self.durable.len.max(offset + len as u64);
    }

    /// Leaves these blocks visible though they will never reach the disk.
    pub(super) fn forget_unsynced(&mut self, len: usize, offset: u64) {
        for page in pages_of(offset, len as u64) {
            self.unsynced.remove(&page);
        }
    }

    pub(super) fn forget_all_unsynced(&mut self) {
        self.unsynced.clear();
    }

    pub(super) fn sync(&mut self) {
        for page in std::mem::take(&mut self.unsynced).into_keys() {
            self.durable.set_page(page, self.live.page(page));
        }
        self.durable.set_len(self.live.len);
    }

    pub(super) fn flip_bit(&mut self, offset: u64) {
        assert!(offset < self.live.len, "offset {offset} is past the end");
        for contents in [&mut self.live, &mut self.durable] {
            let mut block = *contents.page(index_of(offset)).bytes();
            block[usize_of(offset) % BLOCK_BYTES] ^= 1;
            contents.set_page(index_of(offset), Page::of(block));
        }
    }

    pub(super) fn after_crash(&self, style: CrashStyle, rng: &mut StdRng) -> Self {
        let mut found = self.durable.clone();
        let random = matches!(style, CrashStyle::Blocks | CrashStyle::Sectors);
        let grown = style == CrashStyle::Kept || (random && rng.random());
        for (&index, versions) in &self.unsynced {
            let before = self.durable.page(index);
            let version = |n: usize| if n == 0 { &before } else { &versions[n - 1] };
            let page = match style {
                CrashStyle::Clean => before,
                CrashStyle::Kept => version(versions.len()).clone(),
                CrashStyle::Blocks => version(rng.random_range(0..=versions.len())).clone(),
                CrashStyle::Sectors => {
                    let mut block = [0; BLOCK_BYTES];
                    for (n, sector) in block.chunks_exact_mut(SECTOR_BYTES).enumerate() {
                        let from = version(rng.random_range(0..=versions.len())).bytes();
                        sector.copy_from_slice(&from[n * SECTOR_BYTES..(n + 1) * SECTOR_BYTES]);
                    }
                    Page::of(block)
                }
            };
            found.set_page(index, page);
        }
        found.set_len(if grown { self.live.len } else { self.durable.len });
        Self { live: found.clone(), durable: found, unsynced: BTreeMap::new() }
    }
}

/// The part of a range that lies in one block.
struct Piece {
    page: usize,
    in_page: std::ops::Range<usize>,
    in_buffer: std::ops::Range<usize>,
}

fn pieces(offset: u64, len: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset + done as u64;
        let start = usize_of(at) % BLOCK_BYTES;
        let take = (BLOCK_BYTES - start).min(len - done);
        let in_buffer = done..done + take;
        done += take;
        (take > 0).then(|| Piece { page: index_of(at), in_page: start..start + take, in_buffer })
    })
}

fn pages_of(offset: u64, len: u64) -> std::ops::Range<usize> {
    index_of(offset)..index_of((offset + len).next_multiple_of(BLOCK_BYTES as u64))
}

fn index_of(offset: u64) -> usize {
    usize_of(offset) / BLOCK_BYTES
}

fn usize_of(offset: u64) -> usize {
    usize::try_from(offset).expect("a memory disk fits the address space")
}
