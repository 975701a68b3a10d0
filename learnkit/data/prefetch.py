"""Batches made by a thread while the model works on those before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Failed:
    """What ended the thread."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def ahead(items: Iterable[T], n: int) -> Iterator[T]:
    """The same items, up to `n` of them made ahead of time by a thread, which ends with the loop that reads them.

    What `items` raises is raised here, in its place.
    """
    queue: Queue[Any] = Queue(n)
    left, end = Event(), object()
    thread = Thread(target=feed, args=(items, queue, left, end), name="learnkit batches ahead", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not end:
            if isinstance(item, Failed):
                raise item.error
            yield item
    finally:
        left.set()
        thread.join()


def feed(items: Iterable[Any], queue: Queue[Any], left: Event, end: object) -> None:
    try:
        for item in items:
            if not put_item(item, queue, left):
                return
        put_item(end, queue, left)
    except BaseException as error:
        put_item(Failed(error), queue, left)


def put_item(item: Any, queue: Queue[Any], left: Event) -> bool:
    """Whether there was a place for it before the reader left."""
    while not left.is_set():
        try:
            queue.put(item, timeout=0.1)
        except Full:
            continue
        return True
    return False
