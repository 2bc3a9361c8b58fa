"""From what each process makes of a batch to global arrays on the mesh.

Axis letters: B samples of the global batch, N images, K = B / N samples that share one.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mimo_jax import sharding


def images_here(mesh: Mesh, images: int) -> list[int]:
    """Which of the N images of every batch the devices of this process need, ascending. Processes whose devices share samples (the
    tensor axis runs through both) need the same."""
    shares = sharding.batch_sharding(mesh).addressable_devices_indices_map((images,)).values()
    return sorted({image for (share,) in shares for image in range(*share.indices(images))})


def place(mesh: Mesh, images: int, here: Sequence[int], batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global batch, arrays [B or N, ...], of N images; batch: those of the images `here`."""
    split = sharding.batch_sharding(mesh)
    at = {image: number for number, image in enumerate(here)}

    def globally(value: np.ndarray) -> jax.Array:
        rows = len(value) // len(here)  # of one image: 1 or K

        def share(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(images * rows)
            start = at[first // rows] * rows
            return value[start : start + last - first]

        return jax.make_array_from_callback((images * rows, *value.shape[1:]), split, share)

    return {name: globally(value) for name, value in batch.items()}
