//! A command as a later attachment sends it.

use std::ops::Range;

use bytes::{Bytes, BytesMut};
use nbd_store::Epoch;
use nbd_store::command::COMMAND_HEADER_BYTES;

/// Where the epoch lies in a command's header: four bytes, little-endian.
const EPOCH_AT: Range<usize> = 24..28;

/// `command` with another epoch, everything else as it is. Copies its bytes only if the epoch
/// differs and somebody else still holds them.
///
/// # Panics
/// If `command` is shorter than a command's header.
#[must_use]
pub fn with_epoch(command: Bytes, epoch: Epoch) -> Bytes {
    patched(command, EPOCH_AT, &epoch.0.to_le_bytes())
}

/// `command` as one of another session, under another number: for faults only.
#[cfg(feature = "planted-faults")]
pub(crate) fn with_identity(command: Bytes, session: nbd_store::SessionId, seq: u64) -> Bytes {
    let command = patched(command, 8..24, &session.0.to_le_bytes());
    patched(command, 32..40, &seq.to_le_bytes())
}

fn patched(command: Bytes, place: Range<usize>, with: &[u8]) -> Bytes {
    assert!(command.len() >= COMMAND_HEADER_BYTES, "{} bytes are no command", command.len());
    if command[place.clone()] == *with {
        return command;
    }
    let mut patched = command.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
    patched[place].copy_from_slice(with);
    patched.freeze()
}

#[cfg(test)]
mod tests {
    use nbd_store::{SessionId, VolumeId, decode_all, encode_trim, encode_write};

    use super::*;

    #[test]
    fn only_the_epoch_changes() {
        let (id, volume) = (SessionId(u128::MAX - 5), VolumeId(3 << 32 | 1));
        let write = encode_write(id, Epoch(1), 9, volume, 512, &[0xab; 9000]);
        let trim = encode_trim(id, Epoch(u32::MAX), 10, volume, 0, 4096);
        for command in [write, trim] {
            let before = decode_all(&command).next().unwrap().unwrap();
            let kept = command.clone();
            let patched = with_epoch(command.clone(), Epoch(0x0102_0304));
            let after = decode_all(&patched).next().unwrap().unwrap();
            assert_eq!(after.header.epoch, Epoch(0x0102_0304));
            let mut header = after.header;
            header.epoch = before.header.epoch;
            assert_eq!(header, before.header);
            assert_eq!(patched[after.checksums.start..], command[before.checksums.start..]);
            assert_eq!(kept, command, "bytes that others hold stay as they are");
        }
    }

    #[test]
    fn bytes_are_copied_only_if_they_must() {
        let command = encode_trim(SessionId(1), Epoch(1), 1, VolumeId(1), 0, 4096);
        let place = command.as_ptr();
        let same = with_epoch(command, Epoch(1));
        assert_eq!(same.as_ptr(), place);
        let patched = with_epoch(same, Epoch(2));
        assert_eq!(patched.as_ptr(), place);
    }
}
