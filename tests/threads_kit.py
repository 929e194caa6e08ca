"""What the tests of threads share: calls at once, the GIL, and scripts of processes that fork or get Ctrl-C."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from kit import run_child


def at_once(count: int, work: Callable[[int], object]) -> None:
    """work(0) … work(count - 1) from the same moment on, in threads of their own; what one raises is raised."""
    start = threading.Barrier(count)

    def run(i: int) -> None:
        start.wait()
        work(i)

    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(run, i) for i in range(count)]:
            done.result()


def turns_during(call: Callable[[], object]) -> int:
    """How often this thread runs while another one is in the call: hardly, if that holds the GIL."""
    worker = threading.Thread(target=call)
    turns = 0
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        turns += 1
    return turns


# After a call on two threads; `same` says whether calls still give its bits.
THREADED_CALL = """
import os, signal, sys, warnings
import numpy as np
import attncore

warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads and fork
rng = np.random.default_rng(1)
q, k, v = (rng.standard_normal((2, 8, 256, 64), dtype=np.float32) for _ in range(3))
expected = attncore.attention(q, k, v, num_threads=2)

def same():
    return all(
        (attncore.attention(q, k, v, num_threads=threads) == expected).all()
        for threads in (2, 1, None, 3)
    )
"""

# Prints "0 0 True" if it is `same` in two children, in a child of each, and in the parent afterwards.
FORKS = """
def fork(run):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a hang ends the child
        os._exit(run())
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

def in_child():
    return 0 if same() and fork(lambda: 0 if same() else 4) == 0 else 3

print(fork(in_child), fork(in_child), same())
"""

CTRL_C = """
import os, signal, threading, time
import numpy as np
import attncore

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
{setup}
sent = 0.0

def press():
    global sent
    time.sleep(0.3)
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)

presser = threading.Thread(target=press)
presser.start()
try:
    for _ in range({repeats}):
        {calls}
    print("not interrupted")
except KeyboardInterrupt:
    print(time.monotonic() - sent)
presser.join()
{after}
print("unharmed")
"""


def check_ctrl_c(setup: str, calls: str, after: str, *, repeats: int = 1) -> None:
    """In a process of its own: `calls`, a line of Python, ends soon after Ctrl-C, and `after` raises nothing.

    0.2 s is promised; 1 s is asserted, since other work may run on the machine."""
    code = CTRL_C.format(setup=setup, calls=calls, after=after, repeats=repeats)
    seconds, last = run_child(code).split("\n")[:2]
    assert seconds != "not interrupted"
    assert float(seconds) < 1.0
    assert last == "unharmed"
