//! Pins: how the checkpointer knows that nobody reads a place any more.
//!
//! Every read plan holds the pin that was current when it looked at the maps. The checkpointer
//! replaces the current pin and waits until nobody holds the old one: from then on every reader has
//! seen the maps as they are now, and places that only the older maps named may be overwritten.

use std::sync::{Arc, Weak};

use parking_lot::{Condvar, Mutex};

/// Wakes the checkpointer when a pin was let go.
#[derive(Debug, Default)]
pub(crate) struct PinGate {
    lock: Mutex<()>,
    released: Condvar,
}

/// Held by readers for as long as they use places that a map named.
#[derive(Debug)]
pub(crate) struct Pin {
    gate: Arc<PinGate>,
}

/// A pin that is no longer handed out.
#[derive(Debug)]
pub(crate) struct RetiredPin(Weak<Pin>);

impl Pin {
    /// The pin of a new epoch.
    pub(crate) fn new(gate: &Arc<PinGate>) -> Arc<Self> {
        Arc::new(Self { gate: Arc::clone(gate) })
    }

    /// Puts a new pin in the place of `current`.
    pub(crate) fn replace(current: &mut Arc<Self>) -> RetiredPin {
        let new = Self::new(&current.gate);
        RetiredPin(Arc::downgrade(&std::mem::replace(current, new)))
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // Taking the lock orders this wake-up after the waiter's look at the count.
        drop(self.gate.lock.lock());
        self.gate.released.notify_all();
    }
}

impl PinGate {
    /// Blocks until nobody holds any of `pins`.
    pub(crate) fn wait(&self, pins: impl IntoIterator<Item = RetiredPin>) {
        let mut guard = self.lock.lock();
        for pin in pins {
            while pin.0.strong_count() > 0 {
                self.released.wait(&mut guard);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_for_every_holder() {
        let gate = Arc::new(PinGate::default());
        let mut current = Pin::new(&gate);
        let held = [Arc::clone(&current), Arc::clone(&current)];
        let retired = Pin::replace(&mut current);
        let reader = std::thread::spawn(move || {
            for pin in held {
                std::thread::sleep(std::time::Duration::from_millis(20));
                drop(pin);
            }
        });
        gate.wait([retired]);
        assert_eq!(Arc::strong_count(&current), 1);
        reader.join().unwrap();
    }
}
