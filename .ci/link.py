"""Makes packages of this environment visible in another one by links, so that torch need not be installed twice.

python .ci/link.py .venv-other torch numpy    links these and what they require; nothing else of here is seen there
"""

import sys
import sysconfig
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement


def add(requirement: Requirement, found: dict[tuple, Distribution]) -> None:
    """The distribution that is required, with the extras asked for, and all that it requires."""
    key = (requirement.name.lower(), *sorted(requirement.extras))
    if key not in found:
        found[key] = distribution(requirement.name)
        for line in found[key].requires or ():
            needed = Requirement(line)
            if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)):
                add(needed, found)


def main() -> None:
    environment, *names = sys.argv[1:]
    target = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": environment}))
    found: dict[tuple, Distribution] = {}
    for name in names:
        add(Requirement(name), found)
    there = {package.name.lower() for package in distributions(path=[str(target)])}
    for package in found.values():
        if package.name.lower() in there:
            continue
        for first in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
            link = target / first
            if not link.exists():
                link.symlink_to(Path(package.locate_file(first)).resolve())


if __name__ == "__main__":
    main()
