//! What may be asked for. Every refusal names the field and what is allowed.

use std::collections::HashMap;

use nbd_front::limits::TRACED_MAX;
use nbd_proto::ExportName;
use nbd_store::labels::is_label_name;
use nbd_store::limits::{
    DESCRIPTION_BYTES_MAX, LABEL_NAME_BYTES_MAX, LABEL_VALUE_BYTES_MAX, LABELS_MAX,
    VOLUME_BYTES_MAX, VOLUME_BYTES_MIN, VOLUME_NAME_BYTES_MAX, VOLUME_SIZE_MULTIPLE,
};
use nbd_store::{Labels, SessionId, VolumeId};
use tonic::Status;

/// Longest key of a call that may be made again, in bytes.
const KEY_BYTES_MAX: usize = 255;

/// Most volumes or sessions in a page.
const LIMIT_MAX: u32 = 1000;

/// A value out of bounds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Invalid {
    #[error("{field} has {found} bytes: allowed are {least} to {most}")]
    Length { field: &'static str, found: usize, least: usize, most: usize },
    #[error("name has a NUL character: it could not be attached to")]
    NameWithNul,
    #[error(
        "size is {0}: allowed is a multiple of {VOLUME_SIZE_MULTIPLE} from {VOLUME_BYTES_MIN} to \
         {VOLUME_BYTES_MAX} bytes"
    )]
    Size(u64),
    #[error("{field} has {found} entries: allowed are at most {LABELS_MAX}")]
    Count { field: &'static str, found: usize },
    #[error("{field}: the name {name:?} may have letters, digits, '.', '_', '/' and '-' only")]
    LabelName { field: &'static str, name: String },
    #[error("limit is {0}: allowed is 1 to {LIMIT_MAX}")]
    Limit(u32),
    #[error("requests is {0}: allowed is 1 to {TRACED_MAX}")]
    Requests(u32),
    #[error("{field} is 0: no volume has this id")]
    NoVolume { field: &'static str },
    #[error("{field} has {found} bytes: a session's id has 16")]
    Session { field: &'static str, found: usize },
    #[error("order is {0}: allowed is 0 to 4")]
    Order(i32),
    #[error("the volume would have more than {LABELS_MAX} labels: remove some first")]
    TooManyLabels,
}

impl From<Invalid> for Status {
    fn from(invalid: Invalid) -> Self {
        Self::invalid_argument(invalid.to_string())
    }
}

fn length(field: &'static str, text: &str, least: usize, most: usize) -> Result<(), Invalid> {
    let found = text.len();
    if (least..=most).contains(&found) {
        return Ok(());
    }
    Err(Invalid::Length { field, found, least, most })
}

/// A volume's name.
pub(super) fn name(name: &str) -> Result<(), Invalid> {
    length("name", name, 1, VOLUME_NAME_BYTES_MAX)?;
    ExportName::from_bytes(name.as_bytes()).map(|_| ()).map_err(|_| Invalid::NameWithNul)
}

/// What names are to begin with.
pub(super) fn prefix(prefix: &str) -> Result<(), Invalid> {
    length("prefix", prefix, 0, VOLUME_NAME_BYTES_MAX)
}

/// A volume's description.
pub(super) fn description(text: &str) -> Result<(), Invalid> {
    length("description", text, 0, DESCRIPTION_BYTES_MAX)
}

/// A volume's size.
pub(super) const fn size(size: u64) -> Result<(), Invalid> {
    let fits = size >= VOLUME_BYTES_MIN
        && size <= VOLUME_BYTES_MAX
        && size.is_multiple_of(VOLUME_SIZE_MULTIPLE);
    if fits { Ok(()) } else { Err(Invalid::Size(size)) }
}

/// The key of a call that may be made again.
pub(super) fn key(key: &str) -> Result<(), Invalid> {
    length("key", key, 0, KEY_BYTES_MAX)
}

fn label_name(field: &'static str, name: &str) -> Result<(), Invalid> {
    length("the name of a label", name, 1, LABEL_NAME_BYTES_MAX)?;
    if is_label_name(name) {
        return Ok(());
    }
    Err(Invalid::LabelName { field, name: name.to_owned() })
}

const fn count(field: &'static str, found: usize) -> Result<(), Invalid> {
    if found > LABELS_MAX { Err(Invalid::Count { field, found }) } else { Ok(()) }
}

/// Labels of a volume, or to be looked for.
pub(super) fn labels(
    field: &'static str,
    labels: HashMap<String, String>,
) -> Result<Labels, Invalid> {
    count(field, labels.len())?;
    for (name, value) in &labels {
        label_name(field, name)?;
        length("the value of a label", value, 0, LABEL_VALUE_BYTES_MAX)?;
    }
    Ok(labels.into_iter().collect())
}

/// Names of labels.
pub(super) fn label_names(field: &'static str, names: &[String]) -> Result<(), Invalid> {
    count(field, names.len())?;
    names.iter().try_for_each(|name| label_name(field, name))
}

/// How many a page may have.
pub(super) fn limit(limit: u32) -> Result<usize, Invalid> {
    if !(1..=LIMIT_MAX).contains(&limit) {
        return Err(Invalid::Limit(limit));
    }
    usize::try_from(limit).map_err(|_| Invalid::Limit(limit))
}

/// How many requests are to be traced.
pub(super) const fn requests(requests: u32) -> Result<(), Invalid> {
    if requests == 0 || requests > TRACED_MAX {
        return Err(Invalid::Requests(requests));
    }
    Ok(())
}

/// A volume's id.
pub(super) const fn volume(id: u64) -> Result<VolumeId, Invalid> {
    match id {
        0 => Err(Invalid::NoVolume { field: "volume" }),
        id => Ok(VolumeId(id)),
    }
}

/// A session's id: 16 bytes, big-endian.
pub(super) fn session(field: &'static str, bytes: &[u8]) -> Result<SessionId, Invalid> {
    let id: Result<[u8; 16], _> = bytes.try_into();
    id.map(|id| SessionId(u128::from_be_bytes(id)))
        .map_err(|_| Invalid::Session { field, found: bytes.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &str, value: &str) -> HashMap<String, String> {
        [(name.to_owned(), value.to_owned())].into()
    }

    #[test]
    fn what_is_refused_is_named_with_what_is_allowed() {
        let long = |bytes| "x".repeat(bytes);
        let text = |refused: Result<(), Invalid>| refused.unwrap_err().to_string();
        assert_eq!(text(name("")), "name has 0 bytes: allowed are 1 to 4096");
        assert_eq!(text(name(&long(4097))), "name has 4097 bytes: allowed are 1 to 4096");
        assert!(text(name("a\0b")).contains("NUL"));
        assert!(text(description(&long(4097))).starts_with("description has 4097 bytes"));
        assert!(text(key(&long(256))).starts_with("key has 256 bytes"));
        for bytes in [0, 4095, 4097, (64 << 40) + 512, u64::MAX] {
            let text = text(size(bytes));
            assert!(text.starts_with(&format!("size is {bytes}")), "{text}");
            assert!(text.contains("512 from 4096 to 70368744177664"), "{text}");
        }
        let text = |refused: Result<Labels, Invalid>| refused.unwrap_err().to_string();
        assert!(text(labels("labels", one("", ""))).contains("allowed are 1 to 63"));
        assert!(text(labels("labels", one(&long(64), ""))).contains("64 bytes"));
        assert!(text(labels("labels", one("n", &long(256)))).contains("the value of a label"));
        let bad = text(labels("set_labels", one("a b", "")));
        assert!(bad.starts_with("set_labels: the name \"a b\""), "{bad}");
        let many = (0..65).map(|n| (n.to_string(), String::new())).collect();
        assert_eq!(text(labels("labels", many)), "labels has 65 entries: allowed are at most 64");
        assert!(label_names("remove_labels", &vec!["a".to_owned(); 65]).is_err());
        assert!(requests(0).is_err() && requests(1001).is_err() && requests(1000).is_ok());
        assert!(limit(0).is_err() && limit(1001).is_err());
        assert_eq!(volume(0), Err(Invalid::NoVolume { field: "volume" }));
        let short = session("session", &[1; 15]).unwrap_err().to_string();
        assert_eq!(short, "session has 15 bytes: a session's id has 16");
    }

    #[test]
    fn what_is_allowed_passes() {
        assert_eq!(name(&"x".repeat(4096)), Ok(()));
        assert_eq!(name("a/b c\u{e4}"), Ok(()));
        assert_eq!(size(64 << 40), Ok(()));
        assert_eq!(size(4096 + 512), Ok(()));
        assert_eq!(labels("labels", one("app/x_1.y-z", &"v".repeat(255))).unwrap().len(), 1);
        assert_eq!(limit(1000), Ok(1000));
        let id = session("session", &7_u128.to_be_bytes());
        assert_eq!(id, Ok(SessionId(7)));
    }
}
