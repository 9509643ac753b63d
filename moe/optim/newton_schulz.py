"""Matrices -> nearly orthogonal ones with the same singular vectors, by matrix products alone.

N matrices, R rows, C columns.
"""

import torch
from torch import Tensor

COEFFICIENTS, STEPS, EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7
CHUNK_ELEMENTS = 1 << 26
"""Elements orthogonalised at a time: each of the few temporaries has at most 256 MiB in float32."""


def orthogonalize(x_NRC: Tensor, dtype: torch.dtype) -> Tensor:
    """U S V^T -> about U V^T for each matrix; [N, R, C], computed in `dtype`.

    Five steps of the quintic Newton-Schulz iteration X <- a X + (b X X^T + c (X X^T)^2) X, whose coefficients favour
    speed: singular values come out near 0.7 to 1.2, not at 1 (https://kellerjordan.github.io/posts/muon;
    arXiv:2502.16982, eq. 2). Zero stays zero.
    """
    out_NRC = torch.empty_like(x_NRC, dtype=dtype)
    most = max(1, CHUNK_ELEMENTS // (x_NRC.shape[1] * x_NRC.shape[2]))
    for x, out in zip(x_NRC.split(most), out_NRC.split(most), strict=True):
        # Before the cast, so that no norm overflows; never by zero.
        out.copy_(_iterate((x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)).to(dtype)))
    return out_NRC


def _iterate(x_NRC: Tensor) -> Tensor:
    if x_NRC.shape[1] > x_NRC.shape[2]:
        return _iterate(x_NRC.mT).mT  # the smaller Gram matrix
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(
            x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a
        )
    return x_NRC
