# Each target does all it needs from a fresh clone: its own environment, pinned torch, the build, the run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.14.1 torchvision==0.29.1
BUILD_TOOLS := numpy ninja pybind11 wheel "setuptools>=77,<82"

# One worker a core; whoever has nothing left to do takes over tests from another.
PYTEST := $(BIN)/python -m pytest -rs --numprocesses logical --maxprocesses 16 --dist worksteal
SECONDS := 120

.PHONY: demo test fuzz zoo browser gpu lint wheel-test sanitize clean

demo: $(VENV)/installed  ## train ResNet-20 on handwritten digits, prune, compact, prove and show what was gained
	$(BIN)/mfp prune

test: $(VENV)/installed browser  ## everything that can be proved on this machine; what is skipped, and why, is listed
	$(PYTEST)

fuzz: $(VENV)/installed  ## the property tests with new random cases, for 120 seconds or SECONDS=...
	timeout $$(($(SECONDS) + 900)) $(PYTEST) --fuzz $(SECONDS)

zoo: $(VENV)/installed  ## compacts many networks of torchvision, timm and others, and prints the table of docs/networks.md
	$(BIN)/python tests/zoo.py

# For the test that looks at the page of `mfp report`. Only root can install packages, and only some systems have apt.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; \
	test "$$(id -u)" = 0 && export DEBIAN_FRONTEND=noninteractive && apt-get -qq update && \
	apt-get -qq -y install --no-install-recommends chromium >/dev/null || \
	echo "no browser here, and none could be installed: tests/test_report.py will skip the test that needs one"

gpu:  ## on a machine with a GPU: build, test and measure with the python and torch that are there (benchmarks/gpu.py)
	$(PYTHON) benchmarks/gpu.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'tests/*.h' 'tests/*.cpp')

# The second environment sees torch and what it needs by links to the first, and nothing else of it.
wheel-test: $(VENV)/installed  ## build a wheel, install it beside a torch that is already there, run the packaging test
	rm -rf dist .venv-wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(BIN)/python -m venv .venv-wheel
	$(BIN)/python .ci/link.py .venv-wheel torch numpy pytest
	.venv-wheel/bin/python -m pip install --quiet dist/mfp-*.whl
	cd tests && ../.venv-wheel/bin/python -m pytest -c /dev/null -q -p no:cacheprovider test_packaging.py

# The CPU kernels without torch, at every instruction set, under AddressSanitizer and UndefinedBehaviorSanitizer.
SANITIZED := $(filter-out %_ops.cpp,$(shell find csrc/cpu -name '*.cpp'))
SANITIZE := -std=c++17 -O1 -g -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall \
	-fsanitize=address,undefined -fno-sanitize-recover=all -Icsrc

sanitize:  ## the CPU kernels over awkward shapes, under sanitizers
	$(PYTHON) csrc/cpu/instruction_sets.py build/kernels
	$(MAKE) build/sanitize/driver
	build/sanitize/driver

build/sanitize/driver: $(patsubst %.cpp,build/sanitize/%.o,$(SANITIZED) $(wildcard build/kernels/*.cpp tests/sanitize/*.cpp))
	$(CXX) $(SANITIZE) $^ -o $@

build/sanitize/%.o: %.cpp $(shell find csrc tests/sanitize -name '*.h')
	@mkdir -p $(@D)
	$(CXX) $(SANITIZE) -c $< -o $@

# The stamp is renewed, and the package rebuilt, when the metadata or a compiled source changes.
$(VENV)/installed: pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH) $(BUILD_TOOLS)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-wheel build dist mfp/*.so
