//! Where a shard's volumes are served over NBD.
//!
//! Any member serves them; the leader does so without another hop. Addresses come, in order of
//! trust, from the configuration, from the node itself, and from the other nodes. What is
//! configured counts only where the node was met at the gRPC address that stands beside it: NBD
//! knows of no cluster, and somebody else may have moved in at an address that is stale.

use nbd_front::NbdAt;
use nbd_topology::NodeName;

use super::{Contact, Routes, View};

/// A node as it is configured here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfiguredNode {
    /// Its name.
    pub node: NodeName,
    /// Host and port of its gRPC.
    pub grpc: String,
    /// Host and port of its NBD server.
    pub nbd: String,
}

impl Routes {
    /// The NBD servers to attach to, best first: the leader's, then those of the other members.
    /// There may be several addresses for one node.
    #[must_use]
    pub fn servers(&self, configured: &[ConfiguredNode]) -> Vec<NbdAt> {
        let mut servers = Vec::new();
        for node in self.serving_nodes() {
            let known = self.configured_address(node, configured).into_iter();
            for nbd in known.chain(self.told_addresses(node)) {
                let at = NbdAt { node: node.clone(), nbd: nbd.to_owned() };
                if !servers.contains(&at) {
                    servers.push(at);
                }
            }
        }
        servers
    }

    /// The leader's node, if one is known, and those of the members, as the best informed says.
    fn serving_nodes(&self) -> Vec<&NodeName> {
        let mut nodes: Vec<_> = self.route.leader.iter().map(|leader| &leader.node).collect();
        if let Some(view) = self.best_view() {
            for member in &view.members {
                if !nodes.contains(&&member.node) {
                    nodes.push(&member.node);
                }
            }
        }
        nodes
    }

    /// What was said in the highest term, over a stream that lasts if there is one.
    fn best_view(&self) -> Option<&View> {
        let said =
            self.contacts.values().filter_map(|contact| Some((contact, contact.view.as_ref()?)));
        said.max_by_key(|(contact, view)| (contact.open, view.term, view.serving))
            .map(|(_, view)| view)
    }

    fn configured_address<'a>(
        &self,
        node: &NodeName,
        configured: &'a [ConfiguredNode],
    ) -> Option<&'a str> {
        let configured = configured.iter().find(|configured| configured.node == *node)?;
        let contact = self.contacts.get(&configured.grpc)?;
        (own_node(contact)? == node).then_some(configured.nbd.as_str())
    }

    /// What the node says of itself, and what the best informed one says of it.
    fn told_addresses<'a>(&'a self, node: &'a NodeName) -> impl Iterator<Item = &'a str> {
        let itself = self.contacts.values().filter(|contact| own_node(contact) == Some(node));
        let itself = itself.filter_map(|contact| contact.view.as_ref());
        let views = itself.chain(self.best_view());
        views.filter_map(|view| {
            view.members.iter().find(|member| member.node == *node)?.nbd.as_deref()
        })
    }
}

/// The node whose own replica speaks there, or did so last.
fn own_node(contact: &Contact) -> Option<&NodeName> {
    let view = contact.view.as_ref()?;
    let own = view.members.iter().find(|member| Some(member.replica) == view.replica)?;
    Some(&own.node)
}
