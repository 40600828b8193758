"""Randomness that privacy rests on: ChaCha20 keystreams under keys from the operating system (P10).

A key lives in this process's memory only. It is never saved, never derived from a seed, never shared: there is no
argument through which a seed could come in. Torch's and numpy's generators may not be used for noise or sampling.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

_KEY_LIFE = 1 << 37  # bytes drawn under one key, half of what its counter allows; then a fresh one is taken
_CHUNK = 1 << 20  # numbers made at a time: bounds the memory that noise for a large model takes


class Keystream:
    """Uniform 64-bit integers from ChaCha20 (RFC 8439) under a fresh 256-bit key; computationally indistinguishable
    from random. A forked child draws its own key, so that parent and child never share a stream."""

    def __init__(self) -> None:
        self._rekey()

    def _rekey(self) -> None:
        self._owner = os.getpid()
        # The first four bytes of this nonce are the 32-bit block counter: from 0, so that the stream is at its longest.
        nonce = bytes(4) + os.urandom(12)
        self._encryptor = Cipher(algorithms.ChaCha20(os.urandom(32), nonce), mode=None).encryptor()
        self._left = _KEY_LIFE

    def integers(self, count: int) -> np.ndarray:
        """`count` independent uniform integers. Shape [count], dtype uint64."""
        self._left -= 8 * count
        if self._owner != os.getpid() or self._left < 0:
            self._rekey()
            self._left -= 8 * count
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8")

    def bernoulli(self, count: int, rate: float) -> np.ndarray:
        """`count` independent coins that are true with probability ⌊rate·2^64⌋/2^64 ≤ `rate`. Shape [count], bool.

        fp32 uniforms would sample at 1.19 times the rate where it is as low as 3e-7.
        """
        threshold = int(rate * 2**64)  # exact: a float's product with a power of two
        if threshold >= 2**64:
            return np.ones(count, dtype=bool)
        return self.integers(count) < np.uint64(threshold)

    def normal(self, count: int) -> np.ndarray:
        """`count` independent standard normals in fp64 by Box–Muller from 53-bit uniforms. Shape [count].

        The largest possible value is √(2·53·ln 2) = 8.57; fp32 samplers end at 5.8, which at σ = 1 and a million
        parameters costs more than δ = 1e-5 per step.
        """
        out = np.empty(count + count % 2)
        for start in range(0, len(out), _CHUNK):
            part = out[start : start + _CHUNK]
            half = len(part) // 2
            bits = self.integers(2 * half) >> np.uint64(11)
            radius = np.sqrt(-2 * np.log((bits[:half] + np.uint64(1)) * 2.0**-53))
            angle = bits[half:] * (2.0**-53 * 2 * np.pi)
            np.multiply(radius, np.cos(angle), out=part[:half])
            np.multiply(radius, np.sin(angle), out=part[half:])
        return out[:count]
