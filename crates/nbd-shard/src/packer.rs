//! Joining small commands into entries.

use bytes::{Bytes, BytesMut};
use nbd_consensus::Timestamp;

use crate::limits::ENTRY_PACK_BYTES_MAX;

/// One log entry's worth of commands and who waits for each.
#[derive(Debug)]
pub(crate) struct Packed<R> {
    pub(crate) data: Bytes,
    pub(crate) replies: Vec<R>,
    pub(crate) since: Timestamp,
}

/// Joins commands into entries, in order.
#[derive(Debug)]
pub(crate) struct Packer<R> {
    since: Timestamp,
    done: Vec<Packed<R>>,
    commands: Vec<Bytes>,
    replies: Vec<R>,
    bytes: usize,
}

impl<R> Packer<R> {
    pub(crate) const fn new(since: Timestamp) -> Self {
        Self { since, done: Vec::new(), commands: Vec::new(), replies: Vec::new(), bytes: 0 }
    }

    pub(crate) fn add(&mut self, command: Bytes, reply: R) {
        if self.bytes + command.len() > ENTRY_PACK_BYTES_MAX {
            self.seal();
        }
        self.bytes += command.len();
        self.commands.push(command);
        self.replies.push(reply);
    }

    fn seal(&mut self) {
        if self.commands.is_empty() {
            return;
        }
        let data = if self.commands.len() == 1 {
            self.commands.remove(0)
        } else {
            let mut data = BytesMut::with_capacity(self.bytes);
            for command in self.commands.drain(..) {
                data.extend_from_slice(&command);
            }
            data.freeze()
        };
        self.bytes = 0;
        let replies = std::mem::take(&mut self.replies);
        self.done.push(Packed { data, replies, since: self.since });
    }

    pub(crate) fn finish(mut self) -> Vec<Packed<R>> {
        self.seal();
        self.done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_commands_share_an_entry_and_large_ones_go_alone_in_order() {
        let mut packer = Packer::new(Timestamp(0));
        for len in [10, 20, ENTRY_PACK_BYTES_MAX + 1, 30] {
            packer.add(Bytes::from(vec![0; len]), len);
        }
        let packed = packer.finish();
        let lens: Vec<_> = packed.iter().map(|p| (p.data.len(), p.replies.clone())).collect();
        let large = ENTRY_PACK_BYTES_MAX + 1;
        assert_eq!(lens, [(30, vec![10, 20]), (large, vec![large]), (30, vec![30])]);
    }
}
