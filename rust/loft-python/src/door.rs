//! The one door from Python into the core: detach from the interpreter, work in our own thread pool, look for
//! signals and progress meanwhile, map errors.
//!
//! The calling thread waits while a pool runs the work, and attaches at most every 100 ms to look for signals, so
//! Ctrl-C sets a flag that the core meets between two passes. Pools are built on first use, one for each size, and
//! belong to a process: a forked child, whose copies have no threads behind them, builds its own.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use loft_core::{Control, Error, Par};
use pyo3::create_exception;
use pyo3::exceptions::{PyKeyboardInterrupt, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

create_exception!(loft_rs._core, NonFiniteError, PyValueError, "A matrix holds a NaN or an infinity.");

const SIGNALS: Duration = Duration::from_millis(100);

/// More would be a mistake, and would exhaust the machine before it failed.
const MOST_THREADS: usize = 1024;

/// A core error as the Python exception it is.
pub fn raise(error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::NonFinite { .. } => NonFiniteError::new_err(message),
        Error::Interrupted => PyKeyboardInterrupt::new_err(message),
        Error::NoConvergence(_) => PyRuntimeError::new_err(message),
        _ => PyValueError::new_err(message),
    }
}

enum Event<R> {
    Layer(String, usize, usize),
    Done(R),
}

/// The core's side of the conversation.
struct Line<R> {
    stop: AtomicBool,
    events: Mutex<Sender<Event<R>>>,
}

impl<R> Line<R> {
    fn send(&self, event: Event<R>) {
        // The receiver outlives every sender, so a failure could only mean that nobody listens any more.
        let _ = self.events.lock().unwrap_or_else(PoisonError::into_inner).send(event);
    }
}

impl<R: Send> Control for Line<R> {
    fn check(&self) -> loft_core::Result<()> {
        if self.stop.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
    }

    fn layer_done(&self, name: &str, done: usize, total: usize) -> loft_core::Result<()> {
        self.send(Event::Layer(name.to_owned(), done, total));
        self.check()
    }
}

type Outcome<R> = std::thread::Result<loft_core::Result<R>>;

/// Runs `work` in a pool of `threads` (default: see [`thread_count`]) and hands its result to Python.
pub fn door<R: Send>(
    py: Python<'_>,
    threads: Option<i64>,
    progress: Option<Py<PyAny>>,
    work: impl FnOnce(&dyn Control, Par) -> loft_core::Result<R> + Send,
) -> PyResult<R> {
    let pool = pool(thread_count(py, threads)?)?;
    let (sender, receiver) = channel::<Event<Outcome<R>>>();
    let line = Line { stop: AtomicBool::new(false), events: Mutex::new(sender) };
    let (line, progress) = (&line, progress.as_ref());
    let (outcome, stopped) = py.detach(move || {
        pool.in_place_scope(|scope| {
            scope.spawn(move |_| {
                let outcome = catch_unwind(AssertUnwindSafe(|| work(line, Par::Rayon)));
                line.send(Event::Done(outcome));
            });
            listen(&receiver, &line.stop, progress)
        })
    });
    if let Some(error) = stopped {
        return Err(error);
    }
    match outcome {
        Some(Ok(result)) => result.map_err(raise),
        _ => Err(PyRuntimeError::new_err("loft_rs met an internal error; please report the call that caused it")),
    }
}

/// Waits for the work, and meanwhile reports progress and looks for signals; the first exception stops the work.
fn listen<R>(
    events: &Receiver<Event<R>>,
    stop: &AtomicBool,
    progress: Option<&Py<PyAny>>,
) -> (Option<R>, Option<PyErr>) {
    let mut stopped: Option<PyErr> = None;
    let mut looked = Instant::now();
    loop {
        let event = events.recv_timeout(SIGNALS.saturating_sub(looked.elapsed()));
        let heard = match event {
            Ok(Event::Done(result)) => return (Some(result), stopped),
            Ok(Event::Layer(name, done, total)) => progress
                .filter(|_| stopped.is_none())
                .map_or(Ok(()), |call| Python::attach(|py| call.call1(py, (name, done, total)).map(drop))),
            Err(RecvTimeoutError::Timeout) => {
                looked = Instant::now();
                Python::attach(|py| py.check_signals())
            }
            Err(RecvTimeoutError::Disconnected) => return (None, stopped),
        };
        if let Err(error) = heard {
            stop.store(true, Ordering::Relaxed);
            stopped.get_or_insert(error);
        }
    }
}

/// `threads`, or `LOFT_RS_NUM_THREADS`, or `torch.get_num_threads()` where torch is loaded, or the cores.
fn thread_count(py: Python<'_>, threads: Option<i64>) -> PyResult<usize> {
    let positive = |count: i64, what: &str| {
        usize::try_from(count)
            .ok()
            .filter(|count| (1..=MOST_THREADS).contains(count))
            .ok_or_else(|| PyValueError::new_err(format!("{what} must be from 1 to {MOST_THREADS}, got {count}")))
    };
    if let Some(count) = threads {
        return positive(count, "threads");
    }
    if let Ok(text) = std::env::var("LOFT_RS_NUM_THREADS") {
        let count = text.trim().parse();
        let count =
            count.map_err(|_| PyValueError::new_err(format!("LOFT_RS_NUM_THREADS must be a number, got {text:?}")))?;
        return positive(count, "LOFT_RS_NUM_THREADS");
    }
    let modules = py.import("sys")?.getattr("modules")?;
    // A torch that is still being imported has no thread count yet.
    let torch = modules.call_method1("get", ("torch",))?;
    let count = torch.getattr_opt("get_num_threads")?.map(|get| get.call0()?.extract::<i64>()).transpose()?;
    count.map_or_else(
        || Ok(std::thread::available_parallelism().map_or(1, usize::from)),
        |count| positive(count, "torch.get_num_threads()"),
    )
}

/// The pools of the process that built them.
struct Pools {
    process: u32,
    by_size: HashMap<usize, Arc<ThreadPool>>,
}

static POOLS: Mutex<Option<Pools>> = Mutex::new(None);

fn pool(threads: usize) -> PyResult<Arc<ThreadPool>> {
    let mut guard = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    if guard.as_ref().is_some_and(|pools| pools.process != process) {
        // Dropping a parent's pool would wait for threads that do not exist here.
        std::mem::forget(guard.take());
    }
    let pools = guard.get_or_insert_with(|| Pools { process, by_size: HashMap::new() });
    if let Some(pool) = pools.by_size.get(&threads) {
        return Ok(Arc::clone(pool));
    }
    let built = ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("loft-rs-{i}")).build();
    let built =
        Arc::new(built.map_err(|error| PyRuntimeError::new_err(format!("cannot start {threads} threads: {error}")))?);
    pools.by_size.insert(threads, Arc::clone(&built));
    Ok(built)
}
