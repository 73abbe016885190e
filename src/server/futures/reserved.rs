//! Places for requests that are answered where they were asked, and have no future.

use super::{Full, Futures, Instant, Tenant};
use std::sync::Arc;

/// A place among the requests that are pending, until it is dropped.
pub struct Reserved {
    futures: Arc<Futures>,
    number: u64,
}

impl Futures {
    /// Takes a place for `work` with `bytes` of data.
    ///
    /// # Errors
    /// [`Full`]: too many are pending, or too much data.
    pub fn reserve(self: &Arc<Self>, owner: Tenant, work: String, bytes: usize) -> Result<Reserved, Full> {
        let number = self.table().open(owner, work, bytes, Instant::now(), &self.limits)?;
        Ok(Reserved { futures: self.clone(), number })
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut table = self.futures.table();
        table.leave(self.number);
        table.entries.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::futures::{Body, FutureLimits, Look};

    #[test]
    fn a_place_counts_until_it_is_dropped_and_leaves_no_result() {
        let futures = Arc::new(Futures::new(FutureLimits { pending: 2, ..FutureLimits::default() }));
        let all = Tenant::everyone();
        let places = [1, 2].map(|_| futures.reserve(all.clone(), "a".into(), 10).unwrap());
        assert!(matches!(futures.reserve(all.clone(), "a".into(), 0), Err(Full::Requests(2))));
        assert_eq!((futures.counts().pending, futures.queue(&all, 9).len()), (2, 2));
        drop(places);
        let counts = futures.counts();
        assert_eq!((counts.pending, counts.kept, counts.unread), (0, 0, 0));
        let promise = futures.open(all.clone(), "b".into(), 0, Box::new(|_, _| Body::json(&1))).unwrap();
        assert!(matches!(futures.look(&promise.id(), &all), Look::Pending(place) if place.ahead == 0));
    }
}
