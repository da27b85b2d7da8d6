"""Every transport and residual of galore, in NumPy and float64, from the formulae alone.

One matrix at a time, and always with the rows projected: one whose columns are projected is
transposed before, and its update after. Nothing here looks at galore_optax.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

SMALL = 1e-8  # added to norms that divide


@dataclasses.dataclass
class Limiter:
    """Norms grow by no more than a factor of gamma from step to step."""

    gamma: float | None = 1.01
    previous: float = 0.0  # the last norm that was let through; 0: none yet

    def divisor(self, norm):
        """What to divide by something of this norm; remembers the norm that is left."""
        if self.gamma is None or norm == 0 or not np.isfinite(norm):
            return 1.0
        rho = 1.0
        if self.previous > 0:
            rho = max(norm / (self.previous + SMALL), self.gamma) / self.gamma
        self.previous = norm / rho
        return rho

    def __call__(self, matrix, factor=1.0):
        return matrix / self.divisor(factor * np.linalg.norm(matrix))


@dataclasses.dataclass
class Adam:
    """Moments in the subspace, t steps after they began, or s after they were last reset."""

    b1: float
    b2: float
    m: np.ndarray
    v: np.ndarray
    eps: float = 1e-8
    t: int = 0
    s: int = 0

    def __call__(self, r):
        """The direction for a low-rank gradient, its bias corrected by t."""
        self.t, self.s = self.t + 1, self.s + 1
        self.m = self.b1 * self.m + (1 - self.b1) * r
        self.v = self.b2 * self.v + (1 - self.b2) * r**2
        m_hat = self.m / (1 - self.b1**self.t)
        v_hat = self.v / (1 - self.b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)


def keep(adam, c):
    """The moments stay what they are, although they mean something else now."""


def project(adam, c):
    adam.m = c @ adam.m


def rotate(adam, c):
    """First moments turn; of second ones, the variance and the squared mean turn apart."""
    if adam.t == 0:
        return
    corrected = 1 - adam.b2**adam.t
    m_hat = adam.m / (1 - adam.b1**adam.t)
    v_hat = adam.v / corrected
    variance = np.maximum(0, c**2 @ (v_hat - m_hat**2))
    adam.m = c @ adam.m
    adam.v = corrected * (variance + (c @ m_hat) ** 2)


def reset(adam, c):
    adam.m, adam.v, adam.s = 0 * adam.m, 0 * adam.v, 0


def corrected_for_reset(adam, psi):
    """The direction as if bias were corrected by the steps since the reset."""
    ratio = (1 - adam.b1**adam.t) / (1 - adam.b1**adam.s)
    return psi * ratio * np.sqrt((1 - adam.b2**adam.s) / (1 - adam.b2**adam.t))


TRANSPORTS = {"keep": keep, "project": project, "rotate": rotate, "reset": reset}


def with_signs(vectors, old):
    """Each vector with the sign that it is to have: its largest entry, or beside the old one."""
    result = vectors.copy()
    for j, vector in enumerate(vectors.T):
        sign_of = vector[np.argmax(np.abs(vector))] if old is None else vector @ old[:, j]
        if sign_of < 0:
            result[:, j] = -vector
    return result


def svd(matrix, rank, step):
    del step
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


@dataclasses.dataclass(frozen=True)
class Rule:
    """What is done to the updates of a matrix; see `trajectory`."""

    transport: str = "keep"
    residual: str = "discard"
    scale: float = 0.25
    rank: int = 3
    gap: int = 20
    b1: float = 0.9
    b2: float = 0.99
    beta: float = 1.0  # norm_scaled, sign
    gamma: float | None = 1.01  # norm_scaled, scale_gradient
    subtract: str = "whole"  # norm_scaled
    per: str = "channel"  # scale_gradient
    basis: Callable = svd  # (matrix, rank, step) -> the new basis, of any signs


def columns(psi, r):
    """How much longer Adam made each column."""
    return np.linalg.norm(psi, axis=0) / (np.linalg.norm(r, axis=0) + SMALL)


def norm_scaled(rule, g, p, r, psi, limiter, adam):
    """Fira: the rest of the gradient, each column scaled as Adam scaled it in the subspace."""
    if rule.subtract == "scaled":
        rest = columns(psi, r) * (g - rule.scale * p @ r)
        # The published code limits before Adam's bias is corrected.
        before_bias = (1 - adam.b1**adam.t) / np.sqrt(1 - adam.b2**adam.t)
        return rule.scale * (p @ psi + rule.beta * limiter(rest, before_bias))
    rest = columns(psi, r) * (g - p @ r)
    return rule.scale * (p @ psi + rule.beta * limiter(rest))


def scale_gradient(rule, g, p, r, psi, limiter, adam):
    """APOLLO: the whole gradient, scaled as Adam scaled it in the subspace."""
    if rule.per == "tensor":
        s = np.linalg.norm(psi) / (np.linalg.norm(r) + SMALL)
    else:
        s = columns(psi, r)
    return rule.scale * limiter(s * g)


def sign(rule, g, p, r, psi, limiter, adam):
    """FRUGAL: the signs of the rest of the gradient."""
    return rule.scale * (p @ psi + rule.beta * np.sign(g - p @ r))


def discard(rule, g, p, r, psi, limiter, adam):
    """GaLore; and LDAdam, which differs in its gradient alone."""
    return rule.scale * p @ psi


RESIDUALS = {
    "discard": discard,
    "error_feedback": discard,
    "norm_scaled": norm_scaled,
    "scale_gradient": scale_gradient,
    "sign": sign,
}


def trajectory(rule, gradients):
    """The updates of one matrix, (steps, m, n), from its gradients, whose rows are projected."""
    _, m, n = gradients.shape
    adam = Adam(rule.b1, rule.b2, np.zeros((rule.rank, n)), np.zeros((rule.rank, n)))
    limiter, p, first, due = Limiter(rule.gamma), np.zeros((m, rule.rank)), True, True
    error, updates = 0.0, []
    for step, g in enumerate(gradients):
        if rule.residual == "error_feedback":
            g = g + error
        moved = 0.0  # what the first moment lost when it was taken to another subspace
        due |= step % rule.gap == 0
        if due and np.any(g):  # zeros choose nothing
            old, p = p, with_signs(rule.basis(g, rule.rank, step), None if first else p)
            before = old @ adam.m
            TRANSPORTS[rule.transport](adam, p.T @ old)
            moved = before - p @ adam.m
            first = due = False
        r = p.T @ g
        psi = adam(r)
        if rule.transport == "reset":
            psi = corrected_for_reset(adam, psi)
        updates.append(RESIDUALS[rule.residual](rule, g, p, r, psi, limiter, adam))
        if rule.residual == "error_feedback":
            error = g - p @ r + rule.b1 / (1 - rule.b1) * moved
    return np.stack(updates)


def of_shorter_side(rule, gradients):
    """The updates of matrices (steps, ..., m, n), each projected on its shorter side."""
    m, n = gradients.shape[-2:]
    if m > n:
        return np.swapaxes(of_shorter_side(rule, np.swapaxes(gradients, -1, -2)), -1, -2)
    stack = gradients.reshape(len(gradients), -1, m, n)
    updates = [trajectory(rule, stack[:, layer]) for layer in range(stack.shape[1])]
    return np.stack(updates, axis=1).reshape(gradients.shape)
