"""Comparing and sweeping, against what the runtime itself answers and what is known to be equal."""

import json
import shutil

import pytest

import fastvlm_mlx
from fastvlm_mlx import plotting
from fastvlm_mlx.errors import BundleError, CheckpointError, DestinationError, OptionError
from model_export.cli import compare as cli_compare
from model_export.comparison import compare, plot, sweep
from model_export.comparison.compare import Row, mark_best
from model_export.comparison.models import open_model
from model_export.options import ExportOptions
from model_export.pipeline import export

COUNT = 12


def silent(stage, done):
    pass


@pytest.fixture(scope="module")
def coarse(demo_checkpoint, tmp_path_factory):
    """Two bits: so few that answers change."""
    out = tmp_path_factory.mktemp("coarse") / "two"
    export(demo_checkpoint, out, ExportOptions.of(llm_bits=2, allow_failed_gates=True))
    return out


@pytest.fixture(scope="module")
def rows(demo_checkpoint, demo_bundle, coarse):
    paths = [demo_bundle, demo_checkpoint, coarse]
    return compare.compare(paths, None, None, COUNT, silent)


def test_the_checkpoint_is_the_reference_and_loses_nothing(rows, demo_checkpoint):
    reference = next(row for row in rows if row.reference)
    assert reference.name == str(demo_checkpoint)
    assert reference.kind == "checkpoint"
    assert (reference.kl_nats, reference.changed, reference.agreement) == (0.0, 0, 1.0)
    assert reference.bits_per_weight == 16
    assert reference.questions >= COUNT


def test_sizes_are_the_files(rows, demo_bundle):
    row = next(row for row in rows if row.name == str(demo_bundle))
    manifest = json.loads((demo_bundle / "manifest.json").read_text())
    assert row.bytes["llm"] == manifest["llm"]["bytes"]
    assert row.bytes["encoder"] == manifest["encoder"]["bytes"]
    assert row.bits_per_weight == manifest["llm"]["bits_per_weight"]


def test_fewer_bits_lose_more(rows, demo_bundle, coarse):
    fine = next(row for row in rows if row.name == str(demo_bundle))
    rough = next(row for row in rows if row.name == str(coarse))
    assert 0 < fine.llm_kl_nats < rough.llm_kl_nats
    assert 0 < fine.kl_nats < rough.kl_nats
    assert fine.changed <= rough.changed
    assert fine.snr_db == rough.snr_db > 35
    assert fine.cosine > 0.9999
    assert fine.best
    assert rough.best  # smaller than anything


def test_an_answer_has_changed_where_the_runtime_says_another(demo_checkpoint, demo_bundle, coarse):
    """Followed token by token here, decoded freely there."""
    reference = open_model(demo_bundle)
    samples = compare.samples_of(reference, None, COUNT)
    bench = compare.Bench.of(reference, samples, silent)
    row = bench.row(open_model(coarse))
    ours, theirs = fastvlm_mlx.load(demo_bundle), fastvlm_mlx.load(coarse)
    changed = 0
    for sample in samples:
        for prompt, _ in sample.questions:
            texts = {
                model.generate(sample.image, prompt, max_tokens=compare.MAX_TOKENS).text
                for model in (ours, theirs)
            }
            changed += len(texts) > 1
    assert row.changed == changed


def test_wrong_guesses_end_in_the_model_s_own_answer(demo_checkpoint):
    """The answers that an image comes with are guesses and nothing else."""
    model = open_model(demo_checkpoint)
    (sample, *_) = compare.samples_of(model, None, 1)
    (features,) = model.encode([sample])
    dialogue, ended = compare.answers(model, sample, features)
    guesses = ("", "No.", "The number 7 is everywhere and nowhere.", sample.questions[0][1] * 9)
    for guess in guesses:
        asked = tuple((prompt, guess) for prompt, _ in sample.questions)
        again = compare.Sample(sample.name, sample.image, asked)
        found, complete = compare.answers(model, again, features)
        assert found.ids.tolist() == dialogue.ids.tolist()
        assert complete == ended


def test_the_users_own_questions(demo_checkpoint, demo_bundle, tmp_path):
    from PIL import Image

    Image.new("RGB", (90, 60), "blue").save(tmp_path / "blue.png")
    file = tmp_path / "mine.jsonl"
    row = {"image": "blue.png", "prompt": "How many shapes are there?", "answer": "None at all."}
    file.write_text(json.dumps(row) + "\n")
    rows = compare.compare([demo_checkpoint, demo_bundle], None, file, COUNT, silent)
    assert [row.questions for row in rows] == [1, 1]


def test_median_and_deviation_are_of_the_answers(demo_checkpoint, coarse, tmp_path):
    """Asked one by one, two questions lose what they lose together."""
    from PIL import Image

    Image.new("RGB", (90, 60), "blue").save(tmp_path / "blue.png")
    asked = [("How many shapes are there?", "One."), ("Describe the image.", "A blue square.")]
    lines = [json.dumps({"image": "blue.png", "prompt": p, "answer": a}) for p, a in asked]

    def lost(*chosen):
        file = tmp_path / "mine.jsonl"
        file.write_text("\n".join(chosen))
        return compare.compare([demo_checkpoint, coarse], None, file, COUNT, silent)[1]

    single = [lost(line) for line in lines]
    both = lost(*lines)
    kl = [row.kl_nats for row in single]
    assert kl[0] != pytest.approx(kl[1], rel=0.1)
    for row, nats in zip(single, kl, strict=True):
        assert row.kl_median_nats == pytest.approx(nats)
        assert row.kl_deviation_nats == 0
    assert both.kl_median_nats == pytest.approx(sum(kl) / 2, rel=1e-3)
    assert both.kl_deviation_nats == pytest.approx(abs(kl[0] - kl[1]) / 2, rel=1e-3)


def test_what_is_refused(demo_checkpoint, demo_bundle, tmp_path):
    with pytest.raises(OptionError, match="is given twice"):
        compare.compare([demo_bundle, demo_bundle], None, None, COUNT, silent)
    with pytest.raises(OptionError, match="--count is 0"):
        compare.compare([demo_bundle, demo_checkpoint], None, None, 0, silent)
    with pytest.raises((BundleError, CheckpointError), match="nowhere"):
        compare.compare([demo_bundle, tmp_path / "nowhere"], None, None, COUNT, silent)
    small = tmp_path / "small"
    export(demo_checkpoint, small, ExportOptions.of(image_size=128, allow_failed_gates=True))
    with pytest.raises(OptionError, match="of different shapes"):
        compare.compare([demo_bundle, small], None, None, COUNT, silent)


def row(name, size, kl):
    return Row(name, "bundle", {"encoder": 0, "llm": size, "total": size}, 4.0, kl_nats=kl)


def test_the_front_is_what_nothing_beats_in_both():
    rows = [row("a", 10, 0.5), row("b", 20, 0.1), row("c", 20, 0.2), row("d", 30, 0.1)]
    rows += [row("e", 40, 0.0), row("f", 40, 0.0)]
    assert [r.name for r in mark_best(rows) if r.best] == ["a", "b", "e", "f"]


def test_the_image_and_the_table(rows, tmp_path, capsys):
    plotting.save(plot.chart(rows), tmp_path / "chart.png")
    from PIL import Image

    with Image.open(tmp_path / "chart.png") as drawn:
        assert drawn.size == (1200, 750)
        assert len(drawn.convert("RGB").getcolors(2**20)) > 10
    cli_compare.print_rows(rows)
    printed = capsys.readouterr().out
    assert all(row.name in printed for row in rows)
    assert printed.split()[:8] == ["encoder", "LLM", "bpw", "SNR", "LLM", "KL", "KL", "median"]
    for row in rows[:1] + rows[2:]:
        shown = [f"{row.kl_nats:.1e}", f"{row.kl_median_nats:.1e}", f"{row.kl_deviation_nats:.1e}"]
        assert "  ".join(shown) in printed
    assert "…" not in printed
    with pytest.raises(OptionError, match="no known suffix"):
        plotting.check(tmp_path / "chart.doc")
    with pytest.raises(DestinationError, match="not a directory"):
        plotting.check(tmp_path / "nowhere" / "chart.png")


CHOICES = {
    "four": {"llm_bits": 4},
    "three": {"llm_bits": 3},
    "impossible": {"llm_bits": 4, "embed_bits": 8},
}


def test_a_sweep_goes_on_where_it_was_stopped(demo_checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "sweep"

    class StoppedError(Exception):
        pass

    def stop_at_three(stage, done):
        if stage.startswith("three") and "compare" in stage:
            raise StoppedError

    with pytest.raises(StoppedError):
        sweep.sweep(demo_checkpoint, out, CHOICES, "app", None, COUNT, stop_at_three)
    stages = []
    rows, refused = sweep.sweep(
        demo_checkpoint, out, CHOICES, "app", None, COUNT, lambda stage, done: stages.append(stage)
    )
    assert not [stage for stage in stages if "language model" in stage]
    assert [row.name for row in rows] == [str(demo_checkpoint), "four", "three"]
    assert "layout app can't hold" in refused["impossible"]
    assert rows[1].kl_nats < rows[2].kl_nats

    def never(*arguments):
        raise AssertionError

    monkeypatch.setattr(sweep, "export", never)
    monkeypatch.setattr(compare.Bench, "of", never)
    again, _ = sweep.sweep(
        demo_checkpoint, out, {"three": {"llm_bits": 3}}, "app", None, COUNT, silent
    )
    assert again[1].to_dict() == {**rows[2].to_dict(), "best": True}
    # A bundle that was changed or removed is made again.
    shutil.rmtree(out / "three")
    with pytest.raises(AssertionError):
        sweep.sweep(demo_checkpoint, out, CHOICES, "app", None, COUNT, silent)
    # The directory is one sweep's.
    with pytest.raises(DestinationError, match="another checkpoint"):
        sweep.sweep(demo_checkpoint, out, CHOICES, "app", None, COUNT + 1, silent)


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"a/b": {}}, "can't be a directory's name"),
        ({"sweep.json": {}}, "can't be a directory's name"),
        ({"a": {"bits": 4}}, "has bits, which is no option"),
        ({"a": {"llm_bits": 7}}, "--llm-bits is 7"),
    ],
)
def test_choices_that_are_refused(demo_checkpoint, tmp_path, choices, words):
    with pytest.raises(OptionError, match=words):
        sweep.sweep(demo_checkpoint, tmp_path / "out", choices, "app", None, COUNT, silent)
    assert not (tmp_path / "out").exists()


def test_a_file_of_choices(tmp_path):
    file = tmp_path / "choices.json"
    file.write_text(json.dumps(CHOICES))
    assert sweep.read_choices(file, "app") == CHOICES
    assert sweep.read_choices(None, "mlx") is sweep.CHOICES["mlx"]
    for text, words in (("{", "can't be read"), ("[]", "expected a JSON object"), ("{}", "no set")):
        file.write_text(text)
        with pytest.raises(OptionError, match=words):
            sweep.read_choices(file, "app")


def test_a_layout_that_is_none():
    with pytest.raises(OptionError, match="--layout is swift: expected one of app, mlx"):
        sweep.read_choices(None, "swift")


def test_our_own_choices_are_options():
    for layout, choices in sweep.CHOICES.items():
        for fields in choices.values():
            ExportOptions.of(layout=layout, **fields)


def test_a_directory_that_is_something_else(demo_checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DestinationError, match="was not made by a sweep"):
        sweep.sweep(demo_checkpoint, tmp_path, CHOICES, "app", None, COUNT, silent)
    (tmp_path / sweep.RESULTS).write_text("{")
    with pytest.raises(DestinationError, match="can't be read"):
        sweep.sweep(demo_checkpoint, tmp_path, CHOICES, "app", None, COUNT, silent)


class TestSweepsOfOtherPeople:
    """A directory from elsewhere that says it is a sweep's."""

    def state(self, out, **changes):
        out.mkdir()
        (out / sweep.RESULTS).write_text(
            json.dumps({"made_from": "digest", "choices": {}} | changes)
        )
        return sweep._State.open(out, "digest")

    def test_a_link_in_the_place_of_a_temporary_file(self, tmp_path):
        mine = tmp_path / "mine.txt"
        mine.write_text("precious")
        state = self.state(tmp_path / "out")
        (tmp_path / "out" / f".{sweep.RESULTS}").symlink_to(mine)
        state.begin(tmp_path / "out" / "one", ExportOptions())
        assert mine.read_text() == "precious"
        assert "one" in json.loads((tmp_path / "out" / sweep.RESULTS).read_text())["choices"]

    def test_a_bundle_that_is_not_its_own(self, tmp_path):
        state = self.state(tmp_path / "out")
        (tmp_path / "out" / "one").mkdir()
        with pytest.raises(DestinationError, match="one is there and not of this sweep"):
            state.begin(tmp_path / "out" / "one", ExportOptions())

    @pytest.mark.parametrize(
        "changes",
        [
            {"choices": []},
            {"choices": {"one": []}},
            {"choices": {"one": {"options": {}, "manifest": "", "row": {"x": 1}}}},
            {"reference": 5},
            {"made_from": None},
        ],
        ids=str,
    )
    def test_results_of_other_types(self, tmp_path, changes):
        with pytest.raises(DestinationError, match=r"sweep\.json.*: remove it"):
            self.state(tmp_path / "out", **changes)
