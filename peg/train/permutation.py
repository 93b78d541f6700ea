"""Seeded permutations that are computed where they are looked at: no array as long as what is permuted."""

import numpy as np

_ROUNDS = 8


def mix(value: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea & Flood 2014) of uint64: neighbouring inputs give unrelated outputs."""
    mixed = value + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: np.ndarray = mixed ^ (mixed >> np.uint64(31))
    return result


def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """uint64 keys that depend on every part and on the order of parts; arrays are broadcast, numbers give (1,)."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = mix(key ^ np.asarray(part).astype(np.uint64))
    return key


def permuted(index: np.ndarray, *, size: int | np.ndarray, key: np.ndarray) -> np.ndarray:
    """Where a permutation of range(size) puts each index: (N,) int64, each below its size.

    index: (N,), each below its size. size and key, a permutation's name, may differ by index. A Feistel network over
    the next even number of bits; what it puts at `size` or above is put again until it falls below (cycle walking:
    Black & Rogaway 2002), at most four times on average.
    """
    size_N, key_N = (np.broadcast_to(array, index.shape) for array in (np.asarray(size).astype(np.uint64), key))
    half_N = ((np.frexp((size_N - np.uint64(1)).astype(np.float64))[1] + 1) // 2).astype(np.uint64)
    place_N = index.astype(np.uint64)
    out = np.arange(len(index))
    while len(out):
        half, key = half_N[out], key_N[out]
        mask = (np.uint64(1) << half) - np.uint64(1)
        left, right = place_N[out] >> half, place_N[out] & mask
        for number in range(_ROUNDS):
            left, right = right, left ^ (mix(key ^ np.uint64(number << 56) ^ right) & mask)  # right is below 2**32
        place_N[out] = left << half | right
        out = out[place_N[out] >= size_N[out]]
    return place_N.astype(np.int64)
