"""Against what users come from: torch, and the ONNX operator Attention in onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
import onnx_model
from kit import inputs
from kit_backward import d_outputs, gradients
from reference import Array

DTYPES = ["float32", "float64", "float16"]
LOOSE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3}


def near(ours: Array, theirs: Array) -> None:
    assert ours.dtype == theirs.dtype
    atol = LOOSE[str(ours.dtype)]
    np.testing.assert_allclose(np.float64(ours), np.float64(theirs), rtol=0, atol=atol)


# --- torch ---


def torch_sdpa(arrays: Any, mask: Array | None = None, **options: Any) -> Array:
    torch = pytest.importorskip("torch")
    if mask is not None:
        options["attn_mask"] = torch.from_numpy(mask)
    tensors = [torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]
    out: Array = torch.nn.functional.scaled_dot_product_attention(*tensors, **options).numpy()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (33, 33), (7, 90), (90, 7), (1, 700)])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.7}, {"scale": -0.1}])
def test_torch(
    isa: str, dtype: str, queries: int, keys: int, options: dict[str, Any], rng: Any
) -> None:
    made = inputs(rng, queries, keys, batch=2, heads=3, dim=40, dtype=dtype)
    near(attncore.scaled_dot_product_attention(*made, **options), torch_sdpa(made, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    "shape", [(19, 75), (1, 75), (1, 1, 19, 75), (2, 1, 1, 75), (2, 6, 19, 75)]
)
def test_torch_masks(isa: str, dtype: str, kind: str, shape: tuple[int, ...], rng: Any) -> None:
    made = inputs(rng, 19, 75, batch=2, heads=6, kv_heads=2, dtype=dtype)
    mask = rng.random(shape) < 0.6
    if kind == "float":
        mask = np.where(mask, rng.standard_normal(shape), -np.inf).astype(dtype)
    ours = attncore.scaled_dot_product_attention(*made, attn_mask=mask, enable_gqa=True)
    near(ours, torch_sdpa(made, mask, enable_gqa=True))


def test_torch_rows_that_see_nothing(isa: str, rng: Any) -> None:
    made = inputs(rng, 5, 9)
    mask = np.ones((5, 9), bool)
    mask[2] = False
    theirs = torch_sdpa(made, mask)
    near(attncore.scaled_dot_product_attention(*made, attn_mask=mask), np.nan_to_num(theirs))


@pytest.mark.parametrize(
    "leads", [((1,), (3,), (3,)), ((3,), (1,), (3,)), ((2, 1), (1, 3), (2, 3))]
)
@pytest.mark.parametrize("masked", [False, True])
def test_torch_leading_axes(leads: Any, masked: bool, rng: Any) -> None:
    shapes = [(*lead, 2, tokens, 8) for lead, tokens in zip(leads, (5, 9, 9), strict=True)]
    made = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]
    mask = rng.random((*np.broadcast_shapes(*leads), 1, 5, 9)) < 0.7 if masked else None
    ours = attncore.scaled_dot_product_attention(made[0], made[1], made[2], mask)
    wanted = np.broadcast_shapes(*(shape[:-3] for shape in shapes))
    assert ours.shape == (*wanted, 2, 5, 8)
    near(ours, np.nan_to_num(torch_sdpa(made, mask)))


def test_torch_bottom_right(isa: str, rng: Any) -> None:
    bias = pytest.importorskip("torch.nn.attention.bias")
    made = inputs(rng, 5, 9)
    theirs = torch_sdpa(made, bias.causal_lower_right(5, 9)._materialize().numpy())
    near(attncore.attention(*made, causal=True), theirs)


def test_torch_tensors_share_their_memory(isa: str, rng: Any) -> None:
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(a) for a in inputs(rng, 5, 9)]
    out = torch.empty(1, 2, 5, 32)
    attncore.attention(*(t.numpy() for t in tensors), out=out.numpy())
    theirs = torch.nn.functional.scaled_dot_product_attention(*tensors)
    near(out.numpy(), theirs.numpy())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("queries", "keys"), [(33, 33), (7, 90), (1, 300)])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"scale": 0.7}, {"bias": True}])
def test_torch_gradients(
    isa: str, dtype: str, queries: int, keys: int, options: dict[str, Any], rng: Any
) -> None:
    torch = pytest.importorskip("torch")
    made = inputs(rng, queries, keys, batch=2, heads=6, kv_heads=2, dim=40, dtype=dtype)
    d_out, _ = d_outputs(rng, made[0], made[2])
    tensors = [torch.from_numpy(a).requires_grad_() for a in made]
    theirs: dict[str, Any] = {"scale": options.get("scale"), "enable_gqa": True}
    ours = dict(options)
    if "causal" in options:
        theirs["attn_mask"] = torch.ones(queries, keys).tril(keys - queries).bool()
    if "bias" in options:
        ours["bias"] = rng.standard_normal((6, queries, keys)).astype(dtype)
        theirs["attn_mask"] = torch.from_numpy(ours["bias"]).requires_grad_()
        tensors.append(theirs["attn_mask"])
    out = torch.nn.functional.scaled_dot_product_attention(*tensors[:3], **theirs)
    expected = torch.autograd.grad(out, tensors, torch.from_numpy(d_out))
    atol = 1e-12 if dtype == "float64" else 1e-4
    for (name, one), other in zip(gradients(d_out, made, **ours).items(), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=atol, err_msg=name)


# --- ONNX: the operator Attention ---


def ours_for_onnx(arrays: dict[str, Array], attributes: dict[str, Any]) -> Array:
    """The meaning of the operator, in attncore's words."""
    q, k, v = arrays["query"], arrays["key"], arrays["value"]
    layout: Any = "bhsd"
    if q.ndim == 3:  # (batch, token, head · dim)
        heads, kv_heads = attributes["q_num_heads"], attributes["kv_num_heads"]
        counts = (heads, kv_heads, kv_heads)
        q, k, v = (a.reshape(*a.shape[:2], n, -1) for a, n in zip((q, k, v), counts, strict=True))
        layout = "bshd"
    options: dict[str, Any] = {"causal": bool(attributes.get("is_causal", 0)), "query_offset": 0}
    if "past_key" in arrays:
        options["query_offset"] = arrays["past_key"].shape[2]
        past = [arrays["past_key"], arrays["past_value"]]
        if layout == "bshd":
            past = [a.transpose(0, 2, 1, 3) for a in past]
        axis = 2 if layout == "bhsd" else 1
        k, v = (np.concatenate(pair, axis=axis) for pair in zip(past, (k, v), strict=True))
    if "nonpad_kv_seqlen" in arrays:
        options["key_lengths"] = arrays["nonpad_kv_seqlen"]
        options["query_offset"] = None  # key length - rows, of each batch entry
    mask = arrays.get("mask")
    if mask is not None:
        options["mask" if mask.dtype == bool else "bias"] = mask
    options["softcap"] = attributes.get("softcap") or None
    options["scale"] = attributes.get("scale")
    out: Array = attncore.attention(q, k, v, layout=layout, **options)
    return out.reshape(*out.shape[:2], -1) if layout == "bshd" else out


def against_onnx(arrays: dict[str, Array], attributes: dict[str, Any], opset: int = 23) -> None:
    runtime = pytest.importorskip("onnxruntime")
    try:
        theirs = onnx_model.run(runtime, arrays, attributes, opset)
    except Exception as error:
        name = type(error).__name__
        if name in ("NotImplemented", "Fail") and "mplement" in str(error):
            pytest.skip(f"this onnxruntime has no such Attention: {error}")
        raise
    near(ours_for_onnx(arrays, attributes), theirs)


def onnx_inputs(rng: np.random.Generator, **sizes: Any) -> dict[str, Array]:
    made = inputs(rng, 19, 75, batch=2, heads=6, **{"kv_heads": 2, **sizes})
    return dict(zip(("query", "key", "value"), made, strict=True))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"is_causal": 1},
        {"scale": 0.4},
        {"softcap": 1.5},
        {"softcap": 1.5, "is_causal": 1, "scale": 0.5},
    ],
)
def test_onnx(isa: str, dtype: str, kv_heads: int, attributes: dict[str, Any], rng: Any) -> None:
    against_onnx(onnx_inputs(rng, dtype=dtype, kv_heads=kv_heads, value_dim=24), attributes)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("attributes", [{}, {"softcap": 1.5}, {"is_causal": 1}])
@pytest.mark.parametrize(
    "shape", [(19, 75), (6, 19, 75), (1, 19, 75), (1, 1, 19, 75), (2, 1, 19, 75), (2, 6, 19, 75)]
)
def test_onnx_masks(
    isa: str, kind: str, attributes: dict[str, Any], shape: tuple[int, ...], rng: Any
) -> None:
    """Of any rank; the cap comes before it."""
    arrays = onnx_inputs(rng)
    mask = rng.random(shape) < 0.6
    mask[..., 0] = True
    if kind == "float":
        mask = np.where(mask, rng.standard_normal(shape), -np.inf).astype(np.float32)
    against_onnx({**arrays, "mask": mask}, attributes)


@pytest.mark.parametrize("attributes", [{}, {"is_causal": 1}])
def test_onnx_of_three_axes(isa: str, attributes: dict[str, Any], rng: Any) -> None:
    arrays = {
        "query": np.float32(rng.standard_normal((2, 19, 6 * 16))),
        "key": np.float32(rng.standard_normal((2, 75, 2 * 16))),
        "value": np.float32(rng.standard_normal((2, 75, 2 * 24))),
    }
    against_onnx(arrays, {"q_num_heads": 6, "kv_num_heads": 2, **attributes})


@pytest.mark.parametrize("attributes", [{}, {"is_causal": 1}, {"is_causal": 1, "softcap": 2.0}])
@pytest.mark.parametrize("queries", [1, 19])
def test_onnx_past(isa: str, queries: int, attributes: dict[str, Any], rng: Any) -> None:
    """Decoding: the offset is the length of the past."""
    q, k, v = inputs(rng, queries, 75 + queries, batch=2, heads=6, kv_heads=2)
    arrays = {"query": q, "key": k[:, :, 75:], "value": v[:, :, 75:]}
    arrays |= {"past_key": k[:, :, :75], "past_value": v[:, :, :75]}
    against_onnx(arrays, attributes)


@pytest.mark.parametrize("lengths", [[75, 75], [40, 19], [0, 74], [5, 60]])
@pytest.mark.parametrize("attributes", [{}, {"softcap": 2.0}, {"is_causal": 1}])
def test_onnx_lengths(isa: str, lengths: list[int], attributes: dict[str, Any], rng: Any) -> None:
    arrays = {**onnx_inputs(rng), "nonpad_kv_seqlen": np.array(lengths)}
    against_onnx(arrays, attributes, opset=24)


@pytest.mark.parametrize("opset", [23, 24])
def test_onnx_rows_that_see_nothing(isa: str, opset: int, rng: Any) -> None:
    arrays = {**onnx_inputs(rng), "mask": np.ones((19, 75), bool)}
    arrays["mask"][4] = False
    assert (ours_for_onnx(arrays, {})[:, :, 4] == 0).all()
    against_onnx(arrays, {}, opset)


@pytest.mark.parametrize("shape", [(75,), (1, 75), (19, 1)])
def test_onnx_masks_that_the_runtime_refuses(isa: str, shape: tuple[int, ...], rng: Any) -> None:
    """The operator's text broadcasts these too: held against the full mask."""
    arrays = onnx_inputs(rng)
    mask = rng.random(shape) < 0.6
    wide = np.ascontiguousarray(np.broadcast_to(mask, (19, 75)))
    ours = ours_for_onnx({**arrays, "mask": mask}, {})
    near(ours, ours_for_onnx({**arrays, "mask": wide}, {}))
    against_onnx({**arrays, "mask": wide}, {})
