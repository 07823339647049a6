"""`fastvlm bench`: what it measures, how it tells, and how it ends."""

import json
import os
import sys
from types import SimpleNamespace

import pytest

from fastvlm_mlx.bench import measure, plot
from fastvlm_mlx.bench.measure import MEASURED, STAGES, Comparison, Row
from fastvlm_mlx.bench.process import Process
from fastvlm_mlx.bench.settings import Plan, Setting, names, numbers
from fastvlm_mlx.bench.spread import Spread, ratios
from fastvlm_mlx.bench.subject import FIRST, SECOND, generated_image, marked, question
from fastvlm_mlx.bundle.bundle import Bundle
from fastvlm_mlx.errors import FastVLMError, OptionError
from fastvlm_mlx.language.prompt.template import encode_text

RUN = dict.fromkeys(MEASURED, 0.5) | {
    "load_s": 2.0,
    "image_tokens": 16,
    "text_tokens": 52,
    "generation_tokens": 4,
    "image_size": 256,
    "compute": "torch float32",
    "encoder": "torch float32",
    "peak_memory_bytes": 10**9,
}


def test_two_bundles_in_turns(fastvlm, demo_bundle, mlx_bundle, tmp_path):
    chart = tmp_path / "bench.png"
    # The demo's own answer to so short a question ends long before.
    asked = ["--max-tokens", 40, "--prompt-tokens", 9, "--runs", 2, "--warmup", 0]
    status, out, err = fastvlm(
        "bench", demo_bundle, "--against", mlx_bundle, *asked, "--plot", chart, "--json"
    )
    assert status == 0, err
    found = json.loads(out)
    assert found["machine"]["cores"] >= 1
    assert found["machine"]["versions"]["mlx"]
    assert [row["bundle"] for row in found["rows"]] == [str(demo_bundle), str(mlx_bundle)]
    for row in found["rows"]:
        assert row["generation_tokens"] == 40
        assert (row["image_size"], row["image_tokens"]) == (256, 16)
        assert row["load_s"] > 0
        assert 10**8 < row["peak_memory_bytes"] < 10**10
        assert len(row["runs"]) == 2
        for run in row["runs"]:
            assert sum(run[stage] for stage in STAGES) == pytest.approx(run["ttft_s"])
            assert 0 < run["next_ttft_s"] < run["ttft_s"]
            assert run["tokens_per_s"] == pytest.approx(39 / run["decode_s"])
        # The chat template adds twenty tokens or so.
        assert row["text_tokens"] > row["prompt_tokens"] == 9
    (comparison,) = found["against"]
    ttft = comparison["times_as_fast"]["ttft"]
    assert ttft["first_quartile"] <= ttft["median"] <= ttft["third_quartile"]
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image-sizes", "300"], "takes 256"),
        (["--image-sizes", "256,big"], "--image-sizes is '256,big': expected whole numbers"),
        (["--prompt-tokens", "8,8"], "each of them once"),
        (["--prompt-tokens", "4000"], "more than the context"),
        (["--max-tokens", "1"], "--max-tokens is 1: expected a number from 2"),
        (["--runs", "0"], "--runs is 0"),
        (["--compute-units", "fast"], "expected some of auto, all, cpu"),
        (["--plot", "bench.gif"], "has no known suffix"),
        (["--plot", "nowhere/bench.png"], "is not a directory"),
        (["--image", "no.jpg"], "no.jpg"),
        (["--against", "nothing"], "nothing does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_runs(fastvlm, demo_bundle, words, said):
    status, out, err = fastvlm("bench", demo_bundle, *words)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert said in err


class Interrupted:
    """A worker that is interrupted in its third run."""

    def __init__(self, *_):
        self.runs = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def wait(self):
        return {"ready": True}

    def run(self, number):
        if number == 2:
            raise KeyboardInterrupt
        return RUN


def test_an_interruption_shows_what_was_measured(fastvlm, demo_bundle, monkeypatch):
    monkeypatch.setattr(measure, "Process", Interrupted)
    status, out, err = fastvlm("bench", demo_bundle)
    assert status == 130
    header, row = [line.split() for line in out.splitlines() if "px" in line or "units" in line]
    # One of the two was the warm-up.
    assert row[row.index("auto") + 1] == "1"
    assert "runs" in header
    assert err.splitlines()[-1] == "interrupted"


def test_each_setting_is_told_when_it_was_measured(fastvlm, demo_bundle, monkeypatch):
    class Worker(Interrupted):
        def run(self, number):
            return RUN

    monkeypatch.setattr(measure, "Process", Worker)
    settings = ["--prompt-tokens", "8,16", "--against", demo_bundle, "--runs", 2, "--json"]
    status, out, err = fastvlm("bench", demo_bundle, *settings)
    assert (status, len(json.loads(out)["rows"])) == (0, 4)
    begun, run, *told, next_begun, _ = err.splitlines()
    assert begun.endswith(" s question of 8 tokens (1 of 2): load")
    assert run.endswith(" s question of 8 tokens (1 of 2): runs")
    both = (
        f"{demo_bundle}, question of 8 tokens: TTFT 0.500 (0.500–0.500) s, 0.5 (0.5–0.5) tokens/s"
    )
    assert told == [both, both]
    assert next_begun.endswith(" s question of 16 tokens (2 of 2): load")


def test_a_worker_that_dies_is_one_sentence():
    code = "import os, sys; print('no room', file=sys.stderr); sys.stderr.flush(); os._exit(9)"
    with Process("my-bundle", {}, [sys.executable, "-c", code]) as process:
        with pytest.raises(FastVLMError, match=r"my-bundle has ended with status 9 .*\(no room\)"):
            process.wait()
        with pytest.raises(FastVLMError):
            process.run(0)


def test_a_worker_tells_a_mistake_and_leaves_nothing_behind(demo_bundle):
    job = {"bundle": str(demo_bundle), "image": None, "prompt_tokens": 4, "max_tokens": 4}
    with Process("it", {**job, "load": {"image_size": 300}}) as process:
        with pytest.raises(OptionError, match="takes 256"):
            process.wait()
        pid = process._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("text", [FIRST, SECOND, f"1 times {FIRST}"])
@pytest.mark.parametrize("tokens", [1, 7, 32, 256, 263, 1000])
def test_a_question_has_as_many_tokens_as_asked_for(demo_bundle, text, tokens):
    tokenizer = Bundle.open(demo_bundle).tokenizer()
    asked = question(SimpleNamespace(tokenizer=tokenizer), text, tokens)
    newline = len(encode_text(tokenizer, "\n"))
    assert len(encode_text(tokenizer, f"\n{asked}")) - newline == tokens
    assert asked == asked.strip()


def test_each_run_has_an_image_of_its_own():
    image = generated_image()
    images = [marked(image, number).tobytes() for number in range(3)]
    assert len({*images, image.tobytes()}) == 4


def test_what_is_measured_is_every_combination():
    plan = Plan((), None, (256, 512), (8, 32), ("cpu", "gpu"))
    assert len({*plan.settings}) == 8
    assert numbers("--image-sizes", "512, 1024") == (512, 1024)
    assert names("--compute-units", "cpu,gpu", ("cpu", "gpu", "ne")) == ("cpu", "gpu")


def test_the_spread_is_of_quartiles_and_ratios_of_pairs():
    assert Spread.of([4, 1, 2, 3, 5]) == Spread(3, 2, 4)
    assert Spread.of([7]) == Spread(7, 7, 7)
    # A machine that slows down by ten in the second round slows both.
    assert ratios([2, 20, 2], [1, 10, 1]) == Spread(2, 2, 2)
    assert Spread(1.25, 1, 1.5).text(2) == "1.25 (1.00–1.50)"


def test_how_many_times_as_fast(tmp_path):
    setting = Setting(None, 32, "auto")
    ours = Row(tmp_path / "ours", setting, [RUN, RUN])
    slow = {**RUN, **dict.fromkeys(MEASURED, 1.5), "peak_memory_bytes": 2 * 10**9}
    found = Comparison.of(ours, Row(tmp_path / "other", setting, [slow, slow]))
    assert found.speed["ttft_s"].median == 3
    assert found.memory == 0.5


def test_a_bar_is_as_long_as_its_stages(tmp_path):
    rows = [Row(tmp_path / name, Setting(None, 32, "auto"), [RUN]) for name in ("a", "b" * 99)]
    axes = plot.chart(rows).axes[0]
    assert len(axes.patches) == len(STAGES) * len(rows)
    ends = {bar.get_x() + bar.get_width() for bar in axes.patches[-len(rows) :]}
    assert ends == {2.0}
    assert all(len(label.get_text()) < 70 for label in axes.get_yticklabels())
