"""Which KV heads of one model are unstable, how that was measured, and JSON in and out."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from flexijax.profiles import checks
from flexijax.profiles.regular_file import read_text

FORMAT = "flexijax-head-profile-2"
# Without `lost_mass`; the list in such a file is as it was written.
OLD_FORMAT = "flexijax-head-profile-1"
MAX_BYTES = 16 << 20  # the largest shipped one has 11 thousand


@dataclass(frozen=True, kw_only=True)
class HeadProfile:
    """The unstable KV heads of one model at one budget; every other KV head is stable.

    model: name of the model, as on its hub page.
    num_layers, num_kv_heads: L and K of that model.
    unstable: (layer, KV head) pairs, sorted, each at most once.
    page_size: tokens in a page; budget_pages: pages chosen per head, when it was measured.
    source: who measured, with what, on which text.
    fingerprint: of the model's configuration; None when the source does not tell it.
    rco: float[L][K], mean random-corrected overlap of each head; None when not published.
        A head of which nothing could be measured holds None.
    lost_mass: float[L][K], attention that each head loses by a choice of 16 steps before, mean; see
        `profiles.lost_mass`. None when it was not measured.
    measured: how, as plain JSON values (task, documents, steps, window, ...).

    Raises ValueError, naming the field, when the values contradict each other.
    """

    model: str
    num_layers: int
    num_kv_heads: int
    unstable: tuple[tuple[int, int], ...]
    page_size: int
    budget_pages: int
    source: str
    fingerprint: str | None = None
    rco: tuple[tuple[float | None, ...], ...] | None = None
    lost_mass: tuple[tuple[float | None, ...], ...] | None = None
    measured: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "page_size", "budget_pages"):
            checks.check_size(name, getattr(self, name))
        for name in ("model", "source"):
            if not isinstance(value := getattr(self, name), str) or not value:
                raise ValueError(f"{name}={checks.shown(value)} must be a string, and not empty")
        if not isinstance(self.fingerprint, str | None):
            shown = checks.shown(self.fingerprint)
            raise ValueError(f"fingerprint={shown} must be None or a string")
        shape = (self.num_layers, self.num_kv_heads)
        # Frozen values are hashable and compare equal after a round trip only with one spelling.
        object.__setattr__(self, "unstable", checks.heads("unstable", self.unstable, shape))
        for name in ("rco", "lost_mass"):
            if (column := getattr(self, name)) is not None:
                object.__setattr__(self, name, checks.shares(name, column, shape))
        if not isinstance(self.measured, Mapping):
            raise ValueError(f"measured={checks.shown(self.measured)} must be an object")
        checks.check_plain("measured", self.measured)
        if (at_lag := self.measured.get("rco_at_lag")) is not None:
            checks.check_lags("measured.rco_at_lag", at_lag, shape)

    def __hash__(self) -> int:
        return hash((self.model, self.num_layers, self.num_kv_heads, self.unstable))

    def unstable_heads(self, layer: int) -> tuple[int, ...]:
        """KV heads of a layer that keep all pages on the device, ascending."""
        if not 0 <= layer < self.num_layers:
            raise ValueError(f"layer={layer} must be in 0..{self.num_layers - 1}")
        return tuple(head for at, head in self.unstable if at == layer)

    def stable_heads(self, layer: int) -> tuple[int, ...]:
        """KV heads of a layer whose pages live on the host, ascending."""
        unstable = set(self.unstable_heads(layer))
        return tuple(head for head in range(self.num_kv_heads) if head not in unstable)

    def check(self, *, num_layers: int, num_kv_heads: int, fingerprint: str | None = None) -> None:
        """Raises ValueError that lists what differs, unless the profile fits such a model.

        A fingerprint is compared only where both sides know one.
        """
        differs = [
            f"{name} is {mine} in the profile and {theirs} in the model"
            for name, mine, theirs in (
                ("num_layers", self.num_layers, num_layers),
                ("num_kv_heads", self.num_kv_heads, num_kv_heads),
                ("fingerprint", self.fingerprint or fingerprint, fingerprint or self.fingerprint),
            )
            if mine != theirs
        ]
        if differs:
            raise ValueError(f"the profile of {self.model!r} does not fit: {'; '.join(differs)}")

    def save(self, path: str | Path) -> None:
        """Writes the profile as JSON."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The profile as JSON text, one line for each field."""
        fields = {"format": FORMAT, **asdict(self)}
        lines = (f'  "{name}": {json.dumps(value)}' for name, value in fields.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    @staticmethod
    def load(path: str | Path) -> "HeadProfile":
        """Reads what `save` wrote; raises ValueError naming the file when it is anything else."""
        try:
            return HeadProfile.from_json(read_text(path, MAX_BYTES))
        except ValueError as error:
            raise ValueError(f"{path} is not a head profile: {error}") from error

    @staticmethod
    def from_json(text: str) -> "HeadProfile":
        """The profile in JSON text; raises ValueError, naming the field, when it holds none."""
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("lists and objects nested without end") from None
        form = values.pop("format", None) if isinstance(values, dict) else None
        if form not in (FORMAT, OLD_FORMAT):
            raise ValueError(f'"format" must be {FORMAT!r} or {OLD_FORMAT!r}')
        known = {entry.name for entry in fields(HeadProfile)}
        if form == OLD_FORMAT:
            known -= {"lost_mass"}
        if unknown := values.keys() - known:
            raise ValueError(f"unknown field {checks.shown(min(unknown))}")
        optional = {"fingerprint", "rco", "lost_mass", "measured"}
        if absent := known - optional - values.keys():
            raise ValueError(f"missing field {min(absent)!r}")
        return HeadProfile(**values)
