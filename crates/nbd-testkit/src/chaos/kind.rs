//! What can happen in a run of chaos, and how often.

use std::fmt;
use std::time::Duration;

use rand::Rng as _;
use rand::rngs::StdRng;

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// SIGKILL, and a start.
    Kill,
    /// SIGTERM, and a start.
    Terminate,
    /// SIGSTOP and SIGCONT.
    Pause,
    /// SIGKILL, an empty data directory, and a start.
    Wipe,
    /// The node's connections to all others break, and new ones are refused.
    Cut,
    /// Nothing passes between the node and all others.
    Hold,
    /// Nothing that the node sends reaches the others.
    HoldOut,
    /// Nothing that the others send reaches the node.
    HoldIn,
    /// Connections between the node and one other break, and new ones are refused.
    CutPair,
    /// Nothing passes between the node and one other.
    HoldPair,
    /// What the node sends and receives takes longer.
    Delay,
    /// SIGKILL to all nodes, and a start of all.
    Outage,
    /// SIGKILL to a load balancer, and a start.
    BalancerKill,
    /// SIGTERM to a load balancer, and a start.
    BalancerTerminate,
    /// SIGSTOP and SIGCONT to a load balancer.
    BalancerPause,
}

/// A kind, how often it comes in relation to others, and its least and longest time in
/// milliseconds.
type Share = (Kind, u32, u64, u64);

/// What happens to nodes.
const OF_NODES: [Share; 12] = [
    (Kind::Kill, 25, 0, 2500),
    (Kind::Terminate, 10, 0, 1500),
    (Kind::Pause, 15, 100, 3500),
    (Kind::Wipe, 6, 0, 1000),
    (Kind::Cut, 8, 200, 3500),
    (Kind::Hold, 10, 200, 3500),
    (Kind::HoldOut, 6, 200, 3500),
    (Kind::HoldIn, 6, 200, 3500),
    (Kind::CutPair, 4, 200, 3500),
    (Kind::HoldPair, 4, 200, 3500),
    (Kind::Delay, 3, 500, 2500),
    (Kind::Outage, 3, 0, 1000),
];

/// What happens to load balancers, if clients attach through any.
const OF_BALANCERS: [Share; 3] = [
    (Kind::BalancerKill, 10, 0, 1500),
    (Kind::BalancerTerminate, 10, 0, 1500),
    (Kind::BalancerPause, 5, 100, 3500),
];

impl Kind {
    /// Draws a kind and a length.
    pub(super) fn choose(random: &mut StdRng, balancers: bool) -> (Self, Duration) {
        let of_balancers = if balancers { &OF_BALANCERS[..] } else { &[] };
        let shares = || OF_NODES.iter().chain(of_balancers);
        let mut pick = random.random_range(0..shares().map(|(_, weight, ..)| weight).sum());
        for &(kind, weight, least, most) in shares() {
            if pick < weight {
                return (kind, Duration::from_millis(random.random_range(least..most)));
            }
            pick -= weight;
        }
        unreachable!("the pick is below the sum of the weights")
    }

    /// Whether it hits a load balancer; else it hits a node.
    pub(super) const fn hits_balancer(self) -> bool {
        matches!(self, Self::BalancerKill | Self::BalancerTerminate | Self::BalancerPause)
    }

    /// For people, behind the name of what is hit: whether it led.
    pub(super) const fn role(self, leader: bool) -> &'static str {
        match (self.hits_balancer(), leader) {
            (true, _) => "",
            (false, true) => " (leader)",
            (false, false) => " (follower)",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kill => "kill -9",
            Self::Terminate => "SIGTERM",
            Self::Pause => "SIGSTOP",
            Self::Wipe => "kill -9, wipe",
            Self::Cut => "cut off",
            Self::Hold => "silent",
            Self::HoldOut => "not heard",
            Self::HoldIn => "deaf",
            Self::CutPair => "pair cut",
            Self::HoldPair => "pair silent",
            Self::Delay => "slow",
            Self::Outage => "full outage",
            Self::BalancerKill => "balancer kill -9",
            Self::BalancerTerminate => "balancer SIGTERM",
            Self::BalancerPause => "balancer SIGSTOP",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::SeedableRng as _;

    use super::*;

    #[test]
    fn every_kind_comes_when_it_may() {
        let drawn = |balancers: bool| -> BTreeSet<Kind> {
            let mut random = StdRng::seed_from_u64(1);
            (0..5000).map(|_| Kind::choose(&mut random, balancers).0).collect()
        };
        let (without, with) = (drawn(false), drawn(true));
        assert_eq!(
            (without.len(), with.len()),
            (OF_NODES.len(), OF_NODES.len() + OF_BALANCERS.len())
        );
        assert!(!without.iter().any(|kind| kind.hits_balancer()));
        assert_eq!(with.iter().filter(|kind| kind.hits_balancer()).count(), OF_BALANCERS.len());
    }
}
