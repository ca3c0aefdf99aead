//! A few threads that wait for work by spinning: a matrix-vector product of a small model takes ten microseconds,
//! less than it takes to wake a sleeping thread. Threads that have nothing to do for a while go to sleep.
//!
//! Work is a number of jobs; whoever is awake takes the next one, the caller too, and a call returns when all are
//! done. A thread that sleeps through a call costs nothing but its share, and which thread does a job never matters to
//! the result.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, Thread};

/// Rounds of a waiting loop before a worker goes to sleep: some tens of microseconds.
const PATIENCE: u32 = 20_000;

/// Bits of a ticket that count jobs; the others count calls.
const JOB_BITS: u32 = 24;
/// More than any call has: a ticket with this number is closed.
const MAX_JOBS: usize = (1 << JOB_BITS) - 1;

/// Threads that work together on one call at a time.
pub struct WorkerTeam {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// Number of the call in the high bits, next job in the low ones. A worker takes a job by adding one, which
    /// succeeds only while the call that it read is still the current one.
    ticket: AtomicU64,
    n_jobs: AtomicUsize,
    done: AtomicUsize,
    /// The closure of the current call, and the function that knows its type.
    closure: AtomicPtr<()>,
    caller: AtomicPtr<()>,
    /// Workers asleep, or about to be.
    sleeping: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// Runs job `job` of a type-erased closure.
type Caller = unsafe fn(closure: *const (), job: usize);

impl WorkerTeam {
    /// A team of `n_threads`, the calling one included.
    pub fn new(n_threads: usize) -> Self {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            n_jobs: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            closure: AtomicPtr::default(),
            caller: AtomicPtr::default(),
            sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers = (1..n_threads.max(1))
            .map(|i| {
                let shared = Arc::clone(&shared);
                let builder = std::thread::Builder::new().name(format!("worker {i}"));
                builder.spawn(move || shared.work_until_stopped()).expect("the system gives a thread")
            })
            .collect();
        Self { shared, workers }
    }

    /// Threads of the team, the calling one included.
    pub fn n_threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// `job(0)` to `job(n_jobs - 1)`, in any order and on any thread. A panic of a job is a panic of this call.
    pub fn run<F: Fn(usize) + Sync>(&mut self, n_jobs: usize, job: F) {
        if n_jobs <= 1 || self.workers.is_empty() {
            (0..n_jobs).for_each(job);
            return;
        }
        assert!(n_jobs < MAX_JOBS, "{n_jobs} jobs in one call; expected fewer than {MAX_JOBS}");
        let shared = &*self.shared;
        let call: Caller = call_closure::<F>;
        let ticket = shared.ticket.load(Ordering::Relaxed);
        // Closed first: a worker that still holds the old ticket must not take a job that only the new fields allow.
        shared.ticket.store(ticket | MAX_JOBS as u64, Ordering::Release);
        shared.done.store(0, Ordering::Release);
        shared.n_jobs.store(n_jobs, Ordering::Release);
        shared.closure.store((&raw const job).cast_mut().cast(), Ordering::Release);
        shared.caller.store(call as *mut (), Ordering::Release);
        // From here on workers may take jobs; the fields above come with it.
        let first = ((ticket >> JOB_BITS) + 1) << JOB_BITS;
        shared.ticket.store(first, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.workers.iter().map(JoinHandle::thread).for_each(Thread::unpark);
        }
        while shared.take_and_run_one() {}
        let mut rounds = 0u32;
        while shared.done.load(Ordering::Acquire) < n_jobs {
            wait_a_little(&mut rounds);
        }
        // Every job has been run and nobody can take another one, so `job` may go.
        let panic = shared.panic.lock().expect("nothing panics while it holds the lock").take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// `work(i, chunk i of out)`.
    pub fn for_each_chunk<T: Send>(&mut self, out: &mut [T], chunk_len: usize, work: impl Fn(usize, &mut [T]) + Sync) {
        let chunks = Chunks::new(out, chunk_len);
        self.run(chunks.count(), |i| {
            // SAFETY: each job runs once, so each chunk is borrowed once.
            work(i, unsafe { chunks.get(i) });
        });
    }

    /// `work(i, chunk i of a, chunk i of b)`; `b` may be longer than it need be.
    #[track_caller]
    pub fn for_each_chunk_pair<T: Send, U: Send>(
        &mut self,
        (a, a_len): (&mut [T], usize),
        (b, b_len): (&mut [U], usize),
        work: impl Fn(usize, &mut [T], &mut [U]) + Sync,
    ) {
        let (a, b) = (Chunks::new(a, a_len), Chunks::new(b, b_len));
        assert!(b.count() >= a.count(), "{} chunks beside {}", b.count(), a.count());
        self.run(a.count(), |i| {
            // SAFETY: each job runs once, so each chunk is borrowed once.
            let (a, b) = unsafe { (a.get(i), b.get(i)) };
            work(i, a, b);
        });
    }
}

impl Drop for WorkerTeam {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker catches the panics of its jobs, so it ends well.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Take the next job of the current call and run it; false when there is none.
    fn take_and_run_one(&self) -> bool {
        let ticket = self.ticket.load(Ordering::Acquire);
        let job = (ticket & MAX_JOBS as u64) as usize;
        let (closure, caller) = (self.closure.load(Ordering::Acquire), self.caller.load(Ordering::Acquire));
        if job >= self.n_jobs.load(Ordering::Acquire) || caller.is_null() {
            return false;
        }
        // Whoever saw a field of a later call also sees that the ticket was closed before it, and fails here.
        if self.ticket.compare_exchange(ticket, ticket + 1, Ordering::AcqRel, Ordering::Relaxed).is_err() {
            return true; // another thread was faster; there may be more
        }
        // SAFETY: `caller` was stored from a `Caller` together with its closure, which lives until all jobs are done.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe { std::mem::transmute::<*mut (), Caller>(caller)(closure, job) }));
        if let Err(panic) = result {
            *self.panic.lock().expect("nothing panics while it holds the lock") = Some(panic);
        }
        self.done.fetch_add(1, Ordering::Release);
        true
    }

    fn work_until_stopped(&self) {
        let mut rounds = 0;
        while !self.stop.load(Ordering::Relaxed) {
            if self.take_and_run_one() {
                rounds = 0;
            } else if rounds < PATIENCE {
                wait_a_little(&mut rounds);
            } else {
                self.sleep();
                rounds = 0;
            }
        }
    }

    /// Sleep until a call comes. Whoever calls sees `sleeping` or has changed the ticket before it is read here.
    fn sleep(&self) {
        self.sleeping.fetch_add(1, Ordering::SeqCst);
        let ticket = self.ticket.load(Ordering::SeqCst);
        let idle = (ticket & MAX_JOBS as u64) as usize >= self.n_jobs.load(Ordering::SeqCst);
        if idle && !self.stop.load(Ordering::SeqCst) {
            std::thread::park();
        }
        self.sleeping.fetch_sub(1, Ordering::SeqCst);
    }
}

fn wait_a_little(rounds: &mut u32) {
    std::hint::spin_loop();
    *rounds += 1;
    // More threads than cores: let the one that has the work run.
    if rounds.is_multiple_of(4096) {
        std::thread::yield_now();
    }
}

/// # Safety
/// `closure` points to an `F` that is alive.
unsafe fn call_closure<F: Fn(usize) + Sync>(closure: *const (), job: usize) {
    // SAFETY: the caller's contract.
    unsafe { (*closure.cast::<F>())(job) }
}

/// A slice cut into chunks that several threads write.
struct Chunks<T> {
    start: *mut T,
    len: usize,
    chunk_len: usize,
}

// SAFETY: `get` hands out chunks that do not overlap, and T may be sent to other threads.
unsafe impl<T: Send> Sync for Chunks<T> {}

impl<T> Chunks<T> {
    #[track_caller]
    fn new(slice: &mut [T], chunk_len: usize) -> Self {
        assert!(chunk_len > 0 || slice.is_empty(), "chunks of no elements");
        Self { start: slice.as_mut_ptr(), len: slice.len(), chunk_len: chunk_len.max(1) }
    }

    fn count(&self) -> usize {
        self.len.div_ceil(self.chunk_len)
    }

    /// # Safety
    /// The slice is still borrowed mutably for this, and nobody else holds chunk `i`.
    #[expect(clippy::mut_from_ref, reason = "each chunk is borrowed once, which the caller vouches for")]
    unsafe fn get(&self, i: usize) -> &mut [T] {
        let from = i * self.chunk_len;
        assert!(from < self.len, "chunk {i} of {}", self.count());
        // SAFETY: the range lies inside the slice.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(from), self.chunk_len.min(self.len - from)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_runs_once_in_every_call_on_any_number_of_threads() {
        for threads in [1, 2, 3, 7] {
            let mut team = WorkerTeam::new(threads);
            assert_eq!(team.n_threads(), threads);
            for n_jobs in (0..200).chain([5000]) {
                let counts: Vec<AtomicUsize> = (0..n_jobs).map(|_| AtomicUsize::new(0)).collect();
                team.run(n_jobs, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{threads} threads, {n_jobs} jobs");
            }
        }
    }

    #[test]
    fn chunks_cover_the_slice_and_the_last_one_is_shorter() {
        let mut team = WorkerTeam::new(2);
        let (mut a, mut b) = (vec![0; 103], vec![0; 30]);
        team.for_each_chunk_pair((&mut a, 10), (&mut b, 2), |i, a, b| {
            a.fill(i + 1);
            b.fill(a.len());
        });
        assert!(a.iter().enumerate().all(|(at, &x)| x == at / 10 + 1));
        assert_eq!(b[18..24], [10, 10, 3, 3, 0, 0][..]);
        assert_eq!(b[20..22], [3, 3]);
    }

    #[test]
    fn sleeping_workers_wake_for_the_next_call() {
        let mut team = WorkerTeam::new(3);
        for _ in 0..5 {
            while team.shared.sleeping.load(Ordering::SeqCst) < 2 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            // Every job waits for another thread, so this returns only if the sleepers woke.
            let arrived = AtomicUsize::new(0);
            team.run(3, |_| {
                arrived.fetch_add(1, Ordering::SeqCst);
                while arrived.load(Ordering::SeqCst) < 3 {
                    std::thread::yield_now();
                }
            });
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_team_works_on() {
        let mut team = WorkerTeam::new(2);
        for _ in 0..3 {
            let result = catch_unwind(AssertUnwindSafe(|| team.run(50, |i| assert!(i != 17, "job 17"))));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            team.run(50, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 49 * 25);
        }
    }
}
