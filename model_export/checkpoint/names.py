"""The name mapping, as data: which tensors a FastVLM checkpoint holds and where each one goes.

Source names are Apple's (`llava_qwen2`); destination names are what the demo app's loader reads.
Every source tensor must be in the table with the shape its config implies, and every tensor of
the table must be in the source. transformers' names (`fast_vlm`) are turned into Apple's first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from fastvlm_mlx.bundle.bundle import ENCODER_PREFIX as MLX_ENCODER_PREFIX
from fastvlm_mlx.bundle.bundle import MLX_PROJECTOR
from fastvlm_mlx.bundle.config import FastVLMConfig, TextConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError

TORCH_CONV_TO_MLX = (0, 2, 3, 1)
LAYER_SCALE_TO_MLX = (1, 2, 0)
ENCODER_PREFIX = "model.vision_tower.vision_tower.model."
# Held by Apple's checkpoints and used by no part of FastVLM: the classification head, and
# BatchNorm's training counter.
UNUSED_ENCODER = ("head.proj", ".num_batches_tracked")
# Buffers that old versions of transformers saved; they follow from rope_theta.
UNUSED_SUFFIX = ".rotary_emb.inv_freq"

# (source, destination, shape), `{h}` and its like filled from the config.
Row = tuple[str, str, tuple[str, ...]]
# A tensor of the encoder, by its own name.
Shape = tuple[str, tuple[int, ...]]

PROJECTOR: tuple[Row, ...] = (
    ("model.mm_projector.0.weight", "multi_modal_projector.linear_0.weight", ("hidden", "vision")),
    ("model.mm_projector.0.bias", "multi_modal_projector.linear_0.bias", ("hidden",)),
    ("model.mm_projector.2.weight", "multi_modal_projector.linear_2.weight", ("hidden", "hidden")),
    ("model.mm_projector.2.bias", "multi_modal_projector.linear_2.bias", ("hidden",)),
)
EMBEDDING: Row = (
    "model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    ("vocab", "hidden"),
)
NORM: Row = ("model.norm.weight", "language_model.model.norm.weight", ("hidden",))
HEAD: Row = ("lm_head.weight", "language_model.lm_head.weight", ("vocab", "hidden"))
LAYER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("input_layernorm.weight", ("hidden",)),
    ("self_attn.q_proj.weight", ("hidden", "hidden")),
    ("self_attn.q_proj.bias", ("hidden",)),
    ("self_attn.k_proj.weight", ("kv", "hidden")),
    ("self_attn.k_proj.bias", ("kv",)),
    ("self_attn.v_proj.weight", ("kv", "hidden")),
    ("self_attn.v_proj.bias", ("kv",)),
    ("self_attn.o_proj.weight", ("hidden", "hidden")),
    ("post_attention_layernorm.weight", ("hidden",)),
    ("mlp.gate_proj.weight", ("intermediate", "hidden")),
    ("mlp.up_proj.weight", ("intermediate", "hidden")),
    ("mlp.down_proj.weight", ("hidden", "intermediate")),
)
# transformers' prefix → Apple's. `stages.N` is a stage of timm's fastvit_mci3; what stands for it
# in Apple's flat list of modules follows from the encoder's shape (`_stage_indices`).
TIMM = "model.vision_tower.timm_model."
TRANSFORMERS: tuple[tuple[str, str], ...] = (
    ("lm_head.", "lm_head."),
    ("model.language_model.", "model."),
    ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
    (TIMM + "stem.", ENCODER_PREFIX + "patch_embed."),
    (TIMM + "final_conv.se.fc1.", ENCODER_PREFIX + "conv_exp.se.reduce."),
    (TIMM + "final_conv.se.fc2.", ENCODER_PREFIX + "conv_exp.se.expand."),
    (TIMM + "final_conv.", ENCODER_PREFIX + "conv_exp."),
)
TRANSFORMERS_STAGE: tuple[tuple[str, str], ...] = (
    ("downsample.proj.0.reparam_conv.", "network.{downsample}.proj.0.lkb_reparam."),
    ("downsample.", "network.{downsample}."),
    ("pos_emb.", "network.{position}."),
    ("blocks.", "network.{blocks}."),
)
TRANSFORMERS_PARTS = ((".mlp.", ".convffn."), (".gamma", ""))


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name in the source and in the bundle, and its shape in the bundle.

    Attributes:
        axes: how the source's axes are permuted to that shape; not at all where None.
    """

    source: str
    name: str
    shape: tuple[int, ...]
    axes: tuple[int, ...] | None = None


def llm_specs(config: FastVLMConfig, *, tied: bool) -> list[TensorSpec]:
    """List the tensors of projector and language model in the order in which they are written."""
    return [
        *_rows(PROJECTOR, config.text, config.vision),
        *_rows((EMBEDDING,), config.text, config.vision),
        *_layer_specs(config.text),
        *_rows((NORM,) if tied else (NORM, HEAD), config.text, config.vision),
    ]


def bundle_specs(config: FastVLMConfig, *, tied: bool, layout: str) -> list[TensorSpec]:
    """List every tensor that a bundle of the layout holds in its safetensors, in order.

    In `app` the encoder is the package's; in `mlx` it follows under its own prefix.
    """
    specs = llm_specs(config, tied=tied)
    if layout == "app":
        return specs
    names = {app: mlx for mlx, app in MLX_PROJECTOR.items()}
    renamed = []
    for spec in specs:
        prefix = next((app for app in names if spec.name.startswith(app)), None)
        name = spec.name if prefix is None else names[prefix] + spec.name.removeprefix(prefix)
        renamed.append(TensorSpec(spec.source, name, spec.shape))
    return renamed + mlx_encoder_specs(config.vision)


def mlx_encoder_specs(vision: VisionConfig) -> list[TensorSpec]:
    """List every tensor of the encoder of an `mlx` bundle, in order."""
    # BatchNorm's counter is torch's own; the head, of no use to FastVLM, both loaders ask for.
    encoder = [s for s in encoder_specs(vision) if not s.name.endswith(UNUSED_ENCODER[1])]
    return [_mlx_encoder_spec(spec) for spec in encoder]


def in_encoder(spec: TensorSpec) -> bool:
    """Whether the tensor is of an `mlx` bundle's encoder."""
    return spec.name.startswith(MLX_ENCODER_PREFIX)


def _mlx_encoder_spec(spec: TensorSpec) -> TensorSpec:
    axes = {4: TORCH_CONV_TO_MLX, 3: LAYER_SCALE_TO_MLX}.get(len(spec.shape))
    shape = spec.shape if axes is None else tuple(spec.shape[axis] for axis in axes)
    name = spec.name.replace("patch_embed.", "patch_embed.blocks.")
    return TensorSpec(spec.source, MLX_ENCODER_PREFIX + name, shape, axes)


def encoder_specs(vision: VisionConfig) -> list[TensorSpec]:
    """List every tensor of FastViTHD as the checkpoint holds it, the unused ones included."""
    return [TensorSpec(ENCODER_PREFIX + k, k, shape) for k, shape in _encoder_shapes(vision)]


def is_unused(name: str) -> bool:
    """Whether an encoder tensor is part of the checkpoint but of no computation."""
    return name == UNUSED_ENCODER[0] or name.endswith(UNUSED_ENCODER[1])


def from_transformers(name: str, vision: VisionConfig) -> str | None:
    """Return Apple's name of the tensor that transformers calls `name`; None if it has none."""
    for prefix, apple in TRANSFORMERS:
        if name.startswith(prefix):
            return apple + name.removeprefix(prefix)
    match = re.fullmatch(re.escape(TIMM) + r"stages\.(\d+)\.(.+)", name)
    if match is None or int(match.group(1)) >= len(vision.layers):
        return None
    indices, rest = _stage_indices(vision)[int(match.group(1))], match.group(2)
    for prefix, apple in TRANSFORMERS_STAGE:
        if rest.startswith(prefix):
            rest = rest.removeprefix(prefix)
            for part, renamed in TRANSFORMERS_PARTS:
                rest = rest.replace(part, renamed)
            return ENCODER_PREFIX + apple.format(**indices) + rest
    return None


def _stage_indices(vision: VisionConfig) -> list[dict[str, int]]:
    """Where each stage's modules stand in the flat list: patch embedding, position, blocks."""
    stages, index = [], 0
    for stage, position in enumerate(vision.pos_embs_shapes):
        downsample = index
        index += stage > 0
        before_blocks = index
        index += position is not None
        stages.append({"downsample": downsample, "position": before_blocks, "blocks": index})
        index += 1
    return stages


def check_names(found: Mapping[str, tuple[int, ...]], specs: Iterable[TensorSpec]) -> None:
    """Check that every tensor which is needed is there with its shape, and that none is unknown.

    Raises:
        CheckpointError: naming the first tensor that is missing, extra or of the wrong shape.
    """
    specs = list(specs)
    expected = {spec.source: spec.shape for spec in specs}
    if missing := [s.source for s in specs if s.source not in found and not is_unused(s.name)]:
        raise CheckpointError(
            f"the checkpoint lacks {missing[0]}{_more(missing)}: expected it for the model that "
            "config.json describes, get the checkpoint's missing files"
        )
    for name, shape in expected.items():
        if name in found and found[name] != shape:
            raise CheckpointError(
                f"{name} has shape {list(found[name])} where config.json implies {list(shape)}: "
                "the weights and config.json belong to different models"
            )
    known = set(expected) | {HEAD[0]}
    extra = [n for n in found if n not in known and not n.endswith(UNUSED_SUFFIX)]
    if extra:
        near = get_close_matches(extra[0], expected, n=1)
        hint = f" (nearest known name: {near[0]})" if near else ""
        raise CheckpointError(
            f"the checkpoint holds {extra[0]}{_more(extra)}, which is no tensor of the model that "
            f"config.json describes{hint}: remove it or correct config.json"
        )


def _encoder_shapes(vision: VisionConfig) -> Iterator[Shape]:
    """In the order in which torch's modules list them: a module's own before its children's."""
    dims = vision.embed_dims
    for index, (into, kernel) in enumerate(((3, 3), (1, 3), (dims[0], 1))):
        yield from _conv(f"patch_embed.{index}.reparam_conv", dims[0], into, kernel)
    stages = zip(_stage_indices(vision), vision.pos_embs_shapes, vision.token_mixers, strict=True)
    for stage, (indices, position, mixer) in enumerate(stages):
        dim = dims[stage]
        if stage:
            proj = f"network.{indices['downsample']}.proj."
            yield from _conv(proj + "0.lkb_reparam", dim, 1, vision.down_patch_size)
            yield from _conv(proj + "1.reparam_conv", dim, dim, 1)
        if position is not None:
            yield from _conv(f"network.{indices['position']}.reparam_conv", dim, 1, position)
        hidden = int(dim * vision.mlp_ratios[stage])
        for block in range(vision.layers[stage]):
            path = f"network.{indices['blocks']}.{block}."
            yield from _mixer(path, dim, None if mixer == "attention" else vision)
            yield from _conv_ffn(path + "convffn.", dim, hidden)
    width = vision.hidden_size
    yield from _conv("conv_exp.se.reduce", width // 16, width, 1)
    yield from _conv("conv_exp.se.expand", width, width // 16, 1)
    yield from _conv("conv_exp.reparam_conv", width, 1, 3)
    yield UNUSED_ENCODER[0], (width, vision.projection_dim)


def _conv(path: str, out: int, into: int, kernel: int) -> Iterator[Shape]:
    """Of a convolution, `into` channels for each group."""
    yield f"{path}.weight", (out, into, kernel, kernel)
    yield f"{path}.bias", (out,)


def _mixer(path: str, dim: int, convolution: VisionConfig | None) -> Iterator[Shape]:
    """What is before the feed-forward part of a block that mixes by attention or convolution."""
    if convolution is not None:
        yield path + "layer_scale", (dim, 1, 1)
        kernel = convolution.repmixer_kernel_size
        yield from _conv(path + "token_mixer.reparam_conv", dim, 1, kernel)
        return
    yield path + "layer_scale_1", (dim, 1, 1)
    yield path + "layer_scale_2", (dim, 1, 1)
    yield path + "norm.weight", (dim,)
    yield path + "norm.bias", (dim,)
    yield path + "token_mixer.qkv.weight", (3 * dim, dim)
    yield path + "token_mixer.proj.weight", (dim, dim)
    yield path + "token_mixer.proj.bias", (dim,)


def _conv_ffn(path: str, dim: int, hidden: int) -> Iterator[Shape]:
    yield path + "conv.conv.weight", (dim, 1, 7, 7)
    for name in ("weight", "bias", "running_mean", "running_var"):
        yield f"{path}conv.bn.{name}", (dim,)
    yield path + "conv.bn" + UNUSED_ENCODER[1], ()
    yield from _conv(path + "fc1", hidden, dim, 1)
    yield from _conv(path + "fc2", dim, hidden, 1)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _rows(rows: Iterable[Row], text: TextConfig, vision: VisionConfig) -> Iterator[TensorSpec]:
    sizes = _sizes(text) | {"vision": vision.hidden_size}
    for source, name, shape in rows:
        yield TensorSpec(source, name, tuple(sizes[s] for s in shape))


def _layer_specs(text: TextConfig) -> Iterator[TensorSpec]:
    sizes = _sizes(text)
    for layer in range(text.num_hidden_layers):
        for name, shape in LAYER:
            path = f"model.layers.{layer}.{name}"
            yield TensorSpec(path, f"language_model.{path}", tuple(sizes[s] for s in shape))


def _sizes(text: TextConfig) -> dict[str, int]:
    return {
        "hidden": text.hidden_size,
        "intermediate": text.intermediate_size,
        "kv": text.num_key_value_heads * text.head_dim,
        "vocab": text.vocab_size,
    }
