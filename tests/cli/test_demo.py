"""The demo's parts, and the whole of it on a tiny random encoder with a tiny file of pairs."""

from __future__ import annotations

import json
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from loft_rs import LoftConfig, Pilot, suggest_lr  # noqa: E402
from loft_rs.cli import main  # noqa: E402
from loft_rs.demo import data, methods, page, report, run  # noqa: E402
from loft_rs.demo.check import Probe  # noqa: E402
from loft_rs.demo.data import Pair  # noqa: E402
from loft_rs.demo.encoder import TokenPairs, embed, load_encoder, load_tokenizer, model_directory  # noqa: E402
from loft_rs.demo.progress import Progress  # noqa: E402
from loft_rs.demo.train import Answers, answer, batch_plan, contrastive_loss, train  # noqa: E402

# transformers warns about its own attribute when PEFT reads it.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NOUNS = ["apple", "bread", "cloud", "drum", "eagle", "field", "glass", "house", "iron", "jewel", "kite", "lamp"]
VERBS = ["counts", "draws", "finds", "gives", "holds", "joins", "keeps", "lends"]


def tiny_pairs():
    return [Pair(f"{verb} {noun}", f"this {noun} is what it {verb} for you") for noun in NOUNS for verb in VERBS]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A random two-layer BERT and a word tokenizer, as a model directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *NOUNS, *VERBS, "this", "is", "what", "it", "for", "you"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def pairs_file(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair._asdict()) + "\n" for pair in tiny_pairs()), encoding="utf-8")
    return path


def test_words():
    assert data.words("torch.nn.BatchNorm2d.reset_running_stats") == "torch nn Batch Norm2d reset running stats"
    assert data.words("http.server.HTTPServer") == "http server HTTP Server"


@pytest.mark.parametrize(
    ("doc", "name", "expected"),
    [
        ("Return the sorted list of all items.\n\nMore.", "sort", "Return the sorted list of all items."),
        ("max(a, b) -> c\n\nThe max of a and b, whichever it is.", "max", "The this of a and b, whichever it is."),
        (
            "einsum(equation, *operands)\n    Sums products along the dimensions given.",
            "einsum",
            "Sums products along the dimensions given.",
        ),
        (
            "See :func:`numpy.argmax` and `cross_entropy()` or Cross Entropy.",
            "cross_entropy",
            "See numpy.argmax and this or this.",
        ),
        ("Too short.", "f", None),
        (".. versionadded:: 3.2 of this very long thing", "f", None),
        ("Computes \\(x^2\\) for every one of the entries.", "f", None),
    ],
)
def test_first_paragraph_masks_the_name(doc, name, expected):
    assert data.first_paragraph(doc, name) == expected


def test_installed_pairs_are_many_distinct_and_masked():
    pairs = data.installed_pairs()
    assert len(pairs) > 3000
    assert len({pair.passage.lower() for pair in pairs}) == len({pair.query.lower() for pair in pairs}) == len(pairs)
    assert {"torch", "numpy", "json"} <= {pair.query.split()[0] for pair in pairs}
    assert pairs == data.installed_pairs()
    first, second = data.split_pairs(pairs, 0), data.split_pairs(pairs, 0)
    assert first == second and len(first.held_out) == data.HELD_OUT
    assert not set(first.train) & set(first.held_out) and len(first.train) + len(first.held_out) == len(pairs)


def test_pairs_that_share_text_stay_on_one_side():
    pairs = [*tiny_pairs(), *(Pair(pair.query, f"also {pair.passage}") for pair in tiny_pairs()[:40])]
    split = data.split_pairs(pairs, 1)
    assert split.held_out and not {each.query for each in split.train} & {each.query for each in split.held_out}


def test_reading_csv_tsv_and_jsonl(tmp_path, pairs_file):
    wanted = tiny_pairs()
    for suffix, mark in ((".csv", ","), (".tsv", "\t")):
        path = tmp_path / f"pairs{suffix}"
        rows = [f"id{mark}passage{mark}query", *(f"{i}{mark}{p.passage}{mark}{p.query}" for i, p in enumerate(wanted))]
        path.write_text("\n".join(rows), encoding="utf-8-sig")
        assert data.read_pairs(path) == wanted
    assert data.read_pairs(pairs_file) == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "x", "ends in .csv, .tsv, .jsonl"),
        ("p.csv", "", "the file is empty; a header with query and passage is needed"),
        ("p.csv", "query,text\na,b\n", "line 1: no column 'passage' in the header .found: query, text"),
        ("p.csv", "query,passage\na,b\nc\n", "line 3, column 'passage': missing"),
        ("p.csv", "query,passage\na,b\nc,d,e\n", "line 3: more fields than the header has columns"),
        ("p.csv", "query,passage\n ,b\n", "line 2, column 'query': empty"),
        ("p.csv", 'query,passage\n"a,b\n', "line 2: unexpected end"),
        ("p.tsv", "query,passage\na,b\n", "no column 'query'"),
        ("p.jsonl", '{"query": "a", "passage": "b"}\n{"query": \n', "line 2, column"),
        ("p.jsonl", '{"query": "a", "passage": "b"}\n\n[1]\n', "line 3: an object"),
        ("p.jsonl", '{"query": 3, "passage": "b"}\n', "line 1, column 'query': int, not text"),
        ("p.jsonl", '{"query": "a", "passage": "b"}\n', "1 distinct pair, at least 64"),
    ],
)
def test_a_bad_file_is_refused_with_its_line_and_column(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        data.read_pairs(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.read_pairs(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"query,passage\n\xff\xfe,x\n")
    with pytest.raises(ValueError, match=r"b\.csv, line 2: not UTF-8"):
        data.read_pairs(tmp_path / "b.csv")


def test_embedding_does_not_depend_on_padding_or_batching(tiny_model):
    model, tokens = load_encoder(tiny_model), TokenPairs(load_tokenizer(tiny_model), tiny_pairs())
    assert not any(each.requires_grad for each in model.parameters())
    together = tokens.queries.embed_all(model)
    with torch.no_grad():
        alone = torch.cat([embed(model, *tokens.queries.batch([index])) for index in range(len(tokens))])
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(len(tokens)))


def test_recall_and_mrr_count_ties_against_the_query():
    assert Answers([0, 0], torch.tensor([1, 4])).scores == pytest.approx((0.5, 0.625))


def test_batches_are_of_one_length_and_cover_every_pair_first(tiny_model):
    tokens = TokenPairs(load_tokenizer(tiny_model), tiny_pairs())
    plan = batch_plan(tokens, 3, seed=0, size=32)
    assert sorted(index for batch in plan for index in batch) == list(range(96))
    assert plan == batch_plan(tokens, 3, seed=0, size=32) != batch_plan(tokens, 3, seed=1, size=32)
    assert len(batch_plan(tokens, 20, seed=0, size=500)[0]) == 96


def test_lora_learns_the_tiny_task(tiny_model):
    split = data.split_pairs(tiny_pairs(), 0)
    tokenizer = load_tokenizer(tiny_model)
    train_on = TokenPairs(tokenizer, split.train)
    torch.manual_seed(0)
    model = methods.Method("lora", 8, 1e-2).adapt(load_encoder(tiny_model))
    before = contrastive_loss(model, train_on, range(32)).item()
    losses: list[float] = []
    train(model, train_on, batch_plan(train_on, 20, 0, size=32), 1e-2, losses.append)
    assert len(losses) == 20 and contrastive_loss(model, train_on, range(32)).item() < 0.8 * before
    assert 0 <= answer(model, TokenPairs(tokenizer, split.held_out)).scores.mrr <= 1


@pytest.fixture(scope="session")
def finished(tiny_model, tmp_path_factory):
    """One whole run on the tiny encoder."""
    folder = tmp_path_factory.mktemp("demo")
    pairs = folder / "pairs.csv"
    pairs.write_text(
        "query,passage\n" + "".join(f"{each.query},{each.passage}\n" for each in tiny_pairs()), encoding="utf-8"
    )
    options = run.Options(
        out=folder / "out",
        data=pairs,
        model=tiny_model,
        support="skewgrad",
        rank=8,
        steps=6,
        compare=("halves", "random"),
    )
    return folder, run.run(options)


def test_the_table_has_every_method_with_sound_figures(finished):
    _, rows = finished
    assert [row.method for row in rows] == [
        "zero-shot",
        "LOFT skewgrad r=8",
        "PEFT LoRA r=8",
        "LOFT halves r=8",
        "LOFT random r=8",
    ]
    for row in rows[1:]:
        assert row.trained > 0 and row.seconds_per_step > 0 and row.reload_difference == 0
        loft = row.method.startswith("LOFT")
        assert (row.orthogonality_error is not None) == (row.lora_export_difference is not None) == loft
        if loft:
            assert row.trained == 12 * (16 if "halves" in row.method else 28)
            assert row.orthogonality_error < 2e-6 and row.lora_export_difference < 1e-5
    assert rows[1].calibration_seconds > 0


def test_everything_lies_in_the_one_folder(finished):
    folder, rows = finished
    assert sorted(each.name for each in folder.iterdir()) == ["out", "pairs.csv"]
    names = {each.name for each in (folder / "out").iterdir()}
    loft = {"skewgrad", "halves", "random"}
    assert names == loft | {f"{name}-as-lora" for name in loft} | {"lora", "results.json", "report.html", "table.md"}
    results = json.loads((folder / "out" / "results.json").read_text())
    assert len(results["rows"]) == len(rows) and results["steps"] == 6
    assert (folder / "out" / "table.md").read_text().startswith("| method")


def test_what_is_printed_is_narrow_and_says_what_to_do_next(finished):
    folder, rows = finished
    tables = [report.table(rows), report.checks(rows)]
    assert max(len(line) for text in tables for line in text.splitlines()) <= 100
    assert "| rate" in tables[0].replace("  ", " ").replace("  ", " ") and "zero-shot" not in tables[1]
    told = (folder / "out" / "table.md").read_text()
    assert "LOFT trained" in told and "a recall has a standard error of" in told
    assert f"loft-rs inspect {folder / 'out' / 'skewgrad'} --plot angles.png" in told


def test_the_rates_are_the_suggested_ones(finished):
    _, rows = finished
    rates = {row.method: row.learning_rate for row in rows}
    for name, support in (("skewgrad", "skewgrad"), ("halves", Pilot(halves=True))):
        assert rates[f"LOFT {name} r=8"] == suggest_lr(LoftConfig(r=8, support=support))


def test_the_verdict_says_what_was_equal():
    rows = [report.Row("zero-shot", 0.3, 0.4), report.Row("LOFT kept r=8", 0.5, 0.6, trained=10, steps="32 + 45")]
    rows.append(report.Row("PEFT LoRA r=8", 0.4, 0.5, trained=40, steps="77"))
    text = report.verdict(rows, 100)
    assert "0.300 -> 0.500, +0.200" in text and "LOFT trained 25 % of LoRA's numbers" in text and "0.050" in text
    assert "Both had as many steps in all" in text


def test_all_have_as_many_steps_in_all(finished):
    _, rows = finished
    assert [row.steps for row in rows] == [None, "6", "6", "32 + 1", "6"]
    setting = run.Options(support="kept", rank=8)
    assert [(each.name, each.pilot_steps) for each in setting.check()] == [("kept", 32), ("lora", 0)]


def test_the_page_is_one_file_with_its_picture(finished):
    text = (finished[0] / "out" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in text and "LOFT skewgrad r=8" in text and "Before and after" in text
    assert "prefers-color-scheme: dark" in text and "currentColor" in text
    assert not re.search(r"<(?:script|link|img)|src=|@import", text)


def test_a_page_without_matplotlib_says_how_to_have_it(monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("no matplotlib", name="matplotlib")

    monkeypatch.setattr("loft_rs.plots.draw_methods", missing)
    assert "pip install &quot;.[plot]&quot;" in page._picture([report.Row("zero-shot", 0.1, 0.2)])


def test_an_adapters_folder_says_what_it_is(finished):
    text = (finished[0] / "out" / "skewgrad" / "README.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: peft") and "# LOFT skewgrad r=8" in text and "import loft_rs" in text
    assert "import loft_rs" not in (finished[0] / "out" / "lora" / "README.md").read_text(encoding="utf-8")


def test_a_long_silence_is_broken(capsys, monkeypatch):
    progress, clock = Progress(), [0.0]
    monkeypatch.setattr("loft_rs.demo.progress.time.perf_counter", lambda: clock[0])
    progress.begun = 0.0
    progress.say("LOFT: calibrating")
    for clock[0] in (3.0, 7.0, 9.0, 12.0, 18.0):
        progress.tick()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("... LOFT" in line for line in lines[1:])


def test_the_adapters_fit_the_model_as_anyone_loads_it(finished, tiny_model, tmp_path):
    folder, _ = finished
    assert main(["export-lora", str(folder / "out" / "skewgrad"), "--out", str(tmp_path / "lora")]) == 0
    assert main(["merge", str(folder / "out" / "skewgrad"), "--out", str(tmp_path / "merged")]) == 0
    probe = Probe(TokenPairs(load_tokenizer(tiny_model), tiny_pairs()), tiny_model)
    merged = probe.output(load_encoder(tmp_path / "merged"))
    assert probe.reload_difference(merged, folder / "out" / "skewgrad") < 1e-5
    assert probe.reload_difference(merged, tmp_path / "lora") < 1e-5


def test_a_failed_run_leaves_nothing(tiny_model, pairs_file, monkeypatch):
    monkeypatch.setattr(methods, "LORA_RATE", 1e30)
    with pytest.raises(ArithmeticError, match="diverged"):
        run.run(
            run.Options(
                out=pairs_file.parent / "out", data=pairs_file, model=tiny_model, support="random", rank=4, steps=2
            )
        )
    assert list(pairs_file.parent.iterdir()) == [pairs_file]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(support="magic"), "--support magic: one of "),
        (dict(support="lora"), "--support lora: one of"),
        (dict(compare=("oft",)), "--compare oft: one of"),
        (dict(rank=1), "--rank must be at least 2"),
        (dict(steps=0), "--steps must be at least 1"),
        (dict(seed=-1), "--seed must be at least 0"),
        (dict(threads=0), "--threads must be at least 1"),
    ],
)
def test_wrong_options_are_refused_before_any_work(options, message):
    with pytest.raises(ValueError, match=message):
        run.Options(**options).check()


def test_a_wrong_model_directory_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        model_directory(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not an encoder that transformers can load"):
        load_encoder(tmp_path)


def test_examples_show_what_changed():
    pairs = tiny_pairs()[:4]
    before, after = Answers([1, 1, 2, 0], torch.tensor([3, 1, 1, 2])), Answers([0, 1, 0, 3], torch.tensor([1, 1, 2, 1]))
    text = report.examples(pairs, before, after, "LOFT")
    assert "2 became right with LOFT and 1 became wrong" in text
    assert "? counts apple" in text and "at place 3" in text and "? finds apple" in text and "? draws apple" not in text


def test_the_other_process_cannot_import_loft_rs(finished, tiny_model):
    folder, _ = finished
    probe = Probe(TokenPairs(load_tokenizer(tiny_model), tiny_pairs()), tiny_model)
    with pytest.raises(RuntimeError, match=r"stock PEFT could not use the exported LoRA.*LOFT"):
        probe.export_differences({}, {"skewgrad": folder / "out" / "skewgrad"}, lambda: None)
