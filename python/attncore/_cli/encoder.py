"""A trained sentence encoder (MiniLM, 6 layers of BERT) in NumPy, with attncore's attention.

Text → tokens → 6 × (attention, MLP) → the mean over tokens → a unit vector of 384 numbers.
Sentences that mean the same get vectors with a large dot product.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import attncore
from attncore._cli import packages

Array = NDArray[Any]
#: (query, key, value, lengths) → out, all but lengths on axes (batch, token, head, dim)
Attend = Callable[[Array, Array, Array, Array], Array]

MAX_TOKENS = 256  # the model was trained on no more
BATCH = 16


def attend_with_attncore(query: Array, key: Array, value: Array, lengths: Array) -> Array:
    """The attention of one layer; no key past an entry's length is seen."""
    out: Array = attncore.attention(query, key, value, key_lengths=lengths, layout="bshd")
    return out


@dataclass(frozen=True)
class Tokens:
    """One text, cut up: ids for the model, pieces for people."""

    ids: list[int]
    pieces: list[str]


@dataclass(frozen=True)
class HeadView:
    """The query and key of one layer, kept to draw what its heads look at: (B, token, head, dim)."""

    query: Array
    key: Array


class Encoder:
    """The model: ``encode`` maps texts to unit vectors."""

    def __init__(self, attend: Attend = attend_with_attncore) -> None:
        packages.need(packages.DEMO_PACKAGES, packages.DEMO_INSTALL)
        folder = packages.folder_of(packages.MODEL_PACKAGE) / "model"
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.heads: int = config["num_attention_heads"]
        self.layers: int = config["num_hidden_layers"]
        self.epsilon: float = config["layer_norm_eps"]
        self.attend = attend
        load_file = packages.load("safetensors.numpy").load_file
        self.weights: dict[str, Array] = load_file(folder / "model.safetensors")
        self.tokenizer = packages.load("tokenizers").Tokenizer.from_file(
            str(folder / "tokenizer.json")
        )
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(MAX_TOKENS)

    def with_attention(self, attend: Attend) -> Encoder:
        """The same model with another attention."""
        other = copy.copy(self)
        other.attend = attend
        return other

    def tokenize(self, text: str) -> Tokens:
        """The word pieces of a text, between [CLS] and [SEP]."""
        encoding = self.tokenizer.encode(text)
        return Tokens(encoding.ids, encoding.tokens)

    def encode(self, texts: Sequence[str], description: str = "encode") -> Array:
        """One unit vector a text: (texts, 384).  Texts of like length share a padded batch."""
        tokens = [self.tokenize(text) for text in texts]
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i].ids))
        batches = [order[at : at + BATCH] for at in range(0, len(order), BATCH)]
        vectors = np.empty((len(texts), self.weights[_WORDS].shape[1]), np.float32)
        for batch in packages.progress(batches, description):
            vectors[batch] = self._encode_batch([tokens[i].ids for i in batch])
        return vectors

    def view(self, text: str, layer: int) -> HeadView:
        """What the attention of one layer gets for one text."""
        x, lengths = self._embed([self.tokenize(text).ids])
        for index in range(layer):
            x = self._layer(index, x, lengths)
        query, key, _ = self._projections(layer, x)
        return HeadView(query, key)

    def _encode_batch(self, ids: list[list[int]]) -> Array:
        x, lengths = self._embed(ids)
        for index in range(self.layers):
            x = self._layer(index, x, lengths)
        valid = np.arange(x.shape[1]) < lengths[:, None]
        pooled: Array = np.where(valid[..., None], x, 0).sum(axis=1)
        pooled /= lengths[:, None]
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        return pooled

    def _embed(self, ids: list[list[int]]) -> tuple[Array, Array]:
        """Padded word + position vectors, (batch, token, 384), and the lengths, (batch,)."""
        lengths = np.array([len(row) for row in ids])
        padded = np.zeros((len(ids), lengths.max()), np.int64)
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = tokens
        x = self.weights[_WORDS][padded]
        x = x + self.weights["embeddings.position_embeddings.weight"][: padded.shape[1]]
        x = x + self.weights["embeddings.token_type_embeddings.weight"][0]
        return self._normalise("embeddings.LayerNorm", x), lengths

    def _projections(self, index: int, x: Array) -> tuple[Array, Array, Array]:
        """query, key, value of a layer: (batch, token, head, dim), no transpose needed."""
        name = f"encoder.layer.{index}.attention.self."
        shape = (*x.shape[:2], self.heads, -1)
        query, key, value = (
            self._linear(name + part, x).reshape(shape) for part in ("query", "key", "value")
        )
        return query, key, value

    def _layer(self, index: int, x: Array, lengths: Array) -> Array:
        name = f"encoder.layer.{index}."
        seen = self.attend(*self._projections(index, x), lengths)
        mixed = self._linear(name + "attention.output.dense", seen.reshape(x.shape))
        x = self._normalise(name + "attention.output.LayerNorm", x + mixed)
        wide = gelu(self._linear(name + "intermediate.dense", x))
        return self._normalise(
            name + "output.LayerNorm", x + self._linear(name + "output.dense", wide)
        )

    def _linear(self, name: str, x: Array) -> Array:
        product: Array = x @ self.weights[name + ".weight"].T
        product += self.weights[name + ".bias"]
        return product

    def _normalise(self, name: str, x: Array) -> Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scaled: Array = centred / np.sqrt(variance + self.epsilon)
        return scaled * self.weights[name + ".weight"] + self.weights[name + ".bias"]


_WORDS = "embeddings.word_embeddings.weight"


def gelu(x: Array) -> Array:
    """x · Φ(x), exact up to erf's approximation by Abramowitz and Stegun 7.1.26 (1.5e-7)."""
    z = np.abs(x) * np.float32(0.5**0.5)
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = np.zeros_like(t)
    for factor in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = (series + np.float32(factor)) * t
    tail = 0.5 * series * np.exp(-z * z)  # 1 − Φ(|x|)
    out: Array = x * np.where(x < 0, tail, 1 - tail)
    return out
