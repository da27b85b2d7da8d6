"""What devices send each other for a refresh and for an ordinary step: bounds, from programs."""

import json
from pathlib import Path

import pytest

from tests.devices import on_devices

ROOT = Path(__file__).parents[1]
EIGHT_DEVICES = """
import json
from benchmarks.collectives import LAYOUTS, Row, figures

rows = [Row("power_iteration", layout, axes) for axes in ("Auto", "Explicit") for layout in LAYOUTS]
rows.append(Row("rows", "long axis", "Auto"))
print(json.dumps([[row.projector, row.layout, row.axes, figures(row, scale=32)] for row in rows]))
"""


@pytest.mark.ci
@pytest.mark.long("compiles a refresh and a step for eight devices in each of six layouts")
def test_what_eight_devices_send_each_other():
    printed = on_devices(8, "-c", EIGHT_DEVICES)
    found = {tuple(key): value for *key, value in json.loads(printed.splitlines()[-1])}
    for (projector, layout, axes), of in found.items():
        refresh, step = of["refresh"], of["step"]
        # No collective of an ordinary step is larger than the low-rank gradient.
        total = sum(moved["operands"] for moved in step["collectives"].values())
        largest = max((moved["operands"] for moved in step["collectives"].values()), default=0)
        assert largest * step["per_low_rank"] <= 1.01 * total
        if projector == "rows":
            assert step["per_projector"] == 0
            assert refresh["per_projector"] < 0.1
        elif layout == "8 layers, divided":
            # Each device refreshes its own, where types say which these are.
            assert not step["collectives"]
            if axes == "Explicit":
                assert not refresh["collectives"]
        elif layout != "short axis":
            # One all-reduce of the product, a gather of the sharded basis, and Gram matrices.
            assert 1 <= refresh["per_projector"] <= 2.2
