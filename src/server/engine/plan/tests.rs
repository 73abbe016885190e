//! The order of micro-batches, by hand and for any requests.

use super::*;
use proptest::prelude::*;

/// Requests by number from 0: the adapter, and the data of a pass with its direction, or `None` for a single one.
type Requests = Vec<(usize, Option<(bool, Vec<Size>)>)>;

fn model(adapter: usize) -> ModelId {
    ModelId::new(format!("m{adapter}")).unwrap()
}

fn sizes(tokens: &[usize]) -> Vec<Size> {
    tokens.iter().map(|&tokens| Size { tokens, k: 1 }).collect()
}

fn pass(adapter: usize, tokens: &[usize]) -> (usize, Option<(bool, Vec<Size>)>) {
    (adapter, Some((true, sizes(tokens))))
}

fn forward(adapter: usize, tokens: &[usize]) -> (usize, Option<(bool, Vec<Size>)>) {
    (adapter, Some((false, sizes(tokens))))
}

fn push(plan: &mut Plan, requests: &Requests) {
    for (number, (adapter, data)) in requests.iter().enumerate() {
        let kind = data.as_ref().map_or(Kind::Single, |&(backward, _)| Kind::Pass { backward });
        plan.push(model(*adapter), number as u64, kind);
    }
}

/// Everything that comes, to the end.
fn all(limits: Limits, requests: &Requests) -> Vec<Next> {
    let mut plan = Plan::new(limits);
    push(&mut plan, requests);
    std::iter::from_fn(|| {
        let next = plan.next(&|_| true)?;
        if let Next::Begin { model, request } = &next
            && let Some((backward, data)) = &requests[*request as usize].1
        {
            plan.open(model, *request, *backward, data);
        }
        Some(next)
    })
    .collect()
}

/// `b0` for the begin of request 0; of a micro-batch the data of each rank, `request.datum`.
fn told(limits: Limits, requests: &Requests) -> Vec<String> {
    let rank = |dealt: &Vec<Dealt>| {
        dealt.iter().map(|d| format!("{}.{}", d.request, d.datum)).collect::<Vec<_>>().join(" ")
    };
    let text = |next: &Next| match next {
        Next::Begin { request, .. } => format!("b{request}"),
        Next::MicroBatch(of) => of.ranks.iter().map(rank).collect::<Vec<_>>().join(" | "),
    };
    all(limits, requests).iter().map(text).collect()
}

const ONE: Limits = Limits { ranks: 1, tokens: 10 };
const TWO: Limits = Limits { ranks: 2, tokens: 10 };

#[test]
fn passes_of_several_adapters_share_a_micro_batch() {
    let requests = vec![pass(0, &[3, 4]), pass(1, &[2]), pass(2, &[5])];
    assert_eq!(told(ONE, &requests), ["b0", "b1", "b2", "0.0 1.0 2.0", "0.1"]);
    // The longest after the first, each to the rank with the fewest tokens.
    assert_eq!(told(TWO, &requests), ["b0", "b1", "b2", "0.0 0.1 | 1.0 2.0"]);
}

#[test]
fn passes_of_one_adapter_join_up_to_its_next_step() {
    let requests = vec![pass(0, &[2]), pass(0, &[3]), (0, None), pass(0, &[1])];
    assert_eq!(told(ONE, &requests), ["b0", "b1", "0.0 1.0", "b2", "b3", "3.0"]);
}

#[test]
fn a_long_pass_holds_back_no_other_adapter() {
    let requests = vec![pass(0, &[10; 4]), pass(1, &[10, 10]), pass(2, &[10])];
    let seen = told(ONE, &requests);
    assert_eq!(seen[3..], ["0.0", "1.0", "2.0", "0.1", "1.1", "0.2", "0.3"]);
}

#[test]
fn steps_go_first_so_that_passes_behind_them_join() {
    let requests = vec![pass(0, &[5]), (1, None), pass(1, &[5]), (2, None), (2, None), pass(2, &[5])];
    // One of each adapter: many steps of one hold up no pass.
    assert_eq!(told(TWO, &requests), ["b0", "b1", "b2", "b3", "0.0 | 2.0", "b4", "b5", "5.0 | "]);
}

#[test]
fn data_of_other_kinds_share_no_micro_batch() {
    let of_two = vec![Size { tokens: 2, k: 1 }, Size { tokens: 2, k: 3 }];
    let requests = vec![pass(0, &[2]), forward(1, &[2]), forward(0, &[1]), (2, Some((false, of_two)))];
    let seen = told(ONE, &requests);
    assert_eq!(seen, ["b0", "b1", "b3", "0.0", "b2", "2.0 1.0 3.0", "3.1"]);
}

#[test]
fn a_refused_pass_and_an_empty_plan_leave_nothing() {
    let mut plan = Plan::new(ONE);
    assert_eq!(plan.next(&|_| true), None);
    push(&mut plan, &vec![pass(0, &[1]), (0, None)]);
    assert_eq!(plan.adapters(), 1);
    // Nobody opens it.
    for request in 0..2 {
        assert_eq!(plan.next(&|_| true), Some(Next::Begin { model: model(0), request }));
    }
    assert_eq!((plan.next(&|_| true), plan.adapters()), (None, 0));
}

#[test]
fn adapters_that_do_not_fit_together_take_turns() {
    let mut plan = Plan::new(TWO);
    let requests = vec![pass(0, &[4, 4, 4]), pass(1, &[4]), pass(2, &[4])];
    push(&mut plan, &requests);
    let mut seen = Vec::new();
    while let Some(next) = plan.next(&|models| models.len() <= 2) {
        match next {
            Next::Begin { model, request } => {
                let (backward, data) = requests[request as usize].1.as_ref().unwrap();
                plan.open(&model, request, *backward, data);
            }
            Next::MicroBatch(of) => seen.push(of.adapters),
        }
    }
    assert_eq!(seen, [vec![model(0), model(1)], vec![model(2)]]);
}

#[test]
fn a_micro_batch_without_some_requests_names_the_adapters_that_are_left() {
    let dealt = |adapter, request| Dealt { adapter, request, datum: 0 };
    let of = |adapters: &[usize], ranks| MicroBatch {
        backward: true,
        k: 1,
        adapters: adapters.iter().map(|&adapter| model(adapter)).collect(),
        ranks,
    };
    let whole = of(&[0, 1, 2], vec![vec![dealt(0, 5), dealt(1, 6)], vec![dealt(2, 7), dealt(2, 8)]]);
    let expected = of(&[0, 2], vec![vec![dealt(0, 5)], vec![dealt(1, 8)]]);
    assert_eq!(whole.clone().without(&[6, 7]), Some(expected));
    assert_eq!(whole.without(&[5, 6, 7, 8]), None);
}

#[test]
fn a_request_to_sample_waits_for_updates_and_not_for_passes() {
    let mut plan = Plan::new(ONE);
    let push = |plan: &mut Plan, of, request, kind| plan.push(model(of), request, kind);
    push(&mut plan, 0, 0, Kind::Pass { backward: true });
    push(&mut plan, 0, 1, Kind::Sample);
    push(&mut plan, 0, 2, Kind::Single);
    push(&mut plan, 0, 3, Kind::Sample);
    push(&mut plan, 0, 4, Kind::Sample);
    push(&mut plan, 1, 5, Kind::Sample);
    assert_eq!(plan.samples(), [(model(1), 5)]);
    assert_eq!(plan.next(&|_| true), Some(Next::Begin { model: model(0), request: 0 }));
    plan.open(&model(0), 0, true, &sizes(&[10, 10]));
    assert_eq!(plan.samples(), [(model(0), 1)]);
    for _ in 0..2 {
        assert!(matches!(plan.next(&|_| true), Some(Next::MicroBatch(_))));
        assert!(plan.samples().is_empty() && !plan.is_empty());
    }
    assert_eq!(plan.next(&|_| true), Some(Next::Begin { model: model(0), request: 2 }));
    assert_eq!(plan.samples(), [(model(0), 3), (model(0), 4)]);
    assert!(plan.is_empty() && plan.adapters() == 0);
}

#[test]
fn a_cancelled_pass_gives_no_more_data() {
    let mut plan = Plan::new(ONE);
    push(&mut plan, &vec![pass(0, &[10, 10]), (0, None)]);
    assert!(matches!(plan.next(&|_| true), Some(Next::Begin { request: 0, .. })));
    plan.open(&model(0), 0, true, &sizes(&[10, 10]));
    assert!(matches!(plan.next(&|_| true), Some(Next::MicroBatch(_))));
    plan.cancel(&model(0), 0);
    assert_eq!(plan.next(&|_| true), Some(Next::Begin { model: model(0), request: 1 }));
}

fn requests() -> impl Strategy<Value = Requests> {
    let size = (1usize..=16, 1usize..3).prop_map(|(tokens, k)| Size { tokens, k });
    let data = (any::<bool>(), proptest::collection::vec(size, 1..12));
    proptest::collection::vec((0usize..5, proptest::option::weighted(0.7, data)), 0..20)
}

proptest! {
    #[test]
    fn every_datum_is_computed_once_in_order_and_within_bounds(requests in requests(), ranks in 1usize..5) {
        let limits = Limits { ranks, tokens: 16 };
        let seen = all(limits, &requests);
        prop_assert_eq!(&seen, &all(limits, &requests));
        let mut left: Vec<usize> =
            requests.iter().map(|(_, data)| data.as_ref().map_or(0, |data| data.1.len())).collect();
        let (mut begun, mut computed) = (vec![false; requests.len()], HashSet::new());
        // Turns since the first request of an adapter could have been served.
        let mut waited = [0; 5];
        for next in &seen {
            match next {
                Next::Begin { request, .. } => {
                    let number = *request as usize;
                    let (adapter, data) = &requests[number];
                    prop_assert!(!std::mem::replace(&mut begun[number], true));
                    for (before, (of, earlier)) in requests[..number].iter().enumerate() {
                        prop_assert!(of != adapter || begun[before], "begins in order");
                        let same = earlier.as_ref().zip(data.as_ref()).is_some_and(|(a, b)| a.0 == b.0);
                        prop_assert!(of != adapter || same || left[before] == 0, "ends in order");
                    }
                }
                Next::MicroBatch(MicroBatch { backward, k, adapters, ranks: dealt }) => {
                    prop_assert_eq!(dealt.len(), ranks);
                    prop_assert!(adapters.is_sorted() && dealt.iter().flatten().count() > 0);
                    for dealt in dealt {
                        let mut tokens = 0;
                        for datum in dealt {
                            let (adapter, data) = &requests[datum.request as usize];
                            let (direction, data) = data.as_ref().unwrap();
                            prop_assert!(begun[datum.request as usize] && direction == backward);
                            prop_assert_eq!((data[datum.datum].k, &adapters[datum.adapter]), (*k, &model(*adapter)));
                            prop_assert!(computed.insert((datum.request, datum.datum)), "once");
                            tokens += data[datum.datum].tokens;
                            left[datum.request as usize] -= 1;
                        }
                        prop_assert!(tokens <= limits.tokens);
                    }
                    for (adapter, waited) in waited.iter_mut().enumerate() {
                        let served = adapters.contains(&model(adapter));
                        *waited = if served { 0 } else { *waited + 1 };
                        let waits = requests.iter().zip(&left).zip(&begun);
                        let mut waits = waits.filter(|((request, left), begun)| {
                            request.0 == adapter && **left > 0 && **begun
                        });
                        if waits.next().is_none() {
                            *waited = 0;
                        }
                        prop_assert!(*waited < 5, "adapter {} waits for {} turns", adapter, waited);
                    }
                }
            }
        }
        prop_assert!(begun.iter().all(|&begun| begun) && left.iter().all(|&left| left == 0));
    }
}
