"""Says which leaves are no matrices of a layer: by their names, and by what lies beside them."""

import collections
import re
from collections.abc import Sequence

from galore_optax._types import Shape

# Behind the name of a parameter there may be where a container keeps its array: levanter's
# ".../weight/array", an NNX variable in a plain tree, ".../value", penzai's ".../scale.value".
_END = r"([./](\d+|value|raw_value|array|data_array))*$"

# What is called so is an embedding or a head wherever it is.
_TABLES = (
    r"[^/]*embed[^/]*|([^/]*_)?embs?|pos|[^/]*vocab[^/]*|wte|wpe|([^/]*_)?head|logits[^/]*"
    r"|output_layer|classifier|(text|visual|image)_projection|final_proj|predictions/decoder"
)
_ROUTERS = r"[^/]*router[^/]*|[^/]*(moe|expert)[^/]*/([^/]+/)*gate"

# These are heads at the top of a model, and parts of a layer inside of one.
_TABLES_AT_THE_TOP = r"output/(weight|w)|proj_out|ff_out"
_OUTSIDE_OF_LAYERS = (
    r"^(?:(?![^/]*(?:layer|block|stack|attn|attention|mlp|ffn|feed_forward)|h(?:_\d+)?/|[^/]*\d/)"
    r"[^/]+/)*"
)

# Vectors, which stacked over layers have two axes. A lone "b" may as well be a matrix B.
_VECTORS = (
    r"(^|/)(scale|bias|offset|beta|gamma|mean|var|sinks|a_log|time_(mix|decay|first)[^/]*"
    r"|([^/]*norm[^/]*|([^/]*_)?rms[^/]*|([^/]*_)?ln(_[^/]*|\d*))(/(weight|w|g))?)|/b"
)

_AT_THE_TOP = rf"{_OUTSIDE_OF_LAYERS}({_TABLES_AT_THE_TOP})(/|$)"
_VECTOR = rf"({_VECTORS}){_END}"

DEFAULT_EXCLUDE = rf"(?i)(^|/)({_TABLES}|{_ROUTERS})(\.[^/]*)?(/|$)|{_AT_THE_TOP}|{_VECTOR}"
"""The leaves that are left at full size by default, as a regular expression on their path.

They are embeddings, output heads, routers of experts, and vectors, which stacked over layers look
like matrices: scales, biases, and the weights of norms. The documentation lists the names.
"""


def is_table(path: str) -> bool:
    """Whether a leaf of two axes or more is an embedding or a head, by its path."""
    is_called_so = rf"(?i)(^|/)({_TABLES})(\.[^/]*)?(/|$)|{_AT_THE_TOP}"
    is_vector = rf"(?i){_VECTOR}"
    return bool(re.search(is_called_so, path)) and not re.search(is_vector, path)


def routers(paths: Sequence[str]) -> set[int]:
    """Finds the routers called "gate" that lie beside experts, in ``mlp/gate`` and ``mlp/experts``.

    Args:
      paths: the paths of all leaves, components joined by "/".

    Returns:
      Their positions.
    """
    of_experts = re.compile(r"(?i)[^/]*expert[^/]*(/|$)")
    beside = {path[: found.start()] for path in paths for found in of_experts.finditer(path)}
    gates = ((i, re.search(r"(?i)(?<![^/])gate(?=/|$)", path)) for i, path in enumerate(paths))
    return {i for i, gate in gates if gate and paths[i][: gate.start()] in beside}


def stacked_vectors(paths: Sequence[str], shapes: Sequence[Shape]) -> dict[int, int]:
    """Finds the leaves that are stacks of vectors, by the leaves that lie beside them.

    A leaf of two axes is one where it is in a part of the tree all of whose leaves have the same
    leading size, that of the stack, and some leaf there has more axes: it is a stack of matrices.
    Likewise where more axes lead: a leaf of k + 1 axes is a stack of vectors if all leaves of the
    part have the same k leading sizes, and some have more than k + 1 axes.

    Args:
      paths: the paths of all leaves, components joined by "/".
      shapes: their shapes.

    Returns:
      For the position of each such leaf that of a leaf of more axes beside it.
    """
    parts: dict[str, list[int]] = collections.defaultdict(list)
    for i, path in enumerate(paths):
        components = path.split("/")
        for end in range(len(components)):
            parts["/".join(components[:end])].append(i)
    found: dict[int, int] = {}
    for members in parts.values():
        common = _common_lead([shapes[i] for i in members])
        for i in members:
            axes = len(shapes[i])
            if i in found or not 2 <= axes <= common + 1:
                continue
            witness = next((j for j in members if len(shapes[j]) > axes), None)
            if witness is not None:
                found[i] = witness
    return found


def _common_lead(shapes: Sequence[Shape]) -> int:
    """Returns how many leading sizes are the same in all shapes."""
    count = 0
    for sizes in zip(*shapes, strict=False):
        if len(set(sizes)) > 1:
            break
        count += 1
    return count
