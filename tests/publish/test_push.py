"""A bundle pushed to a hub: what arrives there, what its card says, what is refused."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest
from hub_server import READS, WRITES
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import BundleError
from model_export.gates.verify import verify
from model_export.publish.card import model_card
from model_export.publish.push import plan

PUSH = ("-m", "fastvlm_mlx", "push")
APPLE = "apple/FastVLM-0.5B@" + "a" * 40


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def sentence(done):
    """The one line that an error is."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def manifest(demo_bundle):
    return json.loads((demo_bundle / "manifest.json").read_text())


@pytest.fixture
def card(tmp_path, manifest):
    """The card of a manifest with parts replaced: its metadata as the hub reads it, its text."""

    def make(**parts):
        path = tmp_path / "README.md"
        path.write_text(model_card(manifest | parts, "owner/name"), encoding="utf-8")
        loaded = ModelCard.load(path)
        return loaded.data.to_dict(), loaded.text

    return make


class TestUpload:
    def test_what_arrives_is_the_bundle_and_its_card(
        self, hub, with_hub, demo_bundle, tmp_path, monkeypatch, capsys
    ):
        done = with_hub(*PUSH, demo_bundle, "owner/name", "--private", HF_TOKEN=WRITES)
        assert done.returncode == 0, done.stderr
        assert f"{hub.url}/owner/name/commit/" in done.stdout
        arrived = dict(hub.repositories["owner/name"])
        written = arrived.pop("README.md").decode()
        del arrived[".gitattributes"]
        assert arrived == contents(demo_bundle)
        assert hub.private == {"owner/name"}
        assert [message.partition(" with ")[0] for message, _ in hub.commits] == ["Upload bundle"]
        dry = with_hub(*PUSH, demo_bundle, "owner/name", "--dry-run", HF_HUB_OFFLINE="1")
        assert (dry.returncode, dry.stdout) == (0, written)
        monkeypatch.chdir(tmp_path)
        self.check_the_commands_of_the_card(written, with_hub, tmp_path, capsys)

    def check_the_commands_of_the_card(self, written, with_hub, folder, capsys):
        """What the card tells its reader to run gives the bundle back, and an answer."""
        from model_export.samples import scenes

        scenes.generate(11, held_out=True).draw(256).save(folder / "photo.jpg", quality=95)
        console = re.findall(r"^\$ (.*)", written, re.MULTILINE)
        install, download, generate = (line.split(" ", 1) for line in console)
        # In a clone: the package is on no index.
        assert install[1] == 'install ".[export]"'
        hf = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
        got = with_hub("-c", hf, *download[1].split(), HF_TOKEN=WRITES)
        assert got.returncode == 0, got.stderr
        command = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', generate[1])]
        answer = with_hub("-m", "fastvlm_mlx", *command)
        assert answer.returncode == 0, answer.stderr
        (code,) = re.findall(r"```python\n(.*?)```", written, re.DOTALL)
        capsys.readouterr()
        exec(code)
        assert capsys.readouterr().out == answer.stdout
        assert len(answer.stdout.split()) > 3
        verify(folder / "name", None, {}, lambda stage, done: None)

    def test_an_upload_that_broke_goes_on_where_it_was(self, hub, with_hub, demo_bundle):
        hub.failing["commit"] = 503
        broken = with_hub(*PUSH, demo_bundle, "owner/name", HF_TOKEN=WRITES)
        assert "run the same command again" in sentence(broken)
        assert set(hub.repositories["owner/name"]) == {".gitattributes"}
        sent = len(hub.puts)
        assert sent == 3
        hub.failing.clear()
        again = with_hub(*PUSH, demo_bundle, "owner/name", HF_TOKEN=WRITES)
        assert again.returncode == 0, again.stderr
        assert len(hub.puts) == sent

    def test_a_branch_where_another_bundle_was(self, hub, with_hub, demo_bundle):
        package = "fastvithd.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
        old = {
            "manifest.json": b"{}",
            "model-00001-of-00002.safetensors": b"old",
            "encoder.mlpackage/Data/weight.bin": b"old",
            package: b"old",
            "photo.png": b"mine",
        }
        hub.repositories["owner/name"] = dict(old)
        arguments = ("--revision", "four-bits", "--message", "Four bits")
        done = with_hub(*PUSH, demo_bundle, "owner/name", *arguments, HF_TOKEN=WRITES)
        assert done.returncode == 0, done.stderr
        assert hub.repositories["owner/name"] == old
        arrived = hub.repositories["owner/name@four-bits"]
        assert b"--revision four-bits --local-dir name\n" in arrived.pop("README.md")
        assert arrived.pop("photo.png") == b"mine"
        assert arrived == contents(demo_bundle)
        gone = ["encoder.mlpackage/Data/weight.bin", "model-00001-of-00002.safetensors"]
        assert hub.commits == [("Four bits", gone)]

    def test_a_large_file_that_is_refused(self, hub, with_hub, demo_bundle):
        hub.failing["large"] = 403
        said = sentence(with_hub(*PUSH, demo_bundle, "owner/name", HF_TOKEN=WRITES))
        assert "owner/name can't be uploaded to (403 Forbidden" in said
        assert hub.commits == []

    def test_a_card_that_the_hub_does_not_take(self, hub, with_hub, bundle_copy):
        (bundle_copy / "README.md").write_text("---\nlicense: {}\n---\n# Mine\n")
        said = sentence(with_hub(*PUSH, bundle_copy, "owner/name", HF_TOKEN=WRITES))
        assert 'Invalid metadata in README.md. - "license" must be a string' in said
        assert hub.puts == []

    @pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
    def test_a_model_that_is_no_bundle_is_not_replaced(self, hub, with_hub, demo_bundle, weights):
        hub.repositories["owner/name"] = {"config.json": b"{}", weights: b"mine"}
        done = with_hub(*PUSH, demo_bundle, "owner/name", HF_TOKEN=WRITES)
        assert f"holds a model that is not a bundle ({weights})" in sentence(done)
        assert hub.repositories["owner/name"][weights] == b"mine"

    def test_what_is_public_does_not_become_private_silently(self, hub, with_hub, demo_bundle):
        hub.repositories["owner/name"] = {}
        done = with_hub(*PUSH, demo_bundle, "owner/name", "--private", HF_TOKEN=WRITES)
        assert "owner/name exists and is public" in sentence(done)
        assert hub.repositories["owner/name"] == {}

    @pytest.mark.parametrize(
        ("environment", "words"),
        [
            ({}, "no token of the Hugging Face hub is found: log in with `hf auth login`"),
            ({"HF_TOKEN": "hf_old"}, "does not accept the token: log in again"),
            ({"HF_TOKEN": READS}, "the token may not write to owner/name"),
            ({"HF_TOKEN": WRITES, "HF_ENDPOINT": "http://127.0.0.1:9"}, "hub can't be reached"),
            ({"HF_TOKEN": WRITES, "HF_HUB_OFFLINE": "1"}, "hub can't be reached"),
        ],
    )
    def test_what_the_hub_refuses_is_one_sentence(
        self, hub, with_hub, demo_bundle, environment, words
    ):
        assert words in sentence(with_hub(*PUSH, demo_bundle, "owner/name", **environment))
        assert hub.repositories == {}


class TestPlan:
    @pytest.mark.parametrize(
        "name", ["name", "a/b/c", "a b/c", "../x", "a/b@main", "", "a/-b", "a/"]
    )
    def test_a_name_that_is_none(self, demo_bundle, name):
        from fastvlm_mlx.errors import OptionError

        with pytest.raises(OptionError, match=r"is no name of a repository|names no owner"):
            plan(demo_bundle, name)

    def test_a_bundle_that_changed(self, bundle_copy):
        with (bundle_copy / "model.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
        with pytest.raises(BundleError, match="it changed since export"):
            plan(bundle_copy, "owner/name")

    def test_a_bundle_without_a_manifest(self, bundle_copy):
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=r"has no manifest\.json.*`hf upload`"):
            plan(bundle_copy, "owner/name")

    def test_failed_gates(self, bundle_copy, manifest):
        from fastvlm_mlx.errors import GateError

        gates = [dict(gate) for gate in manifest["gates"]]
        gates[0] |= {"value": 12.5, "passed": False}
        failed = manifest | {"gates": gates, "gates_passed": False}
        (bundle_copy / "manifest.json").write_text(json.dumps(failed))
        with pytest.raises(GateError, match=r"\(encoder SNR\).*--allow-failed-gates"):
            plan(bundle_copy, "owner/name")
        card = plan(bundle_copy, "owner/name", allow_failed_gates=True).card
        assert "**It failed a gate of the export**" in card
        assert "| encoder SNR | 12.5 dB | ≥ 35 dB | FAILED |" in card

    def test_a_card_in_the_bundle_is_the_card(self, bundle_copy):
        (bundle_copy / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
        upload = plan(bundle_copy, "owner/name")
        assert upload.card.endswith("# Mine\n")
        assert "README.md" not in upload.files

    def test_only_the_bundle_s_own_files_go(self, bundle_copy):
        before = Bundle.open(bundle_copy).files
        (bundle_copy / ".DS_Store").write_text("no part of it")
        assert plan(bundle_copy, "owner/name").files == tuple(before)

    @pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../b"])
    def test_a_manifest_that_lists_what_is_outside(self, bundle_copy, manifest, name):
        files = manifest["files"] | {name: {"bytes": 1, "sha256": "0" * 64}}
        (bundle_copy / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(BundleError, match="no file inside the bundle"):
            plan(bundle_copy, "owner/name")


class TestCard:
    def test_the_demo_s(self, card):
        data, text = card()
        assert data == {
            "library_name": "fastvlm-mlx",
            "license": "mit",
            "pipeline_tag": "image-text-to-text",
            "tags": ["fastvlm", "fastvithd", "mlx", "coreml", "4-bit"],
        }
        assert "| source | `fastvlm-demo`, Apple's layout |" in text
        assert "FastViTHD in fp16: 256×256 pixels → 16 tokens of 512 channels; 2.6 MB" in text
        assert "4 bits in groups of 64: 5.826 bits per weight, 731,520 parameters" in text
        assert "(`multi_modal_projector.linear_0.weight`, `multi_modal" in text
        assert re.search(r"\| KL divergence \| \S+ nats \| ≤ 2\.\d+e-06 nats \| passed \|", text)
        assert "coremltools 9" in text
        assert "fastvlm install" not in text
        assert "mlx_vlm" not in text

    @pytest.mark.parametrize(
        ("name", "stated", "base", "expected"),
        [
            (APPLE, "apple-amlr", None, "apple/FastVLM-0.5B"),
            ("mine", "mit", APPLE, "apple/FastVLM-0.5B"),
            ("apple/FastVLM-7B", "mit", None, "apple/FastVLM-7B"),
            ("mine", "not stated; Apple's FastVLM weights are apple-amlr", None, None),
        ],
    )
    def test_apple_s_licence_extends(self, card, manifest, name, stated, base, expected):
        source = manifest["source"] | {"name": name, "license": stated}
        if base:
            source["base"] = manifest["source"] | {"name": base, "kind": "transformers' layout"}
        data, text = card(source=source)
        assert data["license"] == "apple-amlr"
        assert data["license_link"].endswith("/LICENSE_MODEL")
        assert data.get("base_model") == expected
        assert ("base_model_relation" in data) == (name != "mine")
        assert "**For research only**" in text
        assert (f"| base | `{base}`, transformers' layout |" in text) == bool(base)

    @pytest.mark.parametrize(
        ("stated", "license", "name"),
        [
            ("Apache-2.0", "apache-2.0", None),
            ('"mit"', "mit", None),
            ("Acme Research v2", "other", "acme-research-v2"),
            (
                "see LICENSE of the source checkpoint",
                "other",
                "see-license-of-the-source-checkpoint",
            ),
            ("©", "other", "not-stated"),
        ],
    )
    def test_other_licences(self, card, manifest, stated, license, name):
        data, text = card(source=manifest["source"] | {"license": stated})
        assert (data["license"], data.get("license_name")) == (license, name)
        assert data.get("license_link") == ("LICENSE" if name else None)
        assert "research" not in text

    def test_a_fine_tune_from_the_hub(self, card, manifest):
        name = "someone/finetune@" + "b" * 40
        data, _ = card(source=manifest["source"] | {"name": name})
        assert (data["base_model"], data["base_model_relation"]) == (
            "someone/finetune",
            "quantized",
        )
        plain = dict.fromkeys(manifest["llm"]["formats"])
        llm = manifest["llm"] | {"bits": 16, "formats": plain, "left_unquantized": {}}
        data, text = card(source=manifest["source"] | {"name": name}, llm=llm)
        assert "base_model_relation" not in data
        assert "16-bit" not in data["tags"]
        assert "| language model | float16: " in text

    def test_a_converted_bundle_s(self, card):
        _, text = card(converted_from={"layout": "mlx"})
        assert "from `fastvlm-demo` by fastvlm-mlx" in text
        assert "and compared with the mlx bundle it was converted from. Every gate" in text
        assert "Measured on these files against the bundle converted: encoder" in text

    @pytest.mark.parametrize(("used", "shown"), [("gptq", " by GPTQ: "), ("rtn", ": ")])
    def test_the_method_that_the_weights_are_by(self, card, manifest, used, shown):
        _, text = card(llm=manifest["llm"] | {"calibration": {"method": used}})
        assert f"| language model | 4 bits in groups of 64{shown}" in text

    def test_several_formats(self, card, manifest):
        formats = dict(manifest["llm"]["formats"])
        first, *_ = (path for path, form in formats.items() if form)
        formats[first] = {"bits": 4, "group_size": 32, "mode": "mxfp4"}
        count = sum(map(bool, formats.values())) - 1
        _, text = card(llm=manifest["llm"] | {"formats": formats})
        assert f"| 4 bits in groups of 64 ({count} matrices), mxfp4 in groups of 32 (1 ma" in text

    def test_what_loads_it_is_shown(self, card, manifest):
        _, text = card(fits_unmodified_app=True)
        assert "$ fastvlm install name path/to/ml-fastvlm/app" in text
        encoder = {k: v for k, v in manifest["encoder"].items() if k != "deployment_target"}
        data, text = card(layout="mlx", fits_unmodified_mlx_vlm=True, encoder=encoder)
        assert data["library_name"] == "mlx"
        assert "coreml" not in data["tags"]
        assert "$ python -m mlx_vlm generate --model name --image photo.jpg" in text
        assert "runs from" not in text

    @settings(max_examples=100, deadline=None)
    @given(text=st.text(max_size=40))
    def test_no_text_of_a_source_breaks_it(self, manifest, text):
        plain = model_card(manifest, "owner/name")
        source = manifest["source"] | {"name": text, "kind": text, "license": text}
        written = model_card(manifest | {"source": source}, "owner/name")
        data = ModelCard(written).data
        assert data.license in ("mit", "other", "apple-amlr")
        assert isinstance(data.license_name, str | None)
        rows = [re.sub(r"\\\|", "", line).count("|") for line in written.splitlines()]
        assert [n for n in rows if n] == [
            n for line in plain.splitlines() if (n := line.count("|"))
        ]

    @settings(max_examples=100, deadline=None)
    @given(data=st.data())
    def test_a_manifest_that_lacks_something(self, manifest, data):
        damaged = json.loads(json.dumps(manifest))
        part = damaged
        for _ in range(data.draw(st.integers(1, 3))):
            key = data.draw(st.sampled_from(sorted(part)))
            if not isinstance(part[key], dict) or not part[key] or data.draw(st.booleans()):
                part[key] = data.draw(st.none() | st.integers() | st.text(max_size=3) | st.just([]))
                break
            part = part[key]
        try:
            written = model_card(damaged, "owner/name")
        except BundleError:
            return
        assert ModelCard(written).data.pipeline_tag == "image-text-to-text"


def on_a_terminal(command, environment):
    """What a command writes to standard error where that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
    written = bytearray()

    def read():
        try:
            while data := os.read(ours, 4096):
                written.extend(data)
        except OSError:
            return

    reader = threading.Thread(target=read)
    reader.start()
    status = subprocess.run(
        [sys.executable, *command], stdout=subprocess.DEVNULL, stderr=theirs, env=environment
    ).returncode
    os.close(theirs)
    reader.join()
    os.close(ours)
    assert status == 0, written
    return written.decode()


@pytest.mark.slow
def test_the_hub_s_bars_and_ours_take_turns(hub, demo_bundle, demo_checkpoint, tmp_path):
    """Ours hide the cursor while they are drawn; none of the hub's lies in between."""
    hub.repositories["owner/checkpoint"] = contents(demo_checkpoint)
    environment = {**os.environ, "TERM": "xterm", "HF_ENDPOINT": hub.url, "HF_TOKEN": WRITES}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    export = ("export", "owner/checkpoint", str(tmp_path / "out"))
    for verb, theirs in ((export, "Fetching"), ((*PUSH[2:], str(demo_bundle), "o/n"), "LFS files")):
        seen = on_a_terminal((*PUSH[:2], *verb), environment)
        assert theirs in seen
        drawn = re.findall(r"\x1b\[\?25l(.*?)\x1b\[\?25h", seen, re.DOTALL)
        assert drawn
        assert not any(theirs in part for part in drawn)
