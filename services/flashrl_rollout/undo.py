"""The old values of everything that an update has written, so that it can be taken back.

As large as the update, not as the model. Knows places; knows nothing of names.
"""

from flashrl_rollout.place import Place


class UndoLog:
    """Places with their old patterns, the first `device_bytes` of them on the device, the rest on the host."""

    def __init__(self, device_bytes: int = 1 << 28) -> None:
        self._device_bytes = device_bytes
        self._room = device_bytes
        self._places: list[Place] = []

    def __len__(self) -> int:
        return len(self._places)

    def add(self, place: Place, *, is_resident: bool = False) -> None:
        """Remember a place; before it is written.

        What `is_resident` stays where it is, whatever the room: it was there before the update began.
        """
        if not is_resident:
            self._room -= place.nbytes
        self._places.append(place if is_resident or self._room >= 0 else place.on_host())

    def take_back(self) -> None:
        """Write the old patterns back, newest first, and forget them one by one."""
        while self._places:
            self._places[-1].take_back()
            self._places.pop()
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._places.clear()
        self._room = self._device_bytes
