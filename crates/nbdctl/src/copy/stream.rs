//! Raw images through standard input and output: in order, and once.

use std::collections::VecDeque;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::task::{JoinHandle, JoinSet};

use super::endpoint::Endpoint;
use super::engine::{PIECE, Piece, Planner, Shared};

/// Pieces read ahead of what is written out.
const AHEAD: usize = 16;

/// Bytes written out at once when they are zeroes.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Writes all that comes to the target; what is behind it becomes zeroes. How many bytes came.
pub(super) async fn import(
    shared: &Arc<Shared>,
    mut input: impl AsyncRead + Unpin,
    name: &str,
) -> Result<u64> {
    let size = shared.target.size();
    shared.progress.begin(0, 0);
    let mut tasks = JoinSet::new();
    let mut at = 0;
    loop {
        let permit = shared.room(u32::try_from(PIECE)?).await;
        let mut data = shared.buffer(PIECE);
        let mut have = 0;
        while have < data.len() {
            match input.read(&mut data[have..]).await.context("read standard input")? {
                0 => break,
                count => have += count,
            }
        }
        data.truncate(have);
        if have == 0 {
            break;
        }
        let offset = at;
        at += have as u64;
        if at > size {
            bail!("standard input has more than the {size} bytes of {name}");
        }
        while let Some(ended) = tasks.try_join_next() {
            ended.context("copy")??;
        }
        let shared = Arc::clone(shared);
        tasks.spawn(async move {
            shared.write(offset, data).await?;
            shared.progress.advance(have as u64);
            drop(permit);
            anyhow::Ok(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.context("copy")??;
    }
    if at < size {
        shared.write_zeroes(at, size - at).await?;
    }
    shared.target.sync().await?;
    Ok(at)
}

/// Writes all of `source` out, in order.
pub(super) async fn export(
    shared: &Arc<Shared>,
    source: &Endpoint,
    mut output: impl AsyncWrite + Unpin,
) -> Result<()> {
    let size = source.size();
    shared.progress.begin(size, 0);
    let mut planner = Planner::new(source.clone(), 0, size);
    let mut ahead: VecDeque<(Piece, Reading)> = VecDeque::new();
    let mut more = true;
    loop {
        while more && ahead.len() < AHEAD {
            let Some(piece) = planner.next().await? else {
                more = false;
                break;
            };
            let reading = (!piece.zero).then(|| {
                let (source, buffer) = (source.clone(), shared.buffer(piece.len));
                tokio::spawn(async move { source.read(piece.offset, buffer).await })
            });
            ahead.push_back((piece, Reading(reading)));
        }
        let Some((piece, mut reading)) = ahead.pop_front() else { break };
        match reading.0.take() {
            Some(reading) => {
                let data = reading.await.context("copy")??;
                output.write_all(&data).await.context("write to standard output")?;
                shared.progress.carry(piece.len);
                shared.give_back(data);
            }
            None => {
                let mut left = piece.len;
                while left > 0 {
                    let part = usize::try_from(left).unwrap_or(usize::MAX).min(ZEROES.len());
                    let written = output.write_all(&ZEROES[..part]).await;
                    written.context("write to standard output")?;
                    left -= part as u64;
                }
            }
        }
        shared.progress.advance(piece.len);
    }
    output.flush().await.context("write to standard output")
}

/// A read that is under way; it ends when nobody waits for it any more.
struct Reading(Option<JoinHandle<Result<Vec<u8>>>>);

impl Drop for Reading {
    fn drop(&mut self) {
        if let Some(reading) = &self.0 {
            reading.abort();
        }
    }
}
