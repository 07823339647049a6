"""`fastvlm doctor`: each line's meaning, and what becomes of it when something is broken."""

import json
import re
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest
from core_ml import CoreML

from fastvlm_mlx.cli import doctor as cli_doctor
from fastvlm_mlx.doctor import bundle_checks
from fastvlm_mlx.doctor import report as doctor
from fastvlm_mlx.doctor.report import ABSENT, OK, PROBLEM, WARNING, diagnose, worst
from fastvlm_mlx.errors import GateError
from model_export.demo.checkup import exporter

VERDICTS = {OK, WARNING, PROBLEM, ABSENT}


def lines_of(bundle, given=None):
    lines = list(diagnose(bundle, given or exporter()))
    assert {line.verdict for line in lines} <= VERDICTS
    # What a program would read: one object, no NaN, no infinity.
    json.loads(json.dumps([line.to_dict() for line in lines], allow_nan=False))
    assert all("\n" not in line.found and line.found for line in lines)
    return {line.name: line for line in lines}


@pytest.fixture(scope="module")
def demo_lines(demo_bundle):
    return lines_of(demo_bundle)


class TestTheDemo:
    def test_nothing_is_a_problem(self, demo_lines):
        assert worst(list(demo_lines.values())) in (OK, WARNING)

    def test_the_machine(self, demo_lines):
        assert demo_lines["versions"].figures["mlx"].startswith("0.32")
        machine = demo_lines["machine"]
        assert machine.figures["memory_bytes"] > 1e8
        assert machine.figures["chip"] in machine.found
        assert demo_lines["export extra"].verdict == OK
        assert set(demo_lines["export extra"].figures) == set(doctor.EXTRA)

    def test_the_bundle(self, demo_lines):
        bundle = demo_lines["bundle"]
        assert bundle.verdict == OK
        assert bundle.figures["layout"] == "app"
        assert bundle.figures["source"] == "fastvlm-demo"
        load = demo_lines["first load"]
        assert load.verdict == OK
        assert load.figures["load_s"] > 0 < load.figures["encoder_s"]
        assert load.figures["again_s"] > 0

    def test_the_encoder(self, demo_lines):
        encoder = demo_lines["encoder, evaluated op by op"]
        assert encoder.verdict == OK
        assert encoder.figures["rounded_snr_db"] > 40
        assert encoder.figures["seconds"] > 0

    def test_the_answers(self, demo_lines):
        answers = demo_lines["answers"]
        assert answers.verdict == OK
        assert answers.figures["right"] >= 0.8 * len(answers.figures["asked"])
        kinds = {each["prompt"].split()[0] for each in answers.figures["asked"]}
        assert len(kinds) > 2

    def test_the_times(self, demo_lines):
        times = demo_lines["time to the first token"].figures["measured"]
        parts = ("preprocess_s", "encode_s", "project_s", "prefill_s")
        assert times["ttft_s"] == pytest.approx(sum(times[part] for part in parts))

    @pytest.mark.linux
    def test_what_only_a_mac_has(self, demo_lines):
        for name in ("GPU", "Neural Engine", "encoder, Core ML"):
            assert demo_lines[name].verdict == ABSENT
        assert "Apple's chips" in demo_lines["time to the first token"].found

    def test_as_json(self, demo_bundle, demo_lines, capsys):
        cli_doctor.examine(demo_bundle, exporter(), as_json=True)
        report = json.loads(capsys.readouterr().out)
        assert report["verdict"] in (OK, WARNING)
        assert report["bundle"] == str(demo_bundle)
        assert [line["name"] for line in report["lines"]] == list(demo_lines)


def test_without_a_bundle_the_demo_is_exported(demo_bundle):
    copied = replace(exporter(), export_demo=lambda path: shutil.copytree(demo_bundle, path))
    lines = lines_of(None, copied)
    assert lines["export of the demo"].verdict == OK
    assert lines["answers"].verdict == OK


def test_without_the_export_extra(demo_bundle):
    def missing(*arguments):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    lines = lines_of(None, replace(exporter(), export_demo=missing))
    assert lines["export of the demo"].verdict == ABSENT
    assert "pip install" in lines["export of the demo"].advice
    assert lines["bundle"].verdict == ABSENT
    assert worst(list(lines.values())) != PROBLEM


def test_what_is_installed_is_held_to_what_is_asked_for(monkeypatch):
    asked = ["mlx<0.33,>=0.32", "numpy>=9", "torch>=99; extra == 'export'", "absent>=1"]
    monkeypatch.setattr(doctor, "requires", lambda name: asked)
    [line] = doctor.versions()
    assert line.verdict == WARNING
    assert line.found.startswith("numpy 2")
    assert "where numpy>=9" in line.found
    monkeypatch.setattr(doctor, "requires", lambda name: asked[:1])
    assert next(doctor.versions()).verdict == OK


class TestBroken:
    @pytest.fixture
    def babbling(self, bundle_copy):
        """Every value of the language model's matrices has another sign."""
        [file] = bundle_copy.glob("*.safetensors")
        arrays = dict(mx.load(str(file)))
        turned = {n: -a if n.endswith((".scales", ".biases")) else a for n, a in arrays.items()}
        mx.eval(turned)
        file.unlink()
        mx.save_safetensors(str(file), turned)
        return bundle_copy

    def test_answers_that_are_wrong(self, babbling, capsys):
        with pytest.raises(GateError, match=r"2 of .* problems \(bundle, answers\)") as caught:
            cli_doctor.examine(babbling, exporter(), as_json=False)
        assert caught.value.exit_status == 2
        lines = capsys.readouterr().out.splitlines()
        [bundle] = [line for line in lines if " bundle: " in line]
        assert bundle.startswith("problem ")
        assert "changed since" in bundle
        [answers] = [line for line in lines if " answers: " in line]
        assert re.match(r"problem   answers: [01] of 9 right", answers)
        assert lines[lines.index(answers) + 1].strip().startswith("→ export the checkpoint again")
        assert any(line.startswith("ok        encoder, evaluated") for line in lines)

    def test_answers_that_are_wrong_of_nobody_knows_what(self, babbling):
        (babbling / "manifest.json").unlink()
        lines = lines_of(babbling)
        assert lines["bundle"].verdict == WARNING
        assert "without manifest.json" in lines["bundle"].found
        assert lines["answers"].verdict == PROBLEM

    def test_an_encoder_that_overflows(self, demo_bundle, monkeypatch):
        from fastvlm_mlx.vision.program.mlprogram import MLProgramEncoder

        evaluate = MLProgramEncoder.evaluate

        def overflowing(self, images, *, round_fp16=False, observe=None):
            return evaluate(self, images) + (float("inf") if round_fp16 else 0)

        monkeypatch.setattr(MLProgramEncoder, "evaluate", overflowing)
        line = lines_of(demo_bundle)["encoder, evaluated op by op"]
        assert line.verdict == PROBLEM
        assert "fp32" in line.advice

    @pytest.mark.parametrize(
        ("damage", "problem"),
        [
            (shutil.rmtree, "bundle"),
            (lambda path: (path / "config.json").write_text("{"), "bundle"),
            (lambda path: (path / "manifest.json").write_text("[]"), "bundle"),
            (lambda path: shutil.rmtree(path / "fastvithd.mlpackage"), "bundle"),
            (lambda path: (path / "tokenizer.json").write_text("{}"), "first load"),
            (lambda path: (path / "model.safetensors").write_bytes(b"12345"), "first load"),
        ],
    )
    def test_a_damaged_one_is_a_line(self, damage, problem, bundle_copy):
        damage(bundle_copy)
        lines = lines_of(bundle_copy)
        assert lines[problem].verdict == PROBLEM
        assert "Error: " not in lines[problem].found

    def test_what_nobody_foresaw_is_a_line_too(self, demo_bundle):
        def surprising():
            raise ZeroDivisionError("division by zero")

        lines = lines_of(demo_bundle, replace(exporter(), questions=surprising))
        assert lines["answers"].verdict == PROBLEM
        assert lines["answers"].found == "ZeroDivisionError: division by zero"
        assert "time to the first token" in lines


class TestAMac:
    @pytest.fixture
    def core_ml(self, monkeypatch, tmp_path):
        monkeypatch.setattr("fastvlm_mlx.machine.chip", lambda: "Apple M1 Max")
        monkeypatch.setattr("platform.machine", lambda: "arm64")
        return CoreML(monkeypatch, tmp_path)

    def test_each_of_its_compute_units(self, demo_bundle, core_ml):
        core_ml.noise = {"ALL": 0.1, "CPU_AND_GPU": 0.001}
        core_ml.delay_s = {"CPU_ONLY": 0.05}
        core_ml.devices.remove("MLNeuralEngineComputeDevice")
        lines = lines_of(demo_bundle)
        assert lines["Neural Engine"].verdict == ABSENT
        assert lines["encoder, Core ML on ne"].verdict == ABSENT
        assert lines["encoder, Core ML on all"].verdict == WARNING
        on_gpu = lines["encoder, Core ML on gpu"]
        assert on_gpu.verdict == OK
        assert 58 < on_gpu.figures["snr_db"] < 62
        assert lines["encoder, in use"].figures == {"chosen": "gpu"}
        assert worst(list(lines.values())) == WARNING
        load = lines["first load"]
        assert load.figures["compile_s"] > 0
        assert load.figures["again_s"] < load.figures["encoder_s"]
        times = lines["time to the first token"]
        assert times.figures["predicted"]["chip"] == "M1 Max"
        assert "predicted" in times.found

    def test_none_that_holds_is_a_problem(self, demo_bundle, core_ml, monkeypatch):
        core_ml.noise = dict.fromkeys(("ALL", "CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"), 0.1)
        monkeypatch.setattr("fastvlm_mlx.machine.chip", lambda: "Apple Z9")
        lines = lines_of(demo_bundle)
        assert lines["encoder, in use"].verdict == PROBLEM
        assert lines["encoder, Core ML on ne"].verdict == PROBLEM
        assert "there is no prediction: --device Z9" in lines["time to the first token"].found

    def test_an_intel_python(self, monkeypatch):
        monkeypatch.setattr("sys.platform", "darwin")
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        [line] = doctor.machine_line()
        assert line.verdict == PROBLEM
        assert "arm64" in line.advice


class TestAGPU:
    """Both devices are this machine's; what compares them is what runs on a Mac."""

    def test_of_an_mlx_bundle(self, mlx_bundle, monkeypatch):
        monkeypatch.setattr(bundle_checks, "has_gpu", lambda: True)
        lines = lines_of(mlx_bundle)
        encoder = lines["encoder, GPU against the CPU"]
        assert encoder.verdict == OK
        assert encoder.figures["cpu_seconds"] > 0
        language = lines["language model, GPU against the CPU"]
        assert language.verdict == OK
        assert abs(language.figures["kl_nats"]) <= 0.01
        assert language.figures["agreement"] > 0.8

    def test_that_computes_something_else(self, mlx_bundle, monkeypatch):
        devices = iter(range(9))
        distributions, timed = bundle_checks._distributions, bundle_checks._timed

        def other_logits(bundle, ids):
            return distributions(bundle, ids[:: -1 if next(devices) % 2 else 1])

        def other_features(encoder, pixels):
            features, seconds = timed(encoder, pixels)
            return features * (1 + 0.1 * next(devices)), seconds

        monkeypatch.setattr(bundle_checks, "has_gpu", lambda: True)
        monkeypatch.setattr(bundle_checks, "_timed", other_features)
        monkeypatch.setattr(bundle_checks, "_distributions", other_logits)
        lines = lines_of(mlx_bundle)
        assert lines["encoder, GPU against the CPU"].verdict == PROBLEM
        assert lines["language model, GPU against the CPU"].verdict == PROBLEM

    def test_where_the_cpu_has_no_room(self, demo_bundle, monkeypatch):
        monkeypatch.setattr(bundle_checks, "has_gpu", lambda: True)
        monkeypatch.setattr("fastvlm_mlx.machine.memory_bytes", lambda: 1000)
        lines = lines_of(demo_bundle)
        assert lines["machine"].verdict == WARNING
        assert lines["language model, GPU against the CPU"].verdict == ABSENT
