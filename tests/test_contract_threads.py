"""Contract: threads, fork, Ctrl-C."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs, run_child
from reference import Array
from threads_kit import FORKS, THREADED_CALL, at_once, check_ctrl_c, turns_during


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_python_threads(isa: str, dtype: Any) -> None:
    """Each has its own problem and gets the bits that it gets alone."""
    sizes = [(1, 3000), (200, 300), (16, 16), (33, 1000), (64, 64), (7, 500), (100, 100), (1, 50)]
    rng = np.random.default_rng(3)
    problems = [inputs(rng, rows, keys, heads=4, dtype=dtype) for rows, keys in sizes]
    expected = [attncore.attention(*problem, causal=True) for problem in problems]
    got: list[list[Array]] = [[] for _ in problems]

    def work(i: int) -> None:
        for turn in range(12):
            threads = (None, 1, 2, 3)[turn % 4]
            got[i].append(attncore.attention(*problems[i], causal=True, num_threads=threads))

    at_once(len(problems), work)
    for i, results in enumerate(got):
        assert len(results) == 12
        for out in results:
            assert_same_bits(out, expected[i], f"problem {i}")


def test_the_gil_is_released(isa: str) -> None:
    rng = np.random.default_rng(3)
    made = inputs(rng, 2000, 4000, heads=4, dim=64)
    assert turns_during(lambda: attncore.attention(*made, num_threads=1)) > 5


def test_fork_after_a_threaded_call() -> None:
    """A child, its own child, and the parent afterwards all go on, with the same bits."""
    assert run_child(THREADED_CALL + FORKS).split() == ["0", "0", "True"]


def test_multiprocessing_with_fork() -> None:
    out = run_child(
        THREADED_CALL
        + """
import multiprocessing

def work(i):
    one = attncore.attention(q + i, k, v, num_threads=1)
    return float(np.abs(attncore.attention(q + i, k, v) - one).max())

signal.alarm(100)
with multiprocessing.get_context("fork").Pool(3) as pool:
    print(max(pool.map(work, range(6))), same())
"""
    )
    assert out.split() == ["0.0", "True"]


AFTER = """
assert (attncore.attention(*small) == expected).all()
assert (attncore.attention(*small, num_threads=2) == expected).all()
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("queries", "rows", "calls", "options"),
    [
        (40_000, 40_000, 1, ""),
        (40_000, 40_000, 1, "causal=True, softcap=5.0"),
        (100_000, 1, 100_000, ""),
    ],
)
def test_ctrl_c(threads: int, queries: int, rows: int, calls: int, options: str) -> None:
    setup = f"""
rng = np.random.default_rng(1)
q, k, v = (rng.standard_normal((1, 16, {queries}, 64), dtype=np.float32) for _ in range(3))
q = q[:, :, :{rows}]
small = [a[:, :1, :100] for a in (q, k, v)]
expected = attncore.attention(*small)
"""
    call = f"attncore.attention(q, k, v, num_threads={threads}, {options})"
    check_ctrl_c(setup, call, AFTER, repeats=calls)


DAEMON = """
import threading, time
import numpy as np
import attncore

x = np.ones((2, 16, 64), np.float32)
cache = attncore.KVCache(1, 2, 64, capacity=16)
cache.append(x[None], x[None])

def serve():
    while True:
        attncore.attention(x, x, x)
        cache.gather(0)

for _ in range(3):
    threading.Thread(target=serve, daemon=True).start()
time.sleep(0.1)
"""


def test_daemon_threads_at_exit() -> None:
    """A process ends well, though its threads are in calls: its exit status is 0."""
    for _ in range(3):
        run_child(DAEMON)


SHORT_OF_MEMORY = """
import re, resource, threading
import numpy as np
import attncore
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

x, callers = np.ones((8, 600, 64), np.float32), 8
barrier = threading.Barrier(callers)

def call(_):
    barrier.wait()
    return attncore.attention(x, x, x, num_threads=8).sum()

with ThreadPoolExecutor(callers) as pool:
    list(pool.map(lambda _: barrier.wait(), range(callers)))
    now = int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (now + (250 << 20), -1))
    print(len(set(pool.map(call, range(callers)))))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_short_of_memory_for_threads() -> None:
    """Of many teams that begin at once, as many threads as there is memory for do the work."""
    for _ in range(3):
        assert run_child(SHORT_OF_MEMORY).strip() == "1"


FORK_OF_A_THREAD = """
import os, signal, threading, time
import numpy as np
import attncore

signal.signal(signal.SIGINT, signal.default_int_handler)
x = np.random.default_rng(1).standard_normal((1, 16, 40_000, 64), dtype=np.float32)
attncore.attention(x[:, :, :9], x[:, :, :9], x[:, :, :9])

def fork():
    child = os.fork()
    if child == 0:  # this thread is the child's main one
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        try:
            attncore.attention(x, x, x)
        except KeyboardInterrupt:
            os._exit(0 if time.monotonic() - start < 2 else 1)
        os._exit(2)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

thread = threading.Thread(target=fork)
thread.start()
thread.join()
"""


def test_ctrl_c_after_a_fork_of_another_thread() -> None:
    assert run_child(FORK_OF_A_THREAD).strip() == "0"


def test_num_threads_of_a_call_leaves_the_default(isa: str, rng: Any) -> None:
    before = attncore.get_num_threads()
    attncore.attention(*inputs(rng, 5, 9), num_threads=before + 3)
    assert attncore.get_num_threads() == before


def test_omp_num_threads() -> None:
    code = "import attncore; print(attncore.get_num_threads())"
    set_it = "import os; os.environ['OMP_NUM_THREADS'] = '3'\n"
    assert run_child(set_it + code).strip() == "3"


def test_isa_from_the_environment(isa: str) -> None:
    code = (
        f"import os; os.environ['ATTNCORE_ISA'] = '{isa}'\nimport attncore; print(attncore.isa())"
    )
    assert run_child(code).strip() == isa


def test_use_isa_is_process_wide() -> None:
    names: list[str] = []
    last = attncore.available_isas()[-1]
    with attncore.use_isa(last):
        worker = threading.Thread(target=lambda: names.append(attncore.isa()))
        worker.start()
        worker.join()
    assert names == [last]
