# Every target that needs the environment makes it first; if it is up to date, that takes milliseconds and no network.
PYTHON := .venv/bin/python

.PHONY: help setup demo testbed test lint check docs bench bench-smoke protos constraints lock clean

help:
	@echo "make setup        make .venv with everything the project needs (downloads about 0.7 GB, needs no root)"
	@echo "make demo         fine-tune a real model, split over processes, on this machine: minutes"
	@echo "                  ARGS=... is passed to 'edgelam demo', for example: make demo ARGS='--devices 1'"
	@echo "make testbed      run the demo in containers as small and as slow as boards; needs a Docker engine"
	@echo "                  ARGS=... is passed to 'python -m testbed run', for example: make testbed ARGS='--devices 2'"
	@echo "make test         run all tests"
	@echo "make lint         check format, lint, types and import contracts"
	@echo "make check        before a commit: make lint, and the tests that need no processes and no real model"
	@echo "make docs         build the site in site/; checks every link and anchor"
	@echo "make bench        train side by side with what others use, and measure links and scale: 25 minutes of a quiet machine"
	@echo "make bench-smoke  run three tiny cells of \`edgelam bench\`: minutes"
	@echo "make protos       regenerate the protobuf code and docs/protocol.md from edgelam_fl/wire/edgelam.proto"
	@echo "make constraints  record the versions in .venv as the tested ones"
	@echo "make lock         record versions and hashes of what boards get, after a change of dependencies or tested versions"
	@echo "make clean        remove .venv, caches and builds (runs/ stay)"

setup:
	@sh tools/setup.sh

demo: setup
	@HF_HUB_OFFLINE=1 .venv/bin/edgelam demo $(ARGS)

testbed: setup
	@HF_HUB_OFFLINE=1 $(PYTHON) -m testbed run $(ARGS)

# More workers than a small machine has cores, because federations wait more than they compute. Bytecode is kept: else each
# worker would rewrite the asserts of all tests for itself, and each of a hundred processes would compile the package again.
test: setup
	@env -u PYTHONDONTWRITEBYTECODE $(PYTHON) -m pytest -n 4 $(ARGS)

lint: setup
	@$(PYTHON) -m ruff format --check
	@$(PYTHON) -m ruff check
	@$(PYTHON) -m mypy
	@.venv/bin/lint-imports

check: lint
	@$(PYTHON) -m pytest -q -n 2 -m "not processes and not real_model" tests/unit tests/contract

docs: setup
	@$(PYTHON) tools/figures.py README.md $$(find docs -name '*.md')
	@NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --quiet
	@echo "site/index.html"

# One after the other: each measures time, and draws a plot beside its result.
bench: setup
	@for name in side_by_side paced scale link_cost; do \
		HF_HUB_OFFLINE=1 $(PYTHON) -m benchmarks.$$name || exit 1; \
	done
	@$(PYTHON) tools/figures.py --write README.md $$(find docs -name '*.md')

bench-smoke: setup
	@rm -rf runs/bench-smoke
	@HF_HUB_OFFLINE=1 .venv/bin/edgelam bench benchmarks/matrices/smoke.toml

protos: setup
	$(PYTHON) -m grpc_tools.protoc -I edgelam_fl/wire --python_out=edgelam_fl/wire --pyi_out=edgelam_fl/wire \
		edgelam_fl/wire/edgelam.proto
	$(PYTHON) -m tools.protocol_page

# torch is left out because constraints/torch.txt pins it by platform.
constraints: setup
	@echo "# The versions that the tests ran with; written by \`make constraints\`." > constraints/tested.new
	@.venv/bin/uv pip freeze --python $(PYTHON) --exclude-editable 2>/dev/null \
		| grep -E '^[A-Za-z0-9._-]+==' | grep -vE '^(torch|triton|pip|setuptools|nvidia-.*)==' >> constraints/tested.new
	@mv constraints/tested.new constraints/tested.txt

lock: setup
	@$(PYTHON) -m tools.board_lock

clean:
	rm -rf .venv dist build site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
