"""The exporter's names for Python: lazy, documented, alike, and as their page shows them."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import model_export
from fastvlm_mlx.errors import OptionError
from model_export import ExportOptions, GateLimits

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "python-exporting.md").read_text(encoding="utf-8")
FUNCTIONS = ("export", "convert", "verify", "compare", "plan")


def fresh(code, **options):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )


def test_importing_loads_nothing_that_is_slow():
    slow = ("torch", "coremltools", "mlx", "transformers", "scipy", "sklearn", "matplotlib")
    done = fresh(
        "import sys, model_export\n"
        "dir(model_export), model_export.presets.PRESETS\n"
        "from model_export import ExportOptions, ExportResult, plan, verify, compare\n"
        f"print([name for name in {slow} if name in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_every_name_is_there_listed_and_said_in_one_line():
    listed = dir(model_export)
    for name in model_export.__all__:
        assert getattr(model_export, name) is not None
        assert name in listed
        assert re.search(rf"^{name}  +\w", model_export.__doc__, re.MULTILINE), name
    assert not inspect.ismodule(model_export.convert)
    with pytest.raises(AttributeError, match="has no attribute 'exprot'"):
        model_export.exprot  # noqa: B018


def test_the_names_are_typed():
    assert (Path(model_export.__file__).parent / "py.typed").is_file()
    for name in FUNCTIONS:
        function = getattr(model_export, name)
        signature = inspect.signature(function)
        assert "return" in function.__annotations__
        assert set(signature.parameters) == set(function.__annotations__) - {"return"}


def test_arguments_are_named_alike_and_said():
    kinds = {}
    for name in FUNCTIONS:
        function = getattr(model_export, name)
        parameters = inspect.signature(function).parameters
        assert parameters["progress"].default is None
        for parameter in parameters.values():
            # An argument that is optional in one place may be needed in another.
            kind = parameter.annotation.removesuffix(" | None")
            assert kinds.setdefault(parameter.name, kind) == kind, parameter.name
            assert f"        {parameter.name}: " in function.__doc__, (name, parameter.name)


def test_each_function_says_how_far_it_is(demo_checkpoint, demo_bundle, mlx_bundle, tmp_path):
    stages = []

    def progress(stage, done):
        stages.append(stage)
        if len(stages) > 1:
            raise KeyboardInterrupt

    calls = (
        lambda: model_export.export(demo_checkpoint, tmp_path / "out", progress=progress),
        lambda: model_export.convert(mlx_bundle, tmp_path / "out", progress=progress),
        lambda: model_export.verify(str(demo_bundle), progress=progress),
        lambda: model_export.compare([demo_bundle, demo_checkpoint], progress=progress),
    )
    for call in calls:
        stages.clear()
        with pytest.raises(KeyboardInterrupt):
            call()
        assert len(stages) == 2
    assert not (tmp_path / "out").exists()
    stages.clear()
    model_export.plan(demo_bundle, "m4", progress=progress)
    assert stages == ["shapes"]


class TestMistakes:
    def test_a_bundle_takes_no_options_in_a_plan(self, demo_bundle):
        with pytest.raises(OptionError, match="is a bundle, whose bits and sizes are fixed"):
            model_export.plan(demo_bundle, options=ExportOptions())

    def test_limits_without_a_checkpoint(self, demo_bundle):
        with pytest.raises(OptionError, match="add --checkpoint"):
            model_export.verify(demo_bundle, limits=GateLimits(max_kl_nats=1.0))
        with pytest.raises(OptionError, match="without --checkpoint"):
            model_export.verify(demo_bundle, revision="main")

    def test_one_model_where_a_list_belongs(self, demo_bundle):
        with pytest.raises(OptionError, match="expected a list of two or more"):
            model_export.compare(str(demo_bundle))

    def test_a_missing_package_is_one_sentence(self, tmp_path):
        blocked = (
            "import sys; sys.modules['torch'] = None\n"
            "from fastvlm_mlx.errors import OptionError\n"
            "import model_export\n"
        )
        for words in ("model_export.export", "model_export.compare(['a', 'b'])"):
            done = fresh(
                f"{blocked}try:\n {words}\nexcept OptionError as error: print(error)", cwd=tmp_path
            )
            assert "this needs torch of the `export` extra" in done.stdout, done.stderr
