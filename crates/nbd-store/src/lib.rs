//! Volumes on one node: what committed log entries make of them, and how they get home.
//!
//! Passive like the log below it: no threads, no clocks. It knows nothing of networks or of Raft's
//! rules; an entry is committed because the caller says so, by applying it.
//!
//! ```text
//!   committed entry ──▶ ShardWriter::apply ──▶ overlay: block -> place in the log
//!                                                 │        ▲
//!                            Checkpointer::run ◀──┘        │ newest layer first
//!                                 │                   ShardReader::resolve ──▶ ReadPlan ──▶ bytes
//!                                 ▼                        │
//!                    data file, metadata database  ◀───────┘
//! ```
//!
//! - [`node`]: [`NodeStore::open`], recovery included; [`identity`]: whose directory it is.
//! - [`command`]: what an entry's data says; [`outcome`]: what came of it.
//! - `overlay`: what changed since the last checkpoint.
//! - `shard`: the state machine, [`ShardWriter`], [`ShardReader`], [`ReadPlan`].
//! - `chunk`: chunks at home: the metadata database, slots.
//! - [`checkpoint`]: bringing changes home, and the rules that make it safe.
//! - [`labels`]: what volumes are told apart by.
//! - [`members`]: the replicas of a shard; [`transfer`]: what they send each other.
//! - [`space`]: whether there is room for a mutation.
//! - [`limits`]: every bound, by name.
//!
//! **Invariants.** A read never returns bytes that do not have their checksum. Nothing that the
//!  last
//! durable checkpoint refers to is overwritten, except by blocks whose new content is in the log.

pub mod checkpoint;
mod chunk;
pub mod command;
mod dirty;
mod fault;
#[cfg(test)]
mod golden;
pub mod identity;
pub mod ids;
pub mod labels;
pub mod limits;
pub mod members;
pub mod node;
pub mod outcome;
mod overlay;
pub mod recovery;
mod shard;
mod snapshot;
pub mod space;
pub mod transfer;

pub use checkpoint::{CheckpointError, CheckpointGauge, CheckpointReport, Checkpointer};
pub use chunk::database::MetadataError;
pub use chunk::meta::ChunkKey;
pub use command::{
    CommandError, CommandHeader, CommandKind, DecodedCommand, NewVolume, VolumeUpdate,
    WriteBuilder, decode_all, encode_add_counter, encode_close_session, encode_cordon_node,
    encode_create_volume, encode_delete_volume, encode_end_sessions, encode_new_volume,
    encode_open_session, encode_register_replica, encode_resize_volume, encode_set_replacement,
    encode_trim, encode_update_volume, encode_write, encode_write_zeroes, is_sound,
    write_command_prefix_len,
};
pub use fault::StoreFault;
pub use identity::{Identity, IdentityError};
pub use ids::{ChunkIndex, Epoch, Owner, SessionId, VolumeId};
pub use members::{Formation, ReplicaAddresses, ReplicaInfo, ReplicaRegistration};
pub use node::{NodeStore, OpenError, RecoveredShard, StoreOptions};
pub use outcome::{Labels, Outcome, Rejection, SessionInfo, VolumeInfo};
pub use recovery::{EntryPlace, MissingEntries, RaftRecovered, TailEntry};
pub use shard::list::{ListPosition, ListQuery, VolumeOrder};
pub use shard::plan::{Place, ReadError, ReadPlan, Segment};
pub use shard::reader::ShardReader;
pub use shard::status::{BlockStatus, Extent};
pub use shard::{Applied, ShardWriter};
pub use space::{Admission, AdmissionKind, SpaceGauge, SpaceGrant};
pub use transfer::{
    ChunkDigest, ChunkImage, ChunkRun, ChunkStamp, DamagedChunk, FormError, ManifestPage,
    RangeDigest, ReceiveError, ScrubPage, ShardSnapshot,
};
