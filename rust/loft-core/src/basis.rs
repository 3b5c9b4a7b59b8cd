//! Supports and subspaces that need no gradient, and the checked forms of the small public operations.
//!
//! `random`: Q of a Gaussian. `coordinate`: r columns of I. `orthonormal`: Q of a given matrix.
//! `skew_planes`: the top-r invariant subspace of a given dense skew matrix.

use faer::Mat;

use crate::cayley::skew_part;
use crate::error::{Result, invalid};
use crate::orth::{orthonormalize, polish};
use crate::panel::Panel;
use crate::par::Par;
use crate::planes::{fix_rotations, split};
use crate::rng::{Stream, distinct, gaussians};
use crate::scalar::Real;
use crate::svd::rescale;
use crate::view::View;

fn check(rank: usize, n: usize) -> Result<()> {
    if rank == 0 || rank > n {
        return invalid(format!("rank must be from 1 to n = {n}, got {rank}"));
    }
    Ok(())
}

/// Q of an `n x rank` Gaussian, in f64 inside.
///
/// # Errors
/// A rank outside `1..=n`.
pub fn random_basis(n: usize, rank: usize, seed: u64) -> Result<Panel<f32>> {
    check(rank, n)?;
    Ok(orthonormalize(gaussians::<f64>(seed, Stream::Basis, n, rank, 0, Par::Seq), Par::Seq).cast())
}

/// `rank` distinct indices below `n`, ascending.
///
/// # Errors
/// A rank outside `1..=n`.
pub fn coordinate_indices(n: usize, rank: usize, seed: u64) -> Result<Vec<usize>> {
    check(rank, n)?;
    Ok(distinct(seed, n, rank))
}

/// Orthonormal columns with the span of `a`'s, in order, `diag(R) >= 0`; completed where `a` is rank deficient.
///
/// # Errors
/// More columns than rows, no columns, non-finite entries.
pub fn orthonormal<T: Real>(a: View<'_>, par: Par) -> Result<Panel<T>> {
    if a.cols() == 0 || a.cols() > a.rows() {
        return invalid(format!("a must have 1 to n columns, got shape ({}, {})", a.rows(), a.cols()));
    }
    let scan = a.scan("a", par)?;
    Ok(orthonormalize(Panel::from_rows(a.rows(), a.cols(), a.copied(scan.exponent, par)), par))
}

/// `(V, sigma)`: the `k x rank` top invariant subspace of a dense skew matrix in plane pairs
/// (`v1^T S v2 = sigma`), and each column's strength (0 for the last of an odd rank).
///
/// # Errors
/// A matrix that is not square, finite or skew-symmetric, a rank outside `1..=k`.
pub fn skew_planes<T: Real>(s: View<'_>, rank: usize) -> Result<(Panel<T>, Vec<f64>)> {
    if s.rows() != s.cols() {
        return invalid(format!("s must be square and skew-symmetric, got shape ({}, {})", s.rows(), s.cols()));
    }
    check(rank, s.rows())?;
    let scan = s.scan("s", Par::Seq)?;
    let unit = Panel::<T>::from_rows(s.rows(), s.cols(), s.copied(scan.exponent, Par::Seq));
    let k: Mat<f64> = skew_part("s", &unit)?;
    let planes = split(&k, rank)?;
    let mut vectors = Panel::<f64>::from_mat(planes.vectors.as_ref());
    fix_rotations(&mut vectors);
    polish(&mut vectors, Par::Seq);
    let mut values: Vec<f64> = planes.strengths[..rank / 2].iter().flat_map(|x| [*x; 2]).collect();
    rescale(&mut values, scan.exponent);
    values.resize(rank, 0.0);
    Ok((vectors.cast(), values))
}
