"""What a verb that needs a finished log says of a stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

from parallel.common.errors import UserError

if TYPE_CHECKING:
    from recsys.settings import DataSettings


def refuse(data: DataSettings) -> NoReturn:
    """Raises a `UserError`: there are no rows to count or to evaluate on."""
    raise UserError("a stream has no end, so there is no log to go over", where="data.reader", value=data.reader,
                    hint="train goes along with it; for other verbs take reader csv or parquet")
