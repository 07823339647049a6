"""Reading a checkpoint: what is found, what is decided, and what is refused with which words."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import model_export
from fastvlm_mlx.bundle.config import FastVLMConfig, TextConfig, VisionConfig
from fastvlm_mlx.errors import CheckpointError, ConfigError, FastVLMError
from model_export.checkpoint.checkpoint import Checkpoint
from model_export.checkpoint.tokenizer import export_tokenizer, extended

EMBEDDING = "model.embed_tokens.weight"
# The demo's tokenizer: a vocabulary and three control tokens.
VOCABULARY = Path(model_export.__file__).parent / "demo" / "checkpoint" / "vocab.json"
ROWS_IN_USE = len(json.loads(VOCABULARY.read_text())) + 3


def test_the_demo_checkpoint_is_apple_s_layout(demo_checkpoint):
    checkpoint = Checkpoint(demo_checkpoint)
    stored = load_file(demo_checkpoint / "model.safetensors")
    assert set(checkpoint.tensors) == set(stored)
    assert checkpoint.tied
    assert checkpoint.config.image_aspect_ratio == "pad"
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.tensor(name), tensor.float())
    state = checkpoint.encoder_state()
    assert len(state) == sum("vision_tower" in name for name in stored)


def test_several_files_with_an_index_read_as_one(edit_checkpoint, demo_checkpoint):
    path = edit_checkpoint()
    state = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        part = {name: state[name] for name in names[i::3]}
        save_file(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    checkpoint = Checkpoint(path)
    whole = Checkpoint(demo_checkpoint)
    assert len(checkpoint.weight_files) == 3
    for name in names:
        assert torch.equal(checkpoint.tensor(name), whole.tensor(name))
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is missing"):
        Checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_dtype_reads_the_same_numbers(edit_checkpoint, demo_checkpoint, dtype):
    path = edit_checkpoint()
    state = load_file(path / "model.safetensors")
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    save_file(state, path / "model.safetensors")
    checkpoint = Checkpoint(path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(checkpoint.tensor(name), state[name].float())


class TestVocabulary:
    """The tensors decide how many rows there are, not config.json."""

    @pytest.mark.parametrize("change", [64, -1])
    def test_rows_that_config_json_does_not_know(self, edit_checkpoint, change):
        def resize(tensors):
            matrix = tensors[EMBEDDING]
            tensors[EMBEDDING] = torch.cat([matrix, matrix[:64]])[: len(matrix) + change]

        plain = Checkpoint(edit_checkpoint(name="plain")).config.text.vocab_size
        checkpoint = Checkpoint(edit_checkpoint(tensors=resize))
        assert checkpoint.config.text.vocab_size == plain + change
        assert {s.shape for s in checkpoint.llm_specs if s.source == EMBEDDING} == {
            checkpoint.tensors[EMBEDDING].shape
        }

    @pytest.mark.parametrize("head", [None, "redundant", "own"])
    def test_a_full_one_grows_by_rows_that_are_never_chosen(self, edit_checkpoint, head):
        def fill(tensors):
            tensors[EMBEDDING] = tensors[EMBEDDING][:ROWS_IN_USE]
            if head:
                tensors["lm_head.weight"] = tensors[EMBEDDING] + 0.01 * (head == "own")

        checkpoint = Checkpoint(edit_checkpoint(tensors=fill))
        exported = export_tokenizer(checkpoint)
        assert exported.image_token_id == ROWS_IN_USE
        grown = extended(checkpoint, exported.tokenizer, exported.image_token_id + 1)
        rows = grown.config.text.vocab_size
        assert rows % 64 == 0
        assert ROWS_IN_USE < rows <= ROWS_IN_USE + 64
        assert grown.tied == (head != "own")
        name = EMBEDDING if grown.tied else "lm_head.weight"
        matrix = grown.tensor(name)
        assert torch.equal(matrix[:ROWS_IN_USE], checkpoint.tensor(name))
        start = exported.tokenizer.token_to_id("<|im_start|>")
        assert torch.equal(
            matrix[ROWS_IN_USE:], matrix[start].expand(rows - ROWS_IN_USE, matrix.shape[1])
        )
        # Any hidden state, one under which every other logit is below zero among them.
        hidden = torch.randn(500, matrix.shape[1], generator=torch.Generator().manual_seed(1))
        hidden = torch.cat([hidden, -matrix[:ROWS_IN_USE].mean(0, keepdim=True)])
        assert int((hidden @ matrix.T).argmax(1).max()) < ROWS_IN_USE
        assert extended(checkpoint, exported.tokenizer, ROWS_IN_USE) is checkpoint


class TestTies:
    """`tie_word_embeddings` of config.json is not believed."""

    def test_a_redundant_head_is_tied(self, edit_checkpoint):
        def add_head(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

        path = edit_checkpoint(
            tensors=add_head, config=lambda c: c.update(tie_word_embeddings=False)
        )
        checkpoint = Checkpoint(path)
        assert checkpoint.tied
        assert "language_model.lm_head.weight" not in {s.name for s in checkpoint.llm_specs}

    def test_a_head_of_its_own_is_not(self, edit_checkpoint):
        def add_head(tensors):
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.01

        path = edit_checkpoint(
            tensors=add_head, config=lambda c: c.update(tie_word_embeddings=True)
        )
        checkpoint = Checkpoint(path)
        assert not checkpoint.tied
        assert "language_model.lm_head.weight" in {s.name for s in checkpoint.llm_specs}


class TestRefused:
    def test_a_path_that_does_not_exist(self, tmp_path):
        with pytest.raises(CheckpointError, match="does not exist: expected a checkpoint"):
            Checkpoint(tmp_path / "nothing")

    def test_a_file(self, demo_checkpoint):
        with pytest.raises(CheckpointError, match="is a file: expected the directory"):
            Checkpoint(demo_checkpoint / "model.safetensors")

    def test_a_directory_that_is_no_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"holds no config\.json"):
            Checkpoint(tmp_path)

    def test_another_architecture_is_named(self, edit_checkpoint):
        path = edit_checkpoint(
            config=lambda c: c.update(model_type="qwen2_vl", architectures=["Qwen2VLForX"])
        )
        with pytest.raises(CheckpointError, match=r"model_type 'qwen2_vl' \(Qwen2VLForX\)"):
            Checkpoint(path)

    def test_a_config_that_is_not_json(self, edit_checkpoint):
        path = edit_checkpoint()
        (path / "config.json").write_text('{"model_type": ')
        with pytest.raises(CheckpointError, match="can't be read as JSON"):
            Checkpoint(path)

    def test_no_weights(self, edit_checkpoint):
        path = edit_checkpoint()
        (path / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match="holds no weights"):
            Checkpoint(path)

    @settings(
        max_examples=25,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(share=st.floats(0, 0.9999))
    def test_a_truncated_file(self, demo_checkpoint, tmp_path, share):
        path = tmp_path / "cut"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(demo_checkpoint, path)
        data = (demo_checkpoint / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError, match=r"is not a whole safetensors file.*download"):
            Checkpoint(path)

    def test_an_index_that_points_elsewhere(self, edit_checkpoint):
        path = edit_checkpoint()
        index = path / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"x": "../model.safetensors"}}))
        with pytest.raises(CheckpointError, match="expected files of its own directory"):
            Checkpoint(path)

    def test_the_same_tensor_twice(self, edit_checkpoint):
        path = edit_checkpoint()
        shutil.copyfile(path / "model.safetensors", path / "other.safetensors")
        with pytest.raises(CheckpointError, match=r"is in both model\.safetensors and other"):
            Checkpoint(path)

    def test_a_quantized_checkpoint(self, edit_checkpoint):
        def pack(tensors):
            name = "model.layers.0.mlp.up_proj.weight"
            tensors[name] = tensors[name].to(torch.int8)

        with pytest.raises(CheckpointError, match="is stored as I8: expected"):
            Checkpoint(edit_checkpoint(tensors=pack))

    def test_infinity_in_the_encoder(self, edit_checkpoint):
        name = "model.vision_tower.vision_tower.model.conv_exp.reparam_conv.bias"

        def spoil(tensors):
            tensors[name][0] = float("inf")

        checkpoint = Checkpoint(edit_checkpoint(tensors=spoil))
        with pytest.raises(CheckpointError, match=r"conv_exp\.reparam_conv\.bias holds NaN"):
            checkpoint.encoder_state()

    def test_no_tokenizer(self, edit_checkpoint):
        path = edit_checkpoint()
        (path / "vocab.json").unlink()
        with pytest.raises(CheckpointError, match="holds no tokenizer"):
            export_tokenizer(Checkpoint(path))

    def test_a_damaged_tokenizer(self, edit_checkpoint):
        path = edit_checkpoint()
        (path / "vocab.json").write_text("[]")
        with pytest.raises(CheckpointError, match=r"vocab\.json holds a list"):
            export_tokenizer(Checkpoint(path))

    @pytest.mark.parametrize(
        ("name", "change", "words"),
        [
            ("vocab.json", {"nd": 2**31}, r"vocab\.json: .*expected int <= "),
            ("vocab.json", {"nd": "3"}, r"vocab\.json: .*expected int"),
            (
                "special_tokens_map.json",
                {"eos_token": {"content": "<|im_end|>", "a\0b": 1}},
                r"gives a token the property 'a.*, expected __type, content",
            ),
        ],
    )
    def test_a_tokenizer_that_would_be_read_for_hours(self, edit_checkpoint, name, change, words):
        path = edit_checkpoint()
        data = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(data | change))
        with pytest.raises(CheckpointError, match=words):
            export_tokenizer(Checkpoint(path))

    def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(self, edit_checkpoint):
        def shrink(tensors):
            tensors[EMBEDDING] = tensors[EMBEDDING][: ROWS_IN_USE - 1]

        path = edit_checkpoint(tensors=shrink)
        words = f"as id {ROWS_IN_USE - 1} and the embedding has {ROWS_IN_USE - 1} rows"
        with pytest.raises(CheckpointError, match=words):
            export_tokenizer(Checkpoint(path))


class TestTokenizer:
    def test_the_slow_form_becomes_tokenizer_json_with_the_same_ids(self, demo_checkpoint):
        from transformers import Qwen2Tokenizer

        exported = export_tokenizer(Checkpoint(demo_checkpoint))
        reference = Qwen2Tokenizer.from_pretrained(str(demo_checkpoint))
        text = "<|im_start|>user\nWhere is the 42 — 'n' naïve 猫?\r\n  <|im_end|>"
        assert exported.tokenizer.encode(text).ids == reference.encode(text)
        assert exported.image_token_id == len(reference)
        assert exported.config["tokenizer_class"] == "Qwen2Tokenizer"

    def test_one_that_has_tokenizer_json_keeps_its_image_token(self, edit_checkpoint):
        path = edit_checkpoint()
        first = export_tokenizer(Checkpoint(path))
        first.save(path)
        assert export_tokenizer(Checkpoint(path)).image_token_id == first.image_token_id


class TestConfig:
    def test_the_tower_s_name_holds_the_input_size(self):
        assert VisionConfig.from_tower_name("mobileclip_l_1024") == VisionConfig()
        assert VisionConfig.from_tower_name("apple/mobileclip_l_384").num_tokens == 36
        with pytest.raises(ConfigError, match="1000 is not a positive multiple of 64"):
            VisionConfig.from_tower_name("mobileclip_l_1000")
        with pytest.raises(ConfigError, match="expected mobileclip_l_SIZE"):
            VisionConfig.from_tower_name("openai/clip-vit-large-patch14")

    def test_what_it_writes_it_reads(self):
        config = VisionConfig(image_size=256, embed_dims=(16, 32, 64, 128, 256))
        assert VisionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_scaled_rope_is_refused(self):
        data = {"rope_scaling": {"type": "yarn", "factor": 4.0}}
        with pytest.raises(ConfigError, match="scales RoPE"):
            TextConfig.from_dict(data)

    @settings(max_examples=150, deadline=None)
    @given(
        st.dictionaries(
            st.sampled_from(
                [
                    "model_type",
                    "hidden_size",
                    "num_hidden_layers",
                    "intermediate_size",
                    "num_attention_heads",
                    "num_key_value_heads",
                    "vocab_size",
                    "vision_config",
                    "mm_vision_tower",
                    "mm_hidden_size",
                    "rope_theta",
                    "mm_projector_type",
                ]
            ),
            st.one_of(
                st.none(),
                st.integers(-5, 5000),
                st.floats(),
                st.text(max_size=4),
                st.just("llava_qwen2"),
                st.lists(st.integers(), max_size=3),
            ),
        )
    )
    def test_any_config_is_read_or_refused_in_words(self, data):
        with suppress(FastVLMError):
            FastVLMConfig.from_dict({"model_type": "llava_qwen2", **data})


class TestOutside:
    """Nothing outside of a checkpoint's directory is read, and none of it gets into a bundle."""

    @pytest.mark.parametrize(
        "name", ["config.json", "model.safetensors", "vocab.json", "generation_config.json"]
    )
    def test_a_link_that_leads_out(self, edit_checkpoint, tmp_path, name):
        path = edit_checkpoint()
        (path / name).rename(tmp_path / "elsewhere")
        (path / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=f"{name} is a link that leads out of"):
            self.read(path)

    def read(self, path):
        checkpoint = Checkpoint(path)
        return export_tokenizer(checkpoint), checkpoint.generation_config

    def test_what_a_usb_stick_leaves(self, edit_checkpoint):
        path = edit_checkpoint()
        for name in ("._model.safetensors", "._config.json", ".DS_Store"):
            (path / name).write_bytes(b"\0\5\x16\7")
        assert Checkpoint(path).weight_files == [path / "model.safetensors"]

    def test_weights_that_are_replaced_while_they_are_read(self, edit_checkpoint):
        path = edit_checkpoint()
        checkpoint = Checkpoint(path)
        checkpoint.source()
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.safetensors changed while it was read"):
            checkpoint.source()

    @pytest.mark.parametrize(
        "reference", [None, 3, b"path", "a\0b", "~nobody-at-all/x", "n" * 5000]
    )
    def test_what_is_no_path(self, reference):
        with pytest.raises(CheckpointError):
            Checkpoint(reference)
