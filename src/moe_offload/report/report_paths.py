"""Where a run's files go, by name."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path


@dataclass(frozen=True)
class ReportPaths:
    """Where each file goes; `routing` is None for a run that is not to leave its routing."""

    breakdown: Path
    cachehit: Path
    expert_choices: Path
    token_gen_time: Path
    cpu_freq_avg: Path
    run_json: Path
    routing: Path | None = None

    @classmethod
    def in_folder(
        cls,
        folder: Path | None = None,
        breakdown_csv: Path = Path("out.csv"),
        cachehit_csv: Path = Path("cache.csv"),
    ) -> ReportPaths:
        """All files under `folder`; the working directory, where none is given, has no routing."""
        routing = None if folder is None else folder / "routing.jsonl"
        folder = folder or Path()
        return cls(
            breakdown=folder / breakdown_csv,
            cachehit=folder / cachehit_csv,
            expert_choices=folder / "expert_choices.csv",
            token_gen_time=folder / "token_gen_time.csv",
            cpu_freq_avg=folder / "cpu_freq_avg.csv",
            run_json=folder / "run.json",
            routing=routing,
        )

    def all(self) -> list[Path]:
        return list(self.by_name().values())

    def by_name(self) -> dict[str, Path]:
        paths = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: path for name, path in paths.items() if path is not None}

    def beside_others(self) -> ReportPaths:
        """The names of an unfinished run: these if all are free, else out.partial.csv, else
        out.partial-2.csv and so on."""
        paths, number = self, 0
        while any(path.exists() for path in paths.all()):
            number += 1
            tail = ".partial" if number == 1 else f".partial-{number}"
            names = {
                name: path.with_name(f"{path.stem}{tail}{path.suffix}")
                for name, path in self.by_name().items()
            }
            paths = replace(self, **names)
        return paths
