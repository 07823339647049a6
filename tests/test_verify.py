"""The gates: they pass what is right, and catch what is only slightly wrong."""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.vision.package import model_path, read_spec
from model_export import coreml, fastvithd, pictures, qwen2, verify
from model_export.checkpoint import Checkpoint
from model_export.options import ExportOptions
from model_export.verify import Gate


@pytest.fixture(scope="module")
def references(demo_checkpoint):
    checkpoint = Checkpoint(demo_checkpoint)
    seen = pictures.gate_pictures(checkpoint.config.vision)[:2]
    return pictures.reference_features(checkpoint.encoder_state(), checkpoint, seen)


def folded(checkpoint):
    return partial(fastvithd.fold, checkpoint.encoder_state(), checkpoint.config.vision)


def swap_channels(state):
    weight = state["network.2.0.token_mixer.reparam_conv.weight"]
    weight[[0, 1]] = weight[[1, 0]].clone()


def change_one_weight(state):
    state["network.4.0.convffn.fc1.weight"].flatten()[7] += 2


def replace_an_op(package):
    """Every exact GELU becomes its tanh approximation, off by half a thousandth at its worst."""
    spec = read_spec(package)
    (block,) = spec.mlProgram.functions["main"].block_specializations.values()
    for op in block.operations:
        value = op.attributes["val"].immediateValue.tensor.strings if op.type == "const" else None
        if value is not None and list(value.values) == ["EXACT"]:
            value.values[:] = ["TANH_APPROXIMATION"]
    model_path(package).write_bytes(spec.SerializeToString())


@pytest.mark.parametrize("damage", ["one weight", "two channels", "an op"])
def test_a_damaged_package_fails_the_encoder_gate(
    demo_checkpoint, tmp_path, references, damage, monkeypatch
):
    checkpoint = Checkpoint(demo_checkpoint)
    state = checkpoint.encoder_state()
    if damage == "one weight":
        change_one_weight(state)
    if damage == "two channels":
        swap_channels(state)
    module = fastvithd.fold(state, checkpoint.config.vision)
    package = tmp_path / "fastvithd.mlpackage"
    metadata = coreml.EncoderMetadata(source="test", license="MIT")
    coreml.export_encoder(module, checkpoint.config.vision, package, coreml.Form("fp16", metadata))
    if damage == "an op":
        replace_an_op(package)
    gates, _ = verify.encoder_gates(package, folded(checkpoint), references, ExportOptions())
    assert "encoder conversion SNR" in [gate.name for gate in gates if not gate.passed]


def test_the_untouched_package_passes(demo_checkpoint, demo_bundle, references):
    checkpoint = Checkpoint(demo_checkpoint)
    package = demo_bundle / "fastvithd.mlpackage"
    gates, features = verify.encoder_gates(package, folded(checkpoint), references, ExportOptions())
    assert all(gate.passed for gate in gates)
    assert gates[0].value < 120, "rounded to fp16, it can't be exact"
    assert features[0].shape == references[0].features.shape


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "passed"),
    [
        (36.0, 35.0, True, True),
        (34.9, 35.0, True, False),
        (float("nan"), 35.0, True, False),
        (float("nan"), 0.5, False, False),
        (float("inf"), 65504, False, False),
        (float("inf"), 80.0, True, True),
    ],
)
def test_a_gate_passes_on_its_own_side_only(value, limit, at_least, passed):
    gate = Gate("x", value, "dB", limit, at_least)
    assert gate.passed is passed
    json.dumps(gate.to_dict(), allow_nan=False)


def test_snr_is_rms_over_rms():
    reference = np.array([3.0, -4.0], np.float32)
    assert verify.snr_db(reference, reference + np.float32(0.05)) == pytest.approx(
        20 * np.log10(np.sqrt(12.5) / 0.05), rel=1e-4
    )
    assert verify.snr_db(reference, reference) == float("inf")


def test_branches_are_as_though_each_question_were_asked_alone(demo_checkpoint, demo_bundle):
    """One masked pass over all questions gives what transformers gives for each of them."""
    from tokenizers import Tokenizer
    from transformers import Qwen2ForCausalLM

    checkpoint = Checkpoint(demo_checkpoint)
    text = replace(checkpoint.config.text, tie_word_embeddings=True)
    tokenizer = Tokenizer.from_file(str(demo_bundle / "tokenizer.json"))
    image_id = tokenizer.token_to_id("<image>")
    n = checkpoint.config.vision.num_tokens
    questions = [("How many shapes are there?", "Two."), ("What colour is the star?", "Red.")]
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, n, checkpoint.config.vision.hidden_size, generator=generator)
    side = qwen2.Side(qwen2.SourceWeights(checkpoint), features)
    dialogue = qwen2.Dialogue.build(tokenizer, questions, image_id, n)
    (outcome,) = qwen2.run(text, dialogue, [side])

    reference = Qwen2ForCausalLM(qwen2._settings(text)).eval()
    state = {
        spec.name.removeprefix("language_model."): checkpoint.tensor(spec.source)
        for spec in checkpoint.llm_specs
        if spec.name.startswith("language_model.")
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    reference.load_state_dict(state)
    expected = []
    for question in questions:
        alone = qwen2.Dialogue.build(tokenizer, [question], image_id, n)
        embedded = reference.model.embed_tokens(alone.ids).detach().clone()
        embedded[alone.image] = qwen2.project(side)
        with torch.inference_mode():
            logits = reference(inputs_embeds=embedded[None]).logits[0]
        expected.append(logits[alone.scored].log_softmax(-1))
    torch.testing.assert_close(outcome.log_probabilities, torch.cat(expected), atol=2e-4, rtol=1e-4)


def test_damaged_answers_are_seen(demo_checkpoint, demo_bundle, references, tmp_path):
    """Two rows of a quantized projection swapped: invisible to the layout, seen by the KL gate."""
    import mlx.core as mx
    from tokenizers import Tokenizer

    damaged = tmp_path / "bundle"
    shutil.copytree(demo_bundle, damaged)
    tensors = dict(mx.load(str(damaged / "model.safetensors")))
    for part in ("weight", "scales", "biases"):
        name = f"language_model.model.layers.0.mlp.down_proj.{part}"
        tensors[name] = tensors[name][::-1]
    mx.save_safetensors(str(damaged / "model.safetensors"), tensors, {"format": "mlx"})
    checkpoint, tokenizer = Checkpoint(demo_checkpoint), None
    tokenizer = Tokenizer.from_file(str(damaged / "tokenizer.json"))
    features = [reference.features for reference in references]

    def gates(path):
        options = ExportOptions(llm_bits=4)
        bundle = Bundle.open(path)
        return verify.answer_gates(checkpoint, bundle, tokenizer, references, features, options)

    good, bad = gates(demo_bundle), gates(damaged)
    assert all(gate.passed for gate in good)
    assert not all(gate.passed for gate in bad)
    with pytest.raises(BundleError, match=r"model\.safetensors has"):
        Bundle.open(damaged).check_files()


def test_verify_repeats_what_the_manifest_records(demo_checkpoint, demo_bundle):
    bundle, gates = verify.verify(demo_bundle, demo_checkpoint, {}, lambda stage, done: None)
    recorded = {gate["name"]: gate["value"] for gate in bundle.manifest["gates"]}
    assert set(recorded) <= {gate.name for gate in gates}
    for gate in gates:
        if gate.name in recorded:
            assert gate.value == pytest.approx(recorded[gate.name], rel=1e-3, abs=1e-6)


def test_another_checkpoint_is_told_apart(demo_bundle, edit_checkpoint):
    def change(tensors):
        tensors["model.norm.weight"][0] += 1

    other = edit_checkpoint(tensors=change)
    with pytest.raises(BundleError, match="was not made from"):
        verify.verify(demo_bundle, other, {}, lambda stage, done: None)


def test_limits_without_a_checkpoint_are_refused(demo_bundle):
    with pytest.raises(OptionError, match="add --checkpoint"):
        verify.verify(demo_bundle, None, {"min_snr_db": 1.0}, lambda stage, done: None)


def test_limits_can_be_set(demo_checkpoint, demo_bundle):
    _, gates = verify.verify(
        demo_bundle, demo_checkpoint, {"min_snr_db": 200.0}, lambda stage, done: None
    )
    assert [gate.name for gate in gates if not gate.passed] == ["encoder SNR"]


def test_without_a_checkpoint_overflow_is_still_looked_for(demo_bundle):
    _, gates = verify.verify(demo_bundle, None, {}, lambda stage, done: None)
    assert [gate.name for gate in gates] == ["encoder largest magnitude"]
    assert gates[0].passed
