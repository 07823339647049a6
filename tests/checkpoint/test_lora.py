"""LoRA fine-tunes and projectors over a base: merged as PEFT does, or refused by name."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastvlm_mlx.errors import CheckpointError
from model_export.checkpoint import lora, lora_config
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.weights.tensors import to_torch
from model_export.checkpoint.weights.weight_files import read_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
# What PEFT itself merged: oracles/make_lora.py.
PEFT = Path(__file__).parents[1] / "golden_lora"
CASES = ("patterns", "rslora", "embedding")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def adapter(tmp_path):
    """Write an adapter over the golden checkpoint: its tensors by name, its config's changes."""

    def write(tensors=None, *, name="adapter", suffix=".safetensors", extra=None, **config):
        path = tmp_path / name
        path.mkdir()
        data = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
        data.setdefault("base_model_name_or_path", str(GOLDEN / "apple"))
        (path / "adapter_config.json").write_text(json.dumps(data))
        if tensors is None:
            tensors = {f"base_model.model.{UP}.{k}": v for k, v in pair(96, 64).items()}
        if suffix == ".bin":
            torch.save(tensors, path / "adapter_model.bin")
        else:
            save_file(tensors, path / "adapter_model.safetensors")
        if extra is not None:
            torch.save(extra, path / "non_lora_trainables.bin")
        return path

    return write


def pair(rows, columns, rank=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "lora_A.weight": torch.randn(rank, columns, generator=draw),
        "lora_B.weight": torch.randn(rows, rank, generator=draw),
    }


def changed(checkpoint, base):
    """Names of what differs from the base."""
    return {
        name
        for name in checkpoint.tensors
        if name not in base.tensors or not torch.equal(checkpoint.tensor(name), base.tensor(name))
    }


@pytest.fixture(scope="module")
def base():
    return Checkpoint(GOLDEN / "apple")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["apple", "transformers"])
def test_weights_are_what_peft_merges(base, case, layout):
    """Patterns, scales, embeddings, saved modules; over the base in either layout."""
    checkpoint = Checkpoint(PEFT / case, base=GOLDEN / layout)
    expected = np.load(PEFT / case / "merged.npz")
    assert changed(checkpoint, base) == set(expected)
    for name in expected:
        assert np.abs(checkpoint.tensor(name).numpy() - expected[name]).max() < 2e-6
    assert checkpoint.config == Checkpoint(GOLDEN / layout).config


@pytest.mark.parametrize("case", CASES)
def test_a_bin_merges_as_safetensors_do(tmp_path, case):
    path = Path(shutil.copytree(PEFT / case, tmp_path / "adapter"))
    torch.save(load_file(path / "adapter_model.safetensors"), path / "adapter_model.bin")
    (path / "adapter_model.safetensors").unlink()
    found = Checkpoint(path, base=GOLDEN / "apple")
    expected = np.load(PEFT / case / "merged.npz")
    for name in expected:
        assert np.abs(found.tensor(name).numpy() - expected[name]).max() < 2e-6


def test_names_of_transformers_layout(adapter, base):
    names = "base_model.model.model.language_model.layers.0.mlp.up_proj"
    path = adapter({f"{names}.{k}": v for k, v in pair(96, 64).items()})
    found = Checkpoint(path, base=GOLDEN / "transformers")
    a, b = pair(96, 64).values()
    assert changed(found, base) == {f"{UP}.weight"}
    assert torch.allclose(found.tensor(f"{UP}.weight"), base.tensor(f"{UP}.weight") + 2 * b @ a)


def test_llava_s_other_trainables(adapter, base):
    """What LLaVA trains without LoRA, under the prefixes that it saves it with."""
    projector = {
        name: torch.randn(base.tensors[name].shape)
        for name in base.tensors
        if "mm_projector" in name
    }
    tower = "model.vision_tower.vision_tower.model.conv_exp.reparam_conv.bias"
    extra = projector | {tower: torch.randn(base.tensors[tower].shape)}
    path = adapter(extra={f"base_model.model.{k}": v for k, v in extra.items()})
    config = json.loads((GOLDEN / "apple" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "image_aspect_ratio": "square"}))
    found = Checkpoint(path)
    assert changed(found, base) == {*extra, f"{UP}.weight"}
    for name, tensor in extra.items():
        assert torch.equal(found.tensor(name), tensor)
    # The fine-tune's own config, and its base's tokenizer.
    assert found.config.image_aspect_ratio == "square"
    assert {f.parent for f in found.tokenizer_files} == {GOLDEN / "apple"}
    source = found.source()
    assert source["kind"] == "LoRA adapter"
    assert set(source["files"]) == {
        "config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "non_lora_trainables.bin",
    }
    assert set(source["base"]["files"]) == {"config.json", "model.safetensors"}


def test_a_convolution(adapter, base):
    name = "model.vision_tower.vision_tower.model.patch_embed.2.reparam_conv"
    rows, columns, *_ = base.tensors[f"{name}.weight"].shape
    a, b = torch.randn(2, columns, 1, 1), torch.randn(rows, 2, 1, 1)
    path = adapter({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b})
    delta = torch.einsum("or,rihw->oihw", b[:, :, 0, 0], a)
    expected = base.tensor(f"{name}.weight") + 2 * delta
    assert torch.allclose(Checkpoint(path).tensor(f"{name}.weight"), expected, atol=1e-6)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    rank=st.integers(1, 5),
    scale=st.floats(-4, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    embedding=st.booleans(),
)
def test_any_merge_is_the_formula(tmp_path, rows, columns, rank, scale, dtype, embedding):
    weight = torch.randn(rows, columns).to(dtype)
    a, b = torch.randn(rank, columns), torch.randn(rows, rank)
    if embedding:
        a, b = torch.randn(rank, rows), torch.randn(columns, rank)
    save_file({"w": weight, "a": a, "b": b}, tmp_path / "t.safetensors")
    stored = read_tensors([tmp_path / "t.safetensors"])
    merged = lora.MergedTensor(stored["w"], stored["a"], stored["b"], scale, embedding)
    delta = b.double() @ a.double()
    expected = weight.double() + scale * (delta.T if embedding else delta)
    found = to_torch(merged.read())
    assert found.dtype == torch.float32
    assert merged.shape == tuple(found.shape)
    assert torch.allclose(found.double(), expected, atol=1e-4)
    # The source is read again each time, never what was merged into it.
    assert torch.equal(to_torch(merged.read()), found)
    by_rows = [to_torch(merged.read(slice(row, row + 2))) for row in range(0, rows, 2)]
    assert torch.allclose(torch.cat(by_rows), found, atol=1e-5)


class TestTies:
    """Where the head is the embedding, and only one of them was trained."""

    @pytest.fixture
    def tied(self, tmp_path):
        path = Path(shutil.copytree(GOLDEN / "apple", tmp_path / "tied"))
        state = load_file(path / "model.safetensors")
        # The redundant head that some checkpoints carry.
        state[HEAD] = state[EMBEDDING].clone()
        save_file(state, path / "model.safetensors")
        return path

    def test_lora_of_the_embedding_leaves_the_head(self, tied):
        before = Checkpoint(tied)
        found = Checkpoint(PEFT / "embedding", base=tied)
        assert before.tied
        assert not found.tied
        assert torch.equal(found.tensor(HEAD), before.tensor(EMBEDDING))
        assert not torch.equal(found.tensor(EMBEDDING), before.tensor(EMBEDDING))

    def test_a_saved_head_leaves_the_embedding(self, tied):
        found = Checkpoint(PEFT / "rslora", base=tied)
        assert not found.tied
        assert torch.equal(found.tensor(EMBEDDING), Checkpoint(tied).tensor(EMBEDDING))

    def test_a_resized_embedding_takes_the_head_along(self, tied, adapter):
        rows = torch.randn(480, 64)
        path = adapter({"base_model.model.model.embed_tokens.weight": rows})
        found = Checkpoint(path, base=tied)
        assert found.tied
        assert found.config.text.vocab_size == 480
        assert torch.equal(found.tensor(EMBEDDING), rows)

    @pytest.mark.parametrize(
        ("config", "tied_after"),
        [
            ({"modules_to_save": ["embed_tokens"]}, False),
            ({"modules_to_save": ["model.embed_tokens"]}, False),
            ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ],
    )
    def test_a_saved_embedding_leaves_the_head(self, tied, adapter, config, tied_after):
        rows = torch.randn(416, 64)
        path = adapter({"base_model.model.model.embed_tokens.weight": rows}, **config)
        found = Checkpoint(path, base=tied)
        assert torch.equal(found.tensor(EMBEDDING), rows)
        assert found.tied == tied_after
        if not tied_after:
            assert torch.equal(found.tensor(HEAD), Checkpoint(tied).tensor(EMBEDDING))

    def test_llava_s_embedding_takes_the_head_along(self, tied, adapter):
        rows = torch.randn(416, 64)
        path = adapter(extra={"base_model.model.model.embed_tokens.weight": rows})
        assert Checkpoint(path, base=tied).tied

    def test_neither_touched(self, tied, adapter):
        assert Checkpoint(adapter(), base=tied).tied


class TestProjector:
    @pytest.mark.parametrize("prefix", ["model.", "", "base_model.model.model.", "module.model."])
    def test_over_a_base(self, tmp_path, base, prefix):
        names = [n for n in base.tensors if "mm_projector" in n]
        state = {n: torch.randn(base.tensors[n].shape) for n in names}
        path = tmp_path / "stage1"
        path.mkdir()
        stored = {prefix + n.removeprefix("model."): t for n, t in state.items()}
        torch.save(stored, path / "mm_projector.bin")
        found = Checkpoint(path, base=GOLDEN / "apple")
        assert changed(found, base) == set(names)
        assert found.kind == "projector"

    def test_without_a_base(self, tmp_path):
        torch.save({"model.mm_projector.0.weight": torch.ones(2, 2)}, tmp_path / "mm_projector.bin")
        with pytest.raises(CheckpointError, match=r"names none: give the base's .* with --base"):
            Checkpoint(tmp_path)

    def test_of_another_size(self, tmp_path):
        torch.save({"model.mm_projector.0.weight": torch.ones(2, 2)}, tmp_path / "mm_projector.bin")
        words = r"mm_projector\.0\.weight of shape \[2, 2\] where the base's is \[64, 128\]"
        with pytest.raises(CheckpointError, match=words):
            Checkpoint(tmp_path, base=GOLDEN / "apple")

    def test_something_else(self, tmp_path):
        torch.save({"optimizer": torch.ones(2)}, tmp_path / "mm_projector.bin")
        with pytest.raises(CheckpointError, match="holds optimizer, which the base does not have"):
            Checkpoint(tmp_path, base=GOLDEN / "apple")


class TestBase:
    def test_named_relative_to_the_adapter(self, adapter, tmp_path, base):
        shutil.copytree(GOLDEN / "apple", tmp_path / "base")
        path = adapter(base_model_name_or_path="base")
        assert changed(Checkpoint(path), base) == {f"{UP}.weight"}

    def test_one_that_does_not_exist(self, adapter):
        path = adapter(base_model_name_or_path="/no/such/base")
        words = r"adapter_config\.json names the base /no/such/base, which does not exist here"
        with pytest.raises(CheckpointError, match=words):
            Checkpoint(path)

    def test_a_hub_id_that_is_not_there(self, adapter, monkeypatch, tmp_path):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        path = adapter(base_model_name_or_path="apple/FastVLM-0.5B")
        with pytest.raises(CheckpointError, match=r"can't be reached.*adapter_config.*--base"):
            Checkpoint(path)

    def test_none_named(self, adapter):
        with pytest.raises(CheckpointError, match=r"adapter_config\.json names none: give"):
            Checkpoint(adapter(base_model_name_or_path=None))

    def test_an_adapter_as_the_base(self, adapter):
        with pytest.raises(CheckpointError, match="is itself a difference to another base"):
            Checkpoint(adapter(), base=adapter(name="other"))

    def test_another_base_is_told_with_both_shapes(self, adapter, demo_checkpoint):
        shape = list(Checkpoint(demo_checkpoint).tensors[f"{UP}.weight"].shape)
        words = f"{UP}.weight as a tensor of shape [96, 64] where the base's is {shape}: it belongs"
        with pytest.raises(CheckpointError) as error:
            Checkpoint(adapter(), base=demo_checkpoint)
        assert words in str(error.value)

    def test_an_adapter_beside_a_whole_checkpoint(self, adapter):
        path = adapter()
        shutil.copyfile(GOLDEN / "apple" / "model.safetensors", path / "model.safetensors")
        with pytest.raises(CheckpointError, match="holds two checkpoints, a whole one and an"):
            Checkpoint(path)


class TestRefused:
    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"use_dora": True}, "describes DoRA, which is not supported"),
            ({"peft_type": "IA3"}, "describes a IA3 adapter: expected LORA"),
            ({"peft_type": None}, "describes a None adapter"),
            ({"init_lora_weights": "pissa_niter_4"}, "begun by 'pissa_niter_4', which changes"),
            ({"lora_bias": True}, "LoRA with biases"),
            ({"r": 0}, "r is 0, expected a number above zero"),
            ({"lora_alpha": 10**400}, "expected a number above zero and at most"),
            ({"alpha_pattern": {"x": 1e300}}, "expected a number above zero and at most"),
            ({"r": "8"}, "r is '8'"),
            ({"lora_alpha": None}, "lora_alpha is None"),
            ({"rank_pattern": {"[": 3}}, "which is no regular expression"),
            ({"rank_pattern": {"(x+)+up_proj": 3}}, "could take forever to compare"),
            ({"rank_pattern": {".*.*.*.*up_proj": 3}}, "could take forever to compare"),
            ({"rank_pattern": {"up_proj": 3}}, "where adapter_config.json says rank 3"),
            ({"alpha_pattern": [1]}, "expected a JSON object"),
        ],
    )
    def test_configs(self, adapter, config, words):
        with pytest.raises(CheckpointError, match=words.replace(".", r"\.").replace("(", r"\(")):
            Checkpoint(adapter(**config))

    def test_dora_s_tensors(self, adapter):
        tensors = {f"{UP}.lora_magnitude_vector": torch.ones(96)}
        with pytest.raises(CheckpointError, match="DoRA, which is not supported"):
            Checkpoint(adapter(tensors))

    def test_half_a_pair(self, adapter):
        tensors = {f"{UP}.lora_A.weight": torch.ones(2, 64)}
        with pytest.raises(CheckpointError, match=r"has no lora_B for model\.layers\.0\.mlp\.up"):
            Checkpoint(adapter(tensors))

    def test_a_module_that_fastvlm_does_not_have(self, adapter):
        tensors = {f"model.layers.0.mlp.experts.{k}": v for k, v in pair(96, 64).items()}
        with pytest.raises(CheckpointError, match=r"experts\.weight, which the base does not have"):
            Checkpoint(adapter(tensors))

    def test_no_weights(self, adapter):
        path = adapter()
        (path / "adapter_model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="and no weights: expected adapter_model"):
            Checkpoint(path)

    def test_trainables_that_are_no_tensors(self, adapter):
        with pytest.raises(CheckpointError, match="expected named tensors alone"):
            Checkpoint(adapter(extra={"step": 4}))


@settings(max_examples=80, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "peft_type",
                "r",
                "lora_alpha",
                "rank_pattern",
                "alpha_pattern",
                "use_dora",
                "init_lora_weights",
                "modules_to_save",
                "base_model_name_or_path",
            ]
        ),
        st.sampled_from(["LORA", 8, True, None, [], {}, -1, 0.5, {"q": 2}, {"[": 2}, ["a", 3]]),
    )
)
def test_any_config_is_read_or_refused_in_words(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("config") / "adapter_config.json"
    file.write_text(json.dumps(data))
    try:
        config = lora_config.LoraConfig.read(file)
    except CheckpointError as error:
        assert str(file) in str(error)  # noqa: PT017
    else:
        assert config.rank_and_scale("model.layers.0.q")[1] > 0
