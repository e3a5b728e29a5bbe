# make demo       prune a small real model and show what became of it: needs nothing but Python
# make test       the tests, in an environment of their own
# make test-vllm  packed folders served by a real vLLM, in an environment of its own (3.5 GB)
# make check      ruff, the type checker and the tests
# make clean      remove what the others made

.PHONY: demo test test-vllm check clean
TESTS ?=

demo: .venv-demo/ready
	.venv-demo/bin/python demo/demo.py

test: .venv/ready
	.venv/bin/python -m pytest -n 2 $(TESTS)

test-vllm: .venv-vllm/tried
	@if [ -e .venv-vllm/ready ]; then .venv-vllm/bin/python -m pytest $(or $(TESTS),tests/vllm); else cat .venv-vllm/why-not; fi

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/python -m pytest -n 2 $(TESTS)

.venv-demo/ready: pyproject.toml
	scripts/install.sh .venv-demo

.venv/ready: pyproject.toml
	scripts/install.sh .venv dev

.venv-vllm/tried: pyproject.toml
	scripts/install-vllm.sh .venv-vllm

clean:
	rm -rf .venv .venv-demo .venv-vllm .demo .pytest_cache .ruff_cache .hypothesis dist
