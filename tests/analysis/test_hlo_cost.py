"""Programs whose collectives, traffic and products are known: compiled for 8 virtual devices, or written as XLA for TPU writes them."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from mimo_jax.analysis.hlo_cost import Cost, program_cost

MESH = {"slice": 1, "data": 2, "fsdp": 4}

PROGRAMS = """
import json
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((1, 2, 4), ("slice", "data", "fsdp"), axis_types=(AxisType.Auto,) * 3)

def text(f, *shapes, spec=P(), out=P()):
    f = jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=out, check_vma=False)
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(f).lower(*args).compile().as_text()

def repeat(times, body):
    return lambda x: jax.lax.scan(lambda c, _: (body(c), None), x, None, length=times)[0]

def layers(x, w):
    return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0]

def until(x):
    return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: jax.lax.psum(x, "data") + 1, x)

def either(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.tanh(x @ x), lambda x: x + 1, x)

ring = [(i, (i + 1) % 4) for i in range(4)]
print(json.dumps({
    "psum": text(repeat(5, lambda x: jax.lax.psum(x, "fsdp") * 0.1), (1024,)),
    "nested": text(repeat(3, repeat(7, lambda x: jax.lax.psum(x, ("data", "fsdp")) * 0.1)), (1024,)),
    "gather": text(lambda x: jax.lax.all_gather(x, "fsdp", tiled=True), (8, 256), spec=P("fsdp")),
    "scatter": text(lambda x: jax.lax.psum_scatter(x, "data", tiled=True), (8, 256), out=P("data")),
    "permute": text(lambda x: jax.lax.ppermute(x, "fsdp", ring), (8, 256), spec=P("fsdp"), out=P("fsdp")),
    "swap": text(lambda x: jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True), (8, 256)),
    "layers": text(layers, (64, 128), (7, 128, 128)),
    "until": text(until, (1024,)),
    "either": text(either, (128, 128)),
    "add": text(lambda a, b: a + b, (1024,), (1024,)),
    "image": text(lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
                  (2, 9, 9, 3), (3, 3, 3, 5)),
}))
"""


@pytest.fixture(scope="module")
def programs():
    done = subprocess.run([sys.executable, "-c", PROGRAMS], capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def cost(text: str, mesh=None) -> Cost:
    return program_cost(text, mesh or MESH)


@pytest.mark.parametrize(
    ("name", "key", "count", "sent"),
    [
        ("psum", ("all-reduce", ("fsdp",)), 5, 5 * 2 * 4096 * 3 / 4),
        ("nested", ("all-reduce", ("data", "fsdp")), 21, 21 * 2 * 4096 * 7 / 8),
        ("gather", ("all-gather", ("fsdp",)), 1, 2 * 1024 * 3),
        ("scatter", ("reduce-scatter", ("data",)), 1, 8 * 1024 / 2),
        ("permute", ("collective-permute", ("fsdp",)), 1, 2 * 1024),
        ("swap", ("all-to-all", ("fsdp",)), 1, 8 * 1024 * 3 / 4),
    ],
)
def test_collectives_are_counted_through_loops(programs, name, key, count, sent):
    for text in (programs[name], re.sub(r'"known_trip_count":\{[^}]*\},?', "", programs[name])):  # TPU programs do not tell
        found = cost(text)
        assert found.collectives == {key: [count, sent]} and not found.unknown


def test_products_are_counted_and_of_a_stack_each_layer_is_read_once(programs):
    found = cost(programs["layers"])
    assert found.flops == 7 * 2 * 64 * 128 * 128
    weights, activations = 7 * 128 * 128 * 4, 7 * 64 * 128 * 4
    assert weights + 2 * activations <= found.memory <= 3 * weights + 6 * activations  # the stack seven times would be 7 * weights
    assert cost(programs["add"]).memory == 3 * 4096
    either = cost(programs["either"])
    assert either.flops == 2 * 128**3, "the costlier branch"


def test_a_convolution_is_counted_where_the_image_is(programs):
    inside = [sum(0 <= 2 * out + tap - 1 < 9 for out in range(5) for tap in range(3))] * 2
    assert cost(programs["image"]).flops == 2 * 2 * 5 * 3 * np.prod(inside)


def test_a_loop_without_an_end_that_is_told_counts_once_and_is_named(programs):
    found = cost(programs["until"])
    assert found.collectives == {("all-reduce", ("data",)): [1, 2 * 4096 / 2]} and len(found.unknown) == 1


LOOP = """HloModule loop
%step (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %two = s32[]{:T(128)} constant(2)
  %next = s32[]{:T(128)} add(%i, %two)
  %x = f32[8]{0:T(128)S(1)} get-tuple-element(%p), index=1
  %start = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1, source_target_pairs={{0,4},{4,0}}
  %done = f32[8]{0:T(128)S(1)} collective-permute-done(%start)
  ROOT %t = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%next, %done)
}

%less (p: (s32[], f32[8])) -> pred[] {
  %p.1 = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) parameter(0)
  %limit = s32[]{:T(128)} constant(8)
  %i.1 = s32[]{:T(128)} get-tuple-element(%p.1), index=0
  ROOT %c = pred[]{:T(512)} compare(%i.1, %limit), direction=LT
}

%piece (a: f32[4,8]) -> (f32[4,8], f32[16,8], u32[]) {
  %a = f32[4,8]{1,0} parameter(0)
  %g = f32[16,8]{1,0:S(1)} all-gather(%a), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"-1"}}
  ROOT %s = (f32[4,8]{1,0}, f32[16,8]{1,0:S(1)}, u32[]{:S(2)}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%later (b: f32[4,8]) -> f32[16,8] {
  %b = f32[4,8]{1,0} parameter(0)
  %g.1 = f32[16,8]{1,0:S(1)} all-gather(%b), channel_id=7, replica_groups=mesh['x'=2,'y'=4] {'y'}, dimensions={0}, use_global_device_ids=true, backend_config={"async_collective_fusion_config":{"flag_start":"2"}}
  ROOT %d = f32[16,8]{1,0:S(1)} custom-call(%g.1), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (x: f32[8], w: f32[4,8]) -> f32[8] {
  %x.1 = f32[8]{0:T(128)} parameter(0)
  %w = f32[4,8]{1,0} parameter(1)
  %fetch = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)}, u32[]{:S(2)}) copy-start(%x.1)
  %here = f32[8]{0:T(128)S(1)} copy-done(%fetch)
  %one = s32[]{:T(128)} constant(1)
  %begin = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) tuple(%one, %here)
  %while = (s32[]{:T(128)}, f32[8]{0:T(128)S(1)}) while(%begin), condition=%less, body=%step
  %f = (f32[4,8]{1,0}, f32[16,8]{1,0:S(1)}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%piece
  %f.1 = f32[16,8]{1,0:S(1)} fusion(%w), kind=kCustom, calls=%later
  %kernel = f32[8]{0:T(128)S(1)} custom-call(%here), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"block": "{512}"
}}, metadata={op_name="kernel"}
  %token = token[] after-all()
  %send = (f32[8]{0:T(128)}, u32[], token[]) send(%kernel, %token), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %sent = token[] send-done(%send), channel_id=4, is_host_transfer=true
  ROOT %out = f32[8]{0:T(128)} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def test_programs_for_tpu_are_read():
    """Trip counts from the counter alone, gathers in pieces, kernels with line breaks, traffic between slices, on-chip memory."""
    found = cost(LOOP, {"slice": 2, "fsdp": 4})
    assert found.collectives == {
        ("collective-permute", ("slice",)): [4, 4 * 32],  # 1, 3, 5, 7
        ("all-gather", ("fsdp",)): [1, 128 * 3],
        ("all-reduce", ("slice",)): [1, 2 * 32 / 2],
    }
    assert not found.unknown
    assert 32 + 128 <= found.memory < 32 + 128 + 64, "x is fetched, w is gathered from; all else is on the chip, but for counters"


def test_batched_products_as_convolutions_count_no_holes():
    line = (
        "ENTRY %m (a: f32[5,7,3], b: f32[5,11,3]) -> f32[5,7,11] {\n  %a = f32[5,7,3]{2,1,0} parameter(0)\n"
        "  %b = f32[5,11,3]{2,1,0} parameter(1)\n  ROOT %c = f32[5,7,11]{2,1,0} convolution(%a, %b), "
        "window={size=5 stride=4 lhs_dilate=5}, dim_labels=0bf_0oi->0bf\n}\n"
    )
    assert cost(line).flops == 2 * 5 * 7 * 11 * 3
