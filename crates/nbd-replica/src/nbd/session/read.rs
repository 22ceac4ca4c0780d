//! Reads and block status: from memory and the page cache at once, else on the blocking pool.

use std::ops::Range;

use bytes::Bytes;
use nbd_proto::limits::BLOCK_STATUS_EXTENTS_MAX;
use nbd_proto::{CommandKind, Extent, NbdError, ReplyTo};
use nbd_store::{ReadError, ReadPlan, Segment, ShardReader, VolumeId};
use tokio::sync::mpsc;
use tracing::{error, warn};

use super::super::in_flight::Pending;
use super::super::{Completion, ReadData};
use super::{Session, status_bytes};
use crate::budget::BytePermit;
use crate::limits::INLINE_READ_BYTES_MAX;

/// Data up to this length is copied behind other replies rather than queued as a buffer of its own.
const COPIED_REPLY_BYTES_MAX: usize = 64 << 10;

impl Session {
    pub(super) fn begin_read(
        &mut self,
        to: ReplyTo,
        offset: u64,
        len: u64,
        dont_fragment: bool,
        permit: BytePermit,
    ) {
        let mut pending = Pending::new(to, CommandKind::Read, len);
        let reader = self.opened.group.reader();
        let mut plan = match reader.resolve(self.opened.volume.id, offset, len) {
            Ok(plan) => plan,
            Err(error) => {
                warn!(%error, "cannot read");
                return self.fail(to, NbdError::Io);
            }
        };
        let holes = self.encoder.can_send_holes() && !dont_fragment;
        if len <= INLINE_READ_BYTES_MAX && self.read_inline(to, &mut plan, holes) {
            self.output.hold(permit);
            return self.node.metrics.request(CommandKind::Read, len, pending.since.elapsed());
        }
        pending.permit = Some(permit);
        pending.reply_bytes = plan.len();
        self.reading_bytes += plan.len();
        let token = self.in_flight.insert(pending);
        let failed = Completion::Read { token, result: Err(NbdError::Io) };
        let answer = Answer::new(self.completions_tx.clone(), failed);
        let reader = self.opened.group.reader().clone();
        let volume = self.opened.volume.id;
        let corrupt = self.node.metrics.corrupt.clone();
        tokio::task::spawn_blocking(move || {
            let result = read_blocking(&reader, plan, volume, offset, len, holes);
            if let Err(error) = &result {
                error!(%error, offset, len, "read failed");
                if matches!(error, ReadError::Corrupt { .. }) {
                    corrupt.increment(1);
                }
            }
            let result = result.map_err(|_| NbdError::Io);
            answer.send(Completion::Read { token, result });
        });
    }

    /// Answers a read if all of it can be had without waiting for the disk.
    fn read_inline(&mut self, to: ReplyTo, plan: &mut ReadPlan, holes: bool) -> bool {
        self.scratch.resize(plan.len(), 0);
        let mut bytes = std::mem::take(&mut self.scratch);
        // A block that does not match its checksum is read again, by the book, on the blocking
        // pool.
        let done = matches!(plan.try_read_cached(&mut bytes), Ok(true));
        if done {
            self.send_runs(to, &runs(plan, holes), |output, run| {
                output.buffer().extend_from_slice(&bytes[run]);
            });
        }
        self.scratch = bytes;
        done
    }

    /// Answers a read that went to the blocking pool.
    pub(super) fn send_read(&mut self, to: ReplyTo, data: ReadData) {
        let bytes = Bytes::from(data.bytes);
        self.send_runs(to, &data.runs, |output, run| {
            if run.len() <= COPIED_REPLY_BYTES_MAX {
                output.buffer().extend_from_slice(&bytes[run]);
            } else {
                output.push(bytes.slice(run));
            }
        });
    }

    /// Sends the content chunks of a read; `send_data` queues the bytes of one run.
    fn send_runs(
        &mut self,
        to: ReplyTo,
        runs: &[(Range<usize>, bool)],
        mut send_data: impl FnMut(&mut super::Output, Range<usize>),
    ) {
        let last = runs.len() - 1;
        for (number, (run, zero)) in runs.iter().enumerate() {
            let (at, len) = (to.offset + run.start as u64, run.len() as u64);
            let out = self.output.buffer();
            if *zero {
                self.encoder.read_hole(out, &to, at, len, number == last);
            } else {
                self.encoder.read_prefix(out, &to, at, len, number == last);
                send_data(&mut self.output, run.clone());
            }
        }
    }

    pub(super) fn begin_status(
        &mut self,
        to: ReplyTo,
        offset: u64,
        len: u64,
        req_one: bool,
        permit: BytePermit,
    ) {
        let mut pending = Pending::new(to, CommandKind::BlockStatus, len);
        pending.permit = Some(permit);
        pending.reply_bytes = usize::try_from(status_bytes(len, req_one)).unwrap_or(usize::MAX);
        self.reading_bytes += pending.reply_bytes;
        let token = self.in_flight.insert(pending);
        let reader = self.opened.group.reader().clone();
        let volume = self.opened.volume.id;
        let failed = Completion::Status { token, result: Err(NbdError::Io) };
        let answer = Answer::new(self.completions_tx.clone(), failed);
        let extents_max = if req_one { 1 } else { BLOCK_STATUS_EXTENTS_MAX };
        tokio::task::spawn_blocking(move || {
            let result = match reader.block_status(volume, offset, len, extents_max) {
                Ok(extents) => Ok(extents.into_iter().map(extent).collect()),
                Err(error) => {
                    error!(%error, offset, len, "block status failed");
                    Err(NbdError::Io)
                }
            };
            answer.send(Completion::Status { token, result });
        });
    }
}

/// The answer that work on the blocking pool owes its session. It goes out when this is dropped, as
/// the failure it was made with unless there was a better one: a panic is answered, too.
struct Answer {
    completions: mpsc::Sender<Completion>,
    completion: Option<Completion>,
}

impl Answer {
    fn new(completions: mpsc::Sender<Completion>, failed: Completion) -> Self {
        Self { completions, completion: Some(failed) }
    }

    fn send(mut self, completion: Completion) {
        self.completion = Some(completion);
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if let Some(completion) = self.completion.take() {
            // A session that is gone needs no answer; a live one has room for all it waits for.
            let _ = self.completions.try_send(completion);
        }
    }
}

fn extent(extent: nbd_store::Extent) -> Extent {
    Extent { len: extent.len, hole: extent.status.hole, zero: extent.status.zero }
}

/// Reads on the blocking pool. A block that fails its checksum is looked up and read once more: it
/// may have moved in between.
fn read_blocking(
    reader: &ShardReader,
    mut plan: ReadPlan,
    volume: VolumeId,
    offset: u64,
    len: u64,
    holes: bool,
) -> Result<ReadData, ReadError> {
    let mut bytes = vec![0; plan.len()];
    if let Err(first) = plan.read_blocking(&mut bytes) {
        warn!(error = %first, "a read failed: looking the blocks up again");
        drop(plan);
        plan = reader.resolve(volume, offset, len)?;
        plan.read_blocking(&mut bytes)?;
    }
    let runs = runs(&plan, holes);
    Ok(ReadData { bytes, runs })
}

/// The runs of a plan that was read; `true` for zeroes. One run of bytes if holes cannot be sent.
fn runs(plan: &ReadPlan, holes: bool) -> Vec<(Range<usize>, bool)> {
    if holes {
        plan.segments().map(|(run, segment)| (run, segment == Segment::Zero)).collect()
    } else {
        vec![(0..plan.len(), false)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_panics_is_answered_with_an_error() {
        let (completions, mut answers) = mpsc::channel(1);
        let failed = Completion::Read { token: 3, result: Err(NbdError::Io) };
        let answer = Answer::new(completions, failed);
        let work = tokio::task::spawn_blocking(move || {
            let _answer = answer;
            panic!("as the test wants");
        });
        assert!(work.await.is_err());
        let answer = answers.recv().await.unwrap();
        assert!(matches!(answer, Completion::Read { token: 3, result: Err(NbdError::Io) }));
    }
}
