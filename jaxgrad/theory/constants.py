"""Constants by which residual networks are scaled at initialization, with their sources."""

from typing import NamedTuple


class DeepNorm(NamedTuple):
    """Scales of `LN(alpha h + F(h))`.

    Attributes:
        alpha: factor of the residual stream.
        beta: factor of the Xavier gain of the feed-forward, value and output projections.
    """

    alpha: float
    beta: float


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: expected a number of layers of at least 1, got {count}")


def deep_norm(layers: int) -> DeepNorm:
    """DeepNorm for encoder-only or decoder-only models.

    Wang et al. 2022 (arXiv 2203.00555), table 2: `alpha = (2 N)^(1/4)`, `beta = (8 N)^(-1/4)`, so
    that `2 N (v^2 + w^2) / alpha^2 = 1` for v = w = beta, the bound of theorem 4.2.

    Args:
        layers: N, each of attention and feed-forward.
    """
    _positive(layers=layers)
    return DeepNorm((2 * layers) ** 0.25, (8 * layers) ** -0.25)


def deep_norm_encoder_decoder(encoder: int, decoder: int) -> tuple[DeepNorm, DeepNorm]:
    """DeepNorm for an encoder of N and a decoder of M layers.

    Wang et al. 2022, table 2: encoder `0.81 (N^4 M)^(1/16)`, `0.87 (N^4 M)^(-1/16)`; decoder
    `(3 M)^(1/4)`, `(12 M)^(-1/4)`.

    Args:
        encoder: N.
        decoder: M.

    Returns:
        (encoder's, decoder's).
    """
    _positive(encoder=encoder, decoder=decoder)
    root = (encoder**4 * decoder) ** (1 / 16)
    return (
        DeepNorm(0.81 * root, 0.87 / root),
        DeepNorm((3 * decoder) ** 0.25, (12 * decoder) ** -0.25),
    )


def fixup_scale(branches: int, layers_in_branch: int = 2) -> float:
    """Factor of He's initialization of a branch's layers but the last, which is zero.

    Zhang et al. 2019 (arXiv 1901.09321), section 4: `L^(-1 / (2 m - 2))`.

    Args:
        branches: L, the number of residual branches.
        layers_in_branch: m, at least 2.
    """
    _positive(branches=branches)
    if layers_in_branch < 2:
        raise ValueError(
            f"layers_in_branch: Fixup needs at least 2 layers in a branch, got {layers_in_branch}"
        )
    return branches ** (-1 / (2 * layers_in_branch - 2))


class TFixup(NamedTuple):
    """Factors of the Xavier initialization of transformers without norms.

    Attributes:
        encoder: of the encoder's value, output and feed-forward projections.
        decoder: of the decoder's, and of the embeddings drawn from N(0, 1 / d).
    """

    encoder: float
    decoder: float


def t_fixup_scales(layers: int) -> TFixup:
    """T-Fixup for N encoder and N decoder layers.

    Huang et al. 2020 (ICML, "Improving transformer optimization through better initialization"),
    section 3.2: `0.67 N^(-1/4)` and `(9 N)^(-1/4)`.

    Args:
        layers: N.
    """
    _positive(layers=layers)
    return TFixup(0.67 * layers**-0.25, (9 * layers) ** -0.25)


def layer_scale_init(depth: int) -> float:
    """First value of LayerScale's diagonal: 0.1 to depth 18, 1e-5 to depth 24, 1e-6 beyond.

    Touvron et al. 2021 (CaiT, arXiv 2103.17239), section 2.

    Args:
        depth: number of blocks.
    """
    _positive(depth=depth)
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


def residual_scale(depth: int) -> float:
    """`1 / sqrt(L)`: the branch scale whose L blocks multiply mean squares by e at most.

    Hanin and Rolnick 2018 (arXiv 1803.01719), theorem 6; see `branch_log_gain`.

    Args:
        depth: number of residual branches.
    """
    _positive(depth=depth)
    return depth**-0.5
