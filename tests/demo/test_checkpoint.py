"""The demo checkpoint: Apple's layout to the letter, and its answers in PyTorch."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

import model_export.demo
from fastvlm_mlx.bundle.config import FastVLMConfig
from model_export.demo import tokenizer as demo_tokenizer
from model_export.demo.model import PREFIXES, DemoModel, make_config, to_pixels
from model_export.demo.packing import answer_loss, collate
from model_export.demo.rounding import rounded
from model_export.demo.targets import cell_targets, word_targets
from model_export.encoder.reference import FastViTHD
from model_export.language.affine import round_weight
from model_export.samples.scenes import KINDS, generate, held_out, score

CHECKPOINT = Path(model_export.demo.__file__).parent / "checkpoint"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # So small a model waits for its threads more than it computes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return DemoModel.load(CHECKPOINT)


@pytest.fixture(scope="module")
def config():
    return json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))


def features_of(model, pairs):
    size = model.config["vision_config"]["image_size"]
    with torch.no_grad():
        return torch.cat(
            [
                model.encode(to_pixels([scene.draw(size) for scene, _ in pairs[i : i + 25]]))
                for i in range(0, len(pairs), 25)
            ]
        )


def test_the_files_are_those_that_llava_training_leaves():
    names = {path.name for path in CHECKPOINT.iterdir()}
    assert names == {
        "README.md",
        "LICENSE",
        "added_tokens.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 5_000_000


def test_the_configuration_is_a_fastvlm(config):
    read = FastVLMConfig.from_dict(config)
    assert read.vision.image_size == 256
    assert read.vision.num_tokens == 16
    assert read.image_aspect_ratio == "pad"
    assert read.text.tie_word_embeddings
    for width in (read.text.hidden_size, read.text.intermediate_size):
        assert width % 128 == 0
    assert read.text.vocab_size % 64 == 0


def test_every_tensor_has_its_name_and_type(config):
    vision = FastVLMConfig.from_dict(config).vision
    encoder = FastViTHD(vision).state_dict()
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as stored:
        kinds = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in kinds}
    named = {PREFIXES["encoder"] + name: tuple(t.shape) for name, t in encoder.items()}
    assert {n: s for n, s in shapes.items() if n.startswith(PREFIXES["encoder"])} == named
    assert any(name.endswith("num_batches_tracked") for name in named)
    width = config["hidden_size"]
    assert shapes["model.mm_projector.0.weight"] == (width, vision.hidden_size)
    assert shapes["model.mm_projector.2.weight"] == (width, width)
    assert shapes["model.embed_tokens.weight"] == (config["vocab_size"], width)
    assert shapes["model.norm.weight"] == (width,)
    layers = config["num_hidden_layers"]
    assert sum(name.startswith("model.layers.") for name in shapes) == 12 * layers
    assert len(shapes) == len(named) + 4 + 2 + 12 * layers
    for name, kind in kinds.items():
        assert kind == ("I64" if name.endswith("num_batches_tracked") else "BF16")


def test_transformers_reads_the_tokenizer_as_qwen2s(config):
    theirs = AutoTokenizer.from_pretrained(CHECKPOINT)
    ours = demo_tokenizer.load(CHECKPOINT)
    assert type(theirs).__name__.startswith("Qwen2Tokenizer")
    prompt = theirs.apply_chat_template(
        [{"role": "user", "content": "X"}], tokenize=False, add_generation_prompt=True
    )
    before, after = demo_tokenizer.BEFORE_IMAGE, demo_tokenizer.AFTER_IMAGE
    assert prompt == before + after.removeprefix("\n").format("X")
    for text in (before, after.format("What colour is the star?"), "Über 1234 e\u0301\n\n  x 🦊"):
        assert ours.encode(text).ids == theirs(text).input_ids
    vocabulary = json.loads((CHECKPOINT / "vocab.json").read_text(encoding="utf-8"))
    special = json.loads((CHECKPOINT / "added_tokens.json").read_text(encoding="utf-8"))
    assert special == {
        token: len(vocabulary) + i for i, token in enumerate(demo_tokenizer.SPECIAL_TOKENS)
    }
    assert theirs.eos_token == "<|im_end|>"
    assert theirs.eos_token_id == config["eos_token_id"]
    assert "<image>" not in theirs.get_vocab()
    assert config["vocab_size"] - len(vocabulary) - len(special) >= 8


def test_the_tokenizer_is_learnt_again_as_it_was():
    assert demo_tokenizer.train().to_str() == demo_tokenizer.load(CHECKPOINT).to_str()


def test_saving_and_loading_changes_nothing(model, tmp_path):
    model.save(tmp_path)
    for name in ("model.safetensors", "config.json", "tokenizer_config.json", "vocab.json"):
        assert (tmp_path / name).read_bytes() == (CHECKPOINT / name).read_bytes(), name


def test_a_question_in_a_packed_sequence_is_computed_as_if_alone(model):
    scene = generate(3)
    features = features_of(model, [(scene, None)])
    questions = scene.questions(1)

    def total(asked):
        batch = collate(model, [asked], "cpu")
        with torch.no_grad():
            return float(answer_loss(model, batch, features)[0] * batch.weights.sum())

    alone = sum(total([question]) for question in questions)
    assert total(questions) == pytest.approx(alone, rel=1e-3, abs=1e-5)


def test_what_the_encoder_and_the_projector_are_trained_on():
    tokenizer = demo_tokenizer.load(CHECKPOINT)
    scene = generate(7)
    cells = cell_targets(scene)
    for item in scene.shapes:
        assert cells[4 * item.row + item.column][:3] == [1, item.row, item.column]
    first = 4 * scene.number.row + scene.number.column
    assert [cells[first + i][0] for i in (0, 1)] == [2, 3]
    assert [cells[first + i][5] - 1 for i in (0, 1)] == list(divmod(scene.number.value, 10))
    targets = word_targets(DemoModel(make_config(tokenizer), tokenizer), [scene])[0]
    item = scene.shapes[0]
    words = [
        tokenizer.id_to_token(int(i))
        for i in targets[4 * item.row + item.column].nonzero().flatten()
    ]
    assert {f"Ġ{item.shape}", f"Ġ{item.colour}", item.colour.capitalize()} < set(words)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_weights_are_rounded_as_mlx_rounds_them(bits, group):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(bits))
    weight[0] = 0
    stored = mx.quantize(mx.array(weight.numpy()), group, bits)
    theirs = torch.tensor(mx.dequantize(*stored, group, bits).tolist())
    torch.testing.assert_close(round_weight(weight, bits, group), theirs, rtol=0, atol=1e-6)


def test_rounding_is_undone(model):
    before = {name: t.clone() for name, t in model.language.state_dict().items()}
    with rounded(model.language, 4):
        assert not torch.equal(model.language.embed_tokens.weight, before["embed_tokens.weight"])
    for name, tensor in model.language.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize(("bits", "floor"), [(0, 0.98), (8, 0.97), (4, 0.93)])
def test_the_answers_are_right(model, bits, floor):
    pairs = held_out(200)
    features = features_of(model, pairs)
    with rounded(model.language, bits):
        answers = model.answer(features, [question.prompt for _, question in pairs])
    scores = score(pairs, answers)
    assert scores["all"].share >= floor, scores
    for kind in KINDS:
        assert scores[kind].share >= floor - 0.05, (kind, scores)
