"""The usage of keys is stored once, whatever happens to a write, and by several replicas."""

import asyncio
import random

import pytest
from fakes.kube import FakeKube
from hypothesis import given, settings
from hypothesis import strategies as st

from kubeai.api.usage import USAGE_SELECTOR, KeyUsage, UsageCounts, decode_usage, total_usage
from kubeai.kube.errors import ApiError
from kubeai.kube.resources import CONFIGMAPS
from kubeai.routing.usage import UsageReport, UsageRow
from kubeai.supervisor.usage import shards
from kubeai.supervisor.usage.book import FLUSH_INTERVAL_S, FLUSH_JITTER, UsageBook
from kubeai.supervisor.usage.ledger import UsageLedger
from kubeai.supervisor.usage.store import RETENTION_DAYS, UsageStore

DAY_S = 86_400.0
NOW_S = 1_800_000_000.0  # 2027-01-15
TODAY = "2027-01-15"


class Replica:
    def __init__(self, kube, name="replica"):
        self.now_s = NOW_S
        self.ledger = UsageLedger()
        self.store = UsageStore(kube, "default", name, self.ledger, lambda: self.now_s)

    def count(self, key, model="m", requests=1, prompt=10, completion=5, tenant="t", day=TODAY):
        row = UsageRow(key, tenant, model, requests, 0, prompt, 2, completion)
        self.ledger.add([row], day)


async def stored(kube):
    found, _ = await kube.list(CONFIGMAPS, "default", labels=USAGE_SELECTOR)
    return total_usage(
        (key, decode_usage(text)) for each in found for key, text in each["data"].items()
    )


async def counts(kube, key="a", model="m"):
    return (await stored(kube))[key].models[model]


@pytest.fixture
def kube():
    return FakeKube()


async def test_counts_are_added_to_what_is_stored(kube):
    replica = Replica(kube)
    replica.count("a")
    replica.count("a", "n", prompt=7)
    replica.count("b")
    assert await replica.store.flush()
    replica.count("a", tenant="moved")
    assert await replica.store.flush()
    found = await stored(kube)
    assert found["a"] == KeyUsage(
        "moved",
        {"m": UsageCounts(2, 0, 20, 4, 10, TODAY), "n": UsageCounts(1, 0, 7, 2, 5, TODAY)},
    )
    assert found["b"].models == {"m": UsageCounts(1, 0, 10, 2, 5, TODAY)}
    assert [name for plural, name in kube.objects] == ["kubeai-usage-0"]


async def test_nothing_is_written_without_requests(kube):
    replica = Replica(kube)
    assert await replica.store.flush()
    replica.count("a")
    assert await replica.store.flush()
    assert await replica.store.flush()
    assert len(kube.writes) == 1


async def test_a_replica_that_starts_adds_to_what_others_have_stored(kube):
    for name in ("first", "second", "third"):
        replica = Replica(kube, name)
        replica.count("a")
        assert await replica.store.flush()
    assert (await counts(kube)).requests == 3


async def test_replicas_that_write_at_the_same_time_lose_nothing(kube):
    replicas = [Replica(kube, f"replica-{n}") for n in range(3)]
    for _ in range(4):
        for replica in replicas:
            replica.count("a")
            replica.count(replica.store._writer)
        done = await asyncio.gather(*(replica.store.flush() for replica in replicas))
        assert all(done)
    assert (await counts(kube)).requests == 12
    assert len(await stored(kube)) == 4


@pytest.mark.parametrize("status", [0, 500, 504])
@pytest.mark.parametrize("first", [True, False])
async def test_a_write_whose_answer_is_lost_is_not_repeated(kube, status, first):
    def lose(verb, plural, name):
        kube.after = lambda *_: None
        raise ApiError(status, "Timeout", "no answer")

    replica = Replica(kube)
    if not first:
        replica.count("a")
        assert await replica.store.flush()
    kube.after = lose
    replica.count("a")
    assert not await replica.store.flush()
    replica.count("a")
    assert await replica.store.flush()
    assert (await counts(kube)).requests == 3 - first


async def test_a_write_whose_answer_is_lost_is_recognised_after_writes_of_others(kube):
    def lose(verb, plural, name):
        kube.after = lambda *_: None
        raise ApiError(0, "Timeout", "no answer")

    replica, other = Replica(kube), Replica(kube, "other")
    kube.after = lose
    replica.count("a")
    assert not await replica.store.flush()
    for _ in range(5):
        other.count("a")
        assert await other.store.flush()
    assert await replica.store.flush()
    assert (await counts(kube)).requests == 6


async def test_a_write_that_was_cancelled_is_made_or_recognised_by_the_next_flush(kube):
    for cancelled_after in (0, 1, 2, 3, 4, 5, 6, 8):
        replica = Replica(kube, "replica")
        replica.count("a")
        before = (await counts(kube)).requests if kube.objects else 0
        task = asyncio.create_task(replica.store.flush())
        for _ in range(cancelled_after):
            await asyncio.sleep(0.0005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await replica.store.flush()
        assert (await counts(kube)).requests == before + 1


async def test_counts_wait_until_the_api_accepts_them(kube):
    def refuse(verb, plural, name):
        raise ApiError(403, "Forbidden", "no")

    replica = Replica(kube)
    kube.before = refuse
    for n in range(3):
        replica.count("a")
        replica.count(f"key-{n}")
        assert not await replica.store.flush()
    assert replica.store.failures == 3
    kube.before = lambda *_: None
    assert await replica.store.flush() or await replica.store.flush()
    found = await stored(kube)
    assert found["a"].models["m"].requests == 3
    assert set(found) == {"a", "key-0", "key-1", "key-2"}


async def test_a_config_map_that_was_deleted_starts_again(kube):
    replica = Replica(kube)
    replica.count("a")
    replica.count("b")
    assert await replica.store.flush()
    kube.objects.clear()
    replica.count("a")
    assert await replica.store.flush()
    found = await stored(kube)
    assert found["a"].models["m"].requests == 1
    assert set(found) == {"a"}


async def test_an_entry_that_is_malformed_starts_again_and_others_are_kept(kube):
    replica = Replica(kube)
    replica.count("a")
    replica.count("b")
    assert await replica.store.flush()
    data = kube.objects["configmaps", "kubeai-usage-0"]["data"]
    data["b"] = "{"
    again = Replica(kube, "again")
    again.count("a")
    again.count("b")
    assert await again.store.flush()
    found = await stored(kube)
    assert (found["a"].models["m"].requests, found["b"].models["m"].requests) == (2, 1)


async def test_ten_thousand_keys_of_ten_models_fit_with_room_to_spare(kube):
    replica = Replica(kube)
    for key in range(1_000):  # a tenth, which takes a tenth of the time
        for model in range(10):
            replica.count(
                f"team-{key % 50:02}-production-key-{key:05}",
                f"llama-3.1-8b-instruct-fp8-l4-{model}",
                10**9,
                10**12,
                10**11,
                tenant=f"tenant-with-a-name-{key % 50}",
            )
    assert await replica.store.flush()
    found, _ = await kube.list(CONFIGMAPS, "default")
    sizes = [sum(map(len, each["data"])) + sum(map(len, each["data"].values())) for each in found]
    assert 10 * len(found) <= shards.SHARDS_MAX // 2
    assert max(sizes) < 1 << 20
    total = await stored(kube)
    assert len(total) == 1_000
    assert all(len(usage.models) == 10 for usage in total.values())


async def test_what_does_not_fit_is_reported_and_the_rest_is_stored(kube, monkeypatch):
    monkeypatch.setattr(shards, "SHARDS_MAX", 2)
    monkeypatch.setattr(shards, "SHARD_MAX_BYTES", 400)
    replica = Replica(kube)
    for key in range(20):
        replica.count(f"key-{key}")
    assert not await replica.store.flush()
    some = await stored(kube)
    assert 2 <= len(some) < 20
    for key in some:
        replica.count(key)
    assert await replica.store.flush()
    assert {usage.models["m"].requests for usage in (await stored(kube)).values()} == {2}


async def test_keys_and_models_that_are_gone_are_forgotten_after_their_retention(kube):
    replica = Replica(kube)
    for key in ("kept", "gone"):
        for model in ("m", "gone"):
            replica.count(key, model)
    assert await replica.store.flush()
    replica.now_s += (RETENTION_DAYS - 1) * DAY_S
    await replica.store.tidy({"kept"}, {"m"})
    assert {key: set(usage.models) for key, usage in (await stored(kube)).items()} == {
        "kept": {"m", "gone"},
        "gone": {"m", "gone"},
    }
    replica.now_s += 2 * DAY_S
    await replica.store.tidy({"kept"}, {"m"})
    assert {key: set(usage.models) for key, usage in (await stored(kube)).items()} == {
        "kept": {"m"}
    }
    replica.count("gone", day="2027-06-01")
    assert await replica.store.flush()
    assert (await counts(kube, "gone")).requests == 1


async def test_the_usage_of_keys_in_use_is_kept_however_old_it_is(kube):
    replica = Replica(kube)
    replica.count("a")
    assert await replica.store.flush()
    replica.now_s += 10 * RETENTION_DAYS * DAY_S
    await replica.store.tidy({"a"}, {"m"})
    assert (await counts(kube)).requests == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_no_request_is_lost_or_counted_twice_with_random_faults(seed):
    async def run():
        rng = random.Random(seed)
        kube = FakeKube()
        faulty = True

        def fault(verb, plural, name):
            if faulty and rng.random() < 0.3:
                raise ApiError(rng.choice([0, 409, 500, 504]), "Fault", "on purpose")

        kube.before = kube.after = fault
        replicas = [Replica(kube, f"replica-{n}") for n in range(2)]
        expected = 0

        async def act(replica):
            nonlocal expected
            for _ in range(rng.randint(1, 5)):
                for _ in range(rng.randint(0, 3)):
                    replica.count(rng.choice("ab"), rng.choice("mn"))
                    expected += 1
                await replica.store.flush()

        await asyncio.gather(*map(act, replicas))
        faulty = False
        for replica in replicas:
            for _ in range(3):
                await replica.store.flush()
            assert await replica.store.flush()
        total = await stored(kube)
        assert expected == sum(
            each.requests for usage in total.values() for each in usage.models.values()
        )

    asyncio.run(run())


@pytest.mark.looptime
async def test_usage_is_stored_while_running_and_at_the_end(kube):
    keys = {"a"}
    book = UsageBook(kube, "default", "replica", keys=lambda: keys, models=lambda: ["m"])
    running = asyncio.create_task(book.run())
    row = UsageRow("a", "t", "m", 1, 0, 10, 2, 5)
    book.add(UsageReport((row,)))
    await asyncio.sleep(FLUSH_INTERVAL_S * FLUSH_JITTER + 1)
    assert (await counts(kube)).requests == 1
    book.add(UsageReport((row, row)))
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await book.close()
    assert (await counts(kube)).requests == 3


@pytest.mark.looptime
async def test_an_end_without_the_api_does_not_wait_forever(kube):
    async def hang(*args, **options):
        await asyncio.get_running_loop().create_future()

    book = UsageBook(kube, "default", "replica", keys=lambda: None, models=list)
    book.add(UsageReport((UsageRow("a", "t", "m", 1, 0, 10, 2, 5),)))
    kube.create = hang
    began_s = asyncio.get_running_loop().time()
    await book.close()
    assert asyncio.get_running_loop().time() - began_s < 20


async def test_replicas_that_fill_a_config_map_at_once_spill_into_the_next(kube, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_MAX_BYTES", 4096)

    patch = kube.patch

    async def limited(resource, name, body, *arguments, **options):
        data = kube.objects[resource.plural, name]["data"] | body["data"]
        if sum(map(len, data.values())) > 2500:
            raise ApiError(422, "Invalid", "Too long: must have at most 1048576 bytes")
        return await patch(resource, name, body, *arguments, **options)

    kube.patch = limited
    replicas = [Replica(kube, "first"), Replica(kube, "second")]
    for replica in replicas:
        replica.count("a")
        assert await replica.store.flush()
    for replica in replicas:
        replica.count("a")
        for n in range(24):
            replica.count(f"{replica.store._writer}-{n}")
    assert await replicas[0].store.flush()
    assert not await replicas[1].store.flush()
    assert await replicas[1].store.flush()
    assert (await counts(kube)).requests == 4
    assert len(await stored(kube)) == 1 + 2 * 24
    assert sorted(name for _, name in kube.objects) == ["kubeai-usage-0", "kubeai-usage-1"]
