"""Stage by stage against transformers and timm: pixels, ids, encoder, projector, logits, answer.

`golden/` was computed by oracles/make_golden.py, which knows nothing of this repository.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastvlm_mlx
from fastvlm_mlx.bundle.config import FastVLMConfig, TextConfig
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.image.preprocess import ImageProcessor, load_image
from fastvlm_mlx.language.model import Model
from fastvlm_mlx.language.prompt.template import encode_prompt
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.encoder.fastvithd import fold
from model_export.encoder.reference import FastViTHD
from model_export.options import ExportOptions
from model_export.pipeline import export

GOLDEN = Path(__file__).parents[1] / "golden"
APPLE = GOLDEN / "apple"
IMAGES = ("wide.jpg", "one_wide.png", "rotated.jpg")
ANSWERS = json.loads((GOLDEN / "answers.json").read_text())
IDS = {case["prompt"]: case["ids"] for case in json.loads((GOLDEN / "ids.json").read_text())}
EXPECTED = np.load(GOLDEN / "activations.npz")
CONFIG = FastVLMConfig.from_dict(json.loads((APPLE / "config.json").read_text()))
TOWER = "model.vision_tower.vision_tower.model."


def snr_db(found: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the reference over RMS of the error."""
    error = found.astype(np.float64) - expected
    return float(10 * np.log10((expected.astype(np.float64) ** 2).mean() / (error**2).mean()))


def pixels(image: str) -> np.ndarray:
    processor = ImageProcessor(CONFIG.vision.image_size, CONFIG.image_aspect_ratio)
    return processor(load_image(GOLDEN / "images" / image))


@pytest.fixture(scope="module")
def encoder_state() -> dict[str, torch.Tensor]:
    return Checkpoint(APPLE).encoder_state()


@pytest.fixture(scope="module")
def exact(exact_bundle: Path) -> FastVLM:
    return fastvlm_mlx.load(exact_bundle)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> FastVLM:
    """The same in half precision, the encoder and the language model."""
    path = tmp_path_factory.mktemp("parity") / "half"
    export(APPLE, path, ExportOptions.of(llm_bits=16, dtype="float16", encoder_precision="fp16"))
    return fastvlm_mlx.load(path)


def test_goldens_are_what_the_oracle_wrote() -> None:
    provenance = json.loads((GOLDEN / "PROVENANCE.json").read_text())
    for name, digest in provenance["sha256"].items():
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == digest, name


def test_both_layouts_hold_the_same_weights() -> None:
    def contents(layout: str) -> Counter[bytes]:
        tensors = load_file(GOLDEN / layout / "model.safetensors")
        # timm has no classification head.
        tensors.pop(f"{TOWER}head.proj", None)
        return Counter(t.float().numpy().tobytes() for t in tensors.values())

    assert contents("apple") == contents("transformers")


@pytest.mark.parametrize("image", IMAGES)
def test_unfolded_encoder_equals_timm(image: str, encoder_state: dict[str, torch.Tensor]) -> None:
    encoder = FastViTHD(CONFIG.vision).eval()
    encoder.load_state_dict(encoder_state)
    with torch.no_grad():
        features = encoder(torch.from_numpy(pixels(image))).numpy()
    expected = EXPECTED[f"{image}.features"]
    assert np.abs(features - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("image", IMAGES)
def test_folded_encoder_equals_timm(image: str, encoder_state: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        folded = fold(encoder_state, CONFIG.vision)
        features = folded(torch.from_numpy(pixels(image))).numpy()
    expected = EXPECTED[f"{image}.features"]
    assert np.abs(features - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("image", IMAGES)
def test_exported_encoder_equals_timm(image: str, exact: FastVLM, half: FastVLM) -> None:
    expected = EXPECTED[f"{image}.features"]
    for model, floor in ((exact, 100), (half, 45)):
        encoder = MLProgramEncoder(model.bundle.package)
        assert snr_db(encoder(pixels(image)), expected) >= floor
    rounded = encoder.evaluate(pixels(image), round_fp16=True)
    assert snr_db(rounded, expected) >= 45


@pytest.mark.parametrize("image", IMAGES)
def test_projector_equals_transformers(image: str, exact: FastVLM) -> None:
    expected = EXPECTED[f"{image}.projected"][0]
    projected = exact.model.project(mx.array(EXPECTED[f"{image}.features"]))
    assert np.abs(np.array(projected) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("index", range(len(ANSWERS)))
def test_logits_equal_transformers(index: int, exact: FastVLM) -> None:
    case = ANSWERS[index]
    image = exact.config.image_token_index
    count = exact.encoder.num_tokens
    ids = [x for i in IDS[case["prompt"]] for x in ([image] * count if i == -200 else [i])]
    assert encode_prompt(exact.tokenizer, case["prompt"], num_image_tokens=count) == ids
    projected = mx.array(EXPECTED[f"{case['image']}.projected"][0])
    embedded = exact.model.embed_inputs(mx.array(ids), projected)
    logits = exact.model.language_model(mx.array([ids]), input_embeddings=embedded[None])
    expected = EXPECTED[f"{index}.logits"]
    assert np.abs(np.array(logits[0, -4:]) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("index", range(len(ANSWERS)))
@pytest.mark.parametrize("precision", ["exact", "half"])
def test_answers_equal_transformers(
    index: int, precision: str, request: pytest.FixtureRequest
) -> None:
    model: FastVLM = request.getfixturevalue(precision)
    case = ANSWERS[index]
    features = model.encode(GOLDEN / "images" / case["image"])
    result = model.generate(features, case["prompt"], max_tokens=len(case["tokens"]))
    assert list(result.tokens) == case["tokens"]
    # What is cut off within a character is shown by transformers, and not by us.
    assert result.text.rstrip("\ufffd") == case["text"].rstrip("\ufffd")


def test_one_answer_in_one_call(exact: FastVLM) -> None:
    case = ANSWERS[0]
    data = (GOLDEN / "images" / case["image"]).read_bytes()
    assert list(exact.generate(data, case["prompt"], max_tokens=4).tokens) == case["tokens"][:4]


@pytest.mark.parametrize(
    ("tied", "heads", "kv_heads"), [(True, 7, 1), (False, 4, 4)], ids=["tied", "untied"]
)
def test_language_model_equals_transformers_qwen2(tied: bool, heads: int, kv_heads: int) -> None:
    """The shapes that the goldens leave out: one embedding for both ends, other head counts."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    text = TextConfig(
        hidden_size=heads * 8,
        num_hidden_layers=3,
        intermediate_size=80,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=300,
        rope_theta=10_000.0,
        tie_word_embeddings=tied,
    )
    reference = Qwen2ForCausalLM(Qwen2Config(**asdict(text))).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, 0.1 if parameter.ndim == 1 else 0.3, 0.3)
    model = Model(replace(CONFIG, text=text)).language_model
    state = reference.state_dict()
    if tied:
        del state["lm_head.weight"]
    model.load_weights([(name, mx.array(tensor.numpy())) for name, tensor in state.items()])
    ids = torch.randint(300, (1, 70))
    with torch.no_grad():
        expected = reference(ids).logits.numpy()
    logits = np.array(model(mx.array(ids.numpy())))
    assert snr_db(logits, expected) >= 100
