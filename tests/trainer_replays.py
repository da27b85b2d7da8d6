"""Runs replays of trainers, and prints what is seen of each as JSON."""

import json
import sys

import flax
from packaging.version import Version

from tests import trainer_levanter, trainer_named, trainer_ruled, trainer_trees

REPLAYS = {
    "tunix": trainer_named.tunix,
    "maxtext": trainer_named.maxtext_nnx,
    "maxtext_linen": trainer_named.maxtext_linen,
    "zero_1": trainer_named.zero_1,
    "levanter": trainer_levanter.levanter,
    "levanter_tensor": trainer_levanter.levanter_tensor,
    "easydel": trainer_ruled.easydel,
    "openpi": trainer_ruled.openpi,
    "kauldron": trainer_ruled.kauldron,
    "equinox": trainer_trees.equinox,
    "haiku": trainer_trees.haiku,
    "numpyro": trainer_trees.numpyro,
    "brax": trainer_trees.brax,
}

# These are written for the NNX of today.
if Version(flax.__version__) < Version("0.12.8"):
    del REPLAYS["tunix"], REPLAYS["maxtext"]

if __name__ == "__main__":
    print(json.dumps({name: REPLAYS[name]() for name in sys.argv[1:]}))
