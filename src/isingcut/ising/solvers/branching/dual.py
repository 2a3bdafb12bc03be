"""The Lagrangian dual of the semidefinite relaxation: its value, gradient and true bound.

Compiled pieces of `sdp`, whose docstring gives the mathematics.
"""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True, nogil=True)
def reflections(rows):  # type: ignore[no-untyped-def]
    """Unit Householder vectors (R, N) that map the span of the rows onto the first R axes."""
    count, size = rows.shape
    work = rows.copy()
    vectors = np.zeros((count, size))
    for r in range(count):
        norm = 0.0
        for i in range(r, size):
            norm += work[r, i] * work[r, i]
        norm = np.sqrt(norm)
        sign = 1.0 if work[r, r] >= 0.0 else -1.0
        for i in range(r, size):
            vectors[r, i] = work[r, i]
        vectors[r, r] += sign * norm
        length = 0.0
        for i in range(r, size):
            length += vectors[r, i] * vectors[r, i]
        length = np.sqrt(length)
        for i in range(r, size):
            vectors[r, i] /= length
        for q in range(r, count):
            dot = 0.0
            for i in range(r, size):
                dot += vectors[r, i] * work[q, i]
            for i in range(r, size):
                work[q, i] -= 2.0 * dot * vectors[r, i]
    return vectors


@njit(cache=True, nogil=True)
def slack_matrix(C, ineq, x, cuts, kinds, ncuts):  # type: ignore[no-untyped-def]
    """Z = C - Diag(y) - B*(z) - G*(mu) for x = (y, z, mu)."""
    size = C.shape[0]
    Z = C.copy()
    for i in range(size):
        Z[i, i] -= x[i]
    for t in range(ncuts):
        half = 0.5 * x[size + t]
        if half == 0.0:
            continue
        i, j, k = cuts[t, 0], cuts[t, 1], cuts[t, 2]
        kind = kinds[t]
        a = half if kind <= 1 else -half
        b = half if kind == 0 or kind == 2 else -half
        c = half if kind == 0 or kind == 3 else -half
        Z[i, j] -= a
        Z[j, i] -= a
        Z[i, k] -= b
        Z[k, i] -= b
        Z[j, k] -= c
        Z[k, j] -= c
    for q in range(ineq.shape[0]):
        half = 0.5 * x[size + ncuts + q]
        for j in range(size):
            Z[0, j] -= half * ineq[q, j]
            Z[j, 0] -= half * ineq[q, j]
    return Z


@njit(cache=True, nogil=True)
def reflect(Z, vectors):  # type: ignore[no-untyped-def]
    """H Z H for every reflection, in place."""
    size = Z.shape[0]
    for r in range(vectors.shape[0]):
        u = vectors[r]
        p = Z @ u
        k = 2.0 * (u @ p)
        for i in range(size):
            p[i] = 2.0 * p[i] - k * u[i]
        for i in range(size):
            for j in range(size):
                Z[i, j] -= u[i] * p[j] + p[i] * u[j]


@njit(cache=True, nogil=True)
def triangle(X, i, j, k, kind):  # type: ignore[no-untyped-def]
    """The signed sum of three entries that a triangle inequality keeps at -1 or above."""
    value = X[i, j] if kind <= 1 else -X[i, j]
    value += X[i, k] if kind == 0 or kind == 2 else -X[i, k]
    value += X[j, k] if kind == 0 or kind == 3 else -X[j, k]
    return value


@njit(cache=True, nogil=True)
def evaluate(  # type: ignore[no-untyped-def]
    C, vectors, ineq, x, cuts, kinds, ncuts, sigma, centre, X, g
):
    """Minus the augmented dual function with its gradient g; fills X."""
    size = C.shape[0]
    R = vectors.shape[0]
    Z = slack_matrix(C, ineq, x, cuts, kinds, ncuts)
    for i in range(size):
        for j in range(size):
            Z[i, j] -= sigma * centre[i, j]
    reflect(Z, vectors)
    lam, U = np.linalg.eigh(Z[R:, R:].copy())
    negative = 0
    norm = 0.0
    while negative < lam.shape[0] and lam[negative] < 0.0:
        norm += lam[negative] * lam[negative]
        negative += 1
    W = np.zeros((size, negative))
    for q in range(negative):
        root = np.sqrt(-lam[q] / sigma)
        for i in range(R, size):
            W[i, q] = U[i - R, q] * root
    for r in range(R - 1, -1, -1):
        u = vectors[r]
        for q in range(negative):
            dot = 0.0
            for i in range(r, size):
                dot += u[i] * W[i, q]
            for i in range(r, size):
                W[i, q] -= 2.0 * dot * u[i]
    X[:, :] = W @ W.T
    total = 0.0
    for i in range(size):
        total += x[i]
        g[i] = X[i, i] - 1.0
    for t in range(ncuts):
        total -= x[size + t]
        g[size + t] = 1.0 + triangle(X, cuts[t, 0], cuts[t, 1], cuts[t, 2], kinds[t])
    for q in range(ineq.shape[0]):
        value = 0.0
        for j in range(size):
            value += ineq[q, j] * X[0, j]
        g[size + ncuts + q] = value
    return norm / (2.0 * sigma) - total


@njit(cache=True, nogil=True)
def exact_bound(C, vectors, ineq, x, cuts, kinds, ncuts):  # type: ignore[no-untyped-def]
    """The true bound at x."""
    size = C.shape[0]
    R = vectors.shape[0]
    Z = slack_matrix(C, ineq, x, cuts, kinds, ncuts)
    reflect(Z, vectors)
    lam = np.linalg.eigvalsh(Z[R:, R:].copy())
    total = size * min(0.0, lam[0])
    for i in range(size):
        total += x[i]
    for t in range(ncuts):
        total -= x[size + t]
    return total
