"""Hub ids against a hub: a server on this machine that answers as huggingface.co does."""

from pathlib import Path

import pytest
from hub_server import COMMIT

GOLDEN = Path(__file__).parents[1] / "golden"
LOCATE = (
    "import sys; from model_export.checkpoint.hub import locate; "
    "print(*locate(sys.argv[1]), sep='\\n')"
)


def test_only_what_an_export_reads_is_fetched_and_once(hub, with_hub):
    files = {p.name: p.read_bytes() for p in (GOLDEN / "transformers").iterdir()}
    more = ("optimizer.pt", "pytorch_model.bin", "onnx/model.safetensors", "training_args.bin")
    hub.repositories["owner/model"] = files | dict.fromkeys(more, b"not wanted")
    first = with_hub("-c", LOCATE, "owner/model")
    assert first.returncode == 0, first.stderr
    folder, hub_id = first.stdout.splitlines()
    assert hub_id == f"owner/model@{COMMIT}"
    assert {p.name for p in Path(folder).iterdir()} == set(files)
    assert sorted(hub.served) == sorted(files)
    assert with_hub("-c", LOCATE, "owner/model").stdout == first.stdout
    assert with_hub("-c", LOCATE, "owner/model", HF_HUB_OFFLINE="1").stdout == first.stdout
    assert len(hub.served) == len(files)


def test_a_repository_of_pickles(hub, with_hub):
    hub.repositories["owner/model"] = {
        "config.json": b"{}",
        "pytorch_model.bin": b"1",
        "x.bin": b"",
    }
    folder = with_hub("-c", LOCATE, "owner/model@main").stdout.splitlines()[0]
    assert {p.name for p in Path(folder).iterdir()} == {"config.json", "pytorch_model.bin"}


@pytest.mark.parametrize(
    ("reference", "environment", "words"),
    [
        ("owner/nothing", {}, "owner/nothing is neither a directory here nor a repository on"),
        ("owner/model@v9", {}, "the hub's owner/model has no revision v9"),
        ("owner/model", {"HF_HUB_OFFLINE": "1"}, "go online once to download it, or give a"),
        ("owner/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub can't be reached: go"),
    ],
)
def test_what_fails_is_one_sentence(hub, with_hub, tmp_path, reference, environment, words):
    hub.repositories["owner/model"] = {"config.json": b"{}"}
    done = with_hub("-m", "fastvlm_mlx", "export", reference, tmp_path / "out", **environment)
    assert done.returncode == 2
    assert words in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
