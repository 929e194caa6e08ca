"""A picture of what one attention head looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from attncore._cli import packages


def save_attention(path: Path, weights: NDArray[Any], pieces: Sequence[str], title: str) -> None:
    """Draw the (token, token) probabilities of one head as a map and save it as PNG."""
    packages.load("matplotlib").use("Agg")
    plot = packages.load("matplotlib.pyplot")
    tokens = len(pieces)
    size = min(max(5.0, 1.5 + 0.17 * tokens), 30.0)
    figure, axes = plot.subplots(figsize=(size + 1, size), layout="constrained")
    words = weights[:, 1:-1]  # [CLS] and [SEP] take what is left over, and would outshine them
    # On a linear scale only the largest would be seen.
    norm = packages.load("matplotlib.colors").PowerNorm(0.5, 0, words.max())
    image = axes.imshow(weights, cmap="magma", norm=norm, interpolation="nearest")
    font = max(3.0, min(9.0, 62 * size / tokens * 0.8))
    axes.set_xticks(range(tokens), pieces, rotation=90, fontsize=font, parse_math=False)
    axes.set_yticks(range(tokens), pieces, fontsize=font, parse_math=False)
    axes.set_xlabel("key: the token looked at")
    axes.set_ylabel("query: the token that looks")
    axes.set_title(title, fontsize=10, parse_math=False)
    figure.colorbar(image, ax=axes, shrink=0.7, extend="max", label="probability")
    figure.savefig(path, dpi=140)
    plot.close(figure)
