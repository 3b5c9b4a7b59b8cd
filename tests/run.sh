#!/usr/bin/env bash
# tests/run.sh [all | quick | long]     A virtual environment in .venv is made if none is active.
#
#   all     the default, and what CI runs: builds and installs the package, then checks everything
#   quick   of a tree that is built (pip install -e ".[test,demo,docs]"): under 2 minutes on two cores
#   long    of such a tree too: the tests that have a long form, in it; not in CI
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1-all}
case $#:$mode in
  [01]:all | 1:quick | 1:long) ;;
  *) echo "tests/run.sh takes one of: all, quick, long (got: $*)" >&2 && exit 2 ;;
esac
if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -d .venv ] || python3 -m venv .venv
  # shellcheck disable=SC1091
  . .venv/bin/activate
fi
# Spinning OpenMP threads make a busy two-core machine many times slower.
export OMP_WAIT_POLICY=PASSIVE

# The fast third: every file whose tests took under 12 s together, one process (pytest --durations=0, summed by file).
# A file that is renamed or grows slow leaves this list by hand.
fast="cli/test_cli.py convert calibration/test_calibration.py calibration/test_calibration_callback.py calibration/test_calibration_memory.py
  calibration/test_saved_sketches.py calibration/test_side_refused.py factor features/test_halves.py features/test_quality_harness.py
  features/test_recovered.py features/test_tied.py layer/test_layer.py layer/test_threads.py refreshing/test_refresh_saved.py sketch
  support/test_gradient_factors.py support/test_support.py test_advice.py test_api_page.py test_architecture.py test_linalg.py transform
  tuner/test_golden.py tuner/test_old_configs.py"

stage() { printf '%3d:%02d  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$1"; }

# Two processes of one thread each are faster on two cores than one of two: the tests are small.
tests() { OMP_NUM_THREADS=1 python -m pytest -q -n 2 -p no:cacheprovider -c ../pyproject.toml --rootdir .. "$@"; }

if [ "$mode" = all ]; then
  stage "build and install"
  python -m pip install --quiet --disable-pip-version-check ".[test,demo,docs]"
else # what is checked is the tree itself
  export PYTHONPATH="$PWD/python" MYPYPATH="$PWD/python"
  python -c "import loft_rs._core" 2>/dev/null ||
    { echo 'tests/run.sh: build the tree first: pip install -e ".[test,demo,docs]"' >&2 && exit 2; }
fi
if [ "$mode" != long ]; then
  stage "ruff"
  ruff check --quiet python tests bench examples
  ruff format --quiet --check python tests bench examples
  stage "documents"
  NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict
  stage "rustfmt, clippy"
  cargo fmt --all --check
  cargo clippy --quiet --workspace --all-targets -- -D warnings
  stage "cargo test"
  cargo test --quiet --workspace --exclude loft-python
fi
# Outside the checkout's python/ folder, so that in `all` what is checked is what was installed.
cd tests
if [ "$mode" != long ]; then
  stage "types"
  python -m mypy --config-file ../pyproject.toml -p loft_rs
  python -m mypy.stubtest loft_rs._core
fi
stage "pytest, $mode"
case $mode in
  all) tests . ;;
  quick) tests $fast ;;
  long) LOFT_RS_LONG=1 tests --timeout 0 $(grep -rl --include='test_*.py' LOFT_RS_LONG .) ;;
esac
stage "done"
