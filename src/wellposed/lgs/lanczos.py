r"""Lanczos: functions of a large symmetric operator applied to a vector, from products with that vector's Krylov space.

``m`` products with A, started at z, give an orthonormal basis V of span{z, Az, ..., A^(m-1) z} and the small matrix
H = V^T A V. Then ``f(A) z ~ ||z|| V f(H) e_1``: a polynomial of degree m - 1 in A that interpolates f at the
eigenvalues of H (the Ritz values), exact once the Krylov space is invariant. For f = sqrt the error falls like rho^-m
with rho = (sqrt k + 1) / (sqrt k - 1) for condition number k, that is 3^-m at k = 4.

Every sample of the batch has an operator and a basis of its own; one call of the product serves the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Krylov", "krylov_function", "lanczos", "small_matrix_function"]

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Krylov:
    """What ``lanczos`` found: ``A V_m = V_(m+1) H`` for every sample, with orthonormal rows in ``vectors``.

    Attributes:
        vectors: V, one basis vector a row; the last is the direction that the next product would take. Rows after a
            sample's breakdown are zero.
        hessenberg: H, float64 on the CPU. For a symmetric operator it is tridiagonal up to rounding.
        norm: ||z||, so that ``vectors[:, 0] * norm`` is z.
        steps: how many products count for each sample; fewer than m where ``converged`` said so.
        failed: samples that met a NaN or inf in a product, on the CPU. Their H is zero, so that f(H) is f(0) times the
            identity.
        shape: of one batch of vectors outside.
    """

    vectors: Float[Tensor, "batch basis dim"]
    hessenberg: Float[Tensor, "batch basis steps"]
    norm: Float[Tensor, " batch"]
    steps: Int[Tensor, " batch"]
    failed: Bool[Tensor, " batch"]
    shape: torch.Size

    def projection(self) -> Float[Tensor, "batch steps steps"]:
        """(H + H^T) / 2 = V^T sym(A) V, each sample's cut to its own ``steps`` (the rest is zero and decoupled)."""
        square = self.hessenberg[:, :-1]
        index = torch.arange(square.shape[-1])
        inside = index < self.steps[:, None]
        return torch.where(inside[:, :, None] & inside[:, None, :], (square + square.mT) / 2, 0.0)

    def residual(self) -> Float[Tensor, " batch"]:
        """Norm of what the last counted product left outside the basis; 0 where the Krylov space is invariant."""
        return self.hessenberg[torch.arange(len(self.steps)), self.steps, self.steps - 1]


def lanczos(
    product: Product,
    z: Float[Tensor, "batch *shape"],
    num_steps: int,
    *,
    converged: Callable[[Krylov], Bool[Tensor, " batch"]] | None = None,
    breakdown: float = 1e-6,
) -> Krylov:
    r"""Krylov basis and projection of an operator, started at ``z``.

    Gram-Schmidt runs twice against the whole basis, and all of H is kept (Arnoldi): at m <= 8 this costs nothing beside
    a network's product, and the symmetric part of H is that of ``sym(A)`` also where a trained network's Jacobian is
    not symmetric. A residual of at most ``breakdown`` times the image's norm means that the space is invariant for that
    sample: it is dropped, H decouples and f(A) z is exact.

    Args:
        product: v -> A v, for a whole batch in z's shape; called with at least float32.
        z: start vectors.
        num_steps: m >= 1, the most products to take.
        converged: asked after each product but the last; samples for which it is true take no part in further ones.
        breakdown: relative size of a residual that counts as zero. It is measured against ||A v||, not against the
            Rayleigh quotient, which can vanish where A has negative eigenvalues.

    Raises:
        ValueError: if ``num_steps`` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}; without a product there is only f(0) z")
    batch = len(z)
    start = z.flatten(1).to(torch.promote_types(z.dtype, torch.float32))
    norm = start.norm(dim=1)
    vectors = start.new_zeros(batch, num_steps + 1, start.shape[1])
    vectors[:, 0] = start / torch.where(norm > 0, norm, 1)[:, None]
    hessenberg = start.new_zeros(batch, num_steps + 1, num_steps)
    failed = torch.zeros(batch, dtype=torch.bool, device=z.device)
    steps = torch.zeros(batch, dtype=torch.long)
    active = torch.ones(batch, dtype=torch.bool)

    def so_far(taken: int) -> Krylov:
        small = hessenberg[:, : taken + 1, :taken]
        # One transfer for both: on an accelerator every one waits for the products before it.
        packed = torch.cat([small.flatten(1), failed[:, None].to(small.dtype)], dim=1).cpu()
        lost = packed[:, -1] > 0
        return Krylov(
            vectors=vectors[:, : taken + 1],
            hessenberg=torch.where(lost[:, None, None], 0, packed[:, :-1].reshape(small.shape)).double(),
            norm=norm,
            steps=steps,
            failed=lost,
            shape=z.shape,
        )

    for step in range(num_steps):
        image = product(vectors[:, step].reshape(z.shape)).flatten(1).to(start.dtype)
        size = image.norm(dim=1)
        # Also entries that are finite but whose squares overflow: H could not be diagonalised.
        failed = failed | ~size.isfinite()
        image = torch.where(failed[:, None], 0, image)
        basis = vectors[:, : step + 1]
        for _ in range(2):
            overlap = torch.einsum("bkd,bd->bk", basis, image)
            image = image - torch.einsum("bk,bkd->bd", overlap, basis)
            hessenberg[:, : step + 1, step] += overlap
        residual = image.norm(dim=1)
        alive = residual > breakdown * size
        hessenberg[:, step + 1, step] = torch.where(alive, residual, 0)
        vectors[:, step + 1] = torch.where(alive[:, None], image / torch.where(alive, residual, 1)[:, None], 0)
        steps = steps + active
        if converged is not None and step + 1 < num_steps:
            active = active & ~converged(so_far(step + 1))
            if not bool(active.any()):
                return so_far(step + 1)
    return so_far(num_steps)


def small_matrix_function(
    matrix: Float[Tensor, "batch steps steps"], function: Callable[[Tensor], Tensor]
) -> Float[Tensor, "batch steps"]:
    """``f(T) e_1`` of small symmetric matrices, in float64: the coordinates of the answer in the Krylov basis."""
    eigenvalues, basis = torch.linalg.eigh(matrix)
    return torch.einsum("bij,bj,bj->bi", basis, function(eigenvalues), basis[:, 0, :])


def krylov_function(krylov: Krylov, coordinates: Float[Tensor, "batch steps"]) -> Float[Tensor, "batch *shape"]:
    """``||z|| V c``: from coordinates in the Krylov basis back to the vectors' own space."""
    vectors = krylov.vectors
    # The narrower type first: MPS has no float64. CUDA stages such a copy and need not be waited for.
    weights = coordinates.to(vectors.dtype).to(vectors.device, non_blocking=vectors.is_cuda) * krylov.norm[:, None]
    return torch.einsum("bk,bkd->bd", weights, vectors[:, : weights.shape[1]]).reshape(krylov.shape)
