"""How much energy has the CPU used? As far as the system counts it and lets this user read it (RAPL on Linux)."""

import contextlib
from pathlib import Path

_FOLDER = Path("/sys/class/powercap")


class EnergyMeter:
    """Counts the joules of all CPU packages from when it is made."""

    def __init__(self, folder: Path = _FOLDER) -> None:
        """folder: where the system's counters lie."""
        self._zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
        self._begin = [_number(zone / "energy_uj") for zone in self._zones]

    def joules(self) -> float | None:
        """Return what was used since; None where nothing counts it or it may not be read."""
        if not self._zones:
            return None
        total = 0
        for zone, begin in zip(self._zones, self._begin, strict=True):
            now, most = _number(zone / "energy_uj"), _number(zone / "max_energy_range_uj")
            if begin is None or now is None:
                return None
            total += now - begin if now >= begin else now + (most or 0) - begin  # the counter began anew
        return total / 1e6


def _number(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_text("utf-8"))
    return None
