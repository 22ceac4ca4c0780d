//! What can be wrong with a cluster description, and where.

use std::fmt;
use std::path::PathBuf;

use nbd_topology::{InvalidName, ShardId, ShardMapError};

use super::address::InvalidAddress;
use super::{VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};
use crate::units::UnitError;

/// Why a cluster description is refused. The text names the source, the field and value, and what
/// is allowed.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read cluster file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Not TOML (or JSON, for `NBD_SHARDS`) of the expected shape: syntax, an unknown or missing
    /// field, a wrong type.
    #[error("{origin}: {place}: {message}")]
    Shape {
        /// Where the description came from.
        origin: Origin,
        /// Line number and text, or the variable.
        place: String,
        /// The parser's words.
        message: String,
    },
    /// A field whose value breaks a rule.
    #[error("{origin}: {field} = {value}: {problem}")]
    Field {
        /// Where the description came from.
        origin: Origin,
        /// Path of the field, as in `nodes[0].nbd`, or the variable.
        field: String,
        /// The value as given.
        value: String,
        /// The rule.
        problem: Problem,
    },
}

/// The rule that a value breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Not a cluster or node name.
    #[error(transparent)]
    Name(InvalidName),
    /// Not `host:port`.
    #[error("{0}")]
    Address(InvalidAddress),
    /// A port that says "any" where others must find it.
    #[error("port 0 cannot be reached by others; use 1 to 65535")]
    PortZero,
    /// The value stands at another place (named), and may stand only once.
    #[error("the same value as {0}; each must be different")]
    Repeats(String),
    /// A list of shards that no cluster can have.
    #[error(transparent)]
    Shards(ShardMapError),
    /// A replica on a node that is not described.
    #[error("no such node; the nodes are {0}")]
    UnknownNode(String),
    /// Not a size.
    #[error(transparent)]
    Size(UnitError),
    /// A size that no volume may have.
    #[error("use a multiple of 512 bytes, from {VOLUME_BYTES_MIN} to {VOLUME_BYTES_MAX}")]
    VolumeSize,
    /// Not a truth value.
    #[error("use true or false")]
    NotBool,
    /// A variable that is not UTF-8.
    #[error("it is not UTF-8")]
    NotUtf8,
}

/// Where a cluster description came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// A `cluster.toml`.
    File(PathBuf),
    /// Environment variables.
    Environment,
    /// The program itself.
    Program,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Environment => f.pad("environment"),
            Self::Program => f.pad("cluster"),
        }
    }
}

impl Origin {
    pub(super) fn field(
        &self,
        field: impl Into<String>,
        value: impl fmt::Display,
        problem: Problem,
    ) -> ConfigError {
        let (origin, value) = (self.clone(), value.to_string());
        ConfigError::Field { origin, field: field.into(), value, problem }
    }

    pub(super) fn shard_map_error(&self, error: ShardMapError) -> ConfigError {
        let (field, value) = match &error {
            ShardMapError::Shards { shards } => (self.shards_field().to_owned(), *shards),
            ShardMapError::Replicas { shard, replicas } => (self.replicas_field(*shard), *replicas),
            ShardMapError::Repeated { shard, node } => {
                let field = self.replicas_field(*shard);
                return self.field(field, node.clone(), Problem::Shards(error));
            }
        };
        self.field(field, format_args!("{value} entries"), Problem::Shards(error))
    }

    /// How the operator knows the list of shards.
    const fn shards_field(&self) -> &'static str {
        match self {
            Self::Environment => "NBD_SHARDS",
            Self::File(_) | Self::Program => "shards",
        }
    }

    /// How the operator knows the replicas of one shard.
    pub(super) fn replicas_field(&self, shard: ShardId) -> String {
        match self {
            Self::Environment => format!("NBD_SHARDS[{shard}]"),
            Self::File(_) | Self::Program => format!("shards[{shard}].replicas"),
        }
    }

    /// How the operator knows the size of a volume created by attaching to it.
    pub(super) const fn default_size_field(&self) -> &'static str {
        match self {
            Self::Environment => "NBD_DEFAULT_SIZE",
            Self::File(_) | Self::Program => "volumes.default_size",
        }
    }
}
