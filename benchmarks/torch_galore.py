"""GaLore's AdamW in eager PyTorch, for the time of its step; needs `torch`.

The arithmetic of the paper's algorithm 2 with an Adam inside, one parameter after the other as
PyTorch optimizers do: a peer for the clock, tested against ours in tests/test_benchmarks.py.
"""

import dataclasses
import math
from typing import Any

import jax
import torch  # pyrefly: ignore[missing-import]


def computes_where_jax_does() -> bool:
    """Whether this PyTorch has the device that JAX computes on."""
    return torch.cuda.is_available() == (jax.devices()[0].platform == "gpu")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the optimizer; names as in `galore_optax.galore_adamw`."""

    rank: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    update_proj_gap: int = 200
    scale: float = 0.25
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8


class Parameter:
    """One tensor, its moments, and its projector where it is projected."""

    def __init__(self, weight: Any, rank: int | None):
        self.weight = weight
        self.rank = rank
        self.basis: Any = None
        shape = list(weight.shape)
        if rank is not None:
            # The kept axis is the longer one; of a square matrix the second.
            self.left = shape[0] <= shape[1]
            shape[0 if self.left else 1] = rank
        self.mean = torch.zeros(shape, device=weight.device)
        self.square = torch.zeros(shape, device=weight.device)

    def refresh(self, gradient: Any) -> None:
        """Takes the leading singular vectors of the short side."""
        u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
        self.basis = u[:, : self.rank].clone() if self.left else vt[: self.rank].clone()

    def update(self, gradient: Any, count: int, settings: Settings) -> None:
        """One step, in place."""
        low_rank = gradient
        if self.rank is not None:
            low_rank = self.basis.T @ gradient if self.left else gradient @ self.basis.T
        self.mean.mul_(settings.b1).add_(low_rank, alpha=1 - settings.b1)
        self.square.mul_(settings.b2).addcmul_(low_rank, low_rank, value=1 - settings.b2)
        root = (self.square / (1 - settings.b2**count)).sqrt_().add_(settings.eps)
        update = self.mean / root
        if self.rank is not None:
            update = self.basis @ update if self.left else update @ self.basis
            update.mul_(settings.scale)
        rate = settings.learning_rate
        # Of norms too, as the other optimizers of the comparison have it.
        self.weight.mul_(1 - rate * settings.weight_decay)
        self.weight.add_(update, alpha=-rate / (1 - settings.b1**count))


class TorchRun:
    """The optimizer on its own copy of the parameters, as a `benchmarks.runs.Run`."""

    def __init__(self, params: Any, projected: Any, settings: Settings):
        self.compile_ms = None
        self.settings = settings
        self.count = 0
        self.due = True
        self.parameters = [
            Parameter(torch.from_dlpack(leaf).clone(), settings.rank if is_projected else None)
            for leaf, is_projected in zip(
                jax.tree.leaves(params), jax.tree.leaves(projected), strict=True
            )
        ]
        self.state_bytes = 0

    def step(self, params: Any, gradients: Any) -> Any:
        """One step on its own parameters; hands on those it was given."""
        self.due |= self.count % self.settings.update_proj_gap == 0
        self.count += 1
        gradients = [torch.from_dlpack(leaf) for leaf in jax.tree.leaves(gradients)]
        with torch.no_grad():
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                if self.due and parameter.rank is not None:
                    parameter.refresh(gradient)
                parameter.update(gradient, self.count, self.settings)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.due = False
        self.state_bytes = sum(
            math.prod(x.shape) * x.element_size()
            for p in self.parameters
            for x in (p.mean, p.square, p.basis)
            if x is not None
        )
        return params

    def make_due(self) -> bool:
        """Makes the next step a refresh."""
        self.due = True
        return True

    def refreshes(self) -> int:
        """Not counted."""
        return 0
