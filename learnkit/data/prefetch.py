"""Batches that a thread prepares while the model processes earlier ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import Any, TypeVar

T = TypeVar("T")


class Failed:
    """The exception that ended the thread."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def ahead(items: Iterable[T], n: int) -> Iterator[T]:
    """Yield the same items; a thread prepares up to `n` of them ahead of time. It ends with the loop that reads them.

    Exceptions that `items` raises are raised here, at the same position.
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
    """Put an item into the queue; return False if the reader left first."""
    while not left.is_set():
        try:
            queue.put(item, timeout=0.1)
        except Full:
            continue
        return True
    return False
