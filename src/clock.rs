//! Seconds by phase of a step. A phase inside another takes its time away from the outer one, so that the seconds of
//! all phases add up to the time spent in any. A trace has a span for each.

use crate::trace::{self, Category, Span};
use std::{cell::RefCell, collections::BTreeMap, rc::Rc, time::Instant};

/// The stopwatch of one rank; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Clock(Rc<RefCell<Times>>);

#[derive(Debug, Default)]
struct Times {
    seconds: BTreeMap<&'static str, f64>,
    /// Phases that have begun, the innermost last, and since when it counts.
    open: Vec<&'static str>,
    since: Option<Instant>,
}

/// A phase that ends when this is dropped.
#[must_use = "the phase ends when this is dropped"]
pub struct Phase(Clock, #[expect(dead_code, reason = "ends when it is dropped")] Span);

impl Clock {
    /// Begins `name`.
    pub fn phase(&self, name: &'static str) -> Phase {
        let mut times = self.0.borrow_mut();
        times.settle();
        times.open.push(name);
        Phase(self.clone(), trace::span(Category::Phase, name))
    }

    /// Seconds by phase since the last call; a phase that is open goes on counting from now.
    pub fn take(&self) -> BTreeMap<&'static str, f64> {
        let mut times = self.0.borrow_mut();
        times.settle();
        std::mem::take(&mut times.seconds)
    }
}

impl Times {
    /// Books the time since the last change on the innermost phase.
    fn settle(&mut self) {
        let now = Instant::now();
        if let (Some(phase), Some(since)) = (self.open.last(), self.since) {
            *self.seconds.entry(phase).or_default() += (now - since).as_secs_f64();
        }
        self.since = Some(now);
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        let mut times = self.0.0.borrow_mut();
        times.settle();
        times.open.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn an_inner_phase_is_not_counted_twice() {
        let clock = Clock::default();
        let begin = Instant::now();
        let outer = clock.phase("outer");
        std::thread::sleep(Duration::from_millis(20));
        let inner = clock.phase("inner");
        std::thread::sleep(Duration::from_millis(30));
        drop(inner);
        drop(outer);
        let all = begin.elapsed().as_secs_f64();
        let seconds = clock.take();
        assert!(seconds["outer"] >= 0.02 && seconds["inner"] >= 0.03, "{seconds:?}");
        let sum: f64 = seconds.values().sum();
        assert!(sum <= all && sum > 0.8 * all, "{sum} of {all}");
        assert!(clock.take().is_empty());
    }
}
