//! The services of a cluster while they run, as threads or as processes: how they stand, and
//! stopping them in order.
//!
//! ```text
//!  thread or task of a member ──Report──▶ Crew ──Phase──▶ each member
//!
//!  Phase   load balancer, control API  replica
//!  Run     serves                      serves
//!  Drain   finishes and ends           finishes what clients have under way
//!  Stop                                ends
//! ```
//!
//! Load balancer and control API end first, then all replicas are drained, then all end: so that a
//! majority is there for as long as anybody waits for an answer.

use std::time::Duration;

use tokio::sync::{mpsc, watch};

/// Time between looks whether a service is ready.
pub(super) const READY_POLL: Duration = Duration::from_millis(20);

/// Place of the load balancer in a crew.
pub(super) const BALANCER: usize = 0;

/// Place of the control API.
pub(super) const CONTROL: usize = 1;

/// Place of the first replica: that of the first node in the cluster's list. The others follow.
pub(super) const FIRST_REPLICA: usize = 2;

/// Reports of a member that wait to be read: more than it makes from one start to its end.
const REPORTS_PER_MEMBER: usize = 8;

/// What a member shall do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Run,
    Drain,
    Stop,
}

/// What a member tells.
#[derive(Debug)]
pub(super) enum Event {
    /// It was started, as a process of its own if it has an id.
    Started(Option<u32>),
    /// It can serve.
    Ready,
    /// It has nothing under way any more.
    Drained,
    /// It has ended, in good order or for a reason. With `--restart` it may be started again.
    Ended(Result<(), String>),
}

/// How a member stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Starting,
    Ready,
    Drained,
    Ended,
}

/// All services of the cluster.
#[derive(Debug)]
pub(super) struct Crew {
    members: Vec<Member>,
    reports: mpsc::Receiver<(usize, Event)>,
}

#[derive(Debug)]
struct Member {
    phase: watch::Sender<Phase>,
    state: State,
    pid: Option<u32>,
}

/// A member's end of the crew. Clones are the same.
#[derive(Debug, Clone)]
pub(super) struct Post {
    place: usize,
    phase: watch::Receiver<Phase>,
    reports: mpsc::Sender<(usize, Event)>,
}

/// A crew of so many, and a post for each.
pub(super) fn muster(count: usize) -> (Crew, Vec<Post>) {
    let (sender, reports) = mpsc::channel(count * REPORTS_PER_MEMBER);
    let (mut members, mut posts) = (Vec::new(), Vec::new());
    for place in 0..count {
        let (phase, orders) = watch::channel(Phase::Run);
        members.push(Member { phase, state: State::Starting, pid: None });
        posts.push(Post { place, phase: orders, reports: sender.clone() });
    }
    (Crew { members, reports }, posts)
}

impl Post {
    /// Tells the crew.
    pub(super) async fn tell(&self, event: Event) {
        // Nobody listens once the crew is gone, and then nobody has to.
        let _ = self.reports.send((self.place, event)).await;
    }

    /// As [`tell`](Self::tell), from a thread that may wait.
    pub(super) fn tell_blocking(&self, event: Event) {
        let _ = self.reports.blocking_send((self.place, event));
    }

    /// Waits until the member shall do this, or what comes after it.
    pub(super) async fn until(&mut self, phase: Phase) {
        // If the crew is gone, it is time to end.
        let _ = self.phase.wait_for(|now| *now >= phase).await;
    }

    /// Whether the member shall end.
    pub(super) fn is_over(&self) -> bool {
        *self.phase.borrow() > Phase::Run || self.phase.has_changed().is_err()
    }
}

impl Crew {
    /// The next thing that a member tells.
    pub(super) async fn next(&mut self) -> (usize, Event) {
        let Some((place, event)) = self.reports.recv().await else {
            // All members are gone, and each has told its end.
            return std::future::pending().await;
        };
        let member = &mut self.members[place];
        member.state = match &event {
            Event::Started(pid) => {
                member.pid = *pid;
                State::Starting
            }
            Event::Ready => State::Ready,
            Event::Drained => State::Drained,
            Event::Ended(_) => State::Ended,
        };
        (place, event)
    }

    /// How the member at `place` stands.
    pub(super) fn state(&self, place: usize) -> State {
        self.members[place].state
    }

    /// The id of its process, if it has one of its own.
    pub(super) fn pid(&self, place: usize) -> Option<u32> {
        let member = &self.members[place];
        member.pid.filter(|_| member.state != State::Ended)
    }

    /// The places of all replicas.
    pub(super) fn replicas(&self) -> std::ops::Range<usize> {
        FIRST_REPLICA..self.members.len()
    }

    /// Stops all, and waits for their ends. Gives the reasons of those that ended badly.
    pub(super) async fn stop(&mut self) -> Vec<(usize, String)> {
        let mut reasons = Vec::new();
        self.order(0..FIRST_REPLICA, Phase::Stop);
        self.wait(0..FIRST_REPLICA, &[State::Ended], &mut reasons).await;
        self.order(self.replicas(), Phase::Drain);
        self.wait(self.replicas(), &[State::Drained, State::Ended], &mut reasons).await;
        self.order(self.replicas(), Phase::Stop);
        self.wait(self.replicas(), &[State::Ended], &mut reasons).await;
        reasons
    }

    fn order(&self, places: std::ops::Range<usize>, phase: Phase) {
        for member in &self.members[places] {
            member.phase.send_replace(phase);
        }
    }

    async fn wait(
        &mut self,
        places: std::ops::Range<usize>,
        states: &[State],
        reasons: &mut Vec<(usize, String)>,
    ) {
        while !places.clone().all(|place| states.contains(&self.state(place))) {
            if let (place, Event::Ended(Err(reason))) = self.next().await {
                reasons.push((place, reason));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A member that notes when it is told what.
    async fn serve(mut post: Post, notes: mpsc::Sender<(usize, &'static str)>) {
        post.tell(Event::Started(None)).await;
        post.tell(Event::Ready).await;
        post.until(Phase::Drain).await;
        notes.send((post.place, "drain")).await.unwrap();
        if post.place >= FIRST_REPLICA {
            post.tell(Event::Drained).await;
            post.until(Phase::Stop).await;
            notes.send((post.place, "stop")).await.unwrap();
        }
        let ended = if post.place == 2 { Err("disk on fire".to_owned()) } else { Ok(()) };
        post.tell(Event::Ended(ended)).await;
    }

    #[tokio::test]
    async fn what_clients_use_ends_first_and_no_replica_before_all_are_drained() {
        let (mut crew, posts) = muster(5);
        let (notes, mut noted) = mpsc::channel(16);
        let gone = posts.into_iter().map(|post| tokio::spawn(serve(post, notes.clone())));
        let gone: Vec<_> = gone.collect();
        drop(notes);
        while !(0..5).all(|place| crew.state(place) == State::Ready) {
            crew.next().await;
        }
        assert_eq!(crew.stop().await, [(2, "disk on fire".to_owned())]);
        assert!((0..5).all(|place| crew.state(place) == State::Ended));
        for member in gone {
            member.await.unwrap();
        }
        let mut order = Vec::new();
        while let Some((place, what)) = noted.recv().await {
            order.push((if place < FIRST_REPLICA { "front" } else { "replica" }, what));
        }
        let expected = [
            [("front", "drain"); 2].as_slice(),
            &[("replica", "drain"); 3],
            &[("replica", "stop"); 3],
        ];
        assert_eq!(order, expected.concat());
    }

    #[tokio::test]
    async fn who_has_ended_is_not_waited_for() {
        let (mut crew, posts) = muster(3);
        for post in &posts {
            post.tell(Event::Ended(Ok(()))).await;
        }
        assert_eq!(crew.stop().await, []);
    }

    #[tokio::test]
    async fn a_member_ends_when_the_crew_is_gone() {
        let (crew, mut posts) = muster(1);
        assert!(!posts[0].is_over());
        drop(crew);
        posts[0].until(Phase::Stop).await;
        assert!(posts[0].is_over());
    }
}
