"""Run the python blocks of a Markdown page in order, in one namespace, as a reader would.

python -m scripts.run_page docs/concepts/flow-matching.md [--into DIR]

Relative paths are below the page's folder, or below DIR; the output is printed. A block that fails
ends the run with its line in the page, exit status 1.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

import matplotlib


def blocks(text: str, language: str = "python") -> list[tuple[int, str]]:
    """List the fenced blocks of a language as (line of the fence, content)."""
    found, start, lines = [], 0, text.splitlines()
    for number, line in enumerate(lines, 1):
        if start and line == "```":
            found.append((start, "\n".join(lines[start : number - 1]) + "\n"))
            start = 0
        elif not start and line == f"```{language}":
            start = number
    return found


def main() -> int:
    """Run a page; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--into", type=Path, help="folder to work in; default: the page's own")
    arguments = parser.parse_args()
    text, page = arguments.page.read_text(), arguments.page.resolve()
    os.chdir(arguments.into or page.parent)
    matplotlib.use("Agg")
    namespace = {"__name__": "__main__"}
    for line, code in blocks(text):
        try:  # line numbers of the page, by as many empty lines before the code
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        except Exception:
            traceback.print_exc()
            print(f"{arguments.page}:{line}: this block failed", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
