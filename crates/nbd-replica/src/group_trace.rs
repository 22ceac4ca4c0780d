//! The traced mutations that a group has under way, as its leader or as a follower.
//!
//! ```text
//!  lead write                    arrival at the leader to its answer; of `hosted` and `reply`
//!  ├─ decode                     over a relay: until the whole command is here
//!  ├─ queue                      until the group task takes it
//!  ├─ propose                    until its entry goes to log and peers
//!  ├─ append                     until the entry is durable here
//!  │  └─ fsync                   the log thread's one durable write, with whatever else is in it
//!  ├─ replicate NODE             until that node's replica has acknowledged it, of each other one
//!  │  ├─ append, fsync           there
//!  │  └─ apply                   there
//!  ├─ commit                     from proposed to committed, as far as the leader knows
//!  ├─ apply
//!  └─ reply                      until the answer is with the caller's session
//! ```
//!
//! Raft does not know of it: a traced command is found again in the entry that it was packed into,
//! and notes for followers travel beside the messages with entries ([`TraceNote`]), where they may
//! be lost like these. The group task asks [`GroupTrace::is_active`] and does nothing else for
//! requests that are not traced.

use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use nbd_consensus::{Brief, EntryKind, PeerStatus, Role};
use nbd_rpc::v1::TraceNote;
use nbd_service::trace::{Context, Kind, Span, Tracer, ago, halves, time_of};
use nbd_shard::LogWrite;
use nbd_store::{SessionId, decode_all};
use nbd_topology::{LogIndex, NodeName, ReplicaId, Term};

use crate::clock;
use crate::hosted::Underway;
use crate::transport::limits::TRACES_MAX;

/// Traced mutations of a group that are followed at a time, at the leader and as many at a
/// follower. Of others, only the leader's own part is traced.
const FOLLOWED_MAX: usize = TRACES_MAX;

/// How long a mutation is followed: a replica that has not acknowledged it by then is away.
const FOLLOWED_FOR: Duration = Duration::from_secs(10);

/// Where an entry is in the log.
type Place = (Term, LogIndex);

/// Another replica of the group, when something is sent to it.
#[derive(Debug)]
pub(crate) struct Follower {
    pub(crate) id: ReplicaId,
    pub(crate) node: NodeName,
    /// Whether it was heard from lately.
    pub(crate) active: bool,
}

/// A mutation that this replica leads.
#[derive(Debug)]
struct Leading {
    /// What it is in its session.
    key: (SessionId, u64),
    /// Of the leader's part of the trace.
    context: Context,
    since: Instant,
    /// Once it is in an entry.
    place: Option<Place>,
    /// `propose`, then `commit`.
    step: Option<Span>,
    replicate: Vec<(ReplicaId, Span)>,
    is_applied: bool,
}

/// An entry that this replica gets from its leader.
#[derive(Debug)]
struct Following {
    place: Place,
    /// Of the leader's `replicate`.
    context: Context,
    since: Instant,
    is_logged: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct GroupTrace {
    tracer: Tracer,
    leading: Vec<Leading>,
    following: Vec<Following>,
    /// For followers, with the next entries that they are sent.
    notes: Vec<(ReplicaId, TraceNote)>,
}

impl GroupTrace {
    pub(crate) const fn new(tracer: Tracer) -> Self {
        Self { tracer, leading: Vec::new(), following: Vec::new(), notes: Vec::new() }
    }

    /// Whether anything is traced now.
    pub(crate) const fn is_active(&self) -> bool {
        !self.leading.is_empty() || !self.following.is_empty()
    }

    /// A mutation that is traced is about to be proposed.
    #[cold]
    pub(crate) fn arrived(&mut self, command: &Bytes, span: &Span, underway: &Underway) {
        let Some(Ok(decoded)) = decode_all(command).next() else { return };
        let waited = clock::now().0.saturating_sub(underway.arrived().0);
        drop(span.child("queue").since(ago(Duration::from_nanos(waited))));
        if self.leading.len() >= FOLLOWED_MAX {
            return;
        }
        self.leading.push(Leading {
            key: (decoded.header.session, decoded.header.seq),
            context: span.context(),
            since: Instant::now(),
            place: None,
            step: Some(span.child("propose")),
            replicate: Vec::new(),
            is_applied: false,
        });
    }

    /// The leader says which entries to come are traced.
    #[cold]
    pub(crate) fn noted(&mut self, notes: Vec<TraceNote>) {
        if !self.tracer.is_on() {
            return;
        }
        for note in notes {
            let trace_id = (u128::from(note.trace_id_high) << 64) | u128::from(note.trace_id_low);
            let Some(context) = Context::new(trace_id, note.span_id) else { continue };
            if self.following.len() >= FOLLOWED_MAX {
                return;
            }
            let (place, since) = ((Term(note.term), LogIndex(note.index)), Instant::now());
            // A note that was sent again.
            if !self.following.iter().any(|known| known.context == context) {
                self.following.push(Following { place, context, since, is_logged: false });
            }
        }
    }

    /// What goes to the log is known: gives the `append` of each traced entry in it. `followers`
    /// are those whom its entries go to, if this replica leads.
    #[cold]
    pub(crate) fn logged(
        &mut self,
        write: &LogWrite,
        followers: impl Fn() -> Vec<Follower>,
    ) -> Vec<Span> {
        let mut appends = Vec::new();
        // Of copies nobody waits for the end.
        if write.ready.is_none() {
            return appends;
        }
        for entry in &write.entries {
            let place = (entry.term, entry.index);
            for entry in self.following.iter_mut().filter(|entry| entry.place == place) {
                entry.is_logged = true;
                let append = self.tracer.child_of(entry.context, "append", Kind::Server);
                appends.extend(append.map(|span| at(span, place)));
            }
            let is_wanted = self.leading.iter().any(|mutation| mutation.place.is_none());
            if is_wanted && entry.kind == EntryKind::Command {
                self.proposed(place, &entry.data, &followers, &mut appends);
            }
        }
        appends
    }

    /// An entry of this leader's is in its log, and on its way to the others.
    fn proposed(
        &mut self,
        place: Place,
        data: &[u8],
        followers: impl Fn() -> Vec<Follower>,
        appends: &mut Vec<Span>,
    ) {
        for decoded in decode_all(data).map_while(Result::ok) {
            let key = (decoded.header.session, decoded.header.seq);
            let waits = |mutation: &&mut Leading| mutation.place.is_none() && mutation.key == key;
            let Some(mutation) = self.leading.iter_mut().find(waits) else { continue };
            mutation.place = Some(place);
            // Ends what was before.
            let context = mutation.context;
            let child = |name| self.tracer.child_of(context, name, Kind::Internal);
            mutation.step = child("commit");
            appends.extend(child("append").map(|span| at(span, place)));
            for Follower { id, node, active } in followers() {
                let name = format!("replicate {node}");
                let Some(span) = self.tracer.child_of(context, name, Kind::Client) else { return };
                let mut span = span.with("cinderblock.node", node.to_string());
                if !active {
                    span.error("the replica was not heard from lately");
                    continue;
                }
                let sent = span.context();
                let [high, low] = halves(sent.trace_id());
                let note = TraceNote {
                    term: place.0.0,
                    index: place.1.0,
                    trace_id_high: high,
                    trace_id_low: low,
                    span_id: sent.span_id(),
                };
                if self.notes.len() < FOLLOWED_MAX {
                    self.notes.push((id, note));
                }
                mutation.replicate.push((id, span));
            }
        }
    }

    /// Notes that wait for messages with entries.
    pub(crate) const fn notes(&mut self) -> &mut Vec<(ReplicaId, TraceNote)> {
        &mut self.notes
    }

    /// The group was stepped, between these times: sees what has become committed, applied and
    /// acknowledged. `peers` says how far the followers are, if this replica leads.
    #[cold]
    pub(crate) fn stepped(
        &mut self,
        now: Brief,
        peers: impl FnOnce() -> Vec<PeerStatus>,
        (began, ended): (SystemTime, SystemTime),
    ) {
        if now.role != Role::Leader {
            self.notes.clear();
            for mut mutation in self.leading.drain(..) {
                let open = mutation.replicate.iter_mut().map(|(_, span)| span);
                open.chain(&mut mutation.step).for_each(|span| span.error("leadership was lost"));
            }
        }
        let is_sent = |mutation: &Leading| !mutation.replicate.is_empty();
        let peers = if self.leading.iter().any(is_sent) { peers() } else { Vec::new() };
        let apply = |above: Context| {
            let span = self.tracer.child_of(above, "apply", Kind::Internal);
            drop(span.map(|span| span.since(began).until(ended)));
        };
        self.leading.retain_mut(|mutation| {
            let Some((_, index)) = mutation.place else { return true };
            if now.committed >= index
                && let Some(commit) = mutation.step.take()
            {
                drop(commit.until(began));
            }
            if now.applied >= index && !mutation.is_applied {
                mutation.is_applied = true;
                apply(mutation.context);
            }
            let has = |id: ReplicaId| {
                peers.iter().any(|peer| peer.replica == id && peer.matched >= index)
            };
            mutation.replicate.retain(|(id, _)| !has(*id));
            !mutation.is_applied || is_sent(mutation)
        });
        self.following.retain(|entry| {
            let is_applied = entry.is_logged && now.applied >= entry.place.1;
            if is_applied {
                apply(entry.context);
            }
            !is_applied
        });
    }

    /// Lets go of what has taken too long.
    #[cold]
    pub(crate) fn expire(&mut self) {
        self.following.retain(|entry| entry.since.elapsed() < FOLLOWED_FOR);
        self.leading.retain_mut(|mutation| {
            let stays = mutation.since.elapsed() < FOLLOWED_FOR;
            if !stays {
                let open = mutation.replicate.iter_mut().map(|(_, span)| span);
                let late =
                    |span: &mut Span| span.error("not done after 10 s: not followed further");
                open.chain(&mut mutation.step).for_each(late);
            }
            stays
        });
        if self.leading.is_empty() {
            self.notes.clear();
        }
    }
}

fn at(span: Span, (term, index): Place) -> Span {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    span.with("cinderblock.log.term", number(term.0)).with("cinderblock.log.index", number(index.0))
}

/// One durable write of the log, between these times, had these entries in it, among the `bytes` of
/// entries of `jobs` writes of groups.
#[cold]
pub(crate) fn written(
    appends: Vec<Span>,
    (started, ended): (Instant, Instant),
    bytes: usize,
    jobs: usize,
) {
    let number = |value: usize| i64::try_from(value).unwrap_or(i64::MAX);
    let (started, ended) = (time_of(started), time_of(ended));
    for append in appends {
        let fsync = append.child("fsync").since(started).until(ended);
        drop(
            fsync
                .with("cinderblock.log.batch.bytes", number(bytes))
                .with("cinderblock.log.batch.writes", number(jobs)),
        );
        drop(append.until(ended));
    }
}
