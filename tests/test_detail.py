"""Each image at the size of its detail, as a bundle loaded for it has it; sizes are never mixed."""

from __future__ import annotations

import gc
import io
import json
from dataclasses import replace
from pathlib import Path

import av
import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

import fastvlm_mlx
from fastvlm_mlx.conversation import Conversation
from fastvlm_mlx.errors import OptionError, PromptError
from fastvlm_mlx.fastvlm import FastVLM
from fastvlm_mlx.language.prompt.messages import image_part
from fastvlm_mlx.vision.program.fusion import PackedConvolution, PackedPair
from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder
from model_export.samples import scenes

QUESTIONS = ("Describe the image.", "How many shapes are there?")
SCENE = scenes.generate(3, held_out=True).draw(256)
WIDE = scenes.generate(4, held_out=True).draw(256).crop((0, 40, 256, 200))
TOKENS = {"auto": 16, "low": 4, "high": 16, "original": 80}
LONG = {"max_tokens": 24, "temperature": 0.0}


@pytest.fixture(scope="module")
def model(sizes_bundle: Path) -> FastVLM:
    return fastvlm_mlx.load(sizes_bundle)


@pytest.fixture
def fresh(model: FastVLM) -> FastVLM:
    """One that has kept nothing yet."""
    return replace(model, _loading_s=[])


@pytest.fixture(scope="module")
def small(sizes_bundle: Path) -> FastVLM:
    return fastvlm_mlx.load(sizes_bundle, image_size=128, kept_bytes=0)


def test_sizes_of_one_image_are_never_mixed(fresh: FastVLM, sizes_bundle: Path) -> None:
    cold = fastvlm_mlx.load(sizes_bundle, kept_bytes=0)
    expected = {
        (detail, question): cold.generate(SCENE, question, detail=detail, max_tokens=8).tokens
        for detail in TOKENS
        for question in QUESTIONS
    }
    for detail in ("auto", "low", "original", "low", "auto", "original", "high"):
        for question in QUESTIONS:
            found = fresh.generate(SCENE, question, detail=detail, max_tokens=8)
            assert found.tokens == expected[detail, question]
            assert found.image_tokens == TOKENS[detail]
    # What is kept is used: the very prompt at the very size.
    assert found.cached_tokens > TOKENS["high"]
    assert fresh.generate(WIDE, QUESTIONS[0], detail="low", max_tokens=2).cached_tokens == 0


@pytest.mark.parametrize("image", [SCENE, WIDE], ids=["square", "wide"])
def test_low_is_the_bundle_loaded_at_its_smallest_size(
    model: FastVLM, small: FastVLM, image: Image.Image
) -> None:
    assert small.sizes.of("auto") == model.sizes.of("low")
    size = model.sizes.of("low")
    pixels = size.inputs(model.image_processor, image)
    assert np.array_equal(pixels, small.image_processor(image))
    seen, expected = model.encode(image, "low"), small.encode(image)
    assert np.array_equal(seen.features, expected.features)
    for question in QUESTIONS:
        found = model.generate(image, question, detail="low", **LONG)
        assert found.tokens == small.generate(image, question, **LONG).tokens
        # Features have their detail, whatever stands beside them, and suit the same bundle.
        assert model.generate(expected, question, detail="original", **LONG).tokens == found.tokens
        assert small.generate(seen, question, **LONG).tokens == found.tokens


def test_original_is_an_overview_and_tiles_row_by_row(model: FastVLM) -> None:
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200), (200, 200, 10)]
    image = Image.new("RGB", (640, 640))
    for place, colour in enumerate(colours):
        image.paste(colour, (320 * (place % 2), 320 * (place // 2), 640, 640))
    inputs = model.sizes.of("original").inputs(model.image_processor, image)
    assert inputs.shape == (5, 3, 256, 256)
    assert np.array_equal(inputs[:1], model.image_processor(image))
    for tile, colour in zip(inputs[1:], colours, strict=True):
        assert np.array_equal(np.rint(tile[:, 128, 128] * 255), colour)
    whole = replace(model.image_processor, size=512)(WIDE)[0]
    tiles = model.sizes.of("original").inputs(model.image_processor, WIDE)[1:]
    rows = [np.concatenate(tiles[place : place + 2], 2) for place in (0, 2)]
    assert np.array_equal(np.concatenate(rows, 1), whole)

    seen = model.encode(image, "original")
    each = [model.project(model.encoder(inputs[place : place + 1])) for place in range(5)]
    assert np.array_equal(seen.features, np.concatenate([one.features for one in each]))
    assert mx.array_equal(seen.projected, mx.concatenate([one.projected for one in each]))
    elsewhere = model.project(seen.features, "original")
    assert mx.array_equal(elsewhere.projected, seen.projected)
    expected = model.generate(image, QUESTIONS[0], detail="original", max_tokens=8)
    assert model.generate(elsewhere, QUESTIONS[0], max_tokens=8).tokens == expected.tokens


def test_an_overview_is_encoded_once(fresh: FastVLM) -> None:
    encoder, seen = fresh.encoder, []
    fresh._encoders[256] = lambda pixels: (seen.append(1), encoder(pixels))[1]
    assert fresh.encode(SCENE).timings.encode_s > 0
    original = fresh.encode(SCENE, "original")
    assert len(seen) == 5
    assert original.timings.encode_s > 0 == fresh.encode(SCENE, "original").timings.encode_s
    assert len(seen) == 5


def test_a_size_is_opened_when_it_is_asked_for(fresh: FastVLM) -> None:
    fresh.encode(SCENE, "low")
    assert list(fresh._encoders) == [128]
    assert fresh.encoder_for("low").image_size == 128
    assert fresh.encoder.image_size == fresh.encoder_for("original").image_size == 256


def memory(encoder: MLProgramEncoder) -> set[int]:
    """Where its weights are, those that are laid out for oneDNN too."""
    convolutions = [
        part
        for step in encoder._program._steps
        for part in (
            [step.compute.first, step.compute.second]
            if isinstance(step.compute, PackedPair)
            else [step.compute]
        )
        if isinstance(part, PackedConvolution)
    ]
    return {id(t) for t in encoder.constants.values()} | {id(c._weight) for c in convolutions}


@pytest.mark.parametrize("compute", [None, "float32"])
def test_sizes_of_a_package_share_their_weights(sizes_bundle: Path, compute: str | None) -> None:
    package = sizes_bundle / "fastvithd.mlpackage"
    large = MLProgramEncoder(package, 256, compute)
    small = MLProgramEncoder(package, 128, compute, large)
    alone = MLProgramEncoder(package, 128, compute)
    pixels = np.random.default_rng(0).random((1, 3, 128, 128), np.float32)
    assert np.array_equal(small(pixels), alone(pixels))
    # oneDNN lays out a few for one size only.
    assert len(memory(small) - memory(large)) < 0.2 * len(memory(small))
    assert not memory(small) & memory(alone)
    # The first one may go.
    del large
    gc.collect()
    assert np.array_equal(small(pixels), alone(pixels))


def test_sizes_in_mlx_share_their_weights(mlx_bundle: Path) -> None:
    model = fastvlm_mlx.load(mlx_bundle, image_size=128)
    small, large = model.encoder, model.encoder_for("high")
    assert (small.image_size, large.image_size, large.num_tokens) == (128, 256, 16)
    assert small._layers is large._layers


def test_images_of_one_prompt_choose_each_for_itself(fresh: FastVLM, tmp_path: Path) -> None:
    path = str(tmp_path / "scene.png")
    SCENE.save(path)
    parts = [image_part(path, "low"), image_part(WIDE), image_part(SCENE, "original")]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTIONS[0]}]}]
    found = fresh.chat(messages, max_tokens=8).result
    assert found.image_tokens == 4 + 16 + 80
    features = [fresh.encode(SCENE, "low"), WIDE, fresh.encode(SCENE, "original")]
    assert fresh.generate(features, QUESTIONS[0], max_tokens=8).tokens == found.tokens

    talk = Conversation(fresh, max_tokens=8)
    assert talk.ask(QUESTIONS[0], path, detail="low").result.image_tokens == 4
    assert talk.ask(QUESTIONS[1], path).result.image_tokens == 4 + 16
    talk.save(tmp_path / "talk.json")
    again = Conversation.load(fresh, tmp_path / "talk.json", max_tokens=8)
    assert again.messages == talk.messages
    answers = [each.ask("Where?").result for each in (talk, again)]
    assert answers[0].tokens == answers[1].tokens
    assert answers[1].image_tokens == 4 + 16


def test_a_batch_is_what_each_is_alone(model: FastVLM) -> None:
    for detail in ("low", "original"):
        batch = model.batch([SCENE, WIDE], QUESTIONS[1], detail=detail, max_tokens=8)
        for image, found in zip((SCENE, WIDE), batch, strict=True):
            alone = model.generate(image, QUESTIONS[1], detail=detail, max_tokens=8)
            assert found.tokens == alone.tokens


def test_a_bundle_of_one_size_has_it_in_every_detail(demo_bundle: Path) -> None:
    sizes = fastvlm_mlx.load(demo_bundle).sizes
    assert sizes.of("low") == sizes.of("high") == sizes.of("auto")
    assert sizes.of("original").num_tokens == 5 * sizes.of("auto").num_tokens


def test_mlx_has_the_sizes_of_its_export_and_the_one_that_was_loaded(mlx_bundle: Path) -> None:
    model = fastvlm_mlx.load(mlx_bundle, image_size=192)
    assert [size.pixels for size in model.sizes] == [192, 192, 256, 192]
    own, large = fastvlm_mlx.load(mlx_bundle), model.encode(SCENE, "high")
    assert np.array_equal(large.features, own.encode(SCENE).features)
    for detail, peer in (("high", own), ("auto", fastvlm_mlx.load(mlx_bundle, image_size=192))):
        found = model.generate(SCENE, QUESTIONS[0], detail=detail, max_tokens=8)
        assert found.tokens == peer.generate(SCENE, QUESTIONS[0], max_tokens=8).tokens


class TestTheCommands:
    @pytest.fixture
    def loaded(self, model: FastVLM, monkeypatch: pytest.MonkeyPatch) -> None:
        """Loading takes no time."""
        monkeypatch.setattr("fastvlm_mlx.loading.load", lambda *_, **__: model)
        monkeypatch.setattr("fastvlm_mlx.mapping.job.load", lambda *_, **__: model)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        SCENE.save(folder / "scene.png")
        return folder

    @pytest.mark.usefixtures("loaded")
    def test_generate(self, fastvlm, model: FastVLM, folder: Path, sizes_bundle: Path) -> None:
        image = folder / "scene.png"
        words = ["generate", sizes_bundle, "--image", image, "--prompt", QUESTIONS[0], "--detail"]
        for detail in ("low", "original"):
            status, out, err = fastvlm(*words, detail, "--json")
            (answer,) = json.loads(out)["answers"]
            expected = model.generate(image, QUESTIONS[0], detail=detail)
            assert (status, answer["text"]) == (0, expected.text)
            assert answer["image_tokens"] == TOKENS[detail]
            assert ("trained without tiles" in err) == (detail == "original")
        status, out, err = fastvlm(*words, "medium")
        assert (status, out) == (2, "")
        assert err.startswith("error: the detail of an image is 'medium': expected one of auto")

    @pytest.mark.usefixtures("loaded")
    def test_generate_about_a_video(
        self, fastvlm, model: FastVLM, tmp_path: Path, sizes_bundle: Path
    ) -> None:
        clip = tmp_path / "clip.mp4"
        write_clip(clip, [SCENE, SCENE])
        words = ["generate", sizes_bundle, "--video", clip, "--prompt", QUESTIONS[0], "--json"]
        (answer,) = json.loads(fastvlm(*words, "--detail", "low")[1])["answers"]
        assert answer["image_tokens"] == 2 * TOKENS["low"]
        captions = json.loads(fastvlm(*words, "--detail", "low", "--every", "9")[1])["captions"]
        assert [each["image_tokens"] for each in captions] == [TOKENS["low"]]

    @pytest.mark.usefixtures("loaded")
    def test_chat(
        self,
        fastvlm,
        model: FastVLM,
        folder: Path,
        sizes_bundle: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.stdin", io.StringIO(f"scene.png {QUESTIONS[0]}\n"))
        status, out, _ = fastvlm("chat", sizes_bundle, "--detail", "low")
        expected = model.generate("scene.png", QUESTIONS[0], detail="low").text
        assert (status, out.strip()) == (0, expected)
        assert expected != model.generate("scene.png", QUESTIONS[0]).text

    @pytest.mark.usefixtures("loaded")
    def test_map(self, fastvlm, folder: Path, tmp_path: Path, sizes_bundle: Path) -> None:
        out = tmp_path / "captions.jsonl"
        words = ["map", sizes_bundle, folder, "--prompt", QUESTIONS[0], "--out", out]
        assert fastvlm(*words, "--detail", "low")[0] == 0
        assert json.loads(out.read_text())["image_tokens"] == TOKENS["low"]
        status, _, err = fastvlm(*words)
        assert (status, 'was begun with detail "low", not "auto"' in err) == (2, True)


def write_clip(path: Path, images: list[Image.Image]) -> None:
    """A frame each second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 256
        stream.pix_fmt = "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode(None))


class TestRefused:
    @pytest.mark.parametrize("detail", ["medium", "", None, 3, ["low"]])
    def test_what_is_no_detail(self, model: FastVLM, detail: object) -> None:
        message = {"role": "user", "content": [image_part("nowhere.png", detail)]}
        message["content"].append({"type": "text", "text": "What?"})
        asks = (
            lambda: model.encode("nowhere.png", detail),
            lambda: model.generate("nowhere.png", "What?", detail=detail),
            lambda: model.batch(["nowhere.png"], "What?", detail=detail),
            lambda: model.chat([message]),
        )
        for ask in asks:
            with pytest.raises(OptionError, match=r"detail .* expected one of auto, low, high, or"):
                ask()

    def test_more_tokens_than_the_context_has(self, model: FastVLM) -> None:
        def in_context(places: int) -> FastVLM:
            text = replace(model.config.text, max_position_embeddings=places)
            return replace(model, config=replace(model.config, text=text))

        one = "the image has 80 tokens and the context is 79: give it a lower detail"
        with pytest.raises(PromptError, match=one):
            in_context(79).generate("nowhere.png", "What?", detail="original")
        prompt = r"the prompt has 1\d\d tokens and the context is 90: give the image a lower detail"
        with pytest.raises(PromptError, match=prompt):
            in_context(90).generate("nowhere.png", "What?", detail="original")
        several = [image_part("nowhere.png", detail) for detail in ("low", "original")]
        content = [*several, {"type": "text", "text": "What?"}]
        with pytest.raises(PromptError, match="2 images of 84 tokens and the context is 83: give"):
            in_context(83).chat([{"role": "user", "content": content}])

    def test_features_of_another_size(self, model: FastVLM, mlx_bundle: Path) -> None:
        other = fastvlm_mlx.load(mlx_bundle, image_size=192)
        with pytest.raises(OptionError, match="another model's, or of another image size"):
            model.generate(other.encode(SCENE), "What?")
        tiles = model.encode(SCENE, "original")
        with pytest.raises(OptionError, match="expected an MLX array"):
            model.generate(replace(tiles, projected=tiles.projected[:16]), "What?")
        with pytest.raises(OptionError, match=r"shape \[1, 16, .*\]: expected \[5, 16"):
            model.project(model.encode(SCENE).features, "original")
