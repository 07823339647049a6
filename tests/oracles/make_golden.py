"""Write tests/golden: what transformers and timm make of a tiny FastVLM and of real photographs.

Needs an environment of its own, since timm needs torchvision, which does not work beside CPU
builds of torch from another index:

    python -m venv oracle && oracle/bin/pip install torch torchvision timm transformers
    oracle/bin/python tests/oracles/make_golden.py tests/golden --photos DIR

DIR holds china.jpg and flower.jpg, found in any wheel of scikit-learn below
sklearn/datasets/images. Imports nothing of this repository: the numbers come from
transformers' FastVlmForConditionalGeneration (the encoder is timm's fastvit_mci3), its PIL
CLIPImageProcessor and its Qwen2 tokenizer; what exists only in the reference, `expand2square`
and `tokenizer_image_token`, is written out below. Deterministic but for the library versions,
which PROVENANCE.json records.

The weights are random, and every one is a bfloat16 number, so that both checkpoints hold
exactly what the float32 computation used.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import PIL
import timm
import tokenizers
import torch
import transformers
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import FastVlmConfig, FastVlmForConditionalGeneration, Qwen2Tokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

SEED = 1
IMAGE_SIZE = 256
PIXELS_SIZE = 64
LAYERS = (1, 2, 1, 1, 1)
EMBED_DIMS = (16, 32, 32, 32, 64)
TOKEN_MIXERS = ("repmixer", "repmixer", "repmixer", "attention", "attention")
FEATURES = 2 * EMBED_DIMS[-1]
BASE_VOCABULARY = 400
VOCABULARY = 416
TEXT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
IMAGE_TOKEN = "<image>"
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# llava/conversation.py, conv_templates["qwen_2"], one user message.
CONVERSATION = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<image>\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = (
    "Describe the image.",
    "What colour is it?",
    "How many?",
    " \n\n  leading and trailing space \t\n",
    "Zahl 1234567, na\u00efve caf\u00e9, e\u0301 is NFC's, \u4f60\u597d \U0001f44b\U0001f3fd",
    "don't\r\nSTOP'LL  x\u00a0y\u3000z\u200d",
)
# What the tiny vocabulary's merges are learnt from.
CORPUS = (
    "You are a helpful assistant.",
    "Describe the image. What colour is it? How many are there? What is written on the sign?",
    "A photograph of a temple roof in China, and of a flower in a garden.",
    "system user assistant",
    "the red circle is left of the blue square above the green triangle",
    "Qu'est-ce que c'est\u202f? C'est une fleur. \u4f60\u597d\uff0c\u4e16\u754c\u3002",
)
# The pre-tokenizer of Qwen2.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def write_json(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=1, ensure_ascii=True) + "\n")


def write_images(folder: Path, photos: Path) -> None:
    """Both photographs reduced to small odd sizes, in every mode the reference can answer for."""
    folder.mkdir()
    china = Image.open(photos / "china.jpg").convert("RGB")
    flower = Image.open(photos / "flower.jpg").convert("RGB")

    def reduced(photo: Image.Image, size: tuple[int, int]) -> Image.Image:
        return ImageOps.fit(photo, size, Image.Resampling.LANCZOS)

    reduced(china, (213, 131)).save(folder / "wide.jpg", quality=88)
    reduced(flower, (97, 161)).save(folder / "tall.jpg", quality=88)
    reduced(china, (64, 64)).save(folder / "square.jpg", quality=88)
    reduced(flower, (23, 17)).save(folder / "small.png")
    china.crop((300, 20, 301, 177)).save(folder / "one_wide.png")
    flower.crop((100, 200, 249, 201)).save(folder / "one_high.png")
    reduced(china, (91, 133)).convert("L").save(folder / "grey.jpg", quality=88)
    palette = reduced(flower, (121, 77)).quantize(48)
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_clear.png", transparency=bytes(range(0, 240, 5)))
    reduced(china, (101, 67)).convert("CMYK").save(folder / "cmyk.jpg", quality=88)
    exif = Image.Exif()
    exif[0x0112] = 6
    reduced(china, (141, 90)).save(folder / "rotated.jpg", quality=88, exif=exif)
    clear = reduced(flower, (63, 81))
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    frames = [reduced(photo, (75, 51)).quantize(32) for photo in (flower, china)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:], duration=100)


def expand2square(image: Image.Image, background: tuple[int, ...]) -> Image.Image:
    """llava/mm_utils.py."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new(image.mode, (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def reference_pixels(
    path: Path, size: int, pad: bool, mean: tuple[float, ...] = (0, 0, 0), std=(1, 1, 1)
) -> np.ndarray:
    """float32 [3, S, S] by LLaVA's process_images, on the upright image."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(mean),
        image_std=list(std),
    )
    image = ImageOps.exif_transpose(Image.open(path))
    # The processor's own conversion, ahead of the padding: expand2square expects RGB.
    image = Image.fromarray(processor.convert_to_rgb(image))
    if pad:
        image = expand2square(image, tuple(int(255 * m) for m in mean))
    return np.asarray(processor(image)["pixel_values"][0], np.float32)


def write_pixels(golden: Path) -> None:
    arrays = {}
    for path in sorted((golden / "images").iterdir()):
        for geometry in ("pad", "crop"):
            values = reference_pixels(path, PIXELS_SIZE, geometry == "pad")
            levels = np.rint(values * 255).astype(np.uint8)
            # With mean 0 and std 1 the 8-bit levels say everything.
            assert np.array_equal((levels * (1 / 255)).astype(np.float32), values)
            arrays[f"{path.name}.{geometry}"] = levels
    for geometry in ("pad", "crop"):
        path = golden / "images" / "wide.jpg"
        arrays[f"wide.jpg.{geometry}.clip"] = reference_pixels(
            path, 32, geometry == "pad", CLIP_MEAN, CLIP_STD
        )
    np.savez_compressed(golden / "pixels.npz", **arrays)


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE in Qwen2's slow form, as LLaVA's training leaves it: no tokenizer.json."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCABULARY,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(CORPUS, trainer)
    bpe.model.save(str(folder))
    assert bpe.get_vocab_size() == BASE_VOCABULARY
    added = {token: BASE_VOCABULARY + i for i, token in enumerate(SPECIAL)}
    write_json(folder / "added_tokens.json", added)
    names = {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    write_json(folder / "special_tokens_map.json", names)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(i): {"content": token, **flags, "special": True} for token, i in added.items()
            },
            **names,
            "bos_token": None,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "model_max_length": 2048,
            "padding_side": "right",
            "split_special_tokens": False,
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def reference_ids(tokenizer: Qwen2Tokenizer, prompt: str) -> list[int]:
    """llava/mm_utils.py, tokenizer_image_token: one image is one id, -200."""
    before, after = CONVERSATION.format(prompt=prompt).split(IMAGE_TOKEN)
    return [*tokenizer(before).input_ids, -200, *tokenizer(after).input_ids]


def build_model() -> FastVlmForConditionalGeneration:
    """float32, every value a bfloat16 number; sizes chosen so that activations stay near 1."""
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": "fastvit_mci3",
            "do_pooling": True,
            "hidden_size": FEATURES,
            "model_args": {
                "inference_mode": True,
                "layers": list(LAYERS),
                "embed_dims": list(EMBED_DIMS),
            },
        },
        text_config={"model_type": "qwen2", **TEXT},
        image_token_index=0,
        image_seq_length=(IMAGE_SIZE // 64) ** 2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    model = FastVlmForConditionalGeneration(config).eval()
    draw = torch.Generator().manual_seed(SEED)

    def normal(tensor: torch.Tensor, std: float, mean: float = 0.0) -> torch.Tensor:
        return mean + std * torch.randn(tensor.shape, generator=draw)

    def uniform(tensor: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(tensor.shape, generator=draw)

    with torch.no_grad():
        for name, tensor in sorted(model.state_dict().items()):
            if name.endswith("num_batches_tracked"):
                tensor.fill_(1000)
                continue
            if name.endswith("running_var"):
                value = uniform(tensor, 0.3, 2.0)
            elif name.endswith("running_mean"):
                value = normal(tensor, 0.3)
            elif name.endswith("gamma"):
                value = uniform(tensor, 0.1, 0.6)
            elif ("norm" in name and name.endswith("weight")) or ".bn.weight" in name:
                value = uniform(tensor, 0.5, 1.5)
            elif name.endswith("bias"):
                value = normal(tensor, 0.05)
            elif name.endswith("embed_tokens.weight"):
                value = normal(tensor, 1.0)
            elif name == "lm_head.weight":
                value = normal(tensor, 0.6)
                # Neither a control token nor the padding of the vocabulary is ever chosen.
                value[BASE_VOCABULARY:] *= 0.1
            else:
                # The encoder's channels multiply what an image changes: less gain, and every
                # image makes nearly the same features; more, and they leave fp16's range.
                gain = 2.5 if "vision_tower" in name else 1.5
                value = normal(tensor, (gain / tensor[0].numel()) ** 0.5)
            tensor.copy_(value.bfloat16())
    return model


def to_apple(name: str) -> str:
    """transformers' and timm's name of a tensor → the one in Apple's `llava_qwen2` checkpoints."""
    if name == "lm_head.weight":
        return name
    for prefix, apple in (
        ("model.language_model.", "model."),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ):
        if name.startswith(prefix):
            return apple + name.removeprefix(prefix)
    tower = "model.vision_tower.vision_tower.model."
    part, rest = name.removeprefix("model.vision_tower.timm_model.").split(".", 1)
    if part == "stem":
        return f"{tower}patch_embed.{rest}"
    if part == "final_conv":
        rest = rest.replace("se.fc1", "se.reduce").replace("se.fc2", "se.expand")
        return f"{tower}conv_exp.{rest}"
    assert part == "stages", name
    stage, part, rest = rest.split(".", 2)
    # In the flat list of the source a stage is its patch embedding (not for the first), its
    # positional convolution (the two attention stages), and its blocks.
    before = [(s > 0) + (TOKEN_MIXERS[s] == "attention") + 1 for s in range(len(LAYERS))]
    index = sum(before[: int(stage)])
    if part == "downsample":
        rest = rest.replace("proj.0.reparam_conv", "proj.0.lkb_reparam")
        return f"{tower}network.{index}.{rest}"
    index += int(stage) > 0
    if part == "pos_emb":
        return f"{tower}network.{index}.{rest}"
    index += TOKEN_MIXERS[int(stage)] == "attention"
    assert part == "blocks", name
    rest = rest.replace(".mlp.", ".convffn.").replace(".gamma", "")
    return f"{tower}network.{index}.{rest}"


def write_apple(folder: Path, model: FastVlmForConditionalGeneration) -> None:
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[to_apple(name)] = tensor if tensor.dtype == torch.int64 else tensor.bfloat16()
    draw = torch.Generator().manual_seed(SEED + 1)
    # The classification head, which timm's feature extractor does not have.
    head = torch.randn(FEATURES, 48, generator=draw).bfloat16()
    tensors["model.vision_tower.vision_tower.model.head.proj"] = head
    tensors = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    added = json.loads((folder / "added_tokens.json").read_text())
    write_json(
        folder / "config.json",
        {
            "architectures": ["LlavaQwen2ForCausalLM"],
            "model_type": "llava_qwen2",
            **{k: v for k, v in TEXT.items() if k != "tie_word_embeddings"},
            "tie_word_embeddings": False,
            "bos_token_id": added["<|endoftext|>"],
            "eos_token_id": added["<|im_end|>"],
            "torch_dtype": "bfloat16",
            "image_aspect_ratio": "pad",
            "mm_hidden_size": FEATURES,
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_tower": f"mobileclip_l_{IMAGE_SIZE}",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_layer": -2,
            "tokenizer_model_max_length": 2048,
            "tokenizer_padding_side": "right",
            "unfreeze_mm_vision_tower": True,
            "use_mm_proj": True,
            "vision_config": {
                "image_size": IMAGE_SIZE,
                "layers": list(LAYERS),
                "embed_dims": list(EMBED_DIMS),
                "mlp_ratios": [4] * 5,
                "token_mixers": list(TOKEN_MIXERS),
                "pos_embs_shapes": [None, None, None, 7, 7],
                "projection_dim": 48,
                "hidden_size": FEATURES,
            },
        },
    )
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [added["<|im_end|>"], added["<|endoftext|>"]], "do_sample": False},
    )


def write_transformers(
    folder: Path, model: FastVlmForConditionalGeneration, tokenizer: Qwen2Tokenizer
) -> None:
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", IMAGE_TOKEN]}
    )
    tokenizer.save_pretrained(folder)
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    # A copy: casting a model there and back would round its rotary frequencies, no parameters.
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0, 0, 0],
        image_std=[1, 1, 1],
    ).save_pretrained(folder)


@torch.no_grad()
def write_answers(
    golden: Path, model: FastVlmForConditionalGeneration, tokenizer: Qwen2Tokenizer
) -> None:
    """Features, projected features, logits of the last four positions, 16 greedy tokens."""
    image_id = model.config.image_token_index
    arrays, answers = {}, []
    for image in ("wide.jpg", "one_wide.png", "rotated.jpg"):
        values = reference_pixels(golden / "images" / image, IMAGE_SIZE, pad=True)
        pixels = torch.from_numpy(values)[None]
        tower = model.model.vision_tower(pixels).last_hidden_state
        arrays[f"{image}.features"] = tower.flatten(2).permute(0, 2, 1).numpy()
        outputs = model.get_image_features(pixels)
        arrays[f"{image}.projected"] = outputs.pooler_output.numpy()
        count = outputs.pooler_output.shape[1]
        for prompt in PROMPTS[:2]:
            ids = [
                one
                for i in reference_ids(tokenizer, prompt)
                for one in ([image_id] * count if i == -200 else [i])
            ]
            inputs = torch.tensor([ids])
            logits = model(input_ids=inputs, pixel_values=pixels).logits[0, -4:]
            tokens = model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                pixel_values=pixels,
                max_new_tokens=16,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            best = torch.stack(tokens.logits)[:, 0].topk(2).values
            new = tokens.sequences[0, len(ids) :].tolist()
            arrays[f"{len(answers)}.logits"] = logits.numpy()
            answers.append(
                {
                    "image": image,
                    "prompt": prompt,
                    "tokens": new,
                    "text": tokenizer.decode(new),
                    # How far ahead the chosen token was at the closest of the 16 choices.
                    "smallest_margin": round(float((best[:, 0] - best[:, 1]).min()), 4),
                }
            )
    np.savez_compressed(golden / "activations.npz", **arrays)
    write_json(golden / "answers.json", answers)


def write_provenance(golden: Path) -> None:
    files = sorted(p for p in golden.rglob("*") if p.is_file())
    modules = (torch, timm, transformers, tokenizers, PIL, np)
    write_json(
        golden / "PROVENANCE.json",
        {
            "command": "python tests/oracles/make_golden.py tests/golden --photos DIR",
            "seed": SEED,
            "python": platform.python_version(),
            "versions": {module.__name__: module.__version__ for module in modules},
            "licences": {
                "images": (
                    "Reduced, cropped and recoded from scikit-learn's sample photographs, "
                    "CC BY 2.0 (https://creativecommons.org/licenses/by/2.0/). china.jpg: "
                    "danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035/. "
                    "flower.jpg: https://www.flickr.com/photos/vultilion/6056698931/, credited "
                    "by scikit-learn to danielbuechele."
                ),
                "everything else": "random numbers and what was computed from them, MIT",
            },
            "sha256": {
                str(p.relative_to(golden)): hashlib.sha256(p.read_bytes()).hexdigest()
                for p in files
            },
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("golden", type=Path)
    parser.add_argument("--photos", type=Path, required=True)
    arguments = parser.parse_args()
    golden: Path = arguments.golden
    shutil.rmtree(golden, ignore_errors=True)
    for layout in ("apple", "transformers"):
        (golden / layout).mkdir(parents=True)
    torch.set_num_threads(1)
    write_images(golden / "images", arguments.photos)
    write_pixels(golden)
    write_tokenizer(golden / "apple")
    tokenizer = Qwen2Tokenizer.from_pretrained(golden / "apple")
    write_json(
        golden / "ids.json",
        [{"prompt": prompt, "ids": reference_ids(tokenizer, prompt)} for prompt in PROMPTS],
    )
    model = build_model()
    write_apple(golden / "apple", model)
    write_transformers(golden / "transformers", model, tokenizer)
    write_answers(golden, model, tokenizer)
    write_provenance(golden)


if __name__ == "__main__":
    main()
