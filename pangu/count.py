"""Counting parameters by building the model without values."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from parallel.common.progress import table

if TYPE_CHECKING:
    from pangu.settings import Run


def run(settings: Run, arguments: argparse.Namespace) -> dict:
    """Verb `count`: the exact number of parameters and where they are.

    The network itself is built, its parameters without data, so the count is that of the code and not of a formula.
    """
    from mindspore.nn.utils import no_init_parameters

    from pangu.model import PanGuAlpha

    with no_init_parameters():
        model = PanGuAlpha(settings.model)
    groups: dict[str, int] = {}
    for name, item in model.parameters_and_names():
        group = "layers (each alike)" if name.startswith("layers.") else name.split(".")[0].replace("_", " ")
        groups[group] = groups.get(group, 0) + math.prod(item.shape)
    total = sum(groups.values())
    table("Parameters", ["part", "parameters"], [*groups.items(), ("total", total)])
    return {"parameters": total, "by_part": groups}
