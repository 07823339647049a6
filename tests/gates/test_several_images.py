"""Images anywhere in a conversation against the reference's ids and transformers' forward."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, FastVlmConfig, FastVlmForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

import fastvlm_mlx
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.language.prompt.template import encode_messages

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = np.load(GOLDEN / "activations.npz")
WIDE, THIN = "wide.jpg", "one_wide.png"
NEW_TOKENS = 6


def turn(*parts: str) -> dict:
    """A message of the user's, of texts and names of images."""
    content = [
        {"type": "image", "image": part} if part in (WIDE, THIN) else {"type": "text", "text": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ASKED = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
# Messages, and the string that the reference would be given for them.
CASES = {
    "alone": ([turn(WIDE, "Describe it.")], HELPFUL + ASKED.format("<image>\nDescribe it.")),
    "adjacent": (
        [turn(WIDE, THIN, "What differs?")],
        HELPFUL + ASKED.format("<image>\n<image>\nWhat differs?"),
    ),
    "at the end": ([turn("What is this? ", WIDE)], HELPFUL + ASKED.format("What is this? <image>")),
    "in the middle": (
        [turn("How many in ", WIDE, " and in\n", THIN, "\n", "there?")],
        HELPFUL + ASKED.format("How many in <image> and in\n<image>\nthere?"),
    ),
    "adjacent in the middle": (
        [turn("See ", THIN, WIDE, WIDE, ".")],
        HELPFUL + ASKED.format("See <image><image><image>."),
    ),
    "over several turns": (
        [
            {"role": "system", "content": "Be brief."},
            turn(WIDE, "What is it?"),
            said("A roof."),
            {"role": "user", "content": "Where?"},
            said(""),
            turn(THIN, "And this? ", WIDE),
        ],
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        + ASKED.format("<image>\nWhat is it?")
        + "A roof.<|im_end|>\n"
        + ASKED.format("Where?")
        + "<|im_end|>\n"
        + ASKED.format("<image>\nAnd this? <image>"),
    ),
}


@pytest.fixture(scope="module")
def model(exact_bundle: Path) -> FastVLM:
    return fastvlm_mlx.load(exact_bundle)


@pytest.fixture(scope="module")
def reference() -> FastVlmForConditionalGeneration:
    """transformers' model, which is given what its encoder made elsewhere."""
    config = json.loads((GOLDEN / "transformers" / "config.json").read_text())
    unused = CLIPVisionConfig(
        hidden_size=config["vision_config"]["hidden_size"],
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    built = FastVlmForConditionalGeneration(
        FastVlmConfig(**config | {"vision_config": unused.to_dict()})
    )
    state = load_file(GOLDEN / "transformers" / "model.safetensors")
    known = built.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert all("vision_tower" in name for name in (*known.missing_keys, *known.unexpected_keys))
    return built.eval()


def reference_ids(tokenizer, text: str, image: int, count: int) -> list[int]:
    """`tokenizer_image_token` of llava/mm_utils.py, and its −200 as `count` placeholders."""
    pieces = [tokenizer.encode(p, add_special_tokens=False).ids for p in text.split("<image>")]
    ids = pieces[0]
    for piece in pieces[1:]:
        ids = [*ids, *[image] * count, *piece]
    return ids


@pytest.mark.parametrize("name", CASES)
def test_images_in_a_conversation_equal_transformers(
    name: str, model: FastVLM, reference: FastVlmForConditionalGeneration
) -> None:
    messages, text = CASES[name]
    count, image = model.num_tokens, model.config.image_token_index
    assert image == reference.config.image_token_id
    encoded = encode_messages(
        model.tokenizer, messages, image_token_id=image, num_image_tokens=count
    )
    assert encoded.ids == reference_ids(model.tokenizer, text, image, count)
    assert [i for at in encoded.places for i in at] == [
        place for place, token in enumerate(encoded.ids) if token == image
    ]

    images = [each.image for each in encoded.images]
    projected = [EXPECTED[f"{each}.projected"][0] for each in images]
    features = BaseModelOutputWithPooling(pooler_output=torch.from_numpy(np.stack(projected)))
    seen = {}
    hook = reference.model.language_model.register_forward_pre_hook(
        lambda _, __, given: seen.update(embeddings=given["inputs_embeds"]), with_kwargs=True
    )
    tokens: list[int] = []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            ids = torch.tensor([[*encoded.ids, *tokens]])
            logits = reference(ids, mm_encoder_outputs={"image": features}).logits
            if not tokens:
                first, embeddings = logits[0, -4:].numpy(), seen["embeddings"][0].numpy()
            tokens.append(int(logits[0, -1].argmax()))
    hook.remove()

    array = mx.array(encoded.ids)
    embedded = model.model.embed_inputs(array, *map(mx.array, projected))
    assert np.array_equal(np.array(embedded), embeddings)
    found = model.model.language_model(array[None], input_embeddings=embedded[None])
    assert np.abs(np.array(found[0, -4:]) - first).max() <= 1e-5 * np.abs(first).max()

    encoder_made = {each: model.project(EXPECTED[f"{each}.features"]) for each in images}
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [
                part if part["type"] == "text" else part | {"image": encoder_made[part["image"]]}
                for part in message["content"]
            ]
    result = model.chat(messages, max_tokens=NEW_TOKENS).result
    ended = next((n for n, t in enumerate(tokens) if t in model.eos_token_ids), NEW_TOKENS)
    assert list(result.tokens) == tokens[:ended]
    assert result.image_tokens == count * len(images)
    assert result.prompt_tokens == len(encoded.ids)
