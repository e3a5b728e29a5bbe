# make demo    prune a small real model and show what became of it: needs nothing but Python
# make test    the tests, in an environment of their own
# make check   ruff, the type checker and the tests
# make clean   remove what the others made

.PHONY: demo test check clean
TESTS ?=

demo: .venv-demo/ready
	.venv-demo/bin/python demo/demo.py

test: .venv/ready
	.venv/bin/python -m pytest -n 2 $(TESTS)

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/python -m pytest -n 2 $(TESTS)

.venv-demo/ready: pyproject.toml
	scripts/install.sh .venv-demo

.venv/ready: pyproject.toml
	scripts/install.sh .venv dev

clean:
	rm -rf .venv .venv-demo .demo .pytest_cache .ruff_cache .hypothesis dist
