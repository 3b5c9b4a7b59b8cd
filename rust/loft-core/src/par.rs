//! Who does the work: this thread, or the rayon pool that the caller is in.
//!
//! Work is always cut into the same blocks and reduced in the same order, so the bits of a result
//! do not depend on the number of threads. faer is built without rayon: each of its calls runs on one.

use rayon::prelude::*;

/// Sequential, or spread over the current rayon pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Par {
    /// On this thread.
    Seq,
    /// Over the pool this is called in.
    Rayon,
}

impl Par {
    /// Calls `work(index, chunk)` on consecutive chunks of `size` entries.
    pub(crate) fn chunks<T: Send>(self, data: &mut [T], size: usize, work: impl Fn(usize, &mut [T]) + Sync + Send) {
        let size = size.max(1);
        match self {
            Self::Seq => data.chunks_mut(size).enumerate().for_each(|(i, c)| work(i, c)),
            Self::Rayon => data.par_chunks_mut(size).enumerate().for_each(|(i, c)| work(i, c)),
        }
    }

    /// `work(state, 0), work(state, 1), ..` in order, with scratch space that is made once for each thread's share.
    pub(crate) fn map_with<S: Send, R: Send>(
        self,
        count: usize,
        state: impl Fn() -> S + Sync + Send,
        work: impl Fn(&mut S, usize) -> R + Sync + Send,
    ) -> Vec<R> {
        match self {
            Self::Seq => {
                let mut state = state();
                (0..count).map(|i| work(&mut state, i)).collect()
            }
            Self::Rayon => (0..count).into_par_iter().map_init(state, work).collect(),
        }
    }

    /// `work(0), work(1), ..` in order.
    pub(crate) fn map<R: Send>(self, count: usize, work: impl Fn(usize) -> R + Sync + Send) -> Vec<R> {
        match self {
            Self::Seq => (0..count).map(work).collect(),
            Self::Rayon => (0..count).into_par_iter().map(work).collect(),
        }
    }
}
