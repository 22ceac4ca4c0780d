//! Where a volume has data and where it has holes, as clients see it.

use std::fmt;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde_json::Value;

use super::command::tool;

/// The granularity of volumes.
const BLOCK_BYTES: usize = 4096;

/// What a client is told about a range of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Data,
    /// Allocated, and reads as zero.
    Zero,
    /// Not allocated, and reads as zero.
    Hole,
}

/// A range of one kind.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) kind: Kind,
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { offset, len, kind } = self;
        write!(f, "{offset}+{len} {kind:?}")
    }
}

/// The map with these lengths and kinds, from 0 on.
pub(crate) fn map_of(extents: &[(u64, Kind)]) -> Vec<Extent> {
    let mut map = Vec::new();
    for &(len, kind) in extents {
        append(&mut map, len, kind);
    }
    map
}

/// The map of an export, as `nbdinfo --map` has it.
pub(crate) fn nbdinfo_map(uri: &str) -> Vec<Extent> {
    let list = json(&tool("nbdinfo").args(["--map", "--json", uri]).run());
    let mut map = Vec::new();
    for entry in list.as_array().expect("a list of extents") {
        assert_eq!(entry["offset"].as_u64(), Some(end(&map)), "extents adjoin: {list}");
        let kind = match (&entry["type"], &entry["description"]) {
            (t, d) if t == 0 && d == "data" => Kind::Data,
            (t, d) if t == 2 && d == "zero" => Kind::Zero,
            (t, d) if t == 3 && d == "hole,zero" => Kind::Hole,
            _ => panic!("unknown kind of extent: {entry}"),
        };
        append(&mut map, entry["length"].as_u64().expect("a length"), kind);
    }
    map
}

/// The map of an export, as `qemu-img map` has it: it knows data and zeroes.
pub(crate) fn qemu_map(uri: &str) -> Vec<Extent> {
    let list = json(&tool("qemu-img").args(["map", "--output=json", "-f", "raw", uri]).run());
    let mut map = Vec::new();
    for entry in list.as_array().expect("a list of extents") {
        assert_eq!(entry["start"].as_u64(), Some(end(&map)), "extents adjoin: {list}");
        let kind = match (entry["data"].as_bool(), entry["zero"].as_bool()) {
            (Some(true), Some(false)) => Kind::Data,
            (Some(true), Some(true)) => Kind::Zero,
            (Some(false), Some(true)) => Kind::Hole,
            _ => panic!("unknown kind of extent: {entry}"),
        };
        append(&mut map, entry["length"].as_u64().expect("a length"), kind);
    }
    map
}

/// The map that a volume has after a file was copied onto it as sparsely as can be: a hole for each
/// block of zeroes.
pub(crate) fn sparsest_map(file: &Path) -> Vec<Extent> {
    let mut file = File::open(file).expect("open an image");
    let mut map = Vec::new();
    let mut buffer = vec![0; 256 * BLOCK_BYTES];
    loop {
        let read = file.read(&mut buffer).expect("read an image");
        if read == 0 {
            return map;
        }
        assert_eq!(read % BLOCK_BYTES, 0, "images are read in whole blocks");
        for block in buffer[..read].chunks(BLOCK_BYTES) {
            let zero = block.iter().all(|&byte| byte == 0);
            append(&mut map, BLOCK_BYTES as u64, if zero { Kind::Hole } else { Kind::Data });
        }
    }
}

/// Panics at the first extent in which two maps differ; a whole map is too long to read.
#[track_caller]
pub(crate) fn assert_same_map(actual: &[Extent], expected: &[Extent]) {
    for (number, pair) in actual.iter().zip(expected).enumerate() {
        assert_eq!(pair.0, pair.1, "extent {number} of {}", expected.len());
    }
    assert_eq!(actual.len(), expected.len(), "extents");
}

/// Adds a range, joined with the last one if that is of the same kind.
fn append(map: &mut Vec<Extent>, len: u64, kind: Kind) {
    match map.last_mut() {
        Some(last) if last.kind == kind => last.len += len,
        _ => map.push(Extent { offset: end(map), len, kind }),
    }
}

fn end(map: &[Extent]) -> u64 {
    map.last().map_or(0, |last| last.offset + last.len)
}

/// The JSON that a client wrote.
pub(crate) fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("not JSON: {e}\n{text}"))
}
