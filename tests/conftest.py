"""What many tests stand on: the demo checkpoint that ships, its bundle, damaged copies of both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from sharing import Shared

# Read when torch is first imported, here and in the processes that tests start. On the demo's tiny
# layers a second thread gains nothing, and on a busy machine costs ten times the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when MLX first multiplies. From the M5 on a product of float32 is one of 19-bit numbers
# unless this says otherwise, and tests compare with what other libraries compute in all 32.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

from model_export.options import ExportOptions
from model_export.pipeline import export

TESTS = Path(__file__).parent
DEMO = TESTS.parent / "model_export" / "demo" / "checkpoint"
# The files whose tests take longest, the longest first: where each stands in the order.
LONGEST = {
    file: place
    for place, file in enumerate(
        (
            "documentation/test_pages.py",
            "encoder/test_resolutions.py",
            "encoder/test_compression.py",
            "encoder/test_coreml.py",
            "test_fuzz.py",
            "checkpoint/test_export_sources.py",
            "quantization/test_layerwise.py",
            "pipeline/test_conversion.py",
            "language/test_recipes.py",
            "test_threads.py",
            "planning/test_plan.py",
            "pipeline/test_pipeline.py",
            "gates/test_verify.py",
            "comparison/test_compare.py",
            "comparison/test_answers.py",
        )
    )
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine does not have, and what takes minutes unless it is asked for."""
    absent = {"linux"} if sys.platform == "darwin" else {"macos"}
    if "slow" not in config.getoption("-m"):
        absent.add("slow")
    left_out = [item for item in items if absent & {mark.name for mark in item.iter_markers()}]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    # A long file that is begun last leaves the other cores waiting for its end.
    items.sort(key=lambda item: LONGEST.get(os.path.relpath(item.path, TESTS), len(LONGEST)))


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Directories that are made once, whichever of the run's processes needs them first."""
    return Shared(tmp_path_factory)


@pytest.fixture(scope="session")
def demo_bundle(shared: Shared) -> Path:
    """The demo checkpoint exported as most will: fp16 encoder, 4-bit LLM. Not to be written to."""
    options = ExportOptions.of(llm_bits=4)
    return shared.get("app", "bundle", lambda out: export(DEMO, out, options))


@pytest.fixture(scope="session")
def mlx_bundle(shared: Shared) -> Path:
    """The demo checkpoint as an `mlx` bundle at 4 bits, its gates passed. Not to be written to."""
    options = ExportOptions.of(llm_bits=4, layout="mlx")
    return shared.get("mlx", "bundle", lambda out: export(DEMO, out, options))


@pytest.fixture(scope="session")
def sizes_bundle(shared: Shared) -> Path:
    """The demo checkpoint at its own 256 pixels and at 128, its gates passed. Not to write to."""
    options = ExportOptions.of(llm_bits=4, image_sizes=(128, 256))
    return shared.get("sizes", "bundle", lambda out: export(DEMO, out, options))


@pytest.fixture(scope="session")
def exact_bundle(shared: Shared) -> Path:
    """The golden checkpoint exported with nothing rounded. Not to be written to."""
    options = ExportOptions.of(llm_bits=16, dtype="float32", encoder_precision="fp32")
    source = TESTS / "golden" / "apple"
    return shared.get("exact", "bundle", lambda out: export(source, out, options))


@pytest.fixture
def bundle_copy(demo_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(demo_bundle, tmp_path / "bundle"))


@pytest.fixture
def edit_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the demo checkpoint with its config or its tensors changed in place."""

    def edit(
        *,
        config: Callable[[dict[str, Any]], None] | None = None,
        tensors: Callable[[dict[str, Any]], None] | None = None,
        name: str = "checkpoint",
    ) -> Path:
        from safetensors.torch import load_file, save_file

        path = Path(shutil.copytree(DEMO, tmp_path / name))
        if config is not None:
            data = json.loads((path / "config.json").read_text())
            config(data)
            (path / "config.json").write_text(json.dumps(data))
        if tensors is not None:
            state = {k: v.clone() for k, v in load_file(path / "model.safetensors").items()}
            # Values that bfloat16 can't hold are put in by the tests.
            state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
            tensors(state)
            save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors")
        return path

    return edit


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A hub that holds nothing yet."""
    server = HubServer()
    yield server
    server.shutdown()


@pytest.fixture
def with_hub(hub: HubServer, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python, its arguments given, where the hub is that one; not logged in."""

    def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        cache = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
        cache |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "HF_ENDPOINT": hub.url}
        return subprocess.run(
            [sys.executable, *map(str, command)],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
            env={**os.environ, **cache, **environment},
        )

    return run


@pytest.fixture
def fastvlm(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a verb in this process: exit status, standard output, standard error."""

    from fastvlm_mlx.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastvlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            main.main()
        out, err = capsys.readouterr()
        return leaving.value.code or 0, out, err

    return run
