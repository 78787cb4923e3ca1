"""The run directory: what it holds, and how it is opened without ever overwriting another run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fastasync.config import Config, differences, flatten, keep_begun, load_config
from fastasync.errors import UserError
from fastasync.evaluation.protocol import library_versions
from fastasync.files import atomic_path, write_json
from fastasync.presets import preset


class Run:
    """A run directory and its configuration.

    It holds config.yaml, versions.json, prepared/, probe/, schedule.json, checkpoints/, metrics.jsonl and .csv,
    samples/, figures.json, the pictures and report.html; baselines/NAME/ are runs of the same layout that share
    prepared/.
    """

    def __init__(self, path: Path, config: Config, prepared: Path | None = None):
        self.path, self.config = path, config
        self.prepared = prepared or path / "prepared"

    @property
    def schedule_file(self) -> Path:
        return self.path / "schedule.json"

    @property
    def probe_folder(self) -> Path:
        return self.path / "probe"

    @property
    def samples_folder(self) -> Path:
        return self.path / "samples"

    @property
    def figures_file(self) -> Path:
        return self.path / "figures.json"

    def baseline(self, name: str) -> Run:
        """The nested run that trains the same network on the fixed schedule ``name``; ``create`` makes its folder."""
        choice = replace(self.config.schedule, name=name, baselines=())
        folder = self.path / "baselines" / name.replace(":", "-").replace("/", "_")
        return Run(folder, replace(self.config, schedule=choice), self.prepared)

    def baselines(self) -> list[Run]:
        """All of the configuration's baselines, with their folders."""
        return [self.baseline(name).create() for name in self.config.schedule.others]

    def create(self) -> Run:
        """Make the directory and write config.yaml and versions.json.

        Raises UserError, and changes nothing, when the directory holds another configuration or something else.
        """
        stored = self.path / "config.yaml"
        if stored.exists():
            existing = load_config(stored)
            changed = differences(existing, self.config)
            if changed:
                first = changed[0]
                old, new = flatten(existing)[first], flatten(self.config)[first]
                raise UserError(
                    "--out",
                    self.path,
                    f"holds a run with other settings ({first} is {old} there, {new} here"
                    + (f"; {len(changed) - 1} more" if len(changed) > 1 else "")
                    + "); choose another folder, or leave out --preset and --set to continue it",
                )
        elif self.path.exists() and not self.path.is_dir():
            raise UserError("--out", self.path, "is a file; choose a folder")
        elif self.path.exists() and any(self.path.iterdir()):
            raise UserError("--out", self.path, "is not empty and holds no run; choose a new or empty folder")
        with atomic_path(stored) as partial:
            partial.write_text(self.config.to_yaml())
        if not (self.path / "versions.json").exists():  # later ones stand in the checkpoints and beside each figure
            write_json(self.path / "versions.json", library_versions())
        return self


def existing_config(path: Path) -> Config | None:
    """The configuration stored in a run directory, or None when there is none."""
    stored = path / "config.yaml"
    return load_config(stored) if stored.is_file() else None


def begin_config(path: Path, name: str | None) -> Config | None:
    """What a command in ``path`` starts from: preset ``name``, as a run there was begun with it, or that run's own.

    None without either.
    """
    stored = existing_config(path)
    if not name:
        return stored
    return preset(name) if stored is None else keep_begun(preset(name), stored)
