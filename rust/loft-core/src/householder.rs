//! Products of reflections in compact form (the UT transform; HRA):
//!
//! ```text
//! H_0 H_1 .. H_{k-1} = I - Y T Y^T,   H_i = I - 2 y_i y_i^T,   T = S^{-1},   S = I/2 + striu(Y^T Y)
//! ```
//!
//! with unit columns `y_i = u_i / ||u_i||` and T upper triangular (Joffrain et al. 2006).

use faer::Mat;

use crate::error::{Result, invalid};
use crate::panel::Panel;
use crate::par::Par;
use crate::scalar::Real;
use crate::small::inverse_upper;
use crate::view::View;

/// `(Y, T)` for the columns of `u` (`n x k`), in f64 inside.
///
/// # Errors
/// If an entry is not finite, or a column is zero: a reflection needs a direction.
pub fn householder_wy<T: Real>(u: View<'_>) -> Result<(Panel<T>, Panel<T>)> {
    u.scan("u", Par::Seq)?;
    let mut y = Panel::from_rows(u.rows(), u.cols(), u.copied::<f64>(0, Par::Seq));
    // Each column by its largest entry first, so that none is lost beside another.
    let mut largest = vec![0f64; y.cols];
    for row in y.data.chunks(y.cols.max(1)) {
        row.iter().zip(&mut largest).for_each(|(x, largest)| *largest = largest.max(x.abs()));
    }
    for row in y.data.chunks_mut(largest.len().max(1)) {
        row.iter_mut().zip(&largest).for_each(|(x, largest)| *x /= if *largest > 0.0 { *largest } else { 1.0 });
    }
    let norms = y.norms();
    if let Some(j) = norms.iter().position(|x| *x == 0.0) {
        return invalid(format!("u: column {j} is zero; every column must be a nonzero direction"));
    }
    for row in y.data.chunks_mut(norms.len().max(1)) {
        row.iter_mut().zip(&norms).for_each(|(x, norm)| *x /= norm);
    }
    let gram = y.gram(Par::Seq);
    let s = Mat::from_fn(norms.len(), norms.len(), |i, j| match i.cmp(&j) {
        std::cmp::Ordering::Less => gram[(i, j)],
        std::cmp::Ordering::Equal => 0.5,
        std::cmp::Ordering::Greater => 0.0,
    });
    Ok((y.cast(), Panel::from_mat(inverse_upper(&s).as_ref())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::gaussian_panel;
    use proptest::prelude::*;

    #[test]
    fn a_small_column_is_not_lost_beside_a_large_one() {
        let (y, _) = householder_wy::<f64>(View::row_major(&[1e-200, 1.0, 0.0, 1.0], 2, 2)).unwrap();
        assert!((y.at(0, 0) - 1.0).abs() < 1e-15 && (y.at(0, 1) - 0.5f64.sqrt()).abs() < 1e-15);
    }

    /// At the scale of the second column the first underflows (found by fuzzing, as a wrong claim of the target).
    #[test]
    fn columns_hundreds_of_decades_apart() {
        let (y, _) = householder_wy::<f64>(View::row_major(&[3e-299, 0.0, 4e-299, -2e183], 2, 2)).unwrap();
        let wanted = [0.6, 0.0, 0.8, -1.0];
        assert!(y.data.iter().zip(wanted).all(|(x, wanted)| (x - wanted).abs() < 1e-15));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn equals_the_product_of_reflections(n in 1usize..30, k in 1usize..12, e in -200i32..200, seed in 0u64..1000) {
            let u = gaussian_panel::<f64>(n, k, seed).scaled(crate::scalar::pow2(e));
            let (y, t) = householder_wy::<f64>(View::row_major(&u.data, n, k)).unwrap();
            let mut product = Mat::<f64>::identity(n, n);
            for j in 0..k {
                let v = y.mat().col(j).as_mat();
                product = &product - (&product * v) * v.transpose() * faer::Scale(2.0);
            }
            let compact = Mat::<f64>::identity(n, n) - y.mat() * t.mat() * y.mat().transpose();
            prop_assert!((product - compact).norm_max() < 1e-11 * (1u32 << k) as f64);
            prop_assert!((0..k).all(|j| (j + 1..k).all(|i| t.at(i, j) == 0.0)));
        }
    }

    #[test]
    fn a_zero_column_is_named() {
        let message = householder_wy::<f32>(View::row_major(&[1.0, 0.0, 2.0, 0.0], 2, 2)).unwrap_err().to_string();
        assert!(message.contains("column 1"));
    }
}
