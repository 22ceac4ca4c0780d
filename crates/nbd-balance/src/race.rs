//! Finds a load balancer for a client: the first that greets.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::backend::{Backend, Greeted};
use crate::choice::order;
use crate::limits::{FIND_MAX, RETRY, STAGGER};

/// All load balancers.
#[derive(Debug)]
pub(crate) struct Backends {
    all: Vec<Arc<Backend>>,
    /// Choices so far.
    choices: AtomicU64,
}

impl Backends {
    pub(crate) fn new(all: Vec<Arc<Backend>>) -> Self {
        Self { all, choices: AtomicU64::new(0) }
    }

    pub(crate) fn all(&self) -> &[Arc<Backend>] {
        &self.all
    }

    /// One that takes a client; `None` if none does in time.
    pub(crate) async fn find(&self) -> Option<Greeted> {
        let search = async {
            loop {
                if let Some(greeted) = race(self.in_order()).await {
                    return greeted;
                }
                sleep(RETRY).await;
            }
        };
        timeout(FIND_MAX, search).await.ok()
    }

    /// All of them, the one to be asked first in front.
    fn in_order(&self) -> Vec<Arc<Backend>> {
        let candidates: Vec<_> = self.all.iter().map(|backend| backend.candidate()).collect();
        let in_order: Vec<_> =
            order(&candidates).into_iter().map(|place| Arc::clone(&self.all[place])).collect();
        if let Some(first) = in_order.first() {
            first.note_chosen(self.choices.fetch_add(1, Ordering::Relaxed) + 1);
        }
        in_order
    }
}

/// Asks one after the other: the next when one has failed, or has said nothing for a moment and may
/// still win. The first greeting wins; connections to the others are closed with it.
async fn race(backends: Vec<Arc<Backend>>) -> Option<Greeted> {
    let mut left = backends.into_iter();
    let mut asked = JoinSet::new();
    loop {
        let more = match left.next() {
            Some(next) => {
                asked.spawn(async move { next.greet().await });
                left.len() > 0
            }
            None => false,
        };
        tokio::select! {
            ended = asked.join_next() => match ended {
                Some(Ok(Ok(greeted))) => return Some(greeted),
                // Why it failed was noted where it was asked.
                Some(_) => {}
                None => return None,
            },
            () = sleep(STAGGER), if more => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::backend::tests::{Habit, backend};

    async fn backends(habits: &[Habit]) -> Backends {
        let mut all = Vec::new();
        for &habit in habits {
            all.push(backend(habit).await);
        }
        Backends::new(all)
    }

    #[track_caller]
    fn won(backends: &Backends, found: Option<&Greeted>) -> usize {
        let name = found.expect("one greets").place.backend().name();
        backends.all().iter().position(|backend| backend.name() == name).unwrap()
    }

    #[tokio::test]
    async fn one_that_fails_costs_nothing_and_one_that_is_silent_a_moment() {
        let backends = backends(&[Habit::Closes, Habit::Silent, Habit::Greets]).await;
        let began = Instant::now();
        let found = backends.find().await;
        assert_eq!(won(&backends, found.as_ref()), 2);
        let took = began.elapsed();
        assert!(took >= STAGGER && took < 4 * STAGGER, "{took:?}");
        // What lost is given up, with its place.
        let connections = |at: usize| backends.all()[at].candidate().connections;
        let losers = || connections(0) + connections(1);
        for _ in 0..100 {
            if losers() == 0 {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(losers(), 0);
        assert_eq!(connections(2), 1);
        // The next client goes there at once: it greeted, and the others did not.
        let began = Instant::now();
        assert_eq!(won(&backends, backends.find().await.as_ref()), 2);
        assert!(began.elapsed() < STAGGER);
    }

    #[tokio::test]
    async fn a_late_greeting_may_still_win() {
        let backends = backends(&[Habit::Late(600), Habit::Silent]).await;
        assert_eq!(won(&backends, backends.find().await.as_ref()), 0);
    }

    #[tokio::test]
    async fn clients_that_come_together_spread() {
        let backends = backends(&[Habit::Greets; 3]).await;
        // Looked at, as they are at the start.
        for backend in backends.all() {
            drop(backend.greet().await.unwrap());
        }
        let mut found = Vec::new();
        for _ in 0..9 {
            found.push(backends.find().await.unwrap());
        }
        let counts: Vec<_> =
            backends.all().iter().map(|backend| backend.candidate().connections).collect();
        assert_eq!(counts, [3, 3, 3]);
    }

    #[tokio::test]
    async fn the_search_has_an_end() {
        let backends = backends(&[Habit::Closes, Habit::Stranger, Habit::Silent]).await;
        let began = Instant::now();
        assert!(backends.find().await.is_none());
        let took = began.elapsed();
        assert!(took >= FIND_MAX && took < 2 * FIND_MAX, "{took:?}");
    }
}
