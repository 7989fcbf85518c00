"""TokenMixer-Large, and its separated form."""

from recsys.models.tokenmixer_large.model import MODEL, SETTINGS

__all__ = ["MODEL", "SETTINGS"]
