//! Everything that can go wrong, in one enum. Messages name the argument and what would be right.

use std::fmt;

/// The result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a call was refused or stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// An argument that can never be right: a wrong shape, rank, option or combination.
    Invalid(String),
    /// A NaN or an infinity in the named argument, at the first such entry.
    NonFinite {
        /// Which argument, with its layer where there is one.
        argument: String,
        /// Row of the entry.
        row: usize,
        /// Column of the entry.
        column: usize,
    },
    /// Matrices without any nonzero entry, all of them listed.
    AllZero(Vec<String>),
    /// `Skew(W0^T G)` is zero to rounding, so no rotation changes the loss to first order.
    NoRotation(String),
    /// The caller asked to stop.
    Interrupted,
    /// A dense kernel did not converge, which finite input should never cause.
    NoConvergence(&'static str),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(message) => f.write_str(message),
            Self::NonFinite { argument, row, column } => {
                write!(
                    f,
                    "{argument} holds a NaN or an infinity, first at row {row}, column {column}; every entry must be finite"
                )
            }
            Self::AllZero(names) => {
                write!(f, "all-zero matrices have no leading directions: {}", names.join(", "))
            }
            Self::NoRotation(layer) => write!(
                f,
                "Skew(W0^T G){} is zero to rounding: no rotation changes the loss to first order; use method='gradsvd'",
                if layer.is_empty() { String::new() } else { format!(" of layer '{layer}'") }
            ),
            Self::Interrupted => f.write_str("interrupted"),
            Self::NoConvergence(what) => write!(f, "{what} did not converge"),
        }
    }
}

impl std::error::Error for Error {}

/// Shorthand for [`Error::Invalid`].
pub(crate) fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(Error::Invalid(message.into()))
}
