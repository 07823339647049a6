"""Every kind of source is told by looking, and reaches the same tensors or is refused in words."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastvlm_mlx.errors import CheckpointError, ConfigError, FastVLMError, OptionError
from model_export.checkpoint import fast_vlm, hub
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer
from model_export.checkpoint.weights import tensors
from model_export.checkpoint.weights.weight_files import read_tensors

GOLDEN = Path(__file__).parents[1] / "golden"
HEAD_PROJ = "model.vision_tower.vision_tower.model.head.proj"
SLOW = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


KEYS = st.sampled_from(["architecture", "model_args", "layers", "model_type", "size", "crop_size"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3000) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


def to_bin(path, shards=1):
    """The directory's safetensors as what torch.save writes."""
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, path / "pytorch_model.bin")
        return path
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: state[name] for name in sorted(state)[i::shards]}
        torch.save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return path


def assert_same(found: Checkpoint, expected: Checkpoint, missing=frozenset()):
    assert set(expected.tensors) - set(found.tensors) == missing
    assert found.config.text == expected.config.text
    for name in found.tensors:
        assert found.tensors[name].shape == expected.tensors[name].shape
        assert torch.equal(found.tensor(name), expected.tensor(name)), name


class TestPickled:
    @pytest.mark.parametrize("shards", [1, 3])
    def test_bin_files_read_as_safetensors_do(self, edit_checkpoint, demo_checkpoint, shards):
        checkpoint = Checkpoint(to_bin(edit_checkpoint(), shards))
        assert len(checkpoint.weight_files) == shards
        assert_same(checkpoint, Checkpoint(demo_checkpoint))
        assert checkpoint.tied

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes_and_views(self, tmp_path, dtype):
        whole = torch.randn(6, 8).to(dtype)
        torch.save({"whole": whole, "view": whole[::2].T, "n": torch.tensor(3)}, tmp_path / "a.bin")
        found = read_tensors([tmp_path / "a.bin"])
        from model_export.checkpoint.weights.tensors import to_torch

        assert torch.equal(to_torch(found["view"].read()), whole[::2].T)
        assert to_torch(found["whole"].read()).dtype == dtype
        assert found["n"].dtype == "I64"
        assert found["n"].read().item() == 3

    def test_one_that_would_run_code_is_refused_and_runs_nothing(self, edit_checkpoint, tmp_path):
        path = to_bin(edit_checkpoint())
        torch.save({"a": Touch(tmp_path / "ran")}, path / "pytorch_model.bin")
        with pytest.raises(
            CheckpointError, match=r"refers to \w+\.\w+: expected tensors alone"
        ) as e:
            Checkpoint(path)
        assert not (tmp_path / "ran").exists()
        assert "\n" not in str(e.value)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ([1, 2], "holds a list, expected named tensors"),
            ({}, "holds a dict, expected named tensors"),
            ({"step": 3}, "holds 'step' of type int, expected named tensors alone"),
            ({"state_dict": {"a": torch.ones(2)}}, "holds 'state_dict' of type dict"),
            ({"a": torch.eye(2).to_sparse()}, "expected named tensors alone"),
            ({"a": torch.ones(2, dtype=torch.int8)}, "a is stored as int8: expected F32"),
        ],
    )
    def test_anything_but_named_tensors(self, edit_checkpoint, content, words):
        path = to_bin(edit_checkpoint())
        torch.save(content, path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=words):
            Checkpoint(path)

    def test_a_file_of_torch_before_1_6(self, edit_checkpoint):
        path = to_bin(edit_checkpoint())
        state = {"a": torch.ones(2)}
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        with pytest.raises(CheckpointError, match=r"before 1\.6, or damaged\): download it again"):
            Checkpoint(path)

    @SLOW
    @given(share=st.floats(0, 0.9999))
    def test_a_truncated_file(self, tmp_path, share):
        torch.save({"a": torch.arange(300.0), "b": torch.ones(3, 4)}, tmp_path / "whole.bin")
        data = (tmp_path / "whole.bin").read_bytes()
        (tmp_path / "cut.bin").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError, match=r"cut\.bin"):
            read_tensors([tmp_path / "cut.bin"])

    @SLOW
    @given(data=st.data())
    def test_a_damaged_file_reads_or_is_refused(self, tmp_path, data):
        torch.save({"a": torch.arange(30.0)}, tmp_path / "whole.bin")
        content = bytearray((tmp_path / "whole.bin").read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            position = data.draw(st.integers(0, len(content) - 1))
            content[position] = data.draw(st.integers(0, 255))
        (tmp_path / "damaged.bin").write_bytes(content)
        try:
            tensors = read_tensors([tmp_path / "damaged.bin"])
            for tensor in tensors.values():
                tensor.read()
        except FastVLMError as error:
            assert "damaged.bin" in str(error) or "is stored as" in str(error)  # noqa: PT017


@SLOW
@given(
    rows=st.integers(1, 9),
    added=st.integers(0, 4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int64]),
    block=st.integers(1, 40),
    data=st.data(),
)
def test_rows_are_those_of_the_whole(tmp_path, rows, added, dtype, block, data):
    whole = torch.arange(rows * 6).reshape(rows, 2, 3).to(dtype)
    state = {"before": torch.ones(3), "w": whole, "n": torch.tensor(7)}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "a.bin")
    copied = data.draw(st.integers(0, rows - 1))
    longer = torch.cat([whole, whole[copied : copied + 1].expand(added, 2, 3)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "BLOCK_ELEMENTS", block)
        blocks = list(tensors.row_blocks(longer.shape))
    for file in ("a.safetensors", "a.bin"):
        stored = read_tensors([tmp_path / file])
        assert stored["n"].read().item() == 7
        extended = tensors.ExtendedRows(stored["w"], rows + added, copied)
        assert torch.equal(tensors.to_torch(extended.read()), longer)
        found = [tensors.to_torch(extended.read(part)) for part in blocks]
        assert torch.equal(torch.cat(found), longer)
        assert all(part.numel() <= max(block, 6) for part in found)


def test_a_file_that_became_shorter_is_named(tmp_path):
    save_file({"a": torch.ones(100, 100)}, tmp_path / "a.safetensors")
    stored = read_tensors([tmp_path / "a.safetensors"])["a"]
    with (tmp_path / "a.safetensors").open("r+b") as stream:
        stream.truncate(20_000)
    with pytest.raises(CheckpointError, match=r"a\.safetensors can't be read"):
        stored.read()
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors can't be read"):
        stored.read(slice(3, 4))


class Touch:
    """Makes a directory when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_the_trap_is_one(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


class TestTwoInOneDirectory:
    def test_both_forms_of_one_checkpoint_read_the_safetensors(self, edit_checkpoint):
        path = edit_checkpoint()
        shutil.copytree(path, copy := path.parent / "copy")
        shutil.copyfile(to_bin(copy) / "pytorch_model.bin", path / "pytorch_model.bin")
        assert [f.name for f in Checkpoint(path).weight_files] == ["model.safetensors"]

    def test_the_bin_is_read_where_safetensors_are_missing(self, edit_checkpoint):
        path = to_bin(edit_checkpoint())
        index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        assert [f.name for f in Checkpoint(path).weight_files] == ["pytorch_model.bin"]

    def test_an_index_beside_a_single_file(self, edit_checkpoint):
        path = edit_checkpoint()
        shutil.copyfile(path / "model.safetensors", path / "model-00001-of-00001.safetensors")
        index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"holds two checkpoints, model\.safetensors and"):
            Checkpoint(path)

    def test_shards_beside_a_single_bin(self, edit_checkpoint):
        path = to_bin(edit_checkpoint(), 2)
        shutil.copyfile(path / "pytorch_model-00001-of-00002.bin", path / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match="holds two checkpoints"):
            Checkpoint(path)

    @pytest.mark.parametrize(
        "index",
        [
            {"weight_map": {"x": "../model.safetensors"}},
            {"weight_map": {"x": "/etc/passwd"}},
            {"weight_map": {"x": ".."}},
            {"weight_map": {"x": "below/model.safetensors"}},
            {"weight_map": {"x": 3}},
            {"weight_map": []},
            {},
        ],
    )
    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
    def test_an_index_that_is_none_or_points_elsewhere(self, edit_checkpoint, index, name):
        path = edit_checkpoint()
        (path / f"{name}.index.json").write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"weight_map|files of its own directory"):
            Checkpoint(path)


class TestTransformers:
    def test_the_same_model_in_both_layouts_is_the_same_checkpoint(self):
        apple, other = Checkpoint(GOLDEN / "apple"), Checkpoint(GOLDEN / "transformers")
        # timm has no classification head, and nothing computes with it.
        assert_same(other, apple, missing={HEAD_PROJ})
        assert other.config.image_aspect_ratio == apple.config.image_aspect_ratio == "pad"
        assert other.config.vision.image_size == apple.config.vision.image_size == 256
        assert other.tied == apple.tied
        # Stated by Apple's config.json, and in transformers' layout by the tokenizer alone.
        assert other.raw_config["eos_token_id"] == apple.raw_config["eos_token_id"]
        ours, theirs = export_tokenizer(apple), export_tokenizer(other)
        assert ours.image_token_id == theirs.image_token_id == 403
        assert ours.config == theirs.config
        text = "<|im_start|>user\nZahl 1234567, naïve 你好<|im_end|>"
        assert ours.tokenizer.encode(text).ids == theirs.tokenizer.encode(text).ids
        state = other.encoder_state()
        for name, tensor in apple.encoder_state().items():
            if name != "head.proj":
                assert torch.equal(state[name], tensor)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
            ({"multimodal_projector_bias": False}, "multimodal_projector_bias is False"),
            ({"vision_config": {"architecture": "fastvit_mci2"}}, "expected fastvit_mci3"),
            ({"vision_config": {"model_args": {"se_downsamples": [1]}}}, "holds se_downsamples"),
            (
                {"vision_config": {"model_args": {"inference_mode": False}}},
                "inference_mode is false",
            ),
            ({"vision_config": None}, "vision_config is None, expected a JSON object"),
            ({"text_config": {"model_type": "llama"}}, "is 'llama': expected qwen2"),
        ],
    )
    def test_another_model_than_fastvlm(self, tmp_path, change, words):
        path = Path(shutil.copytree(GOLDEN / "transformers", tmp_path / "other"))
        data = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**data, **change}))
        with pytest.raises(ConfigError, match=words):
            Checkpoint(path)

    @pytest.mark.parametrize(
        ("files", "size"),
        [
            ({}, 1024),
            ({"preprocessor_config.json": {"crop_size": {"height": 512, "width": 512}}}, 512),
            ({"preprocessor_config.json": {"size": {"shortest_edge": 384}}}, 384),
            ({"processor_config.json": {"image_processor": {"size": {"height": 448}}}}, 448),
        ],
    )
    def test_the_input_size_is_the_processor_s(self, tmp_path, files, size):
        for name, data in files.items():
            (tmp_path / name).write_text(json.dumps(data))
        raw = {"vision_config": {}, "text_config": {}}
        config = fast_vlm.apple_config(raw, tmp_path)
        assert config["mm_vision_tower"] == f"mobileclip_l_{size}"
        assert config["vision_config"]["embed_dims"] == [96, 192, 384, 768, 1536]
        # What transformers left out equals Qwen2Config's defaults.
        assert (config["rope_theta"], config["num_hidden_layers"]) == (10_000.0, 32)

    @settings(max_examples=150, deadline=None)
    @given(
        st.dictionaries(st.sampled_from(["vision_config", "text_config", *fast_vlm.FIXED]), JSON),
        JSON,
    )
    def test_any_config_is_read_or_refused_in_words(self, tmp_path_factory, raw, processor):
        folder = tmp_path_factory.mktemp("config")
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        try:
            fast_vlm.apple_config(raw, folder)
        except FastVLMError as error:
            assert str(error)  # noqa: PT017


class TestImageSize:
    @pytest.mark.parametrize("layout", ["apple", "transformers"])
    def test_another_input_size_and_its_tokens(self, layout):
        checkpoint = Checkpoint(GOLDEN / layout, image_size=384)
        assert checkpoint.config.vision.num_tokens == 36
        assert checkpoint.raw_config["mm_vision_tower"] == "mobileclip_l_384"
        assert checkpoint.raw_config["vision_config"]["image_size"] == 384

    @pytest.mark.parametrize("size", [0, -64, 100, 1000])
    def test_no_multiple_of_64(self, size):
        from model_export.options import ExportOptions

        with pytest.raises(OptionError, match=f"--image-size is {size}: expected 64 pixels or "):
            ExportOptions.of(image_size=size)


class TestIdentified:
    def test_neither_layout_is_named_with_what_was_found(self, edit_checkpoint):
        path = edit_checkpoint(config=lambda c: c.update(model_type="llava_llama"))
        with pytest.raises(CheckpointError, match=r"'llava_llama'.* or in transformers' \('fast"):
            Checkpoint(path)

    def test_the_directory_above_several_names_them(self, edit_checkpoint, tmp_path):
        for step in (200, 100):
            edit_checkpoint(name=f"training/checkpoint-{step}")
        with pytest.raises(
            CheckpointError,
            match=r"directories of 2 checkpoints \(checkpoint-100, checkpoint-200\): give the one",
        ):
            Checkpoint(tmp_path / "training")

    def test_a_base_for_a_whole_checkpoint(self, demo_checkpoint):
        with pytest.raises(OptionError, match="not an adapter but a checkpoint of its own"):
            Checkpoint(demo_checkpoint, base=demo_checkpoint)

    def test_a_revision_of_a_directory(self, demo_checkpoint):
        with pytest.raises(OptionError, match=r"--revision main is given and .* is a directory"):
            Checkpoint(demo_checkpoint, revision="main")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, demo_checkpoint):
    """huggingface_hub's cache with one repository in it, and no way to the hub."""
    from huggingface_hub import constants

    repository = tmp_path / "cache" / "models--apple--FastVLM-0.5B"
    snapshot = repository / "snapshots" / ("a" * 40)
    blobs = repository / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in demo_checkpoint.iterdir():
        shutil.copyfile(file, blobs / file.name)
        os.symlink(blobs / file.name, snapshot / file.name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


class TestHub:
    @pytest.mark.parametrize("revision", ["", "@main", "@" + "a" * 40])
    def test_a_cached_one_opens_offline(self, hub_cache, demo_checkpoint, revision):
        checkpoint = Checkpoint(f"apple/FastVLM-0.5B{revision}")
        assert_same(checkpoint, Checkpoint(demo_checkpoint))
        assert checkpoint.name == f"apple/FastVLM-0.5B@{'a' * 40}"
        assert checkpoint.source()["files"]["model.safetensors"]["bytes"] > 0

    @pytest.mark.parametrize(
        ("reference", "revision", "words"),
        [
            ("apple/FastVLM-1.5B", None, "FastVLM-1.5B is no directory here and not whole in"),
            ("apple/FastVLM-0.5B", "v2", "at revision v2 is no directory here and not whole"),
        ],
    )
    def test_one_that_is_missing_offline(self, hub_cache, reference, revision, words):
        with pytest.raises(CheckpointError, match=words) as error:
            Checkpoint(reference, revision=revision)
        assert "go online once" in str(error.value)
        assert "\n" not in str(error.value)

    def test_a_path_that_exists_wins(self, hub_cache, demo_checkpoint):
        path = Path("apple/FastVLM-0.5B")
        shutil.copytree(demo_checkpoint, path)
        assert Checkpoint("apple/FastVLM-0.5B").path == path

    def test_two_revisions(self, hub_cache):
        with pytest.raises(OptionError, match="give one"):
            Checkpoint("apple/FastVLM-0.5B@main", revision="v2")

    def test_pickles_are_fetched_only_where_there_are_no_safetensors(self, monkeypatch, tmp_path):
        import huggingface_hub

        asked = []

        def download(repository, *, allow_patterns, **options):
            asked.append(allow_patterns)
            return str(tmp_path)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        hub.locate("apple/FastVLM-0.5B")
        assert ["pytorch_model*.bin" in patterns for patterns in asked] == [False, True]
        (tmp_path / "model.safetensors").write_bytes(b"")
        asked.clear()
        hub.locate("apple/FastVLM-0.5B")
        assert len(asked) == 1

    @pytest.mark.parametrize(
        "reference", ["FastVLM-0.6B", "./apple/FastVLM", "a/b/c", "/no/where", "a/b@", "a b/c"]
    )
    def test_what_is_no_hub_id_is_a_path(self, reference):
        with pytest.raises(CheckpointError, match=r"does not exist.* or a hub id such as"):
            hub.locate(reference)

    @settings(max_examples=200, deadline=None)
    @given(st.text(max_size=12))
    def test_hub_ids_have_one_slash_and_never_climb(self, text):
        if hub.is_hub_id(text):
            assert text.partition("@")[0].count("/") == 1
            assert not text.startswith((".", "/", "~"))
