//! Records of the metadata database: how each is sealed, and the small ones' formats.
//!
//! redb checks its pages' checksums only when it repairs, so every value carries a CRC32C of its
//! own in its last four bytes, over key and body: a flipped bit is noticed where it is read, and a
//! value is never taken for another key's.
//!
//! ```text
//! sealed value:  | body | CRC32C of (key, body) u32 |
//!
//! volume (key: volume u64)
//! 0          8              10                    12     12 + name
//! +----------+--------------+---------------------+------+-------------+
//! | size u64 | name len u16 | description len u16 | name | description | ...
//! +----------+--------------+---------------------+------+-------------+
//! then, unless all of it is 0 or none:
//! +-------------+--------------+----------+-----------------+--------+
//! | created u64 | modified u64 | key u128 | fingerprint u64 | labels |   labels: see `labels`
//! +-------------+--------------+----------+-----------------+--------+
//!
//! shard (key: shard u32)
//! 0             8              16       24       32         40            48               52
//! +-------------+--------------+--------+--------+----------+-------------+----------------+---+
//! | applied u64 | its term u64 | term   | vote   | commit   | counter i64 | volumes so far | 0 |
//! +-------------+--------------+--------+--------+----------+-------------+----------------+---+
//!                               Raft's hard state, u64 each                 u32              u32
//! 56            64                  72
//! +-------------+-------------------+
//! | replica u64 | log floor u64     |   replica: own id, 0 before the shard is formed; floor: log
//! +-------------+-------------------+   position, entries not behind it are void
//! ```

use nbd_log::checksum::Crc32c;
use nbd_log::log::{HardState, LogPosition};
use nbd_topology::{LogIndex, ReplicaId, Term};

use crate::ids::VolumeId;
use crate::labels::{put_labels, take_labels};
use crate::limits::{DESCRIPTION_BYTES_MAX, VOLUME_NAME_BYTES_MAX};
use crate::members::Input;
use crate::outcome::{VolumeInfo, shared_labels};

/// Bytes of a sealed value's checksum.
pub(crate) const SEAL_BYTES: usize = 4;

const SHARD_BYTES: usize = 72;

fn seal_of(key: &[u8], body: &[u8]) -> [u8; SEAL_BYTES] {
    let mut crc = Crc32c::new();
    crc.update(key);
    crc.update(body);
    crc.finish().to_le_bytes()
}

/// Closes `body` with the checksum of it and `key`.
pub(crate) fn seal(key: &[u8], mut body: Vec<u8>) -> Vec<u8> {
    let seal = seal_of(key, &body);
    body.extend(seal);
    body
}

/// The body of a sealed value, or `None` if it is damaged.
pub(crate) fn unseal<'a>(key: &[u8], value: &'a [u8]) -> Option<&'a [u8]> {
    let (body, seal) = value.split_last_chunk::<SEAL_BYTES>()?;
    (seal_of(key, body) == *seal).then_some(body)
}

/// What the last checkpoint knew of a shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ShardRecord {
    /// Every entry up to here is in the checkpoint.
    pub(crate) applied: LogIndex,
    /// Term of the entry at `applied`.
    pub(crate) applied_term: Term,
    /// Raft's hard state when the checkpoint was made, `commit >= applied`.
    pub(crate) hard_state: HardState,
    /// The replicated counter.
    pub(crate) counter: i64,
    /// Number of volumes ever created.
    pub(crate) volumes_created: u32,
    /// This replica's id; `None` before the shard is formed.
    pub(crate) replica: Option<ReplicaId>,
    /// Entries of the shard that lie before this in the log are void: a snapshot took their place.
    pub(crate) log_floor: LogPosition,
}

impl ShardRecord {
    /// A shard that nothing was ever applied to.
    pub(crate) const fn empty() -> Self {
        Self {
            applied: LogIndex::ZERO,
            applied_term: Term::ZERO,
            hard_state: HardState { term: Term::ZERO, vote: 0, commit: LogIndex::ZERO },
            counter: 0,
            volumes_created: 0,
            replica: None,
            log_floor: LogPosition(0),
        }
    }

    /// The record's body.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SHARD_BYTES + SEAL_BYTES);
        let hard_state = &self.hard_state;
        for value in [
            self.applied.0,
            self.applied_term.0,
            hard_state.term.0,
            hard_state.vote,
            hard_state.commit.0,
            self.counter.cast_unsigned(),
            u64::from(self.volumes_created),
            self.replica.map_or(0, ReplicaId::get),
            self.log_floor.0,
        ] {
            out.extend(value.to_le_bytes());
        }
        out
    }

    /// The record in `body`, or `None` if it is not one.
    pub(crate) fn decode(body: &[u8]) -> Option<Self> {
        let body: &[u8; SHARD_BYTES] = body.try_into().ok()?;
        let [applied, applied_term, term, vote, commit, counter, volumes, replica, floor] =
            std::array::from_fn(|n| u64::from_le_bytes(body.as_chunks().0[n]));
        Some(Self {
            applied: LogIndex(applied),
            applied_term: Term(applied_term),
            hard_state: HardState { term: Term(term), vote, commit: LogIndex(commit) },
            counter: counter.cast_signed(),
            volumes_created: u32::try_from(volumes).ok()?,
            replica: ReplicaId::new(replica),
            log_floor: LogPosition(floor),
        })
    }
}

/// The body of a volume's record.
pub(crate) fn encode_volume(info: &VolumeInfo) -> Vec<u8> {
    let len = |text: &str| u16::try_from(text.len()).expect("names are bounded when created");
    let mut out = Vec::with_capacity(12 + info.name.len() + info.description.len() + SEAL_BYTES);
    out.extend(info.size.to_le_bytes());
    out.extend(len(&info.name).to_le_bytes());
    out.extend(len(&info.description).to_le_bytes());
    out.extend(info.name.as_bytes());
    out.extend(info.description.as_bytes());
    let VolumeInfo { created_ms, modified_ms, key, fingerprint, labels, .. } = info;
    if (*created_ms, *modified_ms, *key, *fingerprint) != (0, 0, 0, 0) || !labels.is_empty() {
        out.extend(created_ms.to_le_bytes());
        out.extend(modified_ms.to_le_bytes());
        out.extend(key.to_le_bytes());
        out.extend(fingerprint.to_le_bytes());
        put_labels(&mut out, labels);
    }
    out
}

/// The volume in a record's body, or `None` if it is not one.
pub(crate) fn decode_volume(id: VolumeId, body: &[u8]) -> Option<VolumeInfo> {
    let mut rest = Input(body);
    let size = rest.u64()?;
    let (name_len, description_len) = (usize::from(rest.u16()?), usize::from(rest.u16()?));
    if name_len > VOLUME_NAME_BYTES_MAX || description_len > DESCRIPTION_BYTES_MAX {
        return None;
    }
    let (name, description) = (rest.take(name_len)?, rest.take(description_len)?);
    let text = |bytes| std::str::from_utf8(bytes).ok();
    let mut info = VolumeInfo::new(id, text(name)?, size, text(description)?);
    if !rest.0.is_empty() {
        (info.created_ms, info.modified_ms) = (rest.u64()?, rest.u64()?);
        (info.key, info.fingerprint) = (rest.u128()?, rest.u64()?);
        info.labels = shared_labels(take_labels(&mut rest)?);
    }
    rest.0.is_empty().then_some(info)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::golden;

    const GOLDEN: &str = include_str!("../../tests/golden/records.txt");

    #[test]
    fn golden_bytes() {
        let info = VolumeInfo::new(VolumeId(0x3_0000_0001), "vol-é", 1 << 30, "a disk");
        let key = info.id.0.to_le_bytes();
        let sealed = seal(&key, encode_volume(&info));
        assert_eq!(sealed, golden::bytes(GOLDEN, "volume"));
        assert_eq!(decode_volume(info.id, unseal(&key, &sealed).unwrap()), Some(info));

        let label = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        let info = VolumeInfo {
            labels: shared_labels([label("env", "prod"), label("app/tier", "é")].into()),
            created_ms: 0x0a0b,
            modified_ms: 0x0c0d,
            key: 0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10,
            fingerprint: 0x1122_3344_5566_7788,
            ..VolumeInfo::new(VolumeId(0x3_0000_0001), "vol-é", 1 << 30, "a disk")
        };
        let sealed = seal(&key, encode_volume(&info));
        assert_eq!(sealed, golden::bytes(GOLDEN, "labelled_volume"));
        assert_eq!(decode_volume(info.id, unseal(&key, &sealed).unwrap()), Some(info));

        let record = ShardRecord {
            applied: LogIndex(100),
            applied_term: Term(4),
            hard_state: HardState { term: Term(5), vote: 2, commit: LogIndex(101) },
            counter: -6,
            volumes_created: 9,
            replica: ReplicaId::new(7),
            log_floor: LogPosition(0x0011_2233_4455),
        };
        let key = 3_u32.to_le_bytes();
        let sealed = seal(&key, record.encode());
        assert_eq!(sealed, golden::bytes(GOLDEN, "shard"));
        assert_eq!(ShardRecord::decode(unseal(&key, &sealed).unwrap()), Some(record));
    }

    #[test]
    fn damage_is_noticed() {
        let sealed = seal(b"key", b"body".to_vec());
        assert_eq!(unseal(b"key", &sealed), Some(&b"body"[..]));
        assert_eq!(unseal(b"kex", &sealed), None);
        for at in 0..sealed.len() {
            let mut bad = sealed.clone();
            bad[at] ^= 1;
            assert_eq!(unseal(b"key", &bad), None);
            assert_eq!(unseal(b"key", &sealed[..at]), None);
        }
    }

    #[test]
    fn volumes_that_do_not_add_up_are_refused() {
        let info = VolumeInfo::new(VolumeId(1), "n", 4096, "d");
        let body = encode_volume(&info);
        for len in 0..body.len() {
            assert_eq!(decode_volume(info.id, &body[..len]), None);
        }
        let with_tail = encode_volume(&VolumeInfo { modified_ms: 5, ..info.clone() });
        for len in body.len() + 1..with_tail.len() {
            assert_eq!(decode_volume(info.id, &with_tail[..len]), None);
        }
        let longer = [&with_tail[..], &[0]].concat();
        assert_eq!(decode_volume(info.id, &longer), None);
    }
}
