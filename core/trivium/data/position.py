"""Where a run is in its data: order as a pure function of (seed, fingerprint, global index).

No shuffle buffer and no generator state: any element can be asked for at any time, by any worker, on any rank, so a
resume needs one number. The permutation is a Feistel network with cycle walking (Black and Rogaway 2002,
https://doi.org/10.1007/3-540-45760-7_9): a keyed bijection of 0..n-1 in O(1) memory.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 4


def key_of(*parts: object) -> int:
    """A 64-bit key from anything printable."""
    return int.from_bytes(hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()[:8], "little")


def _mix(x: np.ndarray, key: int) -> np.ndarray:
    """splitmix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(key)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def permute(indices: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each of `indices` (0..size-1) goes under the permutation `key` of 0..size-1.

    >>> sorted(permute(np.arange(5), 5, key=1).tolist())
    [0, 1, 2, 3, 4]
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [key_of(key, r) for r in range(ROUNDS)]

    def once(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & low
        for k in keys:
            left, right = right, left ^ (_mix(right, k) & low)
        return (left << half) | right

    out = once(np.asarray(indices, dtype=np.uint64))
    while (outside := out >= size).any():  # cycle walking: the domain is at most 4 x size, so a few rounds
        out[outside] = once(out[outside])
    return out.astype(np.int64)


class Order:
    """The endless sequence of rows a run reads: each epoch is another permutation of all rows."""

    def __init__(self, num_rows: int, seed: int, fingerprint: str) -> None:
        self.num_rows, self.seed, self.fingerprint = num_rows, seed, fingerprint

    def first(self, count: int) -> np.ndarray:
        """The rows among the first `count`, each once."""
        return np.unique(self.rows(0, min(count, self.num_rows)))

    def rows(self, start: int, count: int) -> np.ndarray:
        """Rows at global indices start..start+count-1."""
        index = np.arange(start, start + count)
        out = np.empty(count, dtype=np.int64)
        for epoch in np.unique(index // self.num_rows):
            here = index // self.num_rows == epoch
            key = key_of(self.seed, self.fingerprint, int(epoch))
            out[here] = permute(index[here] % self.num_rows, self.num_rows, key)
        return out
