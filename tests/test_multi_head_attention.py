"""MultiHeadAttention against torch.nn.MultiheadAttention: results, weights and all gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import attncore
from kit import DTYPES, assert_same_bits
from reference import Array
from rule import assert_close_by_rule

torch = pytest.importorskip("torch", reason="torch is the peer")

B, H, S, K, E = 2, 4, 5, 7, 24
NAMES = {"kdim": "key_dim", "vdim": "value_dim"}

# Arguments of torch's module.
LAYERS: dict[str, dict[str, Any]] = {
    "packed": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 9, "vdim": 10},
    "vdim": {"vdim": 10, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero attn": {"add_zero_attn": True},
    "bias_kv and zero attn": {"add_bias_kv": True, "add_zero_attn": True},
    "all separate": {"kdim": 9, "vdim": 10, "add_bias_kv": True, "add_zero_attn": True},
}


def visible(rng: np.random.Generator, *shape: int) -> Array:
    """A boolean mask whose rows all see something: torch has NaN where they don't."""
    mask = rng.random(shape) < 0.7
    mask[..., 0] = True
    return mask


def lower(queries: int, keys: int) -> Array:
    return np.tril(np.ones((queries, keys), bool))


def masks(rng: np.random.Generator, keys: int) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """torch's arguments and ours, of each kind; torch's booleans hide."""
    mask, biases = visible(rng, B, H, S, keys), rng.standard_normal((B, H, S, keys))
    padding = np.arange(keys) < np.array([[keys - 2], [keys]])
    flat = (B * H, S, keys)
    return {
        "no mask": ({}, {}),
        "2-D": ({"attn_mask": ~mask[0, 0]}, {"mask": mask[0, 0]}),
        "2-D floats": ({"attn_mask": biases[0, 0]}, {"bias": biases[0, 0]}),
        "3-D": ({"attn_mask": ~mask.reshape(flat)}, {"mask": mask}),
        "3-D floats": ({"attn_mask": biases.reshape(flat)}, {"bias": biases}),
        "3-D of heads": ({"attn_mask": ~np.tile(mask[0], (B, 1, 1))}, {"mask": mask[0]}),
        "padding": ({"key_padding_mask": ~padding}, {"mask": padding[:, None, None]}),
        "padding as lengths": ({"key_padding_mask": ~padding}, {"key_lengths": padding.sum(1)}),
        "padding as floats": (
            {"key_padding_mask": np.where(padding, 0, -np.inf)},
            {"bias": np.where(padding, 0, -np.inf)[:, None, None]},
        ),
        "causal": (
            {"attn_mask": ~lower(S, keys), "is_causal": True},
            {"causal": True, "query_offset": 0},
        ),
        "causal and padding": (
            {"attn_mask": ~lower(S, keys), "key_padding_mask": ~padding},
            {"causal": True, "query_offset": 0, "key_lengths": padding.sum(1)},
        ),
        "mask and padding": (
            {"attn_mask": ~mask[0, 0], "key_padding_mask": ~padding},
            {"mask": mask[0, 0], "bias": np.where(padding, 0.0, -np.inf)[:, None, None]},
        ),
    }


MASKS = list(masks(np.random.default_rng(0), S))


class Pair:
    """torch's module and ours, of the same parameters and batch order."""

    def __init__(
        self, *, dtype: Any = np.float64, batch_first: bool = True, **torch_arguments: Any
    ):
        torch.manual_seed(0)
        self.theirs = torch.nn.MultiheadAttention(
            E, H, batch_first=batch_first, dtype=torch.float64, **torch_arguments
        )
        for parameter in self.theirs.parameters():  # biases too are then no zeros
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
        self.ours = attncore.MultiHeadAttention(
            E,
            H,
            batch_first=batch_first,
            dtype=dtype,
            **{NAMES.get(name, name): value for name, value in torch_arguments.items()},
        )
        self.ours.load_state_dict(self.theirs.state_dict())

    def torch_of(self, dtype: Any) -> Any:
        """A copy of torch's module with our (rounded) parameters, in another dtype."""
        state = {name: torch.tensor(p.astype(float)) for name, p in self.ours.state_dict().items()}
        other = torch.nn.MultiheadAttention(
            E,
            H,
            batch_first=True,
            kdim=self.theirs.kdim,
            vdim=self.theirs.vdim,
            bias=self.theirs.in_proj_bias is not None,
            add_bias_kv=self.theirs.bias_k is not None,
            add_zero_attn=self.theirs.add_zero_attn,
        ).to(torch.float64)
        other.load_state_dict(state)
        return other.to(dtype)


def run_torch(module: Any, arrays: list[Array], d_y: Array, **options: Any) -> dict[str, Array]:
    """y, weights, the gradients of the inputs and of the parameters, as float64."""
    dtype = module.out_proj.weight.dtype
    tensors = [torch.tensor(a.astype(float)).to(dtype).requires_grad_() for a in arrays]
    read = (tensors * 3)[:3] if len(arrays) == 1 else [*tensors, tensors[1]][:3]
    options = {n: torch.tensor(a) if isinstance(a, np.ndarray) else a for n, a in options.items()}
    options = {
        n: a.to(dtype) if torch.is_tensor(a) and a.is_floating_point() else a
        for n, a in options.items()
    }
    y, weights = module(*read, average_attn_weights=False, **options)
    y.backward(torch.tensor(d_y.astype(float)).to(dtype))
    result = {"y": y, "weights": weights}
    result |= {f"d {i}": tensor.grad for i, tensor in enumerate(tensors)}
    result |= {f"d {name}": parameter.grad for name, parameter in module.named_parameters()}
    return {name: value.detach().to(torch.float64).numpy() for name, value in result.items()}


def run_ours(
    layer: attncore.MultiHeadAttention, arrays: list[Array], d_y: Array, **options: Any
) -> dict[str, Array]:
    y, weights = layer(*arrays, need_weights="heads", **options)
    gradients = layer.backward(d_y)
    gradients = (gradients,) if len(arrays) == 1 else gradients
    result = {"y": y, "weights": weights}
    result |= {f"d {i}": gradient for i, gradient in enumerate(gradients)}
    return result | {f"d {name}": gradient for name, gradient in layer.gradients.items()}


def arrays_of(rng: np.random.Generator, pair: Pair, inputs: int) -> list[Array]:
    widths = (E, pair.theirs.kdim, pair.theirs.vdim)
    tokens = (S, K, K)
    shapes = [(B, tokens[i], widths[i]) for i in range(inputs)]
    if not pair.theirs.batch_first:
        shapes = [(t, b, w) for b, t, w in shapes]
    return [rng.standard_normal(shape) for shape in shapes]


def assert_equal(ours: dict[str, Array], theirs: dict[str, Array]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layer", LAYERS)
def test_cross_attention(layer: str, mask: str, rng: np.random.Generator) -> None:
    pair = Pair(**LAYERS[layer])
    arrays, d_y = arrays_of(rng, pair, 3), rng.standard_normal((B, S, E))
    theirs, ours = masks(rng, K)[mask]
    assert_equal(
        run_ours(pair.ours, arrays, d_y, **ours), run_torch(pair.theirs, arrays, d_y, **theirs)
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layer", [name for name, given in LAYERS.items() if "vdim" not in given])
def test_self_attention(layer: str, mask: str, rng: np.random.Generator) -> None:
    pair = Pair(**LAYERS[layer])
    arrays, d_y = arrays_of(rng, pair, 1), rng.standard_normal((B, S, E))
    theirs, ours = masks(rng, S)[mask]
    assert_equal(
        run_ours(pair.ours, arrays, d_y, **ours), run_torch(pair.theirs, arrays, d_y, **theirs)
    )


@pytest.mark.parametrize("layer", ["packed", "bias_kv and zero attn"])
def test_one_context(layer: str, rng: np.random.Generator) -> None:
    pair = Pair(**LAYERS[layer])
    arrays, d_y = arrays_of(rng, pair, 2), rng.standard_normal((B, S, E))
    assert_equal(run_ours(pair.ours, arrays, d_y), run_torch(pair.theirs, arrays, d_y))


@pytest.mark.parametrize("inputs", [1, 2, 3])
@pytest.mark.parametrize("layer", ["packed", "bias_kv and zero attn"])
def test_tokens_first(layer: str, inputs: int, rng: np.random.Generator) -> None:
    pair = Pair(**LAYERS[layer], batch_first=False)
    arrays, d_y = arrays_of(rng, pair, inputs), rng.standard_normal((S, B, E))
    assert_equal(run_ours(pair.ours, arrays, d_y), run_torch(pair.theirs, arrays, d_y))


@pytest.mark.parametrize("inputs", [1, 3])
@pytest.mark.parametrize("batch_first", [True, False])
def test_unbatched(inputs: int, batch_first: bool, rng: np.random.Generator) -> None:
    pair = Pair(batch_first=batch_first, add_bias_kv=True)
    arrays = [rng.standard_normal((S if i == 0 else K, E)) for i in range(inputs)]
    d_y, mask = rng.standard_normal((S, E)), visible(rng, H, S, S if inputs == 1 else K)
    ours = run_ours(pair.ours, arrays, d_y, mask=mask)
    assert_equal(ours, run_torch(pair.theirs, arrays, d_y, attn_mask=~mask))


@pytest.mark.parametrize("layer", ["packed", "bias_kv and zero attn"])
def test_average_weights(layer: str, rng: np.random.Generator) -> None:
    pair = Pair(**LAYERS[layer])
    x = rng.standard_normal((B, 300, E))
    _, weights = pair.ours(x, need_weights=True, causal=True)
    tensor = torch.tensor(x)
    _, theirs = pair.theirs(tensor, tensor, tensor, attn_mask=torch.tensor(~lower(300, 300)))
    np.testing.assert_allclose(weights, theirs.detach().numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", ["packed", "bias_kv and zero attn", "all separate"])
def test_by_the_rule(layer: str, dtype: np.dtype[Any], isa: str, rng: np.random.Generator) -> None:
    """In every dtype and on every ISA: errors at most twice those of torch in the same dtype."""
    pair = Pair(dtype=dtype, **LAYERS[layer])
    arrays = [a.astype(np.float32).astype(dtype) for a in arrays_of(rng, pair, 3)]
    d_y = rng.standard_normal((B, S, E)).astype(np.float32).astype(dtype)
    exact = run_torch(pair.torch_of(torch.float64), arrays, d_y)
    plain = run_torch(pair.torch_of(getattr(torch, dtype.name)), arrays, d_y)
    for name, ours in run_ours(pair.ours, arrays, d_y).items():
        magnitude = 4 * float(np.max(np.abs(exact[name])))
        if name == "weights":
            plain[name] = plain[name].astype(ours.dtype)
        assert_close_by_rule(ours, exact[name], plain[name], magnitude, name)


def test_state_dict_goes_both_ways() -> None:
    for arguments in LAYERS.values():
        pair = Pair(**arguments)
        state = pair.ours.state_dict()
        shapes = {name: tuple(p.shape) for name, p in pair.theirs.state_dict().items()}
        assert {name: array.shape for name, array in state.items()} == shapes
        pair.theirs.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
        for name, parameter in pair.theirs.state_dict().items():
            assert_same_bits(state[name], parameter.numpy(), name)


@pytest.mark.parametrize("layer", ["packed", "all separate"])
def test_initial_values_are_distributed_as_torchs(layer: str) -> None:
    """Bounds of uniform distributions, deviations of normal ones."""
    torch.manual_seed(0)
    given = {n: v * 10 if n in NAMES else v for n, v in LAYERS[layer].items()}
    theirs = torch.nn.MultiheadAttention(256, 4, **given)
    ours = attncore.MultiHeadAttention(
        256, 4, seed=0, **{NAMES.get(name, name): value for name, value in given.items()}
    )
    for name, parameter in theirs.state_dict().items():
        value = ours.parameters()[name]
        assert abs(float(value.std()) - float(parameter.std())) <= 0.1 * float(parameter.std())
        if name.endswith("weight"):
            assert abs(abs(value).max() / float(parameter.abs().max()) - 1) < 0.01
