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
pub struct BytePermit {
    permit: OwnedSemaphorePermit,
    waiting: Arc<AtomicUsize>,
}

impl BytePermit {
    /// Whether requests wait for what this is a share of: a connection that holds it and gets
    /// nowhere is then in the way of others.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// A share of `bytes` for itself, taken out of this one; what is left of this if that is less.
    #[must_use]
    pub fn split(&mut self, bytes: u64) -> Self {
        let left = self.permit.num_permits();
        let count = usize::try_from(bytes).unwrap_or(usize::MAX).min(left);
        let permit = self.permit.split(count).expect("no more than is left");
        Self { permit, waiting: Arc::clone(&self.waiting) }
    }
}

/// Bytes of requests that all connections of the process may hold together.
#[derive(Debug, Clone)]
pub struct ByteBudget {
    small: Pool,
    large: Pool,
}

/// A part of the budget.
#[derive(Debug, Clone)]
struct Pool {
    semaphore: Arc<Semaphore>,
    bytes_max: u32,
    /// Requests that wait for their share of it.
    waiting: Arc<AtomicUsize>,
}

impl Pool {
    fn new(bytes_max: u32) -> Self {
        let semaphore = Arc::new(Semaphore::new(bytes_max as usize));
        Self { semaphore, bytes_max, waiting: Arc::default() }
    }

    fn permit(&self, permit: OwnedSemaphorePermit) -> BytePermit {
        BytePermit { permit, waiting: Arc::clone(&self.waiting) }
    }
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
    #[must_use]
    pub fn new(bytes_max: u64) -> Self {
        let bytes_max = u32::try_from(bytes_max).unwrap_or(u32::MAX);
        let small = bytes_max / 4;
        Self { small: Pool::new(small), large: Pool::new(bytes_max - small) }
    }

    fn share(&self, bytes: u64) -> (&Pool, u32) {
        let pool = if bytes <= SMALL_REQUEST_BYTES_MAX { &self.small } else { &self.large };
        (pool, u32::try_from(bytes).unwrap_or(u32::MAX).min(pool.bytes_max))
    }

    /// A permit for `bytes`, or `None` when the budget has no room now.
    #[must_use]
    pub fn try_acquire(&self, bytes: u64) -> Option<BytePermit> {
        let (pool, bytes) = self.share(bytes);
        match Arc::clone(&pool.semaphore).try_acquire_many_owned(bytes) {
            Ok(permit) => Some(pool.permit(permit)),
            Err(TryAcquireError::NoPermits) => None,
            Err(TryAcquireError::Closed) => unreachable!("the budget is never closed"),
        }
    }

    /// A permit for `bytes`, waiting in turn for room.
    pub async fn acquire(&self, bytes: u64) -> BytePermit {
        let (pool, bytes) = self.share(bytes);
        pool.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&pool.waiting);
        match Arc::clone(&pool.semaphore).acquire_many_owned(bytes).await {
            Ok(permit) => pool.permit(permit),
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
    async fn a_share_is_wanted_only_while_somebody_waits_for_its_kind() {
        let budget = ByteBudget::new(64 << 20);
        let (all, small) = (budget.acquire(48 << 20).await, budget.acquire(4096).await);
        let waiter = tokio::spawn({
            let budget = budget.clone();
            async move { drop(budget.acquire(1 << 20).await) }
        });
        while !all.is_wanted() {
            tokio::task::yield_now().await;
        }
        assert!(!small.is_wanted(), "small requests have a budget of their own");
        drop(all);
        waiter.await.unwrap();
        assert!(!budget.acquire(1 << 20).await.is_wanted());
    }

    #[tokio::test]
    async fn a_share_goes_back_part_by_part() {
        let budget = ByteBudget::new(64 << 20);
        let mut all = budget.acquire(48 << 20).await;
        let part = all.split(16 << 20);
        assert!(budget.try_acquire(16 << 20).is_none(), "both are held");
        drop(part);
        assert!(budget.try_acquire(17 << 20).is_none());
        assert!(budget.try_acquire(16 << 20).is_some());
        let rest = all.split(u64::MAX);
        drop(all);
        assert!(budget.try_acquire(17 << 20).is_none(), "nothing was left in it");
        drop(rest);
        assert!(budget.try_acquire(48 << 20).is_some());
    }

    #[tokio::test]
    async fn the_largest_request_fits_the_smallest_budget() {
        let budget = ByteBudget::new(64 << 20);
        let _permit = budget.acquire(32 << 20).await;
    }
}
