"""Writes what compiles each csrc/cpu/*/*_kernels.h once per instruction set, for setup.py and for `make sanitize`."""

import sys
from pathlib import Path

# namespace: (floats of a vector, what the compiler may use beyond the least that the processor family has)
INSTRUCTION_SETS = {
    "portable": (4, None),
    "avx2": (8, "avx2,fma"),
    "avx512": (16, "avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512"),
}


def write_sources(directory: Path) -> list[Path]:
    """One small file for each kernel source and instruction set; files that are right already keep their time."""
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for kernels in sorted(Path(__file__).parent.glob("*/*_kernels.h")):
        for isa, (lanes, target) in INSTRUCTION_SETS.items():
            lines = [f"#define MFP_LANES {lanes}", f"#define MFP_ISA {isa}"]
            if target is not None:
                lines.append(f'#define MFP_TARGET "{target}"')
            lines.append(f'#include "cpu/{kernels.parent.name}/{kernels.name}"')
            written.append(directory / f"{kernels.stem}_{isa}.cpp")
            text = "\n".join(lines) + "\n"
            if not written[-1].exists() or written[-1].read_text() != text:
                written[-1].write_text(text)
    for left in set(directory.glob("*.cpp")) - set(written):  # of a kernel that is no more
        left.unlink()
    return written


if __name__ == "__main__":
    write_sources(Path(sys.argv[1]))
