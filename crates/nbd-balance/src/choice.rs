//! In which order load balancers are asked to take a client.

use std::cmp::Reverse;

/// What is known of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Whether it greeted when it was last asked.
    pub(crate) up: bool,
    /// Clients that it has, and those that are just being given to it.
    pub(crate) connections: usize,
    /// When it was last chosen: the number of that choice.
    pub(crate) chosen: u64,
}

/// Places of `candidates`, best first: those that greet before the others, and of these the one
/// with the fewest clients; of several, the one not chosen for the longest time. All are in it:
/// what was known may be old.
pub(crate) fn order(candidates: &[Candidate]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..candidates.len()).collect();
    order.sort_by_key(|&place| {
        let Candidate { up, connections, chosen } = candidates[place];
        (Reverse(up), connections, chosen)
    });
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn candidate(up: bool, connections: usize, chosen: u64) -> Candidate {
        Candidate { up, connections, chosen }
    }

    #[test]
    fn the_fewest_clients_come_first_and_then_the_longest_wait() {
        let candidates = [candidate(true, 2, 1), candidate(true, 1, 9), candidate(true, 1, 4)];
        assert_eq!(order(&candidates), [2, 1, 0]);
    }

    // One that was killed has no clients: it must not be asked first for that.
    #[test]
    fn who_does_not_greet_comes_last_and_is_not_left_out() {
        let candidates = [candidate(false, 0, 0), candidate(true, 900, 7)];
        assert_eq!(order(&candidates), [1, 0]);
        assert_eq!(order(&[candidate(false, 3, 0), candidate(false, 1, 0)]), [1, 0]);
    }

    #[test]
    fn clients_that_come_and_go_reach_all_in_turn() {
        let mut candidates = [candidate(true, 0, 0); 3];
        let mut taken = Vec::new();
        for number in 1..=6 {
            let first = order(&candidates)[0];
            candidates[first].chosen = number;
            taken.push(first);
        }
        assert_eq!(taken, [0, 1, 2, 0, 1, 2]);
    }
}
