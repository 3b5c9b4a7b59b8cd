//! How a caller stops a long call and follows its progress.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use crate::error::{Error, Result};

/// Called back from the numerical core; an error stops the call and is handed on.
pub trait Control: Sync {
    /// Called between two passes over the data.
    ///
    /// # Errors
    /// Whatever should stop the call, usually [`crate::Error::Interrupted`].
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Called when `done` of `total` layers are finished, `name` the last of them.
    ///
    /// # Errors
    /// As for [`Control::check`].
    fn layer_done(&self, name: &str, done: usize, total: usize) -> Result<()> {
        let _ = (name, done, total);
        Ok(())
    }
}

/// Never stops, reports nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Free;

impl Control for Free {}

const LOOK: Duration = Duration::from_millis(50);

/// Runs a dense decomposition, which cannot be stopped midway, on a thread of its own and looks for a stop meanwhile; on
/// a stop the thread is left to end by itself.
///
/// # Errors
/// What `control` returns.
pub(crate) fn abandonable<R: Send + 'static>(
    control: &dyn Control,
    work: impl FnOnce() -> R + Send + 'static,
) -> Result<R> {
    control.check()?;
    let (sender, receiver) = channel();
    let spawned = std::thread::Builder::new().name("loft-dense".into()).spawn(move || {
        // Nobody listens any more after a stop.
        let _ = sender.send(work());
    });
    spawned.map_err(|_| Error::NoConvergence("a thread for a dense decomposition could not start, so it"))?;
    loop {
        match receiver.recv_timeout(LOOK) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => control.check()?,
            Err(RecvTimeoutError::Disconnected) => return Err(Error::NoConvergence("a dense decomposition")),
        }
    }
}
