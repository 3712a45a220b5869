"""The repository's main job: jaxgrad's command line, and after its reports the atlas.

The package knows nothing of the experiments, so the atlas is written from here. It is made of the
results that lie in the repository: no experiment runs.
"""

import sys
from pathlib import Path

from jaxgrad import cli


def write_atlas(reports: Path) -> None:
    """Writes the atlas beside the reports of the main job.

    Raises:
        SystemExit: with status 1 if a stored result could not be used; the page says which.
    """
    from experiments.__main__ import FOLDER, write_report

    if write_report(FOLDER, reports / "atlas", chatty=False):
        sys.exit(1)


if __name__ == "__main__":
    cli.main(after_main=write_atlas)
