//! `loft_rs._core`: the thin Python binding of `loft_core`. `door.rs` is the one way in, `matrix.rs` reads arrays
//! without copying them, and this file gives each core function its Python signature.

mod door;
mod matrix;

use loft_core::select::{Job, Method, Options, Selection};
use loft_core::{Call, Dtype, Panel, Params, Real, Side, View};
use numpy::{Element, PyArray1, PyArray2, PyArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use door::{door, raise};
use matrix::view;

/// A job as Python hands it over: name, grad, weight, rank.
type RawJob<'py> = (String, Option<Bound<'py, PyAny>>, Option<Bound<'py, PyAny>>, i64);

fn method(name: &str) -> PyResult<Method> {
    match name {
        "gradsvd" => Ok(Method::GradSvd),
        "skewgrad" => Ok(Method::SkewGrad),
        "principal" => Ok(Method::Principal),
        _ => Err(PyValueError::new_err(format!("method must be 'gradsvd', 'skewgrad' or 'principal', got {name:?}"))),
    }
}

fn side(name: &str) -> PyResult<Side> {
    match name {
        "input" => Ok(Side::Input),
        "output" => Ok(Side::Output),
        _ => Err(PyValueError::new_err(format!("side must be 'input' or 'output', got {name:?}"))),
    }
}

fn rank_of(rank: i64, what: &str) -> PyResult<usize> {
    usize::try_from(rank).map_err(|_| PyValueError::new_err(format!("{what} must be at least 1, got {rank}")))
}

fn seed_of(seed: i128) -> PyResult<u64> {
    u64::try_from(seed).map_err(|_| PyValueError::new_err(format!("seed must be from 0 to 2**64 - 1, got {seed}")))
}

fn to_array<'py, T: Real + Element>(py: Python<'py>, panel: Panel<T>) -> PyResult<Bound<'py, PyArray2<T>>> {
    let shape = [panel.rows(), panel.cols()];
    PyArray1::from_vec(py, panel.into_data()).reshape(shape)
}

fn selection_dict<'py>(py: Python<'py>, selection: Selection) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("basis", to_array(py, selection.basis)?)?;
    dict.set_item("values", PyArray1::from_vec(py, selection.values))?;
    dict.set_item("energy", selection.energy)?;
    dict.set_item("energy_stderr", selection.energy_stderr)?;
    dict.set_item("residuals", PyArray1::from_vec(py, selection.residuals))?;
    dict.set_item("gap", selection.gap)?;
    dict.set_item("passes", selection.work.passes)?;
    dict.set_item("columns", selection.work.columns)?;
    dict.set_item("seconds", selection.seconds)?;
    Ok(dict)
}

/// Chooses a support for every job; see the stub file for the contract.
#[pyfunction]
#[pyo3(signature = (jobs, *, method, side, tol, seed, threads, progress))]
#[allow(clippy::too_many_arguments)]
fn select<'py>(
    py: Python<'py>,
    jobs: Vec<RawJob<'py>>,
    method: &str,
    side: &str,
    tol: Option<f64>,
    seed: i128,
    threads: Option<i64>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Bound<'py, PyList>> {
    let options = Options { method: self::method(method)?, side: self::side(side)?, tol, seed: seed_of(seed)? };
    let mut checked = Vec::with_capacity(jobs.len());
    for (name, grad, weight, rank) in &jobs {
        let place = if name.is_empty() { String::new() } else { format!(" of layer '{name}'") };
        checked.push(Job {
            name: name.clone(),
            grad: grad.as_ref().map(|array| view(&format!("grads{place}"), array)).transpose()?,
            weight: weight.as_ref().map(|array| view(&format!("weights{place}"), array)).transpose()?,
            rank: rank_of(*rank, &format!("rank{place}"))?,
        });
    }
    let selections =
        door(py, threads, progress, |control, par| loft_core::select::select(&checked, options, control, par))?;
    let dicts: PyResult<Vec<_>> = selections.into_iter().map(|selection| selection_dict(py, selection)).collect();
    PyList::new(py, dicts?)
}

/// Leading singular triplets of a dense matrix.
#[pyfunction]
#[pyo3(signature = (a, rank, *, tol, seed, threads))]
fn randomized_svd<'py>(
    py: Python<'py>,
    a: &Bound<'py, PyAny>,
    rank: i64,
    tol: Option<f64>,
    seed: i128,
    threads: Option<i64>,
) -> PyResult<SvdParts<'py>> {
    let (a, rank, params) = (view("a", a)?, rank_of(rank, "rank")?, Params { tol, seed: seed_of(seed)?, left: true });
    match a.dtype() {
        Dtype::F64 => svd::<f64>(py, a, rank, params, threads),
        _ => svd::<f32>(py, a, rank, params, threads),
    }
}

type SvdParts<'py> = (Bound<'py, PyAny>, Bound<'py, PyArray1<f64>>, Bound<'py, PyAny>, Bound<'py, PyDict>);

fn svd<'py, T: Real + Element>(
    py: Python<'py>,
    a: View<'_>,
    rank: usize,
    params: Params,
    threads: Option<i64>,
) -> PyResult<SvdParts<'py>> {
    let work = |control: &dyn loft_core::Control, par| {
        loft_core::svd::randomized_svd::<T>(a, Call { rank, params, control, par })
    };
    let found = door(py, threads, None, work)?;
    let triplets = found.triplets;
    let info = PyDict::new(py);
    info.set_item("energy", found.energy)?;
    info.set_item("residuals", PyArray1::from_vec(py, triplets.residuals))?;
    info.set_item("gap", found.gap)?;
    info.set_item("passes", triplets.work.passes)?;
    info.set_item("columns", triplets.work.columns)?;
    info.set_item("seconds", found.seconds)?;
    let Some(left) = triplets.left else {
        return Err(PyValueError::new_err("the left vectors were not computed"));
    };
    let u = to_array(py, left)?;
    let vt = to_array(py, triplets.right.transposed())?;
    Ok((u.into_any(), PyArray1::from_vec(py, triplets.values), vt.into_any(), info))
}

/// Dense `Skew(W0^T G)` (input side) or `Skew(G W0^T)` (output side).
#[pyfunction]
#[pyo3(signature = (weight, grad, *, side, threads))]
fn skew_project<'py>(
    py: Python<'py>,
    weight: &Bound<'py, PyAny>,
    grad: &Bound<'py, PyAny>,
    side: &str,
    threads: Option<i64>,
) -> PyResult<Bound<'py, PyAny>> {
    let (weight, grad, side) = (view("weight", weight)?, view("grad", grad)?, self::side(side)?);
    let double = weight.dtype() == Dtype::F64 || grad.dtype() == Dtype::F64;
    macro_rules! run {
        ($real:ty) => {{
            let work = move |control: &dyn loft_core::Control, par| {
                loft_core::skew::skew_project::<$real>(weight, grad, side, control, par)
            };
            to_array(py, door(py, threads, None, work)?)?.into_any()
        }};
    }
    Ok(if double { run!(f64) } else { run!(f32) })
}

/// The top-`rank` invariant subspace of a dense skew matrix, in plane pairs.
#[pyfunction]
fn skew_planes<'py>(
    py: Python<'py>,
    s: &Bound<'py, PyAny>,
    rank: i64,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyArray1<f64>>)> {
    let (s, rank) = (view("s", s)?, rank_of(rank, "rank")?);
    macro_rules! run {
        ($real:ty) => {{
            let (vectors, values) = py.detach(|| loft_core::basis::skew_planes::<$real>(s, rank)).map_err(raise)?;
            Ok((to_array(py, vectors)?.into_any(), PyArray1::from_vec(py, values)))
        }};
    }
    if s.dtype() == Dtype::F64 { run!(f64) } else { run!(f32) }
}

/// Orthonormal columns with the span of `a`'s.
#[pyfunction]
#[pyo3(signature = (a, *, threads))]
fn orthonormalize<'py>(py: Python<'py>, a: &Bound<'py, PyAny>, threads: Option<i64>) -> PyResult<Bound<'py, PyAny>> {
    let a = view("a", a)?;
    macro_rules! run {
        ($real:ty) => {
            to_array(py, door(py, threads, None, |_, par| loft_core::basis::orthonormal::<$real>(a, par))?)?.into_any()
        };
    }
    Ok(if a.dtype() == Dtype::F64 { run!(f64) } else { run!(f32) })
}

/// `(I - A)(I + A)^{-1}`.
#[pyfunction]
fn cayley<'py>(py: Python<'py>, a: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let a = view("a", a)?;
    macro_rules! run {
        ($real:ty) => {
            to_array(py, py.detach(|| loft_core::cayley::cayley::<$real>(a)).map_err(raise)?)?.into_any()
        };
    }
    Ok(if a.dtype() == Dtype::F64 { run!(f64) } else { run!(f32) })
}

/// `(Y, T)` with `H_0 H_1 .. = I - Y T Y^T`.
#[pyfunction]
fn householder_wy<'py>(py: Python<'py>, u: &Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let u = view("u", u)?;
    macro_rules! run {
        ($real:ty) => {{
            let (y, t) = py.detach(|| loft_core::householder::householder_wy::<$real>(u)).map_err(raise)?;
            Ok((to_array(py, y)?.into_any(), to_array(py, t)?.into_any()))
        }};
    }
    if u.dtype() == Dtype::F64 { run!(f64) } else { run!(f32) }
}

/// Q of an `n x rank` Gaussian.
#[pyfunction]
fn random_basis(py: Python<'_>, n: i64, rank: i64, seed: i128) -> PyResult<Bound<'_, PyArray2<f32>>> {
    let (n, rank, seed) = (rank_of(n, "n")?, rank_of(rank, "rank")?, seed_of(seed)?);
    to_array(py, py.detach(|| loft_core::basis::random_basis(n, rank, seed)).map_err(raise)?)
}

/// `rank` distinct indices below `n`, ascending.
#[pyfunction]
fn coordinate_indices(py: Python<'_>, n: i64, rank: i64, seed: i128) -> PyResult<Bound<'_, PyArray1<i64>>> {
    let indices = loft_core::basis::coordinate_indices(rank_of(n, "n")?, rank_of(rank, "rank")?, seed_of(seed)?)
        .map_err(raise)?;
    Ok(PyArray1::from_vec(py, indices.into_iter().map(|i| i as i64).collect()))
}

/// The numerical core of loft_rs, in Rust.
#[pymodule(gil_used = false)]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("NonFiniteError", m.py().get_type::<door::NonFiniteError>())?;
    m.add_function(wrap_pyfunction!(select, m)?)?;
    m.add_function(wrap_pyfunction!(randomized_svd, m)?)?;
    m.add_function(wrap_pyfunction!(skew_project, m)?)?;
    m.add_function(wrap_pyfunction!(skew_planes, m)?)?;
    m.add_function(wrap_pyfunction!(orthonormalize, m)?)?;
    m.add_function(wrap_pyfunction!(cayley, m)?)?;
    m.add_function(wrap_pyfunction!(householder_wy, m)?)?;
    m.add_function(wrap_pyfunction!(random_basis, m)?)?;
    m.add_function(wrap_pyfunction!(coordinate_indices, m)?)?;
    Ok(())
}
