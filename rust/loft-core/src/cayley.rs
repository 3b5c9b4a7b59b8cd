//! The Cayley transform `T = (I - A)(I + A)^{-1}` of a skew `A`, orthogonal with determinant one.
//!
//! Computed as `T = I - 2 A Z`, `Z = (I + A)^{-1}` by LU with partial pivoting in f64 (a Cholesky of
//! `I + A^T A` squares the condition and is worse), then rounded once. The error of that grows as `||A||`; a large A
//! is split into its planes, `A = sum sigma (p1 p2^T - p2 p1^T)`, each of which is turned by itself:
//! `T = I - sum 2 sigma / (1 + sigma^2) (sigma (p1 p1^T + p2 p2^T) + p1 p2^T - p2 p1^T)`.

use faer::Mat;
use faer::linalg::solvers::Solve;

use crate::error::{Result, invalid};
use crate::panel::Panel;
use crate::par::Par;
use crate::planes::split;
use crate::scalar::{Real, pow2};
use crate::view::View;

/// `(I - A)(I + A)^{-1}` for a skew-symmetric `r x r` matrix.
///
/// # Errors
/// If `a` is not square, not finite, or not skew-symmetric to its precision.
pub fn cayley<T: Real>(a: View<'_>) -> Result<Panel<T>> {
    let r = a.rows();
    if r != a.cols() {
        return invalid(format!("a must be square and skew-symmetric, got shape ({r}, {})", a.cols()));
    }
    a.scan("a", Par::Seq)?;
    let exponent = a.scan("a", Par::Seq)?.exponent;
    let entries = Panel::<T>::from_rows(r, r, a.copied(0, Par::Seq));
    let skew = skew_part("a", &entries)?;
    let mut transform = if exponent > LARGE {
        by_planes(&skew, exponent)?
    } else {
        let mut shifted = skew.clone();
        (0..r).for_each(|i| shifted[(i, i)] += 1.0);
        // A commutes with Z, so the solve can act on -2 A directly.
        shifted.partial_piv_lu().solve(faer::Scale(-2.0) * &skew)
    };
    (0..r).for_each(|i| transform[(i, i)] += 1.0);
    Ok(Panel::from_mat(transform.as_ref()))
}

/// Exponent of the largest entry from which on A is split into planes.
const LARGE: i32 = 8;

/// T - I from the planes of A.
fn by_planes(a: &Mat<f64>, exponent: i32) -> Result<Mat<f64>> {
    let r = a.nrows();
    // In two factors: 2^-exponent alone may underflow.
    let (half, rest) = (pow2(-(exponent / 2)), pow2(exponent / 2 - exponent));
    let unit = Mat::from_fn(r, r, |i, j| a[(i, j)] * half * rest);
    let planes = split(&unit, r)?;
    let mut turned = Mat::<f64>::zeros(r, r);
    for (k, strength) in planes.strengths.iter().enumerate() {
        // 1 / sigma, so that its square does not overflow: 2 sigma^2 / (1 + sigma^2) = 2 / (1 + q^2).
        let q = 1.0 / (strength / half / rest);
        let (along, across) = if q > 1.0 {
            let sigma = 1.0 / q;
            (2.0 * sigma * sigma / (1.0 + sigma * sigma), 2.0 * sigma / (1.0 + sigma * sigma))
        } else {
            (2.0 / (1.0 + q * q), 2.0 * q / (1.0 + q * q))
        };
        let (p1, p2) = (planes.vectors.col(2 * k), planes.vectors.col(2 * k + 1));
        for j in 0..r {
            for i in 0..r {
                turned[(i, j)] -= along * (p1[i] * p1[j] + p2[i] * p2[j]) + across * (p1[i] * p2[j] - p2[i] * p1[j]);
            }
        }
    }
    Ok(turned)
}

/// The skew part in f64 of a matrix that is skew to its precision.
pub(crate) fn skew_part<T: Real>(name: &str, a: &Panel<T>) -> Result<Mat<f64>> {
    let r = a.rows;
    let largest = a.data.iter().map(|x| x.f64().abs()).fold(0.0, f64::max);
    let mut worst = 0.0f64;
    let skew = Mat::from_fn(r, r, |i, j| {
        let (x, y) = (a.at(i, j).f64(), a.at(j, i).f64());
        worst = worst.max((x + y).abs());
        (x - y) / 2.0
    });
    if worst > 16.0 * T::EPS * largest {
        return invalid(format!(
            "{name} must be skew-symmetric ({name}^T = -{name}); its largest entry of {name} + {name}^T is {worst:.3e}"
        ));
    }
    Ok(skew)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{gaussian_panel, norm_2};

    fn skew(r: usize, norm: f64) -> Panel<f64> {
        let a = gaussian_panel::<f64>(r, r, 9);
        let skew = Mat::from_fn(r, r, |i, j| a.at(i, j) - a.at(j, i));
        Panel::from_mat((&skew * faer::Scale(norm / norm_2(&skew))).as_ref())
    }

    fn defect<T: Real>(a: &Panel<T>) -> f64 {
        let t = cayley::<T>(View::row_major(&a.data, a.rows, a.cols)).unwrap().cast::<f64>();
        norm_2(&(t.mat().transpose() * t.mat() - Mat::<f64>::identity(a.rows, a.rows)))
    }

    /// An fp64 solve rounded to fp32 stays below 8e-8 at r = 64.
    #[test]
    fn orthogonal_for_every_rank_and_norm() {
        for r in [2, 3, 8, 64, 352] {
            for norm in [1e-6, 0.1, 1.0, 10.0, 100.0] {
                let a = skew(r, norm);
                assert!(defect(&a) < 1e-13 * norm.max(1.0), "r={r} {norm}: {:e}", defect(&a));
                let most = if r <= 64 { 8e-8 } else { 2e-7 };
                assert!(defect(&a.cast::<f32>()) <= most, "r={r} {norm}: {:e}", defect(&a.cast::<f32>()));
            }
        }
    }

    #[test]
    fn planes_and_solve_agree() {
        for (r, norm) in [(2, 1.0), (5, 3.0), (16, 40.0), (33, 200.0)] {
            let a = skew(r, norm).mat().to_owned();
            let solved = cayley::<f64>(View::row_major(&skew(r, norm).data, r, r)).unwrap();
            let mut split = by_planes(&a, 3).unwrap();
            (0..r).for_each(|i| split[(i, i)] += 1.0);
            assert!(norm_2(&(split - solved.mat())) < 1e-13 * norm.max(1.0), "r={r} {norm}");
        }
    }

    /// Found by fuzzing: the solve alone gave entries of 1e19 where one direction is still and the others turn by pi.
    #[test]
    fn orthogonal_however_large() {
        for r in [2, 3, 5, 8, 33] {
            for norm in [1e3, 1e8, 1e17, 1e36, 1e300] {
                assert!(defect(&skew(r, norm)) < 1e-13, "r={r} {norm}: {:e}", defect(&skew(r, norm)));
            }
        }
        let mut mixed = skew(5, 1.0);
        for (k, x) in mixed.data.iter_mut().enumerate() {
            *x *= if k / 5 > 2 || k % 5 > 2 { 1e35 } else { 1e6 };
        }
        assert!(defect(&mixed) < 1e-13, "{:e}", defect(&mixed));
        assert!(defect(&mixed.cast::<f32>()) < 8e-7);
    }

    #[test]
    fn known_values() {
        let t = cayley::<f64>(View::row_major(&[0.0, 1.0, -1.0, 0.0], 2, 2)).unwrap();
        assert!((t.at(0, 0).abs() + t.at(1, 1).abs()) < 1e-15 && (t.at(0, 1) + 1.0).abs() < 1e-15);
        assert_eq!(cayley::<f32>(View::row_major(&[0f32], 1, 1)).unwrap().data, [1.0]);
    }

    #[test]
    fn refusals() {
        let message =
            |data: &[f64], rows, cols| cayley::<f64>(View::row_major(data, rows, cols)).unwrap_err().to_string();
        assert!(message(&[0.0; 6], 2, 3).contains("square"));
        assert!(message(&[0.0, 1.0, 1.0, 0.0], 2, 2).contains("skew-symmetric"));
        assert!(message(&[0.0, f64::NAN, 1.0, 0.0], 2, 2).contains("NaN"));
    }
}
