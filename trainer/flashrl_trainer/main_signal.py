"""How ranks wait for rank 0's own work: with a limit, and for as long as rank 0 shows that it gets on.

Knows a store of keys that all ranks reach; knows nothing of the work or of what becomes of its result.
"""

from datetime import timedelta
from typing import Protocol

from torch.distributed import DistNetworkError, DistStoreError

_BEAT = "beat"
_KEPT_KEYS = 1000  # all ranks are past a call that far back: every step has collectives in both directions


class Store(Protocol):
    """The part of torch.distributed's stores that is used."""

    def set(self, key: str, value: str, /) -> None: ...
    def add(self, key: str, amount: int, /) -> int: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def delete_key(self, key: str, /) -> bool: ...


class RankLostError(RuntimeError):
    """Another rank has ended or hangs; this one has waited as long as it may."""


class MainSignal:
    """Counts rank 0's pieces of work, the same on every rank; rank 0 announces, the others wait."""

    def __init__(self, store: Store, rank: int, limit_s: float) -> None:
        self._store, self._rank, self._limit_s = store, rank, limit_s
        self._calls = 0

    def beat(self) -> None:
        """Rank 0 gets on with its work: the others' limit begins anew."""
        self._store.add(_BEAT, 1)

    def announce(self) -> None:
        """Rank 0's piece of work is over, with or without success."""
        self._store.set(self._next(), "over")
        if self._calls > _KEPT_KEYS:
            self._store.delete_key(_key(self._calls - _KEPT_KEYS))

    def wait(self) -> None:
        """Return once rank 0 has announced; RankLostError if it has been still for the limit."""
        key, beats = self._next(), -1
        while (now := self._beats()) != beats:
            beats = now
            try:
                return self._store.wait([key], timedelta(seconds=self._limit_s))
            except DistNetworkError as error:
                raise RankLostError(f"rank {self._rank}: rank 0 has ended; see its output") from error
            except DistStoreError:
                continue  # the limit is over: has rank 0 got on in the meantime?
        raise RankLostError(
            f"rank {self._rank}: rank 0 has neither finished its work nor got on with it for {self._limit_s:g} s; "
            "it hangs, or has ended: see its output"
        )

    def _beats(self) -> int:
        try:
            return self._store.add(_BEAT, 0)
        except DistNetworkError as error:
            raise RankLostError(f"rank {self._rank}: rank 0 has ended; see its output") from error

    def _next(self) -> str:
        self._calls += 1
        return _key(self._calls)


def _key(call: int) -> str:
    return f"call-{call}"
