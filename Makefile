# Run with any Python: make PYTHON=/path/to/python build
PYTHON ?= $(shell command -v python || command -v python3)
CHECK_MANAGED = import os, sys, sysconfig as s; \
  managed = os.path.exists(os.path.join(s.get_path("stdlib"), "EXTERNALLY-MANAGED")); \
  print("yes" if managed and sys.prefix == sys.base_prefix else "no")
# A Python that the system manages (PEP 668) is left alone: .venv is made and used instead.
MANAGED := $(shell $(PYTHON) -c '$(CHECK_MANAGED)')
PY := $(if $(filter yes,$(MANAGED)),.venv/bin/python,$(PYTHON))
FUZZ_SECONDS ?= 600
CXX_FILES := $(wildcard csrc/*.cpp csrc/*.h tests/*.cpp)

# $(call stage,what it does,command): says both, runs it, says how long it took.
define stage
	@echo; echo "== $(1)"; echo "$(2)" | sed 's|^|   |'
	@start=$$(date +%s); $(2) && echo "   -- $$(($$(date +%s) - start)) s"
endef
ENCODER = runs/demo/encoder.safetensors

.PHONY: help build build-test test lint fuzz bench demo proof clean codecs environment
help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

environment:
ifeq ($(MANAGED),yes)
	@echo "$(PYTHON) is managed by the system: using .venv (to type 'python ...' as in the README: source .venv/bin/activate)"
	@test -x .venv/bin/pip || $(PYTHON) -m venv .venv
endif

codecs:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  ! { [ -e /usr/include/libdeflate.h ] && [ -e /usr/include/zstd.h ]; }; then \
	  { apt-get update -qq && apt-get install -y -qq libdeflate-dev libzstd-dev; } >/dev/null 2>&1 \
	  || echo "libdeflate-dev and libzstd-dev could not be installed: going on without"; fi

build: environment codecs  ## install the dependencies and the extension into the active Python
	@echo "installing into $$($(PY) -c 'import sys; print(sys.prefix)') (PyTorch: some minutes the first time)"
	$(PY) -m pip install --quiet --disable-pip-version-check --editable .
	@$(PY) -c 'import bandcrop; print("bandcrop reads:", ", ".join(bandcrop.codecs()))'

build-test: environment codecs
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[test]'

test: build-test  ## build, then run all tests
	$(PY) -m pytest -q

DEMO_PROBE = $(PY) probe.py --dataset eurosat --root data/demo/eurosat --arch resnet18 --size 64 --band all --head knn --seeds 5 --out results/demo
DEMO_SEGMENT = $(PY) segment.py --dataset dfc2020 --root data/demo/dfc2020 --band NIR --arch resnet18 --size 64 --num-images 24 --epochs 30 --maps 4 --out results/demo

demo: build  ## everything once on synthetic tiles, one page: 4 to 15 minutes
	@rm -rf runs/demo results/demo
	$(call stage,Synthetic tiles in the layouts of the real archives,$(PY) tests/synthetic.py data/demo --pairs 1280 --size 64)
	$(call stage,Pre-training: a MS band against a SAR polarisation,$(PY) pretrain.py --mode single --recipe small --root data/demo/sen12ms --arch resnet18 --size 32 --batch-size 128 --lr 0.1 --crop-area 0.3 --epochs 40 --restart-epochs 40 --out runs/demo)
	$(call stage,Probe of twelve hand-made statistics for each band,$(DEMO_PROBE) --weights stats)
	$(call stage,Probe of a random encoder for each band,$(DEMO_PROBE) --weights random)
	$(call stage,Probe of the pre-trained encoder for each band,$(DEMO_PROBE) --bn reestimate --weights $(ENCODER))
	$(call stage,Land cover from a random encoder,$(DEMO_SEGMENT) --weights random)
	$(call stage,Land cover from the pre-trained encoder,$(DEMO_SEGMENT) --weights $(ENCODER))
	$(call stage,Tables and tests and plots and one page,$(PY) analyze.py results/demo --runs runs/demo --out report/demo)
	@echo; echo "In five such demos, a seed each, the pre-trained encoder was above a random one every time, by"; \
	echo "0.04 to 0.07, and hand-made statistics were above both (tests/PROOF.md). This one: see above, and"; \
	echo "look at report/demo/index.html"

lint: environment  ## ruff and clang-format
	$(PY) -m pip install --quiet --disable-pip-version-check ruff clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c 'from clang_format import clang_format; clang_format()' --dry-run -Werror $(CXX_FILES)

fuzz: build-test  ## the reader under mutated files, sanitizers and, where clang is there, libFuzzer
	MUTATIONS=120000 $(PY) -m pytest -q -m '' -k 'sanitizer or missing_codec' tests/test_attack.py tests/test_codecs.py
	@clang=$$(command -v clang++ || command -v clang++-14) || { echo "no clang++: libFuzzer skipped"; exit 0; }; \
	mkdir -p build/corpus && $(PY) tests/test_attack.py seeds build/corpus >/dev/null && \
	$$clang -std=c++17 -O2 -g -Wno-psabi -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  -DBANDCROP_LIBDEFLATE -DBANDCROP_ZSTD -Icsrc -o build/fuzz_reader tests/fuzz_reader.cpp \
	  csrc/tiff.cpp csrc/decode.cpp csrc/resample.cpp -ldeflate -lzstd && \
	build/fuzz_reader -max_len=6000 -timeout=20 -malloc_limit_mb=512 -max_total_time=$(FUZZ_SECONDS) build/corpus

bench: build-test  ## speed of loader, training and probe beside others, as ratios
	$(PY) tests/bench_loader.py
	$(PY) tests/bench_train.py

proof: build  ## pre-train and judge on real images, as tests/PROOF.md reports: hours
	tests/proof.sh $(PY)

clean:  ## remove what make built; data, runs, results and the report stay
	rm -rf build dist *.egg-info *.so csrc/bandcrop/*.so .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
