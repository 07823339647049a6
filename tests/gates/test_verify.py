"""The gates: they pass what is right, and catch what is only slightly wrong."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from math import comb
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edits import edit_json, edit_weights, sign

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import BundleError, OptionError
from fastvlm_mlx.vision.package import model_path, read_spec
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer, extended
from model_export.encoder import coreml, fastvithd
from model_export.encoder.references import reference_features
from model_export.gates import equality, verify
from model_export.gates.answers import COUNTED_PLACES, USABLE_SHARE, answer_gates
from model_export.gates.encoder import encoder_gates, snr_db
from model_export.gates.gate import Gate
from model_export.language import llm, qwen2, recipes
from model_export.language.dialogue import Dialogue
from model_export.language.weights import SourceWeights
from model_export.options import ExportOptions
from model_export.samples import images


@pytest.fixture(scope="module")
def references(demo_checkpoint):
    checkpoint = Checkpoint(demo_checkpoint)
    seen = images.gate_samples(checkpoint.config.vision)[:2]
    return reference_features(checkpoint.encoder_state(), checkpoint, seen)


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
    gates, _ = encoder_gates(package, folded(checkpoint), references, ExportOptions())
    assert "encoder conversion SNR" in [gate.name for gate in gates if not gate.passed]


def test_the_untouched_package_passes(demo_checkpoint, demo_bundle, references):
    checkpoint = Checkpoint(demo_checkpoint)
    package = demo_bundle / "fastvithd.mlpackage"
    gates, features = encoder_gates(package, folded(checkpoint), references, ExportOptions())
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
    assert snr_db(reference, reference + np.float32(0.05)) == pytest.approx(
        20 * np.log10(np.sqrt(12.5) / 0.05), rel=1e-4
    )
    assert snr_db(reference, reference) == float("inf")


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
    side = qwen2.Side(SourceWeights(checkpoint), features)
    dialogue = Dialogue.build(tokenizer, questions, image_id, n)
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
        alone = Dialogue.build(tokenizer, [question], image_id, n)
        embedded = reference.model.embed_tokens(alone.ids).detach().clone()
        embedded[alone.image] = qwen2.project(side)
        with torch.inference_mode():
            logits = reference(inputs_embeds=embedded[None]).logits[0]
        expected.append(logits[alone.scored].log_softmax(-1))
    torch.testing.assert_close(outcome.log_probabilities, torch.cat(expected), atol=2e-4, rtol=1e-4)


def transformers_answer(tensors, text, features, dialogue):
    """What transformers' whole model says at the scored places of one question: [P, V].

    Args:
        tensors: float32, by the model's names.
    """
    from transformers import Qwen2ForCausalLM

    model = Qwen2ForCausalLM(qwen2._settings(text)).eval()
    prefix = "language_model."
    state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    first, second = (
        [tensors[f"multi_modal_projector.linear_{i}.{part}"] for part in ("weight", "bias")]
        for i in (0, 2)
    )
    seen = F.linear(F.gelu(F.linear(torch.from_numpy(features)[0], *first)), *second)
    embedded = model.model.embed_tokens(dialogue.ids).detach().clone()
    embedded[dialogue.image] = seen
    with torch.inference_mode():
        return model(inputs_embeds=embedded[None]).logits[0, dialogue.scored].log_softmax(-1)


def unpacked(path):
    """A bundle's tensors by the model's names, float32, by MLX's own kernels."""
    arrays = mx.load(str(path / "model.safetensors"))
    found = {}
    for name, array in arrays.items():
        stem = name.removesuffix("weight")
        if stem + "scales" in arrays and name.endswith("weight"):
            parts = (arrays[stem + part].astype(mx.float32) for part in ("scales", "biases"))
            array = mx.dequantize(array, *parts, group_size=64, bits=4)
        if not name.endswith((".scales", ".biases")):
            found[name] = torch.from_numpy(np.array(array.astype(mx.float32)))
    return found


@pytest.fixture
def answers(demo_checkpoint, references):
    """The answers' gates of a bundle by name, with the source's own features on both sides."""

    def gates(path, seen=references, is_plain=False, **limits):
        checkpoint, bundle = Checkpoint(demo_checkpoint), Bundle.open(path)
        own = export_tokenizer(checkpoint)
        checkpoint = extended(checkpoint, own.tokenizer, bundle.config.text.vocab_size)
        features = [reference.features for reference in seen]
        options = ExportOptions.of(llm_bits=4, **limits)
        found = answer_gates(
            checkpoint, bundle, own.tokenizer, seen, features, options, is_plain=is_plain
        )
        return {gate.name: gate for gate in found}

    return gates


def test_plain_rounding_that_was_proven_has_the_limits_of_that_which_is_computed(
    demo_bundle, references, answers
):
    computed, proven = (answers(demo_bundle, references[:2], is_plain=p) for p in (False, True))
    assert computed == proven
    assert 0 < computed["KL divergence"].value < computed["KL divergence"].limit < 1e-4


def test_the_divergence_is_transformers_own(demo_checkpoint, demo_bundle, references, answers):
    """The source on one side and the bundle on the other, each by transformers' whole model."""
    checkpoint, bundle = Checkpoint(demo_checkpoint), Bundle.open(demo_bundle)
    sample = replace(references[0].sample, questions=references[0].sample.questions[:1])
    seen = [replace(references[0], sample=sample)]
    tokenizer = bundle.tokenizer()
    dialogue = Dialogue.build(tokenizer, sample.questions, tokenizer.token_to_id("<image>"), 16)
    rows = bundle.config.text.vocab_size
    source = {spec.name: checkpoint.tensor(spec.source) for spec in checkpoint.llm_specs}
    embedding = source["language_model.model.embed_tokens.weight"]
    assert len(embedding) == rows
    p, q = (
        transformers_answer(tensors, bundle.config.text, seen[0].features, dialogue)
        for tensors in (source, unpacked(demo_bundle))
    )
    expected = float((p.exp() * (p - q)).sum(1).mean())
    assert expected > 1e-8, "four bits cost something"
    assert answers(demo_bundle, seen)["KL divergence"].value == pytest.approx(expected, rel=0.05)


def test_the_agreement_is_transformers_own(demo_checkpoint, bundle_copy, references, answers):
    """Of a bundle that often says something else, at the places where the source is sure."""

    def disturb(arrays):
        for name in arrays:
            if name.startswith(LAYERS) and name.endswith((".scales", ".biases")):
                arrays[name] = arrays[name] * 3

    edit_weights(bundle_copy, disturb)
    checkpoint, bundle = Checkpoint(demo_checkpoint), Bundle.open(bundle_copy)
    tokenizer, text = bundle.tokenizer(), bundle.config.text
    source = {spec.name: checkpoint.tensor(spec.source) for spec in checkpoint.llm_specs}
    written = unpacked(bundle_copy)
    agreed = []
    for reference in references:
        for question in reference.sample.questions:
            dialogue = qwen2.Dialogue.build(
                tokenizer, [question], tokenizer.token_to_id("<image>"), 16
            )
            p, q = (
                transformers_answer(tensors, text, reference.features, dialogue)
                for tensors in (source, written)
            )
            first, second = p.topk(2, 1).values.T
            agreed += (p.argmax(1) == q.argmax(1))[first - second >= np.log(2)].tolist()
    assert 0.1 < np.mean(agreed) < 0.9
    assert answers(bundle_copy)["greedy agreement"].value == pytest.approx(
        np.mean(agreed), abs=1.5 / len(agreed)
    )


LAYERS = "language_model.model.layers."


def reverse_rows(arrays):
    for part in ("weight", "scales", "biases"):
        arrays[f"{LAYERS}0.mlp.down_proj.{part}"] = arrays[f"{LAYERS}0.mlp.down_proj.{part}"][::-1]


def zero_attention_biases(arrays):
    for name in [n for n in arrays if n.endswith("_proj.bias")]:
        arrays[name] = mx.zeros_like(arrays[name])


def zero_projector_biases(arrays):
    for name in [n for n in arrays if n.startswith("multi_modal") and n.endswith("bias")]:
        arrays[name] = mx.zeros_like(arrays[name])


def set_a_norm_to_one(arrays):
    name = f"{LAYERS}1.input_layernorm.weight"
    arrays[name] = mx.ones_like(arrays[name])


def zero_channels_of_the_projector(arrays):
    weight = np.array(arrays["multi_modal_projector.linear_0.weight"])
    weight[:, :64] = 0
    arrays["multi_modal_projector.linear_0.weight"] = mx.array(weight)


def change_one_bit(arrays):
    words = np.array(arrays[f"{LAYERS}3.mlp.up_proj.weight"])
    words[-1, -1] ^= 1
    arrays[f"{LAYERS}3.mlp.up_proj.weight"] = mx.array(words)


def nudge_a_scale(arrays):
    scales = np.array(arrays[f"{LAYERS}2.self_attn.v_proj.scales"])
    scales[0, 0] = np.nextafter(scales[0, 0], np.float16(1))
    arrays[f"{LAYERS}2.self_attn.v_proj.scales"] = mx.array(scales)


DAMAGES = {
    reverse_rows: (3, "layers.0.mlp.down_proj.weight"),
    zero_attention_biases: (12, "layers.0.self_attn.q_proj.bias"),
    zero_projector_biases: (2, "multi_modal_projector.linear_0.bias"),
    set_a_norm_to_one: (1, "layers.1.input_layernorm.weight"),
    zero_channels_of_the_projector: (1, "multi_modal_projector.linear_0.weight"),
    change_one_bit: (1, "layers.3.mlp.up_proj.weight"),
    nudge_a_scale: (1, "layers.2.self_attn.v_proj.scales"),
}


def tensors_of(path, checkpoint_path):
    bundle, checkpoint = Bundle.open(path), Checkpoint(checkpoint_path)
    return equality.tensor_gate(
        checkpoint, bundle, equality.Made.recorded(bundle.manifest, checkpoint)
    )


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_tensor_that_is_not_the_source_s_is_named(demo_checkpoint, bundle_copy, damage):
    assert tensors_of(bundle_copy, demo_checkpoint).value == 0
    edit_weights(bundle_copy, damage)
    gate, (count, name) = tensors_of(bundle_copy, demo_checkpoint), DAMAGES[damage]
    assert (gate.value, gate.passed) == (count, False)
    assert name in gate.sentence()


def test_an_encoder_s_tensor_too(demo_checkpoint, mlx_bundle, tmp_path):
    copy = Path(shutil.copytree(mlx_bundle, tmp_path / "bundle"))
    assert tensors_of(copy, demo_checkpoint).passed
    name = "vision_tower.vision_model.network.1.proj.0.lkb_reparam.weight"

    def swap(arrays):
        arrays[name] = arrays[name][:, ::-1]

    edit_weights(copy, swap)
    gate = tensors_of(copy, demo_checkpoint)
    assert (gate.value, gate.detail) == (1, name)


FORMS = [
    {"llm_bits": 16, "dtype": "bfloat16"},
    {"llm_bits": 2, "group_size": 32, "projector_bits": 2},
    {"llm_bits": 3, "group_size": 128, "dtype": "float32"},
    {"llm_bits": 5, "embed_bits": 8, "dtype": "bfloat16"},
    {"llm_bits": 6, "projector_bits": 3},
    {"llm_mode": "mxfp4", "projector_bits": 8},
    {"llm_mode": "mxfp8"},
    {"llm_mode": "nvfp4", "embed_bits": 6},
]


@pytest.mark.parametrize("asked", FORMS, ids=str)
def test_every_form_is_the_source_s_and_mlx_s(demo_checkpoint, mlx_bundle, tmp_path, asked):
    """What the export writes; and of one group a little less than the largest weight."""
    options = ExportOptions.of(layout="mlx", **asked)
    checkpoint = Checkpoint(demo_checkpoint)
    chosen = recipes.scheme(
        checkpoint.llm_specs, checkpoint.config, options.llm, options.destination.layout
    )
    shutil.copyfile(mlx_bundle / "config.json", tmp_path / "config.json")
    said = recipes.quantization(chosen, "mlx")
    edit_json(tmp_path, "config.json", quantization=said and said.to_dict())
    llm.write(
        checkpoint,
        chosen,
        options.destination.layout,
        options.llm.dtype,
        tmp_path,
        lambda count: None,
    )
    made = equality.Made(chosen, getattr(torch, options.llm.dtype))
    bundle = Bundle.open(tmp_path)
    gate = equality.tensor_gate(checkpoint, bundle, made)
    assert gate.passed, gate.sentence()
    assert equality.Made.shown(bundle) == made

    def nudge(arrays):
        name = f"{LAYERS}0.mlp.gate_proj.weight"
        words = np.array(arrays[name].view(mx.uint8))
        words[5, 7] ^= 8
        arrays[name] = mx.array(words).view(arrays[name].dtype)

    edit_weights(tmp_path, nudge)
    assert equality.tensor_gate(checkpoint, Bundle.open(tmp_path), made).value == 1


def test_what_a_method_made_is_what_it_recorded(demo_checkpoint, bundle_copy, tmp_path):
    """Its own tensors by their hashes; the others are the source's as ever."""
    names = [f"{LAYERS}0.self_attn.q_proj.{part}" for part in ("weight", "scales", "biases")]

    def move(arrays):
        arrays[names[0]] = arrays[names[0]][::-1]

    edit_weights(bundle_copy, move)
    file = tmp_path / "waiting.safetensors"
    arrays = mx.load(str(bundle_copy / "model.safetensors"))
    mx.save_safetensors(str(file), {name: arrays[name] for name in names})
    hashes = equality.hash_tensors({names[0]: file})
    assert hashes.keys() == set(names)
    edit_llm = json.loads((bundle_copy / "manifest.json").read_text())["llm"]
    edit_llm["calibration"] = {"method": "gptq", "images": 1}
    edit_json(bundle_copy, "manifest.json", llm=edit_llm | {"tensors": hashes})
    assert tensors_of(bundle_copy, demo_checkpoint).passed
    edit_weights(bundle_copy, nudge_a_scale)
    assert "2.self_attn.v_proj.scales" in tensors_of(bundle_copy, demo_checkpoint).detail
    edit_weights(bundle_copy, move)
    assert names[0] in tensors_of(bundle_copy, demo_checkpoint).detail


SETTINGS = [
    ("config.json", {"rope_theta": 1e4}, "rope_theta 10000.0 for 1000000.0"),
    ("config.json", {"rms_norm_eps": 1e-2}, "rms_norm_eps 0.01 for 1e-06"),
    ("config.json", {"image_aspect_ratio": "square"}, "aspect_ratio square for pad"),
    ("preprocessor_config.json", {"image_mean": [0.5] * 3}, r"image_mean \(0.5, 0.5, 0.5\) for"),
    ("preprocessor_config.json", {"image_std": [0.3] * 3}, "image_std"),
]


@pytest.mark.parametrize(("name", "changes", "words"), SETTINGS)
def test_a_setting_that_is_not_the_source_s_is_named(
    demo_checkpoint, bundle_copy, name, changes, words
):
    checkpoint = Checkpoint(demo_checkpoint)
    assert equality.settings_gate(checkpoint, Bundle.open(bundle_copy)).passed
    edit_json(bundle_copy, name, **changes)
    gate = equality.settings_gate(checkpoint, Bundle.open(bundle_copy))
    assert (gate.value, gate.passed) == (1, False)
    assert re.search(words, gate.sentence())


@pytest.mark.parametrize("change", [{"rope_theta": 1e4}, {"rms_norm_eps": 1e-2}], ids=str)
def test_the_bundle_answers_under_its_own_settings(bundle_copy, answers, change):
    assert all(gate.passed for gate in answers(bundle_copy).values())
    edit_json(bundle_copy, "config.json", **change)
    assert not answers(bundle_copy)["KL divergence"].passed


def test_the_bundle_reads_ids_of_its_own_tokenizer(bundle_copy, answers):
    data = json.loads((bundle_copy / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["."], vocabulary["?"] = vocabulary["?"], vocabulary["."]
    (bundle_copy / "tokenizer.json").write_text(json.dumps(data))
    sign(bundle_copy)
    with pytest.raises(BundleError, match="gives other ids than the checkpoint's"):
        answers(bundle_copy)


class TestLimits:
    def test_a_ceiling_is_what_plain_rounding_costs(self, demo_bundle, answers):
        """By plain rounding: the bundle's own divergence, and some room."""
        gate = answers(demo_bundle)["KL divergence"]
        assert gate.limit == pytest.approx(2 * gate.value + 1e-6, rel=1e-2)
        assert gate.limit < 1e-4

    def test_a_damage_far_below_any_round_number(self, bundle_copy, answers):
        def widen(arrays):
            for name in arrays:
                if name.startswith(LAYERS) and name.endswith((".scales", ".biases")):
                    arrays[name] = arrays[name] * 1.3

        edit_weights(bundle_copy, widen)
        gates = answers(bundle_copy)
        assert not gates["KL divergence"].passed
        assert gates["KL divergence"].value < 0.5
        assert answers(bundle_copy, max_kl_nats=0.5)["KL divergence"].passed

    def test_one_s_own_stand_in_place_of_them(self, demo_bundle, answers):
        gates = answers(demo_bundle, max_kl_nats=1e-12, min_agreement=1.0)
        assert gates["KL divergence"].limit == 1e-12
        assert not gates["KL divergence"].passed
        assert gates["greedy agreement"].limit == 1.0

    def test_a_choice_that_babbles_fails_though_every_tensor_is_right(
        self, edit_checkpoint, mlx_bundle, tmp_path
    ):
        """Outliers in every row, which two bits spend all their codes on."""

        def spread(tensors):
            for name, tensor in tensors.items():
                if "layers" in name and tensor.ndim == 2:
                    tensor[:, ::64] *= 40

        checkpoint = Checkpoint(edit_checkpoint(tensors=spread))
        options = ExportOptions.of(layout="mlx", llm_bits=2)
        chosen = recipes.scheme(
            checkpoint.llm_specs, checkpoint.config, options.llm, options.destination.layout
        )
        out = tmp_path / "bundle"
        out.mkdir()
        for name in ("config.json", "tokenizer.json"):
            shutil.copyfile(mlx_bundle / name, out / name)
        edit_json(out, "config.json", quantization={"bits": 2, "group_size": 64})
        llm.write(
            checkpoint,
            chosen,
            options.destination.layout,
            options.llm.dtype,
            out,
            lambda count: None,
        )
        bundle, made = Bundle.open(out), equality.Made(chosen, torch.float16)
        assert equality.tensor_gate(checkpoint, bundle, made).passed
        seen = reference_features(
            checkpoint.encoder_state(),
            checkpoint,
            images.gate_samples(checkpoint.config.vision)[:1],
        )
        gate, *_ = answer_gates(
            checkpoint, bundle, bundle.tokenizer(), seen, [seen[0].features], options
        )
        assert gate.value > gate.limit == pytest.approx(0.693, abs=1e-3)

    def test_a_share_of_few_places_is_not_judged(self, demo_bundle, references, answers):
        sample = replace(references[0].sample, questions=(("What is it?", "A star."),))
        gate = answers(demo_bundle, [replace(references[0], sample=sample)])["greedy agreement"]
        assert re.search(r"at \d+ places, and a share is judged from 20 on", gate.left_out)
        assert gate.passed
        assert answers(demo_bundle)["greedy agreement"].left_out == ""

    def test_so_many_places_tell_a_good_bundle_from_a_bad_one(self):
        """By the binomial distribution, and no fewer would."""

        def misjudged(places):
            floor = USABLE_SHARE * places
            good, bad = (
                [comb(places, k) * p**k * (1 - p) ** (places - k) for k in range(places + 1)]
                for p in (0.95, 0.5)
            )
            return max(
                sum(p for k, p in enumerate(good) if k < floor),
                sum(p for k, p in enumerate(bad) if k >= floor),
            )

        assert misjudged(COUNTED_PLACES) < 0.01


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


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "tokenizer.json",
            lambda data: data.update(
                decoder={
                    "type": "Sequence",
                    "decoders": [
                        data["decoder"],
                        {"type": "Replace", "pattern": {"String": "Blue"}, "content": "Red"},
                    ],
                }
            ),
            "tokenizer.json decoder",
        ),
        (
            "tokenizer.json",
            lambda data: data["added_tokens"][0].update(special=False),
            "tokenizer.json added_tokens",
        ),
        ("generation_config.json", lambda data: data.update(eos_token_id=[17]), "eos_token_id 17"),
    ],
)
def test_an_answer_is_read_and_ended_as_the_source_s(
    demo_checkpoint, bundle_copy, name, change, words
):
    checkpoint = Checkpoint(demo_checkpoint)
    assert equality.settings_gate(checkpoint, Bundle.open(bundle_copy)).passed
    edit_json(bundle_copy, name, change)
    gate = equality.settings_gate(checkpoint, Bundle.open(bundle_copy))
    assert not gate.passed
    assert words in gate.sentence()


def test_without_a_manifest_the_files_say_what_it_is(bundle_copy, mlx_bundle, tmp_path):
    """An `mlx` bundle's encoder has the type of the rest, and is judged by its limits."""
    of_app = replace(Bundle.open(bundle_copy), manifest=None)
    found = verify.recorded_options(of_app)
    assert (found.destination.layout, found.llm.dtype) == ("app", "float16")
    assert found.encoder_format == "fp16"
    copy = Path(shutil.copytree(mlx_bundle, tmp_path / "mlx"))
    edit_json(copy, "config.json", torch_dtype="float32")
    found = verify.recorded_options(replace(Bundle.open(copy), manifest=None))
    assert (found.destination.layout, found.llm.dtype) == ("mlx", "float32")
    assert found.encoder_format == "fp32"
    assert found.snr_floor_db == 80


@pytest.mark.parametrize(("said", "found"), [(32, 32), (128, 128), (None, 64)])
def test_the_group_size_is_the_recorded_one(bundle_copy, said, found):
    edit_json(bundle_copy, "manifest.json", lambda data: data["options"].update(group_size=said))
    assert verify.recorded_options(Bundle.open(bundle_copy)).llm.resolved_group_size == found


def test_a_manifest_decides_neither_its_limits_nor_what_is_exempt(demo_checkpoint, bundle_copy):
    edit_weights(bundle_copy, nudge_a_scale)
    name = "language_model.model.layers.2.self_attn.v_proj.scales"
    held = equality._held(Bundle.open(bundle_copy))

    def exempt(manifest):
        manifest["llm"]["tensors"] = {name: equality._hash(held[name])}
        manifest["options"] |= {"max_kl_nats": 1e9, "min_agreement": 0, "min_snr_db": 0}

    edit_json(bundle_copy, "manifest.json", exempt)
    assert not tensors_of(bundle_copy, demo_checkpoint).passed
    options = verify._own_limits(verify.recorded_options(Bundle.open(bundle_copy)))
    assert (options.limits.max_kl_nats, options.limits.min_agreement) == (None, None)
    assert options.snr_floor_db == 35
