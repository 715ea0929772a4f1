"""A sample of distinct texts of a stated size, whatever the order and length of the file."""

from __future__ import annotations

import hashlib

import numpy as np

from kedge.data.audit.tables import Texts

CUT = 2_000  # characters kept of a text


def text_hash(text: str) -> int:
    """64 bits of BLAKE2b; half a surrogate pair, which the readers refuse, would be hashed all the same."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


class Sample:
    """The `size` distinct texts with the smallest hashes: every distinct text is as likely to be among them."""

    def __init__(self, size: int) -> None:
        self.size, self.limit = size, 2**64
        self.kept: dict[int, str] = {}

    def offer(self, key: int, text: str) -> None:
        if key >= self.limit or key in self.kept:
            return
        self.kept[key] = text[:CUT]
        if len(self.kept) > self.size + self.size // 2:
            self._prune()

    def texts(self, total: int) -> Texts:
        """The sample of `total` distinct texts."""
        if len(self.kept) > self.size:
            self._prune()
        keys = sorted(self.kept)
        return Texts(np.array(keys, np.uint64), tuple(self.kept[key] for key in keys), total)

    def _prune(self) -> None:
        keys = sorted(self.kept)[: self.size]
        self.limit = keys[-1] + 1
        self.kept = {key: self.kept[key] for key in keys}
