//! Futures: their table with time passed in, and polls.

use super::*;
use crate::server::request::PassReply;
use proptest::prelude::*;

const SECOND: Duration = Duration::from_secs(1);

fn limits() -> FutureLimits {
    let (lifetime, poll) = (10 * SECOND, SECOND / 10);
    FutureLimits { pending: 3, pending_bytes: 100, kept: 4, bytes: 6000, lifetime, poll, gap: SECOND }
}

fn outcome(tokens: usize) -> Outcome {
    let pass =
        PassReply { loss: 0.0, valid: 0, log_probs: vec![vec![0.0; tokens]], metrics: BTreeMap::new() };
    Outcome { answer: Ok(Reply::Passed(pass)), render: Box::new(|_, _| Body::json(&1)) }
}

fn table_with(now: Instant, works: &[&str]) -> Table {
    let mut table = Table::default();
    for work in works {
        table.open(Tenant::everyone(), (*work).into(), 10, now, &limits()).unwrap();
    }
    table
}

fn is_kept(table: &mut Table, number: u64, now: Instant) -> bool {
    !matches!(table.look(number, &Tenant::everyone(), now), Look::Unknown)
}

#[test]
fn a_place_says_how_many_are_ahead_and_which_is_carried_out() {
    let now = Instant::now();
    let mut table = table_with(now, &["forward of a", "optim_step of a", "forward of b"]);
    let reason = |table: &mut Table, number, owner: &Tenant| match table.look(number, owner, now + 7 * SECOND)
    {
        Look::Pending(place) => place.reason(),
        _ => panic!("not pending"),
    };
    let all = Tenant::everyone();
    assert_eq!(reason(&mut table, 0, &all), "forward of a is being carried out, 7 s after it was submitted");
    assert_eq!(reason(&mut table, 2, &all), "number 3 in the queue for 7 s, behind forward of a");
    table.finish(0, outcome(1), now, &limits());
    assert_eq!(reason(&mut table, 2, &all), "number 2 in the queue for 7 s, behind optim_step of a");
    // Nobody reads the names of another tenant's models.
    let other = Tenant::named("other").unwrap();
    table.open(other.clone(), "forward of c".into(), 0, now, &limits()).unwrap();
    assert_eq!(reason(&mut table, 3, &other), "number 3 in the queue for 7 s");
}

#[test]
fn a_full_queue_refuses_until_one_is_answered() {
    let now = Instant::now();
    let mut table = table_with(now, &["a", "b", "c"]);
    let refused = table.open(Tenant::everyone(), "d".into(), 0, now, &limits());
    assert_eq!(refused.unwrap_err(), Full::Requests(3));
    table.finish(1, outcome(1), now, &limits());
    table.open(Tenant::everyone(), "d".into(), 0, now, &limits()).unwrap();
}

#[test]
fn data_that_waits_is_bounded_and_one_request_alone_is_not() {
    let now = Instant::now();
    let mut table = Table::default();
    let open = |table: &mut Table, bytes| table.open(Tenant::everyone(), "a".into(), bytes, now, &limits());
    let large = open(&mut table, 1000).unwrap();
    assert_eq!(open(&mut table, 1), Err(Full::Bytes(1000)));
    table.finish(large, outcome(1), now, &limits());
    open(&mut table, 60).unwrap();
    assert_eq!(open(&mut table, 41), Err(Full::Bytes(60)));
    open(&mut table, 40).unwrap();
}

#[test]
fn one_of_several_tenants_leaves_room_for_others() {
    let limits = FutureLimits { pending: 8, ..limits() };
    let (now, mut table) = (Instant::now(), Table::default());
    let [one, two, three] = ["one", "two", "three"].map(|name| Tenant::named(name).unwrap());
    let mut open = |owner: &Tenant, bytes| table.open(owner.clone(), "a".into(), bytes, now, &limits).is_ok();
    // Requests: 4 of 8, then 2 of the 4 that are free, then 1 of the 2.
    assert_eq!([&one, &two, &three].map(|owner| (0..9).filter(|_| open(owner, 0)).count()), [4, 2, 1]);
    let mut table = Table::default();
    let mut open = |owner: &Tenant, bytes| table.open(owner.clone(), "a".into(), bytes, now, &limits);
    // Bytes: half of 100 in small ones, and a first request that fits is taken whatever its size.
    let first = open(&one, 25).unwrap();
    open(&one, 25).unwrap();
    assert_eq!(open(&one, 1), Err(Full::Share { requests: 2, bytes: 50 }));
    open(&two, 45).unwrap();
    assert_eq!(open(&two, 1), Err(Full::Share { requests: 1, bytes: 45 }));
    table.finish(first, outcome(1), now, &limits);
    table.open(one, "a".into(), 5, now, &limits).unwrap();
    assert_eq!(table.shares.values().map(|share| share.bytes).sum::<usize>(), table.pending_bytes);
}

#[test]
fn a_result_stays_for_its_lifetime_and_within_the_limits() {
    let start = Instant::now();
    let mut table = table_with(start, &["a", "b", "c"]);
    table.finish(1, outcome(1), start, &limits());
    assert!(is_kept(&mut table, 1, start + 9 * SECOND) && is_kept(&mut table, 1, start + 9 * SECOND));
    table.expire(start + 10 * SECOND, &limits());
    assert!(!is_kept(&mut table, 1, start));
    // Bytes: the oldest result goes, the newest stays even if it alone is too large.
    table.finish(0, outcome(1), start, &limits());
    table.finish(2, outcome(100_000), start, &limits());
    assert!(!is_kept(&mut table, 0, start) && is_kept(&mut table, 2, start));
}

#[test]
fn another_tenant_knows_no_id() {
    let futures = Arc::new(Futures::new(limits()));
    let owner = Tenant::named("one").unwrap();
    let promise = futures.open(owner.clone(), "a".into(), 0, Box::new(|_, _| Body::json(&1))).unwrap();
    assert!(matches!(futures.look(&promise.id(), &owner), Look::Pending(_)));
    for other in [Tenant::everyone(), Tenant::named("two").unwrap()] {
        assert!(matches!(futures.look(&promise.id(), &other), Look::Unknown));
    }
}

#[test]
fn a_promise_that_is_dropped_answers_with_an_error_of_the_server() {
    let futures = Arc::new(Futures::new(limits()));
    let promise = futures.open(Tenant::everyone(), "a".into(), 0, Box::new(|_, _| Body::json(&1))).unwrap();
    let id = promise.id();
    drop(promise);
    let Look::Done(outcome) = futures.look(&id, &Tenant::everyone()) else { panic!("not done") };
    let body: serde_json::Value = serde_json::from_slice(&outcome.body(true).bytes).unwrap();
    assert_eq!(body["category"], "server");
    assert!(body["error"].as_str().unwrap().contains("the engine ended"));
}

#[test]
fn a_poll_ends_with_the_result_or_with_its_time() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let futures = Arc::new(Futures::new(limits()));
    let open = || futures.open(Tenant::everyone(), "a".into(), 0, Box::new(|_, _| Body::json(&1))).unwrap();
    let (never, soon) = (open(), open());
    let (first, second) = (never.id(), soon.id());
    let started = Instant::now();
    let look = runtime.block_on(futures.wait(&first, &Tenant::everyone(), None));
    assert!(matches!(look, Look::Pending(_)) && started.elapsed() >= limits().poll);
    let answers = std::thread::spawn(move || {
        std::thread::sleep(SECOND / 10);
        soon.answer(Ok(Reply::Created));
    });
    let look = runtime.block_on(futures.wait(&second, &Tenant::everyone(), Some(30 * SECOND)));
    assert!(matches!(look, Look::Done(_)) && started.elapsed() < 10 * SECOND);
    answers.join().unwrap();
    let unknown = runtime.block_on(futures.wait("future_1", &Tenant::everyone(), None));
    assert!(matches!(unknown, Look::Unknown));
}

proptest! {
    #[test]
    fn a_text_that_is_no_id_is_unknown(text in ".{0,40}", digits in "[0-9a-f+ ]{0,20}") {
        let futures = Futures::new(limits());
        for id in [text, format!("future_{digits}"), format!("future_{:08x}{digits}", futures.nonce)] {
            prop_assert!(matches!(futures.look(&id, &Tenant::everyone()), Look::Unknown));
        }
    }

    #[test]
    fn bytes_are_those_of_the_results_that_are_kept(
        steps in prop::collection::vec((0u64..6, 0usize..2000, 0u64..5), 1..60),
    ) {
        let (mut now, mut table) = (Instant::now(), Table::default());
        for (number, tokens, seconds) in steps {
            now += Duration::from_secs(seconds);
            let _ = table.open(Tenant::everyone(), String::new(), tokens / 20, now, &limits());
            table.finish(table.next.saturating_sub(number), outcome(tokens), now, &limits());
            let held = table.entries.values().filter_map(|entry| entry.outcome.as_ref());
            prop_assert_eq!(table.bytes, held.map(|(outcome, _)| outcome.bytes()).sum::<usize>());
            let pending = table.entries.values().filter(|entry| entry.outcome.is_none());
            prop_assert_eq!(table.pending_bytes, pending.map(|entry| entry.bytes).sum::<usize>());
            prop_assert!(table.pending_bytes <= 100);
            prop_assert_eq!(table.entries.len(), table.kept.len() + table.pending.len());
            prop_assert!(table.kept.len() <= 4 && (table.bytes <= 6000 || table.kept.len() == 1));
        }
    }
}
