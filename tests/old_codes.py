"""What the codes of version 0.1 were, for `test_codec.py`: not a bit of them may change.

    python -m tests.old_codes

writes `tests/data/codes_0.1.npz` with the version that is here. What is committed is never made
again.
"""

import pathlib

import jax
import numpy as np

from galore_optax import apply_updates, quantize

PATH = pathlib.Path(__file__).parent / "data" / "codes_0.1.npz"
SCHEMES = ("signed", "unsigned", "int8", "int4")


def array():
    """Rows of any size, one of them small, one of zeros, one of one sign, and an outlier."""
    x = np.random.default_rng(0).standard_normal((2, 5, 72)).astype(np.float32)
    x[0] *= np.float32(10) ** np.arange(-6, 4, 2, dtype=np.float32)[:, None]
    x[1, 0], x[1, 1], x[1, 2, 3] = 0, np.abs(x[1, 1]), 50
    return x


def updates():
    """Of the same shape: small ones, which keep the grid of a block, and larger ones."""
    return 1e-3 * array()[::-1] + 1e-5


def codes() -> dict[str, np.ndarray]:
    """The parts of every code of the array, what they stand for, and their sum with updates."""
    found = {}

    def note(name, quantized):
        for part in ("codes", "scales", "zeros"):
            if hasattr(value := getattr(quantized, part), "dtype"):
                found[f"{name}/{part}"] = np.asarray(value)
        found[f"{name}/values"] = np.asarray(quantized.dequantize())

    x, key = array(), jax.random.key(3)
    for scheme in SCHEMES:
        # Of whole rows, and of layers, whose last block is filled up.
        note(f"{scheme}/rows", quantize(x, scheme, 24))
        note(f"{scheme}/layers", layers := quantize(x, scheme, 50, batch_axes=1))
        if scheme.startswith("int"):
            note(f"{scheme}/random", quantize(x, scheme, 50, batch_axes=1, key=key))
            note(f"{scheme}/sum", apply_updates(layers, updates(), None))
            note(f"{scheme}/random_sum", apply_updates(layers, updates(), key))
    note("unsigned/positive", quantize(x, "unsigned", 24, keep_positive=True))
    half = apply_updates(x.astype("bfloat16"), updates(), key, round_bfloat16=True)
    found["bfloat16/random_sum"] = np.asarray(half).view(np.uint16)
    return found


if __name__ == "__main__":
    np.savez_compressed(PATH, **codes())
