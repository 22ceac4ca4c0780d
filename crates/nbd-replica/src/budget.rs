//! The process's budget of request bytes.
//!
//! A permit is taken before a payload or read buffer is allocated and released with the reply.
//! Small and large requests draw on budgets of their own, so that slow clients in the middle of
//! large payloads cannot take the room that small requests live on.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError};

/// Requests up to this many bytes draw on the budget for small ones.
const SMALL_REQUEST_BYTES_MAX: u64 = 128 << 10;

/// A share of the budget; gives its bytes back when dropped.
#[derive(Debug)]
pub(crate) struct BytePermit {
    _permit: OwnedSemaphorePermit,
}

/// Bytes of requests that all connections of the process may hold together.
#[derive(Debug, Clone)]
pub(crate) struct ByteBudget {
    small: Arc<Semaphore>,
    large: Arc<Semaphore>,
    large_bytes_max: u32,
    /// Requests that wait for their share.
    waiting: Arc<AtomicUsize>,
}

/// Counts a waiting request for as long as it exists.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl ByteBudget {
    /// A budget of `bytes_max`, a quarter of it for small requests. `bytes_max` is at least 64 MiB
    /// (checked with the configuration), so that the largest request always fits.
    pub(crate) fn new(bytes_max: u64) -> Self {
        let bytes_max = u32::try_from(bytes_max).unwrap_or(u32::MAX);
        let small = bytes_max / 4;
        let large = bytes_max - small;
        Self {
            small: Arc::new(Semaphore::new(small as usize)),
            large: Arc::new(Semaphore::new(large as usize)),
            large_bytes_max: large,
            waiting: Arc::default(),
        }
    }

    /// Whether requests are waiting for their share: connections that hold one and get nowhere are
    /// then in the way of others.
    pub(crate) fn is_short(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    fn share(&self, bytes: u64) -> (&Arc<Semaphore>, u32) {
        if bytes <= SMALL_REQUEST_BYTES_MAX {
            (&self.small, u32::try_from(bytes).unwrap_or(u32::MAX))
        } else {
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.large_bytes_max);
            (&self.large, bytes)
        }
    }

    /// A permit for `bytes`, or `None` when the budget has no room now.
    pub(crate) fn try_acquire(&self, bytes: u64) -> Option<BytePermit> {
        let (semaphore, bytes) = self.share(bytes);
        match Arc::clone(semaphore).try_acquire_many_owned(bytes) {
            Ok(permit) => Some(BytePermit { _permit: permit }),
            Err(TryAcquireError::NoPermits) => None,
            Err(TryAcquireError::Closed) => unreachable!("the budget is never closed"),
        }
    }

    /// A permit for `bytes`, waiting in turn for room.
    pub(crate) async fn acquire(&self, bytes: u64) -> BytePermit {
        let (semaphore, bytes) = self.share(bytes);
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        match Arc::clone(semaphore).acquire_many_owned(bytes).await {
            Ok(permit) => BytePermit { _permit: permit },
            Err(_) => unreachable!("the budget is never closed"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn small_requests_have_room_when_large_ones_took_theirs() {
        let budget = ByteBudget::new(64 << 20);
        let mut large = Vec::new();
        while let Some(permit) = budget.try_acquire(16 << 20) {
            large.push(permit);
        }
        assert_eq!(large.len(), 3);
        assert!(budget.try_acquire(4096).is_some());
        drop(large.pop());
        assert!(budget.try_acquire(16 << 20).is_some());
    }

    #[tokio::test]
    async fn is_short_only_while_somebody_waits() {
        let budget = ByteBudget::new(64 << 20);
        let all = budget.acquire(48 << 20).await;
        let waiter = tokio::spawn({
            let budget = budget.clone();
            async move { drop(budget.acquire(1 << 20).await) }
        });
        while !budget.is_short() {
            tokio::task::yield_now().await;
        }
        drop(all);
        waiter.await.unwrap();
        assert!(!budget.is_short());
    }

    #[tokio::test]
    async fn the_largest_request_fits_the_smallest_budget() {
        let budget = ByteBudget::new(64 << 20);
        let _permit = budget.acquire(32 << 20).await;
    }
}
