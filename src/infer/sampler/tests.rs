//! The books, driven by a fake model.

mod world;

use super::{
    super::{
        request::{Choice, PromptTargets, Stop, Wanted},
        step::PAGE,
    },
    *,
};
use proptest::prelude::*;
use std::collections::BTreeSet;
use world::{VOCABULARY, World};

const LIMITS: Limits = Limits { ranks: 1, pages: 64, sequences: 8, tokens: 64 };

fn request(prompt: usize, count: usize, max_new_tokens: usize) -> SampleRequest {
    SampleRequest {
        prompt: (0..prompt as i64).map(|i| i * i % 11).collect(),
        count,
        max_new_tokens,
        choice: Choice { temperature: 1.0, top_p: 1.0, top_k: None },
        seed: 5,
        stop: Stop::default(),
        wanted: Wanted::default(),
    }
}

#[test]
fn a_prompt_is_computed_once_and_its_full_pages_are_shared() {
    let mut world = World::new(LIMITS, 1);
    let request = request(40, 3, 20);
    world.submit(1, None, &request).unwrap();
    let step = world.plan().unwrap();
    let run = &step.ranks[0].runs[0];
    assert_eq!((step.ranks[0].runs.len(), run.ids.len(), run.draws.len()), (1, 40, 3));
    // 59 tokens are 4 pages, of which two are shared.
    assert_eq!(world.sampler.counts().pages, 2 + 3 * 2);
    let results = world.compute(&step);
    world.apply(&results);
    let step = world.plan().unwrap();
    let runs = &step.ranks[0].runs;
    assert_eq!(runs.len(), 3);
    assert!(
        runs.iter().all(|run| run.ids.len() == 1 && run.first == 40 && run.pages[..2] == runs[0].pages[..2])
    );
    let copies: Vec<(u32, u32)> = runs[1..].iter().map(|run| (runs[0].pages[2], run.pages[2])).collect();
    assert_eq!(step.ranks[0].copies, copies);
    assert_eq!(world.plan().as_ref(), Some(&step), "a step that was not carried out is planned again");
    let results = world.compute(&step);
    world.apply(&results);
    assert_eq!(world.plan().unwrap().ranks[0].copies, []);
    world.run();
    world.assert_reply(1, &request, None);
    world.assert_empty();
}

#[test]
fn a_prompt_is_scored_alone_and_in_parts() {
    let wanted = Wanted {
        prompt: true,
        prompt_top: 3,
        new_top: 0,
        prompt_targets: Some(PromptTargets { ids: (0..198).map(|i| i % 9 - 1).collect(), k: 2 }),
    };
    for (count, wanted) in [(1, wanted.clone()), (3, wanted), (2, Wanted::default())] {
        let mut world = World::new(LIMITS, 1);
        let request = SampleRequest { wanted, ..request(100, count, 0) };
        world.submit(1, Some(4), &request).unwrap();
        assert_eq!(world.run(), 2);
        world.assert_reply(1, &request, Some(4));
        assert!(!world.tokens.contains_key(&1));
        world.assert_empty();
    }
    let one = Wanted { prompt: true, prompt_top: 2, ..Wanted::default() };
    let one = SampleRequest { wanted: one, ..request(1, 1, 2) };
    let mut world = World::new(LIMITS, 1);
    world.submit(1, None, &one).unwrap();
    world.run();
    world.assert_reply(1, &one, None);
}

#[test]
fn more_continuations_than_fit_together_all_come() {
    let limits = Limits { ranks: 2, pages: 9, ..LIMITS };
    let mut world = World::new(limits, 1);
    let wanted = Wanted { prompt: true, new_top: 2, ..Wanted::default() };
    let request = SampleRequest { wanted, ..request(20, 11, 30) };
    world.submit(1, Some(0), &request).unwrap();
    world.run();
    world.assert_reply(1, &request, Some(0));
    world.assert_empty();
}

#[test]
fn a_request_begins_where_most_pages_are_free() {
    let mut world = World::new(Limits { ranks: 3, ..LIMITS }, 1);
    for (ticket, prompt) in [(1, 60), (2, 20), (3, 5), (4, 5)] {
        world.submit(ticket, None, &request(prompt, 1, 10)).unwrap();
    }
    let step = world.plan().unwrap();
    let lengths = step.ranks.iter().map(|rank| rank.runs.iter().map(|run| run.ids.len()).collect::<Vec<_>>());
    assert_eq!(lengths.collect::<Vec<_>>(), [vec![57], vec![20], vec![5, 5]]);
}

#[test]
fn a_request_that_can_never_fit_is_refused_and_one_that_fits_exactly_is_not() {
    let mut world = World::new(Limits { pages: 4, ..LIMITS }, 1);
    let refused = world.submit(1, None, &request(40, 1, 26)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "prompt: 40 tokens, and max_new_tokens 26: the KV cache of a rank has room for 64 tokens; shorten the prompt \
         or lower max_new_tokens"
    );
    assert!(world.submit(1, None, &request(40, 1, usize::MAX)).is_err());
    let exact = request(40, 1, 25);
    world.submit(1, None, &exact).unwrap();
    assert_eq!(world.submit(1, None, &exact), Err(SampleError::Ticket(1)));
    world.run();
    world.assert_reply(1, &exact, None);
}

#[test]
fn an_output_that_is_not_finite_ends_its_request_alone() {
    let mut world = World::new(LIMITS, 1);
    let (broken, whole) = (request(20, 3, 9), request(30, 2, 9));
    world.submit(1, None, &broken).unwrap();
    world.submit(2, None, &whole).unwrap();
    world.step();
    let step = world.plan().unwrap();
    let mut results = world.compute(&step);
    results[0].runs[1].is_broken = true;
    world.apply(&results);
    assert_eq!(world.ends[&1], Err(SampleError::NotFinite));
    world.run();
    world.assert_reply(2, &whole, None);
    world.assert_empty();
}

#[test]
fn nothing_is_said_of_a_request_after_it_was_cancelled() {
    let mut world = World::new(LIMITS, 1);
    let stays = request(30, 2, 9);
    for ticket in [1, 3] {
        world.submit(ticket, None, &request(20, 3, 9)).unwrap();
    }
    world.submit(2, None, &stays).unwrap();
    world.step();
    let told = world.tokens[&1].len();
    let step = world.plan().unwrap();
    assert!(world.sampler.cancel(1) && !world.sampler.cancel(1) && !world.sampler.cancel(9));
    let results = world.compute(&step);
    world.apply(&results);
    assert!(world.sampler.cancel(3));
    let next = world.plan().unwrap();
    assert_eq!(next.ranks[0].runs.len(), 2, "of the request that stays");
    world.run();
    assert_eq!(world.tokens[&1].len(), told);
    assert_eq!(world.ends.keys().copied().collect::<Vec<_>>(), [2]);
    world.assert_reply(2, &stays, None);
    world.assert_empty();
}

#[test]
fn adapters_that_do_not_fit_together_take_turns() {
    let mut world = World::new(LIMITS, 2);
    let request = request(10, 1, 12);
    for ticket in 0..5 {
        world.submit(ticket, Some(ticket as u8), &request).unwrap();
    }
    world.submit(9, None, &request).unwrap();
    let mut served = BTreeMap::<u8, Vec<usize>>::new();
    for number in 0..20 {
        let step = world.plan().unwrap();
        step.adapters.iter().for_each(|key| served.entry(*key).or_default().push(number));
        let bases = step.ranks[0].runs.iter().filter(|run| run.adapter.is_none()).count();
        assert_eq!(bases, usize::from(number < 12), "the base needs no turn");
        let results = world.compute(&step);
        world.apply(&results);
    }
    for (key, steps) in &served {
        assert!(steps.windows(2).all(|pair| pair[1] - pair[0] <= 3), "adapter {key} in steps {steps:?}");
    }
    assert_eq!(served.len(), 5);
    world.run();
    (0..5).for_each(|ticket| world.assert_reply(ticket, &request, Some(ticket as u8)));
    world.submit(7, Some(1), &request).unwrap();
    world.together = 0;
    world.run();
    world.assert_reply(7, &request, Some(1));
}

/// Steps in which a request comes to its end if it has the machine for itself.
fn steps_alone(request: &SampleRequest, limits: &Limits) -> usize {
    let part = limits.tokens - limits.sequences + 1;
    request.count * (request.prompt.len().div_ceil(part) + request.max_new_tokens.max(1))
}

#[test]
fn a_large_request_is_not_overtaken_for_ever() {
    let limits = Limits { pages: 8, ..LIMITS };
    let mut world = World::new(limits, 1);
    let (small, large) = (request(10, 1, 20), request(70, 1, 50));
    for ticket in 0..4 {
        world.submit(ticket, Some(0), &small).unwrap();
    }
    world.submit(100, Some(1), &large).unwrap();
    let bound = 2 * (4 * steps_alone(&small, &limits) + steps_alone(&large, &limits));
    for number in 0..bound as u64 {
        world.submit(1000 + number, Some((number % 2) as u8), &small).unwrap();
        world.step();
    }
    world.assert_reply(100, &large, Some(1));
    assert!(world.sampler.counts().waiting > 0);
}

fn any_request() -> impl Strategy<Value = SampleRequest> {
    let wanted = (any::<bool>(), 0usize..3, 0usize..3, proptest::option::of(0usize..3));
    let stop = (
        proptest::collection::vec(0i64..VOCABULARY as i64, 0..2),
        proptest::collection::vec("[abcé]{1,4}", 0..3),
    );
    let prompt = proptest::collection::vec(0i64..VOCABULARY as i64, 1..70);
    (prompt, 1usize..7, 0usize..40, any::<u64>(), stop, wanted).prop_map(
        |(prompt, count, max_new_tokens, seed, (ids, texts), (scored, prompt_top, new_top, k))| {
            let targets = k.map(|k| PromptTargets {
                ids: (0..((prompt.len() - 1) * k) as i64).map(|i| i % 8 - 1).collect(),
                k,
            });
            SampleRequest {
                prompt,
                count,
                max_new_tokens,
                choice: Choice { temperature: (seed % 3) as f64, top_p: 1.0, top_k: None },
                seed,
                stop: Stop { ids, texts },
                wanted: Wanted { prompt: scored, prompt_top, new_top, prompt_targets: targets },
            }
        },
    )
}

fn any_limits() -> impl Strategy<Value = Limits> {
    (1usize..4, 1u32..24, 1usize..8, 0usize..60).prop_map(|(ranks, pages, sequences, more)| Limits {
        ranks,
        pages,
        sequences,
        tokens: sequences + more,
    })
}

/// A request with its adapter, the step before which it comes, and the one before which it is cancelled.
type Arrival = (SampleRequest, Option<u8>, usize, Option<usize>);

fn any_arrivals() -> impl Strategy<Value = Vec<Arrival>> {
    let cancel = proptest::option::weighted(0.2, 0usize..60);
    let arrival = (any_request(), proptest::option::weighted(0.8, 0u8..4), 0usize..40, cancel);
    proptest::collection::vec(arrival, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_every_request_gets_what_it_gets_alone(
        limits in any_limits(), together in 1usize..4, arrivals in any_arrivals(),
    ) {
        let (mut world, mut twin) = (World::new(limits, together), World::new(limits, together));
        let (mut accepted, mut cancelled) = (BTreeSet::new(), BTreeSet::new());
        // The bound on all steps: each request in its turn, alone, with its adapter's turn each time.
        let bound: usize = arrivals.iter().map(|(request, ..)| 4 * steps_alone(request, &limits)).sum();
        let mut number = 0;
        loop {
            for (ticket, (request, adapter, come, cancel)) in (0..).zip(&arrivals) {
                if *come == number {
                    let has_room = (request.prompt.len() + request.max_new_tokens.max(1) - 1).div_ceil(PAGE)
                        <= limits.pages as usize;
                    let submitted = world.submit(ticket, *adapter, request);
                    prop_assert_eq!(submitted.is_ok(), has_room);
                    prop_assert_eq!(twin.submit(ticket, *adapter, request), submitted.clone());
                    accepted.extend(submitted.is_ok().then_some(ticket));
                }
                if *cancel == Some(number) && world.sampler.cancel(ticket) {
                    twin.sampler.cancel(ticket);
                    cancelled.insert(ticket);
                }
            }
            let step = world.plan();
            prop_assert_eq!(&step, &twin.plan(), "equal requests give equal plans");
            if let Some(step) = &step {
                let results = world.compute(step);
                world.apply(&results);
                twin.apply(&results);
            } else {
                prop_assert!(world.sampler.is_empty(), "requests are left, and nothing is done");
                if number > 60 {
                    break;
                }
            }
            number += 1;
            prop_assert!(number <= bound + 100, "more than {} steps", bound);
        }
        for (ticket, (request, adapter, ..)) in (0..).zip(&arrivals) {
            if cancelled.contains(&ticket) {
                prop_assert!(!world.ends.contains_key(&ticket));
            } else if accepted.contains(&ticket) {
                world.assert_reply(ticket, request, *adapter);
            }
        }
        world.assert_empty();
    }
}
