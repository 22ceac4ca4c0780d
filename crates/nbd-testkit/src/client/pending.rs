//! A request in flight, and what of its reply has come.

use nbd_proto::{Extent, PendingRead};

use super::error::{ClientError, ErrorReply};
use super::{Outcome, Reply};

#[derive(Debug)]
pub(super) struct Pending {
    read: Option<PendingRead>,
    /// Content of the read; made when the first piece comes, so that asking costs nothing.
    data: Vec<u8>,
    /// Ranges of `data` that have come, as (start, end).
    covered: Vec<(usize, usize)>,
    extents: Option<Vec<Extent>>,
    error: Option<ErrorReply>,
}

impl Pending {
    pub(super) fn new(read: Option<PendingRead>) -> Self {
        Self { read, data: Vec::new(), covered: Vec::new(), extents: None, error: None }
    }

    pub(super) fn read(&self) -> Option<PendingRead> {
        self.read
    }

    /// The place for `len` bytes of content that belong to `offset` of the export.
    pub(super) fn place(&mut self, offset: u64, len: u64) -> Result<&mut [u8], ClientError> {
        let misplaced = || ClientError::Misplaced { offset, len };
        let read = self.read.ok_or_else(misplaced)?;
        let start = offset.checked_sub(read.offset).ok_or_else(misplaced)?;
        let end = start.checked_add(len).filter(|end| *end <= read.len).ok_or_else(misplaced)?;
        let to_usize = |n| usize::try_from(n).map_err(|_| misplaced());
        let (start, end) = (to_usize(start)?, to_usize(end)?);
        if self.covered.iter().any(|(s, e)| *s < end && start < *e) {
            return Err(misplaced());
        }
        self.covered.push((start, end));
        if self.data.is_empty() {
            self.data = vec![0; to_usize(read.len)?];
        }
        Ok(&mut self.data[start..end])
    }

    pub(super) fn extents(&mut self, extents: Vec<Extent>) {
        self.extents = Some(extents);
    }

    pub(super) fn fail(&mut self, error: ErrorReply) {
        // The first error is the cause; a server may add others about further pieces.
        self.error.get_or_insert(error);
    }

    /// The whole reply.
    pub(super) fn finish(self) -> Result<Outcome, ClientError> {
        if let Some(error) = self.error {
            return Ok(Err(error));
        }
        let Some(PendingRead { len, .. }) = self.read else {
            return Ok(Ok(self.extents.map_or(Reply::Done, Reply::Extents)));
        };
        // Pieces do not overlap, so their sum tells whether they cover the read.
        let received = self.covered.iter().map(|(start, end)| (end - start) as u64).sum();
        if received == len {
            Ok(Ok(Reply::Data(self.data)))
        } else {
            Err(ClientError::Incomplete { len, received })
        }
    }
}

#[cfg(test)]
mod tests {
    use nbd_proto::NbdError;

    use super::*;

    fn read_of_8_at_100() -> Pending {
        Pending::new(Some(PendingRead { offset: 100, len: 8 }))
    }

    #[test]
    fn pieces_in_any_order_make_the_whole() {
        let mut pending = read_of_8_at_100();
        pending.place(104, 4).unwrap().copy_from_slice(b"ever");
        pending.place(100, 2).unwrap().copy_from_slice(b"ho");
        pending.place(102, 2).unwrap();
        assert_eq!(pending.finish().unwrap(), Ok(Reply::Data(b"ho\0\0ever".to_vec())));
    }

    #[test]
    fn pieces_are_held_to_the_read() {
        for (offset, len) in [(99, 1), (107, 2), (102, 1), (100, 8), (u64::MAX, 2)] {
            let mut pending = read_of_8_at_100();
            pending.place(102, 2).unwrap();
            assert!(pending.place(offset, len).is_err(), "{offset} {len}");
        }
        let mut pending = read_of_8_at_100();
        pending.place(100, 7).unwrap();
        assert!(matches!(pending.finish(), Err(ClientError::Incomplete { len: 8, received: 7 })));
        assert!(Pending::new(None).place(0, 1).is_err());
    }

    #[test]
    fn the_first_error_wins() {
        let mut pending = read_of_8_at_100();
        let reply = |error| ErrorReply { error, message: String::new(), offset: None };
        pending.fail(reply(NbdError::Io));
        pending.fail(reply(NbdError::Inval));
        assert_eq!(pending.finish().unwrap(), Err(reply(NbdError::Io)));
    }

    #[test]
    fn other_requests_have_other_replies() {
        assert_eq!(Pending::new(None).finish().unwrap(), Ok(Reply::Done));
        let extent = Extent { len: 4096, hole: true, zero: true };
        let mut pending = Pending::new(None);
        pending.extents(vec![extent]);
        assert_eq!(pending.finish().unwrap(), Ok(Reply::Extents(vec![extent])));
        let empty = Pending::new(Some(PendingRead { offset: 5, len: 0 }));
        assert_eq!(empty.finish().unwrap(), Ok(Reply::Data(Vec::new())));
    }
}
