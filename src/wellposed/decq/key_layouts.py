"""Names of an encoder's weights in the layouts of different versions of transformers.

transformers 5 renamed the attention of its vision models, and its own loader renames old files; diffusers' loader does
not: it warns of missing weights and goes on with random ones, or leaves them on the meta device. Both layouts are
brought to one canonical spelling here, and a file's names are matched to a model's through that, in either direction.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

__all__ = ["canonical", "in_layout_of"]

PREFIX = "encoder."

# In this order: a name of the old layout holds parts of the new one.
SPELLINGS: tuple[tuple[str, str], ...] = (
    (r"^vision_model\.", ""),
    (r"^(?:encoder|model)\.layers?\.", "blocks."),
    (r"^layers?\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.output\.dense\.", ".attention.out."),
    (r"\.(?:attention|self_attn)\.(?:o_proj|out_proj)\.", ".attention.out."),
    (r"\.(?:attention|self_attn)\.q_proj\.", ".attention.query."),
    (r"\.(?:attention|self_attn)\.k_proj\.", ".attention.key."),
    (r"\.(?:attention|self_attn)\.v_proj\.", ".attention.value."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)

T = TypeVar("T")


def canonical(name: str) -> str:
    """One spelling for the name of an encoder's weight, whatever the version; other names stay as they are."""
    if not name.startswith(PREFIX):
        return name
    rest = name.removeprefix(PREFIX)
    for pattern, spelling in SPELLINGS:
        rest = re.sub(pattern, spelling, rest)
    return PREFIX + rest


def in_layout_of(names: Iterable[str], weights: Mapping[str, T]) -> dict[str, T]:
    """The weights under the names that a model has for them; those it has no name for keep theirs."""
    own = {canonical(name): name for name in names}
    return {own.get(canonical(name), name): value for name, value in weights.items()}
