"""What a loaded model promises of threads: any of them, at any time, and the answers of one."""

import gc
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, zip_longest
from threading import Barrier, Thread

import mlx.core as mx
import pytest

import fastvlm_mlx
import fastvlm_mlx.language.detokenizer
import fastvlm_mlx.looking
from fastvlm_mlx.errors import FastVLMError
from fastvlm_mlx.language.worker import Worker
from model_export.options import ExportOptions
from model_export.pipeline import export
from model_export.samples import scenes

QUESTIONS = ("Describe the image.", "How many shapes are there?", "Hello", "Is there a star?")
LONG = "Describe the image."


@pytest.fixture(scope="module")
def model(demo_bundle):
    return fastvlm_mlx.load(demo_bundle)


@pytest.fixture(scope="module")
def image():
    return scenes.generate(3, held_out=True).draw(300)


def wait_until(true, seconds=10.0):
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        gc.collect()
        time.sleep(0.01)
    return true()


def run_in_threads(*tasks):
    """What each returns; what one raises is raised here."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


@pytest.mark.parametrize("layout", ["app", "mlx"])
def test_answers_of_many_threads_are_those_of_one(layout, request):
    """Loaded in one thread, first used by eight others at once, an image each."""
    bundle = request.getfixturevalue({"app": "demo_bundle", "mlx": "mlx_bundle"}[layout])
    drawn = [scenes.generate(seed, held_out=True).draw(128) for seed in range(8)]
    cases = [
        (drawn[i], QUESTIONS[i % 4], {"max_tokens": 12, "temperature": i % 2, "seed": i})
        for i in range(8)
    ]
    alone = fastvlm_mlx.load(bundle)
    expected = [alone.generate(seen, prompt, **how).tokens for seen, prompt, how in cases]
    model = fastvlm_mlx.load(bundle)
    together = Barrier(len(cases))

    def ask(case):
        seen, prompt, how = case
        together.wait()
        return [model.generate(seen, prompt, **how).tokens for _ in range(2)]

    found = run_in_threads(*(lambda case=case: ask(case) for case in cases))
    assert found == [[tokens, tokens] for tokens in expected]


def test_two_that_ask_first_make_one_encoder(demo_bundle, monkeypatch):
    made = []
    make = fastvlm_mlx.looking.load_bundle_encoder

    def slowly(*arguments):
        made.append(arguments)
        time.sleep(0.1)
        return make(*arguments)

    monkeypatch.setattr(fastvlm_mlx.looking, "load_bundle_encoder", slowly)
    model = fastvlm_mlx.load(demo_bundle)
    first, second = run_in_threads(lambda: model.encoder, lambda: model.encoder)
    assert first is second
    assert len(made) == 1


def test_a_model_loaded_in_a_thread_that_has_ended(demo_bundle, model, image):
    loaded = []
    thread = Thread(target=lambda: loaded.append(fastvlm_mlx.load(demo_bundle)))
    thread.start()
    thread.join()
    found = loaded[0].generate(image, LONG, max_tokens=8)
    assert found.tokens == model.generate(image, LONG, max_tokens=8).tokens
    # Its parts, too, are anyone's.
    ids = mx.array(model.tokenizer.encode("a star").ids)
    assert loaded[0].model.embed_inputs(ids).shape[0] == len(ids)


def test_interleaved_streams_give_what_they_give_alone(model, image):
    features = model.encode(image)
    cases = [{"seed": 1}, {"seed": 2}, {"seed": 1, "top_p": 0.9}, {"temperature": 0.0}]
    cases = [{"temperature": 5.0, "max_tokens": 16} | case for case in cases]
    alone = [list(model.stream(features, LONG, **case)) for case in cases]
    assert alone[0] != alone[1]
    streams = [model.stream(features, LONG, **case) for case in cases]
    together = [[] for _ in streams]
    for turn in zip_longest(*streams):
        for pieces, piece in zip(together, turn, strict=True):
            pieces += [piece] if piece is not None else []
    assert together == alone


def test_a_stream_is_handed_from_thread_to_thread(model, image):
    expected = list(model.stream(image, LONG, max_tokens=16))
    generation = model.stream(image, LONG, max_tokens=16)
    pieces = []
    while len(pieces) < len(expected):
        thread = Thread(target=lambda: pieces.append(next(generation)))
        thread.start()
        thread.join()
    assert pieces == expected
    assert next(generation, None) is None
    assert "".join(pieces) == generation.result.text


def test_a_stream_that_several_iterate_over_gives_each_piece_once(model, image):
    expected = list(model.stream(image, LONG, max_tokens=24))
    generation = model.stream(image, LONG, max_tokens=24)
    shares = run_in_threads(*[lambda: list(generation)] * 3)
    assert sorted(chain.from_iterable(shares)) == sorted(expected)
    assert generation.result.text == "".join(expected)


def test_streams_that_nobody_goes_on_with_block_nobody(model, image):
    features = model.encode(image)
    begun = [model.stream(features, LONG, max_tokens=64) for _ in range(4)]
    for generation in begun:
        next(generation)
    steps = [weakref.ref(generation._steps) for generation in begun]
    assert model.generate(features, "Hello", max_tokens=3).generation_tokens
    del begun, generation
    # What they hold is let go of, by the thread that it belongs to.
    assert wait_until(lambda: not any(step() for step in steps))
    # And what this thread computes itself is not in the way of it.
    assert mx.ones(3).sum().item() == 3


def test_a_closed_stream_has_no_result(model, image):
    generation = model.stream(image, LONG, max_tokens=64)
    next(generation)
    generation.close()
    assert next(generation, None) is None
    with pytest.raises(FastVLMError, match="was closed before it had a result"):
        _ = generation.result
    whole = model.stream(image, LONG, max_tokens=4)
    text = whole.result.text
    whole.close()
    assert whole.result.text == text


def test_a_stream_that_fails_says_so_each_time(model, image, monkeypatch):
    generation = model.stream(image, LONG, max_tokens=64)
    next(generation)
    monkeypatch.setattr(fastvlm_mlx.language.detokenizer.Text, "add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(generation)
    for _ in range(2):
        with pytest.raises(FastVLMError, match=r"failed \(ZeroDivisionError: .*\) before it had"):
            _ = generation.result
    monkeypatch.undo()
    assert model.generate(image, LONG, max_tokens=2).generation_tokens == 2


def test_the_state_of_mlx_s_chance_is_the_user_s(model, image):
    mx.random.seed(11)
    expected = mx.random.uniform(shape=(4,)).tolist()
    mx.random.seed(11)
    model.generate(image, LONG, max_tokens=4, temperature=1.0, seed=5)
    model.generate(image, LONG, max_tokens=4, temperature=1.0)
    assert mx.random.uniform(shape=(4,)).tolist() == expected


def test_a_thread_serves_one_model_after_the_other(demo_bundle):
    """MLX keeps threads of its own for each that ended, so none ends."""

    def load_and_begin():
        model = fastvlm_mlx.load(demo_bundle)
        next(model.stream(None, "Hello", max_tokens=9))

    load_and_begin()
    gc.collect()
    before = threading.active_count()
    for _ in range(4):
        load_and_begin()
        gc.collect()
    assert threading.active_count() == before


def in_a_process(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


MIDDLE = """
import sys, fastvlm_mlx
model = fastvlm_mlx.load(sys.argv[1])
stream = model.stream(None, "Hello", max_tokens=1000, temperature=5.0)
next(stream)
"""


class TestEnd:
    def test_in_the_middle_of_a_stream(self, demo_bundle):
        process = in_a_process(MIDDLE, demo_bundle)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "", "")

    def test_while_other_threads_generate(self, demo_bundle):
        """Threads that Python waits for have their answer; daemons are cut off."""
        code = MIDDLE + (
            "from threading import Thread\n"
            "Thread(target=lambda: [stream.result for _ in iter(int, 1)], daemon=True).start()\n"
            "ask = lambda: print(model.generate(None, 'Hello', max_tokens=30).generation_tokens)\n"
            "Thread(target=ask).start()\n"
        )
        process = in_a_process(code, demo_bundle)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0
        assert int(out) >= 1
        assert "StreamContext" not in err
        assert "ignored" not in err

    def test_ctrl_c_ends_the_waiting(self, demo_bundle):
        """In a task that takes long, at once; and the stream goes on after it."""
        code = MIDDLE + (
            "import time, threading\n"
            "busy = threading.Thread(target=lambda: model.worker.run(time.sleep, 3))\n"
            "busy.start(); time.sleep(0.3); print('ready', flush=True)\n"
            "started = time.monotonic()\n"
            "try:\n"
            "    stream.result\n"
            "except KeyboardInterrupt:\n"
            "    print(time.monotonic() - started < 2, len(''.join(stream)) > 0)\n"
            "print(stream.result.generation_tokens > 0)\n"
        )
        process = in_a_process(code, demo_bundle)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "True True\nTrue\n", "")

    def test_a_forked_process_is_told_so(self, demo_bundle):
        code = MIDDLE + (
            "import os\n"
            "from fastvlm_mlx.errors import FastVLMError\n"
            "if os.fork() == 0:\n"
            "    for use in (lambda: next(stream), lambda: stream.result, lambda: model.encoder,\n"
            "                lambda: model.generate(None, 'Hello'), lambda: model.encode(b''),\n"
            "                lambda: fastvlm_mlx.load(sys.argv[1])):\n"
            "        try:\n"
            "            use()\n"
            "        except FastVLMError as error:\n"
            "            print('forked' in str(error), flush=True)\n"
            "    os._exit(0)\n"
            "os.wait()\n"
            "print(next(stream) != '')\n"
        )
        process = in_a_process(code, demo_bundle)
        out, err = process.communicate(timeout=60)
        assert out.split() == ["True"] * 7, err


class TestWorker:
    def test_tasks_run_in_their_order_on_one_thread(self):
        worker = Worker()
        found = []
        tasks = [
            worker.submit(lambda i=i: found.append((i, threading.get_ident()))) for i in range(50)
        ]
        for task in tasks:
            task.result()
        assert [i for i, _ in found] == list(range(50))
        assert len({thread for _, thread in found} | {threading.get_ident()}) == 2

    def test_a_task_may_run_another(self):
        worker = Worker()
        assert worker.run(lambda: worker.run(lambda: worker.run(int))) == 0

    @pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
    def test_what_a_task_raises_is_whose_it_was(self, error):
        def fail():
            raise error

        worker = Worker()
        with pytest.raises(type(error)) as caught:
            worker.run(fail)
        assert caught.value is error
        assert worker.run(int) == 0

    def test_after_its_end(self):
        worker = Worker()
        worker.run(int)
        worker.end()
        with pytest.raises(FastVLMError, match="about to end"):
            worker.run(int)


def test_a_second_export_from_another_thread(demo_checkpoint, demo_bundle, tmp_path):
    """The first was the fixture's, in this one."""
    options = ExportOptions.of(llm_bits=4)
    run_in_threads(lambda: export(demo_checkpoint, tmp_path / "second", options))
    name = "model.safetensors"
    assert (tmp_path / "second" / name).read_bytes() == (demo_bundle / name).read_bytes()


def test_exports_at_once_and_a_model_beside_them(demo_checkpoint, demo_bundle, tmp_path, image):
    """torch.export and coremltools keep where they are for the whole process."""
    options = ExportOptions.of(llm_bits=4)
    expected = fastvlm_mlx.load(demo_bundle).generate(image, "What is this?", max_tokens=4).tokens
    with ThreadPoolExecutor(3) as pool:
        places = [tmp_path / "one", tmp_path / "two"]
        exports = [pool.submit(export, demo_checkpoint, place, options) for place in places]
        found = set()
        while not all(done.done() for done in exports):
            model = fastvlm_mlx.load(demo_bundle)
            found.add(model.generate(image, "What is this?", max_tokens=4).tokens)
        for done in exports:
            assert done.result().manifest["gates_passed"]
    assert found == {expected}
