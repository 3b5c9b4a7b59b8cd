//! The top-r invariant subspace of `S = Skew(W0^T G) = (W0^T G - G^T W0) / 2` (arXiv 2605.11872, SkewGrad).
//!
//! Skew block Lanczos: every application of S gives a new block, `S V_j = V_{<=j} C_j + V_{j+1} R_j`, so q
//! applications span `V_1, S V_1, .., S^(q-1) V_1`: odd powers too, twice the depth of a method on S^2.
//! The compressed `K = V^T S V` is skew; its planes (planes.rs) are the Ritz planes, the captured energy is
//! `2 sum sigma_i^2` exactly, and the residual of a Ritz vector y is `||R_q y_last||`.
//!
//! Which way is decided by counting operations (k = columns of the Krylov space):
//! * a G of small numerical rank, `G = Q Q^T G`: `S = Skew((Q^T W0)^T (Q^T G))` is the same problem with few rows;
//! * the row space of `[W0; G]` when 2m is no more than k: a QR of n x 2m gives `S = Q (R_W R_G^T - R_G R_W^T) Q^T / 2`;
//! * S formed and split densely when k comes near n;
//! * otherwise Lanczos, with S formed (2 m n^2 + 2 n^2 k) or matrix-free (8 m n k).
//!
//! `||S||_F` is exact when S or its compression is at hand. Matrix-free,
//! `||S||_F^2 = ||K||_F^2 + 2 ||R_q||_F^2 + ||(I - P) S (I - P)||_F^2` with P the projector on the Krylov space;
//! only the last term is estimated, by Hutchinson probes (Hutch++: Meyer et al. 2021), with its standard error.

use faer::Mat;

use crate::control::{Control, abandonable};
use crate::error::{Result, invalid};
use crate::krylov::{Call, Depth, Space, Verdict, Work, missing};
use crate::op::{Dense, Operator, SkewDense, SkewProduct};
use crate::orth::{orthonormalize_with_r, polish};
use crate::panel::{Basis, Panel, cross, times};
use crate::par::Par;
use crate::planes::{Planes, fix_rotations, split};
use crate::rng::{Stream, gaussians};
use crate::scalar::{Dtype, Real, pow2};
use crate::view::View;

const PROBES: usize = 16;

/// Which side of W0 is rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `W0 R`: the basis is `n x r`.
    Input,
    /// `R W0`: the basis is `m x r`.
    Output,
}

/// Leading invariant planes and what is known about them.
#[derive(Debug, Clone)]
pub struct SkewSubspace<T> {
    /// `n x r`, orthonormal; plane pairs, `p1^T S p2 = sigma`.
    pub basis: Panel<T>,
    /// Strengths of the planes that the basis holds whole.
    pub strengths: Vec<f64>,
    /// Strength of the next plane, if there is one.
    pub next: Option<f64>,
    /// `||S p - K p||` per column.
    pub residuals: Vec<f64>,
    /// `||S||_F^2` and the standard error of that, zero if exact.
    pub square: (f64, f64),
    /// What that took; a pass reads W or G or both.
    pub work: Work,
}

/// The top-`call.rank` subspace of `S = Skew(W^T G)` at unit scale (each matrix times
/// `2^-exponent`); `square` is `||G||_F^2` at that scale.
///
/// # Errors
/// What `call.control` returns, and non-convergence of a small SVD.
pub fn skew_subspace<T: Real>(skew: SkewProduct<'_>, square: f64, call: Call<'_>) -> Result<SkewSubspace<T>> {
    call.control.check()?;
    let (fewer, spent) = fewer_rows::<T>(skew, square, call);
    let found = if let Some([weight, grad]) = fewer {
        let views = [&weight, &grad].map(|a| View::row_major(&a.data, a.rows, a.cols).transpose());
        let [weight, grad] = views.map(|view| Dense::new(view, 0));
        subspace::<T>(SkewProduct { weight, grad }, call)?
    } else {
        subspace(skew, call)?
    };
    Ok(SkewSubspace { work: spent + found.work, ..found })
}

/// Below this size the solvers themselves take no longer than the search for a low rank.
const SEARCHED: usize = 512;

/// `W^T Q` and `G^T Q` where `G = Q Q^T G` to rounding with a `Q` of few columns, and what the search took.
fn fewer_rows<T: Real>(skew: SkewProduct<'_>, square: f64, call: Call<'_>) -> (Option<[Panel<T>; 2]>, Work) {
    let SkewProduct { weight: w, grad: g } = skew;
    let Call { rank, params, par, .. } = call;
    let (m, n) = (g.view.rows(), g.view.cols());
    // Planes come in pairs, so a gradient of half the rank already fills the support.
    let samples = (rank / 2).next_multiple_of(8) + 8;
    if m.min(n) < SEARCHED.max(4 * samples) || matches!(g.view.dtype(), Dtype::Bf16 | Dtype::F16) {
        return (None, Work::default());
    }
    let sample = g.apply(&gaussians::<T>(params.seed, Stream::Sample, n, samples, 0, par), par);
    let work = Work::of(1, samples);
    let (q, r) = orthonormalize_with_r(sample, par);
    let floor = 64.0 * T::EPS * r[(0, 0)].abs();
    let found = (0..samples).take_while(|j| r[(*j, *j)] > floor).count();
    if found == 0 || found + 4 > samples {
        return (None, work);
    }
    // Enough rows for the rank; those past the rank of G are zero in Q^T G and change nothing.
    let q = Panel::from_mat(q.mat().subcols(0, found.max(rank.div_ceil(2))));
    let inside: Panel<T> = g.adjoint(&q, par);
    let work = work + Work::of(1, q.cols);
    let captured: f64 = inside.norms().iter().map(|x| x * x).sum();
    // What the samples may have missed must be rounding of the whole.
    if captured < (1.0 - 8.0 * T::EPS) * square {
        return (None, work);
    }
    (Some([w.adjoint(&q, par), inside]), work + Work::of(1, q.cols))
}

fn subspace<T: Real>(skew: SkewProduct<'_>, call: Call<'_>) -> Result<SkewSubspace<T>> {
    let (m, n) = (skew.weight.view.rows(), skew.weight.view.cols());
    let depth = Depth::new(call.rank, n, 2.6, 4.6);
    let k = depth.map_or(n, Depth::columns);
    if 2 * m <= n && 2 * m <= k {
        return row_space(skew, call);
    }
    let formed = || SkewDense::form(skew, call.control, call.par);
    let Some(depth) = depth else { return dense(&formed()?, call) };
    if m * n + n * k < 4 * m * k {
        let op = formed()?;
        call.control.check()?;
        // A formed S is all that reads the data.
        return match lanczos(&op, depth, Some(op.square()), call)? {
            Ok(found) => Ok(SkewSubspace { work: Work::DENSE, ..found }),
            Err(_) => dense(&op, call),
        };
    }
    let twice = |work: Work| work + work;
    match lanczos::<T>(&skew, depth, None, call)? {
        Ok(found) => Ok(SkewSubspace { work: twice(found.work), ..found }),
        Err(spent) => {
            let found = dense(&formed()?, call)?;
            Ok(SkewSubspace { work: twice(spent) + found.work, ..found })
        }
    }
}

/// Dense `Skew(W^T G)` (input side) or `Skew(G W^T)` (output side), at the scale of the inputs.
///
/// # Errors
/// Shapes that differ, empty or non-finite matrices, what `control` returns.
pub fn skew_project<T: Real>(
    weight: View<'_>,
    grad: View<'_>,
    side: Side,
    control: &dyn Control,
    par: Par,
) -> Result<Panel<T>> {
    let shape = |view: &View<'_>| (view.rows(), view.cols());
    if shape(&weight) != shape(&grad) {
        return invalid(format!(
            "weight and grad must have one shape, got {:?} and {:?}",
            shape(&weight),
            shape(&grad)
        ));
    }
    if weight.rows() == 0 || weight.cols() == 0 {
        return invalid(format!("weight and grad are empty: their shape is {:?}", shape(&weight)));
    }
    let exponents = [weight.scan("weight", par)?.exponent, grad.scan("grad", par)?.exponent];
    let (weight, grad) = match side {
        Side::Input => (weight, grad),
        // Skew(G W^T) = (G W^T - W G^T) / 2: with the transposes in the roles of the input side, up to their order.
        Side::Output => (weight.transpose(), grad.transpose()),
    };
    let (weight, grad) = (Dense::new(weight, exponents[0]), Dense::new(grad, exponents[1]));
    let skew = match side {
        Side::Input => SkewProduct { weight, grad },
        Side::Output => SkewProduct { weight: grad, grad: weight },
    };
    let mut matrix = SkewDense::<T>::form(skew, control, par)?.matrix;
    // In two factors and in f64: the scale may lie outside the range of T where the entries do not.
    let exponent = exponents[0] + exponents[1];
    let (half, rest) = (pow2(exponent / 2), pow2(exponent - exponent / 2));
    matrix.data.iter_mut().for_each(|x| *x = T::of(x.f64() * half * rest));
    Ok(matrix)
}

fn dense<T: Real>(op: &SkewDense<T>, call: Call<'_>) -> Result<SkewSubspace<T>> {
    let Call { rank, control, par, .. } = call;
    let small = op.matrix.mat();
    let k = Mat::from_fn(small.nrows(), small.ncols(), |i, j| small[(i, j)].f64());
    let ritz = abandonable(control, move || Ritz::whole(k, rank))??;
    let basis = Panel::from_mat(ritz.planes.vectors.as_ref());
    Ok(assemble(basis, &ritz, (op.square(), 0.0), Work::DENSE, par))
}

fn row_space<T: Real>(skew: SkewProduct<'_>, call: Call<'_>) -> Result<SkewSubspace<T>> {
    let Call { rank, control, par, .. } = call;
    let (m, n) = (skew.weight.view.rows(), skew.weight.view.cols());
    let [w, g] = [skew.weight, skew.grad].map(|a| a.view.transpose().copied::<f64>(a.exponent, par));
    let rows = w.chunks(m).zip(g.chunks(m)).flat_map(|(w, g)| w.iter().chain(g).copied());
    let (q, r) = orthonormalize_with_r(Panel::from_rows(n, 2 * m, rows.collect()), par);
    let (r_w, r_g) = (r.subcols(0, m), r.subcols(m, m));
    let product = r_w * r_g.transpose();
    let k = Mat::from_fn(2 * m, 2 * m, |i, j| (product[(i, j)] - product[(j, i)]) / 2.0);
    let ritz = abandonable(control, move || Ritz::whole(k, rank))??;
    let basis = times(q.mat(), ritz.planes.vectors.as_ref(), par).cast();
    Ok(assemble(basis, &ritz, (ritz.k.squared_norm_l2(), 0.0), Work::DENSE, par))
}

/// What was spent, if the Krylov space came near the whole space.
fn lanczos<T: Real>(
    op: &impl Operator<T>,
    depth: Depth,
    square: Option<f64>,
    call: Call<'_>,
) -> Result<std::result::Result<SkewSubspace<T>, Work>> {
    let Call { rank, params, control, par } = call;
    let n = op.cols();
    let mut space = Space::start(n, depth, params.seed, None, par);
    for step in 1.. {
        control.check()?;
        space.advance(|x| op.apply(x, par), par);
        // With nothing left outside, and room for the rank inside, the planes are final.
        let exhausted = space.exhausted() && space.basis.cols() >= rank;
        if !exhausted && !depth.tests(step, rank, params.tol) {
            continue;
        }
        control.check()?;
        let ritz = Ritz::of(space.projected(-1.0), space.tail.clone(), rank)?;
        let missing = match space.invariant() {
            _ if exhausted => 0.0,
            // More planes of the same strengths may lie outside.
            true => f64::INFINITY,
            false => ritz.missing(),
        };
        match depth.verdict(step, n, missing, ritz.energy(), params.tol) {
            Verdict::Done => {
                control.check()?;
                let estimate = || (estimate_square(op, &space.basis, &ritz, params.seed, par), Work::of(1, PROBES));
                let (square, extra) = square.map_or_else(estimate, |square| ((square, 0.0), Work::default()));
                let lifted = space.lift(&ritz.planes.vectors, par);
                return Ok(Ok(assemble(lifted, &ritz, square, Work::of(step, depth.block) + extra, par)));
            }
            Verdict::Dense => return Ok(Err(Work::of(step, depth.block))),
            Verdict::Deeper => {}
        }
    }
    unreachable!("the loop above ends by returning")
}

/// The planes of a compressed S, and the tail `R_q` by which S leaves the space (no columns where it does not).
struct Ritz {
    k: Mat<f64>,
    tail: Mat<f64>,
    planes: Planes,
    residuals: Vec<f64>,
}

impl Ritz {
    fn of(k: Mat<f64>, tail: Mat<f64>, rank: usize) -> Result<Self> {
        let planes = split(&k, rank)?;
        let residuals = residual_norms(&k, &planes, &tail);
        Ok(Self { k, tail, planes, residuals })
    }

    fn whole(k: Mat<f64>, rank: usize) -> Result<Self> {
        Self::of(k, Mat::zeros(0, 0), rank)
    }

    /// Strengths by column.
    fn values(&self) -> Vec<f64> {
        let strength = |j: usize| self.planes.strengths.get(j / 2).copied().unwrap_or(0.0);
        (0..self.residuals.len()).map(strength).collect()
    }

    fn energy(&self) -> f64 {
        self.values().iter().map(|x| x * x).sum()
    }

    fn missing(&self) -> f64 {
        let next = self.planes.strengths.get(self.residuals.len().div_ceil(2)).copied().unwrap_or(0.0);
        missing(&self.values(), &self.residuals, next)
    }
}

/// `||S y - K-part||`: what leaves the space, and what the split of K itself left over.
fn residual_norms(k: &Mat<f64>, planes: &Planes, tail: &Mat<f64>) -> Vec<f64> {
    let y = &planes.vectors;
    let image = k * y;
    (0..y.ncols())
        .map(|j| {
            let sigma = planes.strengths.get(j / 2).copied().unwrap_or(0.0);
            let partner = if j % 2 == 0 { j + 1 } else { j - 1 };
            let sign = if j % 2 == 0 { -sigma } else { sigma };
            let inside = if partner < y.ncols() {
                (0..y.nrows()).map(|i| (image[(i, j)] - sign * y[(i, partner)]).powi(2)).sum::<f64>()
            } else {
                0.0
            };
            let last = y.col(j).subrows(y.nrows() - tail.ncols(), tail.ncols());
            let outside = (tail * last).squared_norm_l2();
            (inside + outside).sqrt()
        })
        .collect()
}

/// `||S||_F^2` and its standard error, from the Krylov space and probes in its complement.
fn estimate_square<T: Real>(op: &impl Operator<T>, basis: &Basis<T>, ritz: &Ritz, seed: u64, par: Par) -> (f64, f64) {
    let outside = |mut panel: Panel<T>| {
        let c = cross(basis.mat(), panel.mat(), par);
        panel.subtract(basis.mat(), c.as_ref(), par);
        panel
    };
    let probes = outside(gaussians(seed, Stream::Probe, op.cols(), PROBES, 0, par));
    let samples: Vec<f64> = outside(op.apply(&probes, par)).norms().iter().map(|x| x * x).collect();
    let mean = samples.iter().sum::<f64>() / PROBES as f64;
    let spread = samples.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (PROBES - 1) as f64;
    let known = ritz.k.squared_norm_l2() + 2.0 * ritz.tail.squared_norm_l2();
    (known + mean, (spread / PROBES as f64).sqrt())
}

fn assemble<T: Real>(mut basis: Panel<T>, ritz: &Ritz, square: (f64, f64), work: Work, par: Par) -> SkewSubspace<T> {
    let rank = basis.cols;
    fix_rotations(&mut basis);
    polish(&mut basis, par);
    let whole = rank / 2;
    let largest = ritz.planes.strengths.first().copied().unwrap_or(0.0);
    SkewSubspace {
        basis,
        strengths: ritz.planes.strengths[..whole].to_vec(),
        next: ritz.planes.strengths.get(whole).copied(),
        // The basis is handed out rounded.
        residuals: ritz.residuals.iter().map(|miss| miss.hypot(T::EPS * largest)).collect(),
        square,
        work,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Free;
    use crate::krylov::Params;
    use crate::orth::orthogonality_error;
    use crate::testing::{captured_skew, gaussian_panel, skew_of, with_spectrum};

    const PARAMS: Params = Params { tol: None, seed: 0, left: false };

    fn solve<T: Real>(w: &Panel<T>, g: &Panel<T>, rank: usize, params: Params) -> SkewSubspace<T> {
        let [w, g] = [w, g].map(|a| {
            let view = View::row_major(&a.data, a.rows, a.cols);
            let scan = view.scan("a", Par::Seq).unwrap();
            assert_eq!(scan.exponent, 0, "the tests here are at unit scale");
            (Dense::new(view, 0), scan.square)
        });
        let skew = SkewProduct { weight: w.0, grad: g.0 };
        skew_subspace(skew, g.1, Call { rank, params, control: &Free, par: Par::Seq }).unwrap()
    }

    fn unit(a: Panel<f64>) -> Panel<f64> {
        let largest = a.data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        a.scaled(0.7 / largest)
    }

    /// Energy against the optimum, for every way the operation count may choose.
    fn check(m: usize, n: usize, rank: usize, power: f64) {
        let w = unit(gaussian_panel(m, n, 1));
        let g = unit(with_spectrum(m, n, 4, |i| i.powf(-power)));
        let s = skew_of(&w, &g);
        let exact = split(&s, rank).unwrap();
        let best: f64 = 2.0 * exact.strengths[..rank / 2].iter().map(|x| x * x).sum::<f64>();
        let total = s.squared_norm_l2();
        let found = [solve(&w.cast::<f32>(), &g.cast::<f32>(), rank, PARAMS), {
            let f = solve(&w, &g, rank, PARAMS);
            SkewSubspace {
                basis: f.basis.cast(),
                strengths: f.strengths,
                next: f.next,
                residuals: f.residuals,
                square: f.square,
                work: f.work,
            }
        }];
        for found in found {
            let kept = captured_skew(&s, &found.basis);
            let missing = 1.0 - kept / best;
            assert!(missing < 1e-4, "{m}x{n} r={rank} i^-{power}: {missing:e}");
            assert!(orthogonality_error(&found.basis) <= 50.0 * f64::from(f32::EPSILON));
            let claimed: f64 = 2.0 * found.strengths.iter().map(|x| x * x).sum::<f64>();
            assert!(claimed <= kept * (1.0 + 1e-5) && claimed >= kept * (1.0 - 1e-5), "{claimed} {kept}");
            let (square, error) = found.square;
            assert!((square - total).abs() <= 5.0 * error + 1e-5 * total, "{square} +- {error}, is {total}");
        }
    }

    #[test]
    fn matrix_free() {
        check(300, 600, 16, 0.7);
        check(300, 600, 32, 0.5);
    }

    #[test]
    fn formed() {
        check(3000, 400, 8, 0.7);
    }

    #[test]
    fn formed_and_dense() {
        check(60, 50, 16, 0.5);
        check(50, 60, 50, 0.5);
        check(7, 3, 2, 0.5);
    }

    /// Found by fuzzing: where S is small, its bits depended on the strides of W and G.
    #[test]
    fn a_narrow_product_has_the_same_bits_in_any_layout() {
        for (m, n) in [(79, 3), (100, 6), (300, 2), (700, 16), (100, 17), (64, 40)] {
            let [w, g] = [1, 2].map(|seed| gaussian_panel::<f32>(m, n, seed));
            let turned = |a: &Panel<f32>| (0..n * m).map(|k| a.at(k % m, k / m)).collect::<Vec<f32>>();
            let columns = [&w, &g].map(turned);
            let by_row = [&w, &g].map(|a| View::row_major(&a.data, m, n));
            let by_column = [0, 1].map(|i| View::row_major(&columns[i], n, m).transpose());
            let project = |w, g| skew_project::<f32>(w, g, Side::Input, &Free, Par::Seq).unwrap().data;
            let wanted = project(by_row[0], by_row[1]);
            for (w, g) in [(by_row[0], by_column[1]), (by_column[0], by_row[1]), (by_column[0], by_column[1])] {
                assert_eq!(project(w, g), wanted, "{m} x {n}");
            }
        }
    }

    #[test]
    fn row_space() {
        check(20, 300, 16, 0.5);
        check(2, 40, 2, 0.5);
        check(2, 1000, 2, 0.5);
    }

    #[test]
    fn low_rank_gradients() {
        for true_rank in [1, 4] {
            let w = unit(gaussian_panel(400, 500, 1));
            let g = unit(with_spectrum(400, 500, 4, |i| if i <= f64::from(true_rank) { 1.0 } else { 0.0 }));
            let s = skew_of(&w, &g);
            let found = solve(&w.cast::<f32>(), &g.cast::<f32>(), 16, PARAMS);
            assert!(orthogonality_error(&found.basis) <= 50.0 * f64::from(f32::EPSILON));
            assert!(captured_skew(&s, &found.basis) > (1.0 - 1e-5) * s.squared_norm_l2());
        }
    }

    #[test]
    fn a_gradient_of_few_rows_in_disguise() {
        for (true_rank, rank) in [(1, 16), (5, 16), (8, 16), (20, 40)] {
            let w = unit(gaussian_panel(560, 600, 1));
            let g = unit(with_spectrum(560, 600, 4, |i| if i <= f64::from(true_rank) { 1.0 / i } else { 0.0 }));
            let s = skew_of(&w, &g);
            let best: f64 = 2.0 * split(&s, rank).unwrap().strengths[..rank / 2].iter().map(|x| x * x).sum::<f64>();
            let (narrow, wide) = (solve(&w.cast::<f32>(), &g.cast::<f32>(), rank, PARAMS), solve(&w, &g, rank, PARAMS));
            assert_eq!((narrow.work.passes, wide.work.passes), (4, 4), "seen as what it is");
            for (basis, eps) in [(narrow.basis, 1e-5), (wide.basis.cast(), 1e-6)] {
                assert!(orthogonality_error(&basis) <= 50.0 * f64::from(f32::EPSILON));
                assert!(captured_skew(&s, &basis) > (1.0 - eps) * best);
            }
        }
    }

    #[test]
    fn tol_is_kept() {
        let w = unit(gaussian_panel(700, 700, 1));
        let g = unit(with_spectrum(700, 700, 4, |i| i.powf(-0.3)));
        let s = skew_of(&w, &g);
        let best: f64 = 2.0 * split(&s, 8).unwrap().strengths[..4].iter().map(|x| x * x).sum::<f64>();
        for tol in [1e-3, 1e-6] {
            let found = solve(&w, &g, 8, Params { tol: Some(tol), seed: 1, left: false });
            let missing = 1.0 - captured_skew(&s, &found.basis.cast()) / best;
            assert!(missing < tol.max(2e-7), "{tol}: {missing:e}");
        }
    }

    #[test]
    fn products_at_the_ends_of_the_range() {
        let (w, g) = ([3e38f32, 1.0, 2.0, 0.5], [1e-20f32, 2e-20, 0.0, 1e-20]);
        let views = [View::row_major(&w, 2, 2), View::row_major(&g, 2, 2)];
        let found = skew_project::<f32>(views[0], views[1], Side::Input, &Free, Par::Seq).unwrap();
        let want = (3e38 * 2e-20 + 2.0 * 1e-20 - 1.0 * 1e-20) / 2.0;
        assert!((f64::from(found.at(0, 1)) / want - 1.0).abs() < 1e-6 && found.at(1, 0) == -found.at(0, 1));
        let empty = View::row_major::<f32>(&[], 0, 7);
        assert!(skew_project::<f32>(empty, empty, Side::Input, &Free, Par::Seq).is_err());
    }

    #[test]
    fn both_sides_project() {
        let (w, g) = (gaussian_panel::<f64>(5, 8, 1), gaussian_panel::<f64>(5, 8, 2));
        let views = [&w, &g].map(|a| View::row_major(&a.data, 5, 8));
        let input = skew_project::<f64>(views[0], views[1], Side::Input, &Free, Par::Seq).unwrap();
        assert!((input.mat() - skew_of(&w, &g)).norm_max() < 1e-14);
        let output = skew_project::<f64>(views[0], views[1], Side::Output, &Free, Par::Seq).unwrap();
        assert!((output.mat() - skew_of(&g.transposed(), &w.transposed())).norm_max() < 1e-14);
    }
}
