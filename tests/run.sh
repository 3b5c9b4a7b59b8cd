#!/usr/bin/env bash
# Set-up, lint, type stubs, Rust tests, Python tests. A virtual environment in .venv is made if none is active.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -d .venv ] || python3 -m venv .venv
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi
# Spinning OpenMP threads make a busy two-core machine many times slower.
export OMP_WAIT_POLICY=PASSIVE
python -m pip install --quiet --disable-pip-version-check ".[test,demo,docs]"
ruff check python tests bench examples
ruff format --check python tests bench examples
NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict
cargo fmt --all --check
cargo clippy --quiet --workspace --all-targets -- -D warnings
cargo test --quiet --workspace --exclude loft-python
# Outside the checkout's python/ folder, so that what is checked is what was installed.
cd tests
python -m mypy.stubtest loft_rs._core
# Two processes of one thread each are faster on two cores than one of two: the tests are small.
OMP_NUM_THREADS=1 python -m pytest -q -n 2 -p no:cacheprovider -c ../pyproject.toml --rootdir .. .
