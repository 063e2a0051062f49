# `make demo` and `make test` need Python from 3.10 on, and make; the rest they get themselves, into .venv.
PYTHON ?= python3
RUN := .venv/bin/python
DATA ?= ../shared/data
DESCRIPTION := settings.ini setup.py pyproject.toml
ON_TWO := examples/ddp.py examples/fastai_ddp.py
EXAMPLES := $(filter-out $(ON_TWO), $(wildcard examples/*.py))

.PHONY: demo test lint docs gallery bench science examples wheel clean

demo: .venv/installed
	$(RUN) -m fasterai.demo

test: .venv/installed-dev
	$(RUN) -m pytest -n 2

lint: .venv/installed-dev
	$(RUN) -m ruff check .

docs: .venv/installed-dev
	$(RUN) -W ignore::FutureWarning docs/tables.py
	$(RUN) -W ignore::FutureWarning -m sphinx -q -c docs -d build/doctrees . site
	@echo 'site/index.html'

# draws images/gallery anew
gallery: .venv/installed-dev
	$(RUN) -W ignore::FutureWarning docs/gallery.py

bench: .venv/installed
	$(RUN) benchmarks/speed.py
	$(RUN) benchmarks/deploy.py
	$(RUN) benchmarks/kernels.py
	$(RUN) benchmarks/budgets.py $(if $(wildcard $(DATA)/cifar10),--data $(DATA))

science: .venv/installed-science
	$(RUN) benchmarks/science.py --data $(DATA) $(PARTS)

examples: .venv/installed-examples
	for script in $(EXAMPLES); do echo $$script; OMP_NUM_THREADS=1 $(RUN) $$script || exit 1; done
	for script in $(ON_TWO); do echo $$script; $(RUN) -m torch.distributed.run --standalone --nproc-per-node 2 $$script || exit 1; done

.venv/bin/python:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10) and 'Python 3.10 or newer is needed; try make PYTHON=python3.12')"
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python $(DESCRIPTION)
	$(RUN) -m pip install --quiet --editable '.[deploy]'
	touch $@

.venv/installed-dev: .venv/bin/python $(DESCRIPTION)
	$(RUN) -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/installed

.venv/installed-examples: .venv/bin/python $(DESCRIPTION)
	$(RUN) -m pip install --quiet --editable '.[deploy,examples]'
	touch $@ .venv/installed

.venv/installed-science: .venv/bin/python $(DESCRIPTION)
	$(RUN) -m pip install --quiet --editable '.[deploy,science]'
	touch $@ .venv/installed

# a wheel with the kernels compiled for this kind of machine
wheel: .venv/installed
	$(RUN) -m fasterai.native.prebuilt
	$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf fasterai/native/libraries .venv demo site jupyter_execute build dist *.egg-info
