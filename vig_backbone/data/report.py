"""What a check found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from .layouts import LAYOUTS


@dataclass(frozen=True)
class Problem:
    """``file`` is relative to the checked folder; ``what`` is wrong; ``remedy`` says what to do."""

    file: str
    what: str
    remedy: str


@dataclass
class CheckReport:
    """Result of a check: ``counts`` and ``notes`` inform, ``problems`` are what makes the set broken."""

    kind: str
    root: str
    counts: dict[str, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems

    def add(self, file: str, what: str, remedy: str) -> None:
        self.problems.append(Problem(file, what, remedy))

    def to_dict(self) -> dict:
        """Plain lists and dicts, ready for JSON."""
        return {"ok": self.ok, **asdict(self)}

    def text(self, limit: int = 50) -> str:
        """The report for a terminal, with at most ``limit`` problems."""
        lines = [f"{LAYOUTS[self.kind].name} in {self.root}"]
        lines += [f"  {name}: {count:,}" for name, count in self.counts.items()]
        lines += [f"  note: {note}" for note in self.notes]
        if self.ok:
            return "\n".join([*lines, "whole: nothing is broken"])
        lines.append(f"broken: {len(self.problems):,} problem(s)")
        lines += [f"  {p.file}: {p.what} -> {p.remedy}" for p in self.problems[:limit]]
        if len(self.problems) > limit:
            lines.append(f"  ... and {len(self.problems) - limit:,} more")
        return "\n".join(lines)
