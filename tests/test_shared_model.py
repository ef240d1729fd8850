"""Is one loaded model right for several threads, for generators taken in turn, after a fork and after an interrupt?"""

import asyncio
import functools
import gc
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import bincompress
from bincompress.calibration.collect import calibrate, run_in_threads
from bincompress.calibration.statistics import open_statistics
from bincompress.compression.plan import make_plan
from bincompress.compression.recipe import load_recipe
from bincompress.compression.run import compress
from bincompress.errors import StoreError
from bincompress.inference.evaluate import evaluate
from bincompress.inference.generate import Model
from bincompress.inference.load import load
from bincompress.inference.sampling import Sampling
from bincompress.process.blas import one_blas_thread
from bincompress.sources.checkpoint import open_checkpoint
from cpu_kernels.parallel.workers import Workers
from tests.forked import Forked

pytestmark = pytest.mark.slow  # many texts, by threads and processes

PROMPTS = ("The kernel", "A scheduler decides which", "Memory is", "The file system " * 40)
TOKENS = 24
BOUND = 60  # seconds; what waits longer hangs


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = Path(bincompress.__file__).parent / "demo_model"
    found = tmp_path_factory.mktemp("shared") / "store"
    # Planes of each kind of matrix: looked up, decoded (8 groups), kept.
    recipe = load_recipe(None, {"groups": 8, "block": "matrix", "embeddings": "8bit"}, ("*.0.mlp.up_proj.weight",))
    assert compress(make_plan(open_checkpoint(folder), recipe), str(found)).complete
    return str(found)


@pytest.fixture(scope="module", params=[1, 2])
def model(request: pytest.FixtureRequest, store: str) -> Model:
    return load(store, threads=request.param)


def write(model: Model, prompt: str, tokens: int = TOKENS) -> str:
    return "".join(generation(model, prompt, tokens))


def generation(model: Model, prompt: str, tokens: int = TOKENS) -> Iterator[str]:
    return iter(model.stream(prompt, replace(model.defaults, sampling=Sampling(temperature=0.0), max_tokens=tokens)))


def perplexity(model: Model) -> float:
    return evaluate(model.decoder, np.arange(5, 205) % model.decoder.config.vocab, context=100).perplexity


def test_threads_with_different_calls_each_get_what_they_get_alone(model: Model) -> None:
    alone = {prompt: write(model, prompt) for prompt in PROMPTS}
    scored = perplexity(model)
    together = threading.Barrier(len(PROMPTS) + 1)

    def begin(call: Callable[[], object]) -> list[object]:
        together.wait(BOUND)
        return [call() for _ in range(3)]

    with ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        score = pool.submit(begin, lambda: perplexity(model))
        texts = {prompt: pool.submit(begin, functools.partial(write, model, prompt)) for prompt in PROMPTS}
        assert {prompt: text.result(BOUND) for prompt, text in texts.items()} == {p: [alone[p]] * 3 for p in PROMPTS}
        assert score.result(BOUND) == [scored] * 3


def test_generators_in_turn_closed_early_and_forgotten_in_another_thread(model: Model) -> None:
    first, second = (write(model, prompt) for prompt in PROMPTS[:2])
    forgotten = generation(model, PROMPTS[2])
    next(forgotten)
    closed = generation(model, PROMPTS[3])
    next(closed)
    a, b = generation(model, PROMPTS[0]), generation(model, PROMPTS[1])
    pieces: tuple[list[str], list[str]] = ([next(a)], [next(b)])
    closed.close()  # type: ignore[attr-defined]
    keep = [forgotten]
    del forgotten
    end = threading.Thread(target=lambda: (keep.clear(), gc.collect()))  # type: ignore[func-returns-value]
    end.start()
    end.join(BOUND)
    left = {0: a, 1: b}
    while left:
        for number, text in list(left.items()):
            piece = next(text, None)
            if piece is None:
                del left[number]
            else:
                pieces[number].append(piece)
    assert ["".join(found) for found in pieces] == [first, second]


def test_a_generator_beside_a_thread_and_asyncio(model: Model) -> None:
    first, second = (write(model, prompt) for prompt in PROMPTS[:2])

    async def serve() -> list[str]:
        begun = generation(model, PROMPTS[0])
        piece = next(begun)  # suspended: other calls must not wait for it
        others = await asyncio.gather(*(asyncio.to_thread(write, model, prompt) for prompt in PROMPTS[:2]))
        return [piece + "".join(begun), *others]

    assert asyncio.run(asyncio.wait_for(serve(), BOUND)) == [first, first, second]


def test_a_call_from_within_a_call_is_refused(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write(model, PROMPTS[0])
    head = model.decoder.head

    def again(states: object) -> object:
        monkeypatch.setattr(model.decoder, "head", head)
        with pytest.raises(RuntimeError, match="called again"):
            write(model, PROMPTS[1])
        return head(states)  # type: ignore[arg-type]

    monkeypatch.setattr(model.decoder, "head", again)
    assert write(model, PROMPTS[0]) == expected


FORKED = """
import os, sys, threading
from dataclasses import replace
from bincompress import load
from bincompress.inference.sampling import Sampling
model = load(sys.argv[1], threads=2)
def write(prompt):
    settings = replace(model.defaults, sampling=Sampling(temperature=0.0), max_tokens=12)
    return "".join(model.stream(prompt, settings))
prompts = ["The kernel", "The file system " * 60]
if sys.argv[2] == "warm":
    before = [write(prompt) for prompt in prompts]
held = threading.Event(), threading.Event()
def hold():
    with model.decoder.workers.lock:
        held[0].set(); held[1].wait()
if sys.argv[2] == "held":
    threading.Thread(target=hold, daemon=True).start()
    held[0].wait()
child = os.fork()
if not child:
    print(repr([write(prompt) for prompt in prompts]), flush=True)
    os._exit(0)
held[1].set()
assert os.waitpid(child, 0)[1] == 0
print(repr([write(prompt) for prompt in prompts]), flush=True)
"""


@pytest.mark.parametrize("state", ["cold", "warm", "held"])
def test_a_forked_process_writes_the_same_text(forked: Forked, store: str, state: str) -> None:
    done = forked(store, state, code=FORKED)
    assert done.returncode == 0, done.stderr
    child, parent = done.stdout.splitlines()
    assert child == parent


def test_an_interrupt_disturbs_no_later_call(model: Model) -> None:
    expected = [write(model, prompt) for prompt in PROMPTS]
    for moment in range(1, 4000, 97):  # the function call before which it comes
        left = iter(range(moment))

        def interrupt(frame: object, event: str, argument: object, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                sys.setprofile(None)
                raise KeyboardInterrupt

        try:
            sys.setprofile(interrupt)
            while True:
                write(model, PROMPTS[moment % 4])
        except KeyboardInterrupt:
            pass
        assert write(model, PROMPTS[moment % 4]) == expected[moment % 4]


def test_an_unsettled_run_is_waited_for() -> None:
    release, late = threading.Event(), []

    def slow() -> None:
        release.wait(BOUND)
        late.append("first")

    with Workers(2) as workers:
        # As an interrupt leaves it that comes between handing out a task and waiting for it.
        workers._unsettled = True
        workers._tasks[0].put((slow, queue.SimpleQueue()))
        threading.Timer(0.05, release.set).start()
        workers.run([lambda: late.append("second"), lambda: None])
    assert late == ["first", "second"]


def blas_threads() -> list[int]:
    return [found["num_threads"] for found in threadpoolctl.threadpool_info() if found["user_api"] == "blas"]


def test_blas_has_the_callers_threads_after_every_call(store: str) -> None:
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        before = blas_threads()
        assert 3 in before
        model = load(store, threads=2, activation_bits=16)
        assert blas_threads() == before
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda prompt: write(model, prompt, 3), PROMPTS))
        perplexity(model)
        assert blas_threads() == before
        with pytest.raises(StoreError):
            load("nowhere")
        assert blas_threads() == before


def test_compressing_in_process_leaves_blas_alone(tiny_model: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny_model)
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        before = blas_threads()
        calibrate(checkpoint, np.arange(64).reshape(2, 32), str(tmp_path / "stats"), runner=run_in_threads(1))
        statistics = open_statistics(str(tmp_path / "stats"))
        plan = make_plan(checkpoint, load_recipe(None, {"method": "xnor", "compensate": True}), statistics=statistics)
        assert compress(plan, str(tmp_path / "store")).complete
        assert blas_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_blas_in_a_child_of_a_fork() -> None:
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        before = blas_threads()
        entered, leave = threading.Event(), threading.Event()

        def inside() -> None:
            with one_blas_thread():
                entered.set()
                leave.wait(BOUND)

        thread = threading.Thread(target=inside)
        thread.start()
        entered.wait(BOUND)
        child = os.fork()
        if not child:
            os._exit(0 if blas_threads() == before else 1)
        leave.set()
        thread.join(BOUND)
        assert os.waitpid(child, 0)[1] == 0
        assert blas_threads() == before
