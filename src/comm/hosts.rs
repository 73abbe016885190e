//! The route of an all-gather over several hosts, by which each piece crosses the network once per host, not once per
//! rank. Pure.
//!
//! MPI's non-blocking all-gather sends every piece to every rank. Measured with Open MPI 4.1 on two hosts of two
//! ranks, twice the needed bytes crossed the network; with more ranks per host the factor grows. Here the pieces of
//! another host are distributed over the ranks of this one. Each rank fetches its own ([`Route::across`]), then the
//! ranks of a host exchange them ([`Route::within`]) through memory.

/// A transfer of one piece: the piece, and the rank at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Hop {
    pub piece: usize,
    pub peer: usize,
}

/// Transfers of a rank that run at the same time. Between two ranks both list them in the same order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Round {
    pub sent: Vec<Hop>,
    pub received: Vec<Hop>,
}

/// Transfers of a rank in an all-gather.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Route {
    /// Transfers between hosts.
    pub across: Round,
    /// Transfers between ranks of a host, after the first round.
    pub within: Round,
}

impl Route {
    /// The route of `rank` in a group whose ranks are on `hosts` (any numbers). `None` where pieces cross once in any
    /// case: all ranks are on one host, or each is on its own.
    pub fn new(hosts: &[usize], rank: usize) -> Option<Self> {
        let of = |host: usize| (0..hosts.len()).filter(|&rank| hosts[rank] == host).collect::<Vec<_>>();
        let own = of(hosts[rank]);
        let shared = hosts.iter().any(|&host| of(host).len() > 1);
        if own.len() == hosts.len() || !shared {
            return None;
        }
        // The rank of `host` that fetches the piece of `from`, a rank of another host.
        let fetches = |from: usize, host: usize| {
            let place = of(hosts[from]).iter().position(|&rank| rank == from).unwrap_or_default();
            let there = of(host);
            there[place % there.len()]
        };
        let mut others: Vec<usize> = hosts.iter().copied().filter(|&host| host != hosts[rank]).collect();
        others.sort_unstable();
        others.dedup();
        let sent = others.iter().map(|&host| Hop { piece: rank, peer: fetches(rank, host) }).collect();
        let fetched = |by: usize| {
            (0..hosts.len()).filter(move |&from| hosts[from] != hosts[by] && fetches(from, hosts[by]) == by)
        };
        let received = fetched(rank).map(|from| Hop { piece: from, peer: from }).collect();
        let has = |rank: usize| std::iter::once(rank).chain(fetched(rank));
        let neighbours = || own.iter().copied().filter(|&peer| peer != rank);
        let within = Round {
            sent: neighbours().flat_map(|peer| has(rank).map(move |piece| Hop { piece, peer })).collect(),
            received: neighbours().flat_map(|peer| has(peer).map(move |piece| Hop { piece, peer })).collect(),
        };
        Some(Self { across: Round { sent, received }, within })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_host_or_one_rank_per_host_needs_no_route() {
        assert_eq!(Route::new(&[7], 0), None);
        assert_eq!(Route::new(&[3, 3, 3], 1), None);
        assert_eq!(Route::new(&[0, 1, 2], 1), None);
    }

    #[test]
    fn two_hosts_of_two() {
        let hop = |piece, peer| Hop { piece, peer };
        let route = Route::new(&[0, 0, 1, 1], 1).unwrap();
        assert_eq!(route.across, Round { sent: vec![hop(1, 3)], received: vec![hop(3, 3)] });
        let within = Round { sent: vec![hop(1, 0), hop(3, 0)], received: vec![hop(0, 0), hop(2, 0)] };
        assert_eq!(route.within, within);
    }

    proptest! {
        #[test]
        fn every_piece_arrives_once_and_crosses_once(hosts in prop::collection::vec(0usize..4, 2..14)) {
            let routes: Vec<Option<Route>> = (0..hosts.len()).map(|rank| Route::new(&hosts, rank)).collect();
            prop_assert!(routes.iter().all(Option::is_some) || routes.iter().all(Option::is_none));
            let Some(routes) = routes.into_iter().collect::<Option<Vec<_>>>() else { return Ok(()) };
            let mut crossed = std::collections::BTreeMap::new();
            for (rank, route) in routes.iter().enumerate() {
                let mut has = vec![rank];
                for round in [&route.across, &route.within] {
                    // A rank sends only pieces that it has.
                    for hop in &round.sent {
                        prop_assert!(has.contains(&hop.piece));
                    }
                    for hop in &round.received {
                        has.push(hop.piece);
                    }
                }
                has.sort_unstable();
                prop_assert_eq!(has, (0..hosts.len()).collect::<Vec<_>>());
                for hop in &route.across.received {
                    prop_assert_ne!(hosts[hop.peer], hosts[rank]);
                    *crossed.entry((hop.piece, hosts[rank])).or_insert(0) += 1;
                }
                prop_assert!(route.within.received.iter().all(|hop| hosts[hop.peer] == hosts[rank]));
                for (peer, other) in routes.iter().enumerate() {
                    for round in [|route: &Route| route.across.clone(), |route: &Route| route.within.clone()] {
                        let to: Vec<usize> = round(route).sent.iter().filter(|hop| hop.peer == peer).map(|hop| hop.piece).collect();
                        let from = round(other).received;
                        let from: Vec<usize> = from.iter().filter(|hop| hop.peer == rank).map(|hop| hop.piece).collect();
                        prop_assert_eq!(to, from, "{} to {}", rank, peer);
                    }
                }
            }
            prop_assert!(crossed.values().all(|&times| times == 1));
        }
    }
}
