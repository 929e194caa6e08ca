"""The rule that says how close to the reference is close."""

from __future__ import annotations

import numpy as np

from reference import Array, accumulation

EPS = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
TINY = {"float64": 2.0**-1074, "float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}


def assert_close_by_rule(
    ours: Array,
    exact: Array,
    plainly: Array,
    magnitude: float = 0.0,
    what: str = "out",
    noise: float = 0.0,
) -> None:
    """error(ours) <= 2 * error(plain) + a few units in the last place.

    error(plain) is the largest over the array, so that what low precision costs anybody is allowed
    twice.  It can be near 0 by luck where an array is small; therefore one unit in the last place
    of each element (the rounding of the output) and 16 of the accumulation's at the magnitude of
    the sum that was rounded are allowed beside it.  NaN and the infinities must stand where they
    stand in the reference.
    """
    assert ours.shape == exact.shape, f"{what}: shape {ours.shape}, not {exact.shape}"
    if ours.size == 0:
        return
    name = str(ours.dtype)
    got, other = ours.astype(exact.dtype), plainly.astype(exact.dtype)
    representable = np.abs(exact) <= _largest(name)
    with np.errstate(all="ignore"):  # an infinity minus itself
        same = np.where(np.isnan(exact), np.isnan(got), got == exact)
        stands = np.where(np.isfinite(exact), np.isfinite(got) | ~representable, same)
        assert stands.all(), (
            f"{what}: {got[~stands][0]} at {_where(~stands)}, not {exact[~stands][0]}"
        )
        finite = np.isfinite(exact) & representable
        if not finite.any():
            return
        error, floor = (np.where(finite, np.abs(a - exact), 0) for a in (got, other))
        allowed = 2 * np.max(floor[np.isfinite(floor)], initial=noise) + EPS[name] * np.abs(exact)
        allowed = allowed + TINY[name] + 16 * EPS[str(accumulation(ours.dtype))] * magnitude
        over = np.where(finite, error - allowed, -np.inf)
    worst = np.unravel_index(np.argmax(over), over.shape)
    at = tuple(int(i) for i in worst)
    assert over[worst] <= 0, (
        f"{what}: error {error[worst]:.3g} at {at}, allowed {allowed[worst]:.3g}"
    )


def _largest(name: str) -> float:
    return 65504.0 if name == "float16" else 3.3e38 if name != "float64" else 1.7e308


def _where(bad: Array) -> list[int]:
    return [int(i) for i in np.argwhere(bad)[0]]
