"""The search for bits: what is measured is what it costs, and what is found beats stock recipes."""

import json

import pytest
import torch

from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.quantization import Format
from model_export import llm, qwen2, recipes, search, sensitivity
from model_export.calibration import load_calibration
from model_export.checkpoint import Checkpoint
from model_export.options import ExportOptions
from model_export.pictures import reference_features
from model_export.pipeline import export
from model_export.tokenizer import export_tokenizer

FORMATS = [Format(bits, 64) for bits in (3, 4, 8)]


@pytest.fixture(scope="module")
def checkpoint(demo_checkpoint):
    return Checkpoint(demo_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return export_tokenizer(checkpoint)


@pytest.fixture(scope="module")
def references(checkpoint):
    pictures = load_calibration(None, checkpoint.config.vision).spread(3)
    return reference_features(checkpoint.encoder_state(), checkpoint, pictures)


@pytest.fixture(scope="module")
def losses(checkpoint, tokenizer, references):
    return sensitivity.measure(
        checkpoint,
        tokenizer.tokenizer,
        tokenizer.image_token_id,
        references,
        FORMATS,
        FORMATS[1],
        lambda done: None,
    )


class _Held:
    """A matrix in memory."""

    def __init__(self, weight):
        self._weight = weight

    def float(self, rows=slice(None)):
        return self._weight[rows]

    def blocks(self):
        return iter([self._weight])


class _OneRounded(qwen2.SourceWeights):
    """The source, one matrix of it in a format."""

    def __init__(self, checkpoint, path, form):
        super().__init__(checkpoint)
        self._path, self._form = path, form

    def matrix(self, name):
        found = super().matrix(name)
        if name != f"{self._path}.weight":
            return found
        return _Held(qwen2.rounded(found.float(), self._form))


def _divergence(checkpoint, tokenizer, references, path, form):
    """Of whole models, one after the other, through what the gates run."""
    total, places = 0.0, 0
    for reference in references:
        dialogue = qwen2.Dialogue.build(
            tokenizer.tokenizer, reference.picture.questions, tokenizer.image_token_id, 16
        )
        features = torch.from_numpy(reference.features)
        sides = [
            qwen2.Side(qwen2.SourceWeights(checkpoint), features),
            qwen2.Side(_OneRounded(checkpoint, path, form), features),
        ]
        p, q = (o.log_probabilities for o in qwen2.run(checkpoint.config.text, dialogue, sides))
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        places += len(p)
    return total / places


@pytest.mark.parametrize(
    "path",
    [
        "multi_modal_projector.linear_0",
        "multi_modal_projector.linear_2",
        recipes.EMBEDDING,
        "language_model.model.layers.0.mlp.gate_proj",
        "language_model.model.layers.1.self_attn.v_proj",
        "language_model.model.layers.3.mlp.down_proj",
    ],
)
def test_what_is_measured_is_the_model_with_one_matrix_rounded(
    checkpoint, tokenizer, references, losses, path
):
    expected = _divergence(checkpoint, tokenizer, references, path, Format(4, 64))
    assert losses[path][Format(4, 64)] == pytest.approx(expected, rel=0.02, abs=1e-9)


def test_every_matrix_has_losses_that_fall_with_bits(checkpoint, losses):
    paths = {recipes.path_of(spec) for spec in checkpoint.llm_specs if recipes.is_matrix(spec)}
    assert losses.keys() == paths
    for by_format in losses.values():
        assert by_format[FORMATS[0]] > by_format[FORMATS[1]] > by_format[FORMATS[2]] > 0


def test_the_size_is_kept_to_and_more_bits_lose_less(checkpoint, losses):
    options = ExportOptions(layout="mlx")
    total = sum(torch.Size(spec.shape).numel() for spec in checkpoint.llm_specs)
    last = float("inf")
    for target in (4.5, 5.0, 6.0, 8.0, 12.0, 16.0):
        scheme, loss = search.assign(checkpoint.llm_specs, losses, options, target)
        written = llm.total_bytes(checkpoint, scheme, ExportOptions())
        assert 8 * written / total <= target
        assert loss <= last
        last = loss
    assert loss == 0.0
    scheme, _ = search.assign(checkpoint.llm_specs, losses, ExportOptions(), 6.0)
    assert len({form for form in scheme.values() if form}) == 1


@pytest.mark.parametrize("name", recipes.STOCK)
def test_no_stock_recipe_of_the_same_size_loses_less(
    demo_checkpoint, checkpoint, tmp_path, monkeypatch, name
):
    """By the gates, on pictures that nothing was measured on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = {"layout": "mlx", "allow_failed_gates": True}
    stock = export(demo_checkpoint, tmp_path / "stock", ExportOptions(recipe=name, **common))
    target = stock.manifest["llm"]["bits_per_weight"]
    ours = export(demo_checkpoint, tmp_path / "ours", ExportOptions(llm_bpw=target, **common))
    assert ours.manifest["llm"]["bytes"] <= stock.manifest["llm"]["bytes"] * 1.001

    def kl(result):
        return next(gate.value for gate in result.gates if gate.name == "KL divergence")

    assert kl(ours) <= kl(stock)


def test_an_export_is_measured_once_and_says_what_on(demo_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    file = tmp_path / "recipe.jsonl"
    from PIL import Image

    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    file.write_text(
        json.dumps({"image": "red.png", "prompt": "How many shapes are there?", "answer": "Two."})
    )
    options = ExportOptions(llm_bpw=6.5, calibration=str(file), layout="mlx")
    first = export(demo_checkpoint, tmp_path / "one", options)
    found = first.manifest["llm"]["search"]
    assert found["measured_on"] == ["red.png"]
    assert found["predicted_kl_nats"] > 0
    assert first.manifest["llm"]["bits_per_weight"] <= 6.5
    assert Bundle.open(tmp_path / "one").config.quantization.layers
    (kept,) = (tmp_path / "cache").rglob("*.json")

    def again(*arguments):
        raise AssertionError("measured twice")

    monkeypatch.setattr(sensitivity, "measure", again)
    second = export(demo_checkpoint, tmp_path / "two", options)
    assert second.manifest["llm"]["formats"] == first.manifest["llm"]["formats"]
    kept.write_text("{")
    with pytest.raises(AssertionError, match="measured twice"):
        export(demo_checkpoint, tmp_path / "three", options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"llm_bpw": 1.0}, r"--llm-bpw is 1 and 2 bits in groups of 64 everywhere take 2\.5"),
        ({"llm_bpw": -1.0}, "expected bits per weight above zero"),
        ({"llm_bpw": float("nan")}, "expected bits per weight above zero"),
        ({"llm_bpw": 4.5, "recipe": "mixed_4_6"}, "given with --recipe"),
        ({"llm_bpw": 4.5, "embed_bits": 8}, "given with --embed-bits"),
        ({"llm_bpw": 4.5, "llm_mode": "mxfp4"}, "given with --llm-mode"),
        ({"calibration": "pictures"}, "add --llm-bpw"),
        ({"llm_bpw": 4.5, "calibration": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_what_is_refused(demo_checkpoint, tmp_path, options, words):
    with pytest.raises(OptionError, match=words):
        export(demo_checkpoint, tmp_path / "out", ExportOptions(**options))
    assert not (tmp_path / "out").exists()
