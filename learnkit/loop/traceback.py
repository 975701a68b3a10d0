"""Tracebacks that show the user's code: the frames of this package's dispatch are left out of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import TracebackType
from typing import Concatenate, ParamSpec, TypeVar

Given = ParamSpec("Given")
Self = TypeVar("Self")
Returned = TypeVar("Returned")

PACKAGE = Path(__file__).resolve().parents[1]
# callbacks/ is a folder of its own in a checkout, and lies within the package where it is installed.
HOME = (f"{PACKAGE}{os.sep}", f"{(PACKAGE / 'callbacks').resolve()}{os.sep}")
STANDARD = (os.sep + "contextlib.py", os.sep + os.path.join("torch", "utils", "_contextlib.py"))


def short_traceback(
    method: Callable[Concatenate[Self, Given], Returned],
) -> Callable[Concatenate[Self, Given], Returned]:
    """Decorate a method that runs the loop: an error that comes out of it shows the user's frames and those of other
    packages, and of this one only the frame that raised it. With `LEARNKIT_FULL_TRACEBACK=1` it shows all frames.
    """

    @wraps(method)
    def run(self: Self, *args: Given.args, **kwargs: Given.kwargs) -> Returned:
        try:
            return method(self, *args, **kwargs)
        except BaseException as error:
            if os.environ.get("LEARNKIT_FULL_TRACEBACK") == "1":
                raise
            raise error.with_traceback(shortened(error.__traceback__))  # noqa: B904

    return run


def shortened(traceback: TracebackType | None) -> TracebackType | None:
    """Return a traceback without this package's frames, except the innermost one where it raised the error."""
    frames = []
    while traceback is not None:
        frames.append(traceback)
        traceback = traceback.tb_next
    kept = [frame for frame in frames if not is_dispatch(frame)]
    if frames and is_dispatch(frames[-1]):
        kept.append(frames[-1])
    rest = None
    for frame in reversed(kept):
        rest = TracebackType(rest, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return rest


def is_dispatch(traceback: TracebackType) -> bool:
    file = traceback.tb_frame.f_code.co_filename
    return file.startswith(HOME) or file.endswith(STANDARD)
