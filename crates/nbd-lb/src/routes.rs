//! Which route to a shard's leader follows from what each node last said. Pure: no clock, no I/O.
//!
//! A **contact** is an address at which a node of the shard is, or may be. Contacts are configured,
//! or learnt from what nodes say, and each is *open* while a stream from it lasts.
//!
//! Whom to believe, in order:
//!
//! 1. The highest term in which a leader is named. A node that knows a higher term and no leader of
//!    it (a candidate) says nothing of use, and does not count against one that leads.
//! 2. Within a term, the leader's own word. Its stream tells the moment from which it can be asked,
//!    and the moment from which it cannot; so what others say of a leader counts only while its own
//!    stream is not open.
//! 3. What was found before, as long as nobody says better: a leader whose stream is lost may be
//!    back in a moment, and to wait for it costs no more than to wait for its successor. It is
//!    forgotten only when another is named, or when its own stream says that it does not lead.

mod servers;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use nbd_front::{LeaderAt, Route};
use nbd_topology::{NodeName, ReplicaId, Term};

pub use servers::ConfiguredNode;

/// Contacts of one shard. A shard has at most 7 replicas by configuration, and a few more while
/// they are replaced; each may be known by its configured address and by another from each of the
/// others. Past it, addresses that are told are not learnt.
pub const CONTACTS_MAX: usize = 64;

/// A replica and where its node's gRPC is, as a node says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeName,
    /// Host and port, seen from whoever says so.
    pub grpc: String,
    /// Where the node's NBD server is, in the same way, if that was said.
    pub nbd: Option<String>,
}

/// What a node says of the shard. `serving` implies that `leader` is the node's own `replica`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// The node's own replica, once it has one.
    pub replica: Option<ReplicaId>,
    /// The node's term.
    pub term: Term,
    /// Who leads in it, if the node knows.
    pub leader: Option<Place>,
    /// The node itself leads, and can be asked.
    pub serving: bool,
    /// Members of the group.
    pub members: Vec<Place>,
}

/// What is known of one shard.
#[derive(Debug, Clone)]
pub struct Routes {
    /// By address. Never empties: configured ones stay.
    contacts: BTreeMap<String, Contact>,
    route: Route,
}

#[derive(Debug, Clone, Default)]
struct Contact {
    configured: bool,
    /// A stream from there lasts, and has said what `view` holds.
    open: bool,
    /// What was last said there, also by a stream that is lost.
    view: Option<View>,
}

/// Somebody says that somebody leads.
struct Claim {
    term: Term,
    /// Its own word.
    own: bool,
    leader: LeaderAt,
}

impl Routes {
    /// Nothing is known yet but these addresses.
    pub fn new(configured: impl IntoIterator<Item = String>) -> Self {
        let contact = || Contact { configured: true, ..Contact::default() };
        let contacts = configured.into_iter().map(|address| (address, contact())).collect();
        Self { contacts, route: Route::default() }
    }

    /// The route as of now.
    #[must_use]
    pub const fn route(&self) -> &Route {
        &self.route
    }

    /// Whether the leader itself says, over a stream that lasts, that it can be asked.
    #[must_use]
    pub fn is_confirmed(&self) -> bool {
        let leader = self.route.leader.as_ref();
        leader.is_some_and(|leader| self.own_word(leader.replica) == Some(true))
    }

    /// The addresses to keep streams open from.
    pub fn contacts(&self) -> impl Iterator<Item = &str> {
        self.contacts.keys().map(String::as_str)
    }

    /// Whether this address is one of them.
    #[must_use]
    pub fn is_contact(&self, address: &str) -> bool {
        self.contacts.contains_key(address)
    }

    /// Whether a stream from this address lasts.
    #[must_use]
    pub fn is_open(&self, address: &str) -> bool {
        self.contacts.get(address).is_some_and(|contact| contact.open)
    }

    /// How many streams last.
    #[must_use]
    pub fn open_count(&self) -> usize {
        self.open().count()
    }

    /// A stream from this address says so. Ignored if it is no contact (any more).
    pub fn said(&mut self, address: &str, view: View) {
        let Some(contact) = self.contacts.get_mut(address) else { return };
        let told: Vec<_> =
            view.members.iter().chain(&view.leader).map(|place| place.grpc.clone()).collect();
        (contact.open, contact.view) = (true, Some(view));
        for address in told {
            if self.contacts.len() < CONTACTS_MAX {
                self.contacts.entry(address).or_default();
            }
        }
        self.settle();
    }

    /// The stream from this address has ended, or none comes about.
    pub fn lost(&mut self, address: &str) {
        if let Some(contact) = self.contacts.get_mut(address) {
            contact.open = false;
            self.settle();
        }
    }

    fn settle(&mut self) {
        self.route = self.decide();
        self.forget();
        debug_assert!(self.contacts.len() <= CONTACTS_MAX.max(self.configured_count()));
    }

    fn configured_count(&self) -> usize {
        self.contacts.values().filter(|contact| contact.configured).count()
    }

    /// What nodes say over streams that last.
    fn open(&self) -> impl Iterator<Item = (&str, &View)> {
        self.contacts.iter().filter_map(|(address, contact)| {
            let view = contact.view.as_ref().filter(|_| contact.open)?;
            Some((address.as_str(), view))
        })
    }

    /// Whether a replica says itself that it serves. `None` if no stream from it lasts.
    fn own_word(&self, replica: ReplicaId) -> Option<bool> {
        let own = self.open().filter(|(_, view)| view.replica == Some(replica));
        own.map(|(_, view)| view.serving).reduce(|one, other| one || other)
    }

    fn decide(&self) -> Route {
        let now = &self.route;
        let known = self.open().map(|(_, view)| view.term).max();
        let stands =
            now.leader.as_ref().is_some_and(|leader| self.own_word(leader.replica) != Some(false));
        // Of equals the one that is routed to already, lest two addresses of it take turns.
        let rank =
            |claim: &Claim| (claim.term, claim.own, Some(&claim.leader) == now.leader.as_ref());
        let best = self.claims().max_by(|one, other| rank(one).cmp(&rank(other)));
        // The term of what was found before is nobody's any more: the cluster was made anew.
        let bygone = known < Some(now.term);
        match best {
            Some(Claim { term, own, leader }) if term >= now.term || !stands || (own && bygone) => {
                Route { term, leader: Some(leader), serving: false }
            }
            _ if stands => now.clone(),
            _ => Route { term: known.unwrap_or(now.term), leader: None, serving: false },
        }
    }

    fn claims(&self) -> impl Iterator<Item = Claim> {
        self.open().filter_map(|(address, view)| {
            let Place { replica, node, grpc, .. } = view.leader.clone()?;
            let grpc = if view.serving {
                address.to_owned()
            } else if self.own_word(replica).is_none() {
                self.address_of(replica).map_or(grpc, str::to_owned)
            } else {
                return None;
            };
            let leader = LeaderAt { replica, node, grpc, local: false };
            Some(Claim { term: view.term, own: view.serving, leader })
        })
    }

    /// Where a replica's own stream came from last: an address that is known to work from here.
    fn address_of(&self, replica: ReplicaId) -> Option<&str> {
        let own = |contact: &Contact| contact.view.as_ref().and_then(|view| view.replica);
        let mut contacts = self.contacts.iter();
        let (address, _) = contacts.find(|(_, contact)| own(contact) == Some(replica))?;
        Some(address)
    }

    /// Drops addresses that were learnt and that nobody tells of any more. While nobody tells of
    /// anybody, all are kept: they are the way back in.
    fn forget(&mut self) {
        let told: BTreeSet<String> = self
            .open()
            .flat_map(|(_, view)| view.members.iter().chain(&view.leader))
            .map(|place| place.grpc.clone())
            .collect();
        if !told.is_empty() {
            self.contacts.retain(|address, contact| {
                contact.configured || contact.open || told.contains(address)
            });
        }
    }
}
