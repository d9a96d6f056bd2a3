"""One colour and one marker for each method, the same in every figure.

Hue says the family, so that a reader who knows one figure can read the next:

* blue: covariances of this library (full, and Lanczos at its depths, deeper is darker);
* grey: variances fixed beforehand (beta, beta-tilde);
* orange: isotropic ones (Analytic-DPM and its x-dependent form);
* purple: diagonal ones (NPR, SN, OCM, and the exact diagonal);
* green: deterministic samplers.

For tokens: blue is uniform diffusion with its leave-one-out posterior, orange the same with a denoiser, green the
absorbing reformulation, black and grey masked diffusion, purple what tempers or plugs in the denoiser.

For token reduction: blue chooses pairs by output, orange and purple by input, grey at random; green skips steps or
blocks instead of tokens, or as well.

For autoencoders: black is the plain latent, blue one with queries, orange the sum of the last layers, green both.

The hues of Okabe and Ito's palette, told apart by readers with any of the common colour vision deficiencies; within a
family lightness, marker and dash differ, so that figures survive a grey printer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = [
    "AUTOENCODER_STYLES",
    "COVARIANCE_STYLES",
    "METHOD_STYLES",
    "TOKEN_REDUCTION_STYLES",
    "TOKEN_STYLES",
    "Dash",
    "MethodStyle",
    "method_style",
]

Dash = Literal["solid", "dashed", "dotted", "dashdot"]


@dataclass(frozen=True, kw_only=True)
class MethodStyle:
    """How a method looks in every figure.

    Attributes:
        label: its name in legends and tables.
        color: ``#rrggbb``.
        marker: matplotlib's letter.
        dash: of its line.
        hollow: markers are outlines.
        width: of its line in points.
    """

    label: str
    color: str
    marker: str
    dash: Dash = "solid"
    hollow: bool = False
    width: float = 1.5


COVARIANCE_STYLES: Mapping[str, MethodStyle] = MappingProxyType(
    {
        "full": MethodStyle(label="full", color="#132d7d", marker="o", hollow=True, width=2.2),
        "lgs": MethodStyle(label="LGS, adaptive m", color="#0072b2", marker="o", width=2.2),
        "lgs_1": MethodStyle(label="LGS, m = 1", color="#8fc2fd", marker="^"),
        "lgs_2": MethodStyle(label="LGS, m = 2", color="#4f8ae4", marker="v"),
        "lgs_3": MethodStyle(label="LGS, m = 3", color="#004cb0", marker="d"),
        "lgs_amortized": MethodStyle(label="LGS, amortised", color="#5a74e4", marker="D", dash="dashed", hollow=True),
        "lgs_preconditioned": MethodStyle(label="LGS, DCT", color="#6cadfc", marker="P", dash="dashdot"),
        "beta": MethodStyle(label="β", color="#a8a8a8", marker="X", dash="dotted"),
        "beta_tilde": MethodStyle(label="β̃", color="#353535", marker="P", dash="dashed"),
        "analytic": MethodStyle(label="Analytic", color="#e69f00", marker="s"),
        "isotropic": MethodStyle(label="isotropic", color="#d55e00", marker="s", hollow=True),
        "diagonal": MethodStyle(label="diagonal", color="#984a78", marker="D"),
        "npr": MethodStyle(label="NPR", color="#cdb0d9", marker="<"),
        "sn": MethodStyle(label="SN", color="#a372a3", marker=">"),
        "ocm": MethodStyle(label="OCM", color="#6c2f67", marker="p"),
        "ddim": MethodStyle(label="DDIM", color="#009e73", marker="*", dash="dashed"),
        "dpm_solver": MethodStyle(label="DPM-Solver++", color="#406635", marker="h", dash="dashdot", hollow=True),
    }
)

TOKEN_STYLES: Mapping[str, MethodStyle] = MappingProxyType(
    {
        "udm_denoiser": MethodStyle(label="uniform, denoiser head", color="#d55e00", marker="s", hollow=True),
        "udm_misread": MethodStyle(label="uniform, denoiser misread", color="#e69f00", marker="X", dash="dotted"),
        "udm_loo": MethodStyle(label="uniform, leave-one-out", color="#0072b2", marker="o", width=2.2),
        "udm_loo_geometric": MethodStyle(label="the same, geometric grid", color="#8fc2fd", marker="^", dash="dashed"),
        "udm_loo_corrector": MethodStyle(label="leave-one-out, corrector", color="#132d7d", marker="D"),
        "udm_loo_random_corrector": MethodStyle(
            label="leave-one-out, exact corrector", color="#5a74e4", marker="d", dash="dashdot"
        ),
        "udm_loo_corrector_nucleus": MethodStyle(
            label="leave-one-out, corrector, nucleus", color="#004cb0", marker="v", dash="dashed"
        ),
        "udm_loo_denoiser_temperature": MethodStyle(
            label="leave-one-out head, tempered denoiser", color="#984a78", marker="<", dash="dashed"
        ),
        "audm": MethodStyle(label="absorbing", color="#009e73", marker="h"),
        "reaudm": MethodStyle(label="absorbing, refreshed", color="#406635", marker="*", dash="dashdot"),
        "audm_nucleus": MethodStyle(label="absorbing, nucleus", color="#48d682", marker="p", dash="dashed"),
        "mdm": MethodStyle(label="masked", color="#353535", marker="P", dash="dashed"),
        "mdm_nucleus": MethodStyle(label="masked, nucleus", color="#a8a8a8", marker="P", dash="dotted"),
        "max_coupling": MethodStyle(label="maximal coupling", color="#a372a3", marker=">", dash="dashdot"),
    }
)

TOKEN_REDUCTION_STYLES: Mapping[str, MethodStyle] = MappingProxyType(
    {
        "dito": MethodStyle(label="ours", color="#0072b2", marker="o", width=2.2),
        "dito_dense_kv": MethodStyle(label="ours, but copies", color="#5a9cf0", marker="^"),
        "dito_paper": MethodStyle(label="our reading of the paper", color="#132d7d", marker="D", dash="dashed"),
        "dito_paper_bias": MethodStyle(
            label="the same, log-size bias", color="#9cc4f8", marker="v", dash="dashdot", hollow=True
        ),
        "tomesd": MethodStyle(label="ToMeSD", color="#d55e00", marker="s"),
        "tofu": MethodStyle(label="ToFu", color="#f0b000", marker="X", dash="dotted"),
        "sito": MethodStyle(label="SiTo", color="#b56a9c", marker="<", dash="dashed"),
        "toma": MethodStyle(label="ToMA", color="#6c2f67", marker="p", dash="dashdot"),
        "random_pairs": MethodStyle(label="random pairs", color="#a8a8a8", marker="P", dash="dotted"),
        "fewer_steps": MethodStyle(label="fewer steps", color="#009e73", marker="*", dash="dashed"),
        "first_block_cache": MethodStyle(label="FirstBlockCache", color="#406635", marker="h", dash="dashdot"),
        "taylor_seer": MethodStyle(label="TaylorSeer", color="#7d8a00", marker="*", dash="dotted", hollow=True),
        "cached_dito": MethodStyle(label="FirstBlockCache + ours", color="#48d682", marker="h", hollow=True),
    }
)

AUTOENCODER_STYLES: Mapping[str, MethodStyle] = MappingProxyType(
    {
        "rae": MethodStyle(label="patches alone (RAE)", color="#353535", marker="s", dash="dashed"),
        "decq": MethodStyle(label="with 8 queries", color="#0072b2", marker="o", width=2.2),
        "decq_shallow": MethodStyle(label="8 queries, shallow taps", color="#5a9cf0", marker="^"),
        "decq_deep": MethodStyle(label="8 queries, deep taps", color="#132d7d", marker="v", dash="dashdot"),
        "decq_all": MethodStyle(label="8 queries, all taps", color="#9cc4f8", marker="D", hollow=True),
        "rae_sum": MethodStyle(label="sum of the last layers", color="#d55e00", marker="X", dash="dotted"),
        "decq_sum": MethodStyle(label="sum of the last layers, 8 queries", color="#009e73", marker="h"),
    }
)

METHOD_STYLES: Mapping[str, MethodStyle] = MappingProxyType(
    {**COVARIANCE_STYLES, **TOKEN_STYLES, **TOKEN_REDUCTION_STYLES, **AUTOENCODER_STYLES}
)
"""All of them. A figure shows methods of one table; within it they can be told apart."""

_OTHERS = (
    MethodStyle(label="", color="#0072b2", marker="o"),
    MethodStyle(label="", color="#d55e00", marker="s"),
    MethodStyle(label="", color="#009e73", marker="^"),
    MethodStyle(label="", color="#cc79a7", marker="D"),
    MethodStyle(label="", color="#e69f00", marker="v", dash="dashed"),
    MethodStyle(label="", color="#4a4a4a", marker="X", dash="dotted"),
)


def method_style(method: str | None, position: int = 0) -> MethodStyle:
    """The style of a method; what is no known method takes the style of its ``position`` in the figure.

    Raises:
        ValueError: ``method`` is neither None nor a key of :data:`METHOD_STYLES`.
    """
    if method is None:
        return _OTHERS[position % len(_OTHERS)]
    if method not in METHOD_STYLES:
        raise ValueError(f"method is {method!r}; write one of {', '.join(METHOD_STYLES)}, or None and a label")
    return METHOD_STYLES[method]
