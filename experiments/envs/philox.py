"""Random numbers without a state: Philox4x64-10 for arrays of keys, in numpy.

A number is a function of what it belongs to (a seed, a user, a step), so nothing is stored and the
order of asking does not matter. Equal to `np.random.Philox(key, counter)` bit for bit, for all keys
at once (Salmon et al. 2011).
"""

import numpy as np

_MULTIPLIERS = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], np.uint64)
_BUMPS = np.array([0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B], np.uint64)
_HALF, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_ROUNDS = 10


def philox(seed: int, ids: np.ndarray, counter: np.ndarray | int, stream: int = 0) -> np.ndarray:
    """Four words (4, n) uint64 for each id (n,) at its counter, a number or (n,).

    numpy's own generator counts from 1. Each `stream` is independent of the others.
    """
    shape = np.shape(ids)
    c0 = np.broadcast_to(np.asarray(counter, np.uint64), shape)
    c1 = np.full(shape, stream, np.uint64)
    c2 = c3 = np.zeros(shape, np.uint64)
    k0, k1 = np.full(shape, seed, np.uint64), np.asarray(ids).astype(np.uint64)
    for _ in range(_ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _BUMPS[0], k1 + _BUMPS[1]
    return np.stack([c0, c1, c2, c3])


def words(seed: int, ids: np.ndarray, count: int, stream: int = 0) -> np.ndarray:
    """`count` words (count, n) uint64 for each id (n,)."""
    blocks = [philox(seed, ids, 1 + block, stream) for block in range(-(-count // 4))]
    return np.concatenate(blocks)[:count]


def uniform(bits: np.ndarray) -> np.ndarray:
    """Uniform in [0, 1) from words of any shape, as numpy's `Generator.random` makes it."""
    return (bits >> np.uint64(11)) * 2.0**-53


def normal(bits: np.ndarray) -> np.ndarray:
    """Standard normal (2 m, ...) from words (2 m, ...): Box and Muller's pairs."""
    first, second = np.split(uniform(bits), 2)
    radius = np.sqrt(-2.0 * np.log1p(-first))
    angle = 2.0 * np.pi * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])


def _product(a: np.uint64, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """High and low words of the 128-bit products of a number and an array."""
    a_low, a_high = a & _LOW, a >> _HALF
    b_low, b_high = b & _LOW, b >> _HALF
    carry = a_high * b_low + (a_low * b_low >> _HALF)
    middle = a_low * b_high + (carry & _LOW)
    return a_high * b_high + (carry >> _HALF) + (middle >> _HALF), a * b
