"""Run where a source distribution was installed without compiled parts: it is whole, and plain torch computes.

python .ci/check_sdist.py build/sdist/mfp-VERSION.tar.gz
"""

import subprocess
import sys
import tarfile
import tempfile

with tarfile.open(sys.argv[1]) as archive:
    inside = {name.partition("/")[2] for name in archive.getnames()}
listed = subprocess.run(
    ["git", "ls-files", "csrc", "mfp", "kernels", "setup.py", "pyproject.toml", "LICENSE"],
    capture_output=True, text=True, check=True,
).stdout.split()  # fmt: skip
missing = sorted(set(listed) - inside)
assert listed and not missing, f"the source distribution lacks {missing}"

check = """
import torch, mfp
assert mfp.backend.build_info() is None and mfp.backend.choose(torch.device("cpu")).name == "reference"
model = torch.nn.Sequential(torch.nn.Conv2d(3, 10, 3), torch.nn.ReLU(), torch.nn.Conv2d(10, 2, 1)).eval()
pruner = mfp.FilterPruner(model, rate=0.4)
assert pruner.step(-1).num_pruned == 4
x = torch.randn(2, 3, 8, 8)
small = mfp.compact(model, x)
assert small.get_submodule("0").out_channels == 6
torch.testing.assert_close(small(x), model(x))
mfp.save(small, "small.mfp")
torch.testing.assert_close(mfp.load("small.mfp")(x), small(x))
print("without compiled parts:", mfp.__file__)
"""
with tempfile.TemporaryDirectory() as elsewhere:  # the checkout's own package must not be found
    subprocess.run([sys.executable, "-c", check], check=True, cwd=elsewhere)
    info = subprocess.run(
        [sys.executable, "-m", "mfp", "info"], capture_output=True, text=True, check=True, cwd=elsewhere
    )
assert "to run cpu: install a C++ compiler" in info.stdout, info.stdout
