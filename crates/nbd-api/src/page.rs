//! Lists in pages.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A part of a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Page<T> {
    /// The part, in order.
    pub items: Vec<T>,
    /// What to give as `cursor` for the next page. Absent at the end.
    pub next: Option<String>,
    /// Shards that do not answer, and whose share of the list is left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing_shards: Vec<u32>,
}
