"""Lower bounds by semidefinite relaxation, valid at every step of their computation.

In spins, with s_0 = 1, the energy of a subproblem is <C, Y> for Y = s s^T. The relaxation keeps
diag(Y) = 1, Y positive semidefinite, Y a = 0 for each equality row a.s = 0 (all products of the
row with a variable), g.Y_0 >= 0 for inequality rows, and triangle inequalities. Where only one
of x_j and x_k may be 1, (1 + s_j) (1 + s_k) = 0: the triangle 1 + Y_0j + Y_0k + Y_jk >= 0 is an
equation, its multiplier has any sign, and the other triangles through j and k become the products
of x_j + x_k <= 1 with every variable and its complement. The rows
Y a = 0 are eliminated: Y = V Y' V^T with V an orthonormal basis of the rows' complement, applied
as Householder reflections. The Lagrangian dual in y (diagonal), z >= 0 (triangles) and mu >= 0
(inequality rows) is

    sum(y) - sum(z) + min { <Z, Y> : Y psd, trace Y = N },   Z = C - Diag(y) - B*(z) - G*(mu)

whose last term is N min(0, smallest eigenvalue of V^T Z V): a true bound for any y and z, mu >= 0.
It is maximised by the proximal method (J. Malick, J. Povh, F. Rendl, A. Wiegele, "Regularization
methods for semidefinite programming", SIAM J. Optim. 20, 2009): the trace gives way to
sigma / 2 ||Y - centre||^2, which makes the dual smooth; a projected limited-memory BFGS method
climbs it for a few steps; Y becomes the next centre, and violated triangles are added. Bounds from
such a relaxation inside branch and bound for this kind of problem: J. Malick, F. Roupin, "Solving
k-cluster problems to optimality with semidefinite programming", Math. Programming B 136, 2012.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from isingcut.ising.solvers.branching.dual import (
    evaluate,
    exact_bound,
    reflect,
    reflections,
    slack_matrix,
    triangle,
)

MEMORY = 12


@njit(cache=True, nogil=True)
def _dot(a, b):  # type: ignore[no-untyped-def]
    """a.b, summed in order."""
    total = 0.0
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(cache=True, nogil=True)
def _ascend(  # type: ignore[no-untyped-def]
    C, vectors, ineq, x, cuts, kinds, ncuts, equal, sigma, centre, X, iterations, stop
):
    """Projected L-BFGS on the augmented dual; returns the number of evaluations."""
    signed = C.shape[0] + equal
    size = C.shape[0]
    d = x.shape[0]
    g = np.zeros(d)
    gn = np.zeros(d)
    xn = np.zeros(d)
    step = np.zeros(d)
    S = np.zeros((MEMORY, d))
    Y = np.zeros((MEMORY, d))
    rho = np.zeros(MEMORY)
    a = np.zeros(MEMORY)
    stored = 0
    f = evaluate(C, vectors, ineq, x, cuts, kinds, ncuts, sigma, centre, X, g)
    evaluations = 1
    for _ in range(iterations):
        if stop[0]:
            break
        for i in range(d):
            blocked = i >= signed and x[i] <= 0.0 and g[i] > 0.0
            step[i] = 0.0 if blocked else -g[i]
        used = min(stored, MEMORY)
        for q in range(used):
            p = (stored - 1 - q) % MEMORY
            a[p] = rho[p] * _dot(S[p], step)
            step -= a[p] * Y[p]
        if used:
            p = (stored - 1) % MEMORY
            step *= 1.0 / (rho[p] * _dot(Y[p], Y[p]))
        else:
            step *= min(1.0, 0.1 * size * sigma / np.sqrt(_dot(step, step) + 1e-300))
        for q in range(used - 1, -1, -1):
            p = (stored - 1 - q) % MEMORY
            beta = a[p] - rho[p] * _dot(Y[p], step)
            step += beta * S[p]
        for i in range(signed, d):
            if x[i] <= 0.0 and g[i] > 0.0:
                step[i] = 0.0
        if _dot(g, step) >= 0.0:
            if stored == 0:
                break
            stored = 0
            continue
        t = 1.0
        accepted = False
        for _trial in range(8):
            xn[:] = x + t * step
            xn[signed:] = np.maximum(xn[signed:], 0.0)
            fn = evaluate(C, vectors, ineq, xn, cuts, kinds, ncuts, sigma, centre, X, gn)
            evaluations += 1
            if fn <= f + 1e-4 * _dot(g, xn - x):
                accepted = True
                break
            t *= 0.4
        if not accepted:
            if stored == 0:
                break
            stored = 0
            continue
        p = stored % MEMORY
        S[p] = xn - x
        Y[p] = gn - g
        sy = _dot(S[p], Y[p])
        if sy > 1e-12 * _dot(Y[p], Y[p]):
            rho[p] = 1.0 / sy
            stored += 1
        x[:] = xn
        g[:] = gn
        f = fn
    return evaluations


@njit(cache=True, nogil=True)
def _separate(X, seen, cuts, kinds, ncuts, room):  # type: ignore[no-untyped-def]
    """Append up to ``room`` of the most violated triangles; returns the new number of cuts."""
    size = X.shape[0]
    bins = np.zeros(64, dtype=np.int64)
    for i in range(size):
        for j in range(i + 1, size):
            for k in range(j + 1, size):
                for kind in range(4):
                    v = -1.0 - triangle(X, i, j, k, kind)
                    if v > 0.01 and not (seen[i, j, k] >> kind) & 1:
                        bins[min(int(v * 40.0), 63)] += 1
    cut_off = 63
    total = bins[63]
    while cut_off > 0 and total + bins[cut_off - 1] <= room:
        cut_off -= 1
        total += bins[cut_off]
    least = max(cut_off / 40.0, 0.01)
    for i in range(size):
        for j in range(i + 1, size):
            for k in range(j + 1, size):
                for kind in range(4):
                    v = -1.0 - triangle(X, i, j, k, kind)
                    if v > least and not (seen[i, j, k] >> kind) & 1:
                        if ncuts >= cuts.shape[0] or room == 0:
                            return ncuts
                        cuts[ncuts, 0] = i
                        cuts[ncuts, 1] = j
                        cuts[ncuts, 2] = k
                        kinds[ncuts] = kind
                        seen[i, j, k] |= 1 << kind
                        ncuts += 1
                        room -= 1
    return ncuts


@njit(cache=True, nogil=True)
def sdp_bound(  # type: ignore[no-untyped-def]
    C,
    rows,
    ineq,
    y,
    z,
    mu,
    cuts,
    kinds,
    ncuts,
    equal,
    threshold,
    stop,
    seen,
    centre,
    rounds,
    iterations,
    per_round,
    sigma,
    give_up,
):
    """The dual bound of one node, improved in place until it reaches the threshold or stalls.

    Args (arrays are updated in place):
        C: (N, N) with the energy <C, s s^T>; rows (R, N): a.s = 0; ineq (G, N): g.s >= 0.
        y: (N,), z: (capacity,), mu: (G,): multipliers; cuts (capacity, 3), kinds (capacity,),
            the first ``equal`` of them equations.
        threshold: (1,) read at every step: the bound is not needed beyond it.
        seen: (N, N, N) uint8 scratch, zero on entry and on exit.
        centre: (N, N): the proximal centre; in the end the primal matrix of the last step.
        sigma: weight of the proximal term.
        give_up: stop when a round gains less than this share of the remaining distance.

    Returns:
        (bound, number of cuts, evaluations)
    """
    size = C.shape[0]
    G = ineq.shape[0]
    X = np.zeros((size, size))
    vectors = reflections(rows)
    for t in range(ncuts):
        seen[cuts[t, 0], cuts[t, 1], cuts[t, 2]] |= 1 << kinds[t]
    best = -np.inf
    evaluations = 0
    for turn in range(rounds):
        d = size + ncuts + G
        x = np.zeros(d)
        x[:size] = y
        x[size : size + ncuts] = z[:ncuts]
        x[size + ncuts :] = mu
        evaluations += _ascend(
            C, vectors, ineq, x, cuts, kinds, ncuts, equal, sigma, centre, X, iterations, stop
        )
        centre[:, :] = X
        bound = exact_bound(C, vectors, ineq, x, cuts, kinds, ncuts)
        gain = bound - best
        if bound > best:
            best = bound
        reached = best >= threshold[0] or stop[0] != 0
        y[:] = x[:size]
        z[:ncuts] = x[size : size + ncuts]
        mu[:] = x[size + ncuts :]
        if reached:
            break
        if turn + 1 == rounds:
            break
        if turn >= 2 and gain < give_up * (threshold[0] - best):
            break
        kept = 0
        for t in range(ncuts):
            if z[t] > 0.0 or t < equal:
                cuts[kept] = cuts[t]
                kinds[kept] = kinds[t]
                z[kept] = z[t]
                kept += 1
            else:
                seen[cuts[t, 0], cuts[t, 1], cuts[t, 2]] &= ~(1 << kinds[t])
        added = _separate(X, seen, cuts, kinds, kept, per_round)
        z[kept:added] = 0.0
        if added == kept:
            ncuts = kept
            break
        ncuts = added
    for t in range(ncuts):
        seen[cuts[t, 0], cuts[t, 1], cuts[t, 2]] = 0
    return best, ncuts, evaluations


@njit(cache=True, nogil=True)
def split_bounds(C, rows, ineq, y, z, mu, cuts, kinds, ncuts, out):  # type: ignore[no-untyped-def]
    """Lower bounds out (2, N) for s_i = -1 and s_i = +1 at the given multipliers.

    On binary s the energy is at least s^T Z s + sum(y) - sum(z). With Z + delta I positive
    definite on the rows' complement, its minimum over real s with s_0 = 1 and s_i fixed is a
    Schur complement of the inverse, for all i at once after one eigenvalue decomposition; delta
    costs delta N. Several delta are tried, every one is valid.
    """
    size = C.shape[0]
    R = rows.shape[0]
    vectors = reflections(rows)
    x = np.concatenate((y, z[:ncuts], mu))
    Z = slack_matrix(C, ineq, x, cuts, kinds, ncuts)
    reflect(Z, vectors)
    lam, U = np.linalg.eigh(Z[R:, R:].copy())
    W = np.zeros((size, size - R))
    W[R:, :] = U
    for r in range(R - 1, -1, -1):
        u = vectors[r]
        p = W.T @ u
        for i in range(size):
            for q in range(size - R):
                W[i, q] -= 2.0 * u[i] * p[q]
    base = 0.0
    for i in range(size):
        base += y[i]
    for t in range(ncuts):
        base -= z[t]
    out[:, :] = -np.inf
    spread = max(abs(lam[0]), 1e-9)
    for power in range(5):
        delta = max(0.0, -lam[0]) + spread * 4.0 ** (power - 2)
        a = 0.0
        for q in range(size - R):
            a += W[0, q] * W[0, q] / (lam[q] + delta)
        for i in range(1, size):
            b = 0.0
            c = 0.0
            for q in range(size - R):
                weight = W[i, q] / (lam[q] + delta)
                b += W[0, q] * weight
                c += W[i, q] * weight
            det = a * c - b * b
            if det <= 1e-12 * a * c:
                continue
            for side in range(2):
                sign = 2.0 * side - 1.0
                value = base - delta * size + (c - 2.0 * sign * b + a) / det
                out[side, i] = max(out[side, i], value)
