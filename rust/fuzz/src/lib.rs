//! What the fuzz targets share: bytes decoded into matrices of any dtype, stride, scale and spectrum (matrix.rs), and
//! references in f64 that use nothing of the core (reference.rs).

mod matrix;
mod reference;

pub use matrix::{Matrix, shape, tolerance};
pub use reference::{Unit, check_fraction, check_orthonormal, check_values, eigenvalues, skew, top};

/// Entries are right to this many rounding errors of a product of norms.
pub const ROUNDINGS: f64 = 64.0;

/// Krylov spaces of `A^T A` see squared values only, so triplets are right to this many square roots of eps, and say so.
pub const ROOTS: f64 = 32.0;

/// The largest dimension for which a result is also held against the optimum.
pub const SMALL: usize = 40;
