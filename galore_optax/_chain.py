"""chain() is optax.chain, where what follows a bare galore() becomes its inner transformation."""

import optax

from galore_optax._galore import BareGalore


def chain(*transformations: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Applies transformations one after the other, those after ``galore(...)`` in its subspace.

    ``chain(before, galore(rank=128), optax.adamw(3e-4))`` is
    ``optax.chain(before, galore(optax.adamw(3e-4), rank=128))``, and everything else is
    ``optax.chain``, which cannot do this itself: it gives each member the full parameters, so
    that moments after ``galore`` would be full size. What stands before ``galore`` sees the full
    gradient. A nested ``optax.chain`` is one opaque transformation.

    Args:
      *transformations: the Optax transformations, at most one of them a ``galore(...)`` without an
        inner transformation.

    Raises:
      ValueError: more than one bare ``galore(...)``.

    Examples:
      >>> import galore_optax, optax
      >>> tx = galore_optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     galore_optax.galore(rank=128),
      ...     optax.adamw(3e-4, weight_decay=0.1),
      ... )
    """
    bare = [(i, t) for i, t in enumerate(transformations) if isinstance(t, BareGalore)]
    if len(bare) > 1:
        raise ValueError(
            f"chain takes one galore(...) without an inner transformation; got {len(bare)}, as "
            f"arguments {', '.join(str(i) for i, _ in bare)}. For different ranks pass a callable "
            "rank, or use optax.partition."
        )
    if not bare or bare[0][0] == len(transformations) - 1:
        return optax.chain(*transformations)
    [(position, galore)] = bare
    before, after = transformations[:position], transformations[position + 1 :]
    inner = after[0] if len(after) == 1 else optax.chain(*after)
    return optax.chain(*before, galore.with_inner(inner))
