//! What a copy reads from and writes to.

use std::sync::Arc;

use anyhow::Result;
use bytes::Bytes;

use super::file::LocalFile;
use super::remote::Remote;

/// A source or a target: bytes of a known size, some of which are known to be zero.
#[derive(Debug, Clone)]
pub(super) enum Endpoint {
    File(Arc<LocalFile>),
    Remote(Arc<Remote>),
}

/// A stretch that reads as zeroes, or may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) len: u64,
    pub(super) zero: bool,
}

impl Endpoint {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.size(),
            Self::Remote(remote) => remote.size(),
        }
    }

    /// What is at `offset`: at least one stretch, none beyond `len` bytes; they may end before.
    pub(super) async fn stretches(&self, offset: u64, len: u64) -> Result<Vec<Stretch>> {
        match self {
            Self::File(file) => file.stretches(offset, len).await,
            Self::Remote(remote) => remote.stretches(offset, len).await,
        }
    }

    /// Fills `buffer`, all of it, from `offset` on.
    pub(super) async fn read(&self, offset: u64, buffer: Vec<u8>) -> Result<Vec<u8>> {
        match self {
            Self::File(file) => file.read(offset, buffer).await,
            Self::Remote(remote) => remote.read(offset, buffer).await,
        }
    }

    pub(super) async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        match self {
            Self::File(file) => file.write(offset, data).await,
            Self::Remote(remote) => remote.write(offset, data).await,
        }
    }

    /// Makes a range read as zeroes, without taking up room.
    pub(super) async fn zero(&self, offset: u64, len: u64) -> Result<()> {
        match self {
            Self::File(file) => file.zero(offset, len).await,
            Self::Remote(remote) => remote.zero(offset, len).await,
        }
    }

    /// Makes what was written durable.
    pub(super) async fn sync(&self) -> Result<()> {
        match self {
            Self::File(file) => file.sync().await,
            Self::Remote(remote) => remote.sync().await,
        }
    }
}
