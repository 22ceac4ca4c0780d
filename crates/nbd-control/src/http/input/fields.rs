//! The fields of a JSON object, taken one by one, so that all that is wrong can be said at once.

use std::collections::BTreeMap;

use nbd_api::{FieldProblem, Labels, ProblemType};
use nbd_store::labels::is_label_name;
use nbd_store::limits::{
    DESCRIPTION_BYTES_MAX, LABEL_NAME_BYTES_MAX, LABEL_VALUE_BYTES_MAX, LABELS_MAX,
    VOLUME_NAME_BYTES_MAX,
};
use serde_json::{Map, Value};

use crate::config::is_volume_size;
use crate::http::problem::Failure;

/// Largest number of which a float holds each whole one.
const FLOAT_EXACT: f64 = 9_007_199_254_740_992.0;

/// The fields of an object that are not taken yet, and what was wrong with those that are.
#[derive(Debug)]
pub(crate) struct Fields {
    left: Map<String, Value>,
    errors: Vec<FieldProblem>,
}

impl Fields {
    pub(crate) const fn new(left: Map<String, Value>) -> Self {
        Self { left, errors: Vec::new() }
    }

    /// Something is wrong with what stands at `field`.
    pub(crate) fn wrong(&mut self, field: &str, detail: impl Into<String>) {
        self.errors.push(FieldProblem { field: field.to_owned(), detail: detail.into() });
    }

    /// # Errors
    /// All that was wrong; fields that were not taken.
    pub(crate) fn finish(mut self) -> Result<(), Failure> {
        if !self.left.is_empty() {
            let names: Vec<String> = self.left.keys().map(|name| pointer(&[name])).collect();
            for name in &names {
                self.wrong(name, "there is no such field");
            }
            let detail = format!("fields that there are not: {}", names.join(", "));
            return Err(Failure::of_fields(ProblemType::Malformed, detail, self.errors));
        }
        if self.errors.is_empty() {
            return Ok(());
        }
        let each = self.errors.iter().map(|error| format!("{}: {}", error.field, error.detail));
        let detail = each.collect::<Vec<_>>().join("; ");
        Err(Failure::of_fields(ProblemType::Invalid, detail, self.errors))
    }

    /// A field that must be there.
    pub(crate) fn required<T: Default>(&mut self, name: &str, value: Option<T>) -> T {
        let field = pointer(&[name]);
        if value.is_none() && self.errors.iter().all(|error| error.field != field) {
            self.wrong(&field, "it is missing");
        }
        value.unwrap_or_default()
    }

    /// Text of `bytes` bytes; absent, too, if it is null.
    pub(crate) fn text(
        &mut self,
        name: &str,
        bytes: std::ops::RangeInclusive<usize>,
    ) -> Option<String> {
        let field = pointer(&[name]);
        match self.left.remove(name)? {
            Value::Null => return None,
            Value::String(text) if bytes.contains(&text.len()) => return Some(text),
            Value::String(text) => {
                let (from, to) = (bytes.start(), bytes.end());
                self.wrong(
                    &field,
                    format!("it has {} bytes: allowed is {from} to {to}", text.len()),
                );
            }
            _ => self.wrong(&field, "it is text"),
        }
        None
    }

    /// A description, if it is given. `null` takes it away.
    pub(crate) fn description(&mut self) -> Option<String> {
        let null = self.left.get("description").is_some_and(Value::is_null);
        let text = self.text("description", 0..=DESCRIPTION_BYTES_MAX);
        if null { Some(String::new()) } else { text }
    }

    /// The name of a volume.
    pub(crate) fn volume_name(&mut self) -> String {
        let name = self.text("name", 1..=VOLUME_NAME_BYTES_MAX);
        if name.as_ref().is_some_and(|name| name.contains('\0')) {
            self.wrong("/name", "it has a NUL character: it could not be attached to");
        }
        self.required("name", name)
    }

    /// The size of a volume, if it is given.
    pub(crate) fn size(&mut self) -> Option<u64> {
        let number = match self.left.remove("size")? {
            Value::Null => return None,
            Value::Number(number) => number,
            _ => {
                self.wrong("/size", "it is a number of bytes");
                return None;
            }
        };
        let size = number.as_u64().or_else(|| number.as_f64().and_then(whole));
        let size = size.filter(|size| is_volume_size(*size));
        if size.is_none() {
            let allowed = "a multiple of 512 from 4096 (4 KiB) to 70368744177664 (64 TiB)";
            self.wrong("/size", format!("it is {number}: allowed is {allowed}"));
        }
        size
    }

    /// A number within bounds, if it is given.
    pub(crate) fn count(
        &mut self,
        name: &str,
        allowed: std::ops::RangeInclusive<u32>,
    ) -> Option<u32> {
        let value = self.left.remove(name)?;
        let number = value.as_u64().or_else(|| value.as_f64().and_then(whole));
        let count = number.and_then(|number| u32::try_from(number).ok());
        let count = count.filter(|count| allowed.contains(count));
        if count.is_none() {
            let (from, to) = (allowed.start(), allowed.end());
            let detail = format!("it is {value}: allowed is a number from {from} to {to}");
            self.wrong(&pointer(&[name]), detail);
        }
        count
    }

    /// A truth; false if it is not given.
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        match self.left.remove(name) {
            None => false,
            Some(Value::Bool(flag)) => flag,
            Some(_) => {
                self.wrong(&pointer(&[name]), "it is true or false");
                false
            }
        }
    }

    /// Labels.
    pub(crate) fn labels(&mut self) -> Labels {
        let mut labels = Labels::new();
        for (name, value) in self.label_changes() {
            match value {
                Some(value) => _ = labels.insert(name, value),
                None => self.wrong(&pointer(&["labels", &name]), "it is text"),
            }
        }
        labels
    }

    /// Labels to set, and those to take away.
    pub(crate) fn label_changes(&mut self) -> BTreeMap<String, Option<String>> {
        let mut changes = BTreeMap::new();
        let labels = match self.left.remove("labels") {
            None => return changes,
            Some(Value::Object(labels)) => labels,
            Some(_) => {
                self.wrong("/labels", "it is an object");
                return changes;
            }
        };
        if labels.len() > LABELS_MAX {
            let detail = format!("there are {}: allowed are {LABELS_MAX}", labels.len());
            self.wrong("/labels", detail);
            return changes;
        }
        for (name, value) in labels {
            let field = pointer(&["labels", &name]);
            if !is_label_name(&name) {
                let detail = format!(
                    "a label's name has 1 to {LABEL_NAME_BYTES_MAX} characters of A-Z a-z 0-9 \
                     . _ / -"
                );
                self.wrong(&field, detail);
            }
            match value {
                Value::Null => _ = changes.insert(name, None),
                Value::String(value) if value.len() <= LABEL_VALUE_BYTES_MAX => {
                    changes.insert(name, Some(value));
                }
                Value::String(value) => {
                    let bytes = value.len();
                    let detail =
                        format!("it has {bytes} bytes: allowed are {LABEL_VALUE_BYTES_MAX}");
                    self.wrong(&field, detail);
                }
                _ => self.wrong(&field, "it is text"),
            }
        }
        changes
    }
}

/// A JSON pointer (RFC 6901).
fn pointer(names: &[&str]) -> String {
    names.iter().map(|name| format!("/{}", name.replace('~', "~0").replace('/', "~1"))).collect()
}

/// The whole number that a float such as 4096.0 is.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is whole and fits")]
fn whole(float: f64) -> Option<u64> {
    (float.fract() == 0.0 && (0.0..=FLOAT_EXACT).contains(&float)).then_some(float as u64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn fields(value: Value) -> Fields {
        match value {
            Value::Object(map) => Fields::new(map),
            other => panic!("{other} is no object"),
        }
    }

    fn errors(fields: Fields) -> Vec<String> {
        let failure = fields.finish().unwrap_err();
        failure.problem().errors.iter().map(|error| error.field.clone()).collect()
    }

    #[test]
    fn everything_that_is_wrong_is_named_at_once() {
        let labels = json!({"a b": "x", "ok": "y", "c/d": "z".repeat(256), "e": 1});
        let mut fields = fields(json!({"size": 4097, "labels": labels, "force": "yes"}));
        assert_eq!(fields.volume_name(), "");
        assert_eq!(fields.size(), None);
        assert!(!fields.flag("force"));
        fields.labels();
        let wrong = ["/name", "/size", "/force", "/labels/a b", "/labels/c~1d", "/labels/e"];
        assert_eq!(errors(fields), wrong);
    }

    #[test]
    fn unknown_fields_are_refused() {
        let mut fields = fields(json!({"name": "x", "sise": 1}));
        assert_eq!(fields.volume_name(), "x");
        let failure = fields.finish().unwrap_err();
        assert_eq!(failure.problem().kind, ProblemType::Malformed);
        assert_eq!(failure.problem().errors[0].field, "/sise");
    }

    #[test]
    fn sizes_are_whole_numbers_in_any_spelling() {
        let size = |value: Value| fields(json!({"size": value})).size();
        assert_eq!(size(json!(4096)), Some(4096));
        assert_eq!(size(json!(4096.0)), Some(4096));
        assert_eq!(size(json!(70_368_744_177_664_u64)), Some(64 << 40));
        for bad in [
            json!(0),
            json!(-4096),
            json!(4096.5),
            json!(4097),
            json!("4096"),
            json!(70_368_744_178_176_u64),
            json!(1e300),
            json!(true),
        ] {
            assert_eq!(size(bad.clone()), None, "{bad}");
        }
    }

    #[test]
    fn null_takes_a_description_or_a_label_away() {
        let mut fields = fields(json!({"description": null, "labels": {"a": null}}));
        assert_eq!(fields.description().as_deref(), Some(""));
        assert_eq!(fields.label_changes(), BTreeMap::from([("a".to_owned(), None)]));
        assert_eq!(fields.description(), None);
        assert!(fields.finish().is_ok());
    }
}
