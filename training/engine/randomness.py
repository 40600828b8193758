"""Randomness that privacy rests on: ChaCha20 keystreams under keys from the operating system (P10).

A key lives in this process's memory only. It is never saved, never derived from a seed, never shared: there is no
argument through which a seed could come in. Torch's and numpy's generators may not be used for noise or sampling.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

_forks = [0]  # how many forks lie between this process and the first: numbers of processes are used again
os.register_at_fork(after_in_child=lambda: _forks.append(_forks.pop() + 1))
_KEY_LIFE = 1 << 37  # bytes drawn under one key, half of what its counter allows; then a fresh one is taken
_CHUNK = 1 << 16  # numbers made at a time, so that they stay in a core's cache


def _process() -> tuple[int, int]:
    """What no two processes have in common that one of them was forked from."""
    return os.getpid(), _forks[0]


class Keystream:
    """Uniform 64-bit integers from ChaCha20 (RFC 8439) under a fresh 256-bit key; computationally indistinguishable
    from random. A forked child draws its own key, so that parent and child never share a stream."""

    def __init__(self) -> None:
        self._helpers: list[Keystream] = []
        self._rekey()

    def _rekey(self) -> None:
        self._owner = _process()
        # The first four bytes of this nonce are the 32-bit block counter: from 0, so that the stream is at its longest.
        nonce = bytes(4) + os.urandom(12)
        self._encryptor = Cipher(algorithms.ChaCha20(os.urandom(32), nonce), mode=None).encryptor()
        self._left = _KEY_LIFE

    def integers(self, count: int) -> np.ndarray:
        """`count` independent uniform integers. Shape [count], dtype uint64."""
        self._left -= 8 * count
        if self._owner != _process() or self._left < 0:
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
        parameters costs more than δ = 1e-5 per step. Large counts are shared out to as many threads as torch uses, each
        with a keystream of its own.
        """
        out = np.empty(count + count % 2)
        parts = [out[start : start + _CHUNK] for start in range(0, len(out), _CHUNK)]
        threads = min(len(parts), torch.get_num_threads())
        if threads <= 1:
            self._fill(parts)
            return out[:count]
        while len(self._helpers) < threads:
            self._helpers.append(Keystream())
        with ThreadPoolExecutor(threads) as pool:
            filling = [pool.submit(self._helpers[i]._fill, parts[i::threads]) for i in range(threads)]
        for done in filling:
            done.result()
        return out[:count]

    def _fill(self, parts: Sequence[np.ndarray]) -> None:
        """Write normals into `parts`, each of an even length."""
        for part in parts:
            half = len(part) // 2
            bits = self.integers(2 * half) >> np.uint64(11)
            radius = (bits[:half] + np.uint64(1)).astype(np.float64)  # in place from here on: twice as fast
            radius *= 2.0**-53
            np.sqrt(np.multiply(np.log(radius, out=radius), -2, out=radius), out=radius)
            angle = bits[half:].astype(np.float64)
            angle *= 2.0**-53 * 2 * np.pi
            np.multiply(radius, np.cos(angle, out=part[:half]), out=part[:half])
            np.multiply(radius, np.sin(angle, out=part[half:]), out=part[half:])
