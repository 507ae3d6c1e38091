//! Work shared among threads that live for one call.
//!
//! No pool outlives a call: nothing is left to break when the process forks, and there is no state to shut down.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

use crate::{invalid, Error};

/// Threads to use when the caller names no number.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |count| count.get())
}

/// Results of `work(0)`, `work(1)`, … `work(jobs - 1)` in that order, computed by up to `threads` threads that each take
/// the next job when they are done. `state` is made once per thread. A panic in a worker comes back as an error.
pub fn map<S, T: Send>(
    jobs: usize,
    threads: usize,
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize) -> Result<T, Error> + Sync,
) -> Result<Vec<T>, Error> {
    if threads <= 1 || jobs <= 1 {
        let mut own = state();
        return (0..jobs).map(|job| work(&mut own, job)).collect();
    }
    let next = AtomicUsize::new(0);
    let failure = Mutex::new(None);
    let run = || {
        let (mut own, mut done) = (state(), Vec::new());
        loop {
            let job = next.fetch_add(1, Ordering::Relaxed);
            if job >= jobs {
                return done;
            }
            match work(&mut own, job) {
                Ok(result) => done.push((job, result)),
                Err(error) => {
                    next.store(jobs, Ordering::Relaxed);
                    *failure.lock().expect("no panic while held") = Some(error);
                    return done;
                }
            }
        }
    };
    let finished = std::thread::scope(|scope| {
        let workers: Vec<_> = (1..threads.min(jobs)).map(|_| scope.spawn(run)).collect();
        let mut finished = vec![Ok(run())];
        finished.extend(workers.into_iter().map(|worker| worker.join()));
        finished
    });
    if let Some(error) = failure.into_inner().expect("no panic while held") {
        return Err(error);
    }
    let mut results = Vec::with_capacity(jobs);
    for part in finished {
        match part {
            Ok(part) => results.extend(part),
            Err(_) => return invalid("a worker thread failed; this is a bug in nanochat_rustbpe"),
        }
    }
    results.sort_unstable_by_key(|(job, _)| *job);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}
