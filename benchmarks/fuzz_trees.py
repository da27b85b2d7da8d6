"""Draws trees of parameters, as code: names, shapes, dtypes, containers, None, shared leaves."""

import math

from hypothesis import strategies as st

NAMES = (
    *("kernel", "bias", "scale", "embedding", "lm_head", "w", "router", "q_proj", "down_proj"),
    *("layers", "block_0", "mlp/~/linear_0", "a.b", "", "0", "é", "norm"),
)
SIZES = (1, 2, 3, 4, 5, 8)
# Most are like those of models.
DTYPES = ("float32", "float32", "float32", "bfloat16", "float16", "float64")
MOST_ELEMENTS = 512


@st.composite
def shapes(draw: st.DrawFn, least: int = 0) -> tuple[int, ...]:
    """Draws a shape of at most four axes, some of them of size 1 and now and then of size 0."""
    ndim = draw(st.sampled_from((0, 1, 2, 2, 2, 2, 3, 3, 4)))
    shape = [draw(st.sampled_from(SIZES)) for _ in range(max(ndim, least))]
    if shape and draw(st.integers(0, 29)) == 29:
        shape[draw(st.integers(0, len(shape) - 1))] = 0
    while math.prod(shape) > MOST_ELEMENTS:
        shape[shape.index(max(shape))] = 2
    return tuple(shape)


@st.composite
def arrays(draw: st.DrawFn, dtypes: tuple[str, ...]) -> str:
    """Draws a leaf."""
    sizes = ", ".join(map(str, draw(shapes())))
    dtype = draw(st.sampled_from(dtypes))
    return f"array({sizes})" if dtype == "float32" else f'array({sizes or "*()"}, dtype="{dtype}")'


@st.composite
def dicts(draw: st.DrawFn, leaves: st.SearchStrategy[str]) -> str:
    """Draws a dict of one to three trees."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True))
    return f"{{{', '.join(f'{name!r}: {draw(leaves)}' for name in names)}}}"


@st.composite
def containers(draw: st.DrawFn, leaves: st.SearchStrategy[str]) -> str:
    """Draws a container of smaller trees."""
    one, other = draw(leaves), draw(leaves)
    return draw(
        st.sampled_from(
            (
                f"[{one}, {other}]",
                f"({one},)",
                f"Pair({one}, {other})",
                f"Node({one}, {other})",
                f"Struct({one})",
                f"Equinox({one}, {other})",
                f"{{0: {one}, 1: {other}}}",
                f"collections.OrderedDict(b={one}, a={other})",
                f"flax.core.freeze({{'params': {{'kernel': {one}, 'bias': {other}}}}})",
                f"{{'layers': {one}, 'none': None}}",
            )
        )
    )


@st.composite
def trees(draw: st.DrawFn, dtypes: tuple[str, ...] = DTYPES) -> str:
    """Draws a tree of parameters.

    Args:
      draw: what draws.
      dtypes: the dtypes of leaves; a tree has one, or is mixed.

    Returns:
      Its code.
    """
    own = draw(st.sampled_from((dtypes, *((dtype,) for dtype in dtypes))))
    leaf = arrays(own)
    small = st.one_of(dicts(leaf), dicts(leaf), containers(leaf), leaf)
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(leaf)
    if kind == 1:
        return f"nnx_state({{'linear': {draw(dicts(leaf))}, 'norm': {{'scale': {draw(leaf)}}}}})"
    if kind == 2:
        return f"boxed({draw(dicts(leaf))})"
    if kind == 3:
        return f"{{'embed': twice({draw(leaf)}), 'rest': {draw(small)}}}"
    if kind < 8:
        return draw(containers(small))
    return draw(dicts(small))
