"""What loading a bundle costs, what it puts off, and what it finds before anything is computed."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from threading import Thread

import pytest
from PIL import Image

import fastvlm_mlx
from fastvlm_mlx.errors import BundleError, EncoderError, FastVLMError
from fastvlm_mlx.imports import part
from fastvlm_mlx.vision.package import model_path, read_spec


def in_a_new_process(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()


class TestPutOff:
    def test_loading_imports_nothing_that_only_computing_needs(self, demo_bundle):
        loaded = in_a_new_process(
            "import fastvlm_mlx, sys; fastvlm_mlx.load(sys.argv[1]); print(*sys.modules)",
            demo_bundle,
        )
        absent = {"torch", "transformers", "huggingface_hub", "mlx_lm.utils", "coremltools.models"}
        assert "mlx_lm.models.qwen2" in loaded
        assert not absent & set(loaded)

    @pytest.mark.skipif(sys.platform == "darwin", reason="Core ML is coremltools' there")
    def test_an_answer_imports_torch_and_no_other_package_s_converters(self, demo_bundle):
        loaded = in_a_new_process(
            "import fastvlm_mlx, sys; from PIL import Image;"
            "model = fastvlm_mlx.load(sys.argv[1]);"
            "model.generate(Image.new('RGB', (8, 8)), 'What is it?', max_tokens=2);"
            "print(*sys.modules)",
            demo_bundle,
        )
        absent = {"transformers", "huggingface_hub", "sklearn", "scipy", "sympy", "torch._dynamo"}
        absent |= {"mlx_lm.generate", "mlx_lm.utils", "coremltools.converters"}
        assert "torch" in loaded
        assert not absent & set(loaded)

    @pytest.mark.parametrize(
        ("name", "imported"),
        [
            ("mlx_lm.models.qwen2", {"transformers", "huggingface_hub", "mlx_lm.generate"}),
            ("coremltools.proto", {"coremltools.converters", "coremltools.optimize", "sympy"}),
        ],
    )
    def test_an_ordinary_import_would_take_all_of_it(self, name, imported):
        """Where this fails, `fastvlm_mlx.imports` is no longer worth having for the package."""
        code = (
            "import sys, warnings; warnings.simplefilter('ignore'); import {}; print(*sys.modules)"
        )
        assert imported <= set(in_a_new_process(code.format(name)))

    def test_mlx_lm_and_coremltools_are_whole_for_whoever_imports_them_after(self, demo_bundle):
        code = (
            "import sys, warnings; warnings.simplefilter('ignore'); import fastvlm_mlx;"
            "fastvlm_mlx.load(sys.argv[1]); qwen2 = sys.modules['mlx_lm.models.qwen2'];"
            "proto = sys.modules['coremltools.proto'];"
            "from mlx_lm import stream_generate; import mlx_lm;"
            "import coremltools.optimize.coreml; import coremltools as ct;"
            "print(mlx_lm.models.qwen2 is qwen2, ct.proto is proto, mlx_lm.__version__[0],"
            "ct.utils.__name__, type(ct).__name__, hasattr(ct, 'nothing'))"
        )
        expected = ["True", "True", "0", "coremltools.models.utils", "module", "False"]
        assert in_a_new_process(code, demo_bundle) == expected

    def test_the_weights_are_read_and_the_encoder_s_are_not(self, mlx_bundle):
        """What a model waits for is its own: after loading nothing is taken from the weights."""
        import mlx.core as mx

        mx.clear_cache()
        before = mx.get_active_memory()
        model = fastvlm_mlx.load(mlx_bundle)
        read = mx.get_active_memory() - before
        assert read > 500_000
        _ = model.encoder
        assert mx.get_active_memory() - before > read + 500_000

    def test_the_encoder_is_made_once_and_counted_as_loading(self, demo_bundle):
        model = fastvlm_mlx.load(demo_bundle)
        opened = model.load_s
        assert not model._encoders
        first = model.encode(Image.new("RGB", (8, 8)))
        made = model.encoder
        second = model.encode(Image.new("RGB", (8, 8)))
        assert model.encoder is made
        assert opened < first.timings.load_s == second.timings.load_s
        answer = model.generate(second, "What is it?", max_tokens=1)
        assert answer.timings.load_s == model.load_s >= second.timings.load_s

    def test_a_question_without_an_image_makes_no_encoder(self, demo_bundle):
        model = fastvlm_mlx.load(demo_bundle)
        assert model.generate(None, "Hello", max_tokens=1).image_tokens == 0
        assert not model._encoders


class TestFoundAtLoad:
    def change_spec(self, bundle, change):
        package = bundle / "fastvithd.mlpackage"
        spec = read_spec(package)
        change(spec)
        model_path(package).write_bytes(spec.SerializeToString())
        (bundle / "manifest.json").unlink()

    def test_the_encoder_of_another_model(self, bundle_copy):
        config = json.loads((bundle_copy / "config.json").read_text())
        config["mm_hidden_size"] = 256
        config["vision_config"] |= {"cls_ratio": 1, "hidden_size": 256}
        (bundle_copy / "config.json").write_text(json.dumps(config))
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(BundleError, match=r"makes 512 channels where config\.json says 256"):
            fastvlm_mlx.load(bundle_copy)

    def test_a_package_that_is_no_encoder(self, bundle_copy):
        def rename(spec):
            spec.description.input[0].name = "sound"

        self.change_spec(bundle_copy, rename)
        with pytest.raises(EncoderError, match="declares sound float32"):
            fastvlm_mlx.load(bundle_copy)

    def test_a_damaged_specification(self, bundle_copy):
        file = model_path(bundle_copy / "fastvithd.mlpackage")
        file.write_bytes(b"\xff" * 100)
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(EncoderError, match="is not a Core ML model"):
            fastvlm_mlx.load(bundle_copy)

    def test_weights_that_are_cut_short(self, bundle_copy):
        file = next((bundle_copy / "fastvithd.mlpackage").rglob("weight.bin"))
        file.write_bytes(file.read_bytes()[:1000])
        (bundle_copy / "manifest.json").unlink()
        with pytest.raises(EncoderError, match="has 1000 bytes and no room for"):
            fastvlm_mlx.load(bundle_copy)

    def test_an_operation_that_is_not_known_is_named_at_the_first_image(
        self, bundle_copy, monkeypatch
    ):
        monkeypatch.setattr("sys.platform", "linux")

        def replace(spec):
            function = spec.mlProgram.functions["main"]
            block = function.block_specializations[function.opset]
            next(op for op in block.operations if op.type == "gelu").type = "conjure"

        self.change_spec(bundle_copy, replace)
        model = fastvlm_mlx.load(bundle_copy)
        with pytest.raises(EncoderError, match=r"operation conjure .* is not known"):
            model.encode(Image.new("RGB", (8, 8)))


class TestPart:
    """`imports.part`, on packages written for it."""

    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        root = tmp_path / "bulky"
        (root / "light").mkdir(parents=True)
        (root / "light" / "__init__.py").write_text("VALUE = 1\n")
        (root / "heavy.py").write_text("from bulky.light import VALUE\nTWICE = 2 * VALUE\n")
        (root / "__init__.py").write_text(
            "import time\ntime.sleep(0.05)\nfrom . import heavy\nfrom .light import VALUE\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        yield root
        for name in [name for name in sys.modules if name.partition(".")[0] == "bulky"]:
            del sys.modules[name]

    def test_the_rest_waits_until_something_of_it_is_asked_for(self, package):
        light = part("bulky.light")
        assert light.VALUE == 1
        assert "bulky.heavy" not in sys.modules
        bulky = import_module("bulky")
        assert bulky.light is light
        assert "bulky.heavy" not in sys.modules
        assert bulky.heavy.TWICE == 2
        assert part("bulky.light") is light
        with pytest.raises(AttributeError, match="nothing"):
            _ = bulky.nothing

    def test_a_module_beside_it_runs_the_package_first(self, package):
        part("bulky.light")
        assert import_module("bulky.heavy").TWICE == 2
        assert import_module("bulky").VALUE == 1

    def test_a_package_that_is_there_already_is_left_as_it_is(self, package):
        bulky = import_module("bulky")
        assert part("bulky.light") is bulky.light
        assert import_module("bulky") is bulky

    def test_threads_wait_for_the_one_that_runs_it(self, package):
        part("bulky.light")
        found = []

        def ask():
            found.append(import_module("bulky.heavy").TWICE + import_module("bulky").VALUE)

        threads = [Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [3] * 8

    def test_an_import_that_fails_is_tried_again(self, package):
        whole = (package / "__init__.py").read_text()
        (package / "__init__.py").write_text("raise ImportError('not today')\n")
        part("bulky.light")
        with pytest.raises(ImportError, match="not today"):
            import_module("bulky.heavy")
        (package / "__init__.py").write_text(whole + "# a longer file\n")
        shutil.rmtree(package / "__pycache__", ignore_errors=True)
        assert import_module("bulky.heavy").TWICE == 2

    def test_what_is_not_installed(self):
        with pytest.raises(ModuleNotFoundError, match="bulkier"):
            part("bulkier.light")


@pytest.mark.parametrize("size", [10**9, 2112, -64, 0])
def test_an_image_size_that_no_machine_has_memory_for(mlx_bundle, size):
    with pytest.raises(FastVLMError, match="is not a positive multiple of 64"):
        fastvlm_mlx.load(mlx_bundle, image_size=size)
