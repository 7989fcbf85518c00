"""RankMixer, and its separated form."""

from recsys.models.rankmixer.model import MODEL, SETTINGS

__all__ = ["MODEL", "SETTINGS"]
