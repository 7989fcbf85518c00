"""RankMixer, and its separated form."""

from __future__ import annotations

from mindspore import dtype as mstype

from recsys.data.features import FeatureSpec
from recsys.models.rankmixer.model import RankMixer, RankMixerSettings
from recsys.ranker import Ranker


def ranker(settings: RankMixerSettings, spec: FeatureSpec, tasks: int,
           compute_dtype: mstype = mstype.float32) -> Ranker:
    """RankMixer, separated if the settings say so."""
    if settings.ug_sep is None:
        return RankMixer(settings, spec, tasks, compute_dtype)
    from recsys.models.rankmixer.separated import SeparatedRankMixer

    return SeparatedRankMixer(settings, spec, tasks, compute_dtype)


SETTINGS, MODEL = RankMixerSettings, ranker
