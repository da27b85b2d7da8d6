"""Every transport, residual and preset of galore, in NumPy and float64, from the formulae alone.

One matrix at a time, and always with the rows projected, or both sides: one whose columns are
projected is transposed before, and its update after. Nothing here looks at galore_optax.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

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


class Adam:
    """Moments in the subspace, t steps after they began, or s after they were last reset."""

    def __init__(self, rule, shape):
        self.b1, self.b2, self.eps = rule.b1, rule.b2, rule.eps
        self.m, self.v = np.zeros(shape), np.zeros(shape)
        self.t = self.s = 0

    def __call__(self, r):
        """The direction for a low-rank gradient, its bias corrected by t."""
        self.t, self.s = self.t + 1, self.s + 1
        self.m = self.b1 * self.m + (1 - self.b1) * r
        self.v = self.b2 * self.v + (1 - self.b2) * r**2
        m_hat = self.m / (1 - self.b1**self.t)
        v_hat = self.v / (1 - self.b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.eps)

    def keep(self, rounded):
        """What is kept of the moments until the next step, where that is in few bits."""
        self.m, self.v = rounded(self.m, "signed"), rounded(self.v, "unsigned")


class Momentum:
    """An average of gradients, whose bias nobody corrects: Flora's."""

    def __init__(self, rule, shape):
        self.b1, self.m = rule.b1, np.zeros(shape)

    def __call__(self, r):
        self.m = self.b1 * self.m + (1 - self.b1) * r
        return self.m

    def keep(self, rounded):
        self.m = rounded(self.m, "signed")


def keep(adam, left, right):
    """The moments stay what they are, although they mean something else now."""


def project(adam, left, right):
    adam.m = left @ adam.m @ right.T


def rotate(adam, left, right):
    """First moments turn; of second ones, the variance and the squared mean turn apart."""
    if adam.t == 0:
        return
    corrected = 1 - adam.b2**adam.t
    m_hat = adam.m / (1 - adam.b1**adam.t)
    v_hat = adam.v / corrected
    variance = np.maximum(0, left**2 @ (v_hat - m_hat**2) @ (right**2).T)
    adam.m = left @ adam.m @ right.T
    adam.v = corrected * (variance + (left @ m_hat @ right.T) ** 2)


def reset(adam, left, right):
    adam.m, adam.v, adam.s = 0 * adam.m, 0 * adam.v, 0


def corrected_for_reset(adam, psi):
    """The direction as if bias were corrected by the steps since the reset."""
    ratio = (1 - adam.b1**adam.t) / (1 - adam.b1**adam.s)
    return psi * ratio * np.sqrt((1 - adam.b2**adam.s) / (1 - adam.b2**adam.t))


TRANSPORTS = {"keep": keep, "project": project, "rotate": rotate, "reset": reset}


class Choice(NamedTuple):
    """What a new basis may be chosen by."""

    matrix: np.ndarray  # (m, n), whose rows are to be projected
    rank: int
    number: int  # how many bases there were before
    layer: int  # which matrix of a stack it is
    old: np.ndarray | None  # the basis before; None: there was none
    adam: Adam  # what has the moments in the old basis


def with_signs(vectors, old):
    """Each vector with the sign that it is to have: its largest entry, or beside the old one."""
    result = vectors.copy()
    for j, vector in enumerate(vectors.T):
        sign_of = vector[np.argmax(np.abs(vector))] if old is None else vector @ old[:, j]
        if sign_of < 0:
            result[:, j] = -vector
    return result


def svd(choice):
    vectors = np.linalg.svd(choice.matrix, full_matrices=False)[0][:, : choice.rank]
    return with_signs(vectors, choice.old)


def momentum_iteration(choice, rho=0.908):
    """LDAdam: a power iteration with a mean of momentum and gradient, and before it an SVD."""
    if choice.old is None:
        return svd(choice)
    m_hat = choice.adam.m / (1 - choice.adam.b1**choice.adam.t)
    mean = rho * choice.old @ m_hat + (1 - rho) * choice.matrix
    return with_signs(np.linalg.qr(mean @ mean.T @ choice.old)[0], choice.old)


def strongest(directions, choice):
    """Those r of orthonormal directions that capture most; where they stand does not matter."""
    energy = np.linalg.norm(directions.T @ choice.matrix, axis=1)
    return directions[:, np.argsort(-energy)[: choice.rank]]


def largest_rows(choice):
    """Grass, without its sampling."""
    return strongest(np.eye(len(choice.matrix)), choice)


def cosines(choice):
    """DCT-AdamW: columns of the cosine transform (DCT-II)."""
    size = len(choice.matrix)
    k, i = np.meshgrid(np.arange(size), np.arange(size))
    waves = np.cos(np.pi * k * (2 * i + 1) / (2 * size))
    return strongest(waves / np.linalg.norm(waves, axis=0), choice)


def exactly(moment, kind):
    return moment


@dataclasses.dataclass(frozen=True)
class Lazy:
    """Q-GaLore: the gap doubles while subspaces stand still."""

    threshold: float = 0.4
    queue: int = 5


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
    eps: float = 1e-8
    beta: float = 1.0  # norm_scaled, sign
    gamma: float | None = 1.01  # norm_scaled, scale_gradient
    subtract: str = "whole"  # norm_scaled
    per: str = "channel"  # scale_gradient
    side: str = "short"
    lazy: Lazy | None = None
    gradients_per_step: int = 1  # the first chooses the subspace, their mean makes the step
    basis: Callable = svd  # Choice -> the new basis
    inner: Callable = Adam  # (rule, shape) -> what makes psi of R
    rounded: Callable = exactly  # (moment, kind) -> what is left of it until the next step

    def with_bases(self, bases):
        """The rule with bases that are given, (layers, refreshes, size, rank)."""
        return dataclasses.replace(self, basis=lambda choice: bases[choice.layer, choice.number])


def columns(psi, r):
    """How much longer Adam made each column."""
    return np.linalg.norm(psi, axis=0) / (np.linalg.norm(r, axis=0) + SMALL)


def norm_scaled(rule, g, up, r, psi, limiter, adam):
    """Fira: the rest of the gradient, each column scaled as Adam scaled it in the subspace."""
    if rule.subtract == "scaled":
        rest = columns(psi, r) * (g - rule.scale * up(r))
        # The published code limits before Adam's bias is corrected.
        before_bias = (1 - adam.b1**adam.t) / np.sqrt(1 - adam.b2**adam.t)
        return rule.scale * (up(psi) + rule.beta * limiter(rest, before_bias))
    rest = columns(psi, r) * (g - up(r))
    return rule.scale * (up(psi) + rule.beta * limiter(rest))


def scale_gradient(rule, g, up, r, psi, limiter, adam):
    """APOLLO: the whole gradient, scaled as Adam scaled it in the subspace."""
    if rule.per == "tensor":
        s = np.linalg.norm(psi) / (np.linalg.norm(r) + SMALL)
    else:
        s = columns(psi, r)
    return rule.scale * limiter(s * g)


def sign(rule, g, up, r, psi, limiter, adam):
    """FRUGAL: the signs of the rest of the gradient."""
    return rule.scale * (up(psi) + rule.beta * np.sign(g - up(r)))


def discard(rule, g, up, r, psi, limiter, adam):
    """GaLore; and LDAdam, which differs in its gradient alone."""
    return rule.scale * up(psi)


RESIDUALS = {
    "discard": discard,
    "error_feedback": discard,
    "norm_scaled": norm_scaled,
    "scale_gradient": scale_gradient,
    "sign": sign,
}


class Bases:
    """The bases of a matrix: of its rows, and of its columns, or all of these as they are."""

    def __init__(self, rule, shape, layer):
        self.rule, self.layer, self.number = rule, layer, 0
        self.p = np.zeros((shape[0], rule.rank))
        self.q = np.zeros((shape[1], rule.rank)) if rule.side == "both" else np.eye(shape[1])

    def down(self, g):
        return self.p.T @ g @ self.q

    def up(self, r):
        return self.p @ r @ self.q.T

    def choose(self, g, adam):
        """Chooses anew; returns by what the coordinates turn, and how alike old and new are."""

        def basis(g, old):
            before = old if self.number else None
            number, layer = self.number, self.layer
            return self.rule.basis(Choice(g, self.rule.rank, number, layer, before, adam))

        old, self.p = self.p, basis(g, self.p)
        left, right = self.p.T @ old, np.eye(len(self.q))
        chance = self.rule.rank / len(g)
        alike = (np.sum(left**2) / self.rule.rank - chance) / (1 - chance)
        if self.rule.side == "both":
            old, self.q = self.q, basis(g.T, self.q)
            right = self.q.T @ old
        self.number += 1
        return left, right, alike


def trajectory(rule, gradients, phase=0, layer=0):
    """The updates of one matrix, (steps, m, n), from its gradients, whose rows are projected."""
    shape = gradients.shape[1:]
    bases, limiter, due = Bases(rule, shape, layer), Limiter(rule.gamma), False
    adam = rule.inner(rule, bases.down(gradients[0]).shape)
    alike, times, error, updates = [], 1, 0.0, []
    for step, parts in enumerate(gradients.reshape(-1, rule.gradients_per_step, *shape)):
        g, parts = parts.mean(axis=0) + error, parts + error
        moved = 0.0  # what the first moment lost when it was taken to another subspace
        due |= step == 0 or (step - phase) % (rule.gap * times) == 0
        if due and np.any(parts[0]):  # zeros choose nothing
            held, before = adam.m, bases.up(adam.m)
            left, right, similarity = bases.choose(parts[0], adam)
            TRANSPORTS[rule.transport](adam, left, right)
            moved, due = before - bases.up(adam.m), False
            if adam.m is not held:
                adam.keep(rule.rounded)
            alike += [similarity] if bases.number > 1 else []
            if rule.lazy and len(alike) >= rule.lazy.queue:
                still = np.mean(alike[-rule.lazy.queue :]) >= rule.lazy.threshold
                times *= 2 if still else 1
        r = bases.down(g)
        psi = adam(r)
        if rule.transport == "reset":
            psi = corrected_for_reset(adam, psi)
        updates += [np.zeros(shape)] * (rule.gradients_per_step - 1)
        updates.append(RESIDUALS[rule.residual](rule, g, bases.up, r, psi, limiter, adam))
        adam.keep(rule.rounded)
        if rule.residual == "error_feedback":
            error = g - bases.up(r) + rule.b1 / (1 - rule.b1) * moved
    return np.stack(updates)


def of_matrices(rule, gradients, phases=None):
    """The updates of matrices (steps, ..., m, n), each projected on the side that the rule says."""
    m, n = gradients.shape[-2:]
    rows = {"short": m <= n, "long": m > n, "left": True, "right": False, "both": True}
    if not rows[rule.side]:
        gradients = np.swapaxes(gradients, -1, -2)
    stack = gradients.reshape(len(gradients), -1, *gradients.shape[-2:])
    phases = [0] * stack.shape[1] if phases is None else phases
    updates = [trajectory(rule, stack[:, i], phase, i) for i, phase in enumerate(phases)]
    updates = np.stack(updates, axis=1).reshape(gradients.shape)
    return updates if rows[rule.side] else np.swapaxes(updates, -1, -2)


def of_vector(rule, gradients):
    """The updates of a leaf that is not projected."""
    inner = rule.inner(rule, gradients.shape[1:])
    return np.stack([inner(g) for g in gradients])


def adafactor(gradients, factored, threshold, decay_rate=0.8, epsilon=1e-30):
    """The updates of (steps, ...) by Adafactor's second moments, of matrices by their factors."""
    rows = columns = whole = 0.0
    updates = []
    for t, g in enumerate(gradients, 1):
        decay, square = 1 - t**-decay_rate, g**2 + epsilon
        whole = decay * whole + (1 - decay) * square
        second = whole
        if factored:
            rows = decay * rows + (1 - decay) * square.mean(axis=-1, keepdims=True)
            columns = decay * columns + (1 - decay) * square.mean(axis=-2, keepdims=True)
            second = rows * columns / rows.mean(axis=-2, keepdims=True)
        u = g / np.sqrt(second)
        axes = (-2, -1) if factored else None  # those of one matrix of a stack
        rms = np.sqrt(np.mean(u**2, axis=axes, keepdims=True))
        updates.append(u if threshold is None else u / np.maximum(1, rms / threshold))
    return np.stack(updates)


def steps_of(weights, directions, learning_rate, decay=0.0):
    """The steps of decoupled decay: all of a weight decays, by the learning rate and no scale."""
    steps = []
    for t, direction in enumerate(directions):
        steps.append(-learning_rate(t) * (direction + decay * weights))
        weights = weights + steps[-1]
    return np.stack(steps)
