"""Contract of gradients: memory beyond inputs, outputs and gradients, in a process of its own."""

from __future__ import annotations

import pytest

from test_contract_memory import measured, only_linux

SETUP = """
def problem(heads, kv_heads, queries, keys, dim, dtype=np.float32):
    q, k, v = (
        np.full((1, h, s, dim), x, dtype)
        for h, s, x in ((heads, queries, 0.1), (kv_heads, keys, 0.2), (kv_heads, keys, 0.3))
    )
    d_out, out, lse = np.full_like(q, 0.4), np.zeros_like(q), np.zeros(q.shape[:3], np.float32)
    return d_out, q, k, v, out, lse, [np.full_like(a, 7) for a in (q, k, v)]

def both(problem, options, **others):
    d_out, q, k, v, out, lse, (d_q, d_k, d_v) = problem
    none = dict.fromkeys(attncore.Gradients._fields)
    into = attncore.Gradients(**{**none, "query": d_q, "key": d_k, "value": d_v, **others})
    _, lse = attncore.attention(q, k, v, out=out, return_lse=True, num_threads=2, **options)
    attncore.attention_backward(d_out, q, k, v, out, lse, into=into, num_threads=2, **options)

both(problem(1, 1, 4, 4, 4), {})
"""


@only_linux
@pytest.mark.parametrize("options", ["causal=True", "window=(3000, 1000)"])
def test_long_sequence(options: str) -> None:
    """16384 tokens, 4 heads of 64: the score matrix would be 4 GiB.  Twice the tokens, at most twice the memory."""
    half, whole = measured(f"""{SETUP}
for size in (8192, 16384):
    made = problem(4, 4, size, size, 64)
    print(growth(lambda: both(made, dict({options}))))
    del made
""")
    assert whole < 96
    assert whole < 2 * half + 8


@only_linux
def test_dropout_and_relative_bias_are_not_expanded() -> None:
    (grown,) = measured(f"""{SETUP}
made = problem(4, 4, 8192, 8192, 64)
table = attncore.RelativeBias(np.zeros((4, 32), np.float32))
options = dict(causal=True, dropout_p=0.1, seed=3, relative_bias=table)
print(growth(lambda: both(made, options)))
""")
    assert grown < 96


@only_linux
def test_biases_and_heads_are_not_expanded() -> None:
    """(64 heads, 256, 8192) would be 512 MiB of bias gradient, and 64 heads of keys 256 MiB."""
    (grown,) = measured(f"""{SETUP}
made = problem(64, 1, 256, 8192, 64)
bias = tuple(np.zeros(s, np.float32) for s in ((1, 8192), (256, 8192), (64, 1, 1), (64, 1, 8192)))
gradients = tuple(np.zeros_like(a) for a in bias)
print(growth(lambda: both(made, dict(bias=bias), bias=gradients)))
""")
    assert grown < 96


@only_linux
@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_dtypes_are_not_converted_whole(dtype: str) -> None:
    """128 MiB of keys and of values."""
    (grown,) = measured(f"""{SETUP}
keys = 2**27 // np.dtype("{dtype}").itemsize // 2 // 128
made = problem(4, 2, 20, keys, 128, "{dtype}")
made[5][...] = 9
d_out, q, k, v, out, lse, (d_q, d_k, d_v) = made
into = attncore.Gradients(d_q, d_k, d_v, None, None, None, None)
lse = lse.astype(np.float64 if "{dtype}" == "float64" else np.float32)
run = lambda: attncore.attention_backward(d_out, q, k, v, out, lse, into=into, num_threads=2)
print(growth(run))
""")
    assert grown < 96
