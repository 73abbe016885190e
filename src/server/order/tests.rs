//! Orders: each rule by case, and any order of arrival by property tests.

use super::*;
use proptest::prelude::*;

const LIMIT: Duration = Duration::from_secs(60);

fn body(text: &str) -> BodyHash {
    BodyHash::of(text.as_bytes())
}

/// All requests whose turn has come.
fn drain<R: Clone, T>(order: &mut InOrder<R, T>, now: Instant) -> Vec<T> {
    std::iter::from_fn(|| order.next(now)).collect()
}

#[test]
fn chunks_that_arrive_with_the_first_one_last_run_in_order() {
    let (mut order, now) = (InOrder::new(1, LIMIT), Instant::now());
    for id in [2, 3, 5, 4] {
        assert_eq!(order.submit(id, body("chunk"), id, id, now), Ok(Submitted::New));
        assert_eq!(order.next(now), None);
    }
    assert_eq!((order.next_id(), order.deadline()), (1, Some(now + LIMIT)));
    assert_eq!(order.submit(1, body("chunk"), 1, 1, now), Ok(Submitted::New));
    assert_eq!(drain(&mut order, now), [1, 2, 3, 4, 5]);
    assert_eq!((order.next_id(), order.deadline()), (6, None));
}

#[test]
fn a_missing_request_is_given_up_at_the_limit_and_then_comes_too_late() {
    let (mut order, now) = (InOrder::new(1, LIMIT), Instant::now());
    order.submit(4, body("four"), 'a', 4, now).unwrap();
    order.submit(3, body("three"), 'b', 3, now + LIMIT / 2).unwrap();
    assert!(drain(&mut order, now + LIMIT - Duration::from_millis(1)).is_empty());
    assert_eq!(drain(&mut order, now + LIMIT), [3, 4]);
    let late = order.submit(2, body("two"), 'c', 2, now + LIMIT);
    assert_eq!(late, Err(OrderError::TooLate { seq_id: 2, last: 4 }));
    assert_eq!(order.submit(4, body("four"), 'd', 4, now + LIMIT), Ok(Submitted::Repeat('a')));
}

#[test]
fn an_order_that_is_resumed_begins_with_the_lowest_id_that_comes() {
    let first_limit = Duration::from_secs(2);
    let (mut order, now) = (InOrder::resumed(first_limit, LIMIT), Instant::now());
    for id in [41, 40] {
        order.submit(id, body("chunk"), id, id, now).unwrap();
    }
    assert!(drain(&mut order, now + first_limit / 2).is_empty());
    assert_eq!(drain(&mut order, now + first_limit), [40, 41]);
    // From then on gaps have the usual limit.
    order.submit(43, body("chunk"), 43, 43, now).unwrap();
    assert_eq!(order.deadline(), Some(now + LIMIT));
}

#[test]
fn a_refused_id_is_skipped_and_a_refused_repeat_leaves_its_request_alone() {
    let (mut order, now) = (InOrder::new(1, LIMIT), Instant::now());
    order.submit(3, body("three"), 'a', 3, now).unwrap();
    order.consume(2);
    order.consume(3);
    assert_eq!(order.submit(2, body("two"), 'b', 2, now), Err(OrderError::Consumed(2)));
    assert_eq!(order.next(now), None);
    order.consume(1);
    assert_eq!(drain(&mut order, now), [3]);
    order.consume(4);
    order.submit(5, body("five"), 'c', 5, now).unwrap();
    assert_eq!(drain(&mut order, now), [5]);
    let mut last = InOrder::new(u64::MAX - 1, LIMIT);
    last.submit(u64::MAX - 1, body("last"), 'd', 6, now).unwrap();
    assert_eq!(drain(&mut last, now), [6]);
    last.consume(u64::MAX);
    assert_eq!(last.next_id(), u64::MAX);
}

#[test]
fn an_id_with_another_body_is_an_error() {
    let (mut order, now) = (InOrder::new(1, LIMIT), Instant::now());
    order.submit(1, body("one"), 'a', 1, now).unwrap();
    let other = order.submit(1, body("other"), 'b', 1, now);
    assert_eq!(other, Err(OrderError::OtherBody(OtherBody(1))));
    let mut models = Repeats::default();
    assert_eq!(models.submit(0, body("rank 8"), 'a'), Ok(Submitted::New));
    assert_eq!(models.submit(0, body("rank 8"), 'b'), Ok(Submitted::Repeat('a')));
    assert_eq!(models.submit(0, body("rank 16"), 'c'), Err(OtherBody(0)));
}

#[test]
fn a_client_that_attaches_anew_repeats_nothing_of_the_one_before() {
    let mut order = OnArrival::default();
    // A gap is no matter.
    for (number, text, request) in [(1, "one", 'a'), (9, "nine", 'b')] {
        assert_eq!(order.repeat(number, body(text)), Ok(None));
        order.take(number, body(text), request);
    }
    assert_eq!(order.repeat(1, body("one")), Ok(Some('a')));
    assert_eq!(order.repeat(9, body("one")), Err(SequenceError::Reused(9)));
    assert_eq!(order.repeat(5, body("one")), Ok(None));
    order.open_epoch();
    assert_eq!(order.repeat(1, body("one")), Ok(None));
}

#[test]
fn numbers_that_were_forgotten_are_refused() {
    let mut order = OnArrival::default();
    (0..=REMEMBERED_OF_EPOCH as i64 + 1).for_each(|number| order.take(number, body("same"), ()));
    assert_eq!(order.repeat(1, body("same")), Err(SequenceError::Forgotten(1)));
    assert_eq!(order.repeat(2, body("same")), Ok(Some(())));
}

#[test]
fn memory_of_repeats_and_of_refused_requests_is_bounded() {
    let (mut order, now) = (InOrder::new(1, LIMIT), Instant::now());
    for id in 1..=3 * REMEMBERED as u64 {
        order.submit(id, body("same"), id, id, now).unwrap();
        assert_eq!(order.next(now), Some(id));
    }
    assert!(order.repeats.sent.len() <= REMEMBERED + 1);
    assert!(matches!(order.submit(1, body("same"), 0, 0, now), Err(OrderError::TooLate { .. })));
    for id in 0..3 * REMEMBERED as u64 {
        order.consume(1_000_000 + id);
    }
    assert!(order.consumed.len() <= REMEMBERED);
}

/// A step of a client.
#[derive(Clone, Copy, Debug)]
enum Event {
    Send(u64),
    Refuse(u64),
}

fn events() -> impl Strategy<Value = Vec<(u64, Event)>> {
    let event = (1..13_u64, 0..8_u8).prop_map(|(id, kind)| match kind {
        0 => Event::Refuse(id),
        _ => Event::Send(id),
    });
    prop::collection::vec((0..40_000_u64, event), 1..60)
}

/// A request that ran.
struct Ran {
    id: u64,
    arrived: Instant,
    at: Instant,
}

/// The requests that ran of `events`, and the ids that were taken.
fn run(events: &[(u64, Event)]) -> Result<(Vec<Ran>, BTreeSet<u64>), TestCaseError> {
    let mut now = Instant::now();
    let (mut order, mut ran, mut first_of) = (InOrder::new(1, LIMIT), Vec::new(), BTreeMap::new());
    let mut wait_until = |order: &mut InOrder<_, (u64, Instant)>, end: Option<Instant>| {
        while let Some(deadline) = order.deadline().filter(|&at| end.is_none_or(|end| at <= end)) {
            let given = drain(order, deadline);
            assert!(!given.is_empty(), "nothing ran at the deadline");
            ran.extend(given.into_iter().map(|(id, arrived)| Ran { id, arrived, at: deadline }));
        }
        if let Some(end) = end {
            ran.extend(drain(order, end).into_iter().map(|(id, arrived)| Ran { id, arrived, at: end }));
        }
    };
    for (request, &(pause, event)) in events.iter().enumerate() {
        now += Duration::from_millis(pause);
        wait_until(&mut order, Some(now));
        match event {
            Event::Refuse(id) => order.consume(id),
            Event::Send(id) => match order.submit(id, body(&id.to_string()), request, (id, now), now) {
                Ok(Submitted::New) => prop_assert_eq!(first_of.insert(id, request), None),
                Ok(Submitted::Repeat(first)) => prop_assert_eq!(first_of.get(&id), Some(&first)),
                Err(OrderError::OtherBody(_)) => prop_assert!(false, "same body"),
                Err(OrderError::Consumed(_)) => prop_assert!(!first_of.contains_key(&id)),
                Err(OrderError::TooLate { seq_id, last }) => {
                    prop_assert!(seq_id <= last && !first_of.contains_key(&id));
                }
            },
        }
        wait_until(&mut order, Some(now));
    }
    wait_until(&mut order, None);
    Ok((ran, first_of.into_keys().collect()))
}

proptest! {
    #[test]
    fn any_arrival_runs_each_request_once_in_order_and_within_the_limit(events in events()) {
        let (ran, taken) = run(&events)?;
        let ids: Vec<u64> = ran.iter().map(|ran| ran.id).collect();
        prop_assert!(ids.windows(2).all(|pair| pair[0] < pair[1]), "{:?}", ids);
        prop_assert_eq!(ids.into_iter().collect::<BTreeSet<_>>(), taken);
        for Ran { id, arrived, at } in ran {
            prop_assert!(at - arrived <= LIMIT, "{} waited {:?}", id, at - arrived);
        }
    }

    #[test]
    fn without_losses_any_arrival_in_time_runs_all(
        ids in Just((1..20_u64).collect::<Vec<_>>()).prop_shuffle(),
        repeats in prop::collection::vec(1..20_u64, 0..20),
    ) {
        let events: Vec<_> = ids.iter().chain(&repeats).map(|&id| (1_000, Event::Send(id))).collect();
        let (ran, _) = run(&events)?;
        prop_assert_eq!(ran.into_iter().map(|ran| ran.id).collect::<Vec<_>>(), (1..20).collect::<Vec<_>>());
    }
}

#[test]
fn numbers_without_an_order_are_each_taken_once_and_forgotten_as_they_came() {
    let (hash, other) = (BodyHash::of(b"a"), BodyHash::of(b"b"));
    let mut requests = Unordered::default();
    // The blocks of two clients, the later one with the smaller numbers.
    for number in [1_000_000_000_000_000_000, 7, 0] {
        assert_eq!(requests.repeat(number, hash), Ok(None));
        requests.take(number, hash, number);
        assert_eq!(requests.repeat(number, hash), Ok(Some(number)));
        assert_eq!(requests.repeat(number, other), Err(OtherBody(number)));
    }
    for number in 0..REMEMBERED_OF_EPOCH as u64 - 2 {
        requests.take(1000 + number, hash, number);
    }
    assert_eq!(requests.repeat(1_000_000_000_000_000_000, hash), Ok(None));
    assert_eq!(requests.repeat(7, hash), Ok(Some(7)));
}
