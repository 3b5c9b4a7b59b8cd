"""Truncated solvers on a CPU: ours beside torch, scikit-learn, SciPy and the dense way, on the same
threads, in one run.

    svd       U diag(s) V^T with s_i = i^-0.5 and i^-1, known by construction
    real      weights and gradients of MiniLM and SmolLM2-135M: all linears of a model
    skew      the top invariant subspace of S = Skew(W^T G)
    dtype     bf16 and f16 input beside f32
    memory    peak extra memory of one call, each in a process of its own
    model8b   all linears of Llama-3.1-8B's shapes, random, in bf16, one after the other

Beside every time stands the captured energy over the best possible: ||A V||_F^2
(||V^T S V||_F^2 for skew) in float64 over the sum of the r largest squared singular values. Times
are medians of `--repeat` calls; a call longer than `--limit` is made once, and so are the dense
ways. `floor_s` is what the products with A alone would take at the measured sgemm rate, 2 m n
operations a column (4 m n a column and pass for S matrix-free, which is W and G), `floor_share`
that over the time. Tables are printed; each row is kept in `--out` as soon as it is there, and
other sections in that file stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from common import Report, cell, describe, machine, peak_extra, status
from matrices import LLAMA_8B, MODELS, gaussian, of_model, squared_values, with_spectrum
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

import loft_rs
from loft_rs import linalg

SHAPES = ["768x768", "3072x768", "4096x4096", "14336x4096", "4096x14336"]
SUBSET = {"768x768", "4096x4096", "14336x4096"}
SPECTRA = [0.5, 1.0]
SKEW_RANK = 32
REACH = 0.9999  # the energy that the subspace iteration must reach
PACKAGES = ["torch", "numpy", "scipy", "scikit-learn", "loft_rs"]


# Solvers of the SVD: (float32 matrix, rank) -> V (n, r), or our result with it.


def ours(a: np.ndarray, r: int) -> Any:
    return loft_rs.select_support(a, r)


def ours_with_u(a: np.ndarray, r: int) -> Any:
    return linalg.randomized_svd(a, r)


def torch_lowrank(a: np.ndarray, r: int) -> np.ndarray:
    return torch.svd_lowrank(torch.from_numpy(a), q=r, niter=4)[2].numpy()


def sklearn_auto(a: np.ndarray, r: int) -> np.ndarray:
    return randomized_svd(a, n_components=r, n_iter="auto", random_state=0)[2].T


def svds(solver: str, a: np.ndarray, r: int) -> np.ndarray:
    return scipy.sparse.linalg.svds(a, k=r, solver=solver)[2].T


def exact(a: np.ndarray, r: int) -> np.ndarray:
    return torch.linalg.svd(torch.from_numpy(a), full_matrices=False)[2][:r].T.numpy()


RIVALS = {"torch svd_lowrank(niter=4)": torch_lowrank, "sklearn auto": sklearn_auto}
RIVALS |= {f"svds {solver}": partial(svds, solver) for solver in ("arpack", "propack")}


# Solvers of the skew problem: (W, G, rank) -> V (n, r).


def skew_ours(w: np.ndarray, g: np.ndarray, r: int) -> loft_rs.Support:
    return loft_rs.select_support(g, r, weights=w, method="skewgrad")


def skew_formed(w: np.ndarray, g: np.ndarray) -> torch.Tensor:
    product = torch.from_numpy(w).T @ torch.from_numpy(g)
    return (product - product.T) / 2


def skew_dense(w: np.ndarray, g: np.ndarray, r: int) -> np.ndarray:
    s = skew_formed(w, g)
    return torch.linalg.eigh(s.T @ s)[1][:, -r:].numpy()


def skew_iteration(w: np.ndarray, g: np.ndarray, r: int, width: int, steps: int, done: Callable | None = None) -> Any:
    """`width` columns through `steps` applications of S, matrix-free, and Rayleigh-Ritz by one
    more.

    With `done`, which judges V, (V, steps): Rayleigh-Ritz after every step, until `done` is
    content.
    """
    w, g = torch.from_numpy(w), torch.from_numpy(g)
    x = torch.linalg.qr(torch.randn(w.shape[1], width, generator=torch.Generator().manual_seed(0)))[0]

    def image(x: torch.Tensor) -> torch.Tensor:
        return (w.T @ (g @ x) - g.T @ (w @ x)) / 2

    for step in range(1, steps + 1):
        x = torch.linalg.qr(image(x))[0]
        if step < steps and done is None:
            continue
        small = (x.T @ image(x)).double()
        small = small - small.T
        v = (x @ torch.linalg.eigh(small.T @ small)[1][:, -r:].float()).numpy()
        if done is not None and done(v):
            break
    return v if done is None else (v, step)


# What a result is worth.


def basis_of(found: Any) -> np.ndarray:
    return found.vt.T if isinstance(found, linalg.TruncatedSVD) else np.asarray(found)


def captured(a: np.ndarray, v: np.ndarray) -> float:
    """||A V||_F^2 in float64."""
    wide, blocks = v.astype(np.float64), range(0, len(a), 1024)
    return sum(float(np.square(a[start : start + 1024].astype(np.float64) @ wide).sum()) for start in blocks)


def floor(found: Any, r: int, entries: int, taken: float, gflops: float) -> dict[str, Any]:
    """Passes, columns multiplied, and the time of those products alone. The columns are what the
    solver reports; where it does not, passes times the block of krylov.rs."""
    if not hasattr(found, "passes"):
        return {}
    columns, source = getattr(found, "columns", None), "reported"
    if columns is None and found.passes > 1:
        columns, source = found.passes * (24 if r < 128 else 48), "passes x block"
    if not columns or found.passes < 2:
        return {"passes": found.passes}
    least = 2 * entries * columns / gflops / 1e9
    return {"passes": found.passes, "columns": columns, "by": source, "floor_s": least, "floor_share": least / taken}


def judge_svd(a: np.ndarray, r: int, best: float, gflops: float, found: Any, taken: float) -> dict[str, Any]:
    return {"energy": captured(a, basis_of(found)) / best, **floor(found, r, a.size, taken, gflops)}


def judge_model(named: dict, squares: dict, r: int, found: dict, taken: float) -> dict[str, Any]:
    ratios = [captured(named[key], basis_of(each)) / squares[key][:r].sum() for key, each in found.items()]
    return {"least_energy": min(ratios), "median_energy": median(ratios)}


def plane_energy(s: torch.Tensor, v: np.ndarray) -> float:
    wide = torch.from_numpy(v).double()
    return float((wide.T @ (s @ wide)).square().sum())


def judge_skew(s: torch.Tensor, best: float, entries: int, r: int, gflops: float, found: Any, taken: float) -> dict:
    row = {"energy": plane_energy(s, np.asarray(found)) / best}
    if isinstance(found, loft_rs.Support):
        row |= {"stated": found.energy, "stderr": found.energy_stderr, **floor(found, r, 2 * entries, taken, gflops)}
    return row


# Sections


def shapes(arguments: argparse.Namespace, among: set[str] | None = None) -> list[tuple[int, int]]:
    chosen = [shape for shape in arguments.shapes if among is None or shape in among or shape not in SHAPES]
    return [tuple(map(int, shape.split("x"))) for shape in chosen]


def section_svd(report: Report, arguments: argparse.Namespace, measure: Callable) -> None:
    for (m, n), power in ((shape, power) for shape in shapes(arguments) for power in SPECTRA):
        a, s = with_spectrum(m, n, power, seed=1)
        where = {"shape": f"{m}x{n}", "spectrum": f"i^-{power}"}
        for r in arguments.ranks:
            judge = partial(judge_svd, a, r, float(np.square(s[:r]).sum()), report.machine["sgemm_gflops"])
            for name, solve in {"ours": ours, "ours, U too": ours_with_u, **RIVALS}.items():
                measure({**where, "r": r, "method": name}, partial(solve, a, r), judge)
        if power == SPECTRA[0]:  # the dense SVD gives every rank at once, and the spectrum does not change its time
            measure({**where, "r": f"{r} (all)", "method": "exact"}, partial(exact, a, r), judge, repeat=1)


def section_real(report: Report, arguments: argparse.Namespace, measure: Callable) -> None:
    for model in MODELS:
        try:
            kinds = of_model(model)
        except Exception as error:
            report.add(model=model, error=describe(error))
            continue
        for kind, named in kinds.items():
            squares = {key: squared_values(a) for key, a in named.items()}
            for r in (r for r in arguments.ranks if r <= 64):
                where = {"model": model, "of": f"{len(named)} {kind}", "r": r}
                judge = partial(judge_model, named, squares, r)
                support = partial(support_of, kind)
                measure({**where, "method": "ours, one call"}, partial(support, named, r), judge)
                for name, solve in {"ours": support, **RIVALS, "exact": exact}.items():
                    repeat = {"repeat": 1} if name == "exact" else {}
                    measure({**where, "method": name}, partial(one_by_one, solve, named, r), judge, **repeat)


def support_of(kind: str, given: Any, r: int) -> Any:
    if kind == "weights":
        return loft_rs.select_support(None, r, weights=given, method="principal")
    return loft_rs.select_support(given, r)


def one_by_one(solve: Callable, named: dict, r: int) -> dict:
    return {key: solve(a, r) for key, a in named.items()}


def section_skew(report: Report, arguments: argparse.Namespace, measure: Callable) -> None:
    r = SKEW_RANK
    for m, n in shapes(arguments, SUBSET):
        g, _ = with_spectrum(m, n, 0.5, seed=1)
        for kind in ("Gaussian", "i^-0.5"):
            w = gaussian(m, n, seed=2) if kind == "Gaussian" else with_spectrum(m, n, 0.5, seed=2)[0]
            s = skew_formed(w.astype(np.float64), g.astype(np.float64))
            best = float(torch.linalg.eigvalsh(s.T @ s)[-r:].sum())
            where = {"shape": f"{m}x{n}", "W": kind, "r": r}
            judge = partial(judge_skew, s, best, m * n, r, report.machine["sgemm_gflops"])
            measure({**where, "method": "ours"}, partial(skew_ours, w, g, r), judge)
            try:  # the rival gets the width that needs the fewest products for its energy, found beforehand
                tries = [(width, iterations(w, g, r, width, s, best)) for width in (r + 16, 2 * r, 3 * r)]
                width, steps = min(tries, key=lambda each: each[0] * (each[1] + 1))
                name = f"torch subspace iteration, {width} columns, {steps} + 1 applications"
                measure({**where, "method": name}, partial(skew_iteration, w, g, r, width, steps), judge)
            except Exception as error:
                report.add(**where, method="torch subspace iteration", error=describe(error))
            measure({**where, "method": "dense eigh"}, partial(skew_dense, w, g, r), judge, repeat=1)


def iterations(w: np.ndarray, g: np.ndarray, r: int, width: int, s: torch.Tensor, best: float) -> int:
    return skew_iteration(w, g, r, width, 60, done=lambda v: plane_energy(s, v) >= REACH * best)[1]


def section_dtype(report: Report, arguments: argparse.Namespace, measure: Callable) -> None:
    for m, n in shapes(arguments, SUBSET):
        a, s = with_spectrum(m, n, 0.5, seed=1)
        given = {str(kind)[6:]: torch.from_numpy(a).to(kind) for kind in (torch.float32, torch.bfloat16, torch.float16)}
        for r in (r for r in arguments.ranks if r >= 64):
            times: dict[str, list[float]] = {name: [] for name in given}
            bases = {}
            for _ in range(arguments.repeat):
                for name, tensor in given.items():  # in turn, so that a drift of the machine meets all of them
                    begun = time.perf_counter()
                    bases[name] = loft_rs.select_support(tensor, r).basis
                    times[name].append(time.perf_counter() - begun)
            for name, taken in times.items():
                energy = captured(a, bases[name]) / np.square(s[:r]).sum()
                row = {"s": median(taken), "over_f32": median(taken) / median(times["float32"]), "energy": energy}
                report.add(shape=f"{m}x{n}", r=r, dtype=name, **row, times=taken)


MEMORY = {"ours": ours, "ours, bf16": loft_rs.select_support, **RIVALS, "exact": exact}
MEMORY_SKEW = {
    "skew, ours": skew_ours,
    "skew, torch subspace iteration": lambda w, g, r: skew_iteration(w, g, r, 2 * r, 5),
    "skew, dense eigh": skew_dense,
}


def section_memory(report: Report, arguments: argparse.Namespace, measure: Callable) -> None:
    for m, n in shapes(arguments, SUBSET):
        for name in [*MEMORY, *MEMORY_SKEW]:
            r = SKEW_RANK if name in MEMORY_SKEW else 64
            child = ["--threads", str(arguments.threads), "--child", json.dumps([m, n, r, name])]
            done = subprocess.run([sys.executable, __file__, *child], capture_output=True, text=True)
            where = {"shape": f"{m}x{n}", "r": r, "method": name}
            if done.returncode:
                report.add(**where, error=(done.stderr.splitlines() or [f"exit status {done.returncode}"])[-1][:120])
                continue
            held, extra = (int(each) / 2**20 for each in done.stdout.split())
            report.add(**where, input_mib=held, extra_mib=extra, extra_over_input=extra / held)


def memory_child(m: int, n: int, r: int, name: str) -> None:
    """Prints the bytes of the input and the bytes by which one call raised the peak."""
    a, _ = with_spectrum(m, n, 0.5, seed=1)
    ours(a[:64, :64].copy(), 4)  # the pools of threads are there before
    torch.mm(torch.rand(256, 256), torch.rand(256, 256))
    if name in MEMORY_SKEW:
        given, solve = [gaussian(m, n, seed=2), a], MEMORY_SKEW[name]
    else:
        given, solve = [torch.from_numpy(a).bfloat16() if "bf16" in name else a], MEMORY[name]
    print(sum(each.nbytes for each in given), peak_extra(partial(solve, *given, r))[1])


def section_model8b(report: Report, arguments: argparse.Namespace, measure: Callable) -> None:
    """Gaussian weights, whose flat spectrum is the hardest; gradients of rank 32, given dense."""
    r, depth = 64, 32
    for method in ("principal", "skewgrad"):
        row: dict[str, Any] = {"method": method, "r": r, "linears": 0, "s": 0.0, "extra_mib": 0.0, "resident_mib": 0.0}
        report.add(**row)
        for layer in range(arguments.layers):
            for place, (m, n) in enumerate(LLAMA_8B.values()):
                draw = torch.Generator().manual_seed(100 * layer + place)
                w = torch.empty(m, n, dtype=torch.bfloat16).normal_(generator=draw)
                g = None
                if method == "skewgrad":
                    left, right = (torch.randn(size, depth, generator=draw) for size in (m, n))
                    g = (left @ right.T).bfloat16()
                call = partial(loft_rs.select_support, g, r, weights=w, method=method)
                found, extra, taken = peak_extra(call)
                row["linears"] += 1
                row["s"] += taken
                row["extra_mib"] = max(row["extra_mib"], extra / 2**20)
                row["resident_mib"] = max(row["resident_mib"], status("VmHWM") / 2**20)
                row["least_stated_energy"] = min(row.get("least_stated_energy", 1.0), found.energy)
            report.rows.pop()
            report.add(**row)


SECTIONS = {name[8:]: each for name, each in list(globals().items()) if name.startswith("section_")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--limit", type=float, default=60, help="seconds; a longer call is made once")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="of svd, skew, dtype and memory")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 352], help="of svd, real and dtype")
    parser.add_argument("--layers", type=int, default=32, help="of model8b")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "solvers_cpu.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)  # loft_rs follows torch
    with threadpool_limits(arguments.threads):
        if arguments.child:
            return memory_child(*json.loads(arguments.child))
        report = Report(arguments.out, machine(arguments.threads, PACKAGES))
        print(", ".join(f"{key} {value}" for key, value in report.machine.items()), flush=True)
        for name in arguments.only:
            report.open(name)
            try:
                measure = partial(cell, report, repeat=arguments.repeat, limit=arguments.limit)
                SECTIONS[name](report, arguments, measure)
                report.close(name)
            except Exception:
                traceback.print_exc()
            finally:
                report.table(name)


if __name__ == "__main__":
    main()
