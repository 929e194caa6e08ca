"""The rest of the flat API: sdpa, merge, explain, ISAs, threads, build information."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits, inputs, near
from reference import accumulation


def test_all_is_there() -> None:
    for name in attncore.__all__:
        assert hasattr(attncore, name)
    wanted = {"attention", "scaled_dot_product_attention", "attention_weights", "merge", "explain"}
    wanted |= {"attention_backward", "dropout_mask", "RelativeBias", "Gradients"}
    wanted |= {"MultiHeadAttention", "linear", "linear_backward", "rope"}
    wanted |= {"isa", "available_isas", "use_isa", "get_num_threads", "set_num_threads"}
    wanted |= {"show_config", "get_include", "get_cmake_dir"}
    assert wanted <= {*attncore.__all__}
    for name in wanted:
        assert getattr(attncore, name).__doc__


def test_signature() -> None:
    parameters = inspect.signature(attncore.attention).parameters
    assert list(parameters) == [
        "query",
        "key",
        "value",
        "causal",
        "window",
        "query_offset",
        "mask",
        "bias",
        "alibi",
        "relative_bias",
        "softcap",
        "sinks",
        "scale",
        "query_segments",
        "key_segments",
        "query_lengths",
        "key_lengths",
        "tree_parents",
        "layout",
        "dropout_p",
        "seed",
        "out",
        "return_lse",
        "precision",
        "num_threads",
    ]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[3:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sdpa(isa: str, dtype: Any, rng: Any) -> None:
    q, k, v = inputs(rng, 9, 14, batch=2, heads=4, dtype=dtype)
    sdpa = attncore.scaled_dot_product_attention
    assert_same_bits(sdpa(q, k, v), attncore.attention(q, k, v))
    top_left = attncore.attention(q, k, v, causal=True, query_offset=0)
    assert_same_bits(sdpa(q, k, v, is_causal=True), top_left)
    mask = rng.random((2, 1, 9, 14)) < 0.5
    mask[0, 0, 3] = False
    out = sdpa(q, k, v, mask)
    assert_same_bits(out, attncore.attention(q, k, v, mask=mask))
    assert (out[0, :, 3] == 0).all()
    bias = rng.standard_normal((4, 9, 14)).astype(dtype)
    assert_same_bits(
        sdpa(q, k, v, bias, 0.0, False, 0.3), attncore.attention(q, k, v, bias=bias, scale=0.3)
    )
    grouped = sdpa(q, k[:, :2], v[:, :2], enable_gqa=True)
    assert_same_bits(grouped, attncore.attention(q, k[:, :2], v[:, :2]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3)])
def test_merge(isa: str, dtype: Any, lead: tuple[int, ...], rng: Any) -> None:
    wide = accumulation(dtype)
    outs = [rng.standard_normal((*lead, 5, 7)).astype(dtype) for _ in range(3)]
    lses = [(3 * rng.standard_normal((*lead, 5))).astype(wide) for _ in range(3)]
    lses[0][..., 1] = -np.inf
    outs[0][..., 1, :] = 0
    for i in range(3):
        lses[i][..., 2] = -np.inf
        outs[i][..., 2, :] = 0
        lses[i][..., 3] += 1e4
    out, lse = attncore.merge(outs, lses)
    assert out.dtype == dtype
    assert lse.dtype == wide
    logs = np.stack(lses).astype(np.float64)
    top = np.where(np.isfinite(logs.max(axis=0)), logs.max(axis=0), 0)
    shares = np.exp(logs - top)
    parts = np.stack(outs).astype(np.float64)
    near(out, np.einsum("p...,p...d->...d", shares / np.maximum(shares.sum(axis=0), 1e-99), parts))
    with np.errstate(divide="ignore"):
        total = top + np.log(shares.sum(axis=0))
    np.testing.assert_allclose(lse, total, rtol=1e-6, atol=1e-6)
    assert (out[..., 2, :] == 0).all()
    assert (lse[..., 2] == -np.inf).all()


def test_merge_of_tokens_first(isa: str, rng: Any) -> None:
    """Results in "bshd", and of packed sequences, whose lse have heads first all the same."""
    query, key, value = (np.float32(rng.standard_normal((2, 6, 6, 8))) for _ in range(3))  # 6 heads
    options: dict[str, Any] = {"layout": "bshd", "return_lse": True}
    parts = [attncore.attention(query, key[:, at], value[:, at], **options)
             for at in (slice(0, 4), slice(4, 6))]  # fmt: skip
    out, lse = attncore.merge(*zip(*parts, strict=True), layout="bshd")
    whole, whole_lse = attncore.attention(query, key, value, **options)
    near(out, whole)
    near(lse, whole_lse)
    packed = [(out[0], lse[0]) for out, lse in parts]
    near(attncore.merge(*zip(*packed, strict=True), layout="bshd")[0], whole[0])


def test_merge_of_a_part_that_saw_nothing() -> None:
    """It adds nothing, whatever its output holds."""
    outs, lses = [np.full((3, 2), np.nan), np.ones((3, 2))], [np.full(3, -np.inf), np.zeros(3)]
    for order in (1, -1):
        out, lse = attncore.merge(outs[::order], lses[::order])
        assert_same_bits(out, outs[1])
        assert_same_bits(lse, lses[1])


def test_merge_of_one_and_of_strided(isa: str, rng: Any) -> None:
    out, lse = np.float32(rng.random((4, 6, 8))), np.float32(rng.random((4, 6)))
    merged = attncore.merge([out], [lse])
    near(merged[0], out)
    near(merged[1], lse)
    strided = attncore.merge([out[::2, ::-1, ::3]] * 2, [lse[::2, ::-1]] * 2)
    near(strided[0], out[::2, ::-1, ::3])
    near(strided[1], lse[::2, ::-1] + np.log(np.float32(2)))


def test_explain(isa: str, rng: Any) -> None:
    made = inputs(rng, 300, 700, heads=4, kv_heads=2, dim=64)
    plan = attncore.explain(*made, causal=True, num_threads=2)
    text = str(plan)
    assert isa in text
    assert plan.isa == isa
    assert plan.threads == 2
    assert isinstance(plan.kernel, str)
    for name in ("query_tile", "key_tile", "tasks", "key_splits", "flops", "bytes"):
        assert getattr(plan, name) >= 1, name
    assert plan.workspace_bytes >= 0
    assert plan.floor_seconds > 0
    assert plan.estimated_seconds > 0
    half = attncore.explain(*made, causal=True, query_offset=0)
    assert half.flops < plan.flops < attncore.explain(*made).flops
    decode = attncore.explain(*inputs(rng, 1, 60000, heads=8, kv_heads=1), num_threads=2)
    assert decode.key_splits > 1
    assert decode.workspace_bytes < 64 * 2**20


def test_explain_computes_nothing_of_the_callers(isa: str, rng: Any) -> None:
    """Tasks of the call are timed on its own arrays, which are read only."""
    for sizes in ((300, 700), (3, 2000), (40, 50), (0, 5), (5, 0)):
        made = inputs(rng, *sizes, heads=4, kv_heads=2, dim=64)
        kept = [x.copy() for x in made]
        plan = attncore.explain(*made, causal=True, num_threads=2)
        assert plan.estimated_seconds > 0
        for now, before in zip(made, kept, strict=True):
            assert np.array_equal(now, before)


def test_isas() -> None:
    names = attncore.available_isas()
    assert isinstance(names, tuple)
    assert names[-1] == "baseline"
    assert attncore.isa() in names
    before = attncore.isa()
    for name in names:
        with attncore.use_isa(name):
            assert attncore.isa() == name
            with attncore.use_isa(names[0]):
                assert attncore.isa() == names[0]
            assert attncore.isa() == name
        assert attncore.isa() == before
    attncore.use_isa("baseline")
    assert attncore.isa() == "baseline"
    attncore.use_isa(before)
    assert attncore.isa() == before
    with pytest.raises(KeyError), attncore.use_isa("baseline"):
        raise KeyError
    assert attncore.isa() == before


def test_threads() -> None:
    before = attncore.get_num_threads()
    try:
        for count in (1, 3, 2):
            attncore.set_num_threads(count)
            assert attncore.get_num_threads() == count
    finally:
        attncore.set_num_threads(before)


def test_the_reason_for_an_isa() -> None:
    """It comes back with the ISA that it is the reason for."""

    def reason() -> object:
        return attncore.show_config(mode="dicts")["isa_reason"]

    before, why = attncore.isa(), reason()
    assert why
    for isa in attncore.available_isas():
        with attncore.use_isa(isa):
            assert reason() == (why if isa == before else "asked for")
    assert reason() == why


def test_build_information(capsys: pytest.CaptureFixture[str]) -> None:
    attncore.show_config()
    text = capsys.readouterr().out
    shown = attncore.show_config(mode="dicts")
    assert shown["version"] == attncore.__version__
    assert attncore.__version__ in text
    assert attncore.isa() in text
    assert str(shown["isa_reason"]) in text
    assert (Path(attncore.get_include()) / "attncore" / "attncore.hpp").is_file()
    assert any(Path(attncore.get_cmake_dir()).glob("attncore*onfig.cmake"))
