# Targets for developers and CI. They need python3 (≥ 3.11) with venv and dev, gcc and make.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check
CORE := $(shell find kubeai -name '*.pyx' -o -name '*.pxd')

.DEFAULT_GOAL := help
.PHONY: help build run test browser coverage check screenshots bench bench-routing \
	bench-headline demo real-engines asan soak docs docs-serve docs-version reference bench-shares \
	release release-check publish compatibility clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

.venv/installed: pyproject.toml setup.py constraints.txt $(CORE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing the build tools"
	$(PIP) install -q -c constraints.txt "setuptools>=77" cython wheel
	@echo "Compiling the core and installing KubeAI, which takes about two minutes at first"
	@KUBEAI_BUILD_PROGRESS=$$(test -t 2 && readlink /proc/self/fd/2) \
		$(PIP) install -q -c constraints.txt --no-build-isolation -e .
	$(BIN)/python -m compileall -q kubeai  # for systems with PYTHONDONTWRITEBYTECODE
	touch $@

# Installs only what an extra adds to the installed distribution: -e would compile the core again.
.venv/installed-%: .venv/installed
	$(PIP) install -q -c constraints.txt 'kubeai-gateway[$*]'
	touch $@

.venv/installed-api .venv/installed-browser .venv/installed-check .venv/installed-clients \
	.venv/installed-coverage: .venv/installed-test
.venv/installed-check: .venv/installed-release

build: .venv/installed  ## create the virtual environment and compile the core

run: build  ## run kubeai local with examples/; PORT=9000 ARGS="--workers 2"
	$(BIN)/kubeai local examples --data-dir .kubeai $(if $(PORT),--port $(PORT)) $(ARGS)

# Four processes on two cores, because many tests wait for child processes. By default, xdist begins
# with the files with most tests, which are not those that take longest. Each process would compile all
# tests where the environment sets PYTHONDONTWRITEBYTECODE, which takes 10 s or more of CPU.
TEST_ENVIRONMENT := PYTHONDONTWRITEBYTECODE= SSL_CERT_FILE=$(CURDIR)/tests/ca.crt
TESTS := tests --ignore tests/docs -n 4 --dist loadfile --no-loadscope-reorder -rfE \
	-m "not broker and not browser and not clients and not docs and not image and not package and not nginx \
		and not slow and not upstream"

test: .venv/installed-test  ## run the tests that need only Python; .ci/run adds the slow ones
	$(TEST_ENVIRONMENT) $(BIN)/pytest $(TESTS)

coverage: .venv/installed-coverage  ## run the tests of `make test` and report the Python coverage
	rm -rf build/coverage
	$(TEST_ENVIRONMENT) $(BIN)/coverage run -m pytest $(TESTS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

check: .venv/installed-check  ## fast checks: style, sizes, types, import layers, C warnings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --config-file tests/mypy.toml
	$(BIN)/lint-imports --no-cache
	$(BIN)/python .ci/words.py
	$(BIN)/python .ci/sizes.py
	KUBEAI_CYTHON_STRICT=1 $(BIN)/python setup.py -q build_ext --force \
		--build-temp build/strict --build-lib build/strict-lib
	$(BIN)/python -m mypy.stubtest --ignore-disjoint-bases --allowlist .ci/stubtest.txt \
		$(subst /,.,$(basename $(filter %.pyx,$(CORE))))
	$(BIN)/python -m kubeai crd | diff charts/kubeai/files/kubeai.org_models.yaml -
	$(BIN)/python charts/values_schema.py | diff charts/kubeai/values.schema.json -
	$(BIN)/python charts/values_schema.py fields | diff charts/kubeai/files/fields.json -
	$(BIN)/python charts/values_schema.py fields open-webui \
		| diff charts/kubeai/charts/open-webui/files/fields.json -
	$(BIN)/python charts/models_schema.py | diff charts/models/values.schema.json -
	$(BIN)/python docs/generate --check

reference: .venv/installed  ## write the generated pages of docs/reference
	$(BIN)/python docs/generate

# Mermaid draws the diagrams in the browser. npm fetches it; the digest is checked.
MERMAID_VERSION := 11.17.2
MERMAID_SHA256 := 581ed7d74bd9048d0e3a91363927d72ef22942d7722546b27f7cc29e35390eb8
MERMAID := build/docs/mermaid-$(MERMAID_VERSION).min.js
$(MERMAID):
	mkdir -p build/docs
	cd build/docs && npm pack --silent mermaid@$(MERMAID_VERSION)
	tar -xzOf build/docs/mermaid-$(MERMAID_VERSION).tgz package/dist/mermaid.min.js >$@.new
	echo "$(MERMAID_SHA256)  $@.new" | sha256sum --check --quiet
	rm build/docs/mermaid-$(MERMAID_VERSION).tgz
	mv $@.new $@

# The same sources give the same bytes: times are those of the commit.
MKDOCS = NO_MKDOCS_2_WARNING=1 MERMAID=$(MERMAID) \
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)}
docs: .venv/installed-docs $(MERMAID)  ## build the documentation's site in build/site
	$(MKDOCS) $(BIN)/mkdocs build --strict

docs-serve: .venv/installed-docs $(MERMAID)  ## serve the documentation while you write, at port 8001
	$(MKDOCS) $(BIN)/mkdocs serve --dev-addr 127.0.0.1:8001

# PUSH=1 pushes the branch. ALIASES are further names of the version.
DOCS_BRANCH ?= site
docs-version: .venv/installed-docs $(MERMAID)  ## add VERSION=… of the site to the branch DOCS_BRANCH, for mike
	@test -n "$(VERSION)" || { echo "set VERSION, such as VERSION=1.2" >&2; exit 2; }
	$(MKDOCS) $(BIN)/mike deploy --branch $(DOCS_BRANCH) --update-aliases --alias-type copy \
		$(if $(PUSH),--push) "$(VERSION)" $(ALIASES)

screenshots: .venv/installed-browser  ## make the pictures in docs/how-to/console; needs Chromium
	$(BIN)/python docs/screenshots.py

browser: .venv/installed-browser  ## test the console, and the site of `make docs`, in Chromium
	$(BIN)/pytest tests/browser -n 2 --dist loadfile

bench: .venv/installed-test  ## run all benchmarks and write docs/explain/performance.md
	mkdir -p build/bench
	$(BIN)/pytest bench --benchmark-enable --benchmark-only --benchmark-json build/bench/micro.json
	$(BIN)/python bench/gateway_vs_nginx.py --json build/bench/gateway.json
	$(BIN)/python bench/gateway_vs_nginx.py --only chat --keys 10000 --json build/bench/keys.json
	$(BIN)/python bench/gateway_at_scale.py --json build/bench/scale.json
	$(BIN)/python bench/stall.py --json build/bench/stall.json
	BROKERS=$$(tests/brokers/build.sh || true) \
		$(BIN)/python bench/messages.py --json build/bench/messages.json
	$(BIN)/python bench/instructions.py --json build/bench/instructions.json
	KUBEBUILDER_ASSETS=$$(tests/cluster/build.sh || true) \
		$(BIN)/python bench/control_plane.py --json build/bench/control.json
	$(BIN)/python bench/report.py build/bench docs/explain/performance.md

bench-routing: .venv/installed-test  ## compare the strategies on simulated engines; TRACE=FILE
	$(BIN)/python bench/routing.py $(if $(TRACE),--trace $(TRACE))

bench-shares: .venv/installed-test  ## compare the strategies by how much of a prompt was sent before
	$(BIN)/python bench/shares.py

bench-headline: .venv/installed-test  ## simulate the gain of prefix routing
	$(BIN)/python bench/headline.py

DEMO_HTML ?= build/demo.html
demo: .venv/installed  ## show what prefix routing gains, in two minutes on mock engines; writes a page
	$(BIN)/kubeai bench demo --html $(DEMO_HTML)

real-engines: .venv/installed-clients  ## check real engines behind kubeai local; ENGINES="VLLM OLlama"; writes docs
	PYTHONPATH=tests $(BIN)/python tests/real_engines $(ENGINES) $(ARGS)

asan: .venv/installed-test  ## run the compiled core's tests under AddressSanitizer
	tests/asan.sh

soak: .venv/installed-test .venv/installed-api  ## run long fuzz and hammer tests, and mixed load for SOAK_SECONDS (600)
	OTHER_EXAMPLES=1 EXAMPLES_FACTOR=20 $(BIN)/pytest --timeout 600 \
		$$(grep -rl "from hypothesis" tests/unit --include="test_*.py")
	OTHER_EXAMPLES=1 FUZZ_EXAMPLES=10000 $(BIN)/pytest tests/fuzz -m "not slow"
	OTHER_EXAMPLES=1 API_EXAMPLES=100 $(BIN)/pytest tests/fuzz -m slow
	HAMMER_SEEDS=20 $(BIN)/pytest tests/hammer
	CRASH_STEP=1 $(BIN)/pytest tests/contract/test_crash.py
	OUTAGE_S=30 $(BIN)/pytest tests/contract/test_replicas.py
	$(BIN)/python tests/soak/soak.py

# PARTS, PYTHONS and ARCHITECTURES restrict what is built; GPG_KEY signs the checksums.
RELEASE := $(if $(PARTS),--parts "$(PARTS)") $(if $(PYTHONS),--pythons "$(PYTHONS)") \
	$(if $(ARCHITECTURES),--architectures "$(ARCHITECTURES)")
release: .venv/installed-release  ## build and check a release in dist/VERSION; VERSION=1.2.3
	$(BIN)/python -m release build "$(VERSION)" $(RELEASE)

release-check: .venv/installed-release  ## build a release twice and compare the bytes; VERSION=1.2.3
	$(BIN)/python -m release check "$(VERSION)" $(RELEASE)

publish: .venv/installed-release  ## push dist/VERSION to registries; VERSION=1.2.3 IMAGE=… CHARTS=…
	$(BIN)/python -m release publish "$(VERSION)" $(if $(IMAGE),--image "$(IMAGE)") \
		$(if $(CHARTS),--charts "$(CHARTS)") $(if $(PLAIN_HTTP),--plain-http)

compatibility: .venv/installed-release  ## list removals since the last release, or since BASE=v1.2.3
	$(BIN)/python -m release compatibility $(BASE)

clean:  ## delete everything that was built
	rm -rf .venv build dist *.egg-info .kubeai
	find kubeai -name '*.so' -o -name '_*.c' | xargs rm -f
