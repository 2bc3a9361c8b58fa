"""How XLA writes which devices talk to each other."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.analysis import hlo


@settings(max_examples=60)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_groups_are_read_in_every_form(sizes, data):
    devices = int(np.prod(sizes))
    order = data.draw(st.permutations(range(len(sizes))))
    moving = sorted(data.draw(st.sets(st.sampled_from(range(len(sizes))), min_size=1)))
    names = [f"axis_{i}" for i in range(len(sizes))]
    ids = np.arange(devices).reshape(sizes)
    kept = [i for i in range(len(sizes)) if i not in moving]
    expected = ids.transpose([*kept, *moving]).reshape(-1, int(np.prod([sizes[i] for i in moving])))
    named = ",".join(f"'{n}'={s}" for n, s in zip(names, sizes, strict=True))
    axes = ",".join(f"'{names[i]}'" for i in moving)
    assert (hlo.device_groups(f", replica_groups=mesh[{named}] {{{axes}}}, x=1", devices) == expected).all()

    listed = ",".join("{" + ",".join(map(str, group)) + "}" for group in expected)
    assert (hlo.device_groups(f", replica_groups={{{listed}}}, x={{1}}", devices) == expected).all()

    dims, turns = ",".join(map(str, sizes)), ",".join(map(str, order))
    turned = ids.transpose(order)
    iota = hlo.device_groups(f", replica_groups=[{devices},1]<=[{dims}]T({turns}), x=1", devices)
    assert (iota.ravel() == turned.ravel()).all() and iota.shape == (devices, 1)

    shape = ",".join(f"'{n}'={s}" for n, s in zip(names, turned.shape, strict=True))
    last = names[-1]
    found = hlo.device_groups(f", replica_groups=mesh[{shape}], device_ids=([{dims}]T({turns})) {{'{last}'}}, x=1", devices)
    assert (found == turned.reshape(-1, turned.shape[-1])).all()


def test_a_part_of_an_axis_may_move():
    """'y':(2)3 of 12: 2 before it, 3 that move, 2 after."""
    found = hlo.device_groups("replica_groups=mesh['x'=2,'y'=12] {'y':(2)3}", 24)
    assert (found == np.arange(24).reshape(2, 2, 3, 2).transpose(0, 1, 3, 2).reshape(-1, 3)).all()
    assert (hlo.device_groups("replica_groups={}", 4) == [[0, 1, 2, 3]]).all()
