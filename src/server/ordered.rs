//! Requests that may arrive in any order and are carried out by their numbers: those of `tinker` clients. One that
//! comes too early is held back without a thread, until those before it are here or given up.

use super::{
    app::{App, Submission, unknown},
    fault::Fault,
    futures::Promise,
    order::{InOrder, OrderError},
    registry::Tenant,
    request::{AdapterSpec, Answer, ModelId, Refusal, Request, Task},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};
use tokio::sync::Notify;

/// Time for which the first request waits of an adapter that was there before the process: its number is not known,
/// and chunks of a pass arrive within milliseconds of each other.
const RESUME_TIME: Duration = Duration::from_secs(2);

/// A request that was taken, with its future.
struct Work {
    request: Request,
    promise: Promise,
}

type Order = InOrder<String, Work>;

/// The orders of all adapters whose requests are numbered so. Its lock is taken before that of the registry.
#[derive(Default)]
pub(super) struct Orders {
    orders: Mutex<BTreeMap<(Tenant, ModelId), Order>>,
    /// A request is held back.
    held: Notify,
}

impl Orders {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<(Tenant, ModelId), Order>> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl From<OrderError> for Fault {
    fn from(error: OrderError) -> Self {
        Self::user(error.to_string())
    }
}

impl App {
    /// Begins the order of a new adapter: its first request has number 1.
    pub fn begin_order(&self, tenant: &Tenant, model: &ModelId) {
        let mut orders = self.orders.lock();
        let mut registry = self.registry();
        orders.retain(|(tenant, model), _| registry.get(tenant, model).is_some());
        let order = InOrder::new(1, self.futures.gap());
        orders.entry((tenant.clone(), model.clone())).or_insert(order);
    }

    /// Takes a request that is carried out after those with smaller numbers, and returns the id of its future. A
    /// repeat gets the id of the first. One without a number is carried out as it comes.
    ///
    /// # Errors
    /// No such adapter, a number that is used or whose turn is over, a full queue, or the server takes no request now.
    pub fn submit_in_order(&self, submission: Submission) -> Result<String, Fault> {
        let Some((number, body)) = submission.number else { return self.submit(submission) };
        let Submission { tenant, model, call, task, render, .. } = submission;
        let Ok(seq_id) = u64::try_from(number) else {
            return Err(Fault::user(format!("seq_id {number}: expected a positive number")));
        };
        let request = self.request(tenant, model, task)?;
        let mut orders = self.orders.lock();
        self.check_open()?;
        let order = self.order(&mut orders, tenant, model)?;
        if let Some(first) = order.repeat(seq_id, body)? {
            return Ok(first);
        }
        let promise = self.futures.open(tenant.clone(), format!("{call} of {model}"), render)?;
        let (id, now) = (promise.id(), Instant::now());
        if seq_id > order.next_id() {
            let missing = order.next_id();
            promise.hold(Some(format!("it waits for seq_id {missing} of {model}, which has not arrived")));
        }
        order.submit(seq_id, body, id.clone(), Work { request, promise }, now)?;
        self.run(order, now);
        if order.deadline().is_some() {
            self.orders.held.notify_one();
        }
        Ok(id)
    }

    /// Skips the number of a request that was refused: its client goes on with the next one.
    pub fn refuse_in_order(&self, tenant: &Tenant, model: &ModelId, seq_id: u64) {
        let mut orders = self.orders.lock();
        if let Ok(order) = self.order(&mut orders, tenant, model) {
            order.consume(seq_id);
            self.run(order, Instant::now());
        }
    }

    /// The order of an adapter that exists.
    fn order<'a>(
        &self,
        orders: &'a mut BTreeMap<(Tenant, ModelId), Order>,
        tenant: &Tenant,
        model: &ModelId,
    ) -> Result<&'a mut Order, Fault> {
        let key = (tenant.clone(), model.clone());
        let mut registry = self.registry();
        self.ensure(&mut registry, tenant, model)?;
        let Some(known) = registry.get(tenant, model) else {
            orders.remove(&key);
            return Err(unknown(&registry, tenant, model));
        };
        known.last_request = SystemTime::now();
        Ok(orders.entry(key).or_insert_with(|| InOrder::resumed(RESUME_TIME, self.futures.gap())))
    }

    /// Sends the requests whose turn has come to the engine.
    fn run(&self, order: &mut Order, now: Instant) {
        while let Some(Work { request, promise }) = order.next(now) {
            promise.hold(None);
            self.send(request, promise, |_| {});
        }
    }

    /// Gives up what is missing once others have waited for long enough. Runs as long as the server.
    pub async fn keep_orders(self: Arc<Self>) {
        loop {
            let held = self.orders.held.notified();
            match self.give_up_gaps(Instant::now()) {
                None => held.await,
                Some(deadline) => drop(tokio::time::timeout_at(deadline.into(), held).await),
            }
        }
    }

    /// Returns the time at which there is something to give up next.
    fn give_up_gaps(&self, now: Instant) -> Option<Instant> {
        let mut orders = self.orders.lock();
        orders.values_mut().for_each(|order| self.run(order, now));
        orders.values().filter_map(InOrder::deadline).min()
    }

    /// Refuses the requests that are held back, for those that they wait for will not be taken.
    pub(super) fn refuse_held(&self) {
        let orders = std::mem::take(&mut *self.orders.lock());
        for Work { promise, .. } in orders.into_values().flat_map(InOrder::into_waiting) {
            let text = "the server is stopping, and requests before this one have not arrived; it was not carried out";
            promise.answer(Err(Refusal::Server(text.into())));
        }
    }

    /// Creates an adapter with the values of a save. Its one future fails if either fails, and then there is no
    /// adapter. `submission` has the load.
    ///
    /// # Errors
    /// The adapter exists, or the server takes no request now.
    pub fn create_by_load(&self, submission: Submission, spec: AdapterSpec) -> Result<String, Fault> {
        let Submission { tenant, model, call, task, render, .. } = submission;
        let create = self.request(tenant, model, Task::Create(spec.clone()))?;
        let load = self.request(tenant, model, task)?;
        let unload = self.request(tenant, model, Task::Unload)?;
        let mut registry = self.registry();
        self.check_open()?;
        if registry.get(tenant, model).is_some() {
            return Err(Fault::user(format!(
                "model_id {model} exists; load into it, or take another number"
            )));
        }
        let promise = self.futures.open(tenant.clone(), format!("{call} of {model}"), render)?;
        let id = promise.id();
        let exists = registry.add(tenant.clone(), model.clone(), spec);
        let refusal = Arc::new(OnceLock::new());
        let refused = refusal.clone();
        let created = move |answer: Answer| {
            if let Err(why) = answer {
                let _ = refused.set(why);
            }
        };
        self.engine.submit(create, Box::new(created));
        let engine = self.engine.clone();
        let loaded = move |answer: Answer| {
            let answer = match (refusal.get(), answer) {
                (Some(why), _) => Err(why.clone()),
                (None, Err(why)) => {
                    engine.submit(unload, Box::new(|_| {}));
                    Err(why)
                }
                (None, Ok(reply)) => Ok(reply),
            };
            if answer.is_err() {
                exists.store(false, Ordering::Release);
            }
            promise.answer(answer);
        };
        self.engine.submit(load, Box::new(loaded));
        Ok(id)
    }
}
