//! Kernels run on the threads of libtorch's own OpenMP pool, so the two never fight for cores.
//!
//! `GOMP_parallel` is what a compiler makes of `#pragma omp parallel` (libgomp's ABI; LLVM's OpenMP offers it too). A
//! libtorch that was built with another OpenMP has no such symbol: kernels then run on the calling thread.

use std::{
    any::Any,
    ffi::{c_uint, c_void},
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
};

type Parallel = unsafe extern "C" fn(unsafe extern "C" fn(*mut c_void), *mut c_void, c_uint, c_uint);

/// Threads that libtorch, and so a kernel, may use.
pub fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

/// Calls `task(i)` for each i below `tasks`, on as many threads as libtorch has; returns when all are done.
pub fn tasks(tasks: usize, task: impl Fn(usize) + Sync) {
    let threads = threads().min(tasks);
    let Some(parallel) = entry().filter(|_| threads > 1) else { return (0..tasks).for_each(task) };
    let work = Work { next: AtomicUsize::new(0), tasks, task: &task, panic: Mutex::new(None) };
    // SAFETY: `entry` is libgomp's function of this signature. It calls `work_on` with a pointer to `work`, which outlives
    // the call: GOMP_parallel returns when all its threads have.
    unsafe { parallel(work_on, (&raw const work).cast_mut().cast(), threads as c_uint, 0) };
    let panic = work.panic.into_inner().unwrap_or_default();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

/// Calls `task` with ranges that tile 0..n, each of at least `least` unless it is the last.
pub fn ranges(n: usize, least: usize, task: impl Fn(Range<usize>) + Sync) {
    // A few ranges a thread even out what the threads are slowed down by.
    let size = n.div_ceil(4 * threads()).max(least).max(1);
    if threads() == 1 || size >= n {
        return task(0..n);
    }
    tasks(n.div_ceil(size), |i| task(i * size..n.min((i + 1) * size)));
}

struct Work<'a> {
    next: AtomicUsize,
    tasks: usize,
    task: &'a (dyn Fn(usize) + Sync),
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// What each thread of a parallel region does.
unsafe extern "C" fn work_on(work: *mut c_void) {
    // SAFETY: `tasks` passes a pointer to its `Work`, which lives until every thread has returned.
    let work = unsafe { &*work.cast::<Work>() };
    // A panic must not unwind through C.
    let result = catch_unwind(AssertUnwindSafe(|| {
        loop {
            let i = work.next.fetch_add(1, Ordering::Relaxed);
            if i >= work.tasks {
                return;
            }
            (work.task)(i);
        }
    }));
    if let (Err(panic), Ok(mut first)) = (result, work.panic.lock()) {
        first.get_or_insert(panic);
    }
}

/// libgomp's entry, if libtorch brought it.
fn entry() -> Option<Parallel> {
    static ENTRY: OnceLock<Option<Parallel>> = OnceLock::new();
    *ENTRY.get_or_init(|| {
        // SAFETY: dlsym only reads its arguments, a NUL-terminated name among them.
        let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
        // SAFETY: a symbol of this name has libgomp's signature: (fn, data, threads, flags).
        (!symbol.is_null()).then(|| unsafe { std::mem::transmute::<*mut c_void, Parallel>(symbol) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whatever_the_threads() {
        assert!(entry().is_some(), "the libtorch of launch/setup.sh brings libgomp");
        let before = tch::get_num_threads();
        for threads in [1, 3] {
            tch::set_num_threads(threads);
            let counts: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
            ranges(1000, 7, |range| {
                for i in range {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                }
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            let panicked = catch_unwind(|| tasks(8, |i| assert!(i != 5, "task {i}")));
            assert!(panicked.is_err());
        }
        tch::set_num_threads(before);
    }
}
