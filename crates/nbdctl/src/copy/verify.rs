//! Reads a target back and compares.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use tokio::task::JoinSet;
use xxhash_rust::xxh3::xxh3_64;

use super::endpoint::Endpoint;
use super::engine::{PIECE, Piece, Planner, Shared, Sum, lock};
use super::journal::Sample;

/// What a stretch of the target must hold.
#[derive(Debug, Clone, Copy)]
enum Expected {
    Sum(u64),
    Zeroes,
    /// What the source does: an earlier run has carried it.
    Source,
}

/// Compares all of the target with what was carried to it, by the checksums of this run; what
/// earlier runs carried is read again from `source`.
pub(super) async fn run(shared: &Arc<Shared>, source: Option<&Endpoint>) -> Result<()> {
    let end = shared.target.size();
    shared.progress.begin(end, 0);
    let sums = shared.sums.as_ref().map(|sums| std::mem::take(&mut *lock(sums)));
    let sums = sums.unwrap_or_default();
    let mut tasks = JoinSet::new();
    let mut at = 0;
    while at < end {
        let (to, expected) = next(&sums, at, end);
        // Zeroes are cut as the target's own allocation says, the rest as it was carried.
        let (cutter, expected) = match (expected, source) {
            (Expected::Source, Some(source)) => (source.clone(), expected),
            (Expected::Source, None) => bail!("the source cannot be read again to verify"),
            _ => (shared.target.clone(), expected),
        };
        let mut planner = Planner::new(cutter, at, to);
        while at < to {
            let piece = match expected {
                Expected::Sum(_) => Piece { offset: at, len: to - at, zero: false },
                _ => planner.next().await?.context("the planner stops short")?,
            };
            at += piece.len;
            let expected = match expected {
                Expected::Source if piece.zero => Expected::Zeroes,
                other => other,
            };
            while let Some(ended) = tasks.try_join_next() {
                ended.context("verify")??;
            }
            let cost = if piece.zero { 64 << 10 } else { u32::try_from(2 * piece.len)? };
            let permit = shared.room(cost).await;
            let (shared, source) = (Arc::clone(shared), source.cloned());
            tasks.spawn(async move {
                check(&shared, source.as_ref(), piece, expected).await?;
                shared.progress.advance(piece.len);
                drop(permit);
                anyhow::Ok(())
            });
        }
    }
    while let Some(ended) = tasks.join_next().await {
        ended.context("verify")??;
    }
    Ok(())
}

/// Up to where the same is expected from `at` on, and what that is.
fn next(sums: &BTreeMap<u64, Sum>, at: u64, end: u64) -> (u64, Expected) {
    match sums.range(at..).next() {
        Some((offset, sum)) if *offset == at => {
            let expected = sum.sum.map_or(Expected::Zeroes, Expected::Sum);
            ((at + sum.len).min(end), expected)
        }
        Some((offset, _)) => ((*offset).min(end), Expected::Source),
        None => (end, Expected::Source),
    }
}

async fn check(
    shared: &Shared,
    source: Option<&Endpoint>,
    piece: Piece,
    expected: Expected,
) -> Result<()> {
    let Piece { offset, len, zero } = piece;
    match expected {
        Expected::Zeroes => {
            // Told by the target; or the source has zeroes here, and the target may not.
            let mut at = offset;
            while at < offset + len {
                for stretch in shared.target.stretches(at, offset + len - at).await? {
                    if !stretch.zero {
                        check_zeroes(shared, at, stretch.len).await?;
                    }
                    at += stretch.len;
                }
            }
            Ok(())
        }
        _ if zero => bail!("zeroes where data was carried, at {offset}"),
        Expected::Sum(sum) => {
            let data = shared.target.read(offset, shared.buffer(len)).await?;
            let found = xxh3_64(&data);
            shared.give_back(data);
            if found != sum { differs(offset, len) } else { Ok(()) }
        }
        Expected::Source => {
            let source = source.context("the source cannot be read again")?;
            let ours = source.read(offset, shared.buffer(len)).await?;
            let theirs = shared.target.read(offset, shared.buffer(len)).await?;
            let equal = ours == theirs;
            shared.give_back(ours);
            shared.give_back(theirs);
            if equal { Ok(()) } else { differs(offset, len) }
        }
    }
}

async fn check_zeroes(shared: &Shared, offset: u64, len: u64) -> Result<()> {
    let mut at = offset;
    while at < offset + len {
        let part = (offset + len - at).min(PIECE);
        let data = shared.target.read(at, shared.buffer(part)).await?;
        let zero = data.iter().all(|byte| *byte == 0);
        shared.give_back(data);
        if !zero {
            return differs(at, part);
        }
        at += part;
    }
    Ok(())
}

/// Whether all before `end` that the source knows to be zero is zero in `target`, too. What the
/// target tells to be allocated there is read.
pub(super) async fn keeps_holes(source: &Endpoint, target: &Endpoint, end: u64) -> Result<bool> {
    let mut planner = Planner::new(source.clone(), 0, end);
    let mut buffer = Vec::new();
    while let Some(hole) = planner.next().await? {
        let hole_end = hole.offset + hole.len;
        let mut at = hole.offset;
        while hole.zero && at < hole_end {
            for stretch in target.stretches(at, hole_end - at).await? {
                let stretch_end = at + stretch.len;
                while !stretch.zero && at < stretch_end {
                    buffer.resize(usize::try_from((stretch_end - at).min(PIECE))?, 0);
                    buffer = target.read(at, buffer).await?;
                    if buffer.iter().any(|byte| *byte != 0) {
                        return Ok(false);
                    }
                    at += buffer.len() as u64;
                }
                at = stretch_end;
            }
        }
    }
    Ok(true)
}

fn differs(offset: u64, len: u64) -> Result<()> {
    bail!("verification failed: the {len} bytes at {offset} are not what was copied there")
}

/// Whether an endpoint still holds what a journal remembers of it.
pub(super) async fn holds(endpoint: &Endpoint, samples: &[Sample]) -> Result<bool> {
    for Sample { offset, len, sum } in samples {
        let size = usize::try_from(*len).ok().filter(|len| *len as u64 <= PIECE);
        let end = offset.checked_add(*len).is_some_and(|end| end <= endpoint.size());
        let (Some(size), true) = (size, end) else { return Ok(false) };
        if xxh3_64(&endpoint.read(*offset, vec![0; size]).await?) != *sum {
            return Ok(false);
        }
    }
    Ok(true)
}
