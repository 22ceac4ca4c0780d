//! Labels of volumes: what may be one, and how they are stored.
//!
//! A name has 1 to 63 bytes of `[A-Za-z0-9._/-]`, a value up to 255 bytes of UTF-8, a volume up to
//! 64 labels. In commands and records, in the order of their names, each once:
//!
//! ```text
//! | count u16 | each: name bytes u8 | value bytes u8 | name | value |
//! ```

use crate::command::CommandError;
use crate::limits::{LABEL_NAME_BYTES_MAX, LABEL_VALUE_BYTES_MAX, LABELS_MAX};
use crate::members::Input;
use crate::outcome::Labels;

/// Whether a label may have this name.
#[must_use]
pub fn is_label_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte);
    (1..=LABEL_NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_allowed)
}

/// Refuses labels that a volume cannot have.
///
/// # Errors
/// [`CommandError::BadLabels`].
pub fn check_labels(labels: &Labels) -> Result<(), CommandError> {
    let is_good = |(name, value): (&String, &String)| {
        is_label_name(name) && value.len() <= LABEL_VALUE_BYTES_MAX
    };
    let all_good = labels.len() <= LABELS_MAX && labels.iter().all(is_good);
    all_good.then_some(()).ok_or(CommandError::BadLabels)
}

fn length(text: &str) -> u8 {
    u8::try_from(text.len()).expect("labels are bounded")
}

/// Appends labels that were checked.
pub(crate) fn put_labels(out: &mut Vec<u8>, labels: &Labels) {
    out.extend(u16::try_from(labels.len()).expect("labels are bounded").to_le_bytes());
    for (name, value) in labels {
        out.extend([length(name), length(value)]);
        out.extend(name.as_bytes());
        out.extend(value.as_bytes());
    }
}

/// Takes labels off the front, or nothing if they are not as [`put_labels`] writes them.
pub(crate) fn take_labels(rest: &mut Input<'_>) -> Option<Labels> {
    let count = usize::from(rest.u16()?);
    let mut labels = Labels::new();
    for _ in 0..count {
        let lengths = [rest.u8()?, rest.u8()?];
        let [name, value] = lengths
            .map(usize::from)
            .map(|len| std::str::from_utf8(rest.take(len)?).ok().map(str::to_owned));
        let (name, value) = (name?, value?);
        if labels.last_key_value().is_some_and(|(last, _)| *last >= name) {
            return None;
        }
        labels.insert(name, value);
    }
    check_labels(&labels).is_ok().then_some(labels)
}

/// Appends names of labels that were checked.
pub(crate) fn put_label_names(out: &mut Vec<u8>, names: &[String]) {
    out.extend(u16::try_from(names.len()).expect("labels are bounded").to_le_bytes());
    for name in names {
        out.push(length(name));
        out.extend(name.as_bytes());
    }
}

/// Takes names of labels off the front.
pub(crate) fn take_label_names(rest: &mut Input<'_>) -> Option<Vec<String>> {
    let count = usize::from(rest.u16()?);
    let names: Option<Vec<String>> = (0..count)
        .map(|_| {
            let len = usize::from(rest.u8()?);
            let name = std::str::from_utf8(rest.take(len)?).ok()?;
            is_label_name(name).then(|| name.to_owned())
        })
        .collect();
    names.filter(|names| names.len() <= LABELS_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn names_and_values_are_bounded() {
        for name in ["a", "app.kubernetes.io/name", "A-1_"] {
            assert!(is_label_name(name), "{name}");
        }
        for name in ["", "a b", "é", &"n".repeat(64)] {
            assert!(!is_label_name(name), "{name}");
        }
        assert!(check_labels(&labels(&[("n", &"v".repeat(255))])).is_ok());
        assert!(check_labels(&labels(&[("n", &"v".repeat(256))])).is_err());
        let many = |count: usize| (0..count).map(|n| (n.to_string(), String::new())).collect();
        assert!(check_labels(&many(64)).is_ok());
        assert!(check_labels(&many(65)).is_err());
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let some = labels(&[("env", "prod"), ("tier", ""), ("a/b", "é")]);
        let mut bytes = Vec::new();
        put_labels(&mut bytes, &some);
        assert_eq!(take_labels(&mut Input(&bytes)), Some(some));
        for len in 0..bytes.len() {
            assert_eq!(take_labels(&mut Input(&bytes[..len])), None);
        }
        // Twice the same name, and names out of order.
        for names in [*b"aa", *b"ba"] {
            let [first, second] = names;
            let bytes = [2, 0, 1, 0, first, 1, 0, second];
            assert_eq!(take_labels(&mut Input(&bytes)), None);
        }
    }
}
