"""The wheel carries Studio's built page: built here if it is missing and Node is there, else the wheel says it goes without."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Page(BuildHookInterface):  # type: ignore[type-arg]
    """Builds `studio/` into `twofold/studio/page/` before a wheel or an sdist is packed; not for editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        if version == "editable" or (root / "twofold/studio/page/index.html").is_file():
            return
        npm = shutil.which("npm")
        if npm is None or not (root / "studio/package.json").is_file():
            self.app.display_warning(
                "Studio's page is not built and npm is not here: `twofold studio` will have no page"
            )
            return
        for command in (("ci",), ("run", "build")):
            subprocess.run([npm, *command], cwd=root / "studio", check=True)
