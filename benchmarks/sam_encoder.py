"""Memory of SAM's image encoder on a TPU, compiled ahead of time without one (needs libtpu, the extra `tpu`).

python benchmarks/sam_encoder.py [--config configs/mimo_7b.py --topology v5e:4x4 --images 4]
"""

from __future__ import annotations

import argparse
import time

from mimo_jax.analysis import topology


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--config", default="configs/mimo_7b.py")
    flags.add_argument("--topology", default="v5e:4x4")
    flags.add_argument("--images", type=int, default=4, help="images per chip")
    args = flags.parse_args()
    machine = topology.parse_topology(args.topology)
    with machine.environment():
        measure(args.config, machine, args.images)


def measure(path: str, machine: topology.Topology, images: int) -> None:
    import jax
    import jax.numpy as jnp

    from mimo_jax import parameters, sharding
    from mimo_jax.analysis import hardware
    from mimo_jax.config_flags import find_config, read_config_file
    from mimo_jax.models import mimo, scan
    from mimo_jax.models.mesh import use_mesh
    from mimo_jax.train.step import COMPILER_OPTIONS

    config = read_config_file(find_config(path))
    mesh = sharding.make_mesh(config.mesh, machine.devices())
    graphdef, shapes = mimo.abstract(config)
    shapes = parameters.with_dtypes(config, shapes)
    placed = sharding.model_shardings(config.mesh, mesh, hardware.device_memory(mesh.devices.flat[0]), {}, shapes)
    params = jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, placed.frozen)
    side, split = config.model.sam.image_size, sharding.batch_sharding(mesh)
    pixels = jax.ShapeDtypeStruct((images * mesh.size, side, side, 3), jnp.uint8, sharding=split)
    size = jax.ShapeDtypeStruct((images * mesh.size, 2), jnp.int32, sharding=split)

    def encode(params, pixels, size):
        with use_mesh(mesh):
            return scan.bind(graphdef, params).encode_sam(pixels, size)

    options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
    since = time.perf_counter()
    compiled = jax.jit(encode, out_shardings=split, compiler_options=options).lower(params, pixels, size).compile()
    memory = compiled.memory_analysis()
    print(f"{config.name} on {machine}, {images} images of {side} pixels per chip; {placed.reason}")
    print(f"temporaries {memory.temp_size_in_bytes / hardware.GIB:.2f} GiB, compiled in {time.perf_counter() - since:.0f} s")


if __name__ == "__main__":
    main()
