"""What the choice for residual streams costs in accuracy: the demo's run in each form, with several seeds.

    python benchmarks/residual_forms.py [--seeds 0,1] [--json benchmarks/results/residual-forms.json]

Each run is `mfp prune --residual FORM --seed SEED` (ResNet-20 on digits); one that is complete in --output is not made
again. The accuracies are of the test images, for the table alone.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from mfp.bench import results

FORMS = ("index", "keep", "coupled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1", help="numbers with commas")
    parser.add_argument("--output", type=Path, default=Path("runs/residual-forms"), help="folder of the runs")
    parser.add_argument("--json", type=Path, help="result file")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds.split(","):
        for form in FORMS:
            run = options.output / f"{form}-{seed}"
            if not (run / "result.json").exists():
                command = [sys.executable, "-m", "mfp", "prune", "--residual", form, "--seed", seed, "--output", run]
                subprocess.run([*command, *(["--resume"] if run.exists() else [])], check=True)
            found = json.loads((run / "result.json").read_text())
            dense, small = found["dense"], found["compact"]
            rows.append({
                "residual": form, "seed": int(seed), "dense_top1": dense["top1"], "top1": small["top1"],
                "flops_kept": small["flops"] / dense["flops"],
                "parameters_kept": small["parameters"] / dense["parameters"],
            })  # fmt: skip
            print(rows[-1], flush=True)
    if options.json:
        results.write(options.json, "python benchmarks/residual_forms.py", rows)


if __name__ == "__main__":
    main()
