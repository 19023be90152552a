"""Writes the npy and npz files that npy_spec.lua reads.  Run with NumPy at hand: python spec/data/make_numpy_files.py

What they hold is written down in npy_spec.lua.
"""

import os

import numpy as np
from numpy.lib import format as npy

HERE = os.path.dirname(os.path.abspath(__file__))


def path(name):
    return os.path.join(HERE, "numpy_" + name)


def with_version(name, version, array):
    with open(path(name), "wb") as f:
        npy.write_array(f, array, version=version)


rows = np.array([[0.5, -1.25, np.inf], [np.nan, 3e-8, 65504]])

np.save(path("rows.npy"), rows.astype("<f4"))
np.save(path("fortran.npy"), np.asfortranarray(np.arange(24, dtype="<f8").reshape(2, 3, 4)))
np.save(path("big_endian.npy"), np.array([1, -2, 1 << 30], dtype=">i4"))
np.save(path("scalar.npy"), np.array(7.25, dtype="<f2"))
np.save(path("empty.npy"), np.zeros((0, 3), dtype="<i8"))
np.save(path("u64.npy"), np.array([0, (1 << 63) - 1], dtype="<u8"))
np.save(path("objects.npy"), np.array([None, {}], dtype=object), allow_pickle=True)
np.save(path("fields.npy"), np.zeros(2, dtype=[("a", "<f4"), ("b", "<i4")]))
np.save(path("complex.npy"), np.zeros(2, dtype="<c8"))
with_version("version2.npy", (2, 0), np.arange(3, dtype="<i2"))
with_version("version3.npy", (3, 0), np.array([True, False, True]))
arrays = {"w": rows.astype("<f2"), "b": np.arange(5, dtype="<u4"), "deep/name": np.array([250, 7], dtype="u1")}
np.savez(path("stored.npz"), **arrays)
np.savez_compressed(path("packed.npz"), zeros=np.zeros(5000, dtype="<f4"), **arrays)
