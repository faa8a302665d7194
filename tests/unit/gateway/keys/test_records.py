"""The keys of a worker: snapshots and changes from the supervisor, and credentials."""

import pytest
from fakes.api_keys import ALICE, ask, bearer, change, give, record
from structlog.testing import capture_logs

from kubeai.api.config.system import KeysConfig
from kubeai.gateway.event_counts import EventCounter
from kubeai.gateway.keys import Keys, check_credential
from kubeai.gateway.local_routes import make_app
from kubeai.openai.errors import ErrorResponse
from kubeai.routing.keys import KeyDelta, KeySnapshot


def keys() -> Keys:
    table = Keys({}, 0, EventCounter())
    table.apply(KeySnapshot(1, (record("a", "ka"), record("b", "kb", models="x"))))
    return table


def test_a_snapshot_replaces_all_keys():
    table = keys()
    a, b = table.by_name["a"], table.by_name["b"]
    assert table.apply(KeySnapshot(2, (record("a", "ka", priority=3), record("c", "kc"))))
    assert table.by_name["a"] is a
    assert (a.priority, a.is_revoked, b.is_revoked) == (3, False, True)
    assert set(table.by_digest.values()) == set(table.by_name.values())
    assert set(table.by_name) == {"a", "c"}
    assert not table.apply(KeySnapshot(2, (record("a", "ka"), record("c", "kc"))))


def test_changed_limits_change_the_key_that_requests_have():
    table = keys()
    b = table.by_name["b"]
    changed = record("b", "kb", tenant="t", tokens_per_minute=5, is_admin=True)
    assert not table.apply(KeyDelta(2, "b", changed))
    assert table.by_name["b"] is b
    assert (b.tenant, b.tokens_per_minute, b.is_admin, b.restricted) == ("t", 5, True, False)


def test_another_digest_revokes_the_key_and_another_row_replaces_it():
    table = keys()
    a, b = table.by_name["a"], table.by_name["b"]
    assert table.apply(KeyDelta(2, "a", record("a", "new")))
    assert not table.apply(KeyDelta(3, "b", record("b", "kb", row=7)))
    assert table.apply(KeyDelta(4, "a", None))
    assert not table.apply(KeyDelta(5, "a", None))
    assert (a.is_revoked, b.is_revoked, table.by_name["b"].row) == (True, False, 7)
    assert set(table.by_digest.values()) == {table.by_name["b"]}


def test_a_key_that_moves_to_another_secret_stays_usable():
    table = keys()
    table.apply(KeyDelta(2, "z", record("z", "ka")))
    table.apply(KeyDelta(3, "a", None))
    assert table.by_digest[record("z", "ka").digest].name == "z"


def test_an_invalid_selector_selects_nothing():
    table = Keys({}, 0, EventCounter())
    table.apply(KeyDelta(1, "a", record("a", "ka", models="x in (")))
    key = table.by_name["a"]
    assert key.restricted
    assert not key.allows_labels({"x": "1"})


async def test_a_credential_from_elsewhere_is_checked_and_counted():
    class Context:
        key_table = Keys({}, 1, EventCounter())

    context = Context()
    context.key_table.apply(KeyDelta(1, "a", record("a", "ka", is_admin=True)))
    context.key_table.apply(KeyDelta(2, "b", record("b", "kb")))
    with capture_logs() as logs:
        assert check_credential(context, b"ka", "192.0.2.1").name == "a"
        for status in (401, 429):
            with pytest.raises(ErrorResponse) as refused:
                check_credential(context, b"wrong", "192.0.2.1")
            assert refused.value.status == status
        with pytest.raises(ErrorResponse, match="The API key in the login is not valid"):
            check_credential(context, b"", "192.0.2.2")
        assert check_credential(context, b"ka", "192.0.2.1").name == "a"
        with pytest.raises(ErrorResponse, match="administrator"):
            check_credential(context, b"kb", "192.0.2.3")
    assert [line["path"] for line in logs] == ["/ui/login"] * 4
    assert (logs[-1]["code"], logs[-1]["key"]) == ("admin_required", "b")
    assert len(context.key_table.failures) == 2  # a valid key is no failure of its address


async def test_a_worker_without_its_keys_rejects_everything(start):
    world = await start(local_routes=make_app, keys=KeysConfig(required=True))
    assert (await ask(await world.client(), bearer(ALICE))).status == 401
    give(world, record("alice", ALICE))
    assert (await ask(await world.client(), bearer(ALICE))).status == 404


async def test_a_process_without_keys_of_its_own_acknowledges_their_changes(start):
    world = await start()
    change(world, "alice", record("alice", ALICE))
    assert world.context.key_table is None
    assert world.supervisors.acknowledged(0) == world.publisher.version == 1
