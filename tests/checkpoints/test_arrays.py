"""Arrays of several processes: what each wrote in parts is one checkpoint."""

import json
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

from mimo_jax.checkpoints import frozen_params, loading
from tests.small_run import assert_same
from tests.tiny_config import tiny_config

SHARDED = """
import sys, jax, jax.numpy as jnp, numpy as np
from pathlib import Path
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from mimo_jax import distributed, files
from mimo_jax.checkpoints import arrays, checkpoint, frozen_params as base, storage
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize("127.0.0.1:" + sys.argv[2], num_processes=2, process_id=int(sys.argv[3]))
split = NamedSharding(jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,)), P("fsdp"))
values = np.arange(32, dtype=np.float32).reshape(8, 4)
make = lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index])
base.save(Path(sys.argv[1]), {"llm": {"w": make(values)}})
checkpoints = checkpoint.Checkpoints(sys.argv[1])
checkpoints.save(1, {"params": {"w": make(values + 1)}}, {"position": 1})
checkpoints.wait()

distributed.gather(None)
run = Path(sys.argv[1])
wanted = {"llm/w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)}
read = arrays.files_read(run / "base", wanted)
names = [name for name in files.read_json(run / "base" / storage.MANIFEST)["files"] if "/c/" in name]
mine = [name for name in names if read(name)]
assert len(mine) == 2 and len(names) == 4, (mine, names)
if jax.process_index() == 0:  # what only the other process reads is none of this one's business
    damaged = run / "base" / next(name for name in names if name not in mine)
    whole = damaged.read_bytes()
    damaged.write_bytes(b"x" + whole[1:])
    assert base.find(run, None, wanted) == run / "base"
    try:
        base.find(run)
        raise SystemExit("a damaged base was not detected")
    except checkpoint.CheckpointError as error:
        assert damaged.name in str(error)
    damaged.write_bytes(whole)
distributed.gather(None)
state, extra = checkpoints.restore(1, {"params": {"w": wanted["llm/w"]}}, {"params": {"w": split}})
assert extra == {"position": 1} and np.array_equal(storage.gather_to_host(state["params"]["w"]), values + 1)
here = arrays.on_every_process(base.load(run, {"llm": {"w": wanted["llm/w"]}}, split))
assert np.array_equal(here["llm"]["w"], values) and here["llm"]["w"].is_fully_addressable
"""


def test_what_two_processes_saved_in_parts_one_process_reads(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [subprocess.Popen([sys.executable, "-c", SHARDED, str(tmp_path), port, str(i)]) for i in range(2)]
    try:
        assert [process.wait(timeout=100) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    values = np.arange(32, dtype=np.float32).reshape(8, 4)
    (tmp_path / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    assert_same(loading.load_params(tmp_path), {"llm": {"w": jnp.asarray(values)}, "w": jnp.asarray(values + 1)})
    (alone := tmp_path / "alone").mkdir()
    fingerprint = json.loads((tmp_path / "base.json").read_text())["fingerprint"]
    assert frozen_params.save(alone, {"llm": {"w": values}}) == fingerprint
