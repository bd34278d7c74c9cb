"""The verb push."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from smolseek.cli.shared import align_table, quiet_libraries


@dataclass(frozen=True)
class Push:
    """Upload a complete checkpoint folder to a private repository on the hub; log in first with hf auth login."""

    folder: tyro.conf.Positional[Path]
    """Folder with config.json, such as runs/NAME/model."""
    id: tyro.conf.Positional[str]
    """The repository, as owner/name."""
    public: bool = False
    """Upload to a public repository."""
    dry_run: bool = False
    """List the files and their sizes, and upload nothing."""


def run_push(command: Push) -> None:
    quiet_libraries()
    from smolseek.checkpoint.push import check_id, files_to_push, push

    check_id(command.id)
    files = files_to_push(command.folder)
    sizes = {path.name: path.stat().st_size for path in files}
    rows = [*sizes.items(), ("together", sum(sizes.values()))]
    print(align_table([[name, f"{size:,} bytes"] for name, size in rows]))
    if command.dry_run:
        kind = "public" if command.public else "private"
        print(f"nothing is uploaded: without --dry-run these go to {command.id} ({kind} if it is made anew)")
    else:
        print(push(command.folder, command.id, public=command.public))
