//! The connections that a process serves, counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Places for connections, however they come. Clones are the same places.
#[derive(Debug, Clone)]
pub struct Connections {
    places: Arc<Semaphore>,
    max: u32,
    /// Told whenever one of them becomes free.
    left: Arc<Notify>,
    /// Number of the newest one, for the log.
    newest: Arc<AtomicU64>,
}

/// The place of one connection, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    /// Tells the connection from others in the log.
    pub(super) number: u64,
    permit: Option<OwnedSemaphorePermit>,
    left: Arc<Notify>,
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.permit.take());
        self.left.notify_waiters();
    }
}

impl Connections {
    /// Places for `max` connections at a time.
    pub(super) fn new(max: u32) -> Self {
        let places = Arc::new(Semaphore::new(max as usize));
        Self { places, max, left: Arc::default(), newest: Arc::default() }
    }

    /// How many there may be.
    pub(super) const fn max(&self) -> u32 {
        self.max
    }

    /// A place, if there is one.
    pub(super) fn enter(&self) -> Option<Place> {
        let permit = Arc::clone(&self.places).try_acquire_owned().ok()?;
        let number = self.newest.fetch_add(1, Ordering::Relaxed) + 1;
        Some(Place { number, permit: Some(permit), left: Arc::clone(&self.left) })
    }

    /// Connections there are now.
    #[must_use]
    pub fn count(&self) -> usize {
        (self.max as usize).saturating_sub(self.places.available_permits())
    }

    /// Waits until there is none. Others may come meanwhile: those that another process hands over.
    pub async fn none_left(&self) {
        loop {
            // Before the look: who leaves between the two is noticed.
            let left = self.left.notified();
            if self.count() == 0 {
                return;
            }
            left.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn places_are_bounded_and_the_last_to_leave_is_noticed() {
        let connections = Connections::new(2);
        let (one, other) = (connections.enter().unwrap(), connections.enter().unwrap());
        assert!(connections.enter().is_none());
        assert_ne!(one.number, other.number);
        assert_eq!(connections.count(), 2);
        drop(one);
        let none_left = connections.none_left();
        tokio::pin!(none_left);
        tokio::time::timeout(Duration::from_millis(10), &mut none_left).await.unwrap_err();
        // Also of a process that is emptied: it may be handed others on their way through.
        let handed_over = connections.enter().expect("a place, while this waits");
        drop(other);
        tokio::time::timeout(Duration::from_millis(10), &mut none_left).await.unwrap_err();
        drop(handed_over);
        none_left.await;
        assert_eq!(connections.count(), 0);
    }
}
