"""state_partition_specs() says where every array of a state lies on a mesh, from shapes alone."""

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from galore_optax._errors import check_transformation
from galore_optax._given_specs import checked_mesh, checked_shardings, checked_specs
from galore_optax._mesh_axes import has_explicit_axes
from galore_optax._parts import Part, parts
from galore_optax._placement import Placement, lying, padded
from galore_optax._quantized import is_quantized
from galore_optax._sharding import auto_sharding, put
from galore_optax._state import Inspection, inspecting
from galore_optax._trees import bare, leaves_with_paths, logical
from galore_optax._types import Params, Shape, State, Updates
from galore_optax._view import LeafView, MatrixView


def state_partition_specs(
    tx: optax.GradientTransformation,
    params: Params,
    specs: PyTree,
    *,
    mesh: Mesh | AbstractMesh | None = None,
) -> State:
    """Says where the state of a transformation lies on a mesh, by where the parameters lie.

    The state of galore has shapes that are not those of the parameters, so that no copy of their
    specs fits it. By the rules here a device has as small a part of it as of the parameters:

    - A moment of the shape of R, as the accumulator of micro-batches, is divided along the axis
      that is kept, over the mesh axes of both sides of its matrix.
    - A projector is divided so along the axis that is projected; it is gathered where it is used.
    - Codes of 8 or 4 bits lie as the array that they stand for, in whole blocks; where blocks
      straddle rows, codes are divided along their only axis.
    - What has the shape of its parameter lies as the parameter; what has some of its axes, as a
      factored second moment has, is divided along these.
    - What is kept once per matrix is divided as the layers are; all else, such as step counters, is
      on every device.

    Args:
      tx: any transformation, with galore anywhere in it or nowhere.
      params: the parameters, or their ``jax.ShapeDtypeStruct``.
      specs: a tree of ``jax.sharding.PartitionSpec``, or of None for what is on every device, with
        the structure of the parameters or a prefix of it.
      mesh: the mesh, by whose sizes mesh axes that do not divide an axis are left out; by default
        the one of ``jax.set_mesh``. Without any it is taken that they do.

    Returns:
      A tree with the structure of ``tx.init(params)``, boxes of Flax left out, and a
      ``PartitionSpec`` for each array.

    Raises:
      TypeError: ``tx`` is no transformation, a spec no ``PartitionSpec``, or ``mesh`` no mesh.
      ValueError: specs of another tree, of too many axes, or of axes that the mesh does not have or
        that do not divide the parameter.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"kernel": jax.ShapeDtypeStruct((512, 2048), jnp.float32)}
      >>> tx = galore_optax.galore_adamw(1e-3, rank=128)
      >>> specs = galore_optax.state_partition_specs(tx, params, {"kernel": P("fsdp", "tensor")})
      >>> specs.subspace.left["kernel"], specs.inner[0].mu["kernel"]
      (P(('fsdp', 'tensor'), None), P(None, ('tensor', 'fsdp')))
    """
    check_transformation("tx", tx)
    abstract = checked_mesh(mesh)
    params = bare(params)
    of_leaves = checked_specs(specs, params, abstract)
    inspection = Inspection()
    with inspecting(inspection):
        # This is a function of its own, so that no earlier trace of tx.init is reused.
        state = jax.eval_shape(lambda p: tx.init(p), _unsharded(params))
    views: dict[str, list[LeafView]] = {}
    for view in itertools.chain.from_iterable(inspection.trees):
        views.setdefault(view.path, []).append(view)
    return specs_of(state, params, views, of_leaves, abstract)


def state_shardings(
    tx: optax.GradientTransformation, params: Params, shardings: PyTree = None
) -> State:
    """Says where the state lies as :func:`state_partition_specs` does, with the mesh.

    Args:
      tx: any transformation.
      params: the parameters, or their ``jax.ShapeDtypeStruct``.
      shardings: a tree of ``jax.sharding.NamedSharding``, or of None for what is on every device,
        with the structure of the parameters or a prefix of it; by default those that the parameters
        have.

    Returns:
      A tree with the structure of ``tx.init(params)``, boxes of Flax left out, and a
      ``NamedSharding`` for each array: what ``jax.jit(tx.init, out_shardings=...)`` wants.

    Raises:
      TypeError: ``tx`` is no transformation, or a sharding is no ``NamedSharding``.
      ValueError: shardings of another tree, or on several meshes.

    Examples:
      >>> import galore_optax, jax, jax.numpy as jnp
      >>> from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(AxisType.Auto,))
      >>> params = {"kernel": jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("fsdp")))}
      >>> tx = galore_optax.galore_adamw(1e-3, rank=4)
      >>> shardings = galore_optax.state_shardings(tx, params)
      >>> state = jax.jit(tx.init, out_shardings=shardings)(params)
      >>> state.subspace.left["kernel"].sharding.spec
      P('fsdp', None)
    """
    params = bare(params)
    found, mesh = checked_shardings(shardings, params)
    treedef = jax.tree.structure(logical(params))
    specs = state_partition_specs(tx, params, treedef.unflatten(found), mesh=mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)


def specs_of(
    state: State,
    params: Params,
    views: Mapping[str, Sequence[LeafView]],
    specs: Sequence[PartitionSpec],
    mesh: AbstractMesh | None,
    *,
    shares: bool = True,
) -> State:
    """Returns the specs of a state, by the rules of :func:`state_partition_specs`.

    Args:
      state: the state, or its shapes.
      params: the parameters, or their shapes.
      views: how the leaves of the parameters are seen, by path; by each galore that sees them.
      specs: those of the leaves of the parameters, with an entry for each axis.
      mesh: the mesh, or None where anything can be divided.
      shares: see `Placement`.
    """
    leaves = leaves_with_paths(logical(params))
    found = []
    for part in parts(state, params):
        if part.owner is None:
            found.append(jax.tree.map(lambda _: PartitionSpec(), part.array))
            continue
        (path, leaf), spec = leaves[part.owner], specs[part.owner]
        # Outside of galore nothing has the shape of R, but by chance.
        seen = () if part.field is None else views.get(path, ())
        matrices = [view for view in seen if isinstance(view, MatrixView)]
        placements = [Placement(view, spec, mesh, shares) for view in matrices]
        found.append(_of_part(part, np.shape(leaf), spec, placements, mesh))
    return jax.tree.structure(state, is_leaf=is_quantized).unflatten(found)


def placed_state(state: State, params: Params, views: Sequence[LeafView]) -> State:
    """Puts a new state where :func:`state_partition_specs` says, if parameters lie on a mesh.

    It is for arrays on a mesh of Auto axes: with Explicit axes types say where arrays lie, and what
    is traced is put in its place by who compiles it.

    Args:
      state: the state.
      params: the parameters that it was made for, out of boxes.
      views: how these are seen.
    """
    leaves = jax.tree.leaves(logical(params))
    shardings = [auto_sharding(leaf) for leaf in leaves]
    mesh = next((sharding.mesh for sharding in shardings if sharding is not None), None)
    if mesh is None:
        return state
    specs = [
        padded(PartitionSpec() if sharding is None else sharding.spec, np.ndim(leaf))
        for sharding, leaf in zip(shardings, leaves, strict=True)
    ]
    by_path = {view.path: [view] for view in views}
    found = specs_of(state, params, by_path, specs, mesh.abstract_mesh)
    return put(state, found, mesh)


def _of_part(
    part: Part,
    shape: Shape,
    spec: PartitionSpec,
    placements: Sequence[Placement],
    mesh: AbstractMesh | None,
) -> PyTree:
    """Returns the specs of a part that belongs to a leaf of the parameters.

    Args:
      part: the part.
      shape: the shape of the leaf.
      spec: the spec of the leaf.
      placements: of all galores that project the leaf.
      mesh: the mesh.
    """
    array = part.array
    for place in placements:
        if part.field in ("left", "right"):
            return place.of(array, place.basis(0 if part.field == "left" else 1))
        if part.field == "residual":
            return place.of(array, place.whole)
        if part.field not in ("inner", "accumulator"):
            return place.of(array, None)
        if array.shape == place.view.low_rank_shape:
            return place.of(array, place.low_rank)
    if array.shape == shape:
        return lying(array, spec, mesh)
    known = [(place.view.low_rank_shape, place.low_rank) for place in placements]
    for whole, its_spec in (*known, (shape, spec)):
        if (found := _aligned(array.shape, whole, its_spec)) is not None:
            return lying(array, found, mesh)
    return jax.tree.map(lambda _: PartitionSpec(), array)


def _aligned(shape: Shape, whole: Shape, spec: PartitionSpec) -> PartitionSpec | None:
    """Returns the spec of what has some of the axes of an array, in the same order.

    An axis of size 1 stands for one that was summed over. None says that the shape does not come
    of the array so, or in several ways that lie differently.

    Args:
      shape: the shape of what there is.
      whole: the shape of the array.
      spec: the spec of the array.
    """
    sizes = [size for size in shape if size != 1]
    found = set()
    for axes in itertools.combinations(range(len(whole)), len(sizes)):
        if [whole[axis] for axis in axes] == sizes:
            found.add(tuple(spec[axis] for axis in axes))
    if len(found) != 1 or not sizes:
        return None
    of_sizes = iter(found.pop())
    return PartitionSpec(*(None if size == 1 else next(of_sizes) for size in shape))


def decoded_specs(state: State, updates: Updates) -> Sequence[PartitionSpec | None]:
    """Returns where each leaf of a state lies out of codes, on a mesh of Explicit axes."""
    mesh = jax.sharding.get_abstract_mesh()
    if not has_explicit_axes(mesh):
        return [None] * len(jax.tree.leaves(state, is_leaf=is_quantized))

    def shape(x: PyTree) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(x), x.dtype if is_quantized(x) else jnp.result_type(x))

    decoded = jax.tree.map(shape, state, is_leaf=is_quantized)
    specs = [jax.typeof(x).sharding.spec for x in jax.tree.leaves(updates)]
    return jax.tree.leaves(specs_of(decoded, updates, {}, specs, mesh), is_leaf=_is_spec)


def _is_spec(x: object) -> bool:
    return isinstance(x, PartitionSpec)


def _unsharded(params: Params) -> Params:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), params)
