"""What caches, states and layers have in common when they are saved: what may stand at the path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import attncore
from kit import zeros

pytest.importorskip("safetensors.numpy")

SAVED: dict[str, Any] = {
    "cache": attncore.KVCache(1, 2, 4, capacity=8),
    "paged cache": attncore.PagedKVCache(4, 4, 2, 4),
    "state": attncore.AttentionState(zeros(1, 2, 3, 4)),
    "layer": attncore.MultiHeadAttention(8, 2),
}


@pytest.mark.parametrize("kind", SAVED)
def test_a_link_stays(kind: str, tmp_path: Path) -> None:
    """It leads to the new content, whether there was such a file or not."""
    link, target = tmp_path / "latest", tmp_path / "disk" / "saved"
    target.parent.mkdir()
    link.symlink_to(Path("disk") / "saved")
    for _ in range(2):
        SAVED[kind].save(link)
        assert link.is_symlink()
        assert [file.name for file in target.parent.iterdir()] == ["saved"]
        content = target.read_bytes()
        target.write_bytes(b"older")
    SAVED[kind].save(tmp_path / "beside")
    assert len(content) == (tmp_path / "beside").stat().st_size
    assert sorted(file.name for file in tmp_path.iterdir()) == ["beside", "disk", "latest"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with pipes")
@pytest.mark.parametrize("kind", SAVED)
def test_pipes_and_devices_are_refused(kind: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path(os.devnull)):
        with pytest.raises(ValueError, match=f"^path: '{path}' is no regular file"):
            SAVED[kind].save(path)
        assert not path.is_file()
    with pytest.raises(OSError, match=r"directory|busy"):
        SAVED[kind].save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]
