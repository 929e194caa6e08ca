"""What both examples do around their models: options, the loop, checkpoints, Ctrl-C, pictures."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import matplotlib as mpl
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save
from tqdm import tqdm

from parts import Adam, Array, Model

Curve = list[tuple[int, float]]  # (step, value)


def parse(
    parser: argparse.ArgumentParser, name: str, arguments: Sequence[str] | None, **defaults: Any
) -> argparse.Namespace:
    """The options: those of ``defaults``, --seed, --out and --resume.

    With --resume what was set before holds, but for what is given anew.
    """
    for option, default in defaults.items():
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(default), default=default,
                            help="default: %(default)s")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR",
                        help="folder for what is written (default: %(default)s)")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help=f"go on from {name}.safetensors in the folder --out")  # fmt: skip
    options = parser.parse_args(arguments)
    options.path = options.out / f"{name}.safetensors"
    if options.resume:
        if not options.path.exists():
            parser.error(f"--resume: there is no {options.path}")
        parser.set_defaults(path=options.path, **read_notes(options.path)["settings"])
        options = parser.parse_args(arguments)
    for option, default in defaults.items():
        least = 1 if isinstance(default, int) and default > 0 else 0
        if getattr(options, option) < least:
            name = option.replace("_", "-")
            parser.error(f"--{name}: is {getattr(options, option)}, must be at least {least}")
    return options


class Checkpoint:
    """All that training needs to go on as if it had not stopped, in one file of safetensors.

    Random numbers come from generators that (seed, step) seeds, so the step is their state too.
    """

    def __init__(self, model: Model, adam: Adam, options: argparse.Namespace) -> None:
        self.path: Path = options.path
        self.settings = {n: v for n, v in vars(options).items() if isinstance(v, int | float | str)}
        del self.settings["resume"]
        self.adam, self.step = adam, 0
        self.curves: dict[str, Curve] = {}
        groups = {"model": model.parameters(), "mean": adam.mean, "square": adam.square}
        self.arrays = {f"{at}.{n}": a for at, arrays in groups.items() for n, a in arrays.items()}
        if options.resume:
            self._load()

    def save(self) -> None:
        """Write beside the old file, then take its place: at no time is there half a file."""
        notes = {"step": self.step, "curves": self.curves, "settings": self.settings}
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        with beside.open("wb") as file:
            file.write(save(arrays, {"notes": json.dumps(notes)}))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(self.path)

    def _load(self) -> None:
        notes = read_notes(self.path)
        self.step = notes["step"]
        self.curves = {name: [(s, v) for s, v in c] for name, c in notes["curves"].items()}
        with safe_open(self.path, "np") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 — no dict
        shapes = [{n: a.shape for n, a in arrays.items()} for arrays in (self.arrays, stored)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{self.path}: holds a model of other sizes than the options ask for")
        for name, array in self.arrays.items():
            array[...] = stored[name]


def read_notes(path: Path) -> dict[str, Any]:
    """The step, curves and settings of a checkpoint."""
    with safe_open(path, "np") as file:
        notes: dict[str, Any] = json.loads(file.metadata()["notes"])
    return notes


class Interrupt:
    """While it is open, the first Ctrl-C only sets ``asked``; a second one interrupts as ever."""

    asked = False

    def __enter__(self) -> Interrupt:  # noqa: PYI034 — Self is newer than Python 3.10
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, _signal: int, _frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_error: object) -> None:
        signal.signal(signal.SIGINT, self.before)


def train(
    checkpoint: Checkpoint, options: argparse.Namespace,
    learn: Callable[[int], float], validate: Callable[[], float], what: str,
) -> bool:  # fmt: skip
    """Call ``learn(step)``, which returns a loss, until the last step or Ctrl-C.

    Now and then and at the end ``validate()`` is noted as ``what`` and a checkpoint written; after
    Ctrl-C too.  Whether all steps are done.
    """
    steps, every = options.steps, max(1, options.every)
    losses = checkpoint.curves.setdefault("training loss", [])
    values = checkpoint.curves.setdefault(what, [])
    bar = tqdm(total=steps, initial=checkpoint.step, unit="step", disable=None, smoothing=0.05)
    with Interrupt() as interrupt, bar:
        for step in range(checkpoint.step + 1, steps + 1):
            losses.append((step, learn(step)))
            checkpoint.step = step
            bar.update()
            if interrupt.asked:
                checkpoint.save()
                bar.write(f"stopped after step {step}: go on with --resume")
                break
            if step % every == 0 or step == steps:
                values.append((step, validate()))
                loss = np.mean([loss for _, loss in losses[-every:]])
                bar.write(f"step {step:6d}  training loss {loss:.4f}  {what} {values[-1][1]:.4f}")
                checkpoint.save()
    save_curves(checkpoint.path.with_suffix(".png"), checkpoint.curves)
    return not interrupt.asked


def save_curves(path: Path, curves: dict[str, Curve]) -> None:
    """Draw the first curve, averaged over some steps, and the second on an axis to the right."""
    (left_name, losses), (right_name, values) = curves.items()
    width = max(1, len(losses) // 100)
    rows = np.array(losses)[: len(losses) // width * width].reshape(-1, width, 2)
    figure, left = plot().subplots(figsize=(7, 4), layout="constrained")
    left.plot(*rows.mean(axis=1).T, color="tab:blue")
    left.set_xlabel("step")
    left.set_ylabel(left_name, color="tab:blue")
    right = left.twinx()
    right.plot(*np.array(values).reshape(-1, 2).T, color="tab:red", marker=".")
    right.set_ylabel(right_name, color="tab:red")
    figure.savefig(path, dpi=120)
    plot().close(figure)


def save_looks(path: Path, looks: Sequence[tuple[Array, str, Sequence[str]]]) -> None:
    """Draw attention: (rows, columns) weights, what the columns and what the rows stand for."""
    figure, grid = plot().subplots(len(looks), figsize=(8, 3.2 * len(looks)), layout="constrained")
    for (weights, columns, rows), axes in zip(looks, np.atleast_1d(grid), strict=True):
        axes.imshow(weights, cmap="magma", aspect="auto", vmin=0, vmax=1)
        for set_ticks, names in ((axes.set_xticks, columns), (axes.set_yticks, rows)):
            shown = [name if name.isprintable() else "" for name in names]
            set_ticks(range(len(names)), shown, parse_math=False)
        axes.set(xlabel="read", ylabel="written")
    figure.savefig(path, dpi=120)
    plot().close(figure)


def plot() -> Any:
    """Matplotlib's pyplot, drawing to files."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt
