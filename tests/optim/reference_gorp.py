"""GORP as slowly and plainly as it can be written: one matrix at a time, float64, dense projectors, no batching.

Written from the equations (Zhao et al. 2024, GaLore, arXiv 2403.03507; the rotated moments and the exact memory are
ours) and not from ``growthring.optim``. The range finder ``"full"`` is a thin SVD; ``"warm"`` is one step of subspace
iteration, ``Q = qr(G^T (G P_old))``, rotated to the singular basis of ``G Q``. Where the real one starts at random,
the first basis is handed to :meth:`ReferenceGORP.step` as ``first``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fix_signs(basis: Tensor) -> Tensor:
    """Flip columns so that the entry of largest magnitude of each is positive."""
    fixed = basis.clone()
    for j in range(basis.shape[1]):
        if float(basis[int(basis[:, j].abs().argmax()), j]) < 0:
            fixed[:, j] = -basis[:, j]
    return fixed


def right_basis(gradient: Tensor, rank: int, old: Tensor | None, warm: bool) -> Tensor:
    """``(n, r)`` canonical basis of the dominant row space of ``gradient`` ``(m, n)``."""
    if not warm or old is None:
        return fix_signs(torch.linalg.svd(gradient, full_matrices=False)[2][:rank].T)
    q = torch.linalg.qr(gradient.T @ (gradient @ old))[0]
    inside = torch.linalg.svd(gradient @ q, full_matrices=False)[2].T
    return fix_signs(q @ inside)


def projector(basis: Tensor | None, dim: int) -> Tensor:
    """Dense ``I - S S^T``; the identity without ``S``."""
    eye = torch.eye(dim, dtype=torch.float64)
    return eye if basis is None else eye - basis.double() @ basis.double().T


class ReferenceGORP:
    """A list of matrices, all projected, with the settings of one parameter group."""

    def __init__(
        self, weights, *, lr=1e-3, rank=8, refresh=10, scale=1.0, side="auto", betas=(0.9, 0.999), eps=1e-8,
        weight_decay=0.0, rule="adam", warm=False, rotate=True, stagger=True, galore=False,
    ):  # fmt: skip
        self.weights = [w.detach().double().clone() for w in weights]
        self.lr, self.rank, self.refresh, self.scale, self.side = lr, rank, refresh, scale, side
        self.betas, self.eps, self.weight_decay, self.rule = betas, eps, weight_decay, rule
        self.warm, self.rotate, self.stagger, self.galore = warm, rotate, stagger, galore
        self.t = [0] * len(self.weights)
        self.state: list[dict[str, Tensor]] = [{} for _ in self.weights]
        self.inside: dict[int, Tensor | None] = {}
        self.outside: dict[int, Tensor | None] = {}
        self.exact = True
        self.lost = [False] * len(self.weights)

    def protect(self, spaces, *, exact=True):
        """``spaces``: index -> (columns in R^n or None, columns in R^m or None)."""
        self.inside = {i: pair[0] for i, pair in spaces.items()}
        self.outside = {i: pair[1] for i, pair in spaces.items()}
        self.exact = exact
        for i, state in enumerate(self.state):  # a basis that is not outside is found again at the next step
            for key, kept in (("in", self.inside.get(i)), ("out", self.outside.get(i))):
                if exact and kept is not None and state.get(key) is not None:
                    self.lost[i] |= bool((kept.double().T @ state[key]).norm() > 1e-5)

    def side_of(self, i: int) -> str:
        m, n = self.weights[i].shape
        return self.side if self.side != "auto" else ("right" if m >= n else "left")

    # --- one step ---------------------------------------------------------------------------------------------------

    def step(self, gradients, first=None):
        for i, gradient in enumerate(gradients):
            self.step_one(i, gradient.detach().double(), None if first is None else first[i])

    def step_one(self, i, gradient, first):
        w, state, side = self.weights[i], self.state[i], self.side_of(i)
        m, n = w.shape
        keep_in = projector(self.inside.get(i), n)
        keep_out = projector(self.outside.get(i), m)
        if self.exact:
            gradient = keep_out @ gradient @ keep_in
        offset = i if self.stagger else 0
        if "m" not in state or self.lost[i] or (self.t[i] + offset) % self.refresh == 0:
            self.lost[i] = False
            self.find(state, side, gradient, first)
        p_in, p_out = state.get("in"), state.get("out")
        low = gradient
        low = low if p_out is None else p_out.T @ low
        low = low if p_in is None else low @ p_in
        if not self.exact:  # the published order: one sweep of the coordinates, nothing after the rule
            low = self.sweep(low, p_in, p_out, keep_in, keep_out)
        self.t[i] += 1
        normed = self.inner(state, low, self.t[i], rank_axis=0 if side == "left" else 1)
        if self.exact and p_out is None:
            normed = keep_out @ normed
        if self.exact and p_in is None:
            normed = normed @ keep_in
        update = normed
        update = update if p_out is None else p_out @ update
        update = update if p_in is None else update @ p_in.T
        decayed = keep_out @ w @ keep_in if self.exact else w
        if self.galore:
            w = w - self.lr * self.scale * update
            self.weights[i] = w - self.lr * self.weight_decay * w
        else:
            self.weights[i] = w - self.lr * self.weight_decay * decayed - self.lr * self.scale * update

    def sweep(self, low, p_in, p_out, keep_in, keep_out):
        """Lift the coordinates, project, and go back: ``P_out^T Pi_out (P_out L P_in^T) Pi_in P_in``."""
        lifted = low
        lifted = lifted if p_out is None else p_out @ lifted
        lifted = lifted if p_in is None else lifted @ p_in.T
        lifted = keep_out @ lifted @ keep_in
        lifted = lifted if p_out is None else p_out.T @ lifted
        return lifted if p_in is None else lifted @ p_in

    # --- the basis --------------------------------------------------------------------------------------------------

    def find(self, state, side, gradient, first):
        old_in, old_out = state.get("in"), state.get("out")
        new_in = new_out = None
        if side in ("right", "two-sided"):
            new_in = right_basis(gradient, self.rank, old_in, self.warm)
            if first is not None and "m" not in state:
                new_in = first[0].double()
        if side == "left":
            new_out = right_basis(gradient.T, self.rank, old_out, self.warm)
        elif side == "two-sided":  # of what the input basis sees, which is small: always a thin SVD
            new_out = right_basis((gradient @ new_in).T, self.rank, None, warm=False)
        if side == "left" and first is not None and "m" not in state:
            new_out = first[1].double()
        if "m" in state and self.rotate:
            self.turn(
                state,
                None if new_out is None else old_out.T @ new_out,
                None if new_in is None else old_in.T @ new_in,
            )
        state["in"], state["out"] = new_in, new_out

    def turn(self, state, r_out, r_in):
        """``m <- R_out^T m R_in``; ``v`` by squared cosines, what the old basis lacks filled by the mean."""
        if r_in is not None:
            state["m"] = state["m"] @ r_in
            for key in ("v", "v_col"):
                if key in state:
                    state[key] = mix_columns(state[key], r_in)
        if r_out is not None:
            state["m"] = r_out.T @ state["m"]
            for key in ("v", "v_row"):
                if key in state:
                    state[key] = mix_columns(state[key].T, r_out).T

    # --- the inner rule ---------------------------------------------------------------------------------------------

    def inner(self, state, low, t, rank_axis):
        b1, b2 = self.betas
        if self.rule == "momentum":
            state["m"] = low if "m" not in state else b1 * state["m"] + low
            return state["m"]
        state["m"] = b1 * state.get("m", torch.zeros_like(low)) + (1 - b1) * low
        square = low * low
        if self.rule == "adafactor":
            row = square.mean(dim=1, keepdim=True)
            col = square.mean(dim=0, keepdim=True)
            state["v_row"] = b2 * state.get("v_row", torch.zeros_like(row)) + (1 - b2) * row
            state["v_col"] = b2 * state.get("v_col", torch.zeros_like(col)) + (1 - b2) * col
            # the two means are one number until the basis turns; from then on that of the directions counts, so that
            # the other axis keeps its own means
            v = state["v_row"] * state["v_col"] / state["v_row" if rank_axis == 0 else "v_col"].mean()
        else:
            if self.rule == "shared":
                square = square.mean(dim=1 - rank_axis, keepdim=True)
            state["v"] = b2 * state.get("v", torch.zeros_like(square)) + (1 - b2) * square
            v = state["v"]
        if self.galore:
            return state["m"] / (v.sqrt() + self.eps) * (1 - b2**t) ** 0.5 / (1 - b1**t)
        return (state["m"] / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + self.eps)


def mix_columns(v: Tensor, r: Tensor) -> Tensor:
    """``v (R*R) + mean_cols(v) (1 - colsum(R*R))`` for ``v`` ``(k, r)``."""
    squares = r * r
    return v @ squares + v.mean(dim=1, keepdim=True) * (1 - squares.sum(dim=0, keepdim=True))
