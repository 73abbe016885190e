//! The course of training as the page shows it: curves of each adapter and tokens over time, noted from the answers of
//! the engine, in memory and within bounds.

use super::{
    registry::Tenant,
    request::{Answer, ModelId, PassReply, Reply, Request, StepReply, Task},
};
use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Points of a curve, at most; even.
const MOST_POINTS: usize = 256;

/// Curves of an adapter, at most.
const MOST_CURVES: usize = 16;

/// Adapters with curves, at most. The one that was answered longest ago goes first.
const MOST_ADAPTERS: usize = 1000;

/// Seconds of which tokens are added up.
pub const INTERVAL: u64 = 5;

/// Intervals that are kept: an hour.
const MOST_INTERVALS: u64 = 720;

/// Mean loss of a target.
pub const LOSS: &str = "loss";

/// Ending of the statistics of a loss that are means over targets.
const MEAN: &str = ":mean";

/// Values of neighbouring updates, joined.
#[derive(Clone, Copy, Debug)]
struct Point {
    /// The last of these updates.
    step: u64,
    sum: f64,
    values: u64,
}

/// A value of each update. When it is full, neighbours are joined, so that it always spans all updates.
#[derive(Clone, Debug)]
pub struct Curve {
    points: Vec<Point>,
    /// Values that a point joins.
    span: u64,
}

impl Default for Curve {
    fn default() -> Self {
        Self { points: Vec::new(), span: 1 }
    }
}

impl Curve {
    /// Adds the value of update `step`. One that is not finite is left out.
    fn add(&mut self, step: u64, value: f64) {
        if !value.is_finite() {
            return;
        }
        match self.points.last_mut().filter(|last| last.values < self.span) {
            Some(last) => {
                (last.step, last.sum, last.values) = (step, last.sum + value, last.values + 1);
            }
            None => self.points.push(Point { step, sum: value, values: 1 }),
        }
        if self.points.len() > MOST_POINTS {
            self.span *= 2;
            let joined = self.points.chunks(2).map(|pair| Point {
                step: pair[pair.len() - 1].step,
                sum: pair.iter().map(|point| point.sum).sum(),
                values: pair.iter().map(|point| point.values).sum(),
            });
            self.points = joined.collect();
        }
    }

    /// Forgets the updates after `step`.
    fn rewind(&mut self, step: u64) {
        self.points.retain(|point| point.step <= step);
    }

    /// The last update of each point, and the mean of its values.
    pub fn points(&self) -> impl Iterator<Item = (u64, f64)> {
        self.points.iter().map(|point| (point.step, point.sum / point.values as f64))
    }
}

/// A sum with its weight.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    sum: f64,
    weight: f64,
}

/// The course of an adapter.
#[derive(Clone, Debug)]
pub struct Course {
    /// By name: the loss, its means, the gradient norm, the learning rate.
    pub curves: BTreeMap<String, Curve>,
    /// Tokens of its passes.
    pub tokens: u64,
    /// Values of the passes since the last update.
    open: BTreeMap<String, Mean>,
    answered: Instant,
}

impl Course {
    fn new(now: Instant) -> Self {
        Self { curves: BTreeMap::new(), tokens: 0, open: BTreeMap::new(), answered: now }
    }

    fn add(&mut self, name: &str, step: u64, value: f64) {
        if let Some(curve) = self.curves.get_mut(name) {
            curve.add(step, value);
        } else if self.curves.len() < MOST_CURVES {
            self.curves.entry(name.to_owned()).or_default().add(step, value);
        }
    }

    /// Adds what a pass with backward has shown; each metric is a mean over its targets.
    fn passed(&mut self, reply: &PassReply) {
        let weight = reply.valid as f64;
        let means = reply.metrics.iter().filter_map(|(name, &mean)| Some((name.strip_suffix(MEAN)?, mean)));
        for (name, sum) in means.map(|(name, mean)| (name, mean * weight)).chain([(LOSS, reply.loss)]) {
            let open = self.open.entry(name.to_owned()).or_default();
            *open = Mean { sum: open.sum + sum, weight: open.weight + weight };
        }
    }

    /// Ends the values of an update. One that was refused for its numbers has none.
    fn stepped(&mut self, reply: &StepReply, lr: f64) {
        let open = std::mem::take(&mut self.open);
        if !reply.non_finite.is_empty() {
            return;
        }
        for (name, Mean { sum, weight }) in open {
            self.add(&name, reply.step, sum / weight);
        }
        self.add("grad_norm", reply.step, reply.grad_norm);
        self.add("learning_rate", reply.step, lr);
    }

    /// Goes back to the update that was loaded.
    fn rewind(&mut self, step: u64) {
        self.open.clear();
        self.curves.values_mut().for_each(|curve| curve.rewind(step));
    }
}

/// Tokens by interval. Those of a pass are spread evenly over the time from its submission to its answer.
#[derive(Clone, Debug, Default)]
struct Rates(BTreeMap<u64, f64>);

impl Rates {
    /// Adds tokens of a pass; times in seconds since the start.
    fn add(&mut self, from: f64, to: f64, tokens: f64) {
        let (width, last) = (INTERVAL as f64, to as u64 / INTERVAL);
        let oldest = (last + 1).saturating_sub(MOST_INTERVALS);
        for interval in (from as u64 / INTERVAL).max(oldest)..=last {
            let begin = from.max(interval as f64 * width);
            let end = to.min((interval + 1) as f64 * width);
            let part = if to > from { (end - begin) / (to - from) } else { 1.0 };
            *self.0.entry(interval).or_default() += tokens * part;
        }
        self.0 = self.0.split_off(&oldest);
    }

    /// Tokens a second of the whole intervals until `now`, oldest first: an hour, or all since the start.
    fn until(&self, now: f64) -> Vec<f32> {
        let end = now as u64 / INTERVAL;
        let intervals = end.saturating_sub(MOST_INTERVALS)..end;
        let rate = |interval| self.0.get(&interval).map_or(0.0, |tokens| tokens / INTERVAL as f64) as f32;
        intervals.map(rate).collect()
    }
}

/// A request as its answer is noted.
pub struct Noted {
    model: ModelId,
    kind: Kind,
    submitted: Instant,
}

enum Kind {
    Pass { tokens: u64, backward: bool },
    Step { lr: f64 },
    Other,
}

#[derive(Default)]
struct Inner {
    courses: BTreeMap<ModelId, Course>,
    rates: BTreeMap<Tenant, Rates>,
}

/// The courses of all adapters, by their names in the engine.
pub struct History {
    started: Instant,
    /// The server has several tenants.
    has_keys: bool,
    inner: Mutex<Inner>,
}

impl History {
    pub fn new(has_keys: bool) -> Self {
        Self { started: Instant::now(), has_keys, inner: Mutex::default() }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time since the start.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Notes a request that is about to be submitted.
    pub fn note(request: &Request) -> Noted {
        let kind = match &request.task {
            Task::Pass(pass) => {
                let tokens = pass.data.iter().map(|datum| datum.ids.len() as u64).sum();
                Kind::Pass { tokens, backward: pass.backward }
            }
            Task::OptimStep(step) => Kind::Step { lr: step.lr },
            _ => Kind::Other,
        };
        Noted { model: request.model.clone(), kind, submitted: Instant::now() }
    }

    /// Notes the answer to a request.
    pub fn answered(&self, noted: &Noted, answer: &Answer) {
        let Ok(reply) = answer else { return };
        let (Noted { model, kind, submitted }, now) = (noted, Instant::now());
        let mut inner = self.inner();
        if *reply == Reply::Unloaded {
            inner.courses.remove(model);
            return;
        }
        if let Kind::Pass { tokens, .. } = kind
            && let Some((tenant, _)) = Tenant::of_engine_id(model.as_str(), self.has_keys)
        {
            let since = |time: Instant| time.duration_since(self.started).as_secs_f64();
            inner.rates.entry(tenant).or_default().add(since(*submitted), since(now), *tokens as f64);
        }
        let course = inner.courses.entry(model.clone()).or_insert_with(|| Course::new(now));
        course.answered = now;
        match (kind, reply) {
            (Kind::Pass { tokens, backward }, Reply::Passed(reply)) => {
                course.tokens += tokens;
                if *backward {
                    course.passed(reply);
                }
            }
            (Kind::Step { lr }, Reply::Stepped(reply)) => course.stepped(reply, *lr),
            (_, Reply::Aborted { .. }) => course.open.clear(),
            (_, Reply::Loaded { step }) => course.rewind(*step),
            _ => {}
        }
        if inner.courses.len() > MOST_ADAPTERS {
            let silent = inner.courses.iter().min_by_key(|(_, course)| course.answered);
            if let Some(silent) = silent.map(|(model, _)| model.clone()) {
                inner.courses.remove(&silent);
            }
        }
    }

    /// The part of the course of an adapter that `read` takes; `None`: nothing is known of it.
    pub fn course<T>(&self, model: &ModelId, read: impl FnOnce(&Course) -> T) -> Option<T> {
        self.inner().courses.get(model).map(read)
    }

    /// Tokens a second of a tenant's passes by [`INTERVAL`], oldest first.
    pub fn rates(&self, tenant: &Tenant) -> Vec<f32> {
        let now = self.age().as_secs_f64();
        self.inner().rates.get(tenant).cloned().unwrap_or_default().until(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        loss::NamedLoss,
        server::request::{Datum, OptimStep, Pass},
    };
    use proptest::prelude::*;

    fn model(name: &str) -> ModelId {
        ModelId::new(name).unwrap()
    }

    fn pass(name: &str, tokens: usize, backward: bool) -> Noted {
        let datum = Datum { ids: vec![1; tokens], targets: vec![1; tokens], k: 1, inputs: BTreeMap::new() };
        let loss = NamedLoss { name: "cross_entropy".into(), params: BTreeMap::new() };
        let task = Task::Pass(Pass { data: vec![datum], loss, backward });
        History::note(&Request { model: model(name), task })
    }

    fn passed(loss: f64, valid: u64, kl: f64) -> Answer {
        let metrics = BTreeMap::from([("kl_ref:mean".to_owned(), kl), ("ratio_max:max".to_owned(), 9.0)]);
        Ok(Reply::Passed(PassReply { loss, valid, log_probs: Vec::new(), metrics }))
    }

    fn step(history: &History, name: &str, step: u64, non_finite: &[&str]) {
        let numbers = OptimStep {
            lr: 0.5,
            betas: (0.9, 0.9),
            eps: 1.0,
            weight_decay: 0.0,
            max_grad_norm: 0.0,
            divide: true,
        };
        let noted = History::note(&Request { model: model(name), task: Task::OptimStep(numbers) });
        let non_finite = non_finite.iter().map(|&name| name.to_owned()).collect();
        history.answered(&noted, &Ok(Reply::Stepped(StepReply { step, grad_norm: 2.0, non_finite })));
    }

    fn points(history: &History, name: &str, curve: &str) -> Vec<(u64, f64)> {
        let read = |course: &Course| course.curves.get(curve).map(|curve| curve.points().collect::<Vec<_>>());
        history.course(&model(name), read).flatten().unwrap_or_default()
    }

    #[test]
    fn a_point_is_the_mean_over_the_targets_of_the_passes_of_an_update() {
        let history = History::new(false);
        history.answered(&pass("a", 4, true), &passed(6.0, 3, 0.5));
        history.answered(&pass("a", 2, true), &passed(4.0, 1, 1.5));
        history.answered(&pass("a", 9, false), &passed(1000.0, 1, 1000.0));
        history.answered(&pass("a", 9, true), &Err(super::super::request::Refusal::User("no".into())));
        assert!(points(&history, "a", LOSS).is_empty());
        step(&history, "a", 1, &[]);
        assert_eq!(points(&history, "a", LOSS), [(1, 2.5)]);
        assert_eq!(points(&history, "a", "kl_ref"), [(1, 0.75)]);
        assert_eq!(points(&history, "a", "grad_norm"), [(1, 2.0)]);
        assert_eq!(points(&history, "a", "learning_rate"), [(1, 0.5)]);
        assert_eq!(history.course(&model("a"), |course| (course.tokens, course.curves.len())), Some((15, 4)));
        // An update that is refused for its numbers drops its gradients.
        history.answered(&pass("a", 4, true), &passed(f64::NAN, 3, 0.5));
        step(&history, "a", 1, &["q_proj"]);
        history.answered(&pass("a", 4, true), &passed(3.0, 3, 0.5));
        step(&history, "a", 2, &[]);
        assert_eq!(points(&history, "a", LOSS), [(1, 2.5), (2, 1.0)]);
    }

    #[test]
    fn a_load_goes_back_and_an_unload_forgets() {
        let history = History::new(false);
        for number in 1..=4 {
            history.answered(&pass("a", 4, true), &passed(number as f64, 1, 0.0));
            step(&history, "a", number, &[]);
        }
        let other =
            |task, answer| history.answered(&History::note(&Request { model: model("a"), task }), &answer);
        history.answered(&pass("a", 4, true), &passed(100.0, 1, 0.0));
        other(Task::AbortGradients, Ok(Reply::Loaded { step: 2 }));
        history.answered(&pass("a", 4, true), &passed(7.0, 1, 0.0));
        step(&history, "a", 3, &[]);
        assert_eq!(points(&history, "a", LOSS), [(1, 1.0), (2, 2.0), (3, 7.0)]);
        other(Task::Unload, Ok(Reply::Unloaded));
        assert!(history.course(&model("a"), |_| ()).is_none());
    }

    #[test]
    fn memory_is_bounded_by_adapters_and_curves() {
        let history = History::new(false);
        let metrics = (0..100).map(|i| (format!("m{i}:mean"), 1.0)).collect();
        let reply = Reply::Passed(PassReply { loss: 1.0, valid: 1, log_probs: Vec::new(), metrics });
        history.answered(&pass("first", 1, true), &Ok(reply));
        step(&history, "first", 1, &[]);
        assert_eq!(history.course(&model("first"), |course| course.curves.len()), Some(MOST_CURVES));
        for i in 0..MOST_ADAPTERS {
            step(&history, &format!("a{i}"), 1, &[]);
        }
        assert!(history.course(&model("first"), |_| ()).is_none());
        assert_eq!(history.inner().courses.len(), MOST_ADAPTERS);
    }

    #[test]
    fn tenants_have_rates_of_their_own() {
        let history = History::new(true);
        history.answered(&pass("one:a", 50, true), &passed(1.0, 1, 0.0));
        let of = |name: &str| {
            let rates = history.inner().rates.get(&Tenant::named(name).unwrap()).cloned().unwrap_or_default();
            rates.0.values().sum::<f64>()
        };
        assert_eq!((of("one").round(), of("two")), (50.0, 0.0));
    }

    #[test]
    fn tokens_are_spread_over_the_time_of_their_pass() {
        let mut rates = Rates::default();
        rates.add(2.0, 12.0, 100.0);
        assert_eq!(rates.until(15.0), [6.0, 10.0, 4.0]);
        rates.add(12.0, 12.0, 5.0);
        assert_eq!(rates.until(14.9), [6.0, 10.0]);
        assert_eq!(rates.until(16.0), [6.0, 10.0, 5.0]);
        assert_eq!(rates.until(4.0), [0.0; 0]);
        // An hour later nothing is left of it.
        rates.add(0.0, 4000.0, 4000.0);
        let hour = rates.until(4000.0);
        assert_eq!((hour.len(), hour[0], rates.0.len()), (720, 0.0, 720));
        assert!(hour[1..].iter().all(|rate| (rate - 1.0).abs() < 1e-6));
    }

    proptest! {
        #[test]
        fn a_curve_keeps_the_mean_and_spans_all_updates(values in prop::collection::vec(-1e3..1e3_f64, 1..3000)) {
            let mut curve = Curve::default();
            for (step, &value) in values.iter().enumerate() {
                curve.add(step as u64, value);
            }
            let steps: Vec<u64> = curve.points().map(|(step, _)| step).collect();
            prop_assert!(steps.is_sorted() && steps.len() <= MOST_POINTS);
            prop_assert!(values.len() <= MOST_POINTS || steps.len() >= MOST_POINTS / 2);
            prop_assert_eq!(steps.last(), Some(&(values.len() as u64 - 1)));
            // Each point is the mean of the values up to its update that no earlier one has.
            let mut first = 0;
            for (step, mean) in curve.points() {
                let own = &values[first..=step as usize];
                prop_assert!((mean - own.iter().sum::<f64>() / own.len() as f64).abs() < 1e-9);
                first = step as usize + 1;
            }
        }
    }
}
