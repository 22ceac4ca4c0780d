//! Commands about volumes as a whole, and about who serves them.
//!
//! Bodies, behind the header:
//!
//! ```text
//! CreateVolume: | name bytes u16 | description bytes u16 | name | description |
//! NewVolume:    the same, then | now in ms u64 | key u128 | fingerprint u64 | labels |
//! UpdateVolume: | flags u8 | description bytes u16 | description | labels | removed |
//!               flag 1: the description is set; removed: count u16, each: bytes u8, name
//! ```
//!
//! Labels are as in [`crate::labels`].

use bytes::Bytes;
use nbd_topology::{NodeName, ReplicaId};
use xxhash_rust::xxh3::Xxh3;

use super::{
    CommandError, CommandHeader, CommandKind, encode_header_only, encode_with_body, metadata_header,
};
use crate::ids::VolumeId;
use crate::labels::{
    check_labels, is_label_name, put_label_names, put_labels, take_label_names, take_labels,
};
use crate::limits::{DESCRIPTION_BYTES_MAX, LABELS_MAX, VOLUME_NAME_BYTES_MAX};
use crate::members::Input;
use crate::outcome::Labels;

/// Flag in the body of an `UpdateVolume`: the description is set.
const SETS_DESCRIPTION: u8 = 1;

/// A volume to be created.
#[derive(Debug, Clone, Copy)]
pub struct NewVolume<'a> {
    /// Its name: 1 to 4096 bytes.
    pub name: &'a str,
    /// Bytes it has. Judged when the command is applied.
    pub size: u64,
    /// Free text: up to 4096 bytes.
    pub description: &'a str,
    /// Its labels.
    pub labels: &'a Labels,
    /// XXH3-128 of what tells this call from another one, if it may be made again; not 0.
    pub key: Option<u128>,
    /// Milliseconds since 1970; 0 if they are not known.
    pub now_ms: u64,
}

/// What is to change of a volume, apart from its size.
#[derive(Debug, Clone, Copy, Default)]
pub struct VolumeUpdate<'a> {
    /// The new description, if it changes: up to 4096 bytes.
    pub description: Option<&'a str>,
    /// Labels to be set, whether there or not.
    pub set_labels: Option<&'a Labels>,
    /// Names of labels to be removed, whether there or not. Removed before others are set.
    pub remove_labels: &'a [String],
    /// Milliseconds since 1970.
    pub now_ms: u64,
}

/// What the body of a `CreateVolume` or `NewVolume` command says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreateVolumeBody<'a> {
    /// The volume's name: 1 to 4096 bytes.
    pub name: &'a str,
    /// Free text: up to 4096 bytes.
    pub description: &'a str,
    /// Its labels.
    pub labels: Labels,
    /// Milliseconds since 1970; 0 if they are not known.
    pub now_ms: u64,
    /// The call's key; 0: there is none.
    pub key: u128,
    /// What was asked for with that key; 0 if there is none.
    pub fingerprint: u64,
}

/// What the body of an `UpdateVolume` command says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateVolumeBody<'a> {
    /// The new description, if it changes.
    pub description: Option<&'a str>,
    /// Labels to be set.
    pub set_labels: Labels,
    /// Names of labels to be removed.
    pub remove_labels: Vec<String>,
}

impl NewVolume<'_> {
    /// What is asked for, in one number; never 0. Calls with the same key and another fingerprint
    /// are not the same call made again.
    #[must_use]
    pub fn fingerprint(&self) -> u64 {
        let mut labels = Vec::new();
        for (name, value) in self.labels {
            for text in [name, value] {
                labels.extend((text.len() as u64).to_le_bytes());
                labels.extend(text.as_bytes());
            }
        }
        let mut hash = Xxh3::new();
        for part in [self.name.as_bytes(), self.description.as_bytes(), &labels] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.update(&self.size.to_le_bytes());
        hash.digest().max(1)
    }
}

fn text(bytes: &[u8]) -> Result<&str, CommandError> {
    std::str::from_utf8(bytes).map_err(|_| CommandError::BadName)
}

impl<'a> CreateVolumeBody<'a> {
    /// Reads the body of a `CreateVolume` or `NewVolume` command.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &'a [u8]) -> Result<Self, CommandError> {
        let mut rest = Input(body);
        let mut length = || rest.u16().map(usize::from).ok_or(CommandError::Truncated);
        let (name_len, description_len) = (length()?, length()?);
        let name = rest.take(name_len).ok_or(CommandError::BadLength)?;
        let description = rest.take(description_len).ok_or(CommandError::BadLength)?;
        let name_fits = (1..=VOLUME_NAME_BYTES_MAX).contains(&name_len);
        if !name_fits || description_len > DESCRIPTION_BYTES_MAX {
            return Err(CommandError::BadName);
        }
        let (name, description) = (text(name)?, text(description)?);
        let mut this =
            Self { name, description, labels: Labels::new(), now_ms: 0, key: 0, fingerprint: 0 };
        if rest.0.is_empty() {
            return Ok(this);
        }
        let fixed = (rest.u64(), rest.u128(), rest.u64());
        let (Some(now_ms), Some(key), Some(fingerprint)) = fixed else {
            return Err(CommandError::BadLength);
        };
        (this.now_ms, this.key, this.fingerprint) = (now_ms, key, fingerprint);
        this.labels = take_labels(&mut rest).ok_or(CommandError::BadLabels)?;
        rest.0.is_empty().then_some(this).ok_or(CommandError::BadLength)
    }
}

impl<'a> UpdateVolumeBody<'a> {
    /// Reads the body of an `UpdateVolume` command.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &'a [u8]) -> Result<Self, CommandError> {
        let mut rest = Input(body);
        let flags = rest.u8().ok_or(CommandError::Truncated)?;
        if flags & !SETS_DESCRIPTION != 0 {
            return Err(CommandError::ReservedBits);
        }
        let len = usize::from(rest.u16().ok_or(CommandError::Truncated)?);
        let bytes = rest.take(len).ok_or(CommandError::BadLength)?;
        let is_set = flags & SETS_DESCRIPTION != 0;
        if len > DESCRIPTION_BYTES_MAX || (len > 0 && !is_set) {
            return Err(CommandError::BadName);
        }
        let description = is_set.then(|| text(bytes)).transpose()?;
        let set_labels = take_labels(&mut rest).ok_or(CommandError::BadLabels)?;
        let remove_labels = take_label_names(&mut rest).ok_or(CommandError::BadLabels)?;
        let this = Self { description, set_labels, remove_labels };
        rest.0.is_empty().then_some(this).ok_or(CommandError::BadLength)
    }
}

fn length_of(text: &str, bytes_max: usize) -> Result<[u8; 2], CommandError> {
    let length = u16::try_from(text.len()).ok().filter(|_| text.len() <= bytes_max);
    length.map(u16::to_le_bytes).ok_or(CommandError::BadName)
}

/// Name and description, with which the body of a `CreateVolume` begins.
fn create_body(name: &str, description: &str) -> Result<Vec<u8>, CommandError> {
    if name.is_empty() {
        return Err(CommandError::BadName);
    }
    let mut body = Vec::new();
    body.extend(length_of(name, VOLUME_NAME_BYTES_MAX)?);
    body.extend(length_of(description, DESCRIPTION_BYTES_MAX)?);
    body.extend(name.as_bytes());
    body.extend(description.as_bytes());
    Ok(body)
}

/// Creates the volume `name` of `size` bytes, without saying when.
///
/// # Errors
/// [`CommandError::BadName`] when the name is empty or either text is too long. The size is judged
/// when the command is applied.
pub fn encode_create_volume(
    name: &str,
    size: u64,
    description: &str,
) -> Result<Bytes, CommandError> {
    let body = create_body(name, description)?;
    Ok(encode_with_body(&metadata_header(CommandKind::CreateVolume, size), &body))
}

/// Creates a volume. Applied again with the same key it finds the same volume.
///
/// # Errors
/// [`CommandError::BadName`] or [`CommandError::BadLabels`]. The size is judged when the command is
/// applied.
pub fn encode_new_volume(new: &NewVolume<'_>) -> Result<Bytes, CommandError> {
    check_labels(new.labels)?;
    let mut body = create_body(new.name, new.description)?;
    body.extend(new.now_ms.to_le_bytes());
    body.extend(new.key.unwrap_or(0).to_le_bytes());
    let fingerprint = new.key.map_or(0, |_| new.fingerprint());
    body.extend(fingerprint.to_le_bytes());
    put_labels(&mut body, new.labels);
    Ok(encode_with_body(&metadata_header(CommandKind::NewVolume, new.size), &body))
}

/// Changes the description and labels of `volume`.
///
/// # Errors
/// [`CommandError::BadName`] or [`CommandError::BadLabels`].
pub fn encode_update_volume(
    volume: VolumeId,
    update: &VolumeUpdate<'_>,
) -> Result<Bytes, CommandError> {
    let removed = update.remove_labels;
    if removed.len() > LABELS_MAX || !removed.iter().all(|name| is_label_name(name)) {
        return Err(CommandError::BadLabels);
    }
    let none = Labels::new();
    let set = update.set_labels.unwrap_or(&none);
    check_labels(set)?;
    let description = update.description.unwrap_or_default();
    let mut body = vec![if update.description.is_some() { SETS_DESCRIPTION } else { 0 }];
    body.extend(length_of(description, DESCRIPTION_BYTES_MAX)?);
    body.extend(description.as_bytes());
    put_labels(&mut body, set);
    put_label_names(&mut body, removed);
    let header = CommandHeader {
        volume,
        offset: update.now_ms,
        ..metadata_header(CommandKind::UpdateVolume, 0)
    };
    Ok(encode_with_body(&header, &body))
}

/// Gives `volume` another size, which is judged when the command is applied. What lies behind a
/// smaller one is lost: only with `force`. With `from`, only if it has that size, or has the new
/// one already: so that a call which was held up on its way does not undo later ones.
///
/// A smaller size that is no multiple of 4096 may need room for one more chunk: hold a grant of
/// [`crate::ShardReader::admit`] for a write-zeroes of what is cut off.
#[must_use]
pub fn encode_resize_volume(
    volume: VolumeId,
    from: Option<u64>,
    size: u64,
    force: bool,
    now_ms: u64,
) -> Bytes {
    let header = metadata_header(CommandKind::ResizeVolume, size);
    let seq = from.unwrap_or(0);
    encode_header_only(&CommandHeader { volume, seq, force, offset: now_ms, ..header })
}

/// Deletes `volume`; with `force` also if it has sessions, which end.
#[must_use]
pub fn encode_delete_volume(volume: VolumeId, force: bool) -> Bytes {
    let header = metadata_header(CommandKind::DeleteVolume, 0);
    encode_header_only(&CommandHeader { volume, force, ..header })
}

/// Cordons a node, or lets it be as others again.
#[must_use]
pub fn encode_cordon_node(node: &NodeName, cordoned: bool) -> Bytes {
    let header = metadata_header(CommandKind::CordonNode, u64::from(cordoned));
    encode_with_body(&header, node.as_str().as_bytes())
}

/// Notes that `new` is to take the place of `old`, or that nobody is.
#[must_use]
pub fn encode_set_replacement(old: ReplicaId, new: Option<ReplicaId>) -> Bytes {
    let header = metadata_header(CommandKind::SetReplacement, new.map_or(0, ReplicaId::get));
    encode_header_only(&CommandHeader { offset: old.get(), ..header })
}
