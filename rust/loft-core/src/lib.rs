//! The numerical core of LOFT (low-rank orthogonal fine-tuning, arXiv 2605.11872); it knows no Python.
//!
//! A support P is the top-r singular subspace of a gradient or a weight, or the top-r invariant subspace of
//! `S = Skew(W0^T G)`. [`select`] is the driver; below it [`krylov`] and [`skew`] are the truncated solvers over
//! [`op::Operator`]s, [`orth`] and [`planes`] their parts, [`view`] the door for matrices of any strides and dtype.
//! [`mod@cayley`] and [`householder`] are the closed forms of the transforms.

#![warn(missing_docs)]

pub mod basis;
pub mod cayley;
pub mod control;
pub mod error;
pub mod exact;
pub mod householder;
pub mod krylov;
pub mod op;
pub mod orth;
pub mod panel;
pub mod par;
pub mod planes;
pub mod rng;
pub mod scalar;
pub mod select;
pub mod skew;
mod small;
pub mod svd;
#[cfg(test)]
mod testing;
pub mod view;

pub use control::{Control, Free};
pub use error::{Error, Result};
pub use krylov::{Call, Params};
pub use panel::Panel;
pub use par::Par;
pub use scalar::{Dtype, Real};
pub use skew::Side;
pub use view::View;
