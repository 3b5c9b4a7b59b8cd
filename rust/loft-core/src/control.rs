//! How a caller stops a long call and follows its progress.

use crate::error::Result;

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
