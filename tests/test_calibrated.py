"""AWQ, GPTQ and DWQ of the demo checkpoint: what is lost, what is written, what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.cli import app
from fastvlm_mlx.errors import OptionError
from fastvlm_mlx.quantization import Format
from model_export import awq, calibrated, dwq, judge, llm, qwen2, recipes
from model_export.calibration import load_calibration
from model_export.checkpoint import Checkpoint
from model_export.options import ExportOptions
from model_export.pictures import gate_pictures, reference_features
from model_export.pipeline import export
from model_export.tensors import safe_tensors
from model_export.tokenizer import export_tokenizer
from model_export.verify import recorded_options


@pytest.fixture(scope="module")
def demo(demo_checkpoint):
    """The demo checkpoint, scenes to calibrate on, and the gates' scenes to judge by."""
    checkpoint = Checkpoint(demo_checkpoint)
    tokenizer = export_tokenizer(checkpoint)
    vision = checkpoint.config.vision
    references = reference_features(checkpoint.encoder_state(), checkpoint, gate_pictures(vision))
    judged = [
        (
            torch.from_numpy(reference.features),
            qwen2.Dialogue.build(
                tokenizer.tokenizer,
                reference.picture.questions,
                tokenizer.image_token_id,
                vision.num_tokens,
            ),
        )
        for reference in references
        if reference.picture.questions
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
    few = replace(demo.calibration, pictures=demo.calibration.pictures[:8])
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
        self._source, self._changed = qwen2.SourceWeights(checkpoint), changed

    def matrix(self, name):
        return self._changed.get(name) or self._source.matrix(name)


def divergence(demo, changed) -> float:
    """KL divergence from the source, nats, where `changed` takes its weights' places."""
    lost = []
    for features, dialogue in demo.judged:
        sides = [
            qwen2.Side(weights, features)
            for weights in (
                qwen2.SourceWeights(demo.checkpoint),
                _Weights(demo.checkpoint, changed),
            )
        ]
        p, q = (o.log_probabilities for o in qwen2.run(demo.text, dialogue, sides))
        lost.append((p.exp() * (p - q)).sum(1))
    return float(torch.cat(lost).mean())


def quantize(demo, chosen, asked, directory):
    return calibrated.quantize(
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
    asked = ExportOptions(**options)
    chosen = recipes.scheme(demo.checkpoint.llm_specs, demo.checkpoint.config, asked)
    waiting = directory / "waiting"
    waiting.mkdir(parents=True)
    ready = {} if asked.method == "rtn" else quantize(demo, chosen, asked, waiting).ready
    llm.write(demo.checkpoint, chosen, asked, directory, lambda count: None, ready)
    stored = safe_tensors(directory / "model.safetensors")
    weights = {}
    for path, form in chosen.items():
        parts = (stored.get(f"{path}.{part}") for part in ("weight", "scales", "biases"))
        weights[f"{path}.weight"] = qwen2.Matrix(*parts, form)
    norms = {name: qwen2.Matrix(tensor) for name, tensor in stored.items() if "norm" in name}
    return {name: m for name, m in (weights | norms).items() if "projector" not in name}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("awq", {"llm_bits": 2, "group_size": 32}),
        ("gptq", {"llm_bits": 2}),
        ("dwq", {"llm_bits": 2}),
        ("gptq", {"recipe": "mixed_2_6", "layout": "mlx"}),
        ("dwq", {"recipe": "mixed_2_6", "layout": "mlx"}),
    ],
    ids=str,
)
def test_it_loses_less_than_rounding_on_scenes_it_has_not_seen(demo, tmp_path, method, options):
    plain = divergence(demo, written(demo, tmp_path / "rtn", **options))
    found = divergence(demo, written(demo, tmp_path / method, method=method, **options))
    assert found < 0.5 * plain


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_where_rounding_loses_less_the_bundle_has_rounding(demo, tmp_path, method):
    """The demo was trained to stand 3 bits in just these groups."""
    asked = ExportOptions(llm_bits=3, method=method)
    chosen = recipes.scheme(demo.checkpoint.llm_specs, demo.checkpoint.config, asked)
    made = quantize(demo, chosen, asked, tmp_path)
    assert made.ready == {}
    assert made.facts["method"] == "rtn"
    assert made.facts["kl_nats"]["rtn"] < made.facts["kl_nats"][method]
    assert made.notes[0].startswith(f"{method.upper()} loses")
    assert made.notes[0].endswith("the bundle has plain rounding")


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
    source = qwen2.SourceWeights(demo.checkpoint)
    state, pictures = demo.checkpoint.encoder_state(), demo.calibration.spread(4)
    references = reference_features(state, demo.checkpoint, pictures)
    samples = calibrated.samples_of(demo.checkpoint, demo.tokenizer, references, source)
    layer = qwen2.decoder_layer(demo.checkpoint.config.text)
    formats = dict.fromkeys(calibrated.MATRICES, Format(3, 64))
    changed = {}
    for index in range(demo.text.num_hidden_layers):
        prefix = f"{calibrated.LAYERS}{index}."
        state = {name: source.matrix(prefix + name).float() for name, _ in calibrated.LAYER}
        layer.load_state_dict(state, assign=True)
        seen = awq.Seen(calibrated.seen_by(layer, samples), [s.around for s in samples])
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


def test_layers_that_are_not_quantized_are_left_out(brief, tmp_path):
    """Of those that are, one has other bits than the rest."""
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"model.layers.1.*": 16, "model.layers.2.*": 3}))
    asked = ExportOptions(llm_bits=2, recipe=str(recipe), layout="mlx", method="dwq")
    chosen = recipes.scheme(brief.checkpoint.llm_specs, brief.checkpoint.config, asked)
    made = quantize(brief, chosen, asked, tmp_path)
    assert made.facts["method"] == "dwq"
    assert {name.split(".")[3] for name in made.ready} == {"0", "2", "3"}


def test_a_method_that_diverges_is_not_used(brief, tmp_path, monkeypatch):
    monkeypatch.setattr(dwq, "RATE", 1e30)
    asked = ExportOptions(llm_bits=3, method="dwq")
    chosen = recipes.scheme(brief.checkpoint.llm_specs, brief.checkpoint.config, asked)
    made = quantize(brief, chosen, asked, tmp_path)
    assert made.ready == {}
    assert made.facts["method"] == "rtn"
    assert made.facts["kl_nats"]["dwq"] is None
    json.dumps(made.facts, allow_nan=False)


def test_what_is_judged_is_what_is_written(demo, tmp_path):
    """The two losses are those of the files, on the same scenes."""
    options = {"llm_bits": 2}
    asked = ExportOptions(method="gptq", **options)
    chosen = recipes.scheme(demo.checkpoint.llm_specs, demo.checkpoint.config, asked)
    ready = quantize(demo, chosen, asked, tmp_path).ready
    state, pictures = demo.checkpoint.encoder_state(), gate_pictures(demo.checkpoint.config.vision)
    references = [
        r for r in reference_features(state, demo.checkpoint, pictures) if r.picture.questions
    ]
    source = qwen2.SourceWeights(demo.checkpoint)
    candidates = [judge.Candidate(source, chosen, made) for made in ({}, ready)]
    losses = judge.losses(demo.checkpoint, demo.tokenizer, references, candidates)
    for method, found in zip(("rtn", "gptq"), losses, strict=True):
        files = written(demo, tmp_path / method, method=method, **options)
        assert found == pytest.approx(divergence(demo, files), rel=0.02), method


def test_pictures_are_kept_back_for_the_judge(demo):
    seen, judges = calibrated.split(demo.calibration, demo.checkpoint.config.vision.image_size)
    assert len(seen) == len(demo.calibration.pictures) * 3 // 4
    assert not {p.name for p in seen} & {p.name for p in judges}
    one = replace(demo.calibration, pictures=demo.calibration.pictures[:1])
    assert calibrated.split(one, 1024) == (one.pictures, one.pictures)
    seen, judges = calibrated.split(demo.calibration, 2048)
    assert (len(seen), len(judges)) == (4, 1)


def test_the_command(demo_checkpoint, tmp_path):
    """A bundle on the user's own pictures: gates, manifest, what could not be read."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (300, 200), colour).save(pictures / f"{i}.png")
    (pictures / "broken.png").write_bytes(b"no picture")
    command = ["export", str(demo_checkpoint), str(tmp_path / "out"), "--llm-bits", "4"]
    command += ["--method", "gptq", "--calibration", str(pictures)]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    assert "calibration: 1 skipped" in done.stderr
    assert "broken.png" in done.stderr
    assert "GPTQ" in done.stderr
    bundle = Bundle.open(tmp_path / "out")
    bundle.check_files()
    assert recorded_options(bundle).method == "gptq"
    recorded = bundle.manifest["llm"]["calibration"]
    assert bundle.manifest["options"]["method"] == "gptq"
    losses = recorded["kl_nats"]
    assert recorded["method"] == min(losses, key=losses.get)
    assert recorded["pictures"] == 3
    assert len(recorded["judged_on"]) == 3
    assert "broken.png" in recorded["skipped"][0]
    vision = bundle.config.vision
    assert recorded["sha256"] == load_calibration(pictures, vision).digest
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
        ({"calibration": "pictures"}, "nothing looks at it: add --llm-bpw, a --method, or"),
        ({"method": "gptq", "llm_bits": 16}, "--method gptq is given and no layer is quantized"),
        (
            {"method": "awq", "llm_mode": "mxfp4", "layout": "mlx"},
            "--method awq can't quantize to mxfp4 in groups of 32: it is for affine bits",
        ),
        ({"method": "awq", "calibration": "{empty}"}, "holds no picture that can be used"),
        ({"method": "gptq", "calibration": "{gone}"}, "does not exist"),
    ],
)
def test_what_is_refused_before_any_work(demo_checkpoint, tmp_path, options, words):
    (tmp_path / "empty").mkdir()
    named = {"{empty}": str(tmp_path / "empty"), "{gone}": str(tmp_path / "gone")}
    options = {key: named.get(value, value) for key, value in options.items()}
    with pytest.raises(OptionError, match=words):
        export(demo_checkpoint, tmp_path / "out", ExportOptions(**options))
    assert [p.name for p in tmp_path.iterdir()] == ["empty"]
