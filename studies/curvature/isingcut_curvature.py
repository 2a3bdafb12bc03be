"""Energies `hessian` and `gauss-newton`, from exact second derivatives; an example of a plug-in.

    pip install ./studies/curvature

    hessian       E(x) = -g.x + x^T H x / 2      second-order expansion of the mean token NLL
    gauss-newton  E(x) = x^T F x / 2             the same of KL(original || gated), whose g is 0

with the derivatives at the original model, in gates shared by all tokens. Removing blocks is the
step alpha - 1 = -x, so large that the expansion is only a rough approximation.

The loss L is a function of the hidden states z after the last block, and z is a function of the
gates. With lambda = dL/dz, and J = dz/dalpha the derivative with respect to the gates,

    Hessian       d2(lambda.z) (lambda constant)  +  J^T L''(z) J
    Gauss-Newton                                     J^T C(z) J

where C is the curvature of the cross-entropy with respect to the logits, diag(p) - p p^T,
transformed to z: J^T C J is the exact Hessian at the original model of KL(original || gated). With
w = J^T lambda from a backward pass that is itself differentiated, one more backward pass of w_i
gives both row i of the first term (dw_i/dalpha) and the tangent J_i (dw_i/dlambda). The head
computes one sample at a time, so that the logits of a batch and their tangents never exist at once.

Samples are independent and each has its own gates, so that each pass computes the whole batch,
and errors over samples need no extra computation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from isingcut.console.progress import Bar
from isingcut.data.tokens import TokenSet
from isingcut.energies.base import Price, describe_energy, quadratic
from isingcut.errors import ArchitectureError
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Floats
from isingcut.measure.gates import run_gated
from isingcut.measure.gradients import measure_batches
from isingcut.measure.splitting import split_to_fit
from isingcut.measure.work import PLAIN, Work
from isingcut.models.compute.divergence import widen
from isingcut.models.compute.head import OutputHead, loss_gradient
from isingcut.models.replay import Recording, Replay

_ADVICE = "use the energy 'fisher', which needs first derivatives, or 'pairwise', which needs none"


@dataclass(frozen=True)
class Hessian:
    """The exact second-order energy of the NLL, in nats per token.

    Attributes:
        gate: ``"sublayer"`` or ``"block"``.
    """

    default_samples: ClassVar[int] = 16
    streams: ClassVar[bool] = False
    kind: ClassVar[str] = "hessian"
    loss: ClassVar[str] = "mean token NLL"

    gate: str = "sublayer"

    def measure(self, replay: Replay, tokens: TokenSet, work: Work) -> Hamiltonian:
        """Compute the derivatives and form the energy.

        Returns:
            Hamiltonian; unit ``"nats/token"``, with standard errors over samples.
        """
        gradient, curvature = gate_curvature(
            replay, tokens, self.kind, work, gate=self.gate
        )
        meta = describe_energy(self.kind, self.loss, tokens, gate=self.gate)
        return quadratic(
            gradient * (self.kind == "hessian"), curvature, tokens.counts, meta
        )

    def price(self, n: int, sizes: Sequence[int]) -> Price:
        """Return what the energy of ``n`` blocks computes, for `isingcut plan`."""
        passes = 2.0 * n if self.kind == "hessian" else 1.0 * n
        return Price(passes, passes, gradients=True)


@dataclass(frozen=True)
class GaussNewton(Hessian):
    """The exact second-order energy of the KL, which `fisher` estimates from sampled labels."""

    kind: ClassVar[str] = "gauss-newton"
    loss: ClassVar[str] = "KL(original || gated)"


def gate_curvature(
    replay: Replay,
    tokens: TokenSet,
    kind: str,
    work: Work = PLAIN,
    *,
    gate: str = "sublayer",
) -> tuple[Floats, Floats]:
    """Compute exact curvatures with respect to the gates, by double backward in the model's dtype.

    During the call, attention uses PyTorch's "math" backend, which can be differentiated twice.

    Args:
        replay: the model's blocks; parameters must not require gradients.
        tokens: m samples.
        kind: ``"hessian"`` (of the NLL) or ``"gauss-newton"`` (of the KL to the original).
        gate: ``"sublayer"`` or ``"block"``.

    Returns:
        (m, N) gradient of the NLL summed over each sample's tokens, nats, and (m, N, N) second
        derivatives, summed in the same way; symmetric up to rounding.

    Raises:
        ArchitectureError: the model is streamed, or part of it cannot be differentiated twice.

    Complexity: N double backward passes through the blocks (about 1.7 N forward passes for the
    Hessian, 0.6 N for Gauss-Newton) and N through the head, about 2 to 3 of its forward passes
    each; memory for the graph of one micro-batch, and for N times its hidden states.

    Source: Pearlmutter, Fast exact multiplication by the Hessian (1994), in reverse mode only;
    Schraudolph, Fast curvature matrix-vector products (2002), for Gauss-Newton.
    """

    def found(mine: Sequence[TokenSet], bar: Bar) -> Iterator[Floats]:
        head = OutputHead(replay)

        def compute(some: Sequence[TokenSet]) -> list[Floats]:
            return [_batch_curvature(replay, head, batch, kind, gate) for batch in some]

        for batch in mine:
            yield from split_to_fit(
                replay.limit, [batch], compute, lambda a, b: np.concatenate([a, b])
            )
            bar.advance(1)

    words = f"{kind} of {tokens.samples} samples"
    rows = measure_batches(
        replay, tokens, work, words, found, curvature=kind, gate=gate
    )
    rows *= tokens.counts[:, None, None]
    return rows[:, 0], rows[:, 1:]


def _batch_curvature(
    replay: Replay, head: OutputHead, batch: TokenSet, kind: str, gate: str
) -> Floats:
    """Compute (B, 1 + N, N): gradient, then curvature, of each sample's mean token loss."""
    with torch.no_grad():
        recording = replay.record(batch.input_ids)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            gradient, own, tangents, stream = _through_blocks(
                replay, head, recording, batch, kind, gate
            )
            curvature = own + torch.stack(
                [
                    _through_head(recording, batch, s, stream[s], tangents[:, s], kind)
                    for s in range(batch.samples)
                ]
            )
    except RuntimeError as e:
        if "differentiate" not in str(e) and "derivative" not in str(e):
            raise
        reason = str(e).splitlines()[0]
        raise ArchitectureError(
            f"part of this model cannot be differentiated twice ({reason}); " + _ADVICE
        ) from e
    joined = torch.cat([gradient[:, None], curvature], dim=1)
    return np.asarray(joined.double().cpu().numpy())


def _through_blocks(
    replay: Replay,
    head: OutputHead,
    recording: Recording,
    batch: TokenSet,
    kind: str,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the contribution of the blocks.

    Returns:
        gradient (B, N), the first term of the curvature (B, N, N), tangents (N, B, T, D) of the
        final hidden states with respect to each gate, and these hidden states (B, T, D).
    """
    alphas = [
        torch.ones(batch.samples, device=replay.device, requires_grad=True)
        for _ in range(len(replay))
    ]
    hidden = recording.entered
    for i, alpha in enumerate(alphas):
        hidden = run_gated(recording, i, hidden, alpha, gate)
    stream = hidden.detach()
    toward = loss_gradient(recording, batch, stream, None, head).requires_grad_(True)
    first = torch.autograd.grad(hidden, alphas, toward, create_graph=True)
    wanted = [toward, *alphas] if kind == "hessian" else [toward]
    own = []
    tangents = []
    for row in first:
        tangent, *second = torch.autograd.grad(
            row.sum(),
            wanted,
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        tangents.append(tangent)
        own.append(_stack(second or map(torch.zeros_like, first), stream))
    gradient = _stack(first, stream).detach()
    along = torch.stack(tangents)
    _check_linear(gradient, along, toward.detach())
    return gradient, torch.stack(own, 1).detach(), along, stream


def _stack(columns: Iterable[Tensor], like: Tensor) -> Tensor:
    return torch.stack([column.to(like.device) for column in columns], 1)


def _check_linear(gradient: Tensor, tangents: Tensor, toward: Tensor) -> None:
    """Raise an error if tangents are incomplete: w = J^T lambda is linear, so w_i = lambda.J_i.

    A custom kernel whose backward pass builds no graph is otherwise left out without an error.
    """
    again = (widen(tangents) * widen(toward)).flatten(2).sum(2).T
    tolerance = 0.2 if toward.element_size() < 4 else 0.01
    off = (again - gradient).norm()
    size = gradient.norm()
    if off > tolerance * size:
        raise ArchitectureError(
            "part of this model cannot be differentiated twice "
            f"(tangents off by {off / size:.0%}); " + _ADVICE
        )


def _through_head(
    recording: Recording,
    batch: TokenSet,
    sample: int,
    stream: Tensor,
    tangents: Tensor,
    kind: str,
) -> Tensor:
    """Compute J^T L''(z) J, or J^T C(z) J, of one sample: (N, N) from its tangents (N, T, D)."""
    leaf = stream.clone().requires_grad_(True)
    logits = recording.logits(leaf, sample)
    positions = batch.predicted[sample].to(logits.device).nonzero()[:, 0]
    labels = batch.input_ids[sample, 1:].to(logits.device)[positions]
    if kind == "hessian":
        logp = torch.log_softmax(widen(logits[positions]), dim=-1)
        loss = -logp.gather(1, labels[:, None]).mean()
        (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    else:
        p = torch.softmax(widen(logits.detach()[positions]), dim=-1)
        dual = torch.zeros_like(logits, requires_grad=True)
        # `slope` is linear in `dual`; d slope / d dual is the forward derivative of the head.
        (slope,) = torch.autograd.grad(logits, leaf, dual, create_graph=True)
    rows = []
    for tangent in tangents:
        if kind == "hessian":
            (bent,) = torch.autograd.grad(slope, leaf, tangent, retain_graph=True)
        else:
            (moved,) = torch.autograd.grad(slope, dual, tangent, retain_graph=True)
            step = widen(moved[positions])
            pushed = torch.zeros_like(logits)
            change = p * (step - (p * step).sum(-1, keepdim=True)) / len(positions)
            pushed[positions] = change.to(pushed.dtype)
            (bent,) = torch.autograd.grad(logits, leaf, pushed, retain_graph=True)
        rows.append(widen(tangents).flatten(1) @ widen(bent).flatten())
    return torch.stack(rows)
