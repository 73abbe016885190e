//! Threads for kernels: those of libtorch's own OpenMP pool, so that the two do not compete for cores.
//!
//! A compiler turns `#pragma omp parallel` into a call of `GOMP_parallel` (libgomp's ABI; LLVM's OpenMP offers it too).
//! A libtorch built with another OpenMP has no such symbol: kernels then run on the calling thread.

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

/// Threads that libtorch and kernels may use.
pub fn threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}

/// Calls `task(i)` for each i below `tasks`, on as many threads as libtorch has; returns when all are done.
pub fn tasks(tasks: usize, task: impl Fn(usize) + Sync) {
    let threads = threads().min(tasks);
    let Some(parallel) = entry().filter(|_| threads > 1) else { return (0..tasks).for_each(task) };
    let work = Work { next: AtomicUsize::new(0), tasks, task: &task, panic: Mutex::new(None) };
    // SAFETY: `entry` is libgomp's function of this signature. It calls `work_on` with a pointer to `work` on several
    // threads, which a `Work` allows, and returns when all of them have returned, so `work` outlives its use.
    unsafe { parallel(work_on, (&raw const work).cast_mut().cast(), threads as c_uint, 0) };
    let panic = work.panic.into_inner().unwrap_or_default();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

/// Calls `task` with disjoint ranges that cover 0..n, each of at least `least` but for the last.
pub fn ranges(n: usize, least: usize, task: impl Fn(Range<usize>) + Sync) {
    // A few ranges a thread, so that a thread that is slowed down takes fewer.
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

/// The body of the parallel region: takes tasks until none is left.
unsafe extern "C" fn work_on(work: *mut c_void) {
    // SAFETY: `tasks` passes a pointer to its `Work`, which lives until every thread has returned, and of which only
    // shared references exist.
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

/// The function `GOMP_parallel`, if libtorch brought libgomp.
fn entry() -> Option<Parallel> {
    static ENTRY: OnceLock<Option<Parallel>> = OnceLock::new();
    *ENTRY.get_or_init(|| {
        // SAFETY: dlsym reads its arguments, of which the name is NUL-terminated, and searches the loaded libraries.
        let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"GOMP_parallel".as_ptr()) };
        // SAFETY: the symbol is not null, and libgomp's ABI gives this name the signature (fn, data, threads, flags).
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
