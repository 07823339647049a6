"""AWQ, GPTQ and DWQ of the demo checkpoint: what is lost, what is written, what is refused."""

import json
import re
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.bundle.quantization import Format
from fastvlm_mlx.cli.main import app
from fastvlm_mlx.errors import OptionError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.names import LAYER
from model_export.checkpoint.tokenizer import export_tokenizer
from model_export.checkpoint.weights.tensors import safe_tensors
from model_export.encoder.references import reference_features
from model_export.gates.verify import recorded_options
from model_export.language import llm, qwen2, recipes
from model_export.language.dialogue import Dialogue
from model_export.language.weights import Matrix, SourceWeights
from model_export.options import ExportOptions
from model_export.pipeline import export
from model_export.quantization.rounding import awq, dwq, held_out, layers, layerwise
from model_export.samples.calibration import load_calibration
from model_export.samples.images import gate_samples


@pytest.fixture(scope="module")
def demo(demo_checkpoint):
    """The demo checkpoint, scenes to calibrate on, and the gates' scenes to judge by."""
    checkpoint = Checkpoint(demo_checkpoint)
    tokenizer = export_tokenizer(checkpoint)
    vision = checkpoint.config.vision
    references = reference_features(checkpoint.encoder_state(), checkpoint, gate_samples(vision))
    judged = [
        (
            torch.from_numpy(reference.features),
            Dialogue.build(
                tokenizer.tokenizer,
                reference.sample.questions,
                tokenizer.image_token_id,
                vision.num_tokens,
            ),
        )
        for reference in references
        if reference.sample.questions
    ]
    return SimpleNamespace(
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        calibration=load_calibration(None, vision),
        text=replace(checkpoint.config.text, tie_word_embeddings=checkpoint.tied),
        judged=judged,
    )


@pytest.fixture
def brief(demo, monkeypatch):
    """The same with few scenes and steps: for what does not hang on how well a method does."""
    monkeypatch.setattr(dwq, "STEPS", 8)
    few = replace(demo.calibration, samples=demo.calibration.samples[:10])
    return SimpleNamespace(**vars(demo) | {"calibration": few})


class _Held:
    """A matrix in memory."""

    def __init__(self, weight):
        self._weight = weight

    def float(self, rows=slice(None)):
        return self._weight[rows]

    def blocks(self):
        yield self._weight


class _Weights:
    """Some of a model's weights, and the source's for the rest."""

    def __init__(self, checkpoint, changed):
        self._source, self._changed = SourceWeights(checkpoint), changed

    def matrix(self, name):
        return self._changed.get(name) or self._source.matrix(name)


def divergence(demo, changed) -> float:
    """KL divergence from the source, nats, where `changed` takes its weights' places."""
    lost = []
    for features, dialogue in demo.judged:
        sides = [
            qwen2.Side(weights, features)
            for weights in (
                SourceWeights(demo.checkpoint),
                _Weights(demo.checkpoint, changed),
            )
        ]
        p, q = (o.log_probabilities for o in qwen2.run(demo.text, dialogue, sides))
        lost.append((p.exp() * (p - q)).sum(1))
    return float(torch.cat(lost).mean())


def quantize(demo, chosen, asked, directory):
    return layerwise.quantize(
        demo.checkpoint,
        demo.tokenizer,
        demo.calibration,
        chosen,
        asked,
        directory,
        lambda stage, done: None,
    )


def written(demo, directory, **options):
    """The language model's files as an export writes them."""
    asked = ExportOptions.of(**options)
    chosen = recipes.scheme(
        demo.checkpoint.llm_specs, demo.checkpoint.config, asked.llm, asked.destination.layout
    )
    waiting = directory / "waiting"
    waiting.mkdir(parents=True)
    ready = {} if asked.llm.method == "rtn" else quantize(demo, chosen, asked, waiting).ready
    llm.write(
        demo.checkpoint,
        chosen,
        asked.destination.layout,
        asked.llm.dtype,
        directory,
        lambda count: None,
        ready,
    )
    stored = safe_tensors(directory / "model.safetensors")
    weights = {}
    for path, form in chosen.items():
        parts = (stored.get(f"{path}.{part}") for part in ("weight", "scales", "biases"))
        weights[f"{path}.weight"] = Matrix(*parts, form)
    norms = {name: Matrix(tensor) for name, tensor in stored.items() if "norm" in name}
    return {name: m for name, m in (weights | norms).items() if "projector" not in name}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"llm_bits": 2, "group_size": 32}),
        ("gptq", {"llm_bits": 2}),
        pytest.param("dwq", {"llm_bits": 2}, marks=pytest.mark.slow),
        *(
            pytest.param(method, {"recipe": "mixed_2_6", "layout": "mlx"}, marks=pytest.mark.slow)
            for method in ("gptq", "dwq")
        ),
    ],
    ids=str,
)
def test_it_loses_less_than_rounding_on_scenes_it_has_not_seen(demo, tmp_path, method, options):
    plain = divergence(demo, written(demo, tmp_path / "rtn", **options))
    found = divergence(demo, written(demo, tmp_path / method, method=method, **options))
    assert found < 0.5 * plain


@pytest.mark.parametrize("method", [pytest.param("awq", marks=pytest.mark.slow), "gptq"])
def test_where_rounding_loses_less_the_bundle_has_rounding(demo, tmp_path, method):
    """The demo was trained to stand 3 bits in just these groups."""
    asked = ExportOptions.of(llm_bits=3, method=method)
    chosen = recipes.scheme(
        demo.checkpoint.llm_specs, demo.checkpoint.config, asked.llm, asked.destination.layout
    )
    made = quantize(demo, chosen, asked, tmp_path)
    assert made.ready == {}
    assert made.facts["method"] == "rtn"
    losses = made.facts["kl_nats"]
    assert losses["rtn"]["mean"] < losses[method]["mean"]
    assert made.notes[0].startswith(f"{method.upper()} loses {losses[method]['mean']:.3g} nats")
    assert f"(median {losses['rtn']['median']:.3g}, standard deviation" in made.notes[0]
    assert made.notes[0].endswith("the bundle has plain rounding")


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(brief, tmp_path):
    for method in ("awq", "gptq", "dwq"):
        files = [tmp_path / f"{method}-{i}" for i in range(2)]
        for directory in files:
            written(brief, directory, llm_bits=2, group_size=32, method=method)
        first, second = ((f / "model.safetensors").read_bytes() for f in files)
        assert first == second


@torch.inference_mode()
def test_awq_changes_nothing_before_rounding(demo):
    """The scaled model in float32 is the source."""
    source = SourceWeights(demo.checkpoint)
    state, samples = demo.checkpoint.encoder_state(), demo.calibration.spread(4)
    references = reference_features(state, demo.checkpoint, samples)
    samples = layers.first_states(demo.checkpoint, demo.tokenizer, references, source)
    layer = qwen2.decoder_layer(demo.checkpoint.config.text)
    formats = dict.fromkeys(layers.MATRICES, Format(3, 64))
    changed = {}
    for index in range(demo.text.num_hidden_layers):
        prefix = f"{layers.LAYERS}{index}."
        state = {name: source.matrix(prefix + name).float() for name, _ in LAYER}
        layer.load_state_dict(state, assign=True)
        seen = awq.CalibrationInputs(layers.inputs_of(layer, samples), [s.around for s in samples])
        scaled = awq.scaled(state, awq.search_scales(layer, seen, formats))
        assert any(not torch.equal(scaled[name], state[name]) for name in state)
        changed |= {prefix + name: _Held(weight) for name, weight in scaled.items()}
        for sample in samples:
            sample.hidden = layer(sample.hidden, **sample.around)
    features, dialogue = demo.judged[0]
    sides = [
        qwen2.Side(weights, features) for weights in (source, _Weights(demo.checkpoint, changed))
    ]
    expected, found = (o.log_probabilities for o in qwen2.run(demo.text, dialogue, sides))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_layers_that_are_not_quantized_are_left_out(demo, tmp_path):
    """Of those that are, one has other bits than the rest."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"model.layers.1.*": 16, "model.layers.2.*": 3}))
    asked = ExportOptions.of(llm_bits=2, recipe=str(recipe), layout="mlx", method="dwq")
    chosen = recipes.scheme(
        demo.checkpoint.llm_specs, demo.checkpoint.config, asked.llm, asked.destination.layout
    )
    made = quantize(demo, chosen, asked, tmp_path)
    assert made.facts["method"] == "dwq"
    assert {name.split(".")[3] for name in made.ready} == {"0", "2", "3"}


def test_a_method_that_diverges_is_not_used(brief, tmp_path, monkeypatch):
    monkeypatch.setattr(dwq, "RATE", 1e30)
    asked = ExportOptions.of(llm_bits=3, method="dwq")
    chosen = recipes.scheme(
        brief.checkpoint.llm_specs, brief.checkpoint.config, asked.llm, asked.destination.layout
    )
    made = quantize(brief, chosen, asked, tmp_path)
    assert made.ready == {}
    assert made.facts["method"] == "rtn"
    assert made.facts["kl_nats"]["dwq"]["mean"] is None
    assert made.facts["p_value"] == 1
    assert "DWQ loses no finite number of nats" in made.notes[0]
    json.dumps(made.facts, allow_nan=False)


def test_what_is_judged_is_what_is_written(demo, tmp_path):
    """The two losses are those of the files, on the same scenes."""
    options = {"llm_bits": 2}
    asked = ExportOptions.of(method="gptq", **options)
    chosen = recipes.scheme(
        demo.checkpoint.llm_specs, demo.checkpoint.config, asked.llm, asked.destination.layout
    )
    ready = quantize(demo, chosen, asked, tmp_path).ready
    state, samples = demo.checkpoint.encoder_state(), gate_samples(demo.checkpoint.config.vision)
    references = [
        r for r in reference_features(state, demo.checkpoint, samples) if r.sample.questions
    ]
    source = SourceWeights(demo.checkpoint)
    candidates = [held_out.PlannedWeights(source, chosen, made) for made in ({}, ready)]
    found = held_out.divergences(demo.checkpoint, demo.tokenizer, references, candidates)
    means = [torch.cat([lost[i] for lost in found]).mean() for i in range(2)]
    for method, mean in zip(("rtn", "gptq"), means, strict=True):
        files = written(demo, tmp_path / method, method=method, **options)
        assert float(mean) == pytest.approx(divergence(demo, files), rel=0.02), method
    losses = held_out.losses(demo.checkpoint, demo.tokenizer, references, candidates)
    for i, each in enumerate(losses):
        assert each.by_sample == pytest.approx([float(lost[i].mean()) for lost in found])


SMALL = (1e-6, 3e-6, 2e-6, 5e-6, 4e-6, 8e-6, 7e-6, 6e-6, 9e-6)


@pytest.mark.parametrize(
    ("rounding", "method", "gains", "words"),
    [
        # One image carries 99.99 % of the loss and of the gain; on the others either may win.
        ((0.5, *SMALL), (0.1, *reversed(SMALL)), False, "no gain that chance would not give"),
        # It carries them the other way, and the rest gains.
        ((0.1, *SMALL), (0.5, *(x / 2 for x in SMALL)), False, "and not in the mean"),
        # The same gain everywhere, with such a tail and without.
        ((0.5, *SMALL), (0.25, *(x / 2 for x in SMALL)), True, "a gain, p = 0.00098"),
        ((0.2,) * 5, (0.11, 0.12, 0.13, 0.14, 0.15), True, "a gain, p = 0.031"),
        # What even five of five could not say.
        ((0.2,) * 4, (0.11, 0.12, 0.13, 0.14), False, "p = 0.062 of 0.05"),
        ((0.2,) * 4 + (0.1,), (0.11, 0.12, 0.13, 0.14, 0.16), False, "no gain"),
        ((*SMALL,), (*SMALL,), False, "p = 1 of"),
        ((*SMALL,), (float("nan"), *SMALL[1:]), False, "p = 1 of"),
        ((*SMALL,), (*[float("inf")] * 9,), False, "p = 1 of"),
    ],
)
def test_a_gain_is_told_from_chance(rounding, method, gains, words):
    verdict = held_out.PairedTest(held_out.Losses(rounding), held_out.Losses(method))
    assert verdict.gains is gains
    assert words in str(verdict)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=8, unique_by=abs))
def test_the_p_value_is_the_share_of_all_signs_that_gain_as_much(gains):
    """Enumerated: each difference keeps its rank and has either sign."""
    ranks = [sorted(map(abs, gains)).index(abs(gain)) + 1 for gain in gains]
    won = sum(rank for rank, gain in zip(ranks, gains, strict=True) if gain > 0)
    every = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in product((False, True), repeat=len(gains))
    ]
    verdict = held_out.PairedTest(
        held_out.Losses((0.0,) * len(gains)), held_out.Losses(tuple(-g for g in gains))
    )
    assert verdict.p_value == pytest.approx(sum(as_much >= won for as_much in every) / len(every))


def test_losses_are_summed_up():
    found = held_out.Losses((1.0, 2.0, 9.0)).to_dict()
    assert found.pop("by_sample") == [1.0, 2.0, 9.0]
    assert found == {
        "mean": 4.0,
        "median": 2.0,
        "standard_deviation": pytest.approx((38 / 3) ** 0.5),
    }
    assert str(held_out.Losses((1.0, 2.0, 9.0))) == "4 nats (median 2, standard deviation 3.56)"


def test_of_too_few_images_nothing_is_made_and_it_is_told(demo, tmp_path):
    asked = ExportOptions.of(llm_bits=2, method="gptq")
    chosen = recipes.scheme(
        demo.checkpoint.llm_specs, demo.checkpoint.config, asked.llm, asked.destination.layout
    )
    copies = demo.calibration.samples[:9] * 2
    for samples, words in ((copies[:1], "one image is"), (copies, "9 images are")):
        few = replace(demo.calibration, samples=samples)
        made = quantize(
            SimpleNamespace(**vars(demo) | {"calibration": few}), chosen, asked, tmp_path
        )
        assert (made.ready, made.facts["method"], made.facts["images"]) == ({}, "rtn", 0)
        assert made.notes[0].startswith(f"{words} too few to calibrate GPTQ")
        assert "the bundle has plain rounding; give --calibration 10" in made.notes[0]
    assert not list(tmp_path.iterdir())


def test_the_command(demo_checkpoint, tmp_path):
    """A bundle on the user's own images: gates, manifest, what could not be read."""
    samples = tmp_path / "images"
    samples.mkdir()
    for i in range(10):
        Image.new("RGB", (300, 200), (25 * i, 200, 0)).save(samples / f"{i}.png")
    (samples / "broken.png").write_bytes(b"no image")
    command = ["export", str(demo_checkpoint), str(tmp_path / "out"), "--llm-bits", "4"]
    command += ["--method", "gptq", "--calibration", str(samples)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "calibration: 1 skipped" in done.stderr
    assert "broken.png" in done.stderr
    losses = re.findall(
        r"([0-9.e-]+) nats \(median ([^,]*), standard deviation ([^)]*)\)", done.stderr
    )
    bundle = Bundle.open(tmp_path / "out")
    bundle.check_files()
    assert recorded_options(bundle).llm.method == "gptq"
    recorded = bundle.manifest["llm"]["calibration"]
    assert bundle.manifest["options"]["method"] == "gptq"
    # Both losses are told as they are recorded.
    kept = [recorded["kl_nats"][method] for method in ("gptq", "rtn")]
    values = [(each["mean"], each["median"], each["standard_deviation"]) for each in kept]
    assert losses == [tuple(f"{value:.3g}" for value in each) for each in values]
    gains = recorded["p_value"] <= 0.05 and values[0] < values[1]
    assert recorded["method"] == ("gptq" if gains else "rtn")
    assert recorded["images"] == recorded["calibrated_on"]["count"] == 5
    assert recorded["judged_on"]["count"] == 5
    names = [*recorded["calibrated_on"]["names"], *recorded["judged_on"]["names"]]
    assert sorted(names) == [f"{i}.png" for i in range(10)]
    assert recorded["calibrated_on"]["sha256"] != recorded["judged_on"]["sha256"]
    assert "broken.png" in recorded["skipped"][0]
    vision = bundle.config.vision
    assert recorded["sha256"] == load_calibration(samples, vision).digest
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir() and p.suffix != ".mlpackage"]
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path / "out"), "--json"]).stdout)
    assert facts["llm"]["method"] == recorded["method"]


@pytest.mark.parametrize("method", ["awq", "gptq", "dwq"])
def test_a_weight_that_can_t_be_stored_is_named(demo, edit_checkpoint, tmp_path, method):
    def enlarge(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6

    other = SimpleNamespace(
        **{**vars(demo), "checkpoint": Checkpoint(edit_checkpoint(tensors=enlarge))}
    )
    with pytest.raises(OptionError, match=r"model\.layers\.0\.mlp\.up_proj\.weight reaches 1e\+06"):
        written(other, tmp_path / "out", llm_bits=4, method=method)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "nf4"}, "--method is nf4: expected one of rtn, awq, gptq, dwq"),
        ({"calibration": "images"}, "nothing looks at it: add --llm-bpw, a --method, or"),
        ({"method": "gptq", "llm_bits": 16}, "--method gptq is given and no layer is quantized"),
        (
            {"method": "awq", "llm_mode": "mxfp4", "layout": "mlx"},
            "--method awq can't quantize to mxfp4 in groups of 32: it is for affine bits",
        ),
        ({"method": "awq", "calibration": "{empty}"}, "holds no image that can be used"),
        ({"method": "gptq", "calibration": "{gone}"}, "does not exist"),
    ],
)
def test_what_is_refused_before_any_work(demo_checkpoint, tmp_path, options, words):
    (tmp_path / "empty").mkdir()
    named = {"{empty}": str(tmp_path / "empty"), "{gone}": str(tmp_path / "gone")}
    options = {key: named.get(value, value) for key, value in options.items()}
    with pytest.raises(OptionError, match=words):
        export(demo_checkpoint, tmp_path / "out", ExportOptions.of(**options))
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
