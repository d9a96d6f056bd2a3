"""udm: uniform diffusion with the leave-one-out posterior (arXiv 2605.22765).

Read in this order: ``prediction`` (denoiser, leave-one-out posterior, score: one object), ``kernels`` (how tokens fade
and come back), ``models`` (who predicts), ``nelbo`` and ``objectives`` (training), ``steps`` and ``sampler`` (the
chain), ``corrector`` and ``remasking`` (revision), ``grids``, ``likelihood``, then the shells ``transformer``,
``scheduler``, ``pipeline`` and ``checkpoints``.
"""

from wellposed.udm.corrector import Corrector
from wellposed.udm.draws import Truncation
from wellposed.udm.grids import alpha_grid
from wellposed.udm.kernels import Absorbing, Masked, MaximalCoupling, RefreshedAbsorbing, TokenState, Uniform
from wellposed.udm.prediction import Prediction, to_denoiser, to_leave_one_out, to_score
from wellposed.udm.sampler import sample
from wellposed.udm.steps import SamplingSettings, ancestral_step

__all__ = [
    "Absorbing",
    "Corrector",
    "Masked",
    "MaximalCoupling",
    "Prediction",
    "RefreshedAbsorbing",
    "SamplingSettings",
    "TokenState",
    "Truncation",
    "Uniform",
    "alpha_grid",
    "ancestral_step",
    "sample",
    "to_denoiser",
    "to_leave_one_out",
    "to_score",
]
