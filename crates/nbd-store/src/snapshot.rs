//! The body of a [`ShardSnapshot`]: a shard's state, chunks left out, in bytes.
//!
//! Little-endian; what stands in it of members, volumes and sessions is as in the metadata
//! database, without the seals:
//!
//! ```text
//! 0            4          8            16           24           32                   36
//! +------------+----------+------------+------------+------------+--------------------+
//! | version u32| shard u32| applied u64| its term   | counter i64| volumes so far u32 | ...
//! +------------+----------+------------+------------+------------+--------------------+
//! 36: counts of u32: bytes of members, volumes, sessions
//! 48: members
//!     each volume:  | id u64  | bytes u32 | body |
//!     each session: | id u128 | bytes u32 | body |
//!     CRC32C of all before, u32
//! ```

use bytes::Bytes;
use nbd_log::checksum::crc32c;
use nbd_topology::{LogIndex, ShardId, Term};

use crate::chunk::database::Contents;
use crate::chunk::record::{ShardRecord, decode_volume, encode_volume};
use crate::ids::{SessionId, VolumeId};
use crate::limits::{SESSIONS_MAX, VOLUMES_MAX};
use crate::members::{Input, Members};
use crate::outcome::VolumeInfo;
use crate::shard::session::Session;
use crate::shard::state::{Metadata, is_volume_size};
use crate::transfer::ShardSnapshot;

const VERSION: u32 = 2;
/// The version before, whose volumes have neither labels nor times: these records are read as they
/// are.
const VERSION_BEFORE: u32 = 1;

/// The snapshot of what the database holds of one shard. `None` if that is not one shard's.
pub(crate) fn encode(contents: &Contents) -> Option<ShardSnapshot> {
    let [(shard, record)] = contents.shards[..] else { return None };
    let [(_, members)] = &contents.members[..] else { return None };
    let count = |count: usize| u32::try_from(count).expect("bounded when applied").to_le_bytes();
    let encoded_members = members.encode();
    let mut out = Vec::new();
    out.extend(VERSION.to_le_bytes());
    out.extend(shard.0.to_le_bytes());
    out.extend(record.applied.0.to_le_bytes());
    out.extend(record.applied_term.0.to_le_bytes());
    out.extend(record.counter.to_le_bytes());
    out.extend(record.volumes_created.to_le_bytes());
    out.extend(count(encoded_members.len()));
    out.extend(count(contents.volumes.len()));
    out.extend(count(contents.sessions.len()));
    out.extend(encoded_members);
    for info in &contents.volumes {
        let body = encode_volume(info);
        out.extend(info.id.0.to_le_bytes());
        out.extend(count(body.len()));
        out.extend(body);
    }
    for (_, id, session) in &contents.sessions {
        let body = session.encode();
        out.extend(id.0.to_le_bytes());
        out.extend(count(body.len()));
        out.extend(body);
    }
    let crc = crc32c(&out);
    out.extend(crc.to_le_bytes());
    Some(ShardSnapshot {
        applied: record.applied,
        applied_term: record.applied_term,
        membership: members.membership.clone(),
        body: Bytes::from(out),
    })
}

/// The state in a snapshot, or `None` if it is not one of `shard`. The bytes are a peer's.
pub(crate) fn decode(shard: ShardId, snapshot: &ShardSnapshot) -> Option<Metadata> {
    let (body, crc) = snapshot.body.split_last_chunk::<4>()?;
    if crc32c(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    let mut rest = Input(body);
    let is_known = [VERSION, VERSION_BEFORE].contains(&rest.u32()?);
    if !is_known || rest.u32()? != shard.0 {
        return None;
    }
    let record = ShardRecord {
        applied: LogIndex(rest.u64()?),
        applied_term: Term(rest.u64()?),
        counter: rest.u64()?.cast_signed(),
        volumes_created: rest.u32()?,
        ..ShardRecord::empty()
    };
    let counts = [rest.u32()?, rest.u32()?, rest.u32()?];
    let [member_bytes, volumes, sessions] = counts.map(|count| count as usize);
    if volumes > VOLUMES_MAX || sessions > SESSIONS_MAX {
        return None;
    }
    let members = Members::decode(rest.take(member_bytes)?)?;
    let mut contents = Contents {
        shards: vec![(shard, record)],
        members: vec![(shard, members)],
        ..Contents::default()
    };
    for _ in 0..volumes {
        let id = VolumeId(rest.u64()?);
        let len = rest.u32()? as usize;
        let info = decode_volume(id, rest.take(len)?)?;
        contents.volumes.push(is_possible(shard, &record, &info).then_some(info)?);
    }
    for _ in 0..sessions {
        let id = SessionId(rest.u128()?);
        let len = rest.u32()? as usize;
        contents.sessions.push((shard, id, Session::decode(rest.take(len)?)?));
    }
    let metadata = Metadata::sort(contents).ok()?.remove(&shard)?;
    let is_as_said = metadata.applied == snapshot.applied
        && metadata.applied_term == snapshot.applied_term
        && metadata.members.membership == snapshot.membership
        && metadata.sessions.len() == sessions;
    (rest.0.is_empty() && is_as_said).then_some(metadata)
}

/// Whether the shard could have created such a volume.
fn is_possible(shard: ShardId, record: &ShardRecord, info: &VolumeInfo) -> bool {
    let numbers = VolumeId::new(shard, 1)..=VolumeId::new(shard, record.volumes_created);
    numbers.contains(&info.id) && is_volume_size(info.size) && !info.name.is_empty()
}

#[cfg(test)]
mod tests;
