"""TokenMixer-Large, and its separated form."""

from __future__ import annotations

from mindspore import dtype as mstype

from recsys.data.features import FeatureSpec
from recsys.models.tokenmixer_large.model import TokenMixerLarge, TokenMixerLargeSettings
from recsys.ranker import Ranker


def ranker(settings: TokenMixerLargeSettings, spec: FeatureSpec, tasks: int,
           compute_dtype: mstype = mstype.float32) -> Ranker:
    """TokenMixer-Large, separated if the settings say so."""
    if settings.ug_sep is None:
        return TokenMixerLarge(settings, spec, tasks, compute_dtype)
    from recsys.models.tokenmixer_large.separated import SeparatedTokenMixerLarge

    return SeparatedTokenMixerLarge(settings, spec, tasks, compute_dtype)


SETTINGS, MODEL = TokenMixerLargeSettings, ranker
