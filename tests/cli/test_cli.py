"""`loft-rs` as a shell user meets it: output, exit status, one sentence for every failure."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from reference import make_llama
from safetensors.numpy import load_file, save_file

from loft_rs import load_supports, select_support
from loft_rs._words import how_to_install
from loft_rs.cli import main
from loft_rs.cli.main import in_shell_words, sentence
from loft_rs.cli.parser import COMMANDS, parser
from loft_rs.inspection import inspect_adapter

# transformers warns about its own attribute when PEFT reads it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def fails(capsys, *arguments):
    """Run a command that must fail; returns its one line on stderr."""
    assert main([str(each) for each in arguments]) == 1
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("loft-rs: ") and "Traceback" not in captured.err
    return lines[0]


@pytest.fixture
def gradients(tmp_path):
    chance = np.random.default_rng(0)
    grads = {
        f"layers.{i}.{name}.weight": chance.standard_normal((12, 10)).astype(np.float32)
        for i in range(2)
        for name in "qk"
    }
    weights = {name: chance.standard_normal((12, 10)).astype(np.float32) for name in grads}
    save_file({**grads, "layers.0.q.bias": np.ones(12, np.float32)}, tmp_path / "grads.safetensors")
    save_file(weights, tmp_path / "weights.safetensors")
    return tmp_path, grads, weights


def test_help_and_version_import_nothing_heavy():
    source = (
        "import sys\nfrom loft_rs.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'peft', 'transformers', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(
        command in done.stdout for command in ("demo", "select", "inspect", "export-lora", "convert", "merge", "doctor")
    )


def test_select_writes_what_the_function_gives(gradients, capsys):
    folder, grads, _ = gradients
    out = folder / "s.safetensors"
    shared = ["--rank", "4", "--seed", "7", "--out", str(out)]
    assert main(["select", str(folder / "grads.safetensors"), *shared]) == 0
    assert "4 supports are in" in capsys.readouterr().out
    supports = load_supports(out)
    assert sorted(supports) == [name.removesuffix(".weight") for name in sorted(grads)]
    for name, support in supports.items():
        np.testing.assert_array_equal(support.basis, select_support(grads[f"{name}.weight"], 4, seed=7).basis)
    for method in ("skewgrad", "principal"):
        more = ["--force", "--method", method, "--side", "output", "--weights", str(folder / "weights.safetensors")]
        assert main(["select", str(folder / "grads.safetensors"), *shared, *more]) == 0
        one = load_supports(out)["layers.0.q"]
        assert (one.method, one.side, one.basis.shape) == (method, "output", (12, 4))


def test_select_reads_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    grad = torch.randn(12, 10).bfloat16()
    save_torch({"q.weight": grad}, tmp_path / "g.safetensors")
    assert (
        main(["select", str(tmp_path / "g.safetensors"), "--rank", "4", "--out", str(tmp_path / "s.safetensors")]) == 0
    )
    np.testing.assert_array_equal(
        load_supports(tmp_path / "s.safetensors")["q"].basis, select_support(grad.float(), 4).basis
    )


def test_select_says_where_the_last_directions_are_not_identifiable(tmp_path, capsys):
    grads = {"flat": np.eye(12, dtype=np.float32), "decaying": np.diag(0.5 ** np.arange(12)).astype(np.float32)}
    save_file(grads, tmp_path / "g.safetensors")
    assert (
        main(["select", str(tmp_path / "g.safetensors"), "--rank", "4", "--out", str(tmp_path / "s.safetensors")]) == 0
    )
    assert "not identifiable in 1 of them: flat\n" in capsys.readouterr().out


def test_select_failures_are_one_sentence_and_write_nothing(gradients, capsys):
    folder, grads, weights = gradients
    file, out = folder / "grads.safetensors", folder / "s.safetensors"
    assert "no such file" in fails(capsys, "select", folder / "none.safetensors", "--rank", 2, "--out", out)
    assert "at least 1, not 0" in fails(capsys, "select", file, "--rank", 0, "--out", out)
    assert "at most 10" in fails(capsys, "select", file, "--rank", 11, "--out", out)
    assert "weights are missing" in fails(capsys, "select", file, "--rank", 2, "--method", "skewgrad", "--out", out)
    message = fails(capsys, "select", file, "--rank", 2, "--method", "principal", "--out", out)
    assert message.endswith("--weights are missing: method 'principal' needs weights")
    assert "no part in method 'gradsvd'" in fails(
        capsys, "select", file, "--rank", 2, "--weights", folder / "weights.safetensors", "--out", out
    )
    some = dict(list(weights.items())[:3])
    save_file(some, folder / "some.safetensors")
    message = fails(
        capsys,
        "select",
        file,
        "--rank",
        2,
        "--method",
        "skewgrad",
        "--weights",
        folder / "some.safetensors",
        "--out",
        out,
    )
    assert "no 2-D tensor for" in message
    file.write_bytes(file.read_bytes()[:-3])
    assert "damaged" in fails(capsys, "select", file, "--rank", 2, "--out", out)
    poisoned = {**grads, "layers.1.k.weight": np.full((12, 10), np.nan, np.float32)}
    save_file(poisoned, file)
    assert "layers.1.k" in fails(capsys, "select", file, "--rank", 2, "--out", out)
    save_file({"b": np.ones(3, np.float32)}, file)
    assert "no 2-D tensor" in fails(capsys, "select", file, "--rank", 2, "--out", out)
    save_file(grads, file)
    assert "does not exist" in fails(capsys, "select", file, "--rank", 2, "--out", folder / "no" / "s.safetensors")
    # Before any work: the gradients are not even read.
    assert "exists and is not a file" in fails(capsys, "select", folder / "none", "--rank", 2, "--out", folder)
    assert not out.exists() and not [each for each in folder.iterdir() if each.name.startswith(".")]


def adapter_folder(folder, transform="cayley", scale=0.1, dtype=np.float32, rank=6, version=2):
    """An adapter as `save_pretrained` writes it, made by hand."""
    chance = np.random.default_rng(1)
    tensors = {}
    for name in ("base_model.model.a.q", "base_model.model.a.k"):
        basis = np.linalg.qr(chance.standard_normal((20, rank)))[0]
        shape = (rank, rank) if transform == "free" else (rank * (rank - 1) // 2,)
        tensors[f"{name}.loft_support"] = basis.astype(dtype)
        tensors[f"{name}.loft_theta"] = (scale * chance.standard_normal(shape)).astype(np.float32)
        tensors[f"{name}.loft_energy"] = np.array(0.5, np.float32)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LOFT", "transform": transform, "side": "input", "r": rank, "loft_format_version": version}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("transform", ["cayley", "exp"])
@pytest.mark.parametrize("version", [1, 2])
def test_inspect_measures_orthogonality_and_angles(tmp_path, transform, dtype, version):
    reports = inspect_adapter(adapter_folder(tmp_path / "a", transform, dtype=dtype, version=version))
    assert [each.name.rsplit(".", 1)[-1] for each in reports] == ["k", "q"]
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for each in reports:
        assert each.orthogonality_error < 2e-6 and each.energy == 0.5 and each.angles.shape == (3,)
        lower = np.zeros((6, 6))
        lower[np.tril_indices(6, -1)] = tensors[f"{each.name}.loft_theta"]
        turns = np.sort(np.abs(np.linalg.eigvals(lower - lower.T).imag))[::-2]
        expected = np.degrees(2 * np.arctan(turns) if transform == "cayley" else turns)
        np.testing.assert_allclose(each.angles, expected, atol=1e-4 if dtype == np.float32 else 0.05)


def test_inspect_says_that_free_is_not_orthogonal(tmp_path):
    assert inspect_adapter(adapter_folder(tmp_path / "a", "free"))[0].orthogonality_error > 0.05


def test_inspect_prints_a_table_and_draws(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = adapter_folder(tmp_path / "a")
    assert main(["inspect", str(folder), "--plot", str(tmp_path / "a.png")]) == 0
    out = capsys.readouterr().out
    assert "base_model.model.a.q" in out and "0.5000" in out and "2 modules; largest orthogonality error" in out
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "a.png"]


def change(folder, **tensors):
    file = folder / "adapter_model.safetensors"
    kept = {**load_file(file), **{f"base_model.model.a.q.loft_{part}": each for part, each in tensors.items()}}
    save_file({name: each for name, each in kept.items() if each is not None}, file)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (dict(theta=None), "missing or unexpected tensors: loft_theta"),
        (dict(surprise=np.ones(2, np.float32)), "unexpected tensors: loft_surprise"),
        (dict(theta=np.zeros(14, np.float32)), r"theta of shape \(14,\)"),
        (dict(theta=np.full(15, np.nan, np.float32)), "NaN"),
        (dict(support=np.zeros((20, 6), np.float32)), "saved before loft_rs.calibrate ran"),
        (dict(support=np.ones((20, 6), np.float32)), "not orthonormal"),
        (dict(support=np.ones((4, 6), np.float32)), "1 <= r <= n"),
    ],
)
def test_inspect_refuses_a_hostile_adapter(tmp_path, tensors, message):
    folder = adapter_folder(tmp_path / "a")
    change(folder, **tensors)
    with pytest.raises(ValueError, match=message):
        inspect_adapter(folder)


def test_inspect_failures_are_one_sentence(tmp_path, capsys):
    folder = adapter_folder(tmp_path / "a")
    assert "no adapter_config.json" in fails(capsys, "inspect", tmp_path)
    config = folder / "adapter_config.json"
    good = json.loads(config.read_text())
    config.write_text(json.dumps(good | {"loft_format_version": 9}))
    assert "format version 9 is not known" in fails(capsys, "inspect", folder)
    config.write_text(json.dumps(good | {"peft_type": "LORA"}))
    assert "peft_type is 'LORA', not 'LOFT'" in fails(capsys, "inspect", folder)
    config.write_text("{")
    assert "not JSON" in fails(capsys, "inspect", folder)
    config.write_text(json.dumps(good | {"transform": "magic"}))
    assert "transform 'magic'" in fails(capsys, "inspect", folder)
    config.write_text(json.dumps(good))
    assert "does not exist" in fails(capsys, "inspect", folder, "--plot", tmp_path / "no" / "a.png")
    assert "--plot must end in .png or .svg, not 'a.pdf'" in fails(
        capsys, "inspect", folder, "--plot", tmp_path / "a.pdf"
    )
    (folder / "adapter_model.safetensors").write_bytes(b"junk")
    assert "damaged" in fails(capsys, "inspect", folder)
    (folder / "adapter_model.safetensors").unlink()
    assert "no such file" in fails(capsys, "inspect", folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny causal LM with a LOFT adapter that is not the identity, both on disk."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from loft_rs import LoftConfig

    folder = tmp_path_factory.mktemp("trained")
    make_llama(num_hidden_layers=1).save_pretrained(folder / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    options = dict(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_weights=False)
    model = peft.get_peft_model(base, LoftConfig(**options)).eval()
    model.save_pretrained(folder / "adapter")
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        return folder, tokens, model(tokens).logits


def test_inspect_reads_a_real_adapter(trained):
    reports = inspect_adapter(trained[0] / "adapter")
    assert len(reports) == 7 and all(
        each.rank == 8 and each.orthogonality_error < 2e-6 and each.largest_angle > 0 for each in reports
    )


def test_export_lora_and_merge_keep_the_output(trained, tmp_path, capsys):
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    folder, tokens, wanted = trained
    assert main(["export-lora", str(folder / "adapter"), "--out", str(tmp_path / "lora")]) == 0
    assert (
        main(["merge", str(folder / "adapter"), "--base", str(folder / "base"), "--out", str(tmp_path / "merged")]) == 0
    )
    capsys.readouterr()
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(
            peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()(tokens).logits, wanted, atol=1e-5, rtol=0
        )
        torch.testing.assert_close(merged(tokens).logits, wanted, atol=1e-5, rtol=0)


def test_an_oft_adapter_is_exported_to_a_lora_of_the_rank_asked_for(trained, tmp_path, capsys):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    from loft_rs import LoftConfig

    base = transformers.AutoModelForCausalLM.from_pretrained(trained[0] / "base")
    config = LoftConfig.oft(8, target_modules=["q_proj"], task_type="CAUSAL_LM", init_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "oft")
    arguments = ("export-lora", tmp_path / "oft", "--out", tmp_path / "lora")
    capsys.readouterr()
    said = fails(capsys, *arguments)
    assert "loft-rs merge" in said and "--approximate-rank" in said
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main([*map(str, arguments), "--approximate-rank", "4"]) == 0
    assert "relative error" in capsys.readouterr().err
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4
    config = peft.OFTConfig(oft_block_size=8, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(trained[0] / "base")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "peft")
    capsys.readouterr()
    assert "loft-rs convert" in fails(capsys, "inspect", tmp_path / "peft")


def test_merge_takes_the_tokenizer_along(trained, tmp_path, capsys):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(trained[0] / "base", base)
    shutil.copytree(trained[0] / "adapter", adapter)
    (base / "tokenizer.json").write_text("base")
    (base / "merges.txt").write_text("base")
    arguments = ["merge", str(adapter), "--base", str(base)]
    assert main([*arguments, "--out", str(tmp_path / "first")]) == 0
    assert [(tmp_path / "first" / name).read_text() for name in ("tokenizer.json", "merges.txt")] == ["base", "base"]
    (adapter / "tokenizer.json").write_text("extended")  # one beside the adapter is the whole of it
    assert main([*arguments, "--out", str(tmp_path / "second")]) == 0
    assert (tmp_path / "second" / "tokenizer.json").read_text() == "extended"
    assert not (tmp_path / "second" / "merges.txt").exists()
    capsys.readouterr()


def test_every_option_of_every_command_is_described():
    (commands,) = (action for action in parser()._actions if hasattr(action, "choices") and action.choices)
    for name, command in commands.choices.items():
        for action in command._actions:
            assert action.help, f"{name} {action.dest}"


def test_export_and_merge_failures_are_one_sentence(trained, tmp_path, capsys):
    folder = trained[0]
    for command in ("export-lora", "merge"):
        assert "not a folder on this machine" in fails(
            capsys, command, folder / "adapter", "--base", tmp_path / "no", "--out", tmp_path / "o"
        )
        assert "no adapter_config.json" in fails(capsys, command, folder / "base", "--out", tmp_path / "o")
    copy = tmp_path / "copy"
    shutil.copytree(folder / "adapter", copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert "it names no base model; give its folder with --base DIR" in fails(
        capsys, "merge", copy, "--out", tmp_path / "o"
    )
    (tmp_path / "file").write_text("")
    assert "exists and is not a folder" in fails(capsys, "export-lora", copy, "--out", tmp_path / "file")
    assert "holds a LOFT adapter" in fails(capsys, "export-lora", copy, "--out", copy)
    (copy / "adapter_config.json").write_text(json.dumps(config | {"task_type": None}))
    assert "neither its task_type nor its auto_mapping" in fails(capsys, "merge", copy, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_convert_turns_a_psoft_adapter_into_a_loft_one_and_back(trained, tmp_path, capsys):
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(trained[0] / "base")
    config = peft.PsoftConfig(r=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_weights=False)
    model = peft.get_peft_model(base, config).eval()
    model.save_pretrained(tmp_path / "psoft")
    with torch.no_grad():
        wanted = model(trained[1]).logits
    for source, target, kind, more in (
        ("psoft", "loft", "LOFT", []),
        ("loft", "back", "PSOFT", ["--base", str(trained[0] / "base")]),
    ):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), *more]) == 0
        captured = capsys.readouterr()
        assert captured.out == f"The {kind} adapter is in {tmp_path / target}\n"
        assert captured.err.splitlines()[-1] == "2 of 2 layers"
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / target)).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(trained[1]).logits, wanted, atol=1e-5, rtol=0)


def test_convert_failures_are_one_sentence(trained, tmp_path, capsys):
    adapter = trained[0] / "adapter"
    assert f"SRC: {tmp_path / 'no'} is not a folder" in fails(capsys, "convert", tmp_path / "no", tmp_path / "o")
    assert "--base: " in fails(capsys, "convert", adapter, tmp_path / "o", "--base", tmp_path / "no")
    assert "is SRC itself" in fails(capsys, "convert", adapter, adapter)
    copy = tmp_path / "copy"
    shutil.copytree(adapter, copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"support": "skewgrad"}))
    assert "has no counterpart in PEFT's" in fails(capsys, "convert", copy, tmp_path / "o")
    (copy / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    assert "peft_type is 'LORA'" in fails(capsys, "convert", copy, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_missing_extras_are_named():
    for module, extra in (("torch", "train"), ("peft.tuners", "train"), ("matplotlib", "plot"), ("tqdm", "demo")):
        said = sentence(ModuleNotFoundError("gone", name=module), extra)
        assert said.endswith(f'pip install ".[{extra}]" in a clone of loft_rs')


def test_without_torch_the_demo_says_what_to_install():
    source = "import sys\nsys.modules['torch'] = None\nfrom loft_rs.cli import main\nsys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (
        done.returncode == 1 and done.stderr.strip() == f"loft-rs: this command needs torch: {how_to_install('demo')}"
    )


def test_wrong_usage_ends_with_status_2(capsys):
    for arguments in (
        [],
        ["select", "g.safetensors"],
        ["select", "g", "--rank", "many"],
        ["fly"],
        ["demo", "--stpes", "3"],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    capsys.readouterr()


def test_a_traceback_is_there_for_those_who_ask():
    environment = os.environ | {"LOFT_RS_TRACEBACK": "1"}
    source = "import sys\nfrom loft_rs.cli import main\nsys.exit(main(['inspect', 'nowhere']))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_ends_with_an_example_that_parses(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    out = capsys.readouterr().out.rstrip()
    example = COMMANDS[name].example
    assert stop.value.code == 0 and out.endswith(f"\nexample:\n  {example}") and len(example) < 100
    program, *arguments = shlex.split(example)
    assert program == "loft-rs" and parser(name).parse_args(arguments).command is COMMANDS[name].run
    assert parser().parse_args(arguments).command is COMMANDS[name].run


def test_arguments_in_messages_have_their_shell_names():
    words = COMMANDS["convert"].words
    assert (
        in_shell_words("src: a is no folder; dst: b is src itself", words)
        == "SRC: a is no folder; DST: b is SRC itself"
    )
    kept = "/home/me/src/a and src/a and base_model.model.q and base_model_name_or_path stay"
    assert in_shell_words(kept, words) == kept
    assert in_shell_words("it names none; give base_model", words) == "it names none; name it with --base DIR"
    said = "rank must be at least 1, not a rank of 0"
    assert in_shell_words(said, COMMANDS["select"].words) == f"--{said}"


def test_a_result_that_is_there_is_written_over_by_force_alone(trained, gradients, tmp_path, capsys):
    adapter, folder = trained[0] / "adapter", gradients[0]
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine.txt").write_text("mine")
    for command in (
        ("export-lora", adapter, "--out", kept),
        ("merge", adapter, "--out", kept),
        ("convert", adapter, kept),
        ("select", folder / "grads.safetensors", "--rank", 2, "--out", kept / "mine.txt"),
    ):
        said = fails(capsys, *command)
        assert (
            "exists already; add --force to write over it" in said
            and ("DST: " if "convert" in command else "--out: ") in said
        )
    assert [each.name for each in kept.iterdir()] == ["mine.txt"] and (kept / "mine.txt").read_text() == "mine"
    assert main(["export-lora", str(adapter), "--out", str(kept), "--force"]) == 0
    assert (kept / "adapter_model.safetensors").is_file() and (kept / "mine.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert main(["export-lora", str(adapter), "--out", str(tmp_path / "empty")]) == 0
    capsys.readouterr()


def test_select_says_what_it_leaves_out_and_takes_no_supports_for_gradients(gradients, capsys):
    folder, _, _ = gradients
    out = folder / "s.safetensors"
    assert main(["select", str(folder / "grads.safetensors"), "--rank", "2", "--out", str(out)]) == 0
    assert "left out, being no matrix: layers.0.q.bias\n" in capsys.readouterr().err
    said = fails(capsys, "select", out, "--rank", 2, "--out", folder / "t.safetensors")
    assert f"GRADS: {out} holds supports that were chosen already" in said
    save_file({"q.weight": np.eye(6, dtype=np.float32)}, folder / "one.safetensors")
    assert main(["select", str(folder / "one.safetensors"), "--rank", "2", "--out", str(folder / "t.safetensors")]) == 0
    captured = capsys.readouterr()
    assert "1 support is in " in captured.out and "1 of 1 layer\n" in captured.err


def test_a_base_of_another_model_is_named(trained, tmp_path, capsys):
    pytest.importorskip("transformers")
    adapter = trained[0] / "adapter"
    from transformers import GPT2Config, GPT2LMHeadModel

    make_llama(num_hidden_layers=1, hidden_size=16).save_pretrained(tmp_path / "small")
    GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "other")
    capsys.readouterr()
    said = fails(capsys, "merge", adapter, "--base", tmp_path / "other", "--out", tmp_path / "o")
    assert f"--base: {tmp_path / 'other'} is not the model that {adapter} was trained on" in said
    assert "it has no module model.layers.0.mlp.down_proj, " in said and "and 4 more" in said
    assert "does not fit this model" in fails(
        capsys, "merge", adapter, "--base", tmp_path / "small", "--out", tmp_path / "o"
    )
    assert not (tmp_path / "o").exists()


def test_a_head_is_left_out_by_a_flag_that_the_message_names(tmp_path, capsys):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from reference import make_bert

    from loft_rs import LoftConfig

    make_bert().save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = LoftConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    capsys.readouterr()
    said = fails(capsys, "export-lora", tmp_path / "adapter", "--out", tmp_path / "lora")
    assert said.count("'classifier'") == 1 and "add --drop-modules-to-save to export without them" in said
    assert "drop_modules_to_save" not in said
    arguments = ["export-lora", str(tmp_path / "adapter"), "--out", str(tmp_path / "lora"), "--drop-modules-to-save"]
    assert main(arguments) == 0 and (tmp_path / "lora" / "adapter_model.safetensors").is_file()
    capsys.readouterr()
