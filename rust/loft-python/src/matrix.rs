//! Reading a `Matrix` argument where it lies: a 2-D numpy array of float16, float32 or float64, or bfloat16 as
//! `(uint16 array, "bfloat16")`; any strides.

use loft_core::{Dtype, View};
use numpy::{PyArrayDescrMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

const WANTED: &str = "a 2-D numpy array of float16, float32 or float64, or (uint16 array, \"bfloat16\")";

/// A view of `object`, which must outlive it; `argument` names it in errors.
pub fn view<'a>(argument: &str, object: &'a Bound<'_, PyAny>) -> PyResult<View<'a>> {
    if let Ok(pair) = object.cast::<PyTuple>() {
        let refuse = || PyTypeError::new_err(format!("{argument} must be {WANTED}, got another tuple"));
        let (bits, tag): (Bound<'_, PyAny>, String) = pair.extract().map_err(|_| refuse())?;
        let array = bits.cast::<PyUntypedArray>().map_err(|_| refuse())?;
        if tag != "bfloat16" || array.dtype().kind() != b'u' || array.dtype().itemsize() != 2 {
            return Err(refuse());
        }
        return strided(argument, array, Dtype::Bf16);
    }
    let Ok(array) = object.cast::<PyUntypedArray>() else {
        let kind = object.get_type().name()?.to_string();
        return Err(PyTypeError::new_err(format!("{argument} must be {WANTED}, got {kind}")));
    };
    let dtype = match (array.dtype().kind(), array.dtype().itemsize()) {
        (b'f', 2) => Dtype::F16,
        (b'f', 4) => Dtype::F32,
        (b'f', 8) => Dtype::F64,
        _ => return Err(PyTypeError::new_err(format!("{argument} must be {WANTED}, got dtype {}", array.dtype()))),
    };
    strided(argument, array, dtype)
}

fn strided<'a>(argument: &str, array: &Bound<'_, PyUntypedArray>, dtype: Dtype) -> PyResult<View<'a>> {
    if !array.dtype().is_native_byteorder().unwrap_or(true) {
        return Err(PyTypeError::new_err(format!("{argument} must be in native byte order")));
    }
    let (&[rows, cols], &[row_stride, col_stride]) = (array.shape(), array.strides()) else {
        return Err(PyValueError::new_err(format!("{argument} must be 2-D, got {} dimensions", array.ndim())));
    };
    // SAFETY: the array object is alive (borrowed by the caller for 'a).
    let data = unsafe { (*array.as_array_ptr()).fields.data };
    // SAFETY: numpy guarantees that shape, strides and itemsize describe readable memory while the array lives. Another
    // thread that writes to it meanwhile spoils the numbers, as it would for numpy itself.
    Ok(unsafe { View::from_raw(data.cast_const().cast(), dtype, rows, cols, row_stride, col_stride) })
}
