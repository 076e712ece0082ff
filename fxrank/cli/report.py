"""`fxrank report`: the page of a run that was made before, from its folder."""

import argparse
import json
from pathlib import Path

from fxrank.auto import PAGE, REPORT
from fxrank.page.runs import run_page


def add_options(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    parser.add_argument("folder", metavar="RUN", help=f"the folder of a run, or its {REPORT}")
    parser.add_argument("--output", default=None, metavar="FILE", help=f"(default: {PAGE} beside {REPORT})")


def run(options: argparse.Namespace) -> None:
    """Write the page, and print where it is. Raises `ValueError` or `OSError` for a folder without a report."""
    given = Path(options.folder)
    path = given / REPORT if given.is_dir() else given
    if not path.is_file():
        raise ValueError(
            f"a run's folder has a {REPORT}, which `fxrank train`, `fxrank demo` and output_dir= write; {given} has none. Give such a folder."
        )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON as a run writes it; {error}. Give the folder of another run.") from error
    output = Path(options.output) if options.output else path.with_name(PAGE)
    html = run_page(data if isinstance(data, dict) else {}, path.absolute().parent.name)
    output.write_text(html, encoding="utf-8")
    print(output)
