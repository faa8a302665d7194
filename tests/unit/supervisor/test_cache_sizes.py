"""The size of each engine's cache reaches the prefix index, whatever an engine reports."""

import asyncio

import pytest
from fakes.wire import Engine, answer, until

from kubeai._load import LoadTable
from kubeai._prefix import PrefixIndex
from kubeai.routing.publisher import CACHE_TOKENS, Publisher
from kubeai.routing.routes import Endpoint, Route
from kubeai.supervisor import cache_sizes
from kubeai.supervisor.cache_sizes import (
    CacheSizes,
    SizeUnknown,
    cache_tokens,
    sglang_cache_tokens,
)

BLOCK = 7  # the hash of a block


def info(**labels):
    text = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"vllm:cache_config_info{{{text}}} 1.0\n"


PLAIN = info(block_size=16, num_gpu_blocks=100, engine=0, enable_prefix_caching=True)
PAGE = (
    "# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig\n"
    "# TYPE vllm:cache_config_info gauge\n"
    f"{PLAIN}"
    'vllm:num_requests_running{engine="0"} 0.0\n'
)


async def hang(wire, _):
    """An engine that never answers."""
    await asyncio.Event().wait()


class World:
    """The prefix index of a supervisor, and engines with ``/metrics``."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(cache_sizes, "RETRY_FIRST_S", 0.001)
        self.index = PrefixIndex.create(32, 1024)
        self.publisher = Publisher(LoadTable.create(32, 1), self.index)
        self.sizes = CacheSizes(self.index, self.publisher)
        self.engines = []

    async def engine(self, *pages, status=200):
        """An engine that answers with these pages in turn, then always with the last one."""
        left = list(pages)

        async def script(wire, _):
            page = left.pop(0) if len(left) > 1 else left[0]
            if page is None:
                wire.close()
            else:
                await wire.send(answer(status, page.encode()))

        engine = await Engine(script).start()
        self.engines.append(engine)
        return engine

    def route(self, *engines, kind="VLLM", strategy="PrefixCache"):
        """Route a model to pods with these engines; return their rows."""
        endpoints = tuple(Endpoint(f"pod-{n}", e.address) for n, e in enumerate(engines))
        self.publisher.update("m", Route("m", kind, strategy=strategy, endpoints=endpoints))
        self.sizes.rerouted("m")
        rows = self.publisher.endpoint_rows("m")
        return [rows[each.name] for each in endpoints]

    async def read(self, row):
        """Wait until an endpoint's size has been read, or given up."""
        route = self.publisher.route("m")
        lease = next((e.row, e.generation) for e in route.endpoints if e.row == row)
        await self.sizes._reads["m"][lease]

    def holds(self, row, tokens):
        """Whether a block is still found after ``tokens`` others have been sent to the endpoint."""
        self.index.note(row, [BLOCK], 0)
        self.index.note(row, [BLOCK + 1], tokens)
        return row in self.index.find([BLOCK])


@pytest.fixture
async def world(monkeypatch):
    world = World(monkeypatch)
    yield world
    await world.sizes.close()
    for engine in world.engines:
        await engine.stop()


async def test_an_endpoint_has_the_size_that_its_engine_reports(world):
    (row,) = world.route(await world.engine(PAGE))
    await world.read(row)
    assert world.holds(row, 1_500)
    assert not world.holds(row, 1_700)


async def test_each_endpoint_is_asked_once(world):
    first, second = await world.engine(PAGE), await world.engine(PAGE)
    (row,) = world.route(first)
    await world.read(row)
    rows = world.route(first, second)
    for row in rows:
        await world.read(row)
    assert [request.target for request in first.requests] == ["/metrics"]
    assert len(second.requests) == 1


async def test_an_endpoint_without_prefix_caching_is_never_found(world):
    (row,) = world.route(await world.engine(info(enable_prefix_caching=False)))
    await world.read(row)
    assert not world.holds(row, 0)


SGLANG = 'sglang:max_total_num_tokens{model_name="m",tp_rank="0"} 1600.0\n'


async def test_sglang_reports_its_size_by_another_name(world):
    (row,) = world.route(await world.engine(SGLANG), kind="SGLang")
    await world.read(row)
    assert world.holds(row, 1_500)
    assert not world.holds(row, 1_700)


@pytest.mark.parametrize(
    ("samples", "tokens"),
    [
        ([("0", "0", 100)], 100),
        ([("0", "0", 100), ("0", "1", 100)], 100),  # tensor parallelism
        ([("0", "0", 100), ("1", "0", 200)], 300),  # data parallelism
    ],
)
def test_the_ranks_of_sglang_share_a_cache_or_have_their_own(samples, tokens):
    text = "".join(
        f'sglang:max_total_num_tokens{{dp_rank="{dp}",tp_rank="{tp}"}} {value}.0\n'
        for dp, tp, value in samples
    )
    assert sglang_cache_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "sglang:max_total_num_tokens NaN\n", SGLANG[:30]])
def test_a_page_of_sglang_without_the_size_is_unknown(text):
    with pytest.raises(SizeUnknown, match="sglang:max_total_num_tokens"):
        sglang_cache_tokens(text)


@pytest.mark.parametrize("kind", ["OLlama", "LlamaCpp", "Infinity"])
async def test_other_engines_are_not_asked(world, kind):
    engine = await world.engine(PAGE)
    world.route(engine, kind=kind)
    await asyncio.sleep(0)
    assert engine.connections == 0


async def test_an_endpoint_is_asked_once_its_model_has_the_strategy_prefix_cache(world):
    engine = await world.engine(PAGE)
    world.route(engine, strategy="PrefixHash")
    assert not world.sizes._reads
    (row,) = world.route(engine)
    await world.read(row)
    assert world.holds(row, 1_500)


async def test_a_failed_read_is_repeated(world):
    engine = await world.engine(None, "", PAGE)
    (row,) = world.route(engine)
    await world.read(row)
    assert not world.holds(row, 1_700)
    assert len(engine.requests) == 3


@pytest.mark.parametrize(
    ("page", "status"),
    [
        ("", 200),
        ("vllm:cache_config_info{", 200),
        (PAGE, 302),
        (PAGE, 404),
        (PAGE, 500),
        ("vllm:cache_config_info" + "x" * (1 << 20), 200),
        (info(block_size="many", num_gpu_blocks=100), 200),
        (info(block_size=16, num_gpu_blocks=1 << 40), 200),
        (info(block_size=16, num_gpu_blocks=-1), 200),
        (info(block_size=16, num_gpu_blocks=0), 200),
        (info(block_size=16), 200),
        (info(kv_cache_size_tokens="1e9", num_gpu_blocks=1, block_size=16), 200),
    ],
)
async def test_an_endpoint_whose_size_is_unknown_keeps_the_default(world, page, status):
    engine = await world.engine(page, status=status)
    (row,) = world.route(engine)
    await world.read(row)
    assert len(engine.requests) == cache_sizes.ATTEMPTS_MAX
    assert world.holds(row, CACHE_TOKENS - 1_000)
    assert not world.holds(row, CACHE_TOKENS + 1_000)


async def test_a_page_without_an_end_is_given_up(world, monkeypatch):
    monkeypatch.setattr(cache_sizes, "METRICS_MAX_BYTES", 100_000)
    (row,) = world.route(await world.engine("# comment\n" * 20_000 + PAGE))
    await world.read(row)
    assert world.holds(row, CACHE_TOKENS - 1_000)


async def test_a_hung_engine_does_not_keep_another_from_being_read(world):
    hung = [await Engine(hang).start() for _ in range(cache_sizes.READS_MAX - 1)]
    world.engines += hung
    *_, row = world.route(*hung, await world.engine(PAGE))
    await world.read(row)
    assert not world.holds(row, 1_700)


async def test_an_endpoint_that_is_gone_is_no_longer_read(world):
    engine = await Engine(hang).start()
    world.engines.append(engine)
    world.route(engine)
    (task,) = world.sizes._reads["m"].values()
    await until(lambda: engine.requests)
    world.route()
    await until(task.done)
    assert task.cancelled()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (PAGE, 1_600),
        # Layers that differ in their cache: blocks × block size would be too many.
        (info(engine=0, block_size=16, num_gpu_blocks=100, kv_cache_size_tokens=900), 900),
        (info(engine=0, block_size=16, num_gpu_blocks=100, kv_cache_size_tokens=None), 1_600),
        # Data parallelism: the blocks are those of all engines, the tokens those of one.
        (
            info(engine=0, block_size=16, num_gpu_blocks=200, kv_cache_size_tokens=1_600)
            + info(engine=1, block_size=16, num_gpu_blocks=200, kv_cache_size_tokens=1_600),
            3_200,
        ),
        (
            info(engine=0, block_size=16, num_gpu_blocks=200)
            + info(engine=1, block_size=16, num_gpu_blocks=200),
            3_200,
        ),
        # The same engine, once for each process that answers requests.
        (PLAIN + PLAIN, 1_600),
        (info(enable_prefix_caching=False, block_size=16, num_gpu_blocks=100), 0),
    ],
)
def test_the_size_follows_from_the_metric(text, tokens):
    assert cache_tokens(text) == tokens


def test_no_metric_is_no_size():
    with pytest.raises(SizeUnknown, match="has no vllm:cache_config_info"):
        cache_tokens("")
