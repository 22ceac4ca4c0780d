//! What a written sector looks like: its bytes say which operation wrote it, and where.

use nbd_store::VolumeId;

use crate::history::Value;

const SECTOR: usize = 512;
const _: () = assert!(SECTOR as u64 == crate::history::SECTOR_BYTES);

/// A sector whose bytes no operation can have written there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("sector {sector} of volume {volume} holds what nobody wrote there")]
pub struct Garbled {
    /// The volume.
    pub volume: VolumeId,
    /// The sector.
    pub sector: u64,
}

fn pattern(value: Value, volume: VolumeId, sector: u64, word: usize) -> u64 {
    match word % 3 {
        0 => value.0,
        1 => volume.0,
        _ => sector,
    }
}

/// Fills whole sectors from `first` on with `value`.
pub fn fill(buffer: &mut [u8], value: Value, volume: VolumeId, first: u64) {
    for (sector, bytes) in (first..).zip(buffer.chunks_exact_mut(SECTOR)) {
        for (n, word) in bytes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            *word = pattern(value, volume, sector, n).to_le_bytes();
        }
    }
}

/// The values of whole sectors from `first` on.
///
/// # Errors
/// A sector is neither all zeroes nor as [`fill`] leaves it.
pub fn values(buffer: &[u8], volume: VolumeId, first: u64) -> Result<Vec<Value>, Garbled> {
    let sectors = (first..).zip(buffer.chunks_exact(SECTOR));
    sectors.map(|(sector, bytes)| value_of(bytes, volume, sector)).collect()
}

fn value_of(bytes: &[u8], volume: VolumeId, sector: u64) -> Result<Value, Garbled> {
    let words = bytes.as_chunks::<8>().0;
    let value = Value(u64::from_le_bytes(words[0]));
    let sound = words.iter().enumerate().all(|(n, word)| {
        let expected = if value == Value::ZERO { 0 } else { pattern(value, volume, sector, n) };
        u64::from_le_bytes(*word) == expected
    });
    if sound { Ok(value) } else { Err(Garbled { volume, sector }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sectors_tell_who_wrote_them_and_damage_shows() {
        let volume = VolumeId(7);
        let mut buffer = vec![0; 3 * SECTOR];
        fill(&mut buffer[SECTOR..], Value(9), volume, 41);
        let found = values(&buffer, volume, 40);
        assert_eq!(found, Ok(vec![Value::ZERO, Value(9), Value(9)]));
        assert!(values(&buffer, volume, 41).is_err(), "a sector in the wrong place");
        for at in [3, SECTOR + 300, 3 * SECTOR - 1] {
            let mut damaged = buffer.clone();
            damaged[at] ^= 4;
            assert!(values(&damaged, volume, 40).is_err(), "byte {at}");
        }
    }
}
