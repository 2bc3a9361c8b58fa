"""From the part of a batch that each process makes to global arrays on the mesh.

Axis letters: B samples of the global batch, N images, K = B / N samples that share an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mimo_jax import sharding


def local_images(mesh: Mesh, images: int) -> list[int]:
    """The indices, ascending, of those of the N images of every batch that the devices of this process need. Processes whose devices
    share samples (because the tensor axis spans both) need the same images."""
    image_slices = sharding.batch_sharding(mesh).addressable_devices_indices_map((images,)).values()
    return sorted({image for (share,) in image_slices for image in range(*share.indices(images))})


def make_global_batch(mesh: Mesh, images: int, here: Sequence[int], batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global batch of N images, arrays [B or N, ...]. here: the images of this process, see `local_images`; batch: their arrays."""
    split = sharding.batch_sharding(mesh)
    positions = {image: number for number, image in enumerate(here)}

    def to_global(value: np.ndarray) -> jax.Array:
        rows = len(value) // len(here)  # rows per image: 1 or K

        def share(index: tuple[slice, ...]) -> np.ndarray:
            first, last, _ = index[0].indices(images * rows)
            start = positions[first // rows] * rows
            return value[start : start + last - first]

        return jax.make_array_from_callback((images * rows, *value.shape[1:]), split, share)

    return {name: to_global(value) for name, value in batch.items()}
