//! Jobs to selections: the supports that need a decomposition.
//!
//! * `gradsvd`: top-r right singular vectors of G; `principal`: of W0.
//! * `skewgrad`: top-r invariant subspace of `Skew(W0^T G)`.
//! * Output side: the same of the transposes, `U_r` of G or W0, and `Skew(G W0^T)`.
//!
//! Every job is checked before any is worked on. Many small layers run side by side, large ones one after
//! the other with their products spread over the threads; by operations, and with the same bits either way.
//! `energy` is `sum_{i<=r} sigma_i^2 / ||A||_F^2`, for skewgrad `||P^T S P||_F^2 / ||S||_F^2`.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::control::Control;
use crate::error::{Error, Result, invalid};
use crate::krylov::{Call, Params, Truncated, Work};
use crate::op::{Dense, SkewProduct};
use crate::panel::Panel;
use crate::par::Par;
use crate::scalar::{Dtype, Real};
use crate::skew::{SkewSubspace, skew_subspace};
use crate::svd::{check_rank, check_tol, fraction, leading, relative_gap, rescale};
use crate::view::{Scan, View};

pub use crate::skew::Side;

/// How a support is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Top singular vectors of the gradient.
    GradSvd,
    /// Top invariant planes of `Skew(W0^T G)`.
    SkewGrad,
    /// Top singular vectors of the weight.
    Principal,
}

/// One layer. Both matrices are `(out, in)`.
#[derive(Debug, Clone)]
pub struct Job<'a> {
    /// The layer's name; empty if there is but one.
    pub name: String,
    /// The gradient, for `gradsvd` and `skewgrad`.
    pub grad: Option<View<'a>>,
    /// The frozen weight, for `skewgrad` and `principal`.
    pub weight: Option<View<'a>>,
    /// Columns of the support.
    pub rank: usize,
}

/// What all layers share.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How the supports are chosen.
    pub method: Method,
    /// Which side is rotated.
    pub side: Side,
    /// Largest fraction of the captured energy that may be missing; `None` for the default depth.
    pub tol: Option<f64>,
    /// The seed, the same for every layer.
    pub seed: u64,
}

/// A support and what it achieves.
#[derive(Debug, Clone)]
pub struct Selection {
    /// `n x r` (input side), orthonormal columns.
    pub basis: Panel<f32>,
    /// Singular values, or plane strengths twice each; an odd last column of skewgrad has 0.
    pub values: Vec<f64>,
    /// Captured fraction of the squared objective.
    pub energy: f64,
    /// Its standard error; 0 where it is exact.
    pub energy_stderr: f64,
    /// Residual norms of the Ritz vectors.
    pub residuals: Vec<f64>,
    /// `(sigma_r - sigma_{r+1}) / sigma_r`; 0 where sigma_r is rounding, NaN where there is no next.
    pub gap: f64,
    /// Passes over the data, and columns multiplied in them.
    pub work: Work,
    /// Wall-clock time of this layer.
    pub seconds: f64,
}

/// A job that passed every check: views turned to the input side, with their scans.
struct Checked<'a> {
    weight: Option<(View<'a>, Scan)>,
    grad: Option<(View<'a>, Scan)>,
}

/// Layers cheaper than this many operations run side by side.
const SMALL: f64 = 4e9;

/// Chooses a support for every job.
///
/// # Errors
/// Before any work: a missing or superfluous matrix, shapes that differ, a rank outside `1..=min(m, n)`, non-finite
/// entries, all-zero matrices. Later: what `control` returns, a skew part that is zero.
pub fn select(jobs: &[Job<'_>], options: Options, control: &dyn Control, par: Par) -> Result<Vec<Selection>> {
    check_tol(options.tol)?;
    jobs.iter().try_for_each(|job| check_shapes(job, options.method))?;
    let checked = check_entries(jobs, options, par)?;
    // Counted and told in one step, so that the counts arrive in order.
    let done = Mutex::new(0);
    let run = |i: usize, par: Par| {
        control.check()?;
        let start = Instant::now();
        let mut selection = solve(&jobs[i], &checked[i], options, control, par)?;
        selection.seconds = start.elapsed().as_secs_f64();
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        *done += 1;
        control.layer_done(&jobs[i].name, *done, jobs.len())?;
        Ok(selection)
    };
    let (small, large): (Vec<usize>, Vec<usize>) =
        (0..jobs.len()).partition(|&i| jobs.len() > 1 && operations(&jobs[i]) < SMALL);
    let mut results: Vec<Option<Result<Selection>>> = jobs.iter().map(|_| None).collect();
    for (i, result) in small.iter().zip(par.map(small.len(), |i| run(small[i], Par::Seq))) {
        results[*i] = Some(result);
    }
    for i in large {
        results[i] = Some(Ok(run(i, par)?));
    }
    results.into_iter().flatten().collect()
}

fn operations(job: &Job<'_>) -> f64 {
    let matrices = [job.grad, job.weight];
    matrices.iter().flatten().map(|a| 12.0 * (a.rows() * a.cols()) as f64 * job.rank.max(16) as f64).sum()
}

fn of_layer(name: &str) -> String {
    if name.is_empty() { String::new() } else { format!(" of layer '{name}'") }
}

fn check_shapes(job: &Job<'_>, method: Method) -> Result<()> {
    let layer = of_layer(&job.name);
    let (needs_grad, needs_weight) = (method != Method::Principal, method != Method::GradSvd);
    for (argument, matrix, needed) in [("grads", &job.grad, needs_grad), ("weights", &job.weight, needs_weight)] {
        if matrix.is_some() != needed {
            let word = if needed { "needed" } else { "not used" };
            return invalid(format!("{argument}{layer}: {word} with method={method}"));
        }
    }
    let shape = |view: &View<'_>| (view.rows(), view.cols());
    if let (Some(grad), Some(weight)) = (&job.grad, &job.weight)
        && shape(grad) != shape(weight)
    {
        return invalid(format!(
            "grads and weights{layer} must have one shape, got {:?} and {:?}",
            shape(grad),
            shape(weight)
        ));
    }
    let (rows, cols) = job.grad.as_ref().or(job.weight.as_ref()).map_or((0, 0), shape);
    check_rank(job.rank, rows, cols, &layer)
}

fn check_entries<'a>(jobs: &[Job<'a>], options: Options, par: Par) -> Result<Vec<Checked<'a>>> {
    let mut zero = Vec::new();
    let mut checked = Vec::with_capacity(jobs.len());
    for job in jobs {
        let mut scan = |argument: &str, view: Option<View<'a>>| -> Result<Option<(View<'a>, Scan)>> {
            let Some(view) = view else { return Ok(None) };
            let name = format!("{argument}{}", of_layer(&job.name));
            let found = view.scan(&name, par)?;
            if found.square == 0.0 {
                zero.push(name);
            }
            Ok(Some((if options.side == Side::Input { view } else { view.transpose() }, found)))
        };
        checked.push(Checked { grad: scan("grads", job.grad)?, weight: scan("weights", job.weight)? });
    }
    if zero.is_empty() { Ok(checked) } else { Err(Error::AllZero(zero)) }
}

fn solve(job: &Job<'_>, checked: &Checked<'_>, options: Options, control: &dyn Control, par: Par) -> Result<Selection> {
    let params = Params { tol: options.tol, seed: options.seed, left: false };
    let call = Call { rank: job.rank, params, control, par };
    let double = [&checked.grad, &checked.weight].into_iter().flatten().any(|(view, _)| view.dtype() == Dtype::F64);
    match (&checked.weight, &checked.grad) {
        (Some(weight), Some(grad)) => {
            let exponent = weight.1.exponent + grad.1.exponent;
            let product = (weight.1.square * grad.1.square).sqrt();
            let [w, g] = [weight, grad].map(|(view, scan)| Dense::new(*view, scan.exponent));
            let (skew, square) = (SkewProduct { weight: w, grad: g }, grad.1.square);
            if double {
                planes(skew_subspace::<f64>(skew, square, call)?, exponent, product, &job.name)
            } else {
                planes(skew_subspace::<f32>(skew, square, call)?, exponent, product, &job.name)
            }
        }
        (Some((view, scan)), None) | (None, Some((view, scan))) => {
            if double {
                Ok(vectors(leading::<f64>(*view, *scan, call)?, *scan))
            } else {
                Ok(vectors(leading::<f32>(*view, *scan, call)?, *scan))
            }
        }
        (None, None) => invalid("a job needs a matrix"),
    }
}

fn vectors<T: Real>(found: Truncated<T>, scan: Scan) -> Selection {
    let energy = fraction(found.values.iter().map(|x| x * x).sum(), scan.square);
    let gap = relative_gap::<T>(&found.values, found.next);
    let (mut values, mut residuals) = (found.values, found.residuals);
    rescale(&mut values, scan.exponent);
    rescale(&mut residuals, scan.exponent);
    Selection {
        basis: found.right.cast(),
        values,
        energy,
        energy_stderr: 0.0,
        residuals,
        gap,
        work: found.work,
        seconds: 0.0,
    }
}

fn planes<T: Real>(found: SkewSubspace<T>, exponent: i32, product: f64, name: &str) -> Result<Selection> {
    let (square, error) = found.square;
    if square.sqrt() <= 8.0 * T::EPS * product {
        return Err(Error::NoRotation(name.to_owned()));
    }
    let captured = 2.0 * found.strengths.iter().map(|x| x * x).sum::<f64>();
    let energy = fraction(captured, square);
    let gap = relative_gap::<T>(&found.strengths, found.next);
    let mut values: Vec<f64> = found.strengths.iter().flat_map(|x| [*x, *x]).collect();
    values.resize(found.basis.cols, 0.0);
    let mut residuals = found.residuals;
    rescale(&mut values, exponent);
    rescale(&mut residuals, exponent);
    Ok(Selection {
        basis: found.basis.cast(),
        values,
        energy,
        energy_stderr: energy * error / square,
        residuals,
        gap,
        work: found.work,
        seconds: 0.0,
    })
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::GradSvd => "'gradsvd'",
            Self::SkewGrad => "'skewgrad'",
            Self::Principal => "'principal'",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Free;
    use crate::orth::orthogonality_error;
    use crate::testing::{captured, captured_skew, gaussian_panel, singular_values, skew_of, with_spectrum};

    fn options(method: Method, side: Side) -> Options {
        Options { method, side, tol: None, seed: 0 }
    }

    fn view<T: Real>(a: &Panel<T>) -> View<'_> {
        View::row_major(&a.data, a.rows, a.cols)
    }

    fn job<'a>(name: &str, grad: Option<View<'a>>, weight: Option<View<'a>>, rank: usize) -> Job<'a> {
        Job { name: name.into(), grad, weight, rank }
    }

    fn one<T: Real>(grad: &Panel<T>, rank: usize) -> Selection {
        let jobs = [job("", Some(view(grad)), None, rank)];
        select(&jobs, options(Method::GradSvd, Side::Input), &Free, Par::Seq).unwrap().remove(0)
    }

    fn message(jobs: &[Job<'_>], method: Method) -> String {
        select(jobs, options(method, Side::Input), &Free, Par::Seq).unwrap_err().to_string()
    }

    #[test]
    fn scales_change_nothing_but_the_scale() {
        for (m, n, rank) in [(200, 150, 4), (30, 20, 6)] {
            let base = with_spectrum(m, n, 1, |i| 1.0 / i);
            let at_one = one(&base.cast::<f32>(), rank);
            for power in [-30, -12, 12, 30] {
                let scaled = base.scaled(10f64.powi(power)).cast::<f32>();
                let found = one(&scaled, rank);
                assert!((found.energy - at_one.energy).abs() < 1e-6);
                assert!((found.values[0] / 10f64.powi(power) - 1.0).abs() < 1e-5);
                assert!(orthogonality_error(&found.basis) < 1e-6);
                let wide = one(&base.scaled(10f64.powi(9 * power)), rank);
                assert!(
                    (wide.energy - at_one.energy).abs() < 1e-6
                        && (wide.values[0] / 10f64.powi(9 * power) - 1.0).abs() < 1e-9
                );
                let jobs = [job("", Some(view(&scaled)), Some(view(&scaled)), 2)];
                let nothing = select(&jobs, options(Method::SkewGrad, Side::Input), &Free, Par::Seq);
                assert!(matches!(nothing, Err(Error::NoRotation(_))), "Skew(G^T G) is zero");
            }
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let matrices: Vec<_> = [(500, 400), (64, 48), (1, 9), (900, 1100)]
            .into_iter()
            .map(|(m, n)| (gaussian_panel::<f32>(m, n, 1), with_spectrum(m, n, 2, |i| 1.0 / i).cast::<f32>()))
            .collect();
        let run = |method: Method, par: Par| {
            let jobs: Vec<_> = matrices
                .iter()
                .map(|(w, g)| {
                    let grad = (method != Method::Principal).then(|| view(g));
                    let weight = (method != Method::GradSvd).then(|| view(w));
                    job("layer", grad, weight, 8.min(w.rows))
                })
                .collect();
            let found = select(&jobs, options(method, Side::Input), &Free, par).unwrap();
            let bits: Vec<u32> = found.iter().flat_map(|s| s.basis.data.iter().map(|x| x.to_bits())).collect();
            let energies: Vec<u64> =
                found.iter().flat_map(|s| [s.energy.to_bits(), s.energy_stderr.to_bits()]).collect();
            (bits, energies)
        };
        for method in [Method::GradSvd, Method::SkewGrad, Method::Principal] {
            let alone = run(method, Par::Seq);
            for threads in [1, 2, 4] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                assert!(pool.install(|| run(method, Par::Rayon)) == alone, "{method} with {threads} threads");
            }
        }
    }

    #[test]
    fn progress_arrives_in_order() {
        /// Slow to write down the first count, so that a second one could overtake it.
        struct Slow(Mutex<Vec<usize>>);
        impl Control for Slow {
            fn layer_done(&self, _: &str, done: usize, _: usize) -> Result<()> {
                std::thread::sleep(std::time::Duration::from_millis(if done % 2 == 1 { 20 } else { 0 }));
                self.0.lock().unwrap().push(done);
                Ok(())
            }
        }
        let a = gaussian_panel::<f32>(6, 5, 1);
        let jobs: Vec<_> = (0..8).map(|i| job(&i.to_string(), Some(view(&a)), None, 2)).collect();
        let seen = Slow(Mutex::default());
        let pool = rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap();
        pool.install(|| select(&jobs, options(Method::GradSvd, Side::Input), &seen, Par::Rayon)).unwrap();
        assert_eq!(*seen.0.lock().unwrap(), (1..=8).collect::<Vec<_>>());
    }

    #[test]
    fn reported_energy_is_the_truth() {
        let shapes = [(1, 1, 1), (1, 30, 1), (30, 1, 1), (17, 40, 17), (300, 200, 3), (200, 300, 40), (260, 250, 250)];
        let spectra: [fn(f64) -> f64; 5] = [
            |_| 1.0,
            |i| 0.7f64.powf(i),
            |i| i.powf(-0.5),
            |i| if i <= 2.0 { 1.0 } else { 0.0 },
            |i| if i <= 20.0 { 1.0 } else { 1e-3 },
        ];
        for (m, n, rank) in shapes {
            for (kind, spectrum) in spectra.iter().enumerate() {
                let a = with_spectrum(m, n, 3, spectrum);
                let total: f64 = a.data.iter().map(|x| x * x).sum();
                let best: f64 = singular_values(&a)[..rank].iter().map(|x| x * x).sum();
                for found in [one(&a, rank), one(&a.cast::<f32>(), rank)] {
                    let kept = captured(&a, &found.basis);
                    assert!(
                        (found.energy - kept / total).abs() < 3e-6,
                        "{m}x{n} r={rank} kind {kind}: {} {}",
                        found.energy,
                        kept / total
                    );
                    assert!(kept >= 0.9 * best, "{m}x{n} r={rank} kind {kind}: {}", kept / best);
                    assert!(orthogonality_error(&found.basis) <= 50.0 * f64::from(f32::EPSILON));
                    assert_eq!(found.gap.is_nan(), rank == m.min(n));
                }
            }
        }
    }

    #[test]
    fn output_side_is_the_input_side_of_the_transpose() {
        let (w, g) = (gaussian_panel::<f32>(120, 90, 1), gaussian_panel::<f32>(120, 90, 2));
        let jobs = [job("", Some(view(&g)), Some(view(&w)), 6)];
        let found = &select(&jobs, options(Method::SkewGrad, Side::Output), &Free, Par::Seq).unwrap()[0];
        let s = skew_of(&g.transposed(), &w.transposed());
        assert_eq!(found.basis.rows, 120);
        let kept = captured_skew(&s, &found.basis);
        assert!((kept / s.squared_norm_l2() - found.energy).abs() < 1e-5);
        let by_values: f64 = found.values.iter().map(|x| x * x).sum();
        assert!((kept / by_values - 1.0).abs() < 1e-5);
    }

    #[test]
    fn an_odd_rank_gains_nothing() {
        let (w, g) = (gaussian_panel::<f32>(60, 50, 1), gaussian_panel::<f32>(60, 50, 2));
        let run = |rank| {
            let jobs = [job("", Some(view(&g)), Some(view(&w)), rank)];
            select(&jobs, options(Method::SkewGrad, Side::Input), &Free, Par::Seq).unwrap().remove(0)
        };
        let (even, odd) = (run(4), run(5));
        assert!((even.energy - odd.energy).abs() < 1e-6);
        assert_eq!((odd.basis.cols, odd.values.len(), odd.values[4]), (5, 5, 0.0));
    }

    #[test]
    fn refusals_name_the_argument_and_the_layer() {
        let good = gaussian_panel::<f32>(4, 3, 1);
        let zero = Panel::<f32>::zeros(4, 3);
        let mut bad = good.clone();
        bad.data[5] = f32::NAN;
        let ok = || Some(view(&good));
        let both =
            [job("q", Some(view(&zero)), None, 1), job("k", ok(), None, 1), job("v", Some(view(&zero)), None, 1)];
        let text = message(&both, Method::GradSvd);
        assert!(text.contains("'q'") && text.contains("'v'") && !text.contains("'k'"));
        let text = message(&[job("q", ok(), Some(view(&bad)), 1)], Method::SkewGrad);
        assert!(text.contains("weights of layer 'q'") && text.contains("row 1, column 2"));
        for rank in [0, 4] {
            assert!(message(&[job("", ok(), None, rank)], Method::GradSvd).contains("min(m, n) = 3"));
        }
        assert!(message(&[job("", ok(), None, 1)], Method::SkewGrad).contains("weights: needed"));
        assert!(message(&[job("", ok(), ok(), 1)], Method::GradSvd).contains("weights: not used"));
        let turned = good.transposed();
        assert!(message(&[job("", ok(), Some(view(&turned)), 1)], Method::SkewGrad).contains("one shape"));
        let empty = Panel::<f32>::zeros(0, 3);
        assert!(message(&[job("", Some(view(&empty)), None, 1)], Method::GradSvd).contains("empty"));
    }
}
