# Each target does all it needs from a fresh clone: its own environment, pinned torch, the build, the run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.14.1 torchvision==0.29.1
BUILD_TOOLS := numpy ninja pybind11 wheel "setuptools>=77,<82"

# The oldest that is supported, as on the machine whose GPU is used; Triton 3.6's interpreter needs the older numpy.
OLDEST := .venv-oldest
OLDEST_PYTHON ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python $(PYTHON); do \
	$$python -c "" 2>/dev/null && echo $$python && break; done)
OLDEST_TORCH := torch==2.11.0 torchvision==0.26.0 "numpy<2.4"
OLDEST_TESTS := pytest pytest-benchmark pytest-xdist hypothesis scipy timm transformers
CORE := ops versions scores mask optim scatter serving serving_norm_excite conv conv_groups pointwise_depthwise norm_excite plan \
	pruner allocation files export compact compact_* cuda_logic compile_cuda triton_logic triton_compile

# One worker a core; whoever has nothing left to do takes over tests from another.
WORKERS := --numprocesses logical --maxprocesses 16 --dist worksteal
PYTEST := $(BIN)/python -m pytest -rs $(WORKERS)
SECONDS := 120

.PHONY: demo test oldest fuzz zoo browser gpu figures docs types results lint wheel-test sdist-test sanitize clean

demo: $(VENV)/installed  ## train ResNet-20 on handwritten digits, prune, compact, prove and show what was gained
	$(BIN)/mfp prune

test: $(VENV)/installed browser  ## everything that can be proved on this machine; what is skipped, and why, is listed
	$(PYTEST)

# 5 GB of packages. CI runs a part of these tests; before a release, and after a change to a kernel or to what is
# captured, run all of them. Without Python 3.12 it takes the python3 that is there.
oldest: $(OLDEST)/installed  ## the core tests with Python 3.12, torch 2.11 and Triton 3.6, in an environment of their own
	$(OLDEST)/bin/python -m pytest -rs $(WORKERS) $(CORE:%=tests/test_%.py)

fuzz: $(VENV)/installed  ## the property tests with new random cases, for 120 seconds or SECONDS=...
	timeout $$(($(SECONDS) + 900)) $(PYTEST) --fuzz $(SECONDS)

zoo: $(VENV)/installed  ## compacts many networks of torchvision, timm and others, and prints the table of docs/networks.md
	$(BIN)/python tests/zoo.py $(ARGS)

# For the test that looks at the page of `mfp report`. Only root can install packages, and only some systems have apt.
browser:
	@for name in chromium chromium-browser google-chrome; do command -v $$name && exit; done; \
	test "$$(id -u)" = 0 && export DEBIAN_FRONTEND=noninteractive && apt-get -qq update && \
	apt-get -qq -y install --no-install-recommends chromium >/dev/null || \
	echo "no browser here, and none could be installed: tests/test_report.py will skip the test that needs one"

gpu:  ## on a machine with a GPU: build, test and measure with the python and torch that are there; else ARGS=--dry-run
	$(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py $(ARGS)

figures: $(VENV)/installed  ## the tables and charts of README and docs, from benchmarks/results/
	$(BIN)/python benchmarks/figures.py

docs: $(VENV)/installed  ## the site, in build/site; a broken link or a missing docstring is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

types: $(VENV)/installed
	$(BIN)/python -m mypy

# On an idle machine; a file may also be measured by itself (docs/benchmarks.md), then `make figures`.
RESULTS := benchmarks/results
results: $(VENV)/installed  ## measure all of benchmarks/results/ anew, and write the documents
	$(BIN)/mfp bench --json $(RESULTS)/scoring.json
	$(BIN)/mfp bench --overhead --json $(RESULTS)/overhead.json
	$(BIN)/mfp bench --training --json $(RESULTS)/training-resnet50.json
	$(BIN)/mfp bench --training --arch resnet18 --json $(RESULTS)/training-resnet18.json
	$(BIN)/mfp bench --training --arch resnet20 --batch 128 --json $(RESULTS)/training-resnet20.json
	$(BIN)/mfp bench --compact --batch 1,8 --json $(RESULTS)/compact.json
	for arch in resnet18 resnet34 resnet50 resnet101 vgg16_bn densenet121 efficientnet_b0 mobilenet_v2 \
		regnet_y_400mf; do \
		$(BIN)/mfp bench --engines --arch $$arch --json $(RESULTS)/engines-$$arch.json || exit; done
	$(BIN)/mfp bench --engines openvino,torch.compile --arch resnet18 --batch 8 --json $(RESULTS)/engines-torch-compile.json
	$(BIN)/mfp bench --layers --arch resnet50 --batch 1 --residual keep --json $(RESULTS)/layers-resnet50.json
	for arch in resnet18 densenet121 efficientnet_b0; do \
		$(BIN)/mfp bench --layers --arch $$arch --batch 8 --residual keep --json $(RESULTS)/layers-$$arch.json || exit; done
	for arch in mobilenet_v2 regnet_y_400mf; do \
		$(BIN)/mfp bench --layers --arch $$arch --batch 8 --residual coupled --json $(RESULTS)/layers-$$arch.json || exit; done
	$(BIN)/python benchmarks/compare_torch_pruning.py resnet18 resnet50 mobilenet_v2 regnet_y_400mf \
		--json $(RESULTS)/torch_pruning.json
	$(BIN)/python benchmarks/residual_forms.py --json $(RESULTS)/residual-forms.json
	rm -rf runs/demo && $(BIN)/mfp prune --output runs/demo
	$(BIN)/python benchmarks/figures.py --demo runs/demo --eight-bits runs/residual-forms/coupled-0

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

# A source distribution has all that is compiled, and installs where nothing can be compiled.
sdist-test: $(VENV)/installed
	rm -rf build/sdist .venv-sdist
	$(BIN)/python -m build --sdist --no-isolation --outdir build/sdist . >/dev/null
	$(BIN)/python -m venv .venv-sdist
	$(BIN)/python .ci/link.py .venv-sdist torch numpy
	MFP_EXTENSION=0 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/sdist \
		build/sdist/mfp-*.tar.gz
	.venv-sdist/bin/python -m pip install --quiet build/sdist/mfp-*.whl
	.venv-sdist/bin/python .ci/check_sdist.py build/sdist/mfp-*.tar.gz

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

$(OLDEST)/installed: pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')
	test -x $(OLDEST)/bin/python || $(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet $(OLDEST_TORCH) $(BUILD_TOOLS)
	$(OLDEST)/bin/python -m pip install --quiet --no-build-isolation --editable ".[train,onnx,openvino]" $(OLDEST_TORCH) \
		$(OLDEST_TESTS)
	touch $@

clean:
	rm -rf $(VENV) .venv-wheel .venv-sdist $(OLDEST) build dist mfp/*.so
