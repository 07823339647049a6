"""The search for bits: what is measured is what it costs, and no plain choice of its size loses
less."""

import json

import mlx.core as mx
import pytest
import torch
from PIL import Image

from benchmarks import search as benchmark
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.errors import OptionError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer
from model_export.encoder.references import reference_features
from model_export.language import llm, qwen2, recipes
from model_export.language.dialogue import Dialogue
from model_export.language.weights import SourceWeights, rounded
from model_export.options import RECIPES, ExportOptions
from model_export.pipeline import export
from model_export.quantization.bits import search, sensitivity, trial
from model_export.quantization.bits.candidates import Space, alternatives, at_or_below
from model_export.quantization.bits.measurements import Measurements
from model_export.quantization.rounding import held_out
from model_export.samples.calibration import Calibration, load_calibration

FORMS = [Format(bits, 64) for bits in (2, 3, 4, 8)]
PATHS = [
    "multi_modal_projector.linear_0",
    "multi_modal_projector.linear_2",
    recipes.EMBEDDING,
    "language_model.model.layers.0.mlp.gate_proj",
    "language_model.model.layers.1.self_attn.v_proj",
    "language_model.model.layers.3.mlp.down_proj",
]


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint):
    return Checkpoint(demo_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return export_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def calibration(checkpoint):
    return load_calibration(None, checkpoint.config.vision)


@pytest.fixture(scope="module")
def references(checkpoint, calibration):
    return reference_features(checkpoint.encoder_state(), checkpoint, calibration.spread(2))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """One for all tests of this file, none of them the user's."""
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "search-cache"))


@pytest.fixture(scope="module")
def losses(checkpoint, tokenizer, references):
    asked = dict.fromkeys(PATHS, FORMS)
    return sensitivity.measure(
        checkpoint, tokenizer, references, asked, "float32", lambda done: None
    )


class _Held:
    """A matrix in memory."""

    def __init__(self, weight):
        self._weight = weight

    def float(self, rows=slice(None)):
        return self._weight[rows]

    def blocks(self):
        return iter([self._weight])


class _OneRounded(SourceWeights):
    """The source, one matrix of it in a format."""

    def __init__(self, checkpoint, path, form):
        super().__init__(checkpoint)
        self._path, self._form = path, form

    def matrix(self, name):
        found = super().matrix(name)
        if name != f"{self._path}.weight":
            return found
        return _Held(rounded(found.float(), self._form))


def _divergence(checkpoint, tokenizer, references, path, form):
    """Of whole models, one after the other, through what the gates run."""
    total, places = 0.0, 0
    for reference in references:
        dialogue = Dialogue.build(
            tokenizer.tokenizer, reference.sample.questions, tokenizer.image_token_id, 16
        )
        features = torch.from_numpy(reference.features)
        sides = [
            qwen2.Side(SourceWeights(checkpoint), features),
            qwen2.Side(_OneRounded(checkpoint, path, form), features),
        ]
        p, q = (o.log_probabilities for o in qwen2.run(checkpoint.config.text, dialogue, sides))
        p, q = p.double(), q.double()
        # What float32 leaves of the sums of probabilities besides one.
        total += float((p.exp() * (p - q) - p.exp() + q.exp()).sum())
        places += len(p)
    return total / places


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[2]], ids=str)
def test_what_is_measured_is_the_model_with_one_matrix_rounded(
    checkpoint, tokenizer, references, losses, path, form
):
    expected = _divergence(checkpoint, tokenizer, references, path, form)
    assert losses[path][form] == pytest.approx(expected, rel=0.02, abs=1e-8)


def _untied(demo_checkpoint, directory):
    """The demo's checkpoint with a head of its own."""
    for file in demo_checkpoint.iterdir():
        if file.is_file():
            (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    (weights,) = directory.glob("*.safetensors")
    tensors = mx.load(str(weights))
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding * (1 + 0.2 * mx.random.normal(embedding.shape))
    mx.save_safetensors(str(weights), tensors)
    return Checkpoint(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_whole_assignments_are_measured_as_the_judge_measures_them(
    demo_checkpoint, checkpoint, tokenizer, references, tmp_path, tied
):
    if not tied:
        checkpoint = _untied(demo_checkpoint, tmp_path)
        assert not checkpoint.tied
    space = Space(checkpoint.llm_specs, checkpoint.config, ExportOptions.of(layout="mlx"))
    paths = [recipes.path_of(spec) for spec in space.matrices]
    mixed = {path: [*FORMS, None][i % 5] for i, path in enumerate(paths)}
    late = {path: FORMS[1] if ".layers.2." in path else None for path in paths}
    schemes = [late, mixed, {paths[-1]: FORMS[0]}, {}]
    found = trial.divergences(checkpoint, tokenizer, references, schemes, "float32")
    source = SourceWeights(checkpoint)
    candidates = [held_out.PlannedWeights(source, scheme) for scheme in schemes]
    expected = trial.means(held_out.divergences(checkpoint, tokenizer, references, candidates))
    found = trial.means(found)
    assert found == pytest.approx(expected, rel=0.01, abs=1e-7)
    assert expected[1] > 100 * expected[2] > 0 or not tied
    assert found[3] < 1e-9


def test_no_plain_choice_of_the_size_loses_less(demo_checkpoint):
    """On images that nothing was measured on; `python -m benchmarks.search` has all sizes."""
    found = benchmark.rows(demo_checkpoint, 64, [3.55], count=12)
    assert [(row.layout, row.worse_than) for row in found] == [("app", ()), ("mlx", ())]
    assert all(row.bits_per_weight <= row.target for row in found)


def test_a_tie_is_what_the_errors_do_not_tell_apart():
    places = [10] * 4
    theirs = torch.tensor([0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    assert benchmark.worse(theirs * 1.1, theirs, places)
    assert not benchmark.worse(theirs, theirs * 1.1, places)
    # One image alone makes the difference; and less than 1e-5 nats is none.
    assert not benchmark.worse(theirs + torch.tensor([0, 0, 0, 0.5]), theirs, places)
    assert not benchmark.worse(theirs * (1 + 1e-4), theirs, places)


def searched(checkpoint, tokenizer, calibration, **options):
    asked = ExportOptions.of(**options)
    return search.search(
        checkpoint, tokenizer, calibration, asked, asked.llm.bpw, lambda stage, done: None
    )


def test_what_a_little_more_buys_is_said(checkpoint, tokenizer, calibration):
    found = searched(checkpoint, tokenizer, calibration, llm_bpw=4.5)
    (note,) = [n for n in found.notes() if "a little more" in n]
    assert note.startswith("a little more buys much: --llm-bpw 4.54 (every matrix at 4 bits) loses")
    told = [each for each in found.larger if each.name == "every matrix at 4 bits"]
    assert told[0].measured_kl_nats < search.MUCH * found.taken.measured_kl_nats
    assert [n for n in found.notes() if "losses of single matrices add up to" in n]
    enough = searched(checkpoint, tokenizer, calibration, llm_bpw=4.54)
    assert enough.taken.measured_kl_nats <= told[0].measured_kl_nats


@pytest.mark.parametrize(
    ("predicted", "measured", "told"),
    [(0.01, 0.05, True), (0.05, 0.01, True), (0.02, 0.05, False), (1e-9, 9e-6, False)],
)
def test_a_gap_is_told_where_it_is_wide_and_of_something(predicted, measured, told):
    taken = search.MeasuredCandidate("search", 4.0, predicted, measured)
    larger = search.MeasuredCandidate("every matrix at 4 bits", 4.54, 0.0, measured / 10)
    found = search.SearchResult({}, 4.0, (taken,), (larger,), Calibration((), ()), ("a",), ("b",))
    notes = found.notes()
    assert any("losses of single matrices add up to" in note for note in notes) is told
    assert any("a little more buys much" in note for note in notes) is (measured > 1e-5)


def test_each_matrix_is_measured_in_the_forms_that_it_may_get(checkpoint):
    """The app has one form for all; elsewhere a matrix that is read once may have any."""
    for layout, everywhere in (("app", {3, 4}), ("mlx", {2, 3, 4, 5, 6, 8})):
        options = ExportOptions.of(llm_bpw=4.6, layout=layout)
        space = Space(checkpoint.llm_specs, checkpoint.config, options)
        asked = {
            p: {f.bits for f in forms}
            for p, forms in search._formats_to_measure(space, 4.6).items()
        }
        assert asked[recipes.EMBEDDING] == asked[PATHS[0]] == everywhere
        layers = {3, 4} if layout == "app" else {3, 4, 5, 6, 8}
        assert {frozenset(asked[path]) for path in asked if ".layers." in path} == {
            frozenset(layers)
        }


def test_what_decides_is_kept_back(checkpoint, tokenizer, calibration):
    found = searched(checkpoint, tokenizer, calibration, llm_bpw=3.0, layout="mlx")
    assert not set(found.measured_on) & set(found.chosen_on)
    assert found.tried == tuple(sorted(found.tried, key=lambda each: each.measured_kl_nats))
    names = [each.name for each in found.tried]
    assert any(name.startswith("layers at 2 bits, ") for name in names)
    assert "search" in names
    judges = [sample for sample in calibration.samples if sample.name in found.chosen_on]
    deciding = reference_features(checkpoint.encoder_state(), checkpoint, judges)
    lost = trial.divergences(checkpoint, tokenizer, deciding, [found.scheme], "float16")
    assert trial.means(lost) == pytest.approx([found.taken.measured_kl_nats], rel=1e-3)
    one = Calibration(calibration.samples[:1], ())
    alone = searched(checkpoint, tokenizer, one, llm_bpw=3.0, layout="mlx")
    assert alone.measured_on == alone.chosen_on
    assert any("give --calibration two" in note for note in alone.notes())


@pytest.mark.parametrize(("layout", "target"), [("app", 4.5), ("mlx", 2.6), ("mlx", 6.6)])
def test_candidates_fit_and_are_the_layout_s(checkpoint, layout, target):
    options = ExportOptions.of(llm_bpw=target, layout=layout)
    space = Space(checkpoint.llm_specs, checkpoint.config, options)
    made_up = {
        path: {form: 4.0**-form.bits for form in forms}
        for path, forms in search._formats_to_measure(space, target).items()
    }
    found = at_or_below(space, made_up, target)
    total = sum(torch.Size(spec.shape).numel() for spec in checkpoint.llm_specs)
    for candidate in found:
        written = llm.total_bytes(checkpoint, candidate.scheme, "app", options.llm.dtype)
        assert 8 * written / total <= target
        assert 8 * written / total == pytest.approx(space.bits_per_weight(candidate.bytes))
        assert recipes.unreadable(candidate.scheme, layout) is None
    assert len({tuple(candidate.scheme.items()) for candidate in found}) == len(found)
    assert any(candidate.name.startswith("every matrix at") for candidate in found)


def test_the_widest_plain_choices_leave_out_none_that_nothing_else_is_wider_than(checkpoint):
    options = ExportOptions.of(llm_bpw=4.6, layout="mlx")
    space = Space(checkpoint.llm_specs, checkpoint.config, options)

    def widths(widest):
        found = alternatives(space, 4.6, widest=widest)
        return {
            tuple(form.bits if (form := each.scheme[path]) else 16 for path in PATHS)
            for each in found
            if each.name not in RECIPES
        }

    def as_wide(one, other):
        return all(a >= b for a, b in zip(one, other, strict=True))

    every, some = widths(False), widths(True)
    expected = {w for w in every if not any(as_wide(other, w) for other in every - {w})}
    assert some == expected
    assert 2 < len(some) < len(every)


def test_an_image_costs_two_operations_a_weight_and_token(checkpoint):
    for size, tokens in ((256, 16), (512, 64)):
        operations = 2 * checkpoint.llm_parameters * (tokens + search.TEXT_TOKENS)
        assert search._cost(checkpoint, size) == operations


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"a": "0.1"}', '{"a": NaN}', '{"a": -1.0}', "[" * 100_000]
)
def test_a_damaged_measurement_is_none(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept, form = Measurements("key"), Format(4, 64)
    kept.write(form, {"a": 0.25})
    kept.write(form, {"b": 0.5})
    assert kept.read(form) == {"a": 0.25, "b": 0.5}
    (file,) = kept.directory.iterdir()
    file.write_text(damage)
    assert kept.read(form) == {}
    kept.write(form, {"b": 0.5})
    assert kept.read(form) == {"b": 0.5}
    # Of another form or key nothing is known.
    assert Measurements("other").read(form) == kept.read(Format(4, 32)) == {}


def test_a_cache_that_can_t_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kept = Measurements("key")
    kept.write(Format(4, 64), {"a": 0.25})
    assert kept.read(Format(4, 64)) == {}


def test_an_export_is_measured_once_and_says_what_on(demo_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "recipe.jsonl"
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    file.write_text(
        json.dumps({"image": "red.png", "prompt": "How many shapes are there?", "answer": "Two."})
    )
    options = ExportOptions.of(llm_bpw=6.5, calibration=str(file), layout="mlx")
    first = export(demo_checkpoint, tmp_path / "one", options)
    found = first.manifest["llm"]["search"]
    assert found["measured_on"] == ["red.png"]
    assert found["predicted_kl_nats"] > 0
    assert first.manifest["llm"]["bits_per_weight"] <= 6.5
    assert Bundle.open(tmp_path / "one").config.quantization.layers
    assert found["measured_kl_nats"] == found["tried"][0]["measured_kl_nats"] > 0
    assert any("give --calibration two" in note for note in first.notes)
    kept = [*(tmp_path / "cache").rglob("*.json")]

    def again(*arguments):
        raise AssertionError("measured twice")

    monkeypatch.setattr(sensitivity, "measure", again)
    second = export(demo_checkpoint, tmp_path / "two", options)
    assert second.manifest["llm"]["formats"] == first.manifest["llm"]["formats"]
    kept[0].write_text("{")
    with pytest.raises(AssertionError, match="measured twice"):
        export(demo_checkpoint, tmp_path / "three", options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"llm_bpw": 1.0}, r"--llm-bpw is 1 and 2 bits in groups of 64 everywhere take 2\.5"),
        ({"llm_bpw": -1.0}, "expected bits per weight above zero"),
        ({"llm_bpw": float("nan")}, "expected a finite number"),
        ({"llm_bpw": 4.5, "recipe": "mixed_4_6"}, "given with --recipe"),
        ({"llm_bpw": 4.5, "embed_bits": 8}, "given with --embed-bits"),
        ({"llm_bpw": 4.5, "llm_mode": "mxfp4"}, "given with --llm-mode"),
        ({"calibration": "images"}, "add --llm-bpw"),
        ({"llm_bpw": 4.5, "calibration": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_is_refused(demo_checkpoint, tmp_path, options, words):
    with pytest.raises(OptionError, match=words):
        export(demo_checkpoint, tmp_path / "out", ExportOptions.of(**options))
    assert not (tmp_path / "out").exists()
